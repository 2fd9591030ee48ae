"""Observations that single precision does not hold relative to their noise: offsets of sources, or a refusal.

float32 has a spacing of 1 at 10⁷. Where that is more than a hundredth of the noise, values `m_β` of the sources
are found whose images `Σ_β A_β m_β` are near the medians of all views, and what is learned is the sources less
them, from observations less their images. All is linear, so nothing else changes: the subtraction is done in
float64 before observations are rounded, and offsets are added to what is drawn (`operators.units`). What float32
still does not hold then, such as a range that differs between observations, is refused or warned of.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, lsmr

from dichroic.errors import DataError
from dichroic.numerics.arrays import shown_entry
from dichroic.numerics.batching import row_counts, take
from dichroic.operators import Operator
from dichroic.operators.double_precision import Values, adjoints, images, rounding
from dichroic.operators.learnable import Parameters, from_lists, parameters, to_lists
from dichroic.operators.noise import seen_and_variances
from dichroic.operators.scaling import offset_parameters, offsets_of
from dichroic.problem.lazy_view import RUNS, SOME, SOME_BYTES, AnyView, spread
from dichroic.problem.observations import Observations
from dichroic.problem.problem import Problem, joint_observations
from dichroic.problem.view import View, bytes_each
from dichroic.runtime import distributed
from dichroic.runtime.tracking import warn

NEEDED = (
    0.01  # of the noise: a spacing from which offsets are looked for; none costs less than 0.05 dB,
)
WARNED = 0.1  # this one 0.2 dB,
REFUSED = 1.0  # and this one 5 dB
PART = 0.01  # of the observations that may exceed these: outliers
ROWS = 64  # observations to find offsets from, where operators differ between observations
FAR = 1e3  # times as far from the median as is usual: not among these
BLOCK_BYTES = 2**20  # of the observations that are looked at at a time
_STEPS = 500


@dataclass(frozen=True)
class Offsets:
    """The `parameters` that have the offsets of sources, none where none is needed, and sentences to warn of."""

    parameters: Parameters
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Sample:
    """Some observations of a view: values as they are given `(n, M)`, what of them was observed, and noise."""

    view: View
    operators: Mapping[str, Operator]
    y: np.ndarray
    seen: np.ndarray
    std: np.ndarray

    def take(self, rows: slice) -> "_Sample":
        """Some of them."""
        own = lambda a: a[rows] if len(a) == len(self.y) else a
        parts = {name: own(getattr(self, name)) for name in ("y", "seen", "std")}
        return replace(self, operators=take(self.operators, rows), **parts)

    def less(self, offsets: Values) -> np.ndarray:
        """The values less what the offsets look like, in float64."""
        known = {k: m for k, m in offsets.items() if k in self.operators}
        return self.y - images(self.operators, known) if known else np.asarray(self.y, np.float64)


_FOUND: WeakKeyDictionary[Problem, dict[frozenset[str], Offsets]] = WeakKeyDictionary()


def offsets(problem: Problem, bounded: Collection[str] = ()) -> Offsets:
    """The offsets of the sources of `problem`, found once; sources that are `bounded` have none.

    Raises `DataError` where float32 does not hold observations relative to their noise, whatever the offsets.
    """
    found, key = _FOUND.setdefault(problem, {}), frozenset(bounded)
    if key not in found:
        found[key] = _found(problem, key)
    return found[key]


def agreed_offsets(problem: Problem, bounded: Collection[str]) -> Parameters:
    """The offsets of the first process, for all processes: no rounding of theirs can set them apart."""
    found = lambda: offsets(problem, bounded).parameters
    if distributed.processes() == 1:
        return found()
    content = distributed.broadcast_from_primary(lambda: json.dumps(to_lists(found())).encode())
    return from_lists(json.loads(content), "offsets")


def check_no_offset(problem: Problem, what: str) -> None:
    """Raise `DataError` if the observations of `problem` need offsets, which `what` does not have."""
    if offsets(problem).parameters:
        raise DataError(
            f"{what} works on observations as they are, and float32 does not hold those of this problem relative "
            "to their noise: subtract the mean (or a constant for each entry) from the observations"
        )


def check_start(problem: Problem, known: Parameters) -> None:
    """Raise `DataError` unless float32 holds the observations of `problem` less offsets that are `known`."""
    held = [_held(s, offsets_of(known)) for s in _samples(problem)]
    if any(h.level > REFUSED for h in held):
        raise DataError(next(h.sentence() for h in held if h.level > REFUSED) + _ELSEWHERE)


def prepared(views: Sequence[AnyView], known: Parameters) -> Observations:
    """The `Observations` of co-observed `views` for a fit that has learned what is `known`.

    Raises `DataError` where float32 holds fewer than half of them relative to their noise; warns of others.
    """
    for view in views:
        held = _held(_sample(view.head), offsets_of(known))
        bad = int(np.sum(held.ratio > REFUSED))
        remedy = _ELSEWHERE if offsets_of(known) else _SUBTRACT
        if 2 * bad > len(held.ratio):
            raise DataError(held.sentence() + remedy)
        if bad:
            warn(f"{held.sentence()}: {bad} of {len(held.ratio)} observations are so{remedy}")
    return joint_observations(views, known)


# Offsets


def _found(problem: Problem, bounded: frozenset[str]) -> Offsets:
    samples = _samples(problem)
    before = [_held(s, {}) for s in samples]
    given = [_given(s) for s in samples]
    needed = any(h.level > NEEDED for h in before)
    values = _solved(samples, set(problem.names) - bounded) if needed else {}
    held = [_held(s, values) for s in samples]
    if not any(2 * h.level < b.level for h, b in zip(held, before, strict=True)):
        values, held = {}, before  # they are of no use
    if values:
        values = _fewer(values, samples, max(NEEDED, 2 * max(h.level for h in held)))
        held = [_held(s, values) for s in samples]
        _check_use(problem, values, samples)
    remedy = _SUBTRACT if not bounded else _BOUNDED.format(", ".join(sorted(bounded)))
    every = [*((h, _GIVEN) for h in given), *((h, remedy) for h in held)]
    for h, what in every:
        if h.level > REFUSED:
            raise DataError(h.sentence() + what)
    notes = tuple(h.sentence() + what for h, what in every if h.level > WARNED)
    return Offsets(offset_parameters(values), notes)


def _solved(samples: Sequence[_Sample], names: Collection[str]) -> dict[str, np.ndarray]:
    """The smallest values of sources `names` whose images are near the observations, in units of the noise."""
    rows = [_typical(s, names) for s in samples]
    rows = [r for r in rows if r[0]]
    shapes = {k: op.in_shape for ops, *_ in rows for k, op in ops.items()}
    ends = np.cumsum([math.prod(s) for s in shapes.values()])
    if not shapes:
        return {}

    def parts(x: np.ndarray) -> dict[str, np.ndarray]:
        split = np.split(x, ends[:-1])
        return {k: a.reshape(s) for a, (k, s) in zip(split, shapes.items(), strict=True)}

    def forward(x: np.ndarray) -> np.ndarray:
        at = parts(x)
        each = (w * images(ops, {k: at[k] for k in ops}) for ops, _, w in rows)
        return np.concatenate([a.ravel() for a in each])

    def back(v: np.ndarray) -> np.ndarray:
        total, start = {k: np.zeros(s) for k, s in shapes.items()}, 0
        for ops, _, w in rows:
            piece = v[start : start + w.size].reshape(w.shape)
            total = {**total, **{k: total[k] + a for k, a in adjoints(ops, w * piece).items()}}
            start += w.size
        return np.concatenate([a.ravel() for a in total.values()])

    target = np.concatenate([(w * y).ravel() for _, y, w in rows])
    size = (target.size, int(ends[-1]))
    system = LinearOperator(size, forward, back, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    enough = 1 / max(float(np.linalg.norm(target)), 1.0)  # as much as the noise
    x = lsmr(system, target, atol=1e-10, btol=enough, conlim=0, maxiter=_STEPS)[0]
    return {k: np.asarray(a, np.float32).astype(np.float64) for k, a in parts(x).items()}


def _typical(
    sample: _Sample, names: Collection[str]
) -> tuple[dict[str, Operator], np.ndarray, np.ndarray]:
    """Operators, observations and weights `(rows, M)`: the median where operators are shared, else some."""
    operators = {k: op for k, op in sample.operators.items() if k in names}
    seen, std = np.broadcast_to(sample.seen, sample.y.shape), sample.std
    y = np.where(seen, sample.y, np.nan).astype(np.float64)
    never = ~seen.any(axis=0)
    middle = np.nanmedian(np.where(never, 0, y), axis=0)
    weight = ~never / np.median(std, axis=0)
    if not row_counts(operators):
        return operators, middle[None], weight[None]
    apart = np.where(seen, np.abs(y - middle), np.nan)
    usual = np.maximum(
        np.nanmedian(np.where(never, 0, apart), axis=0), 1 / np.maximum(weight, 1e-30)
    )
    near = np.flatnonzero(np.nanmax(np.where(never, 0, apart / usual), axis=1) < FAR)
    index = near[np.linspace(0, len(near) - 1, min(len(near), ROWS)).astype(int)]
    return (
        take(operators, index),
        np.where(seen, y, 0)[index],
        np.broadcast_to(seen / std, y.shape)[index],
    )


def _fewer(
    values: dict[str, np.ndarray], samples: Sequence[_Sample], enough: float
) -> dict[str, np.ndarray]:
    """The values of as few sources as keep what float32 loses below `enough`, the smallest left out first."""
    for name in sorted(values, key=lambda k: float(np.abs(values[k]).max())):
        rest = {k: m for k, m in values.items() if k != name}
        if all(_held(s, rest).level <= enough for s in samples):
            values = rest
    return values


def _check_use(problem: Problem, values: Values, samples: Sequence[_Sample]) -> None:
    """Raise `DataError` where operators are learned, or known too roughly for these offsets."""
    if learned := parameters([v.operators for v in problem.views]):
        raise DataError(
            f"operators are to be learned ({', '.join(learned)}), which needs observations that float32 holds: "
            "subtract the mean (or a constant for each entry) from the observations"
        )
    for s in samples:
        known = {k: m for k, m in values.items() if k in s.operators}
        if not known:
            continue
        error = s.seen.any(axis=0) * rounding(s.operators, known) / np.median(s.std, axis=0)
        j = int(error.argmax())
        if error[j] > WARNED:
            where = shown_entry(j, s.view.shape)
            raise DataError(
                f"{s.view.label}: the observations have an offset of {np.median(np.abs(s.y[:, j])):.3g} at entry "
                f"{where}, where the rounding of the operators to float32 makes an error of {error[j]:.3g} times "
                "the noise: subtract the mean (or what a constant source looks like) from the observations"
            )


# What float32 holds


@dataclass(frozen=True)
class _Held:
    """The largest spacing of numbers of a type in each observation, relative to the noise, and its entry."""

    view: View
    dtype: np.dtype
    ratio: np.ndarray
    entry: np.ndarray
    value: np.ndarray

    @property
    def _usual(self) -> int:
        """The observation that is exceeded by a hundredth of the others, by one at least; of one, itself."""
        n = len(self.ratio)
        return int(np.argsort(self.ratio)[max(n - 1 - max(int(PART * n), 1), 0)])

    @property
    def level(self) -> float:
        """The spacing of that one."""
        return float(self.ratio[self._usual])

    def sentence(self) -> str:
        """What is lost, in words, without an end."""
        i = self._usual
        value, spacing = self.value[i], np.spacing(self.value[i].astype(self.dtype))
        where = shown_entry(self.entry[i], self.view.shape)
        return (
            f"{self.view.label}: {self.dtype} has a spacing of {spacing:.3g} at {value:.3g}, the value of entry "
            f"{where} of observation {i}, and that is {self.ratio[i]:.3g} times the "
            f"noise ({spacing / self.ratio[i]:.3g})"
        )


_SUBTRACT = (
    ". Observations vary by more than float32 holds, and no constant values of the sources account for that: "
    "subtract the mean (or a constant for each entry) from the observations, mask entries of such a range, or "
    "state a noise that is no finer than they are known"
)
_BOUNDED = (
    ". Sources with bounds ({}) keep their values, and those of others do not account for the offset: subtract "
    "the mean (or a constant for each entry) from the observations, and give bounds of what is left"
)
_GIVEN = (
    ". That is how the observations are given, so what is finer is lost: give them as they were recorded "
    "(float64, or integers), or subtract the mean before they are rounded"
)
_ELSEWHERE = (
    ". The observations are far from those of the fit: give them in the same units, from the same offset, or "
    "fit such observations too"
)


def _held(sample: _Sample, values: Values) -> _Held:
    """What single precision loses of a sample less what offsets look like."""
    rows = max(BLOCK_BYTES // sample.y[0].nbytes, 1)
    blocks = (sample.take(slice(i, i + rows)) for i in range(0, len(sample.y), rows))
    found = [_losses(s, s.less(values), np.dtype(jnp.zeros(()).dtype)) for s in blocks]
    joined = lambda name: np.concatenate([getattr(h, name) for h in found])
    return replace(found[0], ratio=joined("ratio"), entry=joined("entry"), value=joined("value"))


def _given(sample: _Sample) -> _Held:
    """What the type of numbers that observations are given in has lost of them."""
    return _losses(
        sample, sample.y, sample.y.dtype if sample.y.dtype.kind == "f" else np.dtype(float)
    )


def _losses(sample: _Sample, y: np.ndarray, dtype: np.dtype) -> _Held:
    with np.errstate(over="ignore"):
        spacing = np.spacing(np.abs(y).astype(dtype)).astype(np.float64)
    ratio = np.where(sample.seen, spacing / sample.std, 0)
    entry = ratio.argmax(axis=1)
    rows = np.arange(len(y))
    return _Held(sample.view, dtype, ratio[rows, entry], entry, np.abs(y)[rows, entry])


def _samples(problem: Problem) -> list[_Sample]:
    """A sample of each view, evenly spread."""
    return [_sample(_some(view)) for view in problem.views]


def _some(view: AnyView) -> View:
    most = max(SOME_BYTES // (16 * bytes_each(view.head)), RUNS)
    index = spread(view.count, RUNS, min(most, SOME) // RUNS)
    return view.head if view.head.count == len(index) else view.select(index)


def _sample(view: View) -> _Sample:
    obs = view.prepare()
    seen, variance = (np.asarray(a) for a in seen_and_variances(obs.noise, obs.size))
    return _Sample(view, obs.operators, view.values, seen > 0, np.sqrt(variance.astype(np.float64)))
