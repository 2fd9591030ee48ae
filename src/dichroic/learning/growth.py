"""How mixtures grow: the one rule of which model comes after another, and of how many iterations each takes.

From one Gaussian, of low rank where sources are large: its rank doubles while held-out observations are better
explained; then sources may be scaled anew, entry by entry; then the number of components doubles.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dichroic.config import MixtureConfig

INITIAL_RANK = 8  # of covariances of large sources
LEAST_OBSERVATIONS = 10  # for each component


@dataclass(frozen=True)
class Limits:
    """The largest rank and number of components, and how many sizes may be no better in a row."""

    rank: int
    components: int
    patience: int


@dataclass(frozen=True)
class Widen:
    """One Gaussian anew, of this rank."""

    rank: int


@dataclass(frozen=True)
class Rescale:
    """One Gaussian anew, of sources whose entries have scales of their own."""


@dataclass(frozen=True)
class Grow:
    """More components, from those there are."""

    components: int


@dataclass(frozen=True)
class Stop:
    """The best mixtures so far are the last."""


Next = Widen | Rescale | Grow | Stop


def next_model(
    components: int, rank: int | None, *, better: bool, stale: int, uneven: bool, limits: Limits
) -> Next:
    """What comes after mixtures of so many `components` and of a `rank` (None: of full rank).

    `better` is whether held-out observations prefer them to the best before, `stale` how many sizes in a row they
    did not, `uneven` whether entries of the sources vary so differently that scales of their own serve them.
    """
    if components == 1 and rank is not None:
        if better and rank < limits.rank:
            return Widen(min(2 * rank, limits.rank))
        if uneven:
            return Rescale()
    if components < limits.components and stale < limits.patience:
        return Grow(doubled(components, limits.components))
    return Stop()


def doubled(size: int, most: int) -> int:
    """Twice the `size`, at most `most`."""
    return min(2 * size, most)


def sizes(first: int, most: int) -> Iterator[int]:
    """`first`, twice that, …, `most`."""
    yield first
    while first < most:
        yield (first := doubled(first, most))


def iterations_of(size: int, config: MixtureConfig) -> int:
    """The iterations of mixtures of `size` components."""
    if size == 1:
        return config.gaussian_iterations
    return config.final_iterations if size >= config.components else config.iterations


def costs_left(
    done: int, size: int, groups: int, config: MixtureConfig, *, large: bool
) -> Iterator[float]:
    """The relative costs of the iterations that may come after `done` of mixtures of `size` components.

    An iteration is taken to cost as much as the number of components; growth often stops before the largest that
    settings allow, so they are a bound. `groups` is the number of groups of sources to be learned after this one,
    `large` whether covariances are of low rank.
    """
    ranks = 1 + (math.ceil(math.log2(max(config.rank / INITIAL_RANK, 1))) if large else 0)
    starts = ranks * (2 if large and config.scaling != "common" else 1)
    for first, finished in ((size, done), *[(1, 0)] * groups):
        for n in sizes(first, config.components):
            count = iterations_of(n, config) * (starts if n == 1 else 1)
            yield from [float(n)] * max(count - (finished if n == first else 0), 0)
