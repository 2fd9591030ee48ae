"""Samplers of the prior against exact draws, and where the random numbers of a draw come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dichroic.config import SamplerConfig
from dichroic.inference.samplers import (
    DDIM,
    DDPM,
    AncestralSampler,
    Heun,
    PredictorCorrector,
    make_sampler,
    observation_keys,
    sample_posterior,
    sample_prior,
)
from dichroic.numerics.batching import take
from dichroic.numerics.deterministic_map import chunk_size, chunks, own_slots
from dichroic.operators import Dense, Identity
from dichroic.operators.noise import IsotropicNoise
from dichroic.priors import GaussianMixture, gaussian
from dichroic.priors.schedule import Geometric, Karras
from dichroic.problem.observations import Observations

KEY = jax.random.key(11)
N = 4000
PRIOR = GaussianMixture.from_moments(
    [1, 2, 3],
    np.array([[-2.0, 0.5], [1.0, 2.0], [2.0, -1.0]]),
    [np.array([[0.3, 0.2], [0.2, 0.4]]), np.diag([0.05, 0.5]), 0.2 * np.eye(2)],
)
DIRECTIONS = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, -0.6]])


def cdf(direction):
    """The distribution function of `direction · x` for `x` from `PRIOR`."""
    weights, means = np.exp(np.asarray(PRIOR.log_weights)), np.asarray(PRIOR.means) @ direction
    std = np.sqrt(np.asarray(PRIOR.covariances()) @ direction @ direction)
    return lambda v: stats.norm.cdf(np.asarray(v)[:, None], means, std) @ weights


@pytest.mark.parametrize(
    "sampler",
    [
        None,
        AncestralSampler(8),
        Heun(48),
        DDPM(256),
        DDIM(256, Karras()),
        PredictorCorrector(256),
    ],
    ids=["exact", "ancestral", "heun", "ddpm", "ddim", "pc"],
)
def test_prior_draws_follow_the_mixture(sampler):
    x = sample_prior(PRIOR, N, KEY, sampler=sampler)
    assert x.shape == (N, 2)
    for direction in DIRECTIONS:
        assert stats.kstest(x @ direction, cdf(direction)).pvalue > 1e-3


def test_too_few_ddpm_steps_are_noticed():
    """The test above has power: DDPM with few steps loses variance."""
    x = sample_prior(PRIOR, N, KEY, sampler=DDPM(24))
    assert min(stats.kstest(x @ d, cdf(d)).pvalue for d in DIRECTIONS) < 1e-4


def test_a_prior_draw_depends_on_its_number_and_the_key_only():
    few = sample_prior(PRIOR, 100, KEY)
    many = sample_prior(PRIOR, 300, KEY, batch_size=100)
    np.testing.assert_array_equal(few, many[:100])
    assert len(np.unique(many, axis=0)) == 300
    other = sample_prior(PRIOR, 100, jax.random.key(12))
    assert not np.any(other == few)


def test_large_priors_are_drawn_without_a_matrix():
    """Two components of 144 entries: the share of each, and the variance along an axis of one."""
    means = np.zeros((2, 12, 12))
    means[1, 0, 0] = 9.0
    basis, variances = np.eye(144)[None, :, 1:4].repeat(2, axis=0), np.full((2, 3), 3.0)
    prior = GaussianMixture(
        np.log([0.3, 0.7]), means.reshape(2, -1), basis, variances, np.ones(2), (12, 12)
    )
    x = sample_prior(prior, N, KEY, sampler=AncestralSampler(8)).reshape(N, -1)
    share = np.mean(x[:, 0] > 4.5)
    assert abs(share - 0.7) < 4 * np.sqrt(0.21 / N)
    for i, variance in ((1, 4.0), (3, 4.0), (4, 1.0), (143, 1.0)):
        assert stats.kstest(x[:, i] / np.sqrt(variance), "norm").pvalue > 1e-3


def test_prior_draws_have_the_shape_of_the_source():
    prior = gaussian(np.arange(6.0).reshape(2, 3), 1e-4 * np.eye(6))
    x = sample_prior(prior, 3, KEY)
    np.testing.assert_allclose(x, np.tile(np.arange(6.0).reshape(2, 3), (3, 1, 1)), atol=0.05)


@pytest.fixture(scope="module")
def blend():
    """Priors of `a` (2) and `b` (2 × 2), and 300 observations with an operator each."""
    rng = np.random.default_rng(1)
    priors = {"a": PRIOR, "b": gaussian(np.zeros((2, 2)), np.eye(4))}
    ops = {
        "a": Dense(rng.normal(size=(300, 3, 2))),
        "b": Dense(rng.normal(size=(3, 4)), in_shape=(2, 2)),
    }
    return priors, Observations(rng.normal(size=(300, 3)), ops, IsotropicNoise(0.1))


def draw(blend, obs, key=KEY, **options):
    """Draws in chunks of two batches, one program for any number of observations."""
    return sample_posterior(blend[0], obs, key, **{"n_draws": 2, "batch_size": 128, **options})


@pytest.mark.parametrize("sampler", [None, AncestralSampler(4)], ids=["exact", "ancestral"])
def test_observations_drawn_alone_are_rows_of_the_whole(sampler, blend):
    obs = blend[1]
    if sampler:  # one source compiles faster
        obs = Observations(
            obs.y, {"b": obs.operators["b"]}, IsotropicNoise(np.linspace(0.1, 1, 300))
        )
    whole = draw(blend, obs, sampler=sampler)
    alone = draw(blend, take(obs, slice(100, 200)), sampler=sampler, first_index=100)
    for k in whole.x:
        np.testing.assert_array_equal(alone.x[k], whole.x[k][:, 100:200])
    np.testing.assert_array_equal(alone.evidence, whole.evidence[:, 100:200])


def test_seeds_draws_and_numbers_give_different_random_numbers(blend):
    obs = blend[1]
    blind = jax.tree.map(lambda a: 0 * np.asarray(a), obs.operators)
    same = Observations(np.zeros((300, 3)), blind, obs.noise)
    values = [
        draw(blend, same).x["b"],
        draw(blend, same, jax.random.key(12)).x["b"],
        draw(blend, same, first_index=300).x["b"],
    ]
    values = np.concatenate(values).ravel()
    assert len(np.unique(values)) > 0.999 * values.size
    assert stats.kstest(values, "norm").pvalue > 1e-3


def test_keys_are_those_of_the_global_number():
    key = lambda draw, index: jax.random.key_data(
        observation_keys(KEY, jnp.asarray(draw), jnp.asarray(index))
    )
    first, later = key(1, np.arange(64).reshape(2, 32)), key(1, np.arange(32, 96).reshape(2, 32))
    np.testing.assert_array_equal(first[1], later[0])
    every = np.concatenate([key(draw, np.arange(64).reshape(2, 32)) for draw in range(3)])
    assert len(np.unique(every.reshape(192, -1), axis=0)) == 192


def test_draws_have_one_row_per_draw_and_observation(blend):
    priors, obs = blend
    found = draw(({**priors, "unseen": PRIOR}, obs), take(obs, slice(0, 70)), n_draws=3)
    assert {k: x.shape for k, x in found.x.items()} == {"a": (3, 70, 2), "b": (3, 70, 2, 2)}
    for per_draw in (found.evidence, found.residual, found.converged, found.steps):
        assert per_draw.shape == (3, 70)


@pytest.mark.parametrize("batch_size", [1, 100, 128])
def test_progress_counts_the_lanes_that_a_batch_is_rounded_up_to(batch_size, blend):
    seen = []
    draw(blend, blend[1], batch_size=batch_size, progress=lambda *at: seen.append(at))
    assert seen == [(n, 600) for n in (128, 256, 300, 428, 556, 600)]


@pytest.mark.parametrize(
    ("n", "batch_size", "width"),
    [(1, 1, 128), (1000, 100, 128), (1000, 129, 192), (150, 1024, 192), (5000, 1024, 1024)],
)
def test_lanes_are_whole_and_at_least_two(n, batch_size, width):
    assert chunk_size(n, batch_size) == width


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (300, 100), (256, 128), (400, 1000)])
def test_chunks_cover_every_observation_once_in_its_lane_and_pad_with_the_first_and_last(
    n, batch_size
):
    obs = Observations(
        np.arange(n, dtype=float)[:, None], {"a": Identity(1)}, IsotropicNoise(np.arange(1, n + 1))
    )
    ys, numbers, starts = [], [], []
    for start, (rows, _), index in chunks(obs, batch_size, 7):
        assert rows.y.shape == (*index.shape, 1)
        assert index.shape == (chunk_size(7 + n, batch_size) // 64, 64)
        np.testing.assert_array_equal(rows.noise.std, rows.y[..., 0] + 1)
        starts.append(start)
        ys.append(np.asarray(rows.y).ravel())
        numbers.append(np.asarray(index).ravel())
    ys, numbers = np.concatenate(ys), np.concatenate(numbers)
    np.testing.assert_array_equal(ys, np.clip(np.arange(-7, ys.size - 7), 0, n - 1))
    np.testing.assert_array_equal(numbers, np.arange(ys.size))
    np.testing.assert_array_equal(ys[own_slots(n, 7)], np.arange(n))
    assert starts == list(range(-7, n, chunk_size(7 + n, batch_size)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", AncestralSampler),
        ("ancestral", AncestralSampler),
        ("ddpm", DDPM),
        ("ddim", DDIM),
        ("heun", Heun),
        ("predictor-corrector", PredictorCorrector),
    ],
)
def test_the_configuration_names_the_sampler(name, kind):
    config = SamplerConfig(name=name, steps=5, schedule="karras", sigma_min=0.01, sigma_max=9.0)
    sampler = make_sampler(config)
    assert type(sampler) is kind
    assert sampler.steps == 5
    assert sampler.schedule == Karras(0.01, 9.0)
    assert type(make_sampler(config, auto="heun")) is (Heun if name == "auto" else kind)
    assert isinstance(make_sampler(SamplerConfig()).schedule, Geometric)
