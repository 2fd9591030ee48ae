"""Exact denoisers: a Gaussian, and a mixture of Gaussians with dense or low-rank covariances.

With the prior `Σ_k π_k N(μ_k, C_k)` and `x_t = x + σ z`, the posterior of `x` given `x_t` is again a
mixture, with

    weight ∝ π_k N(x_t; μ_k, C_k + σ² I),   m_k = μ_k + C_k (C_k + σ² I)⁻¹ (x_t − μ_k),
    V_k = σ² C_k (C_k + σ² I)⁻¹.

Covariances are kept as `C_k = U_k diag(λ_k) U_kᵀ + τ_k I` (`U_k` with orthonormal columns), so that no
system is solved at any noise level.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dichroic.errors import DataError, ShapeError
from dichroic.numerics.arrays import unmasked
from dichroic.numerics.batching import as_float
from dichroic.operators import Shape
from dichroic.priors.components import Components
from dichroic.priors.covariance import Moments, strongest
from dichroic.priors.denoiser import Denoiser

_FEW = 8  # components whose means precondition


class GaussianMixture(Denoiser):
    """The exact denoiser of a mixture of Gaussians over arrays of shape `shape`.

    Build it from moments with `GaussianMixture.from_moments`, or with `gaussian` for a single component. With
    `stationary`, covariances of every component depend on differences of positions alone, along so many of the
    last axes, and its mean not on them (`dichroic.priors.stationary`); a fit keeps that.
    """

    log_weights: Float[Array, " K"] = eqx.field(converter=as_float)
    means: Float[Array, "K dim"] = eqx.field(converter=as_float)
    basis: Float[Array, "K dim rank"] = eqx.field(converter=as_float)
    variances: Float[Array, "K rank"] = eqx.field(converter=as_float)
    floor: Float[Array, " K"] = eqx.field(converter=as_float)
    shape: Shape = eqx.field(static=True)
    stationary: int = eqx.field(static=True, default=0)

    @classmethod
    def from_moments(
        cls,
        weights: Any,
        means: Any,
        covariances: Any,
        *,
        shape: Shape | None = None,
        rank: int | None = None,
        stationary: int = 0,
    ) -> "GaussianMixture":
        """From weights `(K,)`, means `(K, *shape)` and covariances `(K, D, D)`.

        With `rank`, each covariance keeps its `rank` leading directions and the mean of the other
        eigenvalues as a floor (probabilistic PCA). Raises `DataError` if a number is not finite, a
        weight negative or all of them zero, or a covariance not PSD.
        """
        weights, means = (
            np.asarray(unmasked(a, f"GaussianMixture: {what}"), float)
            for what, a in (("weights", weights), ("means", means))
        )
        dims: Shape = means.shape[1:] if shape is None else tuple(shape)
        covariances = np.asarray(unmasked(covariances, "GaussianMixture: covariances"), float)
        for what, a in (("weight", weights), ("mean", means), ("covariance", covariances)):
            if not np.all(np.isfinite(a)):
                raise DataError(f"GaussianMixture: a {what} is not finite")
        if weights.min(initial=0) < 0 or not weights.sum() > 0:
            raise DataError(
                f"GaussianMixture: weights must be positive numbers or zero, not all zero; got {weights}"
            )
        k, dim = weights.size, int(np.prod(dims))
        if means.size != k * dim or covariances.shape != (k, dim, dim):
            raise ShapeError(
                f"GaussianMixture: {k} components of {dim} entries need covariances {(k, dim, dim)}, "
                f"got means {means.shape} and covariances {covariances.shape}"
            )
        values, vectors = np.linalg.eigh(0.5 * (covariances + covariances.swapaxes(1, 2)))
        lowest = values[:, 0].min()
        if lowest < -1e-5 * max(values.max(), 1e-30):
            raise DataError(f"GaussianMixture: a covariance is not PSD (eigenvalue {lowest:.3g})")
        values = np.maximum(values, 0)
        rank = dim if rank is None else min(rank, dim)
        rest = values[:, : dim - rank]
        floor = rest.mean(axis=1) if rank < dim else np.zeros(k)
        with np.errstate(divide="ignore"):  # a weight of zero
            log_weights = np.log(weights / weights.sum())
        return cls(
            log_weights=log_weights,
            means=means.reshape(k, dim),
            basis=vectors[:, :, dim - rank :],
            variances=np.maximum(values[:, dim - rank :] - floor[:, None], 0),
            floor=floor,
            shape=dims,
            stationary=stationary,
        )

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def full_rank(self) -> bool:
        """Whether the basis spans the whole space, so that the floor is not needed."""
        return self.variances.shape[1] == self.dim

    def covariances(self) -> Float[Array, "K dim dim"]:
        """The dense `C_k`."""
        return self._spectral(self.variances, self.floor)

    def _spectral(self, values: Array, floor: Array) -> Array:
        outer = jnp.einsum("kir,kr,kjr->kij", self.basis, values, self.basis)
        return outer + floor[:, None, None] * jnp.eye(self.dim)

    def _root(self, values: Array, floor: Array) -> Array:
        """The symmetric root of `_spectral`."""
        low = jnp.sqrt(floor)
        return self._spectral(jnp.sqrt(values + floor[:, None]) - low[:, None], low)

    @property
    def location(self) -> Float[Array, "*shape"]:
        return (jnp.exp(self.log_weights) @ self.means).reshape(self.shape)

    @property
    def scale(self) -> Float[Array, ""]:
        between = jnp.sum((self.means - self.location.ravel()) ** 2, -1) / self.dim
        within = jnp.sum(self.variances, -1) / self.dim + self.floor
        return jnp.sqrt(jnp.exp(self.log_weights) @ (between + within))

    def pick(self, index: Any) -> "GaussianMixture":
        """The components `index` alone, with their weights as they are."""
        return jax.tree.map(lambda a: a[index], self)

    def ordered(self) -> "GaussianMixture":
        """The mixture with components that lie together next to each other.

        The means are halved along their principal axis, each half along its own, and so on.
        """
        order = _halved(np.asarray(self.means, np.float64), np.arange(self.log_weights.size))
        return jax.tree.map(lambda a: a[order], self)

    def prior(self) -> Components:
        """The prior itself as components."""
        roots = self._root(self.variances, self.floor)
        return Components(self.log_weights, self.means, self.covariances(), roots)

    def _gains(self, sigma: Array) -> tuple[Array, Array]:
        """`(r, g)` with `C_k (C_k + σ² I)⁻¹ = U_k diag(r) U_kᵀ + g I`.

        No difference is taken: at high noise `1 − σ² / (λ + σ²)` would be rounded away.
        """
        if self.full_rank:
            along = self.variances + self.floor[:, None]
            return along / (along + sigma**2), jnp.zeros_like(self.floor)
        rest = self.floor + sigma**2
        extra = self.variances / (self.variances + rest[:, None]) * (sigma**2 / rest)[:, None]
        return extra, self.floor / rest

    def _shrink(self, x_t: Array, sigma: Array) -> tuple[Array, Array]:
        """Per component: log weight given `x_t` (not normalised), and the posterior mean `m_k`."""
        noised = self.variances + self.floor[:, None] + sigma**2
        extra, g = self._gains(sigma)
        d = x_t.ravel() - self.means
        z = jnp.einsum("kir,ki->kr", self.basis, d)
        log_density = -0.5 * jnp.sum(z * z / noised + jnp.log(noised), -1)
        if not self.full_rank:
            rest = self.floor + sigma**2
            outside = jnp.maximum(jnp.sum(d * d, -1) - jnp.sum(z * z, -1), 0)
            missing = self.dim - self.variances.shape[1]
            log_density += -0.5 * (outside / rest + missing * jnp.log(rest))
        inside = jnp.einsum("kir,kr->ki", self.basis, extra * z)
        return self.log_weights + log_density, self.means + g[:, None] * d + inside

    def __call__(self, x_t: Array, sigma: Array) -> Array:
        scores, means = self._shrink(x_t, sigma)
        return (jax.nn.softmax(scores) @ means).reshape(self.shape)

    def components(self, x_t: Array, sigma: Array) -> Components:
        scores, means = self._shrink(x_t, sigma)
        gains = self._gains(sigma)
        covariances, roots = sigma**2 * self._spectral(*gains), sigma * self._root(*gains)
        return Components(jax.nn.log_softmax(scores), means, covariances, roots)

    def moments(self, x_t: Array, sigma: Array) -> Moments:
        """Both moments in closed form; a draw is one of a component, about the mean of all.

        The rough covariance is that of the likeliest component and of the means of a few.
        """
        scores, means = self._shrink(x_t, sigma)
        w = jax.nn.softmax(scores)
        mean = w @ means
        gains, g = self._gains(sigma)
        extra = w[:, None] * gains
        centred = means - mean

        def covariance(u: Array) -> Array:
            z = extra * jnp.einsum("kir,i->kr", self.basis, u)
            within = jnp.einsum("kir,kr->i", self.basis, z) + (w @ g) * u
            return sigma**2 * within + (w * (centred @ u)) @ centred

        def deviate(key: PRNGKeyArray) -> Array:
            pick, along, rest = jax.random.split(key, 3)
            k = jax.random.categorical(pick, scores)
            z = jnp.sqrt(gains[k]) * jax.random.normal(along, gains.shape[1:])
            white = jnp.sqrt(g[k]) * jax.random.normal(rest, mean.shape)
            return centred[k] + sigma * (self.basis[k] @ z + white)

        top = jnp.argmax(scores) if w.size > 1 else 0
        columns, left = strongest(
            lambda index: self.basis[top][:, index], sigma**2 * gains[top], self.dim
        )
        if w.size > 1:
            weight, which = jax.lax.top_k(w, min(w.size, _FEW))
            between = (jnp.sqrt(weight)[:, None] * centred[which]).T
            columns = jnp.concatenate([columns, between], axis=1)
        return Moments(mean, covariance, deviate, sigma**2 * g[top] + left, columns)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*shape"]:
        """One exact draw from the prior."""
        a, b = jax.random.split(key)
        return self.sample_component(jax.random.categorical(a, self.log_weights), b)

    def sample_component(self, k: Int[Array, ""], key: PRNGKeyArray) -> Float[Array, "*shape"]:
        """One exact draw from component `k`."""
        a, b = jax.random.split(key)
        z = jax.random.normal(a, self.variances.shape[1:])
        inside = self.basis[k] @ (jnp.sqrt(self.variances[k]) * z)
        rest = jnp.sqrt(self.floor[k]) * jax.random.normal(b, (self.dim,))
        return (self.means[k] + inside + rest).reshape(self.shape)


def _halved(means: np.ndarray, index: np.ndarray) -> np.ndarray:
    if index.size < 3:
        return index
    x = means[index] - means[index].mean(axis=0)
    order = index[np.argsort(x @ np.linalg.svd(x, full_matrices=False)[2][0], kind="stable")]
    middle = 2 ** int(np.ceil(np.log2(index.size))) // 2
    return np.concatenate([_halved(means, order[:middle]), _halved(means, order[middle:])])


def gaussian(mean: Any, covariance: Any, *, rank: int | None = None) -> GaussianMixture:
    """The exact denoiser of `N(mean, covariance)`: a mixture of one component.

    `mean` has the source's shape and `covariance` is `(D, D)` over the flattened source.
    """
    parts = {"mean": mean, "covariance": covariance}
    mean, covariance = (np.asarray(unmasked(a, f"gaussian: {k}"), float) for k, a in parts.items())
    return GaussianMixture.from_moments([1.0], mean[None], covariance[None], rank=rank)
