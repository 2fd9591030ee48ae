"""The evidence of an observation under mixtures of Gaussians, and all that follows from its gradient.

Every source β is, here, a mixture `Σ_k w_k N(m_k, V_k)`: exactly for a mixture prior (and for one given
its noised value x_t), by moment matching for a learned denoiser, with one component. An observation
`y = Σ_β A_β x_β + η` then has the evidence

    p(y) = Σ_{k₁…k_S} Π_β w_{kβ} · N(y; Σ_β A_β m_{kβ}, Σ + Σ_β A_β V_{kβ} A_βᵀ),

a sum over tuples of components. Its gradient holds the posterior: with r_k the posterior
probability of component k of one source,

    ∂ log p / ∂ log w_k = r_k,   E[x | y] = Σ_k (r_k m_k + V_k ∂ log p / ∂ m_k),

and with the derivative for V_k as well, one step of expectation-maximisation
(Xu and Jordan, Neural Computation 8, 1996): see `dichroic.mixture_em`.

Where a source's components are too many to enumerate, a beam keeps the most probable partial tuples.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dichroic.linalg import inverse_cholesky, psd_factor

DEFAULT_MAX_TUPLES = 4096


class Components(eqx.Module):
    """A mixture of Gaussians over one flattened source: normalised log weights, means, covariances."""

    log_weights: Float[Array, " K"]
    means: Float[Array, "K dim"]
    covariances: Float[Array, "K dim dim"]

    @property
    def mean(self) -> Float[Array, " dim"]:
        """`Σ_k w_k m_k`."""
        return jnp.exp(self.log_weights) @ self.means

    @property
    def covariance(self) -> Float[Array, "dim dim"]:
        """`Σ_k w_k (V_k + (m_k − m)(m_k − m)ᵀ)`."""
        w = jnp.exp(self.log_weights)
        centred = self.means - self.mean
        return jnp.tensordot(w, self.covariances, 1) + (w[:, None] * centred).T @ centred

    def draw(self, key: PRNGKeyArray) -> Float[Array, " dim"]:
        """One draw."""
        a, b = jax.random.split(key)
        k = jax.random.categorical(a, self.log_weights)
        z = jax.random.normal(b, self.means.shape[1:])
        return self.means[k] + psd_factor(self.covariances[k]) @ z

    def collapse(self) -> "Components":
        """The one Gaussian with the same mean and covariance (moment matching)."""
        return Components(jnp.zeros(1), self.mean[None], self.covariance[None])


class Tuples(eqx.Module):
    """Partial sums over some sources, in observation space, for every tuple of their components."""

    log_weights: Float[Array, " T"]
    means: Float[Array, "T obs"]
    covariances: Float[Array, "T obs obs"]
    index: Int[Array, "T sources"]

    def keep(self, which: Int[Array, " B"]) -> "Tuples":
        return jax.tree.map(lambda a: a[which], self)


def project(components: Components, matrix: Float[Array, "obs dim"]) -> Components:
    """The mixture of `A x` when `x` follows `components`."""
    return Components(
        components.log_weights,
        components.means @ matrix.T,
        matrix @ components.covariances @ matrix.T,
    )


def gaussian_log_density(
    residual: Float[Array, "*batch obs"], covariance: Float[Array, "*batch obs obs"]
) -> Float[Array, "*batch"]:
    """`log N(residual; 0, covariance)`."""
    root, logdet = inverse_cholesky(covariance)
    z = jnp.einsum("...ij,...j->...i", root, residual)
    return -0.5 * (jnp.sum(z * z, -1) + logdet + residual.shape[-1] * np.log(2 * np.pi))


def tuples(
    y: Float[Array, " obs"],
    matrices: Sequence[Float[Array, "obs dim"]],
    cov_noise: Float[Array, "obs obs"],
    sources: Sequence[Components],
    *,
    max_tuples: int = DEFAULT_MAX_TUPLES,
) -> tuple[Tuples, Float[Array, " T"]]:
    """The tuples of components that matter for `y`, and the log of weight × likelihood of each.

    All of them if their number is at most `max_tuples`, else a beam of that size: sources are added
    one by one, those to come stand in as one Gaussian each, and the best partial tuples are kept.
    """
    views = [project(c, a) for c, a in zip(sources, matrices, strict=True)]
    exact = np.prod([v.log_weights.size for v in views]) <= max_tuples
    zero = jnp.zeros_like(y)
    kept = Tuples(jnp.zeros(1), zero[None], cov_noise[None], jnp.zeros((1, 0), int))
    rest = [] if exact else [v.collapse() for v in views]
    for s, view in enumerate(views):
        kept = _extend(kept, view)
        if not exact and kept.log_weights.size > max_tuples:
            score = jax.lax.stop_gradient(_score(y, kept, rest[s + 1 :]))
            kept = kept.keep(jax.lax.top_k(score, max_tuples)[1])
    return kept, _score(y, kept, [])


def _extend(kept: Tuples, view: Components) -> Tuples:
    t, k = kept.log_weights.size, view.log_weights.size
    outer = lambda a, b: (a[:, None] + b[None]).reshape(t * k, *a.shape[1:])
    new = jnp.tile(jnp.arange(k), t)[:, None]
    return Tuples(
        outer(kept.log_weights, view.log_weights),
        outer(kept.means, view.means),
        outer(kept.covariances, view.covariances),
        jnp.concatenate([jnp.repeat(kept.index, k, axis=0), new], axis=1),
    )


def _score(y: Array, kept: Tuples, rest: Sequence[Components]) -> Float[Array, " T"]:
    mean = sum((v.means[0] for v in rest), jnp.zeros_like(y))
    cov = sum((v.covariances[0] for v in rest), jnp.zeros((y.size, y.size)))
    return kept.log_weights + gaussian_log_density(
        y - mean - kept.means, kept.covariances + cov
    )


def log_evidence(
    y: Float[Array, " obs"],
    matrices: Sequence[Float[Array, "obs dim"]],
    cov_noise: Float[Array, "obs obs"],
    sources: Sequence[Components],
    *,
    max_tuples: int = DEFAULT_MAX_TUPLES,
) -> Float[Array, ""]:
    """`log p(y)`: exact up to `max_tuples` tuples of components, a lower bound by a beam beyond."""
    _, scores = tuples(y, matrices, cov_noise, sources, max_tuples=max_tuples)
    return jax.nn.logsumexp(scores)


def posterior_means(
    y: Float[Array, " obs"],
    matrices: Sequence[Float[Array, "obs dim"]],
    cov_noise: Float[Array, "obs obs"],
    sources: Sequence[Components],
    *,
    max_tuples: int = DEFAULT_MAX_TUPLES,
) -> tuple[list[Float[Array, " dim"]], Float[Array, ""]]:
    """`E[x_β | y]` of every source, and `log p(y)`."""

    def objective(wm):
        swapped = [
            Components(w, m, c.covariances) for (w, m), c in zip(wm, sources, strict=True)
        ]
        return log_evidence(y, matrices, cov_noise, swapped, max_tuples=max_tuples)

    value, grads = jax.value_and_grad(objective)([(c.log_weights, c.means) for c in sources])
    means = [
        r @ c.means + jnp.einsum("kij,kj->i", c.covariances, g)
        for (r, g), c in zip(grads, sources, strict=True)
    ]
    return means, value


def posterior_draw(
    y: Float[Array, " obs"],
    matrices: Sequence[Float[Array, "obs dim"]],
    cov_noise: Float[Array, "obs obs"],
    sources: Sequence[Components],
    key: PRNGKeyArray,
    *,
    noise_root: Float[Array, "obs obs"],
    max_tuples: int = DEFAULT_MAX_TUPLES,
) -> tuple[list[Float[Array, " dim"]], Float[Array, ""]]:
    """One exact joint draw of `x_β | y` of every source, and `log p(y)`; `noise_root` is `Σ^½`.

    A tuple of components from its posterior, then `x + V Aᵀ C_y⁻¹ (y − Σ A x − η)` with `x` and `η`
    drawn from that tuple's prior (pathwise conditioning, Wilson et al., JMLR 22, 2021).
    """
    key_tuple, key_noise, *keys = jax.random.split(key, 2 + len(sources))
    kept, scores = tuples(y, matrices, cov_noise, sources, max_tuples=max_tuples)
    which = jax.random.categorical(key_tuple, scores)
    covs = [c.covariances[k] for c, k in zip(sources, kept.index[which], strict=True)]
    means = [c.means[k] for c, k in zip(sources, kept.index[which], strict=True)]
    x = [
        m + psd_factor(v) @ jax.random.normal(k, m.shape)
        for m, v, k in zip(means, covs, keys, strict=True)
    ]
    eta = noise_root @ jax.random.normal(key_noise, y.shape)
    residual = y - eta - sum((a @ u for a, u in zip(matrices, x, strict=True)), jnp.zeros_like(y))
    root, _ = inverse_cholesky(kept.covariances[which])
    v = root.T @ (root @ residual)
    draws = [u + c @ (a.T @ v) for u, c, a in zip(x, covs, matrices, strict=True)]
    return draws, jax.nn.logsumexp(scores)
