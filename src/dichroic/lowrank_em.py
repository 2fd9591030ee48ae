"""Expectation-maximisation of mixtures of probabilistic PCA, seen through noisy mixtures (`dichroic.lowrank`).

The missing data are the components, the latents `z` and the sources. With `z̄ = (1, z)` the M-step of one source
regresses it on its latents, over all observations and tuples in which component `k` takes part,

    (μ_k, B_k) = (Σ r E[x z̄ᵀ]) (Σ r E[z̄ z̄ᵀ])⁻¹,   τ = Σ r E‖x − μ_k − B_k z‖² / (n D),

(Tipping and Bishop, Neural Computation 11, 1999; Ghahramani and Hinton, CRG-TR-96-1), and lets the latents have
the mean and covariance `Ψ_k` that they have, which is absorbed: `U_k = B_k Ψ_k^½` (parameter-expanded EM, Liu,
Rubin and Wu, Biometrika 85, 1998: fewer steps, and the evidence does not fall either). With the columns
`X = (A μ_k, A U_k)` of all components, all that observations say is

    E = Σ r E[z̄ z̄ᵀ],   Y = Σ r y z̄ᵀ,   Σ r E[e z̄ᵀ] = Y − X E,   Σ r E‖Aᵀ B⁻¹ e‖²,

over pairs of components that are in a tuple together. No matrix of D × D numbers is formed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from dichroic.config import MixtureConfig
from dichroic.denoise import Mixture
from dichroic.lowrank import LowRankView, adjoint_rows, moments
from dichroic.observations import Observations

_SAMPLE = 2000  # observations that a first basis is computed from
_ALIVE = 1e-2  # observations, below which a component stays as it is


@dataclass(frozen=True)
class LatentSums:
    """Of one source: per component `Σ r E[z̄ z̄ᵀ]` and `Σ r E[x z̄ᵀ]`; in all `Σ r E‖√τ ε‖²` and `n`."""

    inner: np.ndarray
    cross: np.ndarray
    spread: float
    count: int

    def __add__(self, other: "LatentSums") -> "LatentSums":
        return LatentSums(
            self.inner + other.inner,
            self.cross + other.cross,
            self.spread + other.spread,
            self.count + other.count,
        )


def low_rank_lap(
    mixtures: Mapping[str, Mixture],
    views: Sequence[Observations],
    names: Sequence[str],
    config: MixtureConfig,
) -> tuple[dict[str, Mixture], float]:
    """`config.steps` EM steps of the sources `names`; all mixtures, and the mean log evidence before the last."""
    mixtures, value = dict(mixtures), 0.0
    for _ in range(config.steps):
        value, sums = 0.0, {}
        for obs in views:
            here, found = low_rank_statistics(mixtures, obs)
            value += here
            for name, s in found.items():
                sums[name] = sums[name] + s if name in sums else s
        mixtures |= {n: maximise_low_rank(mixtures[n], sums[n], config.floor) for n in names}
    return mixtures, value / sum(obs.count for obs in views)


def low_rank_statistics(
    mixtures: Mapping[str, Mixture], obs: Observations
) -> tuple[float, dict[str, LatentSums]]:
    """`Σ_i log p(y_i)`, and the sums of every source that the view sees."""
    view = LowRankView({k: mixtures[k] for k in obs.sources}, obs)
    value, squares = 0.0, dict.fromkeys(view.parts, 0.0)
    tuples = np.zeros((*view.where.shape, view.where.shape[1]))
    outer = np.zeros(view.columns.shape)
    heads = {k: (lambda v, p=p: p.back(view.base.solve(v))) for k, p in view.parts.items()}
    for y in view.chunks(obs):
        given = view.given(y)
        value += float(given.log_evidence.sum())
        r = given.responsibilities.T[:, :, None]
        weighted = r * given.latents
        tuples += (
            given.latents.swapaxes(1, 2) @ weighted + r.sum(axis=1)[:, :, None] * view.covariance
        )
        outer += y.T @ _by_component(view, weighted)
        for name, head in heads.items():
            squares[name] += float(np.sum(head(y.T) ** 2))
    inner = np.zeros((view.columns.shape[1],) * 2)
    np.add.at(inner, (view.where[:, :, None], view.where[:, None, :]), tuples)
    left = outer - view.columns @ inner  # Σ r E[e z̄ᵀ]
    found = {}
    for name, head in heads.items():
        to_source = head(np.concatenate([view.columns, outer, left[:, view.blocks[name]]], axis=1))
        x, xy, xe = np.split(to_source, [outer.shape[1], 2 * outer.shape[1]], axis=1)
        norm = squares[name] - 2 * np.sum(x * xy) + np.sum((x.T @ x) * inner)
        found[name] = _sums(view, name, mixtures[name], inner, xe, norm, obs.count)
    return value, found


def _by_component(view: LowRankView, latents: np.ndarray) -> np.ndarray:
    """`(T, n, S (1 + R))` summed over the tuples of each component: `(n, C)`."""
    out = np.zeros((view.columns.shape[1], latents.shape[1]))
    np.add.at(out, view.where, latents.swapaxes(1, 2))
    return out.T


def _sums(view, name, mixture, inner, left, norm, count) -> LatentSums:
    """The sums of one source: `x = (μ, U) z̄ + √τ ε`, `E[√τ ε | y, z] = τ Aᵀ B⁻¹ e`."""
    part, block = view.parts[name], view.blocks[name]
    k, width = part.columns.shape[1:]
    each = np.arange(block.start, block.stop).reshape(k, width)
    own = inner[each[:, :, None], each[:, None, :]]
    columns, floor = moments(mixture)
    left = floor * left.reshape(-1, k, width).swapaxes(0, 1)
    spread = floor**2 * norm + count * (floor * mixture.dim - floor**2 * view.base.traces[name])
    square = np.sum((columns.swapaxes(1, 2) @ columns) * own) + 2 * np.sum(columns * left) + spread
    return LatentSums(own, columns @ own + left, float(square), count)


def maximise_low_rank(mixture: Mixture, sums: LatentSums, least: float) -> Mixture:
    """The M-step of one source; `least` is the smallest floor, relative to the source's variance.

    Components with next to no observations left stay as they are, with their small weight.
    """
    n = sums.inner[:, 0, 0]
    alive = n > _ALIVE
    columns, _ = moments(mixture)
    new, spread = columns.copy(), sums.spread
    for k in np.flatnonzero(alive):
        inner = sums.inner[k] + 1e-9 * np.trace(sums.inner[k]) * np.eye(len(sums.inner[k]))
        fit = np.linalg.solve(inner, sums.cross[k].T).T
        spread += np.sum((fit.T @ fit) * sums.inner[k]) - 2 * np.sum(fit * sums.cross[k])
        mean = sums.inner[k, 1:, 0] / n[k]
        psi = sums.inner[k, 1:, 1:] / n[k] - np.outer(mean, mean)
        values, vectors = np.linalg.eigh(0.5 * (psi + psi.T))
        new[k, :, 0] = fit[:, 0] + fit[:, 1:] @ mean
        new[k, :, 1:] = fit[:, 1:] @ (vectors * np.sqrt(np.maximum(values, 0)))
    floor = max(spread / (sums.count * mixture.dim), least * float(mixture.scale) ** 2)
    return from_columns(np.maximum(n, 1e-6 * n.sum()), new, floor, mixture.shape)


def from_columns(weights: np.ndarray, columns: np.ndarray, floor: float, shape) -> Mixture:
    """The mixture with `(μ_k, U_k)` `(K, D, 1 + R)` and the floor `τ`."""
    basis, values, _ = np.linalg.svd(columns[:, :, 1:], full_matrices=False)
    return Mixture(
        log_weights=np.log(weights / weights.sum()),
        means=columns[:, :, 0],
        basis=basis,
        variances=values**2,
        floor=np.full(len(weights), floor),
        shape=tuple(shape),
    )


def initial_low_rank(
    name: str, views: Sequence[Observations], rank: int, variance: float
) -> Mixture:
    """One component around 0: the principal directions of back-projections `Aᵀ y`, of this variance per number."""
    seeing, x = [obs for obs in views if name in obs.sources], []
    for obs in seeing:
        index = np.linspace(0, obs.count - 1, min(obs.count, _SAMPLE // len(seeing))).astype(int)
        op = obs.one(0).operators[name]
        y = jnp.asarray(obs.noise.observed(obs.size) * obs.y[index])
        x.append(np.asarray(adjoint_rows(op, y.reshape(-1, *op.out_shape)), np.float64))
    joined = np.concatenate(x)
    _, values, rows = np.linalg.svd(joined - joined.mean(axis=0), full_matrices=False)
    share = values[:rank] ** 2 / np.sum(values**2)
    d = rows.shape[1]
    columns = np.zeros((1, d, 1 + len(share)))
    columns[0, :, 1:] = rows[: len(share)].T * np.sqrt(share * variance * d)
    floor = variance * max(1 - float(share.sum()), 0.01)
    return from_columns(np.ones(1), columns, floor, seeing[0].operators[name].in_shape)
