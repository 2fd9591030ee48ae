"""What is wrong with observations by themselves: outliers, values that are clipped or filled in, copies.

What is usual is learned of a sample (`dichroic.problem.outliers`); then all observations are looked at, block by
block, those of files too. Co-observed views are looked at together. Entries that are masked are never looked at.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float

from dichroic.numerics.arrays import shown_entry
from dichroic.numerics.batching import take
from dichroic.operators.noise import Noise, seen_and_variances
from dichroic.problem.lazy_view import RUNS, SOME, AnyView, spread
from dichroic.problem.outliers import LEAST, Judge, Rows, learn
from dichroic.problem.problem import Problem, joint_observations
from dichroic.problem.view import View, numbering
from dichroic.runtime import distributed
from dichroic.runtime.hardware import in_threads

BLOCK_BYTES = 16 * 2**20  # of the observations that are looked at at a time
HASHED = 2**22  # observations that are compared with each other; of more, the sample
NAMED = 5  # observations that a sentence names
PART = 0.01  # of the entries, or of the observations, that is worth a word
COPIES = 5  # observations,
WIDE = 4  # of so many entries: copies of fewer can be chance
_VALUES = 20  # equal values, ten times as many as other values have, of a hundred values or more
_OFTEN, _DISTINCT, _FIRST = 10, 100, 10**5


class Far(NamedTuple):
    """Observations that are far from all others: their numbers, how many times as far as is usual, and an entry.

    Of `alone`, the observation is like the others but for that entry.
    """

    number: np.ndarray
    times: np.ndarray
    entry: np.ndarray
    alone: np.ndarray


@dataclass(frozen=True)
class Screened:
    """What was found in one view, or in co-observed ones; `notes` are sentences about what else there is."""

    views: tuple[AnyView, ...]
    far: Far
    notes: tuple[str, ...]


class _Values(eqx.Module):
    """Values `(n, M)` as they are given, not rounded, and the noise."""

    y: Float[np.ndarray, "n obs"] = eqx.field(metadata={"ndim": 1})
    noise: Noise


_FOUND: WeakKeyDictionary[Problem, tuple[Screened, ...]] = WeakKeyDictionary()


def screened(problem: Problem) -> tuple[Screened, ...]:
    """What is found in each (joint) view of `problem`; looked for once, by all processes together.

    Raises `DichroicError` where files hold what cannot be used.
    """
    if problem not in _FOUND:
        with in_threads():  # each product in one: the same bits on machines with more
            _FOUND[problem] = tuple(map(_screened, problem.joint_views()))
    return _FOUND[problem]


def left_out(problem: Problem, outliers: str) -> list[np.ndarray]:
    """The numbers of the observations of each (joint) view that a fit leaves out, which may keep `outliers`."""
    return [s.far.number[: None if outliers == "exclude" else 0] for s in screened(problem)]


def suspicions(problem: Problem, outliers: str = "exclude") -> tuple[str, ...]:
    """Sentences about what is found in the views of `problem`; `outliers` is what a fit does with those."""
    return tuple(
        text
        for found in screened(problem)
        for text in (*_far_sentences(found, outliers), *found.notes)
    )


# What is looked at


def _screened(views: Sequence[AnyView]) -> Screened:
    """What is found in co-observed `views`."""
    heads = [view.head for view in views]
    in_memory = all(head is view for head, view in zip(heads, views, strict=True))
    whole = _values(heads) if in_memory else None
    count, size = views[0].count, sum(math.prod(v.shape) for v in views)
    most = min(max(BLOCK_BYTES // (8 * size), RUNS), SOME)
    sample = _rows(views, whole, spread(count, RUNS, most // RUNS))
    judge = learn(sample)
    few = in_memory or count <= HASHED
    far, hashes = _looked_at(views, whole, judge, max(BLOCK_BYTES // (8 * size), 1), few)
    notes = (
        *_many_sentences(views, sample, judge, far),
        *_value_sentences(views, sample),
        *_copy_sentences(views, sample, hashes if few else _hashes(sample)),
    )
    return Screened(tuple(views), far, notes)


def _looked_at(
    views: Sequence[AnyView],
    whole: _Values | None,
    judge: Judge | None,
    block: int,
    hashed: bool,
) -> tuple[Far, np.ndarray]:
    """The outliers of all observations, and hashes of their values, if they are to be `hashed`."""
    none = (*_far(None, None), np.zeros(0, np.uint64))

    def own() -> list[tuple[np.ndarray, ...]]:
        first, last = distributed.local_span(views[0].count)
        found = []
        for start in range(first, last, block):
            rows = _rows(views, whole, slice(start, min(start + block, last)))
            found.append((*_far(rows, judge), _hashes(rows) if hashed else none[-1]))
        return found

    parts = zip(*(distributed.run_on_all(own) or [none]), strict=True)
    *far, hashes = (distributed.all_gather(np.concatenate(part)) for part in parts)
    return Far(*far), hashes


def _rows(views: Sequence[AnyView], whole: _Values | None, index: slice | np.ndarray) -> Rows:
    """Some observations, of the values of `whole` if all are in memory, as plain arrays."""
    some = take(whole, index) if whole is not None else _read(views, index)
    number = np.arange(index.start, index.stop) if isinstance(index, slice) else index
    found = seen_and_variances(some.noise, some.y.shape[1])
    seen, variance = (np.asarray(a, np.float64) for a in found)
    return Rows(np.asarray(some.y, np.float64), seen, variance, number)


def _values(views: Sequence[View]) -> _Values:
    """What is looked at, in NumPy: many slices of JAX arrays take their time."""
    noise = joint_observations(views).noise
    y = np.concatenate([view.values for view in views], axis=1)
    return _Values(y, jax.tree.map(np.asarray, noise))


def _read(views: Sequence[AnyView], index: slice | np.ndarray) -> _Values:
    if not isinstance(index, slice):
        return _values([v.select(index) for v in views])
    with numbering(index.start, index.stop):
        return _values([v.select(index) for v in views])


# Outliers


def _far(rows: Rows | None, judge: Judge | None) -> Far:
    """The outliers among `rows`."""
    if rows is None or judge is None:
        return Far(*(np.zeros(0, kind) for kind in (int, float, int, bool)))
    excess, times, given = _excess(rows, judge)
    bad = np.flatnonzero(excess > 0)
    entry = np.abs(given[bad]).argmax(axis=1)
    alone = _excess(judge.mended(rows.take(bad), entry), judge)[0] <= 0
    return Far(rows.number[bad], times[bad], entry, alone)


def _excess(rows: Rows, judge: Judge) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By how much, on a log scale, rows exceed the limit; how many times what is usual; and by entry."""
    scores, given = judge.scores(rows)
    over = np.stack([s - judge.limits[k] for k, s in scores.items()])
    above = np.stack([s - judge.usual[k] for k, s in scores.items()])
    return over.max(axis=0), np.exp(above.max(axis=0)), given


def _far_sentences(found: Screened, outliers: str) -> Iterator[str]:
    far, count = found.far, found.views[0].count
    if not len(far.number):
        return
    some = ", ".join(_named(found, i) for i in range(min(len(far.number), NAMED)))
    more = f" and {len(far.number) - NAMED:,} more" if len(far.number) > NAMED else ""
    one = len(far.number) == 1
    what = "observation is" if count == 1 else "observations are" if not one else "observations is"
    yield (
        f"{_label(found.views)}: {len(far.number):,} of {count:,} {what} far from all others, up to "
        f"{far.times.max():,.3g} times as far as is usual: {some}{more}. "
        + _what_follows(outliers, far)
    )


def _named(found: Screened, i: int) -> str:
    """An observation by its number, with its entry where that alone is far."""
    number, entry = int(found.far.number[i]), int(found.far.entry[i])
    if not found.far.alone[i]:
        return str(number)
    ends = np.cumsum([math.prod(view.shape) for view in found.views])
    which = int(np.searchsorted(ends, entry, side="right"))
    view = found.views[which]
    entry -= int(ends[which]) - math.prod(view.shape)
    where = shown_entry(entry, view.shape)
    of = f" of view {view.name!r}" if len(found.views) > 1 else ""
    return f"{number} (at entry {where} alone{of})"


def _what_follows(outliers: str, far: Far) -> str:
    mask = "; mask entries that are wrong, and the others count" if far.alone.any() else ""
    if outliers == "exclude":
        return f"A fit leaves them out, unless fit.outliers is 'keep'{mask}"
    return f"They can spoil what is learned of all others: leave them out, or set fit.outliers: exclude{mask}"


def _many_sentences(
    views: Sequence[AnyView], sample: Rows, judge: Judge | None, far: Far
) -> Iterator[str]:
    """A sentence where more than a few observations, the outliers aside, are extremely far from the others."""
    if judge is None:
        return
    scores, _ = judge.scores(sample)
    bad = np.any([s > judge.many[k] for k, s in scores.items()], axis=0)
    bad &= ~np.isin(sample.number, far.number)
    if np.mean(bad) > PART:
        first = ", ".join(str(i) for i in sample.number[bad][:NAMED])
        yield (
            f"{_label(views)}: {np.mean(bad):.1%} of the observations are more than 1,000 times as far from "
            f"the median as the others (such as {first}): too many for outliers, so a fit takes them in, and they "
            "rule it. If they are wrong or in other units, leave them out or mend them"
        )


# Values and copies


def _value_sentences(views: Sequence[AnyView], sample: Rows) -> Iterator[str]:
    """Sentences about values that far too many entries of a view are equal to."""
    seen = np.broadcast_to(sample.seen, sample.y.shape) > 0
    ends = np.cumsum([math.prod(view.shape) for view in views])
    for view, end in zip(views, ends, strict=True):
        part = slice(end - math.prod(view.shape), end)
        yield from _common_values(view, sample.y[:, part][seen[:, part]])


def _common_values(view: AnyView, values: np.ndarray) -> Iterator[str]:
    found, counts = np.unique(values, return_counts=True)
    if len(found) < _DISTINCT:  # counts, classes
        return
    usual = np.sort(counts)[-4]  # two rails, and what stands for missing
    often = (counts >= max(_VALUES, PART * len(values))) & (counts >= _OFTEN * usual)
    for value, count in zip(found[often], counts[often], strict=True):
        rank = {found[0]: "the smallest", found[-1]: "the largest"}.get(value, "one")
        yield (
            f"view {view.name!r}: {count / len(values):.1%} of the entries are exactly {value:.6g}, {rank} of its "
            "values: clipped, or filled in where nothing was measured? Mark them as missing (mask): taken as "
            "measured, they are fitted as closely as the stated noise says"
        )


def _hashes(rows: Rows) -> np.ndarray:
    """A 64-bit hash of the values of each row, 0 of one in which nothing was observed."""
    bits = rows.y.view(np.uint64)
    odd = np.random.default_rng(0).integers(2**63, size=bits.shape[1], dtype=np.uint64) * 2 + 1
    mixed = (bits ^ (bits >> np.uint64(29))) * odd
    seen = np.broadcast_to(rows.seen, rows.y.shape).any(axis=1)
    return np.where(seen, (mixed ^ (mixed >> np.uint64(32))).sum(axis=1, dtype=np.uint64) | 1, 0)


def _copy_sentences(views: Sequence[AnyView], sample: Rows, hashes: np.ndarray) -> Iterator[str]:
    """A sentence where many observations have the same values as another, which could be others."""
    if sample.y.shape[1] < WIDE or len(np.unique(sample.y.ravel()[:_FIRST])) < _DISTINCT:
        return
    hashes = hashes[hashes > 0]
    copies = len(hashes) - len(np.unique(hashes))
    if len(hashes) >= LEAST and copies >= max(COPIES, PART * len(hashes)):
        yield (
            f"{_label(views)}: {copies:,} of {len(hashes):,} observations are exact copies of another. Copies "
            "count as if they were measured anew, so intervals get too narrow, and held-out observations have "
            "been trained on: leave copies out"
        )


def _label(views: Sequence[AnyView]) -> str:
    names = "+".join(view.name for view in views)
    return f"view {names!r}" if len(views) == 1 else f"views {names!r}"
