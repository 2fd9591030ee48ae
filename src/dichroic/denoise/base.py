"""The denoiser protocol: a prior over one source, seen through `D(x_t, σ) ≈ E[x | x_t]`.

By Tweedie's formula the covariance is `V[x | x_t] = σ² ∂D/∂x_t`. A learned Jacobian is neither
symmetric nor positive; its projection on the PSD matrices is used.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dichroic.batching import as_float
from dichroic.evidence import Components
from dichroic.linalg import psd_projection
from dichroic.operators import Shape
from dichroic.operators.elementary import shape_field

LinearMap = Callable[[Array], Array]


class Denoiser(eqx.Module):
    """A prior over arrays of shape `shape`, as a function of a noised sample and its noise level."""

    shape: eqx.AbstractVar[Shape]

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

    def covariance_map(
        self, x_t: Float[Array, "*shape"], sigma: Float[Array, ""]
    ) -> tuple[Float[Array, " dim"], LinearMap]:
        """`E[x | x_t]` and `u ↦ σ² ½ (J + Jᵀ) u`, on flattened arrays, by Jacobian products."""
        flat = lambda v: self(v.reshape(self.shape), sigma).ravel()
        mean, push = jax.linearize(flat, x_t.ravel())
        pull = jax.linear_transpose(push, x_t.ravel())
        return mean, lambda u: 0.5 * sigma**2 * (push(u) + pull(u)[0])


class Wrapped(Denoiser):
    """A user's own `fn(x, sigma)`, or `fn(params, x, sigma)` with a pytree of parameters (Flax).

    `fn` takes one sample of shape `shape` and a scalar `sigma`; `mean` and `std` describe the prior
    roughly (scalars): sampling starts from `mean`, with noise levels in units of `std`.
    """

    fn: Callable[..., Array] = eqx.field(static=True)
    shape: Shape = shape_field()
    params: PyTree = None
    mean: Float[Array, ""] = eqx.field(converter=as_float, default=0.0)
    std: Float[Array, ""] = eqx.field(converter=as_float, default=1.0)

    def __call__(self, x_t: Array, sigma: Array) -> Array:
        args: tuple[Any, ...] = () if self.params is None else (self.params,)
        return self.fn(*args, x_t, sigma)

    @property
    def location(self) -> Array:
        return jnp.full(self.shape, self.mean)

    @property
    def scale(self) -> Array:
        return self.std
