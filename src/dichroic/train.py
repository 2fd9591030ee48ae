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

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dichroic import layout
from dichroic.batching import in_batches
from dichroic.config import DiffusionConfig, FitConfig
from dichroic.denoise import Denoiser, Mixture, Preconditioned
from dichroic.drawn import StoredDraws, windows
from dichroic.nn import Mlp, UNet
from dichroic.operators import Shape
from dichroic.posterior import EXACT_LIMIT

_BLOCK = 100  # training steps between reports
_BATCH = 1024
_TOP = 5.0  # above a few standard deviations of the source there is nothing to correct


def score_matching_loss(
    denoiser: Preconditioned,
    x: Float[Array, "batch *shape"],
    key: PRNGKeyArray,
    *,
    sigma_min: float,
) -> Float[Array, ""]:
    """The weighted loss above on a batch, per entry, with fresh noise.

    On average 1 for the exact denoiser of white Gaussian data.
    """
    key_sigma, key_noise = jax.random.split(key)
    s = denoiser.scale
    low, high = np.log(sigma_min), np.log(_TOP)
    sigma = s * jnp.exp(jax.random.uniform(key_sigma, x.shape[:1], minval=low, maxval=high))
    z = jax.random.normal(key_noise, x.shape)
    noised = x + sigma.reshape(-1, *[1] * (x.ndim - 1)) * z
    error = (jax.vmap(denoiser)(noised, sigma) - x).reshape(x.shape[0], -1)
    return jnp.mean(jnp.mean(error**2, axis=1) * (1 / sigma**2 + 1 / s**2))


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
        gains = lambda *rows: _gains(old, new, *rows, sigma_min)
        total += in_batches(gains, _BATCH, x, levels, z)
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


@eqx.filter_jit
def _gains(
    old: Denoiser, new: Denoiser, x: Array, sigma: Array, z: Array, sigma_min: float
) -> Array:
    span = np.log(_TOP) - jnp.log(sigma_min)

    def one(x: Array, sigma: Array, z: Array) -> Array:
        error = lambda d: jnp.sum((d(x + sigma * z, sigma) - x) ** 2)
        return span * (error(old) - error(new)) / sigma**2

    return jax.vmap(one)(x, sigma, z)


def train_denoiser(
    denoiser: Preconditioned,
    samples: np.ndarray | StoredDraws,
    key: PRNGKeyArray,
    *,
    config: DiffusionConfig,
    sigma_min: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Preconditioned, float]:
    """The denoiser with its network trained on `samples` `(n, *shape)`, and the mean loss of the last block."""
    weights, frozen = eqx.partition(denoiser.network, eqx.is_inexact_array)
    carry = (weights, weights, _optimiser(config).init(weights))
    carry, frozen, fixed = layout.replicated((carry, frozen, denoiser))
    loss, data, before = float("nan"), None, None
    block = _train_in_turn if isinstance(denoiser.network, UNet) else _train_block
    starts = range(0, config.steps, _BLOCK)
    for start, window in zip(starts, windows(samples, len(starts)), strict=True):
        if window is not before:
            before, data = window, layout.replicated(jnp.asarray(window))
        steps = np.arange(start, min(start + _BLOCK, config.steps))
        carry, losses = block(carry, frozen, fixed, data, key, steps, config, sigma_min)
        loss = float(np.mean(losses))
        if not math.isfinite(loss):  # nor will it be again
            break
        if progress:
            progress(int(steps[-1]) + 1, config.steps)
    network = eqx.combine(*layout.here((carry[1], frozen)))
    return eqx.tree_at(lambda d: d.network, denoiser, network), loss


def _optimiser(config: DiffusionConfig) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps, alpha=0.05)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@eqx.filter_jit
def _train_block(carry, frozen, denoiser, data, key, steps, config, sigma_min):
    """The gradient steps number `steps`, and their losses."""
    step = lambda c, i: _training_step(c, frozen, denoiser, data, key, i, config, sigma_min)
    return jax.lax.scan(step, carry, steps)


def _train_in_turn(carry, frozen, denoiser, data, key, steps, config, sigma_min):
    """The same without a loop of XLA, where convolutions on a CPU take five times as long."""
    losses = []
    for i in steps:
        carry, loss = _one_step(carry, frozen, denoiser, data, key, i, config, sigma_min)
        losses.append(loss)
    return carry, np.stack(losses)


def _training_step(carry, frozen, denoiser, data, key, step, config, sigma_min):
    weights, average, state = carry

    def loss_of(weights, batch, k):
        d = eqx.tree_at(lambda d: d.network, denoiser, eqx.combine(weights, frozen))
        return score_matching_loss(d, batch, k, sigma_min=sigma_min)

    key_batch, key_loss = jax.random.split(jax.random.fold_in(key, step))
    index = jax.random.randint(key_batch, (config.batch_size,), 0, data.shape[0])
    batch = layout.shared_out(data[index])
    loss, grads = jax.value_and_grad(loss_of)(weights, batch, key_loss)
    # The optimiser is made here: as an argument, its new functions would compile all anew.
    updates, state = _optimiser(config).update(grads, state)
    weights = optax.apply_updates(weights, updates)
    decay = jnp.minimum(config.ema, (1 + step) / (10 + step))
    average = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, average, weights)
    return (weights, average, state), loss


_one_step = eqx.filter_jit(_training_step)


def with_network(denoiser: Denoiser, key: PRNGKeyArray, config: FitConfig) -> Preconditioned:
    """A mixture corrected by a fresh network; a denoiser that has a network already stays as it is."""
    if isinstance(denoiser, Preconditioned):
        return denoiser
    assert isinstance(denoiser, Mixture)
    network = _compiled_network(denoiser.shape, config.diffusion, key)
    return Preconditioned(denoiser, network, covariance=config.diffusion.covariance)


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
