"""Score matching: what the loss is for exact denoisers, and that training finds them."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.config import DiffusionConfig
from dichroic.learning.diffusion.score_matching import (
    evidence_gain,
    score_matching_loss,
    train_denoiser,
)
from dichroic.priors import DiffusionPrior, GaussianMixture, gaussian
from dichroic.priors.networks import Mlp

DIM, SIGMA_MIN = 2, 1e-2
CONFIG = DiffusionConfig(steps=800, batch_size=256, learning_rate=3e-3, ema=0.99)

build = eqx.filter_jit(lambda key: Mlp((DIM,), width=32, depth=1, key=key))


def untrained(base, seed=0):
    return DiffusionPrior(base, build(jax.random.key(seed)))


@eqx.filter_jit
def loss(denoiser, x, key):
    return score_matching_loss(denoiser, x, key, sigma_min=SIGMA_MIN)


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_the_loss_of_the_exact_denoiser_of_white_data_is_one(scale):
    """The error has variance `σ² s² / (σ² + s²)` per entry, the inverse of the weight: each term of the
    mean is a χ² of one degree of freedom, with variance 2."""
    rng, n = np.random.default_rng(0), 50_000
    denoiser = untrained(gaussian(np.full(DIM, 3 * scale), scale**2 * np.eye(DIM)))
    x = jnp.asarray(scale * (3 + rng.normal(size=(n, DIM))))
    value = float(loss(denoiser, x, jax.random.key(1)))
    assert abs(value - 1) < 4 * np.sqrt(2 / (n * DIM))


BIMODAL = GaussianMixture.from_moments(
    [1, 2], np.array([[-1.0, 0.5], [1.0, -0.3]]), [0.02 * np.eye(2), 0.05 * np.eye(2)]
)


@eqx.filter_jit
def _error(denoiser, exact, x, key):
    """Mean square distance to the exact denoiser, relative to its own mean square error."""
    sigma = exact.scale * jnp.geomspace(0.05, 2.0, x.shape[0])
    noised = x + sigma[:, None] * jax.random.normal(key, x.shape)
    best = jax.vmap(exact)(noised, sigma)
    return jnp.sum((jax.vmap(denoiser)(noised, sigma) - best) ** 2) / jnp.sum((best - x) ** 2)


def error(denoiser, exact, x):
    return float(_error(denoiser, exact, jnp.asarray(x), jax.random.key(3)))


def test_training_finds_the_exact_denoiser_from_a_gaussian_twice_too_wide():
    exact, seen = BIMODAL, []
    start = untrained(gaussian(np.zeros(2), 4 * float(exact.scale) ** 2 * np.eye(2)))
    x = np.asarray(jax.jit(jax.vmap(exact.sample))(jax.random.split(jax.random.key(2), 8192)))
    trained, last = train_denoiser(
        start,
        x,
        jax.random.key(4),
        config=CONFIG,
        sigma_min=SIGMA_MIN,
        progress=lambda *at: seen.append(at),
    )
    before, after = error(start, exact, x), error(trained, exact, x)
    assert before > 0.2
    assert after < before / 10
    # A lower error is a lower loss, and the loss reported is that of the last block: χ² again, so that
    # means over 8192 and 25600 points differ by a few √(1 / 8192).
    losses = [float(loss(d, jnp.asarray(x), jax.random.key(5))) for d in (start, trained)]
    assert losses[1] < losses[0]
    assert abs(last / losses[1] - 1) < 5 / np.sqrt(len(x))
    assert seen == [(i, 800) for i in range(100, 801, 100)]
    assert jax.tree.all(jax.tree.map(np.array_equal, trained.base, start.base))


SHORT = dataclasses.replace(CONFIG, steps=40)


def train(start, x, seed=0, **options):
    key, config = jax.random.key(seed), dataclasses.replace(SHORT)
    return train_denoiser(start, x, key, config=config, sigma_min=SIGMA_MIN, **options)


def test_the_same_key_trains_the_same_network_bit_for_bit(rng):
    start = untrained(gaussian(np.zeros(DIM), np.eye(DIM)))
    x, seen = rng.normal(size=(100, DIM)).astype(np.float32), []
    (first, loss), (again, loss_again) = (
        train(start, x, progress=lambda *at: seen.append(at)) for _ in range(2)
    )
    assert loss == loss_again
    leaves = lambda d: jax.tree.leaves(d.network)
    assert all(map(np.array_equal, leaves(first), leaves(again)))
    assert not any(map(np.array_equal, leaves(first), leaves(start)))
    assert seen == [(40, 40)] * 2, "also a block shorter than the others is counted"


def test_a_training_like_one_before_compiles_nothing(rng):
    """Neither the values of the data nor those of the denoiser or the key are part of the program."""
    starts = [untrained(gaussian(np.full(DIM, i), (1 + i) * np.eye(DIM)), seed=i) for i in range(2)]
    data, compiled = rng.normal(size=(2, 100, DIM)).astype(np.float32), []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + len(starts))(1.0)
        assert compiled, "compilations are heard of"
        train(starts[0], data[0])
        compiled.clear()
        train(starts[1], data[1], seed=1)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_gain_is_the_difference_of_log_densities(factor):
    """For exact denoisers of two Gaussians and draws of a third, in nats: within its standard error,
    and the small share of the integral above the largest noise level."""
    rng, n = np.random.default_rng(5), 4000
    x = rng.normal(size=(2, n, DIM)) * [1.0, 0.3]
    old, new = np.diag([1.0, 0.5]), np.diag([1.0, 0.5 * factor])
    log_p = lambda c: -0.5 * (x**2 / np.diag(c) + np.log(np.diag(c))).sum(axis=-1)
    expect = (log_p(new) - log_p(old)).mean()
    pair = [gaussian(np.zeros(DIM), c) for c in (old, new)]
    gain, error = evidence_gain(*pair, x.astype(np.float32), jax.random.key(0), sigma_min=1e-3)
    assert abs(gain - expect) <= 4 * error + 0.01 * abs(expect)
    assert error < 0.01


def test_the_gain_is_nothing_for_the_same_denoiser_and_negative_for_a_worse_one():
    x = np.asarray(jax.vmap(BIMODAL.sample)(jax.random.split(jax.random.key(2), 500)))[None]
    same, _ = evidence_gain(BIMODAL, BIMODAL, x, jax.random.key(0), sigma_min=1e-2)
    worse, error = evidence_gain(
        BIMODAL, gaussian(np.zeros(DIM), np.eye(DIM)), x, jax.random.key(0), sigma_min=1e-2
    )
    assert same == 0
    assert worse < -4 * error
