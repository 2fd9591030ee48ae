"""A view that stays in its files, and what stands for all observations where not all are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dichroic.errors import DataError
from dichroic.operators import Operator, Shape
from dichroic.operators.noise import Noise
from dichroic.problem.observations import Observations
from dichroic.problem.view import View, bytes_each, numbering

HEAD = 64  # observations
FINGERPRINT_RUNS = 32, 8  # runs of as many observations that tell one view from another
SOME = 4096  # observations that are looked at where not all are in memory,
RUNS = 64  # in runs of neighbours, evenly spread,
SOME_BYTES = 64 * 2**20  # and fewer of them where they are large


@dataclass(frozen=True, eq=False)
class LazyView:
    """Observations of one kind of mixture that stay in their files: `select` reads no more than it is asked for.

    It is made by `load_problem(…, stored=True)` and `open_view`. What all observations share (shapes, kinds of
    operators) is read off `head`.

    Args:
        name: how reports call the view.
        count: the number of observations.
        shape: the shape of one observation.
        read_rows: the observations of a slice, of increasing indices, or all for `None`, as a checked `View`.
        group: views with the same group are co-observed.
        held_out: `(n,)` booleans, true for the observations that are kept from training, where that is stated.
        probe: whether operators are probed (see `View`).
        where: the file and the position in it, for messages.
    """

    name: str
    count: int
    shape: Shape
    read_rows: Callable[[slice | np.ndarray | None], View]
    group: str | None = None
    held_out: np.ndarray | None = None
    probe: bool = True
    where: str = ""

    @property
    def label(self) -> str:
        """How messages call the view."""
        return f"view {self.name!r}"

    @property
    def held_out_mask(self) -> np.ndarray | None:
        """`held_out`, under the name that it has for a `View`."""
        return self.held_out

    @cached_property
    def head(self) -> View:
        """The first 64 observations."""
        return self.select(slice(0, HEAD))

    @property
    def operators(self) -> Mapping[str, Operator]:
        """The operators; those that differ from observation to observation are of the first 64."""
        return self.head.operators

    @property
    def noise_model(self) -> Noise:
        """The noise model; where it differs from observation to observation, of the first 64."""
        return self.head.noise_model

    @property
    def fingerprint_payload(self) -> tuple[Any, ...]:
        """What tells this view from others: sizes, and 256 observations in 32 runs, evenly spread."""
        some = self.select(spread(self.count, *FINGERPRINT_RUNS)).fingerprint_payload
        return (*some, self.count, self.shape, self.held_out)

    def select(self, index: slice | np.ndarray) -> View:
        """Some observations: consecutive ones, or by increasing indices; what all share is read as a whole.

        Raises a `DichroicError` for what is wrong with them, as `load_problem` does.
        """
        if isinstance(index, slice):
            start, stop, step = index.indices(self.count)
            if step != 1 or stop <= start:
                raise DataError(
                    f"{self.where}: no consecutive observations of {self.count}: {index}"
                )
            return self.read_rows(slice(start, stop))
        index = np.asarray(index)
        bounds = np.concatenate([[-1], index, [self.count]])
        if not len(index) or np.any(np.diff(bounds) < 1):
            raise DataError(f"{self.where}: no increasing indices of {self.count} observations")
        with numbering(int(index[0]), int(index[-1]) + 1, len(index)):
            return self.read_rows(index)

    def read(self) -> View:
        """All observations, in memory."""
        return self.read_rows(None)

    def prepare(self, offsets: Mapping[str, np.ndarray] | None = None) -> Observations:
        """All observations, as `Observations`, less what sources of the values `offsets` look like."""
        return self.read().prepare(offsets)


AnyView = View | LazyView


def some_of(views: Sequence[AnyView]) -> list[View]:
    """Co-observed views, as they are where they are in memory; else the same few observations of each.

    Of those in files at most 4,096, evenly spread in 64 runs, that take some 64 MiB together.
    """
    heads = [view.head for view in views]
    if all(head is view for head, view in zip(heads, views, strict=True)):
        return heads
    each = sum(bytes_each(head) for head in heads)
    most = min(max(SOME_BYTES // each, RUNS), SOME)
    index = spread(views[0].count, RUNS, most // RUNS)
    return [view.select(index) for view in views]


def spread(count: int, runs: int, each: int) -> np.ndarray:
    """The numbers of `runs` times `each` neighbouring observations, evenly spread over `count`; all, if few."""
    if count <= runs * each:
        return np.arange(count)
    starts = np.linspace(0, count - each, runs).astype(int)
    return (starts[:, None] + np.arange(each)).ravel()
