"""Are posterior draws calibrated? Ranks, credible intervals and χ².

If the truth is itself a draw from the posterior, its rank among S posterior draws, the number of
draws below it, is uniform on `0 … S`. So give the truth of rank r the interval
`[r, r + 1] / (S + 1)` of `[0, 1]` (`[r, r + t + 1] / (S + 1)` if it equals t of the draws): its
position, as precisely as S draws can tell, and in expectation over ranks spread evenly over
`[0, 1]`, exactly, for any S. From it follow

- the *coverage* of the central credible interval at level q, as the expected share of the truth's
  interval inside `[(1 − q)/2, (1 + q)/2]`. It is the chance that an interval between order
  statistics contains the truth when its ends are randomised between two neighbouring ranks so
  that its level is q. Interpolated quantiles of 32 draws, by contrast, cover 85 % at a nominal
  90 %;
- the *rank histogram* of simulation-based calibration, flat if calibrated, ∪-shaped if draws are
  too narrow, ∩-shaped if too wide, sloped if biased.

The entries of one observation are not independent, so uncertainties come from whole observations:
for the coverage from their scatter, for the histogram from exchangeability. If calibrated, the
truth of observation i is equally likely to be any of the S + 1 vectors in the pool of truth and
draws, so their S + 1 histograms `h_ij` (over the entries, as if vector j were the truth) have the
mean `1/bins` and give the covariance of the truth's. With n observations, the deviation δ of the
mean histogram from flat has

    V = 1/n² Σ_i 1/(S + 1) Σ_j (h_ij − 1/bins)(h_ij − 1/bins)ᵀ,   δᵀ V⁺ δ ~ χ²_(rank V)

for large n; for a single entry this is Pearson's test.

With a known covariance C, `(x − μ)ᵀ C⁻¹ (x − μ)` of a draw x has the expectation `rank C`.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Real
from scipy import stats

from dichroic.errors import DataError, ShapeError
from dichroic.metrics._inputs import finite, same_shape
from dichroic.numerics.arrays import as_booleans, nan_where_masked, split_mask, unmasked

_BLOCK = 2**22


@dataclass(frozen=True)
class Coverage:
    """The fraction of truths inside their credible intervals, and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class RankHistogram:
    """Frequencies of the truth's rank, and how they compare with those of calibrated draws.

    `standard_errors` are the standard deviations that frequencies have about `1 / bins` for
    calibrated draws, and `p_value` is the chance of frequencies less flat than these.
    """

    frequencies: Float[np.ndarray, " bins"]
    standard_errors: Float[np.ndarray, " bins"]
    p_value: float


def coverage(
    draws: Real[ArrayLike, "S n *shape"],
    truth: Real[ArrayLike, " n *shape"],
    *,
    level: float = 0.9,
) -> Coverage:
    """How often central credible intervals of single entries contain the truth.

    The mean share of `[r, r + 1] / (S + 1)` inside `[(1 − level)/2, (1 + level)/2]`, r the rank
    of the truth among its draws. Equal to `level` in expectation for exact posteriors, for any S;
    below it for draws too narrow or biased, above it for draws too wide.

    - `draws`: `(S, n, *shape)`, S posterior draws for each of n observations.
    - `truth`: `(n, *shape)`; `level`: between 0 and 1.

    Returns a `Coverage`, the standard error from the scatter over observations (NaN if n = 1).
    Reference: Talts et al., arXiv 1804.06788, for the uniformity of ranks.
    """
    if not 0 < level < 1:
        raise DataError(f"coverage: level must be between 0 and 1, got {level}")
    drawn, true = _checked("coverage", draws, truth)
    low, high = np.zeros(true.shape), np.ones(true.shape)
    for one in drawn:
        low += one < true
        high += one <= true
    ranks, n = len(drawn) + 1, len(true)
    inside = _share(low / ranks, high / ranks, 0.5 * (1 - level), 0.5 * (1 + level)).mean(axis=1)
    error = inside.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return Coverage(float(inside.mean()), float(error))


def rank_histogram(
    draws: Real[ArrayLike, "S n *shape"], truth: Real[ArrayLike, " n *shape"], *, bins: int = 10
) -> RankHistogram:
    """The histogram of the truth's rank among posterior draws, over all entries and observations.

    The mean share of `[r, r + 1] / (S + 1)` in each of `bins` equal parts of `[0, 1]`: `1 / bins`
    each in expectation for exact posteriors, also where `bins` does not divide S + 1.

    - `draws`: `(S, n, *shape)`; `truth`: `(n, *shape)`.
    - `bins`: at most S + 1; for a reliable p-value, a fifth of n or fewer.

    Returns a `RankHistogram`. Reference: Talts et al., arXiv 1804.06788.
    """
    drawn, true = _checked("rank_histogram", draws, truth)
    ranks, n = len(drawn) + 1, len(true)
    if not 2 <= bins <= ranks:
        raise DataError(
            f"rank_histogram: {bins} bins for {ranks} possible ranks; choose from 2 to {ranks}"
        )
    size = max(1, _BLOCK * n // drawn.size)
    blocks = [slice(start, start + size) for start in range(0, n, size)]
    shares = [_pool_histograms(drawn[:, b], true[b], bins) for b in blocks]
    deviations = np.concatenate(shares, axis=1) - 1 / bins
    null = np.einsum("jib,jic->bc", deviations, deviations) / (ranks * n**2)
    delta = deviations[0].mean(axis=0)
    values, vectors = np.linalg.eigh(null)
    kept = values > 1e-10 / n
    chi2 = np.sum((delta @ vectors[:, kept]) ** 2 / values[kept])
    p_value = float(stats.chi2.sf(chi2, kept.sum())) if kept.any() else 1.0
    return RankHistogram(delta + 1 / bins, np.sqrt(np.diag(null)), p_value)


def chi2_per_dim(
    draw: Real[ArrayLike, " n *shape"],
    mean: Real[ArrayLike, " n *shape"],
    *,
    cov: Real[ArrayLike, "... d d"],
    rtol: float | None = None,
) -> float:
    """The squared distance of draws from a known mean, in units of a known covariance.

    The mean over observations of `(x − μ)ᵀ C⁺ (x − μ) / rank C`: one in expectation if
    `x ~ N(μ, C)`, with standard deviation `√(2 / (n d))`. Directions in the null space of C are
    ignored.

    - `draw`, `mean`: `(n, *shape)`, d entries in each observation.
    - `cov`: `(d, d)`, shared, or `(n, d, d)`.
    - `rtol`: eigenvalues up to `rtol` times the largest count as zero; by default, d times the
      machine precision of `cov`.

    Returns a float. Reference: Mahalanobis, Proc. National Institute of Sciences of India 2, 1936.
    """
    where = "chi2_per_dim"
    x, mu = finite(where, "draw", draw), finite(where, "mean", mean)
    same_shape(where, draw=x, mean=mu)
    residual = (x.astype(float) - mu).reshape(len(x), -1)
    c = finite(where, "cov", cov)
    n, d = residual.shape
    if c.shape not in ((d, d), (n, d, d)):
        raise ShapeError(f"{where}: cov has shape {c.shape}, expected {(d, d)} or {(n, d, d)}")
    rtol = d * float(np.finfo(c.dtype).eps) if rtol is None else rtol
    values, vectors = np.linalg.eigh(0.5 * (c + c.swapaxes(-1, -2)).astype(float))
    kept = _nonzero(values, rtol)
    projected = np.einsum("...ij,...i->...j", vectors, residual)
    chi2 = np.sum(np.where(kept, projected**2 / np.where(kept, values, 1.0), 0.0), axis=-1)
    return float(np.mean(chi2 / kept.sum(axis=-1)))


def predictive_chi2(
    y: Real[ArrayLike, " n *shape"],
    predicted: Real[ArrayLike, " n *shape"],
    *,
    variance: Real[ArrayLike, "..."],
    mask: Bool[ArrayLike, "..."] | None = None,
) -> Float[np.ndarray, " n"]:
    """χ² of each observation given what a model predicts for it, per observed entry.

    `Σ_j m_j (y_j − ŷ_j)² / σ_j² / Σ_j m_j`. For independent Gaussian noise and the true signal ŷ,
    times the number of observed entries it follows a χ² distribution with that many degrees of
    freedom; a ŷ that was fitted to y takes some of them away.

    - `y`, `predicted`: `(n, *shape)`, the data and `Σ_β A_β x_β`.
    - `variance`: σ², and `mask`: true where y was observed, of any shape that broadcasts to that
      of y. What the mask leaves out may be NaN.

    Returns `(n,)`, NaN for an observation with nothing observed.
    Reference: Gelman, Meng and Stern, Statistica Sinica 6, 1996, "Posterior predictive assessment".
    """
    where = "predictive_chi2"
    data, hidden = split_mask(y, f"{where}: y")
    data, model = np.asarray(data), np.asarray(unmasked(predicted, f"{where}: predicted"))
    same_shape(where, y=data, predicted=model)
    given = unmasked(True if mask is None else mask, f"{where}: mask")
    given = as_booleans(given, f"{where}: a mask", "1 where y was observed, else 0")
    observed = _broadcast(where, "mask", given, data.shape)
    observed = observed if hidden is None else observed & ~hidden
    sigma2 = _broadcast(where, "variance", nan_where_masked(variance), data.shape)
    residual = finite(where, "the observed part of y", np.where(observed, data, 0.0))
    residual = residual - finite(where, "predicted", np.where(observed, model, 0.0))
    sigma2 = finite(where, "variance", np.where(observed, sigma2, 1.0))
    if np.any(sigma2 <= 0):
        raise DataError(f"{where}: variance must be positive, its minimum is {sigma2.min():.3g}")
    chi2 = np.sum((residual.astype(float) ** 2 / sigma2).reshape(len(data), -1), axis=1)
    count = np.sum(observed.reshape(len(data), -1), axis=1)
    return np.where(count > 0, chi2 / np.maximum(count, 1), np.nan)


def informed_chi2(chi2: Real[np.ndarray, "draws n"]) -> Real[np.ndarray, "draws m"]:
    """The χ² of draws `(n_draws, n)`, less the observations of which nothing was observed: NaN in every draw."""
    return chi2[:, ~np.isnan(chi2).all(axis=0)]


def mean_chi2(chi2: Real[np.ndarray, "draws n"]) -> float:
    """The mean χ² of draws `(n_draws, n)` over the observations of which something was observed.

    NaN where there are none, and where some draws of an observation are NaN and others are not.
    """
    values = informed_chi2(chi2)
    return float(values.mean()) if values.size else float("nan")


def _checked(
    where: str, draws: ArrayLike, truth: ArrayLike
) -> tuple[Float[np.ndarray, "S n entries"], Float[np.ndarray, "n entries"]]:
    """Draws and truth as arrays that fit together, with their entries in one axis."""
    drawn, true = finite(where, "draws", draws), finite(where, "truth", truth)
    if drawn.shape[1:] != true.shape or drawn.size == 0 or true.ndim == 0:
        raise ShapeError(
            f"{where}: draws {drawn.shape} and truth {true.shape} do not fit, expected "
            "(n_draws, n, *shape) and (n, *shape)"
        )
    return drawn.reshape(len(drawn), len(true), -1), true.reshape(len(true), -1)


def _pool_histograms(
    drawn: Float[np.ndarray, "S n entries"], true: Float[np.ndarray, "n entries"], bins: int
) -> Float[np.ndarray, "S+1 n bins"]:
    """Per vector of the pool, the truth first, its rank histogram over entries."""
    pool = np.concatenate([true[None], drawn])
    low = (stats.rankdata(pool, method="min", axis=0) - 1) / len(pool)
    high = stats.rankdata(pool, method="max", axis=0) / len(pool)
    edges = itertools.pairwise(np.linspace(0, 1, bins + 1))
    return np.stack([_share(low, high, a, b).mean(axis=2) for a, b in edges], axis=2)


def _share(low: np.ndarray, high: np.ndarray, start: float, stop: float) -> np.ndarray:
    """How much of `[low, high]` lies in `[start, stop]`, from 0 to 1."""
    overlap = np.minimum(high, stop) - np.maximum(low, start)
    return np.maximum(overlap, 0.0) / (high - low)


def _nonzero(values: Float[np.ndarray, "... d"], rtol: float) -> Bool[np.ndarray, "... d"]:
    """Which ascending eigenvalues of a covariance are positive beyond rounding."""
    floor = rtol * values[..., -1:]
    if np.any(values[..., -1] <= 0):
        raise DataError("chi2_per_dim: cov is zero or negative, so no direction can be tested")
    if np.any(values < -floor):
        raise DataError(
            f"chi2_per_dim: cov is not PSD (eigenvalue {values.min():.3g}); "
            "if that is rounding, raise rtol"
        )
    return values > floor


def _broadcast(where: str, name: str, values: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.broadcast_to(np.asarray(values), shape)
    except ValueError:
        raise ShapeError(
            f"{where}: {name} has shape {np.shape(values)}, which does not broadcast to that of "
            f"y, {shape}"
        ) from None
