"""What a linear filter predicts of entries of an observation from the others: a yardstick for learned priors.

One Gaussian of the observations themselves, whatever made them. Its covariance is that of the entries observed
together, with correlations shrunk toward 0 by as much as predicts best a part of the training observations that is
kept aside for this; so it is good with fewer observations than entries, and with gaps, too. Of more entries than
`BLOCK`, those of a block of neighbours are predicted from the block alone.
"""

from dataclasses import dataclass

import numpy as np

BLOCK = 1024
SHRINKAGES = (0.0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8)
_ASIDE = 64  # observations at the most, and
_PART = 5  # one in so many, with which the shrinkage is chosen
_EPSILON = 1e-6


@dataclass(frozen=True)
class LinearPredictor:
    """Means `(M,)`, and a covariance for each block of entries: `(numbers of the entries, (B, B))`."""

    mean: np.ndarray
    blocks: tuple[tuple[np.ndarray, np.ndarray], ...]

    def predict(
        self, y: np.ndarray, kept: np.ndarray, left: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The log density `(n,)` of the entries that are `left` out given those `kept`, and their means `(n, M)`.

        `y`, and the booleans `kept` and `left`, are `(n, M)`; means are those of training elsewhere.
        """
        density, mean = np.zeros(len(y)), np.tile(self.mean, (len(y), 1))
        for entries, covariance in self.blocks:
            own = np.stack([kept[:, entries], left[:, entries]], axis=1)
            patterns, which = np.unique(own, axis=0, return_inverse=True)
            for i, (k, o) in enumerate(patterns):
                rows = np.flatnonzero(which.ravel() == i)
                if not o.any():
                    continue
                r = y[np.ix_(rows, entries)] - self.mean[entries]
                found, predicted = _conditional(covariance, r, k, o)
                density[rows] += found
                mean[np.ix_(rows, entries[o])] += predicted
        return density, mean


def learn(
    y: np.ndarray, seen: np.ndarray, entries: np.ndarray, block: int = BLOCK
) -> LinearPredictor:
    """The linear predictor of `entries` of observations like `y` `(n, M)`, `seen` (booleans) or missing."""
    counts = np.maximum(seen.sum(axis=0), 1)
    mean = np.where(seen, y, 0).sum(axis=0) / counts
    parts = np.array_split(entries, -(-len(entries) // block))
    return LinearPredictor(mean, tuple((p, _covariance(y, seen, mean, p)) for p in parts))


def _covariance(
    y: np.ndarray, seen: np.ndarray, mean: np.ndarray, entries: np.ndarray
) -> np.ndarray:
    """The shrunk covariance of `entries`."""
    seen = seen[:, entries]
    r = np.where(seen, y[:, entries] - mean[entries], 0)
    aside = np.zeros(len(r), bool)
    aside[::_PART] = np.cumsum(np.ones(len(aside[::_PART]))) <= _ASIDE
    rest = _pairwise(r[~aside], seen[~aside])
    best, whole = _best_shrinkage(rest, r[aside], seen[aside]), _pairwise(r, seen)
    enough = (_shrunk(whole, s) for s in (*SHRINKAGES, 1.0) if s >= best)
    return next(c for c in enough if _positive(c))


def _pairwise(r: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The covariance of residuals, 0 where not `seen`, of each pair over the observations that have both."""
    mask = seen.astype(float)
    return r.T @ r / (np.maximum(mask.T @ mask, 2) - 1)


def _shrunk(covariance: np.ndarray, shrinkage: float) -> np.ndarray:
    """With correlations smaller, and no variance far below the others."""
    variance = np.diagonal(covariance)
    found = (1 - shrinkage) * covariance
    least = max(_EPSILON * variance.mean(), np.finfo(float).tiny)
    np.fill_diagonal(found, np.maximum(variance, least))
    return found


def _best_shrinkage(covariance: np.ndarray, r: np.ndarray, seen: np.ndarray) -> float:
    """By the density of a part of the entries of `r` given the others; 1 where no other gives a covariance."""
    left = np.arange(len(covariance)) % _PART == 0
    some = lambda c: LinearPredictor(np.zeros(len(c)), ((np.arange(len(c)), c),))
    scores = {1.0: -np.inf}
    for shrinkage in SHRINKAGES:
        found = _shrunk(covariance, shrinkage)
        if _positive(found):
            density, _ = some(found).predict(r, seen & ~left, seen & left)
            scores[shrinkage] = float(density.sum())
    return max(scores, key=lambda k: scores[k])


def _positive(covariance: np.ndarray) -> bool:
    """Whether it is positive definite, with something to spare."""
    spare = 2 * _EPSILON * np.diag(np.diagonal(covariance))
    try:
        np.linalg.cholesky(covariance - spare)
    except np.linalg.LinAlgError:
        return False
    return True


def _conditional(
    covariance: np.ndarray, r: np.ndarray, kept: np.ndarray, left: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log densities `(n,)` and means `(n, L)` of the residuals `r` that are `left`, given those `kept`."""
    cross = covariance[np.ix_(kept, left)]
    gain = np.linalg.solve(covariance[np.ix_(kept, kept)], cross) if kept.any() else cross
    mean = r[:, kept] @ gain
    rest = covariance[np.ix_(left, left)] - cross.T @ gain
    factor = np.linalg.cholesky((rest + rest.T) / 2)
    white = np.linalg.solve(factor, (r[:, left] - mean).T)
    log_det = 2 * np.sum(np.log(np.diagonal(factor)))
    density = -0.5 * (np.sum(white**2, axis=0) + log_det + left.sum() * np.log(2 * np.pi))
    return density, mean
