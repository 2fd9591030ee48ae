"""Whether entries that were left out look like their predictive draws: by entry, by observation, together.

Under a right model the value `y` of an entry and `S` draws of it are exchangeable, whatever their distribution
is. So the rank of `y` among them, broken evenly, is uniform: `u = (rank + U(0, 1)) / (S + 1)`, and `z = Φ⁻¹(u)` is
normal, with which entries are judged over observations. An observation is judged by statistics of all its entries,
in units of the mean and standard deviation of the `S + 1` values: those of `y` and of each draw, exchangeable too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

RARE = 1e-3  # the chance of a finding under a right model, of each kind
LEAST_CORRELATION = 0.1  # that is worth a word
FAR = 3.0  # times the largest mean square of all draws
_LEAST_COUNT = 8  # values of an entry, with fewer of which it is not judged


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


UNKNOWN = Estimate(float("nan"), float("nan"))


class Excess(NamedTuple):
    """By how much a statistic is larger of values than of their draws, its error, and the chance of as much."""

    value: float
    error: float
    chance: float


@dataclass(frozen=True)
class LeftOut:
    """Entries that were left out of some observations, and draws of what they could have been.

    Of the observations with `numbers` `(n,)`, the `entries` `(F,)`: `seen` `(n, F)` where there is something to
    predict, the values `y` `(n, F)`, and `draws` `(S, n, F)`. `joined` `(F − 1,)` is true where an entry and the
    one after it are neighbours.
    """

    numbers: np.ndarray
    entries: np.ndarray
    seen: np.ndarray
    y: np.ndarray
    draws: np.ndarray
    joined: np.ndarray


@dataclass(frozen=True)
class Residuals:
    """What was found.

    `inside` and `count` `(n,)` are how many entries of each observation lie in their 90% intervals, of how many;
    `entries` `(F,)` with `mean` and `square` of their normal scores `z`, 0 and 1 under a right model; `bad` are
    those for which this is not so. `beyond` is how many of `judged` observations miss by more than all their
    draws, of which `expected` are chance at the most, and `far` the numbers of those that miss by far more.
    `common` is the mean correlation of all pairs of entries that the model does not know of, `neighbours` that of
    neighbours.
    """

    inside: np.ndarray
    count: np.ndarray
    entries: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    bad: np.ndarray
    beyond: int
    judged: int
    expected: int
    far: np.ndarray
    common: Excess
    neighbours: Excess

    @property
    def coverage(self) -> Estimate:
        """The coverage of the 90% intervals, with observations as the independent units."""
        total = self.count.sum()
        value = self.inside.sum() / total
        apart = np.sum((self.inside - value * self.count) ** 2)
        return Estimate(float(value), float(np.sqrt(max(apart, 0.09 * total)) / total))

    @property
    def correlated(self) -> str:
        """Which entries are correlated beyond what the model knows: of neighbours, or all; empty if none are."""
        for name, found in (("neighbouring", self.neighbours), ("all", self.common)):
            if abs(found.value) > LEAST_CORRELATION and found.chance < RARE / 2:  # false for NaN
                return name
        return ""


def examine(parts: Sequence[LeftOut], seed: int = 0) -> Residuals:
    """Judge the parts of all observations, no two of which have an entry or an observation in common."""
    rng = np.random.default_rng(seed)
    scores = [_normal_scores(part, rng) for part in parts]
    entries, mean, square, bad = _by_entry(parts, scores)
    inside = np.concatenate([np.sum(np.abs(z) < stats.norm.isf(0.05), axis=1) for z in scores])
    count = np.concatenate([part.seen.sum(axis=1) for part in parts])
    found = [_by_observation(part) for part in parts]
    size, common, neighbours = (np.concatenate(x, axis=1) for x in zip(*found, strict=True))
    most = size[1:].max(axis=0)
    numbers = np.concatenate([part.numbers for part in parts])
    expected = int(stats.binom.isf(RARE, len(numbers), 1 / len(size)))
    return Residuals(
        *(inside, count, entries, mean, square, bad),
        beyond=int(np.sum(size[0] > most)),
        judged=len(numbers),
        expected=expected,
        far=np.sort(numbers[size[0] > FAR * most]),
        common=_excess(common, rng),
        neighbours=_excess(neighbours, rng),
    )


def _normal_scores(part: LeftOut, rng: np.random.Generator) -> np.ndarray:
    """`z` `(n, F)`, NaN where nothing was seen."""
    return np.where(part.seen, _ranked(part.y, part.draws, rng), np.nan)


def _ranked(y: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The normal scores of the ranks of `y` among `draws`, which have one more axis."""
    below, same = (np.sum(f(draws, y), axis=0) for f in (np.less, np.equal))
    u = (below + rng.uniform(size=y.shape) * (same + 1)) / (len(draws) + 1)
    return stats.norm.ppf(u)


def _by_entry(
    parts: Sequence[LeftOut], scores: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Entries in their order, means and mean squares of their scores, and which entries are bad."""
    entries = np.concatenate([part.entries for part in parts])
    counts = np.concatenate([part.seen.sum(axis=0) for part in parts])
    total, squares = (np.concatenate([np.nansum(z**k, axis=0) for z in scores]) for k in (1, 2))
    n = np.maximum(counts, 1)
    chance = np.minimum(
        2 * stats.norm.sf(np.abs(total) / np.sqrt(n)),
        2 * np.minimum(stats.chi2.sf(squares, n), stats.chi2.cdf(squares, n)),
    )
    judged = counts >= _LEAST_COUNT
    wrong = judged & (chance < RARE / max(2 * judged.sum(), 1))
    order = np.argsort(entries)
    return entries[order], (total / n)[order], (squares / n)[order], np.sort(entries[wrong])


def _by_observation(part: LeftOut) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean squares, mean products of pairs and of neighbours, of `y` (first) and the draws, `(S + 1, n)`."""
    values = np.concatenate([part.y[None], part.draws])
    std = np.maximum(values.std(axis=0), np.finfo(float).tiny)
    e = np.where(part.seen, (values - values.mean(axis=0)) / std, 0)
    count, square = part.seen.sum(axis=1), np.sum(e**2, axis=-1)
    pairs = part.joined & part.seen[:, 1:] & part.seen[:, :-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        common = (np.sum(e, axis=-1) ** 2 - square) / (count * (count - 1))
        beside = np.sum(pairs * e[..., 1:] * e[..., :-1], axis=-1) / pairs.sum(axis=-1)
    return square / np.maximum(count, 1), common, beside


def _excess(found: np.ndarray, rng: np.random.Generator) -> Excess:
    """The average of a statistic `(S + 1, n)`, with the chance of its ranks; NaN where too few have it."""
    found = found[:, np.isfinite(found).all(axis=0)]
    n = found.shape[1]
    if n < _LEAST_COUNT:
        return Excess(np.nan, np.nan, np.nan)
    excess = found[0] - found[1:].mean(axis=0)
    z = _ranked(found[0], found[1:], rng).sum() / np.sqrt(n)
    chance = 2 * stats.norm.sf(abs(z))
    return Excess(float(excess.mean()), float(excess.std(ddof=1) / np.sqrt(n)), float(chance))
