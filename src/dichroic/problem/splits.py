"""The observations that are learned from and those that are held out, without lists of their indices."""

from collections.abc import Sequence

import numpy as np

from dichroic.problem.lazy_view import AnyView
from dichroic.problem.view import View

SHUFFLED = 2**24  # observations that are held out by shuffling them; a multiple of 8
_PAGE = 65536  # observations that are counted together


def holdout(
    views: Sequence[AnyView], fraction: float, seed: int, without: Sequence[int] | np.ndarray = ()
) -> tuple[list[View], list[View]]:
    """Split the observations of (co-observed) `views`: `(training, held out)`, alike, by `held_out`.

    The observations `without`, by their numbers, are in neither.
    """
    mask = held_out(views, fraction, seed)
    kept = np.ones(len(mask), bool)
    kept[np.asarray(without, int)] = False
    train, test = np.flatnonzero(~mask & kept), np.flatnonzero(mask & kept)
    return [v.select(train) for v in views], [v.select(test) for v in views]


def held_out(views: Sequence[AnyView], fraction: float, seed: int) -> np.ndarray:
    """`(n,)`, true for the observations of (co-observed) `views` that are to be kept from training."""
    bits = held_out_bits(views, fraction, seed)
    return np.unpackbits(bits, count=views[0].count).astype(bool)


def held_out_bits(views: Sequence[AnyView], fraction: float, seed: int) -> np.ndarray:
    """`held_out` in an eighth of the memory, as `np.packbits` has booleans.

    By the `held_out` of a view that has one, else at random: `fraction` of them, at least one, and
    all but one at most. Where there are more than 16,777,216, each by itself, to be shuffled in no memory.
    """
    n = views[0].count
    chosen = [v.held_out_mask for v in views if v.held_out_mask is not None]
    if chosen:
        return np.packbits(chosen[0])
    rng = np.random.default_rng(seed)
    if n <= SHUFFLED:
        return np.packbits(rng.permutation(n) < min(max(1, round(fraction * n)), n - 1))
    sizes = [min(SHUFFLED, n - start) for start in range(0, n, SHUFFLED)]
    bits = np.concatenate([np.packbits(rng.random(k, np.float32) < fraction) for k in sizes])
    byte, bit = divmod(int(rng.integers(n)), 8)
    bits[byte] |= 128 >> bit
    return bits


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
        """The indices at the places from `start` up to `stop`."""
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
