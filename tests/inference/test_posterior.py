"""Draws of the joint posterior against the analytic answer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.inference.posterior import MatrixFreePosterior, Posterior
from dichroic.inference.samplers import (
    DDIM,
    DDPM,
    AncestralSampler,
    ExactSampler,
    GibbsSampler,
    Heun,
    PredictorCorrector,
    sample_posterior,
)
from dichroic.numerics.batching import take
from dichroic.operators import Dense, Diagonal, Identity, Scale
from dichroic.operators.noise import DenseNoise, DiagonalNoise, IsotropicNoise, LowRankNoise, Masked
from dichroic.priors import CustomDenoiser, GaussianMixture, gaussian
from dichroic.priors.schedule import Geometric
from dichroic.problem.observations import Observations

N = 1024
KEY = jax.random.key(3)


def random_covariance(rng, dim, *, low=1e-2):
    q, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    return (q * np.geomspace(low, 1.5, dim)) @ q.T


def operators(kind, rng):
    """Operators of sources `a` (5) and `b` (5, or 3), and the noise."""
    if kind == "shared":
        return {
            "a": Dense(rng.normal(size=(3, 5))),
            "b": Dense(rng.normal(size=(3, 5))),
        }, IsotropicNoise(0.05)
    if kind == "per observation":
        a = rng.normal(size=(N, 3, 5))
        return {"a": Dense(a), "b": Dense(0.5 * a)}, IsotropicNoise(rng.uniform(0.02, 0.1, size=N))
    if kind == "rank-deficient":
        a = rng.normal(size=(4, 2)) @ rng.normal(size=(2, 5))
        return {"a": Dense(a), "b": Dense(a)}, DiagonalNoise(rng.uniform(0.01, 0.1, size=4))
    if kind == "masked":
        mask = rng.uniform(size=(N, 5)) < 0.7
        noise = Masked(DenseNoise(0.05 * np.eye(5) + 0.02), mask)
        return {"a": Identity(5), "b": Diagonal(rng.normal(size=(N, 5)), shape=5)}, noise
    if kind == "unequal shapes":
        noise = LowRankNoise(0.1 * rng.normal(size=(4, 1)), np.full(4, 0.01))
        return {"a": Dense(rng.normal(size=(4, 5))), "b": Dense(rng.normal(size=(4, 3)))}, noise
    raise ValueError(kind)


def simulate(denoisers, ops, noise, seed=0):
    """Observations of draws from the priors, and the draws."""
    keys = jax.random.split(jax.random.key(seed), len(denoisers) + 1)
    x = {
        k: jax.vmap(d.sample)(jax.random.split(key, N))
        for (k, d), key in zip(denoisers.items(), keys[1:], strict=True)
    }
    size = next(iter(ops.values())).out_shape[0]
    from dichroic.numerics.batching import split

    blank = Observations(jnp.zeros((N, size)), ops, noise)
    rows, shared = split(blank)
    one = lambda row, x, key: eqx.combine(row, shared).simulate(x, key).y
    y = jax.vmap(one)(rows, x, jax.random.split(keys[0], N))
    return Observations(y, ops, noise), x


def analytic(denoisers, obs):
    """Mean and covariance of the joint posterior of Gaussian sources, per observation, in float64."""
    prior_cov = np.asarray(
        jax.scipy.linalg.block_diag(*[d.covariances()[0] for d in denoisers.values()]), np.float64
    )
    prior_mean = np.concatenate([np.asarray(d.means[0], np.float64) for d in denoisers.values()])
    means, covs = [], []
    for i in range(N):
        y, a, s = jax.tree.map(lambda v: np.asarray(v, np.float64), obs.one(i).system())
        a = np.concatenate([a[k] for k in denoisers], axis=1)
        gain = prior_cov @ a.T @ np.linalg.inv(s + a @ prior_cov @ a.T)
        means.append(prior_mean + gain @ (y - a @ prior_mean))
        covs.append(prior_cov - gain @ a @ prior_cov)
    return np.array(means), np.array(covs)


def chi2_per_dim(x, mean, cov):
    r = np.asarray(x, np.float64) - mean
    return np.mean(np.einsum("ni,nij,nj->n", r, np.linalg.inv(cov), r)) / r.shape[1]


def gaussians(rng, kind):
    dim_b = 3 if kind == "unequal shapes" else 5
    return {
        "a": gaussian(rng.normal(size=5), random_covariance(rng, 5)),
        "b": gaussian(rng.normal(size=dim_b), random_covariance(rng, dim_b)),
    }


KINDS = ["shared", "per observation", "rank-deficient", "masked", "unequal shapes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sampler", [ExactSampler(), AncestralSampler(16)], ids=["exact", "ancestral"]
)
def test_draws_are_calibrated_for_gaussian_sources(kind, sampler, rng):
    denoisers = gaussians(rng, kind)
    ops, noise = operators(kind, rng)
    obs, _ = simulate(denoisers, ops, noise)
    draws = sample_posterior(denoisers, obs, KEY, sampler=sampler)
    x = np.concatenate([draws.x["a"][0], draws.x["b"][0]], axis=1)
    chi2 = chi2_per_dim(x, *analytic(denoisers, obs))
    assert abs(chi2 - 1) < 4 * np.sqrt(2 / (N * x.shape[1]))


@pytest.mark.parametrize(
    ("sampler", "low", "high"),
    [
        (Heun(64), 0.97, 1.03),
        (DDIM(64), 0.85, 1.02),
        (DDPM(64), 0.75, 1.02),
        (PredictorCorrector(64), 0.75, 1.05),
    ],
    ids=["heun", "ddim", "ddpm", "pc"],
)
def test_samplers_that_use_the_mean_only_approach_calibration(sampler, low, high, rng):
    denoisers = gaussians(rng, "per observation")
    obs, _ = simulate(denoisers, *operators("per observation", rng))
    draws = sample_posterior(denoisers, obs, KEY, sampler=sampler)
    x = np.concatenate([draws.x["a"][0], draws.x["b"][0]], axis=1)
    assert low < chi2_per_dim(x, *analytic(denoisers, obs)) < high


def two_mixtures(rng):
    make = lambda k: GaussianMixture.from_moments(
        np.ones(k),
        rng.normal(size=(k, 2)),
        np.stack([random_covariance(rng, 2) * 0.2 for _ in range(k)]),
    )
    return {"a": make(3), "b": make(2)}


@pytest.mark.parametrize(
    "sampler", [ExactSampler(), AncestralSampler(16)], ids=["exact", "ancestral"]
)
def test_draws_are_calibrated_for_mixture_sources(sampler, rng):
    """The truth and a draw, given `y`, have the same law: compare their joint moments with y."""
    denoisers = two_mixtures(rng)
    ops = {"a": Dense(rng.normal(size=(2, 2))), "b": Dense(rng.normal(size=(2, 2)))}
    obs, truth = simulate(denoisers, ops, IsotropicNoise(0.1))
    draws = sample_posterior(denoisers, obs, KEY, sampler=sampler)
    features = lambda x: np.concatenate(
        [x["a"], x["b"], x["a"] ** 2, x["b"] ** 2, x["a"] * np.asarray(obs.y), x["a"] * x["b"]],
        axis=1,
    )
    ours = features({k: np.asarray(v[0]) for k, v in draws.x.items()})
    theirs = features({k: np.asarray(v) for k, v in truth.items()})
    difference = ours - theirs
    z = difference.mean(axis=0) / (difference.std(axis=0) / np.sqrt(N))
    assert np.max(np.abs(z)) < 4


def test_moment_matching_alone_is_exact_for_gaussians_only(rng):
    """`beam_width=1` collapses a mixture to one Gaussian; for a Gaussian that changes nothing."""
    ops, noise = operators("shared", rng)
    denoisers = gaussians(rng, "shared")
    obs, _ = simulate(denoisers, ops, noise)
    x_t = {"a": jnp.ones(5), "b": jnp.ones(5)}
    sigma = {"a": jnp.array(0.5), "b": jnp.array(0.3)}
    full = Posterior(denoisers, obs.one(0))(x_t, sigma).mean
    collapsed = Posterior(denoisers, obs.one(0), beam_width=1)(x_t, sigma).mean
    for k in full:
        np.testing.assert_allclose(full[k], collapsed[k], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_free_posterior_agrees_with_the_exact_solve(kind, rng):
    denoisers = gaussians(rng, kind)
    obs, _ = simulate(denoisers, *operators(kind, rng))
    x_t = {k: jnp.ones(d.shape) for k, d in denoisers.items()}
    sigma = {k: jnp.array(0.5) for k in denoisers}
    exact = Posterior(denoisers, obs.one(1))(x_t, sigma)
    free = MatrixFreePosterior(denoisers, obs.one(1), tolerance=1e-6)(x_t, sigma)
    for k in denoisers:
        np.testing.assert_allclose(free.mean[k], exact.mean[k], atol=2e-3)
    assert free.effort.converged == free.effort.solves == 1


def test_draws_by_conjugate_gradients_are_calibrated_for_gaussian_sources(rng):
    """Of two sources, with missing entries and an operator of every observation's own."""
    denoisers = gaussians(rng, "masked")
    obs, _ = simulate(denoisers, *operators("masked", rng))
    options = {"solver": "cg", "tolerance": 1e-3}
    draws = sample_posterior(denoisers, obs, KEY, sampler=AncestralSampler(8), **options)
    x = np.concatenate([draws.x["a"][0], draws.x["b"][0]], axis=1)
    chi2 = chi2_per_dim(x, *analytic(denoisers, obs))
    assert abs(chi2 - 1) < 4 * np.sqrt(2 / (N * x.shape[1]))
    assert np.all(draws.converged == 1)
    assert draws.residual.max() <= 1e-3
    assert draws.steps.shape == (1, N) and len(np.unique(draws.steps)) > 1


def test_draws_by_jacobians_alone_are_nearly_calibrated(rng):
    """The root of the Jacobian is a polynomial: a few per cent at eight steps."""
    exact = {"a": gaussian(np.zeros(5), random_covariance(rng, 5))}
    obs, _ = simulate(exact, {"a": Dense(rng.normal(size=(3, 5)))}, IsotropicNoise(0.05))
    users = {
        "a": CustomDenoiser(lambda d, x, sigma: d(x, sigma), 5, exact["a"], std=exact["a"].scale)
    }
    draws = sample_posterior(
        users, obs, KEY, sampler=AncestralSampler(8), solver="cg", tolerance=1e-3
    )
    chi2 = chi2_per_dim(draws.x["a"][0], *analytic(exact, obs))
    assert abs(chi2 - 1) < 0.06 + 4 * np.sqrt(2 / (N * 5))


def test_a_warm_start_saves_steps_and_changes_no_draw(rng):
    denoisers = {"a": gaussian(np.zeros(5), random_covariance(rng, 5))}
    obs, _ = simulate(denoisers, {"a": Dense(rng.normal(size=(4, 5)))}, IsotropicNoise(0.05))
    obs = take(obs, slice(0, 128))
    options = {"sampler": Heun(12), "solver": "cg", "precondition": False, "tolerance": 1e-3}
    warm, cold = (
        sample_posterior(denoisers, obs, KEY, warm_start=w, **options) for w in (True, False)
    )
    assert warm.steps.mean() < 0.8 * cold.steps.mean()
    np.testing.assert_allclose(warm.x["a"], cold.x["a"], atol=2e-2)


def test_every_solve_of_a_step_is_reported(rng):
    """Heun solves twice a step, a corrector once more; too few steps are no secret of either."""
    denoisers = gaussians(rng, "shared")
    obs, _ = simulate(denoisers, *operators("shared", rng))
    x, sigma = {k: jnp.zeros(5) for k in denoisers}, {k: jnp.ones(()) for k in denoisers}
    posterior = MatrixFreePosterior(denoisers, obs.one(0), 1e-6, max_steps=1, precondition=False)
    for sampler in (Heun(1), PredictorCorrector(1)):
        _, e = sampler.step(posterior, x, KEY, sigma, sigma, posterior.first_guess())
        assert (e.effort.solves, e.effort.converged, e.effort.steps) == (2, 0, 2)
        assert e.effort.residual > 1e-6


def test_gibbs_reaches_the_joint_posterior_where_sources_are_weakly_tied(rng):
    denoisers = gaussians(rng, "shared")
    ops = {"a": Dense(np.eye(5)), "b": Dense(0.2 * np.eye(5))}
    obs, _ = simulate(denoisers, ops, IsotropicNoise(0.5))
    draws = sample_posterior(denoisers, obs, KEY, sampler=GibbsSampler(ExactSampler(), sweeps=32))
    x = np.concatenate([draws.x["a"][0], draws.x["b"][0]], axis=1)
    assert abs(chi2_per_dim(x, *analytic(denoisers, obs)) - 1) < 0.03


def test_the_evidence_bound_is_below_the_evidence_and_tightens(rng):
    denoisers = gaussians(rng, "shared")
    ops, noise = operators("shared", rng)
    obs, _ = simulate(denoisers, ops, noise)
    from dichroic.learning.mixture.em import mean_log_evidence

    exact = mean_log_evidence(denoisers, [obs])
    bounds = [
        float(sample_posterior(denoisers, obs, KEY, sampler=DDPM(n)).evidence.mean())
        for n in (32, 256)
    ]
    assert bounds[0] < bounds[1] < exact + 0.05
    assert exact - bounds[1] < 0.6


def test_a_users_callable_and_flax_give_the_same_draws_as_the_exact_denoiser(rng):
    flax = pytest.importorskip("flax.linen")
    ops, noise = operators("shared", rng)
    exact = {k: gaussian(np.zeros(5), np.eye(5)) for k in ("a", "b")}
    obs, _ = simulate(exact, ops, noise)

    class Shrink(flax.Module):
        @flax.compact
        def __call__(self, x, sigma):
            return self.param("gain", flax.initializers.ones, ()) * x / (1 + sigma**2)

    module = Shrink()
    params = module.init(jax.random.key(0), jnp.zeros(5), jnp.ones(()))
    users = {
        "a": CustomDenoiser(lambda x, sigma: x / (1 + sigma**2), shape=5),
        "b": CustomDenoiser(module.apply, shape=5, params=params),
    }
    sampler = Heun(24, Geometric(1e-2, 30.0))
    ours = sample_posterior(exact, obs, KEY, sampler=sampler)
    theirs = sample_posterior(users, obs, KEY, sampler=sampler)
    for k in users:
        np.testing.assert_allclose(theirs.x[k], ours.x[k], atol=2e-3)


@pytest.mark.parametrize(
    "sampler", [None, AncestralSampler(8), Heun(8)], ids=["exact", "ancestral", "heun"]
)
def test_any_batch_size_gives_bit_identical_draws(sampler, rng):
    denoisers = gaussians(rng, "per observation")
    obs, _ = simulate(denoisers, *operators("per observation", rng))
    draws = [
        sample_posterior(denoisers, obs, KEY, sampler=sampler, n_draws=2, batch_size=b)
        for b in (1, 100, 1024, 5000)
    ]
    for other in draws[1:]:
        for k in denoisers:
            np.testing.assert_array_equal(draws[0].x[k], other.x[k])


def test_new_data_of_the_same_shapes_do_not_recompile(rng):
    denoisers = gaussians(rng, "per observation")
    first, _ = simulate(denoisers, *operators("per observation", rng), seed=1)
    second, _ = simulate(denoisers, *operators("per observation", rng), seed=2)
    sample_posterior(denoisers, first, KEY, sampler=AncestralSampler(4))
    with jax.log_compiles(), pytest.MonkeyPatch.context():
        compiled = count_compilations(
            lambda: sample_posterior(
                denoisers, second, jax.random.key(9), sampler=AncestralSampler(4)
            )
        )
    assert not any("_draw_batches" in name for name in compiled)


def count_compilations(run):
    """Messages of the compilations that `run` triggers."""
    import logging

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        run()
    finally:
        logger.removeHandler(handler)
    return [m for m in messages if "Compiling" in m or "compilation" in m]


def test_scale_operator_per_observation_is_an_amplitude(rng):
    amplitude = rng.uniform(0.5, 2, size=N)
    denoisers = {"a": gaussian(np.zeros(4), np.eye(4))}
    obs, truth = simulate(denoisers, {"a": Scale(4, amplitude)}, IsotropicNoise(0.01))
    draws = sample_posterior(denoisers, obs, KEY)
    error = np.asarray(draws.x["a"][0]) - np.asarray(truth["a"])
    expected = np.sqrt(2) * 0.01 / amplitude  # a draw and the truth, both about the mean
    np.testing.assert_allclose(np.sqrt(np.mean((error / expected[:, None]) ** 2)), 1, atol=0.05)
