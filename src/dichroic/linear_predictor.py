"""What a linear filter predicts of entries of an observation from the others: a yardstick for learned priors.

One Gaussian of the observations themselves, whatever made them. Its covariance `C` is that of the entries observed
together, with correlations shrunk toward 0 by the estimated optimum (Schäfer & Strimmer, Stat. Appl. Genet. Mol.
Biol. 4, 32, 2005; here with the variance of the correlation of Gaussians),

    λ = Σ_{j≠k} (1 − r_jk²)² / n_jk / Σ_{j≠k} r_jk²,

so that it can be inverted with fewer observations than entries. Of more entries than `BLOCK`, those of a block of
neighbours are predicted from the block alone.
"""

from dataclasses import dataclass

import numpy as np

BLOCK = 1024
_EPSILON = 1e-6
_LEAST = 1e-2


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
    """The shrunk covariance of `entries`, positive definite."""
    here = seen[:, entries]
    r, mask = np.where(here, y[:, entries] - mean[entries], 0), here.astype(float)
    together = np.maximum(mask.T @ mask, 2)
    found = r.T @ r / (together - 1)
    variance = np.diagonal(found)
    std = np.sqrt(np.maximum(variance, max(_EPSILON * variance.mean(), np.finfo(float).tiny)))
    correlation = found / std[:, None] / std
    np.fill_diagonal(correlation, 0)
    square = np.minimum(correlation**2, 1)
    doubt = np.sum((1 - square) ** 2 / together) - np.sum(1 / np.diagonal(together))
    shrinkage = min(1.0, doubt / max(square.sum(), _EPSILON))
    shrunk = (1 - shrinkage) * correlation
    np.fill_diagonal(shrunk, 1)
    return _positive(shrunk) * std[:, None] * std


def _positive(correlation: np.ndarray) -> np.ndarray:
    """`correlation`, with eigenvalues of `_LEAST` at the least where not all are positive, as with many gaps."""
    try:
        np.linalg.cholesky(correlation - _EPSILON * np.eye(len(correlation)))
    except np.linalg.LinAlgError:
        values, axes = np.linalg.eigh(correlation)
        return (axes * np.maximum(values, _LEAST)) @ axes.T
    return correlation


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
