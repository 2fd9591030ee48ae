"""Whether entries that were left out look like their predictive draws: by entry, by observation, together.

Under a right model the value `y` of an entry and `S` draws of it are exchangeable, whatever their distribution is. So
the rank of `y` among them, broken evenly, is uniform: `u = (rank + U(0, 1)) / (S + 1)`, and `z = Φ⁻¹(u)` is normal,
with which entries are judged over observations. An observation is judged by statistics of all its entries, in
units of the mean and standard deviation of the `S + 1` values: of `y` and of each draw, which are exchangeable too.
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


@dataclass(frozen=True)
class LeftOut:
    """Entries that were left out of some observations, and draws of what they could have been.

    Of the observations with `numbers` `(n,)`, the `entries` `(F,)`: `seen` `(n, F)` where there is something to
    predict, the values `y` `(n, F)`, and `draws` `(S, n, F)`. `joined` `(F − 1,)` is true where an entry and the one
    after it are neighbours.
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
    those for which this is not so. `beyond` is how many of `judged` observations miss by more than all their draws,
    of which `expected` are chance at the most, and `far` the numbers of those that miss by far more. `common` is the
    mean correlation of all pairs of entries that the model does not know of, `neighbours` that of neighbours.
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
    common: Estimate
    neighbours: Estimate

    @property
    def coverage(self) -> Estimate:
        """Of the 90% intervals, with observations as the independent units."""
        total = self.count.sum()
        value = self.inside.sum() / total
        apart = np.sum((self.inside - value * self.count) ** 2)
        return Estimate(float(value), float(np.sqrt(max(apart, 0.09 * total)) / total))

    @property
    def correlated(self) -> str:
        """Which entries are correlated beyond what the model knows: of neighbours, or all; empty if none are."""
        limit = stats.t.isf(RARE / 4, max(self.judged - 1, 1))
        for name, (value, error) in (("neighbouring", self.neighbours), ("all", self.common)):
            if abs(value) > max(LEAST_CORRELATION, limit * error):  # false for NaN
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
        common=_excess(common),
        neighbours=_excess(neighbours),
    )


def _normal_scores(part: LeftOut, rng: np.random.Generator) -> np.ndarray:
    """`z` `(n, F)`, NaN where nothing was seen."""
    below, same = (np.sum(f(part.draws, part.y), axis=0) for f in (np.less, np.equal))
    u = (below + rng.uniform(size=part.y.shape) * (same + 1)) / (len(part.draws) + 1)
    return np.where(part.seen, stats.norm.ppf(u), np.nan)


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


def _excess(found: np.ndarray) -> Estimate:
    """By how much a statistic `(S + 1, n)` is larger of `y` than of draws, on average; NaN where nothing says."""
    excess = found[0] - found[1:].mean(axis=0)
    excess = excess[np.isfinite(excess)]
    if len(excess) < _LEAST_COUNT:
        return Estimate(np.nan, np.nan)
    return Estimate(float(excess.mean()), float(excess.std(ddof=1) / np.sqrt(len(excess))))
