"""What a network is told of the noise level."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def noise_features(c_noise: Float[Array, ""], frequencies: int) -> Float[Array, " features"]:
    """Sines and cosines of `c_noise` at `frequencies` octaves."""
    phase = c_noise * 2.0 ** jnp.arange(frequencies) * 0.5
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)])
