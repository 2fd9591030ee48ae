"""Observations a batch at a time: shared by processes, or read from files.

What learns takes `AnyObservations`, and goes through the `blocks` of its own process; sums over all processes are
`total`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import equinox as eqx
import jax
import numpy as np

from dichroic.errors import DataError
from dichroic.numerics.batching import split
from dichroic.operators import Operator
from dichroic.operators.learnable import Parameters
from dichroic.problem.lazy_view import AnyView
from dichroic.problem.observations import Observations
from dichroic.problem.problem import joint_observations
from dichroic.problem.splits import IndexSet
from dichroic.runtime import distributed
from dichroic.runtime.blocks import block_size, bytes_each, spans
from dichroic.runtime.hardware import resident_memory

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class StoredObservations:
    """Some observations of co-observed `views` that stay in their files: those with the given `indices`."""

    views: tuple[AnyView, ...]
    indices: IndexSet
    parameters: Parameters = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of observations."""
        return self.indices.count

    def between(self, start: int, stop: int) -> Observations:
        """The observations from `start` up to `stop`."""
        return self._read(self.indices.between(start, stop))

    def some(self, count: int) -> Observations:
        """`count` of them, evenly spread, or all."""
        return self._read(self.indices.spread(count))

    def at(self, operators: Parameters) -> "StoredObservations":
        """With the parameters of operators that are learned replaced by `operators`."""
        return dataclasses.replace(self, parameters=operators)

    def _read(self, index: np.ndarray) -> Observations:
        return joint_observations([view.select(index) for view in self.views], self.parameters)


@dataclass(frozen=True)
class ObservationBatches:
    """Observations of which each process has its own part, in batches of `batch_size` where they are in files.

    A batch is of one process; of observations in memory a process has one batch.
    """

    whole: Observations | StoredObservations
    batch_size: int | None = None

    @property
    def count(self) -> int:
        """The number of observations, of all processes."""
        return self.whole.count

    @cached_property
    def like(self) -> Observations:
        """Observations that are as all of them: with their sources, operators and shapes."""
        return self.whole if isinstance(self.whole, Observations) else self.head(1)

    @property
    def size(self) -> int:
        """The number of entries of one observation."""
        return self.like.size

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources seen."""
        return self.like.sources

    @property
    def dims(self) -> dict[str, int]:
        """The number of entries of each source."""
        return self.like.dims

    @property
    def operators(self) -> Mapping[str, Operator]:
        """The operators of some of the observations."""
        return self.like.operators

    @cached_property
    def own(self) -> list[tuple[int, int, int]]:
        """`(number, start, stop)` of each batch of this process."""
        if self.batch_size is None:
            return [(0, *distributed.local_span(self.count))]
        every = [(i, *span) for i, span in enumerate(spans(self.count, self.batch_size))]
        return every[slice(*distributed.local_span(len(every)))]

    @property
    def first(self) -> int:
        """The index of the first observation of this process."""
        return self.own[0][1]

    def blocks(self) -> Iterator[Observations]:
        """The observations of this process, a batch at a time."""
        for _, start, stop in self.own:
            yield self.between(start, stop)

    def between(self, start: int, stop: int) -> Observations:
        """The observations from `start` up to `stop`."""
        return self.whole.between(start, stop)

    def head(self, count: int) -> Observations:
        """The first `count`, or all."""
        return self.between(0, min(count, self.count))

    def some(self, count: int) -> Observations:
        """`count` of them, evenly spread, or all."""
        return self.whole.some(count)

    def total(self, work: Callable[[], Tree]) -> Tree:
        """The sum of what `work` finds in every process."""
        return distributed.all_reduce_sum(distributed.run_on_all(work))

    def gathered(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """The rows of all processes."""
        return distributed.all_gather(rows, axis)

    def at(self, operators: Parameters) -> "ObservationBatches":
        """With the parameters of operators that are learned replaced by `operators`."""
        return dataclasses.replace(self, whole=self.whole.at(operators))


AnyObservations = Observations | ObservationBatches


def in_memory(obs: AnyObservations) -> Observations:
    """All of `obs` at once, those of other processes too."""
    return obs if isinstance(obs, Observations) else obs.head(obs.count)


def every_block(views: Iterable[AnyObservations]) -> Iterator[Observations]:
    """The blocks of all `views`."""
    return itertools.chain.from_iterable(obs.blocks() for obs in views)


def numbered(obs: AnyObservations) -> Iterator[tuple[int, Observations]]:
    """The blocks of this process, each with the number of its first observation."""
    start = obs.first
    for block in obs.blocks():
        yield start, block
        start += block.count


def stored_batches(
    views: Sequence[AnyView], indices: IndexSet, memory: int, parameters: Parameters
) -> ObservationBatches:
    """The observations of co-observed `views` with the given `indices`, in batches for so many bytes of memory.

    Raises `DataError` where there are fewer of them than processes, `ConfigError` where `memory` is too little.
    """
    if indices.count < distributed.processes():
        raise DataError(
            f"{views[0].label} has {indices.count} observations to learn from, fewer than the "
            f"{distributed.processes()} processes: use fewer"
        )
    size = min(rows_within(memory, views), indices.count // distributed.processes())
    return ObservationBatches(StoredObservations(tuple(views), indices, parameters), size)


def rows_within(memory: int, views: Sequence[AnyView]) -> int:
    """How many observations of co-observed `views` are learned from at a time, within `memory` bytes.

    A power of two, so that little more or less memory in use does not change what a fit that is resumed gives.
    """
    one = joint_observations([view.select(slice(0, 1)) for view in views])
    return 1 << observations_within(memory, one, views[0].count).bit_length() - 1


def observations_within(
    memory: int, one: Observations, count: int, *, n_draws: int = 1, shards: int = 1
) -> int:
    """How many of `count` observations like `one` fit in `memory` bytes with what the process holds already."""
    own = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(split(one)[0], eqx.is_array)))
    each = bytes_each(n_draws, sum(one.dims.values()), own)
    return block_size(memory, int(resident_memory() * 2**20), each, count, shards)


def shared_by_processes(views: Sequence[Observations]) -> tuple[AnyObservations, ...]:
    """`views` for several processes to share; as they are for one, or where there are too few to share."""
    if distributed.processes() == 1 or min(obs.count for obs in views) < distributed.processes():
        return tuple(views)
    return tuple(map(ObservationBatches, views))
