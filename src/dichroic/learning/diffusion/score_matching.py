"""The M-step of a learned prior: denoising score matching on posterior draws of its source.

    min_F  E_{x, σ, z} ‖D(x + σ z, σ) − x‖² / c_out(σ)²,   c_out² = σ² s² / (σ² + s²),

the weight `1/σ² + 1` of the paper for a source of scale `s = 1`, with `log σ` uniform. An exponential
moving average of the weights is what is returned.

Whether the new denoiser is better is judged by the same integral with the weight that makes it a log
density (Song et al., arXiv 2101.09258): with fresh noise on posterior draws of held-out observations,

    Q(new) − Q(old) = ∫ E (‖x − D_old(x_σ, σ)‖² − ‖x − D_new(x_σ, σ)‖²) dσ / σ³,

in nats. As in any EM, the held-out evidence of the new prior exceeds that of the old by at least this.
Both denoisers get the same noise, so the difference is known far better than either term.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dichroic.config import DiffusionConfig, FitConfig
from dichroic.inference.posterior import EXACT_LIMIT
from dichroic.learning.diffusion.draw_cache import StoredDraws, windows
from dichroic.numerics.batching import in_batches
from dichroic.operators import Shape
from dichroic.priors import Denoiser, DiffusionPrior, GaussianMixture
from dichroic.priors.diffusion import NETWORK_BATCH, denoised
from dichroic.priors.networks import Mlp, UNet
from dichroic.runtime import distributed

Weights = Any  # a network, or None where it has no such arrays
Carry = tuple[
    Weights, Weights, optax.OptState
]  # weights, their average, the state of the optimiser

_BLOCK = 100  # training steps between reports
_TOP = 5.0  # above a few standard deviations of the source there is nothing to correct


def score_matching_loss(
    denoiser: DiffusionPrior,
    x: Float[Array, "batch *shape"],
    key: PRNGKeyArray,
    *,
    sigma_min: float,
) -> Float[Array, ""]:
    """The weighted loss above on a batch, per entry, with fresh noise.

    On average 1 for the exact denoiser of white Gaussian data.
    """
    return _loss(denoiser.network, *_examples(denoiser, x, key, sigma_min))


def _loss(
    network: Callable[[Array, Array], Array], x: Array, c_noise: Array, wanted: Array
) -> Array:
    """`‖D − x‖² / c_out²` is the error of the network alone."""
    return jnp.mean((jax.vmap(network)(x, c_noise) - wanted) ** 2)  # type: ignore[arg-type]


def _examples(
    denoiser: DiffusionPrior, x: Array, key: PRNGKeyArray, sigma_min: float
) -> tuple[Array, Array, Array]:
    """What the network is asked, and should answer, for a batch `x` with fresh noise."""
    key_sigma, key_noise = jax.random.split(key)
    low, high = np.log(sigma_min), np.log(_TOP)
    spread = jax.random.uniform(key_sigma, x.shape[:1], minval=low, maxval=high)
    sigma = denoiser.scale * jnp.exp(spread)
    z = jax.random.normal(key_noise, x.shape)
    noised = _noised(x, sigma, z)
    wanted = jax.vmap(denoiser.answer)(x, noised, sigma)
    return *jax.vmap(denoiser.question)(noised, sigma), wanted


def evidence_gain(
    old: Denoiser,
    new: Denoiser,
    samples: Float[np.ndarray, "draws n *shape"],
    key: PRNGKeyArray,
    *,
    sigma_min: float,
    repeats: int = 8,
) -> tuple[float, float]:
    """`Q(new) − Q(old)` in nats per observation, and its standard error over observations.

    `samples` are posterior draws of `n` held-out observations; every draw gets `repeats` noise levels,
    evenly spread in `log σ` over all of them, up to a few standard deviations of the source.
    """
    draws, n = samples.shape[:2]
    x = jnp.asarray(samples).reshape(-1, *samples.shape[2:])
    total = np.zeros(draws * n)
    for i in range(repeats):
        levels, z = _noise(old.scale, x, jax.random.fold_in(key, i), sigma_min)
        gains = lambda x, sigma, z: _gains(old, new, x, sigma, z, sigma_min)
        total += in_batches(gains, NETWORK_BATCH, x, levels, z)
    gains = total.reshape(draws, n).mean(axis=0) / repeats
    return float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")


def is_gain(gain: float, error: float) -> bool:
    """Whether a gain of this standard error is believed: more than two of them above zero."""
    return gain > 2 * error


@eqx.filter_jit
def _noise(scale: Array, x: Array, key: PRNGKeyArray, sigma_min: float) -> tuple[Array, Array]:
    """A noise level for each row of `x`, evenly spread, and white noise."""
    key_level, key_order, key_noise = jax.random.split(key, 3)
    size, span = x.shape[0], np.log(_TOP) - jnp.log(sigma_min)
    even = (jnp.arange(size) + jax.random.uniform(key_level, (size,))) / size
    sigma = scale * sigma_min * jnp.exp(span * jax.random.permutation(key_order, even))
    return sigma, jax.random.normal(key_noise, x.shape)


def _gains(
    old: Denoiser, new: Denoiser, x: Array, sigma: Array, z: Array, sigma_min: float
) -> Array:
    x_t = _noised(x, sigma, z)
    square = lambda d: jnp.sum((denoised(d, x_t, sigma) - x) ** 2, axis=tuple(range(1, x.ndim)))
    span = math.log(_TOP) - math.log(sigma_min)
    return span * (square(old) - square(new)) / sigma**2


def _noised(x: Array, sigma: Array, z: Array) -> Array:
    return x + sigma.reshape(-1, *[1] * (x.ndim - 1)) * z


def train_denoiser(
    denoiser: DiffusionPrior,
    samples: np.ndarray | StoredDraws,
    key: PRNGKeyArray,
    *,
    config: DiffusionConfig,
    sigma_min: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[DiffusionPrior, float]:
    """The denoiser with its network trained on `samples` `(n, *shape)`, and the mean loss of the last block."""
    weights, frozen = eqx.partition(denoiser.network, eqx.is_inexact_array)
    carry = (weights, weights, _optimiser(config).init(weights))
    carry, frozen, fixed = distributed.replicated((carry, frozen, denoiser))
    loss, data, before = float("nan"), jnp.zeros(0), None
    block = _train_in_turn if isinstance(denoiser.network, UNet) else _train_block
    starts = range(0, config.steps, _BLOCK)
    for start, window in zip(starts, windows(samples, len(starts)), strict=True):
        if window is not before:
            before, data = window, distributed.replicated(jnp.asarray(window))
        steps = np.arange(start, min(start + _BLOCK, config.steps))
        carry, losses = block(carry, frozen, fixed, data, key, steps, config, sigma_min)
        loss = float(np.mean(losses))
        if not math.isfinite(loss):  # nor will it be again
            break
        if progress:
            progress(int(steps[-1]) + 1, config.steps)
    network = eqx.combine(*distributed.local_copy((carry[1], frozen)))
    return eqx.tree_at(lambda d: d.network, denoiser, network), loss


def _optimiser(config: DiffusionConfig) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps, alpha=0.05)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@eqx.filter_jit
def _train_block(
    carry: Carry,
    frozen: Weights,
    denoiser: DiffusionPrior,
    data: Array,
    key: PRNGKeyArray,
    steps: Array | np.ndarray,
    config: DiffusionConfig,
    sigma_min: float,
) -> tuple[Carry, Float[Array, " steps"]]:
    """The gradient steps number `steps`, and their losses."""

    def step(carry: Carry, i: Array) -> tuple[Carry, Array]:
        return _update(carry, frozen, *_batch(denoiser, data, key, i, config, sigma_min), i, config)

    return jax.lax.scan(step, carry, jnp.asarray(steps))


def _train_in_turn(
    carry: Carry,
    frozen: Weights,
    denoiser: DiffusionPrior,
    data: Array,
    key: PRNGKeyArray,
    steps: Array | np.ndarray,
    config: DiffusionConfig,
    sigma_min: float,
) -> tuple[Carry, Float[np.ndarray, " steps"]]:
    """`_train_block` with the network's part compiled once for all sources that have one of its kind.

    And without a loop of XLA, where convolutions on a CPU take five times as long.
    """
    losses = []
    for i in steps:
        examples = _compiled_batch(denoiser, data, key, i, config, sigma_min)
        carry, loss = _compiled_update(carry, frozen, *examples, i, config)
        losses.append(loss)
    return carry, np.stack(losses)


def _batch(
    denoiser: DiffusionPrior,
    data: Array,
    key: PRNGKeyArray,
    step: Array | np.integer,
    config: DiffusionConfig,
    sigma_min: float,
) -> tuple[Array, Array, Array]:
    """The examples of a step."""
    key_batch, key_noise = jax.random.split(jax.random.fold_in(key, step))
    index = jax.random.randint(key_batch, (config.batch_size,), 0, data.shape[0])
    return _examples(denoiser, distributed.shard_rows(data[index]), key_noise, sigma_min)


def _update(
    carry: Carry,
    frozen: Weights,
    x: Array,
    c_noise: Array,
    wanted: Array,
    step: Array | np.integer,
    config: DiffusionConfig,
) -> tuple[Carry, Float[Array, ""]]:
    """A step of gradient descent on examples."""
    weights, average, state = carry
    loss_of = lambda w: _loss(eqx.combine(w, frozen), x, c_noise, wanted)
    loss, grads = jax.value_and_grad(loss_of)(weights)
    # The optimiser is made here: as an argument, its new functions would compile all anew.
    updates, state = _optimiser(config).update(grads, state)
    weights = optax.apply_updates(weights, updates)
    decay = jnp.minimum(config.ema, (1 + step) / (10 + step))
    average = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, average, weights)
    return (weights, average, state), loss


_compiled_batch, _compiled_update = eqx.filter_jit(_batch), eqx.filter_jit(_update)


def with_network(denoiser: Denoiser, key: PRNGKeyArray, config: FitConfig) -> DiffusionPrior:
    """A mixture corrected by a fresh network; a denoiser that has a network already stays as it is."""
    if isinstance(denoiser, DiffusionPrior):
        return denoiser
    assert isinstance(denoiser, GaussianMixture)
    network = _compiled_network(denoiser.shape, config.diffusion, key)
    return DiffusionPrior(denoiser, network, covariance=config.diffusion.covariance)


def fresh_network(shape: Shape, c: DiffusionConfig, key: PRNGKeyArray) -> Mlp | UNet:
    """The network that `c` asks for; raises `ConfigError` where that is not for arrays of `shape`."""
    if c.network == "mlp" or (c.network == "auto" and math.prod(shape) <= EXACT_LIMIT):
        return Mlp(shape, c.width, c.depth, key=key)
    return UNet(
        shape,
        c.channels,
        c.levels,
        c.level_depth,
        c.attention == "lowest",
        c.precision,
        c.spatial_axes or None,
        key=key,
    )


_compiled_network = eqx.filter_jit(fresh_network)
