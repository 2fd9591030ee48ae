"""Observations that processes share, in memory or in files (`observations.Observed`)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import equinox as eqx
import jax
import numpy as np

from dichroic import layout
from dichroic.batching import split, take
from dichroic.blocks import block_size, bytes_each
from dichroic.machine import resident_memory
from dichroic.observations import Observations, Observed
from dichroic.operators import Operator
from dichroic.operators.learned import Parameters, with_parameters
from dichroic.problem import View, joint_observations

_RUNS = 16  # of neighbours, of which a few of many observations are
_GAP = 64  # observations that are rather read than left out

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Dataset:
    """Observations in memory that processes share (`observations.Observed`)."""

    whole: Observations

    @property
    def count(self) -> int:
        """The number of observations."""
        return self.whole.count

    @property
    def size(self) -> int:
        """The number of entries of one observation."""
        return self.whole.size

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources seen."""
        return self.whole.sources

    @property
    def dims(self) -> dict[str, int]:
        """The number of entries of each source."""
        return self.whole.dims

    @property
    def operators(self) -> Mapping[str, Operator]:
        """The operators of some of the observations."""
        return self.whole.operators

    @property
    def first(self) -> int:
        """The number of the first observation of this process."""
        return layout.share(self.count)[0]

    def blocks(self) -> Iterator[Observations]:
        """The observations of this process."""
        yield take(self.whole, slice(*layout.share(self.count)))

    def head(self, count: int) -> Observations:
        """The first `count`, or all."""
        return self.whole.head(count)

    def some(self, count: int) -> Observations:
        """`count` of them, evenly spread, or all."""
        return self.whole.some(count)

    def total(self, tree: Tree) -> Tree:
        """The sum of what the processes have found."""
        return layout.total(tree)

    def gathered(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """The rows of all processes."""
        return layout.gathered(rows, axis)

    def at(self, operators: Parameters) -> "Dataset":
        """With the numbers of operators that are learned replaced by `operators`."""
        return Dataset(self.whole.at(operators))


class Selectable(Protocol):
    """Observations that can be had in parts: a `View`, or one that stays in its files."""

    @property
    def count(self) -> int:
        """The number of observations."""
        ...

    def select(self, index: slice) -> View:
        """Consecutive observations, in memory."""
        ...


@dataclass(frozen=True)
class StoredDataset:
    """Observations in files: those of co-observed `views` that are not `left_out`, numbered without these.

    Read `block` at a time; a block is of one process.
    """

    views: tuple[Selectable, ...]
    left_out: np.ndarray  # numbers in the files, in order
    block: int
    parameters: Parameters = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of observations."""
        return self.views[0].count - len(self.left_out)

    @cached_property
    def _one(self) -> Observations:
        return self.head(1)

    @property
    def size(self) -> int:
        """The number of entries of one observation."""
        return self._one.size

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources seen."""
        return self._one.sources

    @property
    def dims(self) -> dict[str, int]:
        """The number of entries of each source."""
        return self._one.dims

    @property
    def operators(self) -> Mapping[str, Operator]:
        """The operators of the first observation."""
        return self._one.operators

    @property
    def own(self) -> list[tuple[int, int, int]]:
        """`(number, start, stop)` of each block of this process."""
        every = -(-self.count // self.block)
        numbers = range(*layout.share(every))
        return [(i, i * self.block, min((i + 1) * self.block, self.count)) for i in numbers]

    @property
    def first(self) -> int:
        """The number of the first observation of this process."""
        return self.own[0][1]

    def blocks(self) -> Iterator[Observations]:
        """The observations of this process, a block at a time."""
        for _, start, stop in self.own:
            yield self.read(start, stop)

    def head(self, count: int) -> Observations:
        """The first `count`, or all."""
        return self.read(0, min(count, self.count))

    def some(self, count: int) -> Observations:
        """`count` of them, or all: runs of neighbours, evenly spread."""
        if count >= self.count:
            return self.read(0, self.count)
        run = -(-count // _RUNS)
        starts = np.linspace(0, self.count - run, -(-count // run)).astype(int)
        return together([self.read(int(i), int(i) + run) for i in starts])

    def total(self, tree: Tree) -> Tree:
        """The sum of what the processes have found."""
        return layout.total(tree)

    def gathered(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """The rows of all processes."""
        return layout.gathered(rows, axis)

    def at(self, operators: Parameters) -> "StoredDataset":
        """With the numbers of operators that are learned replaced by `operators`."""
        return dataclasses.replace(self, parameters=operators)

    def read(self, start: int, stop: int) -> Observations:
        """The observations from `start` up to `stop`."""
        before = self.left_out - np.arange(len(self.left_out))  # each, numbered as they are here
        at = lambda i: i + int(np.searchsorted(before, i, side="right"))
        rows = np.setdiff1d(np.arange(at(start), at(stop - 1) + 1), self.left_out)
        return with_parameters(joint_observations(_consecutive(self.views, rows)), self.parameters)


def _consecutive(views: Sequence[Selectable], rows: np.ndarray) -> list[View]:
    """The observations `rows` (in order) of co-observed views, read in one go."""
    some = [view.select(slice(int(rows[0]), int(rows[-1]) + 1)) for view in views]
    if len(rows) == rows[-1] + 1 - rows[0]:
        return some
    return [view.select(rows - rows[0]) for view in some]


def read_rows(
    views: Sequence[Selectable], rows: np.ndarray
) -> tuple[Observations, dict[str, np.ndarray]]:
    """The observations `rows` (in order) of co-observed views, and the truth of those where it is known."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > _GAP) + 1)
    read = [_consecutive(views, run) for run in runs]
    truth = [{k: np.asarray(x) for v in some for k, x in v.truth.items()} for some in read]
    joined = {k: np.concatenate([t[k] for t in truth]) for k in truth[0]}
    return together([joint_observations(some) for some in read]), joined


def together(parts: Sequence[Observations]) -> Observations:
    """The observations of all `parts`, which share what they share."""
    rows, shared = zip(*map(split, parts), strict=True)
    return eqx.combine(jax.tree.map(lambda *a: np.concatenate(a), *rows), shared[0])


def rows_within(memory: int, views: Sequence[Selectable], processes: int) -> int:
    """How many observations of co-observed `views` are learned from at a time, within `memory` bytes."""
    obs = joint_observations(_consecutive(views, np.arange(1)))
    own = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(split(obs)[0], eqx.is_array)))
    each = bytes_each(1, sum(obs.dims.values()), own)
    held = int(resident_memory() * 2**20)
    return block_size(memory, held, each, views[0].count, processes)


def shared_out(views: Sequence[Observations]) -> tuple[Observed, ...]:
    """`views` for several processes to share; as they are for one, or where there are too few to share."""
    if layout.processes() == 1 or min(obs.count for obs in views) < layout.processes():
        return tuple(views)
    return tuple(map(Dataset, views))
