"""The linear contrastive latent variable model, by its exact evidence.

Every source is `x_β = μ_β + W_β z_β`, `z_β ~ N(0, I_r)` (Severson, Ghosh and Ng, AAAI 2019, whose two
data sets are here any views with known operators and noise). All is Gaussian, so that

    Σ_views Σ_i log N(y_i; Σ_β A_i μ_β, Σ_i + Σ_β A_i W_β W_βᵀ A_iᵀ)

is maximised as it stands, over all sources and views at once, by L-BFGS: no sampling, no bound; in the
coordinates of `J` (`ascent`), in which 784 dimensions of full rank take tens of steps. It starts at `W = 0`,
where the means are those of least squares. Factors grow from one rank to the next by directions `w`
orthogonal to the old, the principal ones of the gradient `∂/∂C = ½ (S − J)` (`gaussian.Curvature`), with

    W ← (W, √t w),   t = n (wᵀSw − wᵀJw) / (wᵀJw)²,

the largest evidence along `w` if every observation saw it alike. For one source seen as it is through white
noise σ², that is the maximum already, `W = U (Λ − σ² I)^½` (Tipping and Bishop, JRSS B 61, 1999).

The rank `r` is the same for all sources (capped by the size of each): of 1, 2, 3, 4, 6, 8, …, D the
one with the largest evidence of held-out observations. The search uses at most 2048 training observations
of a view whose observations differ in operators, noise or missing entries; the final fit uses all.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dichroic.benchmark.baselines import linear_gaussian as g
from dichroic.benchmark.baselines.ascent import monotone_em, root
from dichroic.benchmark.baselines.fitted import Fitted, candidate_ranks
from dichroic.learning.data import Data
from dichroic.priors import Denoiser, gaussian
from dichroic.problem.batches import in_memory
from dichroic.problem.problem import Problem
from dichroic.runtime.tracking import Tracker

_SEARCH: dict[str, Any] = {"iterations": 200, "tolerance": 1e-8}
_LEAST_GAIN = 1e-2  # of a new direction that the data do not ask for, in units of what they resolve


class Fit(NamedTuple):
    """Means and factors of all sources, their mean log evidence, and that of every iterate."""

    means: g.Arrays
    factors: g.Arrays
    value: float
    history: list[float]


class ClvmLinear(Fitted):
    """Sources as linear images of few latent variables, learned by exact evidence.

    >>> model = ClvmLinear(problem).fit()                          # doctest: +SKIP
    >>> model.separate("view2", n_draws=32).mean["signal"]         # doctest: +SKIP

    Args:
        problem: what to learn from.
        seed: of the held-out observations.
        rank: latent variables per source, at most its size; chosen by held-out evidence by default.
        holdout: fraction of each view held out, where the view does not say which.
    """

    name = "CLVM-linear"

    def __init__(
        self,
        problem: Problem | None = None,
        *,
        seed: int = 0,
        rank: int | None = None,
        holdout: float = 0.1,
    ):
        super().__init__(problem, seed=seed, holdout=holdout, rank=rank)

    def _learn(self, data: Data, tracker: Tracker) -> dict[str, Denoiser]:
        assert self.problem is not None
        began = time.perf_counter()
        views = [in_memory(obs) for obs in data.train]
        some, train = [g.gather(g.few(obs)) for obs in views], [g.gather(obs) for obs in views]
        held = [g.gather(in_memory(obs)) for obs in data.test]
        dims = {k: d for v in train for k, d in v.dims.items()}
        ranks = candidate_ranks(self.settings["rank"], dims)

        def keep(fit: Fit, rank: int) -> float:
            score = g.mean_evidence(held, fit.means, fit.factors)
            row: dict[str, Any] = {"iteration": len(self.metrics) + 1, "phase": self.name}
            row |= {"sources": "+".join(dims), "rank": rank, "log_evidence": fit.value}
            row |= {"heldout_log_evidence": score, "seconds": time.perf_counter() - began}
            self.metrics.append(row)
            tracker.iteration(row)
            tracker.progress(self.name, row["iteration"], len(ranks) + 1)
            return score

        fit, tried = start(some), []
        for rank in ranks:
            fit = maximise(some, grow(some, fit, rank), **_SEARCH)
            tried.append((keep(fit, rank), rank, fit))
        _, rank, fit = max(tried, key=lambda t: t[0])
        self.chosen = {"rank": rank}
        fit = maximise(train, fit)
        keep(fit, rank)
        return {k: _prior(fit, k, self.problem.shapes[k]) for k in dims}


def _prior(fit: Fit, name: str, shape: tuple[int, ...]) -> Denoiser:
    w = fit.factors[name]
    rank = w.shape[1] if w.shape[1] < w.shape[0] else None
    return gaussian(fit.means[name].reshape(shape), w @ w.T, rank=rank)


def start(views: Sequence[g.Data]) -> Fit:
    """The means of least squares, and factors of rank 0."""
    means = g.least_squares_means(views)
    return Fit(means, {k: np.zeros((m.size, 0)) for k, m in means.items()}, -np.inf, [])


def grow(views: Sequence[g.Data], fit: Fit, rank: int) -> Fit:
    """`fit` with factors of rank `rank`, or as many columns as the source has numbers."""
    curvatures, counts = _curvatures(views, fit), _counts(views)
    factors = {
        k: np.concatenate([w, directions(w, curvatures[k], counts[k], rank)], axis=1)
        for k, w in fit.factors.items()
    }
    return fit._replace(factors=factors)


def _curvatures(views: Sequence[g.Data], fit: Fit) -> dict[str, g.Curvature]:
    return g.add_curvatures([v.curvature(fit.means, fit.factors) for v in views])


def _counts(views: Sequence[g.Data]) -> dict[str, int]:
    """The number of observations that see each source."""
    names = {k for v in views for k in v.dims}
    return {k: sum(v.count for v in views if k in v.dims) for k in names}


def directions(w: np.ndarray, c: g.Curvature, count: int, rank: int) -> np.ndarray:
    """The columns `√t w` that take the factor `w` `(D, r)` to the rank `rank`: see above."""
    size, old = w.shape
    free = np.linalg.svd(w)[0][:, old:] if old else np.eye(size)
    _, vectors = np.linalg.eigh(free.T @ (c.scatter - c.information) @ free)
    new = free @ vectors[:, ::-1][:, : max(0, min(rank, size) - old)]
    along = lambda matrix: np.einsum("ij,ik,kj->j", new, matrix, new) / count
    scatter, information = along(c.scatter), along(c.information)
    level = max(float(np.trace(c.information)) / (size * count), 1e-30)
    seen = information > 1e-6 * level
    information = np.where(seen, information, level)
    gain = np.where(seen, np.maximum(scatter / information - 1, _LEAST_GAIN), _LEAST_GAIN)
    return new * np.sqrt(gain / information)


def maximise(
    views: Sequence[g.Data], fit: Fit, *, iterations: int = 1000, tolerance: float = 1e-10
) -> Fit:
    """The maximum of the evidence over means and factors, of the ranks of `fit`."""
    names, count = list(fit.means), sum(v.count for v in views)

    def read(arrays: Sequence[np.ndarray]) -> tuple[g.Arrays, g.Arrays]:
        half = len(names)
        return dict(zip(names, arrays[:half], strict=True)), dict(
            zip(names, arrays[half:], strict=True)
        )

    def evidence(arrays: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
        slopes = g.total([v.slopes(*read(arrays)) for v in views])
        gradient = [part[k] / count for part in (slopes.means, slopes.factors) for k in names]
        return slopes.value / count, gradient

    begin = [part[k] for part in (fit.means, fit.factors) for k in names]
    curvatures, counts = _curvatures(views, fit), _counts(views)
    roots = [root(curvatures[k].information / counts[k]) for k in names] * 2
    options: dict[str, Any] = {"iterations": iterations, "tolerance": tolerance}
    found = monotone_em(evidence, begin, roots=roots, **options)
    return Fit(*read(found.arrays), found.value, found.history)
