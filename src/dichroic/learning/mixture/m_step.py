"""The M-step of mixtures: the next means, covariances and weights from the sums of the E-step.

With, per component and over its share of the observations, `g = E[u]`, `S = E[u uᵀ]` and `W = E[Aᵀ C_y⁻¹ A]`,
standard EM, with the source itself as missing data, is (Xu and Jordan, Neural Computation 8, 1996)

    μ ← μ + C g,   C ← C + C (S − g gᵀ − W) C.

It never lowers the evidence, but hardly moves a component that is thinner than what the noise resolves:
a variance c that should be 0 falls as σ² / √(2 steps). The step here has the same fixed points (g = 0,
S = W), is the same for complete data (W = C⁻¹), and does not stall: with `C = L L`, `X = L W L + ε`,

    μ ← μ + L X⁻¹ L g,   C ← L X^{-½} (L (S − g gᵀ) L + ε) X^{-½} L.

The first is exact given C (the assignment alone is missing data); the second is the fixed-point iteration for
variance components (Anderson, Annals of Statistics 1, 1973), where a c that should be 0 falls as
σ² / steps. `ε` keeps what no observation sees.

Components of a source are alike to some degree, which few observations of each do not show. With a `shrinkage`
`ν > 0` they have a prior, whose centre is the mixture before the step (empirical Bayes; after Fraley and Raftery,
Journal of Classification 24, 2007). With the mean and covariance `m`, `T` of the mixture and the mean covariance
`C̄`,

    μ_k ~ N(m, T / κ),   C_k ~ inverse Wishart about C̄ of ν pseudo-observations,   κ = 0.3 ν,

which adds `−κ T⁻¹ (μ_k − m)` and `κ T⁻¹` to the force and the information of each mean, and `ν L⁻¹ C̄ L⁻¹` and
`ν I` to the scatter and the information of each covariance, in units of `C = L L`. What observations show clearly
they decide; what other sources hide of a component, which the evidence hardly tells, all components share.

Sources that are learned at once from the same views share their residuals: what one mean takes the others cannot.
Then the first formula is that of all means of all sources together, with the information `Σ r A_aᵀ C_y⁻¹ A_b`
between components of two sources in X. Source by source, views that mix two sources with weights (1, f) and
(f, 1) would lose only a part `(1 − f)² / 2 (1 + f²)` of an error a step: 0.3% for f = 0.9.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import jax
import numpy as np

from dichroic.errors import DataError
from dichroic.learning.mixture.statistics import Statistics, SufficientStatistics
from dichroic.numerics.finite import finite
from dichroic.priors import GaussianMixture
from dichroic.priors.stationary import stationary_step, symmetric_power
from dichroic.runtime.tracking import Clock, warn

Found = TypeVar("Found")
Mixtures = Mapping[str, GaussianMixture]
Result = TypeVar("Result")
# What is counted in an iteration: steps whose numbers were not finite, for which a standard step was taken; and
# those for which that was no better.
REJECTED, FAILED = "rejected_steps", "failed_steps"
MOST_MEANS = 2048  # numbers in the means of all sources, up to which they are solved for together
_UNSEEN = 1e-7  # ε: the information about a component that counts as none
_ROUNDING = 1e-6  # of the information, in sums of single precision
_ALIVE = 1e-2  # observations, below which a component stays as it is
_OF_MEANS = 0.3  # κ / ν


def monotone_em(
    mixtures: Mixtures,
    evaluate: Callable[[Mixtures], tuple[float, Found]],
    update: Callable[[Mixtures, Found, bool], Mixtures],
    *,
    steps: int,
    tolerance: float,
    clock: Clock | None = None,
) -> tuple[Mixtures, float]:
    """`steps` EM steps, and the evidence before the last.

    `evaluate` is the E-step, which finds the evidence and what `update`, the M-step, needs. A step that lowers
    the evidence, by more than a part `tolerance` of it, or gives values that are not finite, is taken back for
    a standard step. Where that gives none either, it ends with the last mixtures whose evidence is finite, and
    `clock` counts a step that was `FAILED`.
    """
    known, standard, clock = None, False, clock or Clock()
    for _ in range(steps):
        with clock.during("e_step"):
            result = _finite_or_not(partial(evaluate, mixtures))
        evidence = math.nan if result is None else result[0]
        least = -math.inf
        if known is not None and not standard and math.isfinite(tolerance):
            least = known[1] - tolerance * abs(known[1])
        if result is not None and math.isfinite(evidence) and evidence >= least:
            known, standard = (mixtures, *result), False
        elif known is None or standard:
            break
        else:
            standard = True
            if not math.isfinite(evidence):
                clock.count(REJECTED)
        with clock.during("m_step"):
            new = _finite_or_not(partial(update, known[0], known[2], standard))
            if new is None and not standard:
                clock.count(REJECTED)
                standard, new = True, _finite_or_not(partial(update, known[0], known[2], True))
        if new is None:
            break
        mixtures = new
    else:
        return mixtures, known[1] if known else math.nan
    clock.count(FAILED)
    what = "an EM step and a standard step give" if known else "the evidence of mixtures has"
    warn(f"{what} values that are not finite: mixtures stay as they were")
    return known[:2] if known else (mixtures, math.nan)


def _finite_or_not(work: Callable[[], Result]) -> Result | None:
    """What `work` gives, unless that cannot be computed or is not finite."""
    try:
        found = work()
    except (np.linalg.LinAlgError, DataError):  # of values that are not finite, or nearly so
        return None
    return found if finite(found) else None


def joint_shifts(
    mixtures: Mapping[str, GaussianMixture],
    found: Statistics,
    names: Sequence[str],
    shrinkage: Mapping[str, float],
) -> dict[str, np.ndarray]:
    """The steps `(K, D)` of the means of `names`, solved for together."""
    roots, blocks, end = {}, {}, 0
    priors = {n: _prior_of_means(mixtures[n], shrinkage.get(n, 0.0)) for n in names}
    for name in names:
        n = np.maximum(np.asarray(found.sums[name].count, np.float64), 0)
        share = np.where(n > _ALIVE, 1 / np.sqrt(np.maximum(n, _ALIVE)), 0)
        cov = np.asarray(mixtures[name].covariances(), np.float64)
        roots[name] = share[:, None, None] * symmetric_power(cov, 0.5)
        blocks[name] = slice(end, end + cov.shape[0] * cov.shape[1])
        end = blocks[name].stop
    matrix, force = np.zeros((end, end)), np.zeros(end)
    for name, root in roots.items():
        sums, at = found.sums[name], np.arange(blocks[name].start, blocks[name].stop)
        own = at.reshape(root.shape[:2])
        pull, stiffness = priors[name]
        information = np.asarray(sums.information) + stiffness
        matrix[own[:, :, None], own[:, None, :]] = root @ information @ root
        force[at] = (root @ (np.asarray(sums.force) + pull)[..., None]).ravel()
    for (a, b), between in found.cross.items():
        if a in roots and b in roots:
            both = roots[a][:, None] @ np.asarray(between, np.float64) @ roots[b]
            square = both.transpose(0, 2, 1, 3).reshape(len(force[blocks[a]]), -1)
            matrix[blocks[a], blocks[b]], matrix[blocks[b], blocks[a]] = square, square.T
    matrix[np.diag_indices(end)] *= 1 + _ROUNDING
    matrix[np.diag_indices(end)] += _UNSEEN
    z = np.linalg.solve(matrix, force)
    apply = lambda root, z: (root @ z.reshape(*root.shape[:2], 1))[..., 0]
    return {name: apply(root, z[blocks[name]]) for name, root in roots.items()}


def maximise(
    mixture: GaussianMixture,
    sums: SufficientStatistics,
    *,
    floor: float,
    shrinkage: float = 0.0,
    shift: np.ndarray | None = None,
    damping: float = 1.0,
    standard: bool = False,
) -> GaussianMixture:
    """The M-step of one source, in float64: see the formulas above; `standard` picks the first pair.

    Eigenvalues are kept above `floor`; `shrinkage` is the strength of the prior. `shift` is the step of the means
    where that is known from `joint_shifts`; `damping` scales it where it is not, for several sources that are seen
    together and move at once. Components with next to no observations left stay as they are, with their small
    weight.
    """
    n, g, s, w = (np.asarray(a, np.float64) for a in jax.tree.leaves(sums))
    mean, cov = (np.asarray(a, np.float64) for a in (mixture.means, mixture.covariances()))
    n = np.maximum(n, 0)
    alive = n > _ALIVE
    share = np.where(alive, n, 1)[:, None, None]
    pull, stiffness = _prior_of_means(mixture, shrinkage)
    stiffness = stiffness / share
    g, pull, s, w = g[..., None] / share, pull[..., None] / share, s / share, w / share
    pooled = np.einsum("k,kij->ij", n / n.sum(), cov)
    if mixture.stationary:
        moved, new = stationary_step(
            mixture, g[..., 0], s, w, floor=floor, damping=damping, standard=standard
        )
        delta = (moved - mean)[..., None]
    elif standard:
        delta, new = _standard_step(cov, g, s, w, pull, stiffness)
    else:
        part = damping if shift is None else 1.0
        toward = part * (g + pull)
        delta = _mean_step(cov, toward, w + stiffness) if shift is None else shift[..., None]
        change = toward - stiffness @ delta  # of the force that observations have on the means
        still = s - change @ _t(g) - g @ _t(change) + change @ _t(change)
        new = _covariance_step(cov, still, w, shrinkage / share, pooled)
    if standard or mixture.stationary:
        weight = shrinkage / (shrinkage + share)
        new = (1 - weight) * new + weight * np.einsum("k,kij->ij", n / n.sum(), new)
    if not mixture.stationary:  # of which spectra are above it
        new = symmetric_power(new, 1, floor)
    keep = alive[:, None]
    return GaussianMixture.from_moments(
        np.maximum(n, 1e-6 * n.sum()),
        np.where(keep, mean + delta[..., 0], mean).reshape(-1, *mixture.shape),
        np.where(keep[..., None], new, cov),
        shape=mixture.shape,
        stationary=mixture.stationary,
    )


def _standard_step(
    c: np.ndarray,
    g: np.ndarray,
    s: np.ndarray,
    w: np.ndarray,
    pull: np.ndarray,
    stiffness: np.ndarray,
):
    moved = c @ g
    delta = np.linalg.solve(np.eye(c.shape[-1]) + c @ stiffness, moved + c @ pull)
    return delta, c + c @ (s - w) @ c - moved @ _t(delta) - delta @ _t(moved) + delta @ _t(delta)


def _mean_step(c: np.ndarray, g: np.ndarray, w: np.ndarray):
    root = symmetric_power(c, 0.5)
    left = root @ symmetric_power(root @ w @ root + _UNSEEN * np.eye(c.shape[-1]), -0.5)
    return left @ (_t(left) @ g)


def _covariance_step(
    c: np.ndarray, s: np.ndarray, w: np.ndarray, weight: np.ndarray, pooled: np.ndarray
):
    """The next covariances, with the inverse Wishart prior about `pooled` of the `weight` `(K, 1, 1)`."""
    one = np.eye(c.shape[-1])
    root = symmetric_power(c, 0.5)
    x, y = root @ w @ root + _UNSEEN * one, root @ s @ root + _UNSEEN * one
    if np.any(weight > 0):
        inverse = symmetric_power(c, -0.5)
        x, y = x + weight * one, y + weight * (inverse @ pooled @ inverse)
    left = root @ symmetric_power(x, -0.5)
    return left @ y @ _t(left)


def _prior_of_means(mixture: GaussianMixture, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    """What the prior adds to the force `(K, D)` and to the information `(D, D)` of the means."""
    mean = np.asarray(mixture.means, np.float64)
    if not shrinkage or mixture.stationary or len(mean) == 1:
        return np.zeros(mean.shape), np.zeros((mean.shape[1],) * 2)
    weights = np.exp(np.asarray(mixture.log_weights, np.float64))
    off = mean - weights @ mean
    total = np.einsum("k,kij->ij", weights, mixture.covariances()) + (weights * off.T) @ off
    stiffness = _OF_MEANS * shrinkage * symmetric_power(total, -1.0, 1e-12 * np.trace(total))
    return -off @ stiffness, stiffness


def _t(a: np.ndarray) -> np.ndarray:
    return a.swapaxes(1, 2)
