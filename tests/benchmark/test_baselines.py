"""Linear estimates against NumPy, observation by observation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.benchmark.baselines import back_projection, least_squares, second_moments, wiener
from dichroic.inference.posterior import Posterior
from dichroic.numerics.batching import take
from dichroic.operators import Dense, Identity
from dichroic.operators.noise import DenseNoise, IsotropicNoise, Masked
from dichroic.priors import gaussian
from dichroic.problem.observations import Observations

N, SIZE = 24, 6
SHAPES = {"a": (4,), "b": (2, 2)}


def spd(rng, dim):
    root = rng.normal(size=(dim, dim))
    return root @ root.T / dim + 0.1 * np.eye(dim)


def case(kind, rng):
    """Observations, and for each of them `(observed rows, y, A = (A_a A_b), Σ)` in float64."""
    rows = () if kind == "shared" else (N,)
    size = 10 if kind == "overdetermined" else SIZE
    a = {k: rng.normal(size=(*rows, size, 4)) for k in SHAPES}
    y, cov = rng.normal(size=(N, size)), 0.1 * spd(rng, size)
    seen = np.ones((N, size), bool)
    noise = DenseNoise(cov)
    if kind == "masked":
        seen = rng.uniform(size=(N, size)) < 0.7
        noise = Masked(noise, seen)
    ops = {k: Dense(a[k], in_shape=shape) for k, shape in SHAPES.items()}
    whole = np.broadcast_to(np.concatenate(list(a.values()), axis=-1), (N, size, 8))
    each = [(y[i, s], whole[i][s], cov[np.ix_(s, s)]) for i, s in enumerate(seen)]
    return Observations(y, ops, noise), each


def stacked(estimates):
    """`(n, 8)`, both sources flattened; their shapes are checked."""
    assert {k: x.shape[1:] for k, x in estimates.items()} == SHAPES
    return np.concatenate([x.reshape(N, 4) for x in estimates.values()], axis=1)


every = pytest.mark.parametrize("kind", ["shared", "per observation", "overdetermined", "masked"])


@every
def test_back_projection_is_the_transpose(kind, rng):
    obs, each = case(kind, rng)
    expect = [a.T @ y for y, a, _ in each]
    np.testing.assert_allclose(stacked(back_projection(obs)), expect, atol=1e-5)


@every
def test_least_squares_is_that_of_numpy(kind, rng):
    obs, each = case(kind, rng)
    expect = [np.linalg.lstsq(a, y)[0] for y, a, _ in each]
    np.testing.assert_allclose(stacked(least_squares(obs)), expect, atol=2e-3)


@every
def test_wiener_is_gaussian_conditioning(kind, rng):
    obs, each = case(kind, rng)
    mean, cov = rng.normal(size=8), np.zeros((8, 8))
    cov[:4, :4], cov[4:, 4:] = spd(rng, 4), spd(rng, 4)
    moments = {"a": (mean[:4], cov[:4, :4]), "b": (mean[4:], cov[4:, 4:])}
    gain = lambda a, noise: cov @ a.T @ np.linalg.inv(noise + a @ cov @ a.T)
    expect = [mean + gain(a, noise) @ (y - a @ mean) for y, a, noise in each]
    np.testing.assert_allclose(stacked(wiener(obs, moments)), expect, atol=1e-3)


@pytest.mark.parametrize("kind", ["per observation", "masked"])
def test_wiener_is_the_posterior_mean_of_gaussian_sources(kind, rng, x64):
    """At a noise level far above the prior, x_t says nothing and only y is left."""
    obs, _ = case(kind, rng)
    priors = {k: gaussian(rng.normal(size=s), spd(rng, 4)) for k, s in SHAPES.items()}
    moments = {k: (d.means[0], d.covariances()[0]) for k, d in priors.items()}

    @jax.jit
    def posterior_mean(obs):
        x_t = {k: d.location for k, d in priors.items()}
        return Posterior(priors, obs)(x_t, {k: jnp.asarray(1e5) for k in priors}).mean

    estimate = wiener(obs, moments)
    for i in range(3):
        mean = posterior_mean(take(jax.tree.map(np.asarray, obs), i))
        for k in SHAPES:
            np.testing.assert_allclose(estimate[k][i], mean[k], atol=1e-5)


def test_sources_seen_as_they_are_come_back_where_the_noise_is_small(rng):
    x = rng.normal(size=(N, 2, 2))
    obs = Observations(x.reshape(N, 4), {"b": Identity((2, 2))}, IsotropicNoise(1e-3))
    moments = {"b": (np.zeros(4), np.eye(4))}
    for estimate in (back_projection(obs), least_squares(obs), wiener(obs, moments)):
        np.testing.assert_allclose(estimate["b"], x, atol=1e-4)


def test_second_moments_are_those_of_the_samples(rng):
    x = rng.normal(size=(50, 2, 2))
    mean, cov = second_moments({"b": x})["b"]
    flat = x.reshape(50, 4) - x.reshape(50, 4).mean(axis=0)
    np.testing.assert_allclose(mean, x.mean(axis=0).ravel())
    np.testing.assert_allclose(cov, flat.T @ flat / 49)
