"""PQMass: are two samples from the same distribution?

Split space into regions `R_1 … R_K` and count the points of both samples in each, `k_r` and
`l_r`. If both have the same distribution, the counts are two draws from the same multinomial
distribution, so

    χ² = Σ_r (k_r − n p_r)² / (n p_r) + (l_r − m p_r)² / (m p_r),   p_r = (k_r + l_r) / (n + m),

is χ²-distributed with K − 1 degrees of freedom, and the p-value `P(χ²_{K−1} > χ²)` is uniform. No
density, feature or training is needed, in any dimension.

Regions are the Voronoi cells of K reference points, drawn from the pooled samples without regard
to which sample they come from, so that cells follow the data. Reference points are counted in
their own cells: given the pool and the cells, all ways of labelling the points are equally likely
under the null hypothesis, which makes the test valid, and no cell is empty (equal reference
points share a cell, and count as one). The χ² approximation wants about ten points in each cell.

Repeats use fresh cells for the *same* samples. They reduce the dependence on the cells, but they
are not independent: each p-value is uniform under the null, their mean has no known distribution.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import ArrayLike, Float, Int
from scipy import stats

from dichroic.errors import DataError
from dichroic.metrics._inputs import clouds


@dataclass(frozen=True)
class PQMassResult:
    """Means over repeats of the p-value and of χ² per degree of freedom, and the values themselves.

    For two samples of the same distribution both means are expected at ½ and 1; a small χ² (p-value
    near one) is a sign of one sample copied from the other.
    """

    p_value: float
    chi2_per_dof: float
    p_values: Float[np.ndarray, " repeats"]
    chi2: Float[np.ndarray, " repeats"]


def pqmass(
    x: Float[ArrayLike, "n d"],
    y: Float[ArrayLike, "m d"],
    *,
    regions: int = 100,
    repeats: int = 100,
    seed: int = 0,
) -> PQMassResult:
    """PQMass between two samples, averaged over random tessellations.

    - `x`, `y`: `(n, d)` and `(m, d)`, of any sizes.
    - `regions`: K, the number of Voronoi cells; `repeats`: how many tessellations; `seed`: an
      integer for `numpy.random.default_rng`.

    Returns a `PQMassResult`. Reference: Lemos et al., arXiv 2402.04355.
    """
    chi2, dof = _repeat("pqmass", x, y, regions, repeats, seed)
    p_values = stats.chi2.sf(chi2, dof)
    return PQMassResult(float(p_values.mean()), float(np.mean(chi2 / dof)), p_values, chi2)


def pqm_pvalues(
    x: Float[ArrayLike, "n d"],
    y: Float[ArrayLike, "m d"],
    *,
    regions: int = 100,
    repeats: int = 100,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " repeats"], Float[np.ndarray, " repeats"]]:
    """The p-value and χ² of PQMass for each of several random tessellations.

    `P(χ²_{K−1} > χ²)`, with χ² and its arguments as in `pqmass`.

    Returns p-values and χ² values, `(repeats,)` each. Reference: Lemos et al., arXiv 2402.04355.
    """
    chi2, dof = _repeat("pqm_pvalues", x, y, regions, repeats, seed)
    return stats.chi2.sf(chi2, dof), chi2


def _repeat(
    where: str, x: ArrayLike, y: ArrayLike, regions: int, repeats: int, seed: int
) -> tuple[Float[np.ndarray, " repeats"], Int[np.ndarray, " repeats"]]:
    """χ² and its degrees of freedom for `repeats` random tessellations."""
    a, b = clouds(where, x, y)
    if not 2 <= regions <= len(a) + len(b):
        raise DataError(
            f"{where}: {regions} regions for {len(a) + len(b)} points; choose at least 2, "
            "and about a tenth of the points of one sample"
        )
    if repeats < 1:
        raise DataError(f"{where}: repeats must be at least 1, got {repeats}")
    pooled = np.concatenate([a, b])
    if np.all(pooled == pooled[0]):
        raise DataError(f"{where}: all points of x and y coincide, there is nothing to compare")
    pooled -= pooled.mean(axis=0)
    rng = np.random.default_rng(seed)
    tests = [_test(pooled, len(a), regions, rng) for _ in range(repeats)]
    return np.array([chi2 for chi2, _ in tests]), np.array([dof for _, dof in tests])


def _test(
    pooled: Float[np.ndarray, "N d"], n: int, regions: int, rng: np.random.Generator
) -> tuple[float, int]:
    """χ² and its degrees of freedom between the first `n` pooled points and the others."""
    while True:
        references = pooled[rng.choice(len(pooled), size=regions, replace=False)]
        cells = _voronoi(pooled, references)
        counts = np.stack([np.bincount(c, minlength=regions) for c in (cells[:n], cells[n:])])
        counts = counts[:, counts.sum(axis=0) > 0]
        if counts.shape[1] > 1:
            break
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / len(pooled)
    return float(np.sum((counts - expected) ** 2 / expected)), counts.shape[1] - 1


def _voronoi(
    points: Float[np.ndarray, "N d"], references: Float[np.ndarray, "K d"]
) -> Int[np.ndarray, " N"]:
    """The index of the reference point nearest to each point."""
    return np.argmin(np.sum(references**2, axis=1) - 2 * points @ references.T, axis=1)
