"""Observations that are far from all others, by robust statistics of arrays.

Three scores of an observation `y_i`, whose entries less their medians are `r_i`:

    size        the root mean square of `r_ij` in units of the spread of each entry
    distance    √(r_iᵀ C⁻¹ r_i / m)           `C` the covariance of the others, no less than the noise
    entry       max_j |C⁻¹ r_i|_j / √(C⁻¹)_jj    each entry given the others: one bad sample among a thousand

`C` is the leading principal components of half of the observations and a floor, and judges the other half, so that
no observation is judged by what it is part of. Scores are compared on a log scale, since legitimate data may have
heavy tails: with `q` the score that a part `TRIM` exceeds, and `q₅₀` the median, an observation is far if

    log s > log q + max(2 (log q − log q₅₀), log 4).

Of log-normal amplitudes that is beyond 6.7 standard deviations, and of Student's t with 3 degrees of freedom one
in ten million. At most a part `TRIM` of a sample can be far: more are no outliers, but a population of their own,
such as a source that is present in 2% of the observations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

TRIM = 0.0125  # of the observations: the most that can be outliers
LEAST = 20  # observations, with fewer of which nothing is said
_APART = np.log(4)  # the least distance of an outlier from the others, on the log scale
_MANY = (
    0.1,
    np.log(1000),
)  # a part of the observations, and how far apart more of them are worth a word
_RANK = 64  # principal components
_POWERS = 2  # of the covariance, to find them
_ROUNDS = 2  # of fitting to what the round before found to be no outliers
_TINY = 1e-30

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Observations: their values, where they were observed, noise variances, and numbers.

    `y` is `(n, M)`, `seen` (1 or 0) and `variance` `(n, M)` or `(1, M)`, `number` `(n,)`.
    """

    y: np.ndarray
    seen: np.ndarray
    variance: np.ndarray
    number: np.ndarray

    def take(self, index: np.ndarray) -> "Rows":
        """Some of them."""
        some = lambda a: a if len(a) == 1 else a[index]
        return Rows(self.y[index], some(self.seen), some(self.variance), self.number[index])


@dataclass(frozen=True)
class Components:
    """`C⁻¹ = (I − U diag(shrink) Uᵀ) / floor`, with `U` `(M, r)`, and the square root of its diagonal."""

    mean: np.ndarray
    basis: np.ndarray
    shrink: np.ndarray
    floor: float
    root: np.ndarray

    def scores(self, r: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances, and each entry given the others, `(n,)` and `(n, M)`."""
        r = seen * (r - self.mean)
        u = seen * (r - ((r @ self.basis) * self.shrink) @ self.basis.T) / self.floor
        count = np.maximum(seen.sum(axis=1), 1)
        return np.sqrt(np.maximum((r * u).sum(axis=1), 0) / count), u / self.root


@dataclass(frozen=True)
class Judge:
    """What is usual of the observations of a view: per entry, together, and of the scores on a log scale.

    `usual` are medians of the logarithms of scores, `limits` what only outliers exceed, `many` what a tenth of the
    observations would have to exceed for a word.
    """

    center: np.ndarray
    spread: np.ndarray
    noise: np.ndarray
    parts: tuple[Components, Components]  # of the observations with odd numbers, and with even ones
    usual: Mapping[str, float]
    limits: Mapping[str, float]
    many: Mapping[str, float]

    def scores(self, rows: Rows) -> tuple[Scores, np.ndarray]:
        """The logarithms of the scores, and each entry given the others, `(n, M)`, in standard deviations."""
        r, size = _residuals(rows, self.center, self.spread, self.noise)
        return _scores(r, size, rows, self.parts)

    def mended(self, rows: Rows, entry: np.ndarray) -> Rows:
        """The observations with one `entry` of each, `(n,)`, replaced by what its other entries say of it."""
        _, given = self.scores(rows)
        row = np.arange(len(entry))
        root = np.stack([part.root for part in self.parts])[rows.number % 2, entry]
        unit = np.broadcast_to(self.noise * _more_noise(rows, self.noise), given.shape)[row, entry]
        y = rows.y.copy()
        y[row, entry] -= given[row, entry] / root * unit
        return replace(rows, y=y)


def learn(rows: Rows) -> Judge | None:
    """What is usual of a sample of observations; `None` of fewer than `LEAST`."""
    if len(rows.y) < LEAST:
        return None
    center = _median(rows.y, rows.seen)
    noise = np.sqrt(np.median(rows.variance, axis=0))
    spread = np.maximum(1.4826 * _median(np.abs(rows.y - center), rows.seen), noise)
    r, size = _residuals(rows, center, spread, noise)
    scores: Scores = {"size": _log(size)}
    parts = _halves(r, rows, scores)
    for _ in range(_ROUNDS - 1):
        scores, _ = _scores(r, size, rows, parts)
        parts = _halves(r, rows, scores)
    scores, _ = _scores(r, size, rows, parts)
    usual = {k: float(np.median(s)) for k, s in scores.items()}
    return Judge(
        *(center, spread, noise, parts, usual),
        {k: _limit(s, TRIM, _APART) for k, s in scores.items()},
        {k: _limit(s, *_MANY) for k, s in scores.items()},
    )


def _halves(r: np.ndarray, rows: Rows, scores: Scores) -> tuple[Components, Components]:
    """The components of observations with odd and with even numbers, without those of the largest scores."""
    kept = np.all([s <= _reference(s, TRIM) for s in scores.values()], axis=0)
    odd = rows.number % 2 == 1
    return _components(r[kept & odd]), _components(r[kept & ~odd])


def _median(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The median of each column of what was observed, 0 where nothing was."""
    columns = np.ascontiguousarray(values.T)  # four times as fast
    if np.all(seen > 0):
        return np.median(columns, axis=1)
    never = ~np.any(seen > 0, axis=0)
    return np.nanmedian(np.where((seen > 0) | never, values, np.nan).T, axis=1)  # 0 where never


def _residuals(
    rows: Rows, center: np.ndarray, spread: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`r` `(n, M)` in units of the noise, 0 where missing, less where an observation has more noise; and sizes."""
    r = rows.seen * (rows.y - center) / _more_noise(rows, noise)
    count = np.maximum(np.broadcast_to(rows.seen, r.shape).sum(axis=1), 1)
    return r / noise, np.sqrt(np.sum((r / spread) ** 2, axis=1) / count)


def _more_noise(rows: Rows, noise: np.ndarray) -> np.ndarray:
    """How many times as much noise as usual the entries of an observation have, at least once."""
    return np.maximum(np.sqrt(rows.variance) / noise, 1)


def _scores(
    r: np.ndarray, size: np.ndarray, rows: Rows, parts: tuple[Components, Components]
) -> tuple[Scores, np.ndarray]:
    distance, given = np.empty(len(r)), np.empty(r.shape)
    seen = np.broadcast_to(rows.seen, r.shape)
    for part, those in zip(parts, (rows.number % 2 == 0, rows.number % 2 == 1), strict=True):
        distance[those], given[those] = part.scores(r[those], seen[those])
    entry = np.abs(given).max(axis=1, initial=0)
    return {"size": _log(size), "distance": _log(distance), "entry": _log(entry)}, given


def _components(r: np.ndarray) -> Components:
    """The components of residuals `r` `(n, M)` in units of the noise, whose variance is the least."""
    mean = r.mean(axis=0)
    r = r - mean
    n, m = r.shape
    values, vectors = _leading(r)
    rank = min(_RANK, int(np.sum(values > 1)))
    top, basis = values[:rank], vectors[:, :rank]
    rest = float(np.sum(r**2)) / n - float(top.sum())
    floor = max(rest / max(m - rank, 1), 1.0)
    shrink = np.maximum(1 - floor / top, 0)
    inside = 1 - (basis**2) @ shrink
    return Components(mean, basis, shrink, floor, np.sqrt(np.maximum(inside, 1e-9) / floor))


def _leading(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of `rᵀ r / n`, falling, and their vectors: by subspace iteration if there are many.

    Source: Halko, Martinsson and Tropp, SIAM Review 53, 2011.
    """
    n, m = r.shape
    space = np.eye(m) if m <= 2 * _RANK else np.random.default_rng(0).normal(size=(m, _RANK + 16))
    for _ in range(_POWERS if m > 2 * _RANK else 0):
        space = np.linalg.qr(r.T @ (r @ space))[0]
    inside = r @ space
    values, vectors = np.linalg.eigh(inside.T @ inside / n)
    return values[::-1], (space @ vectors)[:, ::-1]


def _log(scores: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(scores, _TINY))


def _reference(scores: np.ndarray, part: float) -> float:
    """What a `part` of the scores exceeds, or one of them."""
    return float(np.sort(scores)[len(scores) - 1 - max(int(part * len(scores)), 1)])


def _limit(scores: np.ndarray, part: float, apart: float) -> float:
    high, usual = _reference(scores, part), float(np.median(scores))
    return high + max(2 * (high - usual), apart)
