"""Observations that processes share, in memory or in files (`observations.ObservationBatches`)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import equinox as eqx
import jax
import numpy as np

from dichroic.errors import DataError
from dichroic.numerics.batching import split, take
from dichroic.operators import Operator
from dichroic.operators.learnable import Parameters
from dichroic.problem.observations import ObservationBatches, Observations
from dichroic.problem.problem import joint_observations
from dichroic.problem.view import AnyView
from dichroic.runtime import distributed
from dichroic.runtime.blocks import block_size, bytes_each, spans
from dichroic.runtime.hardware import resident_memory

_PAGE = 65536  # observations that are counted together

Tree = TypeVar("Tree")


class _Shared:
    """What is the same wherever the observations are; `like` are some that are as all of them."""

    @property
    def like(self) -> Observations:
        """Some of the observations, or all."""
        raise NotImplementedError

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

    def total(self, work: Callable[[], Tree]) -> Tree:
        """The sum of what `work` finds in every process."""
        return distributed.all_reduce_sum(distributed.run_on_all(work))

    def gathered(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """The rows of all processes."""
        return distributed.all_gather(rows, axis)


@dataclass(frozen=True)
class Dataset(_Shared):
    """Observations in memory that processes share (`observations.ObservationBatches`)."""

    whole: Observations

    @property
    def like(self) -> Observations:
        """All of them."""
        return self.whole

    @property
    def count(self) -> int:
        """The number of observations."""
        return self.whole.count

    @property
    def first(self) -> int:
        """The number of the first observation of this process."""
        return distributed.local_span(self.count)[0]

    def blocks(self) -> Iterator[Observations]:
        """The observations of this process."""
        yield take(self.whole, slice(*distributed.local_span(self.count)))

    def head(self, count: int) -> Observations:
        """The first `count`, or all."""
        return self.whole.head(count)

    def some(self, count: int) -> Observations:
        """`count` of them, evenly spread, or all."""
        return self.whole.some(count)

    def at(self, operators: Parameters) -> "Dataset":
        """With the parameters of operators that are learned replaced by `operators`."""
        return Dataset(self.whole.at(operators))


def bits_of(numbers: np.ndarray, n: int) -> np.ndarray:
    """Bits of `n` observations, as `np.packbits` has them: 1 for those that have `numbers`."""
    bits = np.zeros(-(-n // 8), np.uint8)
    np.bitwise_or.at(bits, numbers // 8, (128 >> numbers % 8).astype(np.uint8))
    return bits


class IndexSet:
    """The numbers of the observations, of `n`, whose bit is `value`, in order, without a list of them.

    The `bits` are as `np.packbits` has them.
    """

    def __init__(self, bits: np.ndarray, n: int, value: bool = True):
        self._bits, self._n, self._value = bits, n, value
        found = [int(np.sum(self._marked(i, i + 1))) for i in range(-(-n // _PAGE))]
        self._before = np.concatenate([[0], np.cumsum(found, dtype=int)])

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._before[-1])

    def between(self, start: int, stop: int) -> np.ndarray:
        """Those at the places from `start` up to `stop`."""
        first = int(np.searchsorted(self._before, start, side="right")) - 1
        last = int(np.searchsorted(self._before, stop - 1, side="right"))
        found = np.flatnonzero(self._marked(first, last)) + first * _PAGE
        return found[start - self._before[first] : stop - self._before[first]]

    def spread(self, count: int) -> np.ndarray:
        """`count` of them, evenly spread, or all."""
        places = np.linspace(0, self.count - 1, min(self.count, count)).astype(int)
        pages = np.searchsorted(self._before, places, side="right") - 1
        which, first = np.unique(pages, return_index=True)
        parts = np.split(places, first[1:])
        return np.concatenate([self._page(i, p) for i, p in zip(which, parts, strict=True)])

    def _page(self, number: int, places: np.ndarray) -> np.ndarray:
        found = np.flatnonzero(self._marked(number, number + 1)) + number * _PAGE
        return found[places - self._before[number]]

    def _marked(self, first: int, last: int) -> np.ndarray:
        """Booleans of the pages from `first` up to `last`."""
        count = min(last * _PAGE, self._n) - first * _PAGE
        bits = self._bits[first * _PAGE // 8 : last * _PAGE // 8]
        return np.unpackbits(bits, count=count) == self._value


@dataclass(frozen=True)
class StoredDataset(_Shared):
    """Observations in files: those of co-observed `views` that have `numbers`, read `block` at a time.

    A block is of one process.
    """

    views: tuple[AnyView, ...]
    numbers: IndexSet
    block: int
    parameters: Parameters = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of observations."""
        return self.numbers.count

    @cached_property
    def like(self) -> Observations:
        """The first of them."""
        return self.head(1)

    @cached_property
    def own(self) -> list[tuple[int, int, int]]:
        """`(number, start, stop)` of each block of this process."""
        every = [(i, *span) for i, span in enumerate(spans(self.count, self.block))]
        return every[slice(*distributed.local_span(len(every)))]

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
        """`count` of them, evenly spread, or all."""
        return self._at(self.numbers.spread(count))

    def at(self, operators: Parameters) -> "StoredDataset":
        """With the parameters of operators that are learned replaced by `operators`."""
        return dataclasses.replace(self, parameters=operators)

    def read(self, start: int, stop: int) -> Observations:
        """The observations from `start` up to `stop`."""
        return self._at(self.numbers.between(start, stop))

    def _at(self, numbers: np.ndarray) -> Observations:
        some = [view.select(numbers) for view in self.views]
        return joint_observations(some, self.parameters)


def stored_dataset(
    views: Sequence[AnyView], numbers: IndexSet, memory: int, parameters: Parameters
) -> StoredDataset:
    """The observations of co-observed `views` that have `numbers`, in blocks for so many bytes of memory.

    Raises `DataError` where there are fewer of them than processes, `ConfigError` where `memory` is too little.
    """
    if numbers.count < distributed.processes():
        raise DataError(
            f"{views[0].label} has {numbers.count} observations to learn from, fewer than the "
            f"{distributed.processes()} processes: use fewer"
        )
    block = min(rows_within(memory, views), numbers.count // distributed.processes())
    return StoredDataset(tuple(views), numbers, block, parameters)


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


def shared_out(views: Sequence[Observations]) -> tuple[ObservationBatches, ...]:
    """`views` for several processes to share; as they are for one, or where there are too few to share."""
    if distributed.processes() == 1 or min(obs.count for obs in views) < distributed.processes():
        return tuple(views)
    return tuple(map(Dataset, views))
