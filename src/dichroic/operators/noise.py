"""Observation noise `η ~ N(0, Σ)` of one observation, flattened to `M` numbers.

As with operators, a parameter with one more axis is per observation. Missing entries are noise of
infinite variance: `Masked` deletes their rows exactly, also where the noise is correlated.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dichroic.errors import ShapeError
from dichroic.numerics.batching import as_float, as_float_or_nan, observation_axes, split
from dichroic.numerics.cholesky import psd_factor


class Noise(eqx.Module):
    """A Gaussian noise model; `Σ` is the covariance of the flattened observation."""

    @abstractmethod
    def mv(self, v: Float[Array, " obs"]) -> Float[Array, " obs"]:
        """`Σ v`."""

    @abstractmethod
    def sample(self, key: PRNGKeyArray, size: int) -> Float[Array, " obs"]:
        """One draw of `η`."""

    def as_matrix(self, size: int) -> Float[Array, "obs obs"]:
        """`Σ` as a dense matrix."""
        return jax.vmap(self.mv)(jnp.eye(size))

    def variances(self, size: int) -> Float[Array, " obs"]:
        """The diagonal of `Σ`."""
        return jnp.diagonal(self.as_matrix(size))

    def observed(self, size: int) -> Float[Array, " obs"]:
        """1 where an entry was observed and 0 where it is missing."""
        return jnp.ones(size)


class IsotropicNoise(Noise):
    """`Σ = std² I`; `std` is a scalar, or `(n,)` for one per observation (per channel: `DiagonalNoise`)."""

    std: Float[Array, "*n"] = eqx.field(converter=as_float_or_nan, metadata=observation_axes(0))

    def mv(self, v: Array) -> Array:
        return self.std**2 * v

    def variances(self, size: int) -> Array:
        return jnp.full(size, self.std**2)

    def sample(self, key: PRNGKeyArray, size: int) -> Array:
        return self.std * jax.random.normal(key, (size,))


class DiagonalNoise(Noise):
    """`Σ = diag(variance)`; `variance` is `(M,)`, or `(n, M)` for one per observation.

    In a `View` it may also have the shape of its observations, or one that broadcasts to that, with all axes:
    `(C, 1, 1)` for one variance per channel of observations `(C, H, W)`, `(n, C, 1, 1)` per observation, too.
    """

    variance: Float[Array, "*n obs"] = eqx.field(
        converter=as_float_or_nan, metadata=observation_axes(1)
    )

    def mv(self, v: Array) -> Array:
        return self.variance * v

    def variances(self, size: int) -> Array:
        return self.variance

    def sample(self, key: PRNGKeyArray, size: int) -> Array:
        return jnp.sqrt(self.variance) * jax.random.normal(key, (size,))


class LowRankNoise(Noise):
    """`Σ = U Uᵀ + diag(variance)`; `factor` `U` is `(M, R)` or `(n, M, R)`, `variance` as above."""

    factor: Float[Array, "... obs rank"] = eqx.field(
        converter=as_float_or_nan, metadata=observation_axes(2)
    )
    variance: Float[Array, "... obs"] = eqx.field(
        converter=as_float_or_nan, metadata=observation_axes(1)
    )

    def mv(self, v: Array) -> Array:
        return self.factor @ (self.factor.T @ v) + self.variance * v

    def variances(self, size: int) -> Array:
        return jnp.sum(self.factor**2, axis=-1) + self.variance

    def sample(self, key: PRNGKeyArray, size: int) -> Array:
        a, b = jax.random.split(key)
        z = jax.random.normal(a, self.factor.shape[-1:])
        return self.factor @ z + jnp.sqrt(self.variance) * jax.random.normal(b, (size,))


class DenseNoise(Noise):
    """`Σ = covariance`, `(M, M)`, or `(n, M, M)` for one per observation."""

    covariance: Float[Array, "*n obs obs"] = eqx.field(
        converter=as_float_or_nan, metadata=observation_axes(2)
    )

    def mv(self, v: Array) -> Array:
        return self.covariance @ v

    def variances(self, size: int) -> Array:
        return jnp.diagonal(self.covariance)

    def sample(self, key: PRNGKeyArray, size: int) -> Array:
        return psd_factor(self.covariance) @ jax.random.normal(key, (size,))


class StationaryNoise(Noise):
    """Correlated noise on a grid, `Σ_ij = covariance(i − j)`, by FFT.

    `covariance` at the lags `−r … r` along `k` axes: odd lengths, lag 0 (the variance) in the middle, 0
    beyond; `(n, …)` with `ndim = k` for one per observation. The last `k` axes of an observation of shape `shape`
    are correlated, others (channels) independent. A view gives the shape if it is left out. Lags along three axes,
    or as many along the first of two as observations have channels, need `ndim`: they could be one set per channel
    or observation.
    """

    covariance: Float[Array, "..."] = eqx.field(
        converter=as_float, metadata=observation_axes(lambda noise: noise.ndim)
    )
    shape: tuple[int, ...] = eqx.field(static=True)
    ndim: int = eqx.field(static=True)
    stated: bool = eqx.field(static=True)  # is `ndim`?

    def __init__(
        self, covariance: Any, *, shape: tuple[int, ...] | None = None, ndim: int | None = None
    ):
        self.covariance = as_float(covariance)
        self.ndim = self.covariance.ndim if ndim is None else ndim
        self.stated = ndim is not None
        self.shape = () if shape is None else tuple(shape)
        lags = self.covariance.shape[-self.ndim :] if self.ndim else ()
        if (
            self.covariance.ndim - self.ndim not in (0, 1)
            or not lags
            or any(n % 2 == 0 for n in lags)
        ):
            raise ShapeError(
                f"StationaryNoise: a covariance of shape {self.covariance.shape}; expected odd numbers of "
                "lags along each axis, lag 0 in the middle (with ndim=k: of the last k axes)"
            )
        if not self.stated:
            self._check_read()
        if self.shape and len(self.shape) < self.ndim:
            raise ShapeError(
                f"StationaryNoise: lags along {self.ndim} axes, but an observation of shape {self.shape}"
            )

    def _check_read(self) -> None:
        """Raise a `ShapeError` where sizes leave open along how many axes there are lags."""
        got, shape = self.covariance.shape, self.shape
        channels = len(got) == len(shape) == 2 and got[0] == shape[0] and got[1] < shape[1]
        if len(got) > 2 or channels:
            raise ShapeError(
                f"StationaryNoise: a covariance of shape {got}: say along how many axes it has lags, "
                f"ndim={len(got)} (all, so that channels are correlated), or ndim={len(got) - 1} for one per "
                "observation, (n, …)"
            )

    def on(self, shape: tuple[int, ...], label: str) -> "StationaryNoise":
        """The noise over observations of `shape`; an error calls the view `label`."""
        if self.shape not in ((), shape):
            raise ShapeError(
                f"{label}: a noise on a grid of shape {self.shape}, but observations of shape {shape}"
            )
        ndim = self.ndim if self.stated else None
        return StationaryNoise(self.covariance, shape=shape, ndim=ndim)

    def white_unless(self, some: Any) -> "StationaryNoise":
        """White noise of variance 1 in place of that of the observations where `some` `(n,)` is false."""
        lags = self.covariance.shape[-self.ndim :]
        white = jnp.zeros(lags).at[tuple(n // 2 for n in lags)].set(1)
        kept = jnp.asarray(some).reshape(-1, *(1 for _ in lags))
        covariance = jnp.where(kept, self.covariance, white)
        return StationaryNoise(covariance, shape=self.shape, ndim=self.ndim)

    def _grid(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The correlated axes, the size of a torus on which no lag wraps, and the radii."""
        lags = self.covariance.shape[-self.ndim :]
        dims = self.shape[-self.ndim :]
        axes = tuple(range(-self.ndim, 0))
        return (
            axes,
            tuple(d + m - 1 for d, m in zip(dims, lags, strict=True)),
            tuple(m // 2 for m in lags),
        )

    def spectrum(self) -> Float[Array, "..."]:
        """The eigenvalues of the noise on that torus (real: the covariance is even)."""
        axes, size, radius = self._grid()
        padded = (
            jnp.zeros(size)
            .at[tuple(slice(0, n) for n in self.covariance.shape)]
            .set(self.covariance)
        )
        return jnp.fft.rfftn(jnp.roll(padded, [-r for r in radius], axes)).real

    def _filter(self, v: Array, gain: Array) -> Array:
        axes, size, _ = self._grid()
        return jnp.fft.irfftn(gain * jnp.fft.rfftn(v, size, axes=axes), size, axes=axes)

    def _crop(self, v: Array) -> Array:
        return v[(..., *(slice(0, d) for d in self.shape[-self.ndim :]))].ravel()

    def mv(self, v: Array) -> Array:
        return self._crop(self._filter(v.reshape(self.shape), self.spectrum()))

    def variances(self, size: int) -> Array:
        middle = tuple(n // 2 for n in self.covariance.shape)
        return jnp.full(size, self.covariance[middle])

    def sample(self, key: PRNGKeyArray, size: int) -> Array:
        torus = (*self.shape[: -self.ndim], *self._grid()[1])
        white = jax.random.normal(key, torus)
        return self._crop(self._filter(white, jnp.sqrt(jnp.maximum(self.spectrum(), 0))))


class Masked(Noise):
    """`noise` with missing entries; `mask` is 1 where observed, `(M,)` or `(n, M)`.

    The rows and columns of missing entries become those of the identity. Together with operators and
    observations that are zero there (`dichroic.inference.posterior` sees to that) this marginalises them.
    """

    noise: Noise
    mask: Float[Array, "*n obs"] = eqx.field(converter=as_float, metadata=observation_axes(1))

    def mv(self, v: Array) -> Array:
        return self.mask * self.noise.mv(self.mask * v) + (1 - self.mask) * v

    def variances(self, size: int) -> Array:
        return self.mask * self.noise.variances(size) + (1 - self.mask)

    def sample(self, key: PRNGKeyArray, size: int) -> Array:
        return self.mask * self.noise.sample(key, size)

    def observed(self, size: int) -> Array:
        return self.mask * self.noise.observed(size)


class JointNoise(Noise):
    """Independent noises of co-observed views, concatenated; `sizes` are their lengths."""

    noises: tuple[Noise, ...]
    sizes: tuple[int, ...] = eqx.field(static=True)

    def _parts(self, v: Array) -> list[Array]:
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes) - 1)]
        return jnp.split(v, ends)

    def mv(self, v: Array) -> Array:
        pairs = zip(self.noises, self._parts(v), strict=True)
        return jnp.concatenate([noise.mv(part) for noise, part in pairs])

    def variances(self, size: int) -> Array:
        pairs = zip(self.noises, self.sizes, strict=True)
        return jnp.concatenate([noise.variances(m) for noise, m in pairs])

    def sample(self, key: PRNGKeyArray, size: int) -> Array:
        keys = jax.random.split(key, len(self.noises))
        triples = zip(self.noises, keys, self.sizes, strict=True)
        return jnp.concatenate([noise.sample(k, m) for noise, k, m in triples])

    def observed(self, size: int) -> Array:
        return jnp.concatenate(
            [noise.observed(m) for noise, m in zip(self.noises, self.sizes, strict=True)]
        )


@eqx.filter_jit
def seen_and_variances(
    noise: Noise, size: int
) -> tuple[Float[Array, "rows obs"], Float[Array, "rows obs"]]:
    """1 where an entry was observed, and variances: `(n, size)`, or `(1, size)` if the noise is shared."""
    rows, shared = split(noise)
    both = lambda model: (model.observed(size), model.variances(size))
    if not jax.tree.leaves(rows):
        return jax.tree.map(lambda a: a[None], both(noise))
    return jax.vmap(lambda r: both(eqx.combine(r, shared)))(rows)


def observed_entries(noise: Noise, size: int) -> Float[Array, "rows obs"]:
    """1 where an entry was observed: `(n, size)`, or `(1, size)` if the noise is shared."""
    rows, shared = split(noise)
    if not jax.tree.leaves(rows):
        return jnp.asarray(noise.observed(size))[None]
    return jax.vmap(lambda r: eqx.combine(r, shared).observed(size))(rows)
