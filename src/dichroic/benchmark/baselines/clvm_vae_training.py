"""The evidence bound of the nonlinear contrastive latent variable model, and its maximisation.

    log p(y) ≥ E_q log N(y; Σ_β A_β g_β(z_β), Σ) − KL(q ‖ N(0, I)),

averaged over all observations of all views. With little noise the likelihood is so sharp that training falls
into the nearest poor answer, so `Σ` starts inflated by `T²`, `T` a third of the signal-to-noise ratio of the
view, and `T` decays geometrically to 1 over the first 60 % of the steps: at first the KL term weighs `T²` times
as much against the misfit, and no other weight on it is needed. The networks kept, averaged over steps, are
those with the best bound on held-out observations at `T = 1`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dichroic.benchmark.baselines.clvm_vae_networks import (
    Datum,
    Gaussian,
    Settings,
    Vae,
    weights_of,
    with_weights,
)
from dichroic.errors import RunError
from dichroic.numerics.batching import split, take
from dichroic.problem.observations import Observations, whitened_chi2

Carry = tuple[Array, Array, optax.OptState]  # weights, their average, the state of the optimiser

BLOCKS = 40  # of steps, with a held-out bound after each
TEMPERED = 0.6

Views = Mapping[str, Observations]


def elbo(
    decode: Callable[[Array], dict[str, Array]],
    q: Gaussian,
    datum: Datum,
    e: Float[Array, " latent"],
    *,
    temperature: Array | float = 1.0,
) -> Float[Array, ""]:
    """One draw of the evidence bound of one observation, with `z = m + F e` for white `e`.

        −½ rᵀ Σ⁻¹ r / T² − ½ log det 2πΣ − KL(N(m, FFᵀ) ‖ N(0, I)),   r = y − Σ_β A_β g_β(z_β),

    with `KL = ½ (‖F‖² + ‖m‖² − d) − Σ log F_ii`.
    """
    mean, factor = q
    x, obs = decode(mean + factor @ e), datum.obs
    chi2 = jnp.sum((obs.y - obs.apply(x)) ** 2) if datum.white else whitened_chi2(obs, x)[0]
    squares = jnp.sum(factor**2) + jnp.sum(mean**2) - mean.size
    kl = 0.5 * squares - jnp.sum(jnp.log(jnp.diagonal(factor)))
    return -0.5 * chi2 / temperature**2 + datum.constant - kl


def mean_elbo(
    vae: Vae,
    name: str,
    datum: Datum,
    e: Float[Array, "n most"],
    temperature: Array | float = 1.0,
) -> Float[Array, ""]:
    """The mean over the observations `datum` of the view `name` of one draw of `elbo` each."""
    encoder = vae.encoders[name]
    rows, shared = split(datum)

    def one(row: Datum, e: Array) -> Array:
        d = eqx.combine(row, shared)
        decode = lambda z: encoder.decode(vae.decoders, z)
        return elbo(decode, encoder(d.inputs), d, e[: encoder.latents], temperature=temperature)

    return jnp.mean(jax.vmap(one)(rows, e))


def most_latents(vae: Vae) -> int:
    """The largest number of latents of a view."""
    return max(encoder.latents for encoder in vae.encoders.values())


def tempering(ratio: Array, step: Array, steps: int) -> Array:
    """`T = T₀^(1 − t)`, `T₀ = max(1, ρ/3)`, `t` from 0 to 1 over the first 60 % of the steps."""
    left = jnp.maximum(0.0, 1 - step / (TEMPERED * steps))
    return jnp.maximum(1.0, ratio / 3) ** left


def total(values: Mapping[str, Array], counts: Mapping[str, int]) -> Array:
    """The mean over all observations of all views, from the means of each view."""
    n = sum(counts.values())
    return sum((counts[k] / n * values[k] for k in sorted(values)), jnp.zeros(()))


@eqx.filter_jit
def evaluate(
    vae: Vae, data: Mapping[str, Datum], counts: tuple[tuple[str, int], ...], key: PRNGKeyArray
) -> Array:
    """The evidence bound at `T = 1`, over all observations of all views."""
    n = max(d.inputs.shape[0] for d in data.values())
    e = jax.random.normal(key, (n, most_latents(vae)))
    each = {k: mean_elbo(vae, k, d, e[: d.inputs.shape[0]]) for k, d in data.items()}
    return total(each, dict(counts))


def optimiser(settings: Settings) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, cosine decay of the rate, and clipped gradients."""
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps, alpha=0.02)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=settings.weight_decay)
    )


@eqx.filter_jit
def train_block(
    carry: Carry,
    vae: Vae,
    data: Mapping[str, Datum],
    counts: tuple[tuple[str, int], ...],
    key: PRNGKeyArray,
    steps: Array,
    settings: Settings,
):
    """Gradient steps number `steps` on fresh batches of every view; the tempered bound of each.

    `carry` is the weights, their average and the state of the optimiser, all weights as one vector.
    """
    opt = optimiser(settings)
    size = sum(d.obs.size for d in data.values()) / len(data)

    def loss_of(weights: Array, key: PRNGKeyArray, step: Array):
        a, b = jax.random.split(key)
        pick = jax.random.uniform(a, (len(data), settings.batch_size))
        e = jax.random.normal(b, (*pick.shape, most_latents(vae)))
        now, values = with_weights(vae, weights), {}
        for i, (name, datum) in enumerate(sorted(data.items())):
            n = datum.inputs.shape[0]
            batch = take(datum, jnp.minimum((n * pick[i]).astype(int), n - 1))
            temperature = tempering(vae.encoders[name].ratio, step, settings.steps)
            values[name] = mean_elbo(now, name, batch, e[i], temperature)
        return -total(values, dict(counts)) / size

    def body(carry: Carry, step: Array):
        weights, average, state = carry
        loss, grads = jax.value_and_grad(loss_of)(weights, jax.random.fold_in(key, step), step)
        updates, state = opt.update(grads, state, weights)
        weights = jnp.asarray(optax.apply_updates(weights, updates))
        decay = jnp.minimum(settings.ema, (1 + step) / (10 + step))
        return (weights, decay * average + (1 - decay) * weights, state), loss

    return jax.lax.scan(body, carry, steps)


def train(
    vae: Vae,
    views: Views,
    held_out: Views,
    settings: Settings,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Vae, float]:
    """The networks (averaged over steps) with the best held-out bound, and that bound."""
    data, test = (
        {k: vae.encoders[k].datum(obs) for k, obs in some.items()} for some in (views, held_out)
    )
    counts = tuple((k, obs.count) for k, obs in views.items())
    weights = weights_of(vae)
    carry = (weights, weights, optimiser(settings).init(weights))
    best, score = vae, -math.inf
    keys = jax.random.split(jax.random.key(settings.seed))  # held-out bounds all use the same
    settings = dataclasses.replace(settings, seed=0)  # another one is no reason to compile anew
    block = -(-settings.steps // BLOCKS)
    for start in range(0, settings.steps, block):
        steps = jnp.arange(start, min(start + block, settings.steps))
        carry, _ = train_block(carry, vae, data, counts, keys[0], steps, settings)
        now = with_weights(vae, carry[1])
        value = float(evaluate(now, test, counts, keys[1]))
        if value > score:
            best, score = now, value
        if progress:
            progress(int(steps[-1]) + 1, settings.steps, value)
    if not math.isfinite(score):
        raise RunError("training diverged: the held-out evidence bound was never finite")
    return best, score
