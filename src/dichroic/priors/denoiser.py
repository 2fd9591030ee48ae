"""The denoiser protocol: a prior over one source, seen through `D(x_t, σ) ≈ E[x | x_t]`.

By Tweedie's formula the covariance is `V[x | x_t] = σ² ∂D/∂x_t`. A learned Jacobian is neither
symmetric nor positive; its projection on the PSD matrices is used.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dichroic.errors import ShapeError
from dichroic.numerics.batching import as_float
from dichroic.numerics.cholesky import psd_projection
from dichroic.operators import Shape
from dichroic.operators.base import as_shape, check_declared
from dichroic.priors.components import Components
from dichroic.priors.covariance import Moments, root
from dichroic.priors.spectrum import spectral_moments


class _Shape:
    """Declared apart from the fields of a denoiser, which are the arguments of its constructor."""

    shape: Shape


class Denoiser(_Shape, eqx.Module):
    """A prior over arrays of shape `shape`, as a function of a noised sample and its noise level."""

    def __check_init__(self):
        check_declared(self, "shape")

    @abstractmethod
    def __call__(self, x_t: Float[Array, "*shape"], sigma: Float[Array, ""]) -> Array:
        """`E[x | x_t]` for `x_t = x + sigma · z`."""

    @property
    def location(self) -> Float[Array, "*shape"]:
        """The prior mean, where sampling starts."""
        return jnp.zeros(self.shape)

    @property
    def scale(self) -> Float[Array, ""]:
        """The prior standard deviation (root mean square over entries), the unit of noise levels."""
        return jnp.ones(())

    def components(self, x_t: Float[Array, "*shape"], sigma: Float[Array, ""]) -> Components:
        """What is known of `x` given `x_t`, as a mixture; here one Gaussian with the two moments."""
        mean, push = jax.linearize(
            lambda v: self(v.reshape(self.shape), sigma).ravel(), x_t.ravel()
        )
        jacobian = jax.vmap(push, out_axes=1)(jnp.eye(mean.size))
        return Components(jnp.zeros(1), mean[None], sigma**2 * psd_projection(jacobian)[None])

    def moments(self, x_t: Float[Array, "*shape"], sigma: Float[Array, ""]) -> Moments:
        """What is known of `x` given `x_t` as one Gaussian, by Jacobian products: no matrix is formed.

        Its covariance is `u ↦ σ² ½ (J + Jᵀ) u`, two products; the rough one that of `N(·, s² I)`, `s` the scale.
        """
        flat = lambda v: self(v.reshape(self.shape), sigma).ravel()
        mean, push = jax.linearize(flat, x_t.ravel())
        pull = jax.linear_transpose(push, x_t.ravel())
        covariance = lambda u: 0.5 * sigma**2 * (push(u) + pull(u)[0])
        deviate = lambda key: sigma * root(push, jax.random.normal(key, mean.shape))
        variance = self.scale**2
        floor = sigma**2 * variance / (variance + sigma**2)
        return Moments(mean, covariance, deviate, floor, jnp.zeros((mean.size, 0)))


def _optional(value: Any) -> Array | None:
    return None if value is None else as_float(value)


class CustomDenoiser(Denoiser):
    """A user's own `fn(x, sigma)`, or `fn(params, x, sigma)` with a pytree of parameters (Flax).

    `fn` takes one sample of shape `shape` and a scalar `sigma`; `mean` and `std` describe the prior
    roughly (scalars): sampling starts from `mean`, with noise levels in units of `std`. `spectrum`, of shape
    `shape`, has the prior's variances in the discrete cosine transform (`dct_spectrum` samples of the source).

    With a `spectrum`, conjugate gradients are preconditioned. `covariance="spectrum"` also takes `V[x | x_t]` from
    it: no Jacobian, as accurate where a source is stationary, and too wide where it is not.
    Raises `ShapeError` for a spectrum of another shape, or none where it is needed.
    """

    fn: Callable[..., Array] = eqx.field(static=True)
    shape: Shape = eqx.field(static=True, converter=as_shape)
    params: PyTree = None
    mean: Float[Array, ""] = eqx.field(converter=as_float, default=0.0)
    std: Float[Array, ""] = eqx.field(converter=as_float, default=1.0)
    spectrum: Float[Array, "..."] | None = eqx.field(converter=_optional, default=None)
    covariance: Literal["jacobian", "spectrum"] = eqx.field(static=True, default="jacobian")

    def __check_init__(self):
        found = None if self.spectrum is None else self.spectrum.shape
        if found != self.shape and not (found is None and self.covariance == "jacobian"):
            raise ShapeError(f"CustomDenoiser: a spectrum of shape {found}; expected {self.shape}")

    def __call__(self, x_t: Array, sigma: Array) -> Array:
        args: tuple[Any, ...] = () if self.params is None else (self.params,)
        return self.fn(*args, x_t, sigma)

    @property
    def location(self) -> Array:
        return jnp.full(self.shape, self.mean)

    @property
    def scale(self) -> Array:
        return self.std

    def components(self, x_t: Array, sigma: Array) -> Components:
        if self.covariance == "jacobian":
            return super().components(x_t, sigma)
        mean, covariance, *_ = self.moments(x_t, sigma)
        return Components(jnp.zeros(1), mean[None], jax.vmap(covariance)(jnp.eye(mean.size))[None])

    def moments(self, x_t: Array, sigma: Array) -> Moments:
        if self.spectrum is None:
            return super().moments(x_t, sigma)
        if self.covariance == "spectrum":
            return spectral_moments(self(x_t, sigma).ravel(), self.spectrum, sigma)
        moments = super().moments(x_t, sigma)
        rough = spectral_moments(moments.mean, self.spectrum, sigma)
        return moments._replace(floor=rough.floor, columns=rough.columns)
