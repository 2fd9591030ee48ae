"""Noise levels of the variance-exploding diffusion `x_t = x + σ_t z`.

Levels are relative to a source's scale (its prior standard deviation), so that one schedule serves
sources of any units.
"""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dichroic.errors import ConfigError


class Schedule(eqx.Module):
    """Noise levels between `sigma_max` and `sigma_min`."""

    sigma_min: float = eqx.field(static=True, default=1e-3)
    sigma_max: float = eqx.field(static=True, default=30.0)

    def __check_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    @abstractmethod
    def __call__(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """`σ_t` for `t` in [0, 1], growing from `sigma_min` to `sigma_max`."""

    def grid(self, steps: int) -> Float[Array, " levels"]:
        """`steps + 1` levels, from `sigma_max` down to `sigma_min`."""
        return self(jnp.linspace(1.0, 0.0, steps + 1))


class Geometric(Schedule):
    """`σ_t = σ_min^{1−t} σ_max^t` (arXiv 2510.05205, section 2)."""

    def __call__(self, t: Array) -> Array:
        return jnp.exp((1 - t) * jnp.log(self.sigma_min) + t * jnp.log(self.sigma_max))


class Karras(Schedule):
    """`σ_t = (σ_min^{1/ρ} + t (σ_max^{1/ρ} − σ_min^{1/ρ}))^ρ` (EDM, arXiv 2206.00364, eq. 5)."""

    rho: float = eqx.field(static=True, default=7.0)

    def __call__(self, t: Array) -> Array:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + t * (high - low)) ** self.rho
