"""Features of handwritten digits, for a Fréchet distance: the last hidden layer of a small classifier.

The classifier is trained on the ten digits of MNIST, with a little white noise, in some ten seconds. A distance
of its features is not the FID of other works, whose features are those of a large network.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dichroic.benchmark.problems.grassy import load_mnist, shrink

Carry = tuple["DigitClassifier", optax.OptState]

_NOISE, _BATCH, _STEPS, _RATE = 0.05, 256, 1500, 2e-3


class DigitClassifier(eqx.Module):
    """Two hidden layers; 64 features, non-negative."""

    layers: list[eqx.nn.Linear]

    def __init__(self, size: int, *, key: Array):
        widths = (size**2, 256, 64, 10)
        keys = jax.random.split(key, len(widths) - 1)
        pairs = zip(widths, widths[1:], keys, strict=False)
        self.layers = [eqx.nn.Linear(i, o, key=k) for i, o, k in pairs]

    def features(self, x: Float[Array, "size size"]) -> Float[Array, " 64"]:
        """The last hidden layer."""
        h = x.ravel()
        for layer in self.layers[:-1]:
            h = jax.nn.relu(layer(h))
        return h

    def __call__(self, x: Float[Array, "size size"]) -> Float[Array, " 10"]:
        """The logits of the ten digits."""
        return self.layers[-1](self.features(x))

    def of(self, images: np.ndarray) -> np.ndarray:
        """The features of images `(n, size, size)`, `(n, 64)`."""
        return np.asarray(_features(self, jnp.asarray(images, jnp.float32)))


@eqx.filter_jit
def _features(model: DigitClassifier, x: Array) -> Array:
    return jax.vmap(model.features)(x)


def train_classifier(
    size: int, *, data_dir: str | Path | None = None, seed: int = 0
) -> tuple[DigitClassifier, float]:
    """A classifier of images `(size, size)`, and the fraction of the test images that it gets right."""
    images, labels = load_mnist(data_dir)
    x, y = jnp.asarray(shrink(images, size)), jnp.asarray(labels, jnp.int32)
    key_model, key = jax.random.split(jax.random.key(seed))
    model = DigitClassifier(size, key=key_model)
    optimiser = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))

    def step(carry: Carry, key: PRNGKeyArray) -> tuple[Carry, None]:
        model, state = carry
        key_batch, key_noise = jax.random.split(key)
        index = jax.random.randint(key_batch, (_BATCH,), 0, len(x))
        noised = x[index] + _NOISE * jax.random.normal(key_noise, (_BATCH, size, size))
        loss = lambda m: jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(jax.vmap(m)(noised), y[index])
        )
        updates, state = optimiser.update(jax.grad(loss)(model), state)
        return (eqx.apply_updates(model, updates), state), None

    train = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    model, _ = train((model, optimiser.init(model)), jax.random.split(key, _STEPS))
    images, labels = load_mnist(data_dir, held_out=True)
    guess = jnp.argmax(jax.vmap(model)(jnp.asarray(shrink(images, size))), axis=1)
    return model, float(np.mean(np.asarray(guess) == labels))
