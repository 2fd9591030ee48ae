"""A network that corrects an exact denoiser.

    D(x_t, σ) = B(x_t, σ) + c_out(σ) F(c_in(σ) (x_t − μ), c_noise(σ)),
    c_in = 1 / √(σ² + s²),   c_out = σ s / √(σ² + s²),   c_noise = ¼ log(σ / s),

with μ and s the mean and scale of the source. For the Gaussian base `B` of `N(μ, s² I)` this is the
preconditioning of EDM (arXiv 2206.00364, table 1), whose skip connection is that denoiser; with a
mixture as the base, the network only learns what a mixture cannot express, and with `F = 0` the
denoiser is exact for the mixture.
"""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from dichroic.operators import Shape
from dichroic.priors.components import Components
from dichroic.priors.covariance import Moments
from dichroic.priors.denoiser import Denoiser
from dichroic.priors.gaussian_mixture import GaussianMixture

CovarianceModel = Literal["jacobian", "base"]
NETWORK_BATCH = 256  # rows of a network at once, outside of training


class DiffusionPrior(Denoiser):
    """`base` corrected by `network(x, c_noise)`, both for arrays of shape `base.shape`.

    `covariance` says where the joint posterior takes `V[x | x_t]` from: `"jacobian"`, the projected
    Jacobian of the whole (one Gaussian), or `"base"`, the components of the base with their means
    moved by the correction, which costs no Jacobian and keeps several modes apart. With the Jacobian, the
    base preconditions.
    """

    base: GaussianMixture
    network: Callable[[Array, Array], Array]
    covariance: CovarianceModel = eqx.field(static=True, default="jacobian")

    @property
    def shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.shape

    @property
    def location(self) -> Array:
        return self.base.location

    @property
    def scale(self) -> Array:
        return self.base.scale

    def question(self, x_t: Array, sigma: Array) -> tuple[Array, Array]:
        """What the network is given: `c_in (x_t − μ)` and `c_noise`."""
        s = self.scale
        inside = (x_t - self.location) / jnp.sqrt(sigma**2 + s**2)
        return inside, 0.25 * jnp.log(sigma / s)

    def answer(self, x: Array, x_t: Array, sigma: Array) -> Array:
        """What it should say where `x_t` is a noised `x`: `(x − B(x_t, σ)) / c_out`."""
        return (x - self.base(x_t, sigma)) / self.c_out(sigma)

    def correction(self, x_t: Array, sigma: Array) -> Array:
        """`c_out F(c_in (x_t − μ), c_noise)`."""
        return self.c_out(sigma) * self.network(*self.question(x_t, sigma))

    def c_out(self, sigma: Array) -> Array:
        """The scale of a correction."""
        s = self.scale
        return sigma * s / jnp.sqrt(sigma**2 + s**2)

    def __call__(self, x_t: Array, sigma: Array) -> Array:
        return self.base(x_t, sigma) + self.correction(x_t, sigma)

    def components(self, x_t: Array, sigma: Array) -> Components:
        if self.covariance == "jacobian":
            return super().components(x_t, sigma)
        c = self.base.components(x_t, sigma)
        moved = c.means + self.correction(x_t, sigma).ravel()
        return Components(c.log_weights, moved, c.covariances, c.roots)

    def moments(self, x_t: Array, sigma: Array) -> Moments:
        base = self.base.moments(x_t, sigma)
        if self.covariance == "base":
            return base._replace(mean=base.mean + self.correction(x_t, sigma).ravel())
        return super().moments(x_t, sigma)._replace(floor=base.floor, columns=base.columns)


def denoised(denoiser: Denoiser, x_t: Array, sigma: Array) -> Array:
    """`D(x_t, σ)` of rows."""
    if isinstance(denoiser, DiffusionPrior):
        return denoised(denoiser.base, x_t, sigma) + corrections(denoiser, x_t, sigma)
    return _denoised(denoiser, x_t, sigma)


@eqx.filter_jit
def _denoised(denoiser: Denoiser, x_t: Array, sigma: Array) -> Array:
    return jax.vmap(denoiser)(x_t, sigma)


def corrections(denoiser: DiffusionPrior, x_t: Array, sigma: Array) -> Array:
    """`DiffusionPrior.correction` of rows; the network is compiled once for all sources with one of its kind."""
    *question, c_out = _questions(denoiser, x_t, sigma)
    return c_out * _answers(denoiser.network, *question)


@eqx.filter_jit
def _questions(denoiser: DiffusionPrior, x_t: Array, sigma: Array) -> tuple[Array, Array, Array]:
    c_out = denoiser.c_out(sigma).reshape(-1, *[1] * (x_t.ndim - 1))
    return *jax.vmap(denoiser.question)(x_t, sigma), c_out


@eqx.filter_jit
def _answers(network: Callable[[Array, Array], Array], x: Array, c_noise: Array) -> Array:
    return jax.vmap(network)(x, c_noise)  # type: ignore[arg-type]
