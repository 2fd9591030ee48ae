"""How long the phase of a fit may still take: a bound on its laps, by what the last one took.

Laps of mixtures are taken to cost as much as the number of components; sizes double until the most that the
settings allow, and growth often stops before, so the bound is from above.
"""

import math
from collections.abc import Iterator, Sequence

from dichroic.config import FitConfig, MixtureConfig

LEAST_RANK = 8  # of covariances of large sources; it doubles while the held-out evidence grows


def laps_of(size: int, config: MixtureConfig) -> int:
    """The laps of mixtures of `size` components."""
    if size == 1:
        return config.gaussian_laps
    return config.final_laps if size >= config.components else config.laps


def costs_left(
    phase: str, lap: int, size: int, groups: int, config: FitConfig, *, large: bool
) -> Iterator[float]:
    """The relative costs of the laps that `phase` may still have after `lap` of them (of this size).

    `size` is the number of components, `groups` the number of groups of sources to be learned after this one,
    `large` whether the sources have covariances of low rank.
    """
    if phase != "mixture":
        last = config.polish if phase == "polish" else config.diffusion.laps
        yield from [1.0] * max(last - lap, 0)
        return
    c = config.mixture
    ranks = 1 + (math.ceil(math.log2(max(c.rank / LEAST_RANK, 1))) if large else 0)
    starts = ranks * (2 if large and c.units != "same" else 1)
    for first, done in ((size, lap), *[(1, 0)] * groups):
        for n in sizes(first, c.components):
            laps = laps_of(n, c) * (starts if n == 1 else 1)
            yield from [float(n)] * max(laps - (done if n == first else 0), 0)


def sizes(first: int, most: int) -> Iterator[int]:
    """`first`, twice that, …, `most`."""
    yield first
    while first < most:
        first = min(2 * first, most)
        yield first


def seconds_left(seconds: float, cost: float, costs: Sequence[float]) -> float:
    """What laps of `costs` take, if one of `cost` took `seconds`."""
    return round(seconds / cost * sum(costs), 3)
