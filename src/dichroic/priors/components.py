"""Mixtures of Gaussians as arrays, over one flattened source or over what a view sees of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dichroic.numerics.cholesky import psd_factor


class Components(eqx.Module):
    """A mixture of Gaussians over one flattened source: normalised log weights, means, covariances.

    `roots`, where they are known, are matrices with `R_k R_kᵀ = V_k`: draws then factorise nothing.
    """

    log_weights: Float[Array, " K"]
    means: Float[Array, "K dim"]
    covariances: Float[Array, "K dim dim"]
    roots: Float[Array, "K dim dim"] | None = None

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
        return self.draw_component(jax.random.categorical(a, self.log_weights), b)

    def draw_component(self, k: Int[Array, ""], key: PRNGKeyArray) -> Float[Array, " dim"]:
        """One draw from component `k`."""
        root = psd_factor(self.covariances[k]) if self.roots is None else self.roots[k]
        return self.means[k] + root @ jax.random.normal(key, self.means.shape[1:])

    def pick(self, k: Int[Array, " T"]) -> "Components":
        """The components `k`, repeated as they are; an index past the last has no weight."""
        get = lambda a, fill: a.at[k].get(mode="fill", fill_value=fill)
        none = k >= self.log_weights.size
        covs = get(self.covariances, 0) + none[:, None, None] * jnp.eye(self.means.shape[1])
        return Components(get(self.log_weights, -jnp.inf), get(self.means, 0), covs)

    def merge_pairs(self) -> "Components":
        """Components 2i and 2i + 1 as one with the same moments; one left over stays as it is."""
        size = -(-self.log_weights.size // 2)
        if size == self.log_weights.size:
            return self
        both = self.pick(jnp.arange(2 * size))
        log_w = both.log_weights.reshape(size, 2)
        total = jax.nn.logsumexp(log_w, axis=1)
        share = jnp.exp(log_w - total[:, None])
        m, v = (a.reshape(size, 2, *a.shape[1:]) for a in (both.means, both.covariances))
        mean = jnp.einsum("gp,gpi->gi", share, m)
        off = m - mean[:, None]
        within = jnp.einsum("gp,gpij->gij", share, v)
        return Components(total, mean, within + jnp.einsum("gp,gpi,gpj->gij", share, off, off))

    def collapse(self) -> "Components":
        """The one Gaussian with the same mean and covariance (moment matching)."""
        return Components(jnp.zeros(1), self.mean[None], self.covariance[None])
