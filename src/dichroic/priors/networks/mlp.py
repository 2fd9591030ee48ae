"""A multi-layer perceptron conditioned on the noise level."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dichroic.operators import Shape
from dichroic.priors.networks.embedding import noise_features


class Mlp(eqx.Module):
    """Residual blocks `h ← h + W₂ silu((1 + a) ∘ norm(W₁ silu(h)) + b)`, `a, b` linear in features of σ.

    The last layer starts at zero, so that a denoiser preconditioned with it starts as its base.
    """

    first: eqx.nn.Linear
    blocks: list[tuple[eqx.nn.Linear, eqx.nn.Linear, eqx.nn.Linear]]
    last: eqx.nn.Linear
    shape: Shape = eqx.field(static=True)
    width: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    frequencies: int = eqx.field(static=True)

    def __init__(
        self,
        shape: Shape,
        width: int = 128,
        depth: int = 3,
        frequencies: int = 8,
        *,
        key: PRNGKeyArray,
    ):
        dim = int(np.prod(shape))
        keys = iter(jax.random.split(key, 2 + 3 * depth))
        linear = lambda i, o: eqx.nn.Linear(i, o, key=next(keys))
        self.shape = tuple(shape)
        self.width, self.depth, self.frequencies = width, depth, frequencies
        self.first = linear(dim, width)
        self.blocks = [
            (linear(width, width), linear(2 * frequencies, 2 * width), linear(width, width))
            for _ in range(depth)
        ]
        last = linear(width, dim)
        zeros = (jnp.zeros_like(last.weight), jnp.zeros(dim))
        self.last = eqx.tree_at(lambda layer: (layer.weight, layer.bias), last, zeros)

    @property
    def settings(self) -> dict[str, int]:
        """What builds a network of the same structure."""
        return {"width": self.width, "depth": self.depth, "frequencies": self.frequencies}

    def __call__(
        self, x: Float[Array, "*shape"], c_noise: Float[Array, ""]
    ) -> Float[Array, "*shape"]:
        """`F(x, c_noise)` for one sample."""
        features = noise_features(c_noise, self.frequencies)
        h = self.first(x.ravel())
        for inner, modulation, outer in self.blocks:
            gain, shift = jnp.split(modulation(features), 2)
            u = inner(jax.nn.silu(h))
            u = (u - u.mean()) * jax.lax.rsqrt(u.var() + 1e-5)
            h = h + outer(jax.nn.silu((1 + gain) * u + shift))
        return self.last(h).reshape(self.shape)
