"""The Wiener filter with the means and covariances that the observations themselves give.

Of the sources' means `μ` and covariances `C`, observations with known operators and noise say

    E[y_i] = Σ_β A_β μ_β,   E[r_i r_iᵀ] = Σ_i + Σ_β A_β C_β A_βᵀ,   r_i = y_i − Σ_β A_β μ_β.

Both are solved by least squares over all observations and views, with missing entries left out, weighted by the
inverse `P_i` of the covariance that observation `i` would have with `C_β = τ² I` for every source (`τ²` is the
mean power of a source's entry):

    Σ_i A_βᵀ P_i (Σ_γ A_γ μ_γ) = Σ_i A_βᵀ P_i y_i,
    Σ_i f A_βᵀ P_i (Σ_γ A_γ Δ_γ A_γᵀ) P_i A_β = Σ_i A_βᵀ (P_i r_i r_iᵀ P_i − f P_i) A_β,   C_β = τ² I + Δ_β,

with `f = 1 − 1/n` in a view of `n` observations, as in an unbiased sample covariance. Conjugate gradients start at
`μ = 0` and `Δ = 0`, so a source has mean 0 and covariance `τ² I` in directions that no observation sees. Negative
eigenvalues of `C_β` are set to 0.

With the views `y₁ = a + η` and `y₂ = a + b + η` this gives `mean(y₂) − mean(y₁)` and `cov(y₂) − cov(y₁)`
for `b`. Its posterior mean is then `μ_b + C_b (C_b + cov(y₁))⁻¹ (y₂ − mean(y₂))`, the filter that is often
written down for a signal in a background that is also seen alone, unless an eigenvalue of `cov(y₁)` is
below the noise's.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg

from dichroic.benchmark.baselines import linear_gaussian as g
from dichroic.benchmark.baselines.fitted import Fitted
from dichroic.errors import DataError
from dichroic.learning.data import Data
from dichroic.priors import Denoiser, gaussian
from dichroic.problem.observations import Observations
from dichroic.problem.problem import Problem, joint_observations
from dichroic.runtime.tracking import Tracker

MOST = 4096  # entries of a source, whose covariance is dense
_ITERATIONS = 200
_TOLERANCE = 1e-10


class WienerFilter(Fitted):
    """Gaussian sources whose means and covariances are the moments of the data: the linear estimate to beat.

    >>> model = WienerFilter(problem).fit()                        # doctest: +SKIP
    >>> model.separate("view2", n_draws=32).mean["signal"]         # doctest: +SKIP

    It learns from all observations but those that a view states as held out, since there is nothing to choose.

    Args:
        problem: what to learn from, with sources of 4,096 entries at most (`DataError`).
        seed: of nothing; all methods have one.
    """

    name = "Wiener filter"

    def __init__(self, problem: Problem | None = None, *, seed: int = 0):
        _check_sizes({} if problem is None else problem.shapes)
        super().__init__(problem, seed=seed)

    def _learn(self, data: Data, tracker: Tracker) -> dict[str, Denoiser]:
        assert self.problem is not None
        began, shapes = time.perf_counter(), self.problem.shapes
        found = moments_of(_observations(self.problem))
        row = {"iteration": 1, "phase": self.name, "sources": "+".join(found)}
        self.metrics.append({**row, "seconds": time.perf_counter() - began})
        tracker.iteration(self.metrics[-1])
        return {k: gaussian(found[k][0].reshape(shapes[k]), found[k][1]) for k in shapes}


def moments_of(views: Sequence[Observations]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean `(D,)` and covariance `(D, D)` of every source that `views` see."""
    data = [g.gather(obs) for obs in views]
    means = g.least_squares_means(data)
    start = {k: math.sqrt(_power(data, means)) * np.eye(m.size) for k, m in means.items()}
    means = _means(data, start)
    changes = _changes(data, means, start)
    return {k: (m, _positive(start[k] ** 2 + changes[k])) for k, m in means.items()}


def _observations(problem: Problem) -> list[Observations]:
    """What there is to learn from, for each (joint) view."""
    found = []
    for views in problem.joint_views():
        held = next(
            (v.held_out_mask for v in views if v.held_out_mask is not None),
            np.zeros(views[0].count),
        )
        index = np.flatnonzero(np.logical_not(held))
        found.append(joint_observations([v.select(index) for v in views]))
    return found


def _check_sizes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if math.prod(shape) > MOST:
            raise DataError(
                f"Wiener filter: source {name!r} has {math.prod(shape):,} entries, and a dense covariance is "
                f"learned of {MOST:,} at most; give it fewer entries, or leave this method out"
            )


def _power(views: Sequence[g.Data], means: g.Arrays) -> float:
    """`τ² = Σ ‖r‖² / Σ ‖A‖²`, whitened."""
    power, gain = 0.0, 0.0
    for v in views:
        normal, m = v.normal(), np.concatenate([means[k] for k in v.dims])
        power += normal.power + m @ (normal.matrix @ m - 2 * normal.vector)
        gain += float(np.trace(normal.matrix))
    return max(float(power), 1e-30) / max(gain, 1e-30)


def _means(views: Sequence[g.Data], start: g.Arrays) -> g.Arrays:
    """`μ` of every source; `start` is `τ I`."""
    zero = {k: np.zeros(len(w)) for k, w in start.items()}
    pull = lambda means: _summed([v.slopes(means, start).means for v in views])
    right = pull(zero)
    left = lambda means: {k: right[k] - x for k, x in pull(means).items()}
    return _solved(left, right)


def _changes(views: Sequence[g.Data], means: g.Arrays, start: g.Arrays) -> g.Arrays:
    """`Δ` of every source, given the means; `start` is `τ I`."""

    def left(changes: g.Arrays) -> g.Arrays:
        return _summed([_scaled(v.response(start, changes), _unbiased(v)) for v in views])

    def right(v: g.Data) -> g.Arrays:
        found = v.curvature(means, start)
        return {k: c.scatter - _unbiased(v) * c.information for k, c in found.items()}

    return _solved(left, _summed([right(v) for v in views]))


def _unbiased(view: g.Data) -> float:
    return 1 - 1 / view.count


def _scaled(arrays: g.Arrays, factor: float) -> g.Arrays:
    return {k: factor * x for k, x in arrays.items()}


def _summed(parts: Sequence[g.Arrays]) -> g.Arrays:
    """The sum over views, by source."""
    names = {k: None for part in parts for k in part}
    return {k: np.sum([part[k] for part in parts if k in part], axis=0) for k in names}


def _solved(left: Callable[[g.Arrays], g.Arrays], right: g.Arrays) -> g.Arrays:
    """The `x` with `left(x) = right`, one array per source, by conjugate gradients from 0."""
    ends = np.cumsum([x.size for x in right.values()])[:-1]

    def unpacked(flat: np.ndarray) -> g.Arrays:
        parts = zip(right.items(), np.split(flat, ends), strict=True)
        return {k: part.reshape(x.shape) for (k, x), part in parts}

    packed = lambda x: np.concatenate([x[k].ravel() for k in right])
    flat = packed(right)
    times = lambda x: packed(left(unpacked(x)))
    size = (flat.size, flat.size)
    equations = LinearOperator(size, times, dtype=float)  # pyright: ignore[reportCallIssue]
    return unpacked(cg(equations, flat, rtol=_TOLERANCE, maxiter=_ITERATIONS)[0])


def _positive(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(0.5 * (covariance + covariance.T))
    return (vectors * np.maximum(values, 0)) @ vectors.T
