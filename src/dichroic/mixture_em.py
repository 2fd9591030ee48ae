"""Expectation-maximisation of mixtures of Gaussians seen only through noisy, incomplete mixtures.

The E-step is the gradient of the evidence. Let `N_k`, `G_k` and `H_k` be the sums over observations
of ∂/∂log w_k, ∂/∂m_k and 2 ∂/∂V_k of `log p(y)`. The exact EM update of a component (π, μ, C) is

    π_k ∝ N_k,   μ_k ← μ_k + δ_k with δ_k = C_k G_k / N_k,   C_k ← C_k + C_k H_k C_k / N_k − δ_k δ_kᵀ,

whatever the operators, the noise and the number of sources (Xu and Jordan, Neural Computation 8, 1996).
Components are grown by splitting: each becomes two, apart along its principal axis. That converges
far faster than a random start of all of them.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dichroic.batching import split
from dichroic.denoise import Mixture
from dichroic.evidence import DEFAULT_MAX_TUPLES, Components, log_evidence
from dichroic.observations import Observations
from dichroic.shared import is_shared, shared_log_evidence, shared_statistics

Mixtures = dict[str, Mixture]
_CHUNK_BYTES = 64 * 2**20


class Statistics(eqx.Module):
    """Sums over observations: the log evidence, and its gradients `N`, `G`, `½ H` per source."""

    log_evidence: Float[Array, ""]
    gradients: dict[str, Components]

    def __add__(self, other: "Statistics") -> "Statistics":
        merged = dict(self.gradients)
        for name, g in other.gradients.items():
            merged[name] = jax.tree.map(np.add, merged[name], g) if name in merged else g
        return Statistics(self.log_evidence + other.log_evidence, merged)


def statistics(
    mixtures: Mixtures, views: Sequence[Observations], *, max_tuples: int = DEFAULT_MAX_TUPLES
) -> Statistics:
    """The E-step over all `views`: the log evidence and its gradients for every source they see.

    Also for sources that are not to be updated: their gradients cost next to nothing, and XLA fuses the
    sums over tuples better when none is left out.
    """
    priors = {k: m.prior() for k, m in mixtures.items()}
    parts = []
    for obs in views:
        seen = {k: priors[k] for k in obs.sources}
        if _one_mixture(seen, obs, max_tuples):
            parts.append(Statistics(*shared_statistics(seen, obs)))
        else:
            parts.append(_view_statistics(seen, obs, max_tuples))
    return sum(parts[1:], parts[0])


def mean_log_evidence(
    mixtures: Mixtures, views: Sequence[Observations], *, max_tuples: int = DEFAULT_MAX_TUPLES
) -> float:
    """The mean of `log p(y)` over all observations of `views`."""
    priors = {k: m.prior() for k, m in mixtures.items()}
    total = 0.0
    for obs in views:
        seen = {k: priors[k] for k in obs.sources}
        if _one_mixture(seen, obs, max_tuples):
            total += shared_log_evidence(seen, obs)
        else:
            total += float(_view_log_evidence(seen, obs, max_tuples))
    return total / sum(obs.count for obs in views)


def _one_mixture(priors: dict[str, Components], obs: Observations, max_tuples: int) -> bool:
    """Whether all observations share one mixture of at most `max_tuples` components."""
    return is_shared(obs) and _count(priors) <= max_tuples


def _count(priors: dict[str, Components]) -> int:
    return int(np.prod([c.log_weights.size for c in priors.values()]))


@eqx.filter_jit
def _view_statistics(priors, obs, max_tuples) -> Statistics:
    evidence = lambda p, chunk: _chunk_log_evidence(p, chunk, max_tuples)
    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, priors))
    return Statistics(*_accumulate(jax.value_and_grad(evidence), priors, obs, zero, max_tuples))


@eqx.filter_jit
def _view_log_evidence(priors, obs, max_tuples) -> Array:
    evidence = lambda p, chunk: _chunk_log_evidence(p, chunk, max_tuples)
    return _accumulate(evidence, priors, obs, jnp.zeros(()), max_tuples)


def _chunk_log_evidence(priors: dict[str, Components], chunk: tuple, max_tuples: int) -> Array:
    """`Σ_i w_i log p(y_i)` over a chunk `(rows, shared, w)`."""
    rows, shared, w = chunk

    def one(row: Observations) -> Array:
        y, matrices, cov_noise = eqx.combine(row, shared).system()
        sources = [priors[k] for k in matrices]
        return log_evidence(y, list(matrices.values()), cov_noise, sources, max_tuples=max_tuples)

    return w @ jax.vmap(one)(rows)


def _accumulate(function, priors, obs: Observations, zero, max_tuples: int):
    """The sum of `function(priors, chunk)` over chunks of observations that fit in memory."""
    per_observation = 16 * min(_count(priors), max_tuples) * obs.size**2
    size = int(np.clip(_CHUNK_BYTES // per_observation, 1, obs.count))
    count = -(-obs.count // size)
    rows, shared = split(obs)
    take = jnp.minimum(jnp.arange(count * size), obs.count - 1).reshape(count, size)
    weight = (jnp.arange(count * size) < obs.count).astype(obs.y.dtype).reshape(count, size)

    def body(total, chunk):
        index, w = chunk
        part = function(priors, (jax.tree.map(lambda a: a[index], rows), shared, w))
        return jax.tree.map(jnp.add, total, part), None

    return jax.lax.scan(body, zero, (take, weight))[0]


def maximise(mixture: Mixture, gradient: Components, *, floor: float, shrinkage: float) -> Mixture:
    """The M-step of one source, in float64: see the formulas above.

    Eigenvalues are kept above `floor`; `shrinkage` is the number of pseudo-observations that pull each
    covariance towards the mean of all. Components with next to no observations
    left stay as they are, with their small weight.
    """
    to64 = lambda a: np.asarray(a, np.float64)
    n, g, h = to64(gradient.log_weights), to64(gradient.means), 2 * to64(gradient.covariances)
    mean, cov = to64(mixture.means), to64(mixture.covariances())
    n = np.maximum(n, 0)
    alive = n > 1e-2
    safe = np.where(alive, n, 1)
    delta = np.einsum("kij,kj->ki", cov, g) / safe[:, None]
    new = cov + cov @ (0.5 * (h + h.swapaxes(1, 2))) @ cov / safe[:, None, None]
    new -= delta[:, :, None] * delta[:, None, :]
    pooled = np.einsum("k,kij->ij", n / n.sum(), new)
    pull = (shrinkage / (shrinkage + safe))[:, None, None]
    new = _lift((1 - pull) * new + pull * pooled, floor)
    keep = alive[:, None]
    return Mixture.from_moments(
        np.maximum(n, 1e-6 * n.sum()),
        np.where(keep, mean + delta, mean).reshape(-1, *mixture.shape),
        np.where(keep[..., None], new, cov),
        shape=mixture.shape,
    )


def _lift(cov: np.ndarray, floor: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(0.5 * (cov + cov.swapaxes(1, 2)))
    return np.einsum("kir,kr,kjr->kij", vectors, np.maximum(values, floor), vectors)


def split_components(mixture: Mixture, components: int) -> Mixture:
    """Up to twice as many components, at most `components`: the heaviest are split in two.

    A component `N(μ, C)` with principal axis `λ u uᵀ` becomes `N(μ ± √(λ/2) u, C − ½ λ u uᵀ)`, which
    keeps its mean and covariance.
    """
    weights = np.exp(np.asarray(mixture.log_weights, np.float64))
    means = np.asarray(mixture.means, np.float64)
    cov = np.asarray(mixture.covariances(), np.float64)
    parents = np.argsort(-weights)[: max(0, components - weights.size)]
    values, vectors = np.linalg.eigh(cov[parents])
    axis = np.sqrt(values[:, -1:] / 2) * vectors[:, :, -1]
    child_cov = cov[parents] - axis[:, :, None] * axis[:, None, :]
    weights[parents] /= 2
    child_means = means[parents] + axis
    means[parents] -= axis
    cov[parents] = child_cov
    return Mixture.from_moments(
        np.concatenate([weights, weights[parents]]),
        np.concatenate([means, child_means]).reshape(-1, *mixture.shape),
        np.concatenate([cov, child_cov]),
        shape=mixture.shape,
    )
