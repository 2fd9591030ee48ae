"""The E-step where all observations of a view have the same operators and noise.

Then the view is one mixture in observation space, with a component per assignment `t` of the sources'
components: means `m_t = Σ_β A_β μ_kβ` and covariances `C_t = Σ + Σ_β A_β C_kβ A_βᵀ = L_t L_tᵀ`, factorised
once for all observations, in float64. With `z = L_t⁻¹ (y − m_t)` and the responsibilities `r_t`,

    Σ r = Σ_i r_t,   Σ r v = L_t⁻ᵀ Σ_i r_t z,   Σ r v vᵀ = L_t⁻ᵀ (Σ_i r_t z zᵀ) L_t⁻¹,   Σ r P = Σ_i r_t C_t⁻¹,

and a component of one source has the sums over the assignments it is in, taken back by `A_βᵀ`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dichroic.learning.mixture.statistics import (
    Pair,
    Statistics,
    SufficientStatistics,
    pull_back_pair,
)
from dichroic.numerics.batching import Tree
from dichroic.priors.components import Components
from dichroic.problem.observations import Observations
from dichroic.runtime import distributed

_CHUNK_BYTES = 96 * 2**20


def shared_log_evidence(priors: dict[str, Components], obs: Observations) -> np.ndarray:
    """`log p(y)` of each observation, `(n,)`."""
    chunks = _View(priors, obs).chunks(obs)
    parts = [np.asarray(_scores(y, *rest), np.float64) for y, _, *rest in chunks]
    return np.concatenate(parts)[: obs.count]


def shared_statistics(
    priors: dict[str, Components], obs: Observations, coupled: Sequence[Pair] = ()
) -> Statistics:
    """The sums of `obs`, and of the pairs of sources `coupled`."""
    view = _View(priors, obs)
    value, n, g, s = 0.0, np.zeros(()), 0.0, 0.0
    for chunk in view.chunks(obs):
        v, *sums = _sums(*chunk)
        dn, dg, ds = (np.asarray(a, np.float64) for a in sums)
        value, n, g, s = value + float(v), n + dn, g + dg, s + ds
    root = view.inverse_root
    back = root.swapaxes(1, 2)
    g = np.einsum("tij,tj->ti", back, g)
    information = n[:, None, None] * (back @ root)
    own = SufficientStatistics(n, g, back @ s @ root, information)
    sums = {k: view.collect(own, k).pull_back(view.matrices[k]) for k in view.matrices}
    cross = lambda a, b: pull_back_pair(
        view.collect(information, a, b), view.matrices[a], view.matrices[b]
    )
    return Statistics(value, sums, {(a, b): cross(a, b) for a, b in coupled})


class _View:
    """The mixture in observation space."""

    def __init__(self, priors: dict[str, Components], obs: Observations):
        y, matrices, cov_noise = obs.one(0).system()
        to64 = lambda a: np.asarray(a, np.float64)
        self.matrices = {k: to64(matrices[k]) for k in priors}
        self.sizes = [c.log_weights.size for c in priors.values()]
        log_weights, mean, cov = np.zeros(1), np.zeros((1, y.size)), to64(cov_noise)[None]
        for name, c in priors.items():
            a = self.matrices[name]
            outer = lambda u, v: (u[:, None] + v[None]).reshape(-1, *u.shape[1:])
            log_weights = outer(log_weights, to64(c.log_weights))
            mean = outer(mean, to64(c.means) @ a.T)
            cov = outer(cov, _sandwich(a, c))
        low = np.linalg.cholesky(cov)
        self.inverse_root = np.linalg.inv(low)
        self.mean = mean
        logdet = 2 * np.log(np.diagonal(low, axis1=1, axis2=2)).sum(axis=1)
        self.constant = log_weights - 0.5 * (logdet + y.size * np.log(2 * np.pi))

    def chunks(self, obs: Observations):
        """Arguments of `_scores` and `_sums`, for as many observations at once as memory allows."""
        t, m = self.mean.shape
        size = int(np.clip(_CHUNK_BYTES // (4 * t * m), 1, obs.count))
        root = jnp.asarray(self.inverse_root, obs.y.dtype)
        shift = jnp.asarray(np.einsum("tij,tj->ti", self.inverse_root, self.mean), obs.y.dtype)
        constant = jnp.asarray(self.constant, obs.y.dtype)
        seen = obs.noise.observed(m)
        for start in range(0, obs.count, size):
            index = np.arange(start, start + size)
            weight = jnp.asarray(index < obs.count, obs.y.dtype)
            y = seen * obs.y[np.minimum(index, obs.count - 1)]
            yield y, weight, root, shift, constant

    def collect(self, over_assignments: Tree, *names: str) -> Tree:
        """Sums over the assignments of each component of a source, or of each pair of two."""
        own = [list(self.matrices).index(name) for name in names]
        others = tuple(i for i in range(len(self.sizes)) if i not in own)
        fold = lambda a: a.reshape(*self.sizes, *a.shape[1:]).sum(axis=others)
        order = np.argsort(np.argsort(own))  # kept axes are in the order of the sources
        sort = lambda a: np.moveaxis(a, order, range(len(own)))
        return jax.tree.map(lambda a: sort(fold(a)), over_assignments)


def _sandwich(a: np.ndarray, c: Components) -> np.ndarray:
    """`A C_k Aᵀ` in float64; by roots where they are known, so that no rounding leaves it below zero."""
    if c.roots is None:
        return a @ np.asarray(c.covariances, np.float64) @ a.T
    half = a @ np.asarray(c.roots, np.float64)
    return half @ half.swapaxes(1, 2)


def _whiten(y: Array, root: Array, shift: Array, constant: Array):
    z = jnp.einsum("tij,nj->tni", root, y) - shift[:, None]
    return z, constant[:, None] - 0.5 * jnp.sum(z * z, axis=-1)


@jax.jit
def _scores(y: Array, root: Array, shift: Array, constant: Array):
    return distributed.map_by_device(
        lambda y: jax.nn.logsumexp(_whiten(y, root, shift, constant)[1], axis=0), y
    )


@jax.jit
def _sums(y: Array, weight: Array, root: Array, shift: Array, constant: Array):
    def summed(rows: tuple[Array, Array], filled: Array):
        y, weight = rows[0], rows[1] * filled
        z, s = _whiten(y, root, shift, constant)
        value = jax.nn.logsumexp(s, axis=0)
        r = jnp.exp(s - value) * weight
        weighted = r[..., None] * z
        moment = jnp.einsum("tni,tnj->tij", weighted, z)
        return value @ weight, jnp.sum(r, axis=1), jnp.sum(weighted, axis=1), moment

    return distributed.sum_by_device(summed, (y, weight))
