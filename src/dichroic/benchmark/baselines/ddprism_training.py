"""The M-steps of DDPRISM as published: a Gaussian by probabilistic PCA, or score matching from scratch.

The Gaussian keeps the two leading directions of the draws' covariance and the mean of its other eigenvalues
(Tipping and Bishop, 1999). The network is trained on

    min_F  E_{x, t, z} ‖D(x + σ_t z, σ_t) − x‖² (1/σ_t² + 1),   t ~ Beta(3, 3),   σ_t = σ_min^{1−t} σ_max^t,

by Adam with clipped gradients and a learning rate that falls linearly; its weights after the last step count:
no average, and no held-out observations. `D` is preconditioned as by EDM about `N(0, I)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dichroic.errors import DataError
from dichroic.operators import Shape
from dichroic.priors import DiffusionPrior, GaussianMixture, gaussian
from dichroic.priors.schedule import Geometric

Weights = Any  # a network, or None where it has no such arrays
Carry = tuple[Weights, optax.OptState]  # weights, and the state of the optimiser

_BLOCK = 100
_SLOWEST = 1e-4


@dataclass(frozen=True)
class Training:
    """Training of a network: its steps, the size of a batch, the learning rates, the noise levels."""

    steps: int
    batch: int
    learning_rate: float
    final_learning_rate: float
    sigma_min: float
    sigma_max: float


class TimeMlp(eqx.Module):
    """Layers `h ← norm(silu(W h))` of `width`; features of `log σ` are concatenated to the input.

    The features are sines and cosines at `time_features / 2` frequencies from 1 down to 10⁻⁴. It is called
    with the `c_noise = ¼ log σ` of `DiffusionPrior`.
    """

    layers: list[eqx.nn.Linear]
    norms: list[eqx.nn.LayerNorm]
    last: eqx.nn.Linear
    shape: Shape = eqx.field(static=True)
    time_features: int = eqx.field(static=True)

    def __init__(
        self, shape: Shape, width: int, depth: int, time_features: int, *, key: PRNGKeyArray
    ):
        dim = int(np.prod(shape))
        sizes = [dim + 2 * (time_features // 2), *[width] * depth]
        keys = jax.random.split(key, depth + 1)
        self.shape, self.time_features = tuple(shape), time_features
        self.layers = [
            eqx.nn.Linear(sizes[i], sizes[i + 1], key=keys[i]) for i in range(len(sizes) - 1)
        ]
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(depth)]
        self.last = eqx.nn.Linear(sizes[-1], dim, key=keys[-1])

    def __call__(
        self, x: Float[Array, "*shape"], c_noise: Float[Array, ""]
    ) -> Float[Array, "*shape"]:
        """`F(x, c_noise)` for one sample."""
        frequencies = _SLOWEST ** jnp.linspace(0, 1, self.time_features // 2)
        phase = 4 * c_noise * frequencies
        h = jnp.concatenate([x.ravel(), jnp.sin(phase), jnp.cos(phase)])
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = norm(jax.nn.silu(layer(h)))
        return self.last(h).reshape(self.shape)


def network_denoiser(
    shape: Shape,
    key: PRNGKeyArray,
    *,
    width: int,
    depth: int,
    time_features: int,
    unit: float = 1.0,
) -> DiffusionPrior:
    """A fresh denoiser of arrays of `shape`, preconditioned about `N(0, unit² I)`."""
    dim = int(np.prod(shape))
    base = gaussian(np.zeros(shape), unit**2 * np.eye(dim))
    return DiffusionPrior(base, _fresh(tuple(shape), width, depth, time_features, key))


@eqx.filter_jit
def _fresh(shape: Shape, width: int, depth: int, time_features: int, key: PRNGKeyArray) -> TimeMlp:
    return TimeMlp(shape, width, depth, time_features, key=key)


def wide_gaussian(shape: Shape, *, rank: int, unit: float = 1.0) -> GaussianMixture:
    """Where every source starts: `N(0, (2 unit)² I)`."""
    return gaussian(np.zeros(shape), 4 * unit**2 * np.eye(int(np.prod(shape))), rank=rank)


def ppca(samples: Float[np.ndarray, "n *shape"], *, rank: int) -> GaussianMixture:
    """The Gaussian of `samples` with a covariance of `rank` directions and a floor."""
    if len(samples) < 2:
        raise DataError(f"a Gaussian needs two draws at least, and {len(samples)} are left")
    flat = np.asarray(samples, float).reshape(len(samples), -1)
    cov = np.atleast_2d(np.cov(flat.T, bias=True))
    return gaussian(np.mean(samples, axis=0, dtype=float), cov, rank=rank)


def score_matching_loss(
    denoiser: DiffusionPrior,
    x: Float[Array, "batch *shape"],
    key: PRNGKeyArray,
    *,
    sigma_min: float,
    sigma_max: float,
) -> Float[Array, ""]:
    """The loss above on a batch, per entry, with noise levels in units of the denoiser's scale.

    `t ~ Beta(3, 3)` is the middle one of five uniform numbers.
    """
    key_time, key_noise = jax.random.split(key)
    t = jnp.sort(jax.random.uniform(key_time, (5, x.shape[0])), axis=0)[2]
    level = Geometric(sigma_min, sigma_max)(t)
    sigma = denoiser.scale * level
    z = jax.random.normal(key_noise, x.shape)
    noised = x + sigma.reshape(-1, *[1] * (x.ndim - 1)) * z
    error = (jax.vmap(denoiser)(noised, sigma) - x).reshape(x.shape[0], -1) / denoiser.scale
    return jnp.mean(jnp.mean(error**2, axis=1) * (1 / level**2 + 1))


def train(
    denoiser: DiffusionPrior,
    samples: Float[np.ndarray, "n *shape"],
    key: PRNGKeyArray,
    *,
    config: Training,
    room: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[DiffusionPrior, float]:
    """The denoiser with its network trained on `samples`, and the mean loss of the last block of steps.

    `room` is the size that the array of samples is padded to, so that another number of them does not
    compile anew.
    """
    if not len(samples):
        raise DataError("a network needs draws to be trained on, and none are left")
    weights, frozen = eqx.partition(denoiser.network, eqx.is_inexact_array)
    padding = max(0, (room or 0) - len(samples))
    data = jnp.asarray(np.concatenate([samples, np.zeros_like(samples[:1]).repeat(padding, 0)]))
    carry, loss = (weights, _optimiser(config).init(weights)), float("nan")
    for start in range(0, config.steps, _BLOCK):
        steps = jnp.arange(start, min(start + _BLOCK, config.steps))
        count = jnp.asarray(len(samples))
        carry, losses = _train_block(carry, frozen, denoiser, data, count, key, steps, config)
        loss = float(jnp.mean(losses))
        if progress:
            progress(int(steps[-1]) + 1, config.steps)
    network = eqx.combine(carry[0], frozen)
    return eqx.tree_at(lambda d: d.network, denoiser, network), loss


def _optimiser(config: Training) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(config.learning_rate, config.final_learning_rate, config.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@eqx.filter_jit
def _train_block(
    carry: Carry,
    frozen: Weights,
    denoiser: DiffusionPrior,
    data: Array,
    count: Array,
    key: PRNGKeyArray,
    steps: Array,
    config: Training,
):
    optimiser = _optimiser(config)

    def loss_of(weights: Weights, batch: Array, k: PRNGKeyArray):
        d = eqx.tree_at(lambda d: d.network, denoiser, eqx.combine(weights, frozen))
        return score_matching_loss(
            d, batch, k, sigma_min=config.sigma_min, sigma_max=config.sigma_max
        )

    def body(carry: Carry, step: Array):
        weights, state = carry
        key_batch, key_loss = jax.random.split(jax.random.fold_in(key, step))
        index = jax.random.randint(key_batch, (config.batch,), 0, count)
        loss, grads = jax.value_and_grad(loss_of)(weights, data[index], key_loss)
        updates, state = optimiser.update(grads, state)
        return (optax.apply_updates(weights, updates), state), loss

    return jax.lax.scan(body, carry, steps)
