"""DDPRISM as published: its sampler and M-steps against closed forms, and a small fit from end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.benchmark.baselines.ddprism import FILE, Ddprism, DdprismConfig
from dichroic.benchmark.baselines.ddprism_iterations import expectation, in_range
from dichroic.benchmark.baselines.ddprism_sampling import (
    Absolute,
    PublishedGibbs,
    PublishedPosterior,
    PublishedPredictorCorrector,
    Started,
)
from dichroic.benchmark.baselines.ddprism_training import Training, network_denoiser, ppca, train
from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.errors import ConfigError, DataError, RunError
from dichroic.inference.posterior import Posterior
from dichroic.inference.samplers import ExactSampler, sample_posterior
from dichroic.operators import Dense
from dichroic.operators.noise import IsotropicNoise, Masked
from dichroic.priors import CustomDenoiser, gaussian
from dichroic.priors.schedule import Geometric
from dichroic.problem.observations import Observations
from dichroic.runtime.tracking import Silent

KEY = jax.random.key(17)
D, M, NOISE = 5, 3, 0.01
TAU = 0.1
LEVELS = Geometric(1e-3, 10.0)


def published(steps, cg_steps):
    return PublishedPredictorCorrector(steps, LEVELS, 1, TAU, cg_steps)


# The sampler, with exact denoisers


def gaussian_problem(n):
    """That of benchmarks/estep.py: denoisers, observations, and the posterior's mean and covariance."""
    rng = np.random.default_rng(0)
    q = [np.linalg.qr(rng.normal(size=(D, D)))[0] for _ in "ab"]
    covs = [u @ np.diag([2, 1, 0.3, 1e-2, 1e-3]) @ u.T for u in q]
    a = rng.normal(size=(n, M, D))
    x = sum(rng.multivariate_normal(np.zeros(D), c, size=n) for c in covs)
    y = np.einsum("nmd,nd->nm", a, x) + NOISE * rng.normal(size=(n, M))
    known = {k: Absolute(gaussian(np.zeros(D), c)) for k, c in zip("ab", covs, strict=True)}
    prior = np.block([[covs[0], np.zeros((D, D))], [np.zeros((D, D)), covs[1]]])
    both = np.concatenate([a, a], axis=-1)
    gain = prior @ both.swapaxes(1, 2)
    gain = gain @ np.linalg.inv(both @ prior @ both.swapaxes(1, 2) + NOISE**2 * np.eye(M))
    obs = Observations(y, {"a": Dense(a), "b": Dense(a)}, IsotropicNoise(NOISE))
    return known, obs, np.einsum("nij,nj->ni", gain, y), prior - gain @ both @ prior


def chi2(n, steps, cg_steps):
    """`χ²/d` of one draw per observation about the exact posterior; the posterior, too."""
    known, obs, mean, cov = gaussian_problem(n)
    x = sample_posterior(known, obs, KEY, sampler=published(steps, cg_steps)).x
    r = np.concatenate([x["a"][0], x["b"][0]], axis=-1) - mean
    return np.mean(np.einsum("ni,nij,nj->n", r, np.linalg.inv(cov), r)) / (2 * D), mean, cov


def predicted_chi2(mean, cov, steps):
    """`E[χ²/d]` of the sampler with the exact posterior mean, by its linear recursion per direction.

    Along an eigenvector of the posterior's covariance with eigenvalue c, `D = c x / (c + σ²)` about
    the mean; the walk starts from `N(−mean, 1 + σ_max²)`.
    """
    sigma = np.geomspace(LEVELS.sigma_max, LEVELS.sigma_min, steps + 1)
    c, vectors = np.linalg.eigh(cov)
    bias, var = -np.einsum("nij,ni->nj", vectors, mean), 1 + sigma[0] ** 2
    for t, s in zip(sigma[:-1], sigma[1:], strict=True):
        factor = c / (c + t**2) + s / t * t**2 / (c + t**2)
        move = 1 - TAU * s**2 / (c + s**2)
        bias, var = move * factor * bias, (move * factor) ** 2 * var + 2 * TAU * s**2
    last = c / (c + sigma[-1] ** 2)
    return np.mean(last**2 * (var + bias**2) / c)


def test_draws_with_exact_solves_are_calibrated_as_the_recursion_says(x64):
    """Three steps of conjugate gradients solve three equations; what is left is discretisation."""
    n, steps = 512, 32
    found, mean, cov = chi2(n, steps, cg_steps=3)
    error = np.sqrt(2 / (2 * D * n))
    assert abs(found - predicted_chi2(mean, cov, steps)) < 4 * error
    assert abs(found - 1) < 0.2


def test_with_enough_steps_the_exact_recursion_is_calibrated():
    _, _, mean, cov = gaussian_problem(256)
    assert abs(predicted_chi2(mean, cov, 256) - 1) < 0.03


@pytest.mark.slow
def test_one_step_of_conjugate_gradients_needs_many_steps_of_the_sampler():
    """χ²/d falls towards 1 as the steps grow, and is far above it with few."""
    few, some, many = (chi2(512, steps, cg_steps=1)[0] for steps in (16, 64, 256))
    assert few > 1.5 * some > 2 * many
    assert few > 8
    assert 1 < many < 2


def linear(weights, x, sigma):
    return weights @ x


def one_observation(rng, noise):
    a = {"a": rng.normal(size=(M, D)), "b": rng.normal(size=(M, 2))}
    y = rng.normal(size=M)
    x_t = {k: jnp.asarray(rng.normal(size=m.shape[1])) for k, m in a.items()}
    return Observations(y, {k: Dense(m) for k, m in a.items()}, noise), y, a, x_t


@pytest.mark.parametrize("masked", [False, True])
def test_converged_solves_give_the_exact_posterior_mean(masked, rng, x64):
    noise = IsotropicNoise(0.3)
    obs, _, _, x_t = one_observation(rng, Masked(noise, [1, 0, 1]) if masked else noise)
    root = {k: rng.normal(size=(v.size, v.size)) for k, v in x_t.items()}
    priors = {k: gaussian(rng.normal(size=len(r)), r @ r.T) for k, r in root.items()}
    sigma = {"a": jnp.asarray(0.7), "b": jnp.asarray(0.2)}
    both = jax.jit(
        lambda p, o: (PublishedPosterior(p, o, 1e-10, 20)(x_t, sigma), Posterior(p, o)(x_t, sigma))
    )
    found, exact = both(priors, obs)
    assert found.effort.converged == 1 and found.effort.residual < 1e-10
    for k in priors:
        np.testing.assert_allclose(found.mean[k], exact.mean[k], atol=1e-7)
        np.testing.assert_allclose(found.prior[k], exact.prior[k], atol=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_one_step_is_the_formula_with_dense_matrices(ridge, rng, x64):
    """With Jacobians that are not symmetric, so that `J` and `Jᵀ` are distinguished."""
    obs, y, a, x_t = one_observation(rng, IsotropicNoise(0.3))
    w = {k: np.eye(v.size) + 0.3 * rng.normal(size=(v.size, v.size)) for k, v in x_t.items()}
    priors = {
        k: CustomDenoiser(linear, v.shape, params=jnp.asarray(v_w))
        for (k, v), v_w in zip(x_t.items(), w.values(), strict=True)
    }
    s = {"a": 0.7, "b": 0.2}
    posterior = PublishedPosterior(priors, obs, 1e-6, 1, ridge=ridge)
    found = posterior(x_t, jax.tree.map(jnp.asarray, s))
    d = {k: w[k] @ np.asarray(x_t[k]) for k in w}
    r = y - sum(a[k] @ d[k] for k in a)
    c = (0.3**2 + ridge) * np.eye(M) + sum(s[k] ** 2 * a[k] @ w[k].T @ a[k].T for k in a)
    v = r * (r @ r) / (r @ c @ r)
    for k in a:
        np.testing.assert_allclose(found.mean[k], d[k] + s[k] ** 2 * w[k].T @ a[k].T @ v)
    left = np.linalg.norm(r - c @ v) / np.linalg.norm(r)
    np.testing.assert_allclose(found.effort.residual, left)


def test_negative_curvature_leaves_the_prior_mean(rng):
    obs, _, _, x_t = one_observation(rng, IsotropicNoise(0.3))
    priors = {
        k: CustomDenoiser(linear, v.shape, params=-9 * jnp.eye(v.size)) for k, v in x_t.items()
    }
    found = PublishedPosterior(priors, obs, 1e-6, 1)(x_t, {k: jnp.ones(()) for k in x_t})
    assert found.effort.converged == 0
    for k in x_t:
        np.testing.assert_array_equal(found.mean[k], found.prior[k])


# Gibbs sampling


def pair(n):
    """The same observation of two Gaussian sources `n` times over; its posterior's mean and covariance."""
    rng = np.random.default_rng(5)
    a = {"a": rng.normal(size=(2, 2)), "b": rng.normal(size=(2, 2))}
    covs = {"a": np.array([[1.0, 0.3], [0.3, 0.5]]), "b": np.array([[0.4, -0.1], [-0.1, 0.8]])}
    means = {"a": np.array([0.5, -1.0]), "b": np.array([0.0, 0.3])}
    y, noise = np.array([1.0, -0.5]), 0.8
    both, prior = np.hstack([a["a"], a["b"]]), np.zeros((4, 4))
    prior[:2, :2], prior[2:, 2:] = covs["a"], covs["b"]
    m = np.concatenate([means["a"], means["b"]])
    gain = prior @ both.T @ np.linalg.inv(both @ prior @ both.T + noise**2 * np.eye(2))
    known = {k: Absolute(gaussian(means[k], covs[k])) for k in a}
    ops = {k: Dense(v) for k, v in a.items()}
    start = {k: jnp.full((n, 2), 2.0) for k in a}
    obs = Started(np.tile(y, (n, 1)), ops, IsotropicNoise(noise), start)
    return known, obs, m + gain @ (y - both @ m), prior - gain @ both @ prior


def check_moments(x, mean, cov, slack):
    """Mean and covariance of the rows of `x`, within four standard errors and a bias of `slack`."""
    n, std = len(x), np.sqrt(np.diag(cov))
    z = (x.mean(axis=0) - mean) / std
    assert np.all(np.abs(z) < 4 / np.sqrt(n) + slack)
    corr = cov / np.outer(std, std)
    error = (np.cov(x.T) - cov) / np.outer(std, std)
    assert np.all(np.abs(error) < 4 * np.sqrt((1 + corr**2) / n) + slack)


def test_gibbs_draws_follow_the_joint_posterior():
    """From a start far off, with exact draws of each source: only the sweeps are tested."""
    known, obs, mean, cov = pair(4096)
    known = {k: d.inner for k, d in known.items()}
    x = sample_posterior(known, obs, KEY, sampler=PublishedGibbs(ExactSampler(), 40)).x
    check_moments(np.concatenate([x["a"][0], x["b"][0]], axis=1), mean, cov, slack=0)


def test_gibbs_draws_by_the_published_sampler_follow_the_joint_posterior():
    known, obs, mean, cov = pair(1024)
    sampler = PublishedGibbs(published(64, 2), 16)
    x = sample_posterior(known, obs, KEY, sampler=sampler).x
    check_moments(np.concatenate([x["a"][0], x["b"][0]], axis=1), mean, cov, slack=0.08)


def test_the_first_sweep_is_given_the_start():
    known, obs, _, _ = pair(4096)
    known = {k: d.inner for k, d in known.items()}
    x = sample_posterior(known, obs, KEY, sampler=PublishedGibbs(ExactSampler(), 1)).x["a"][0]
    y = np.asarray(obs.y[0] - obs.operators["b"].matrix @ np.full(2, 2.0))
    a, prior = np.asarray(obs.operators["a"].matrix), np.asarray(known["a"].covariances()[0])
    m = np.asarray(known["a"].location)
    gain = prior @ a.T @ np.linalg.inv(a @ prior @ a.T + 0.8**2 * np.eye(2))
    check_moments(x, m + gain @ (y - a @ m), prior - gain @ a @ prior, slack=0)


# The M-steps


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_ppca_is_the_closed_form(shape, rng):
    """Tipping and Bishop: `W Wᵀ + s² I`, `W = U₂ (Λ₂ − s² I)^½`, `s²` the mean of the other λ."""
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + np.arange(6)
    fit = ppca(x.reshape(-1, *shape), rank=2)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    floor = values[:4].mean()
    w = vectors[:, 4:] * np.sqrt(values[4:] - floor)
    expect = w @ w.T + floor * np.eye(6)
    assert fit.shape == shape
    np.testing.assert_allclose(fit.covariances()[0], expect, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fit.location, x.mean(axis=0).reshape(shape), atol=1e-5)


def test_ppca_with_as_many_directions_as_numbers_is_the_covariance(rng):
    x = rng.normal(size=(50, 2))
    np.testing.assert_allclose(ppca(x, rank=2).covariances()[0], np.cov(x.T, bias=True), rtol=1e-4)
    assert ppca(x[:, :1], rank=2).covariances()[0].shape == (1, 1)


def test_nothing_to_learn_from_is_said():
    with pytest.raises(DataError, match="two draws at least, and 1 are left"):
        ppca(np.zeros((1, 2)), rank=2)
    training = Training(1, 8, 1e-3, 1e-4, 1e-3, 10.0)
    with pytest.raises(DataError, match="none are left"):
        train(tiny_network(), np.zeros((0, 2), np.float32), KEY, config=training)


def tiny_network(unit=1.0):
    return network_denoiser((2,), KEY, width=32, depth=2, time_features=8, unit=unit)


def test_training_finds_the_denoiser_of_the_draws_and_not_of_their_padding(rng):
    """For `x ~ N(0, s² I)` the best denoiser is `x_t s² / (s² + σ²)`; zeros to pad with pull it to 0."""
    unit, s = 3.0, 1.5
    x = (s * rng.normal(size=(4000, 2))).astype(np.float32)
    training = Training(500, 256, 3e-3, 1e-5, 1e-2, 10.0)
    denoiser, loss = train(tiny_network(unit), x, KEY, config=training, room=16000)
    assert np.isfinite(loss)
    sigma = jnp.full(256, 1.5)
    x_t = x[:256] + 1.5 * rng.normal(size=(256, 2)).astype(np.float32)
    found = jax.vmap(denoiser)(x_t, sigma)
    error = np.mean((found - 0.5 * x_t) ** 2) / np.mean(np.asarray(0.5 * x_t) ** 2)
    assert error < 0.03


# A fit from end to end


@pytest.fixture(scope="module")
def problem():
    return manifold_problem(count=128)


JOINT = DdprismConfig(
    steps=8,
    gaussian_steps=8,
    gaussian_iterations=2,
    iterations=(1, 2),
    training_steps=50,
    training_batch=32,
    width=8,
    depth=1,
    time_features=4,
    limit=6.0,
    corrections=0,
)
# A single source is drawn with 2 × 4 steps: what is compiled for joint sampling serves.
GIBBS = dataclasses.replace(JOINT, sampling="gibbs", steps=4, gaussian_steps=4, rounds=2)
CONFIGS = {"joint": JOINT, "gibbs": GIBBS}


@pytest.fixture(scope="module")
def fitted(problem):
    """An uninterrupted fit of each kind, made when first asked for."""
    made = {}

    def fit(kind):
        if kind not in made:
            made[kind] = Ddprism(problem, seed=3, config=CONFIGS[kind]).fit(progress=False)
        return made[kind]

    return fit


class Killed(Silent):
    """Stops a fit in the middle of iteration `at`."""

    def __init__(self, at):
        self.at, self.iterations = at, 0

    def iteration(self, metrics):
        self.iterations += 1

    def progress(self, what, done, total):
        if self.iterations + 1 == self.at and what.startswith("E-step"):
            raise KeyboardInterrupt


def untimed(metrics):
    return [{k: v for k, v in m.items() if k != "seconds"} for m in metrics]


@pytest.mark.parametrize(("kind", "at"), [("joint", 2), ("joint", 6), ("gibbs", 7)])
@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_result(kind, at, problem, fitted, tmp_path):
    whole = fitted(kind)
    make = lambda: Ddprism(problem, seed=3, config=CONFIGS[kind])
    with pytest.raises(KeyboardInterrupt):
        make().fit(tmp_path, progress=Killed(at))
    resumed = make().fit(tmp_path, resume=True, progress=False)
    assert untimed(resumed.metrics) == untimed(whole.metrics)
    assert jax.tree.structure(resumed.denoisers) == jax.tree.structure(whole.denoisers)
    for a, b in zip(*map(jax.tree.leaves, (resumed.denoisers, whole.denoisers)), strict=True):
        np.testing.assert_array_equal(a, b)
    again = make().fit(tmp_path, resume=True, progress=False)
    assert untimed(again.metrics) == untimed(whole.metrics)


@pytest.mark.parametrize("kind", ["joint", "gibbs"])
def test_sources_are_learned_in_turn(kind, fitted):
    seen = [(m["sources"], m["phase"]) for m in fitted(kind).metrics]
    one = [("source1", "gaussian")] * 2 + [("source1", "diffusion")]
    two = [("source2", "gaussian")] * 2 + [("source2", "diffusion")] * 2
    assert seen == one + two


@pytest.mark.parametrize("kind", ["joint", "gibbs"])
def test_separations_and_prior_draws_have_their_shapes(kind, problem, fitted):
    found = fitted(kind).separate("view2", n_draws=2)
    assert {k: x.shape for k, x in found.draws.items()} == {
        "source1": (2, 128, 5),
        "source2": (2, 128, 5),
    }
    assert found.chi2.shape == found.residual.shape == found.converged.shape == (2, 128)
    assert all(np.all(np.isfinite(x)) for x in found.draws.values())
    assert not np.any(found.draws["source2"][0] == found.draws["source2"][1])
    assert fitted(kind).separate(problem.views[0]).draws["source1"].shape == (1, 128, 5)
    assert fitted(kind).sample_prior("source2", 70).shape == (70, 5)


def test_the_batch_size_changes_no_draw():
    obs = _observations(manifold_problem(count=300))
    known = {k: gaussian(np.zeros(5), np.eye(5)) for k in obs.sources}
    draws = [
        expectation(known, obs, KEY, dataclasses.replace(GIBBS, batch_size=b), 4)[0]
        for b in (64, 300)
    ]
    for k in known:
        np.testing.assert_array_equal(draws[0][k], draws[1][k])


# Draws out of range


def _observations(problem):
    view = problem.view("view2")
    return Observations(view.observations, dict(view.operators), IsotropicNoise(0.01))


def test_what_is_in_range():
    x = {"a": np.array([[0.0, 1], [3, 0], [np.nan, 0], [0, 0]]), "b": np.array([1.0, 1, 1, -2])}
    np.testing.assert_array_equal(in_range(x, 2.0), [True, False, False, False])


@pytest.mark.parametrize("kind", ["joint", "gibbs"])
def test_draws_out_of_range_are_not_learned_from(kind, problem):
    """Joint sampling drops them; Gibbs sampling goes on with the last ones."""
    obs = _observations(problem)
    known = {k: gaussian(np.zeros(5), np.eye(5)) for k in obs.sources}
    config = dataclasses.replace(CONFIGS[kind], limit=2.0)
    last = {k: np.full((128, 5), 0.25, np.float32) for k in known} if kind == "gibbs" else None
    x, good = expectation(known, obs, KEY, config, 4, last=last)
    assert 0 < good.sum() < 128
    assert np.all(in_range(x, 2.0))
    for a in x.values():
        assert len(a) == (128 if last else good.sum())
        assert not last or np.all(a[~good] == 0.25)


def test_no_draw_in_range_is_an_error(problem):
    config = dataclasses.replace(JOINT, limit=1e-6)
    with pytest.raises(DataError, match="'source1': no draws within ±1e-06 are left"):
        Ddprism(problem, config=config).fit(progress=False)


# Settings and errors


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sampling": "both"}, "sampling: 'both' is none of"),
        ({"steps": 0}, "steps: must be at least 1, got 0"),
        ({"cg_steps": 0}, "cg_steps"),
        ({"tau": 0.0}, "tau: must be positive"),
        ({"limit": float("nan")}, "limit: must be positive"),
        ({"ridge": -1.0}, "ridge: must not be negative"),
        ({"iterations": ()}, "iterations"),
        ({"iterations": (1, -1)}, "iterations"),
        ({"gaussian_iterations": 0}, "Gaussian iteration"),
        ({"sigma_min": 20.0}, "sigma_min < sigma_max"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_settings_are_checked(change, says):
    with pytest.raises(ConfigError, match=says):
        DdprismConfig(**change)


def test_published_settings():
    config = DdprismConfig.published()
    assert config == DdprismConfig()
    assert (config.steps, config.training_steps, config.cg_steps) == (16384, 65536, 1)
    assert [config.diffusion_iterations(g) for g in range(4)] == [16, 32, 64, 64]
    assert DdprismConfig.published("mixed").gaussian_iterations == 8192
    assert DdprismConfig.published("mixed", "gibbs").rounds == 512
    assert DdprismConfig.small("gibbs").sampling == "gibbs"
    with pytest.raises(ConfigError, match="none of 'contrastive', 'mixed'"):
        DdprismConfig.published("other")  # type: ignore[arg-type]


def test_errors_are_clear(problem, fitted, tmp_path):
    with pytest.raises(RunError, match=r"call fit\(\) first"):
        Ddprism(problem).separate("view1")
    with pytest.raises(DataError, match="no source 'other'"):
        fitted("joint").sample_prior("other", 1)
    with pytest.raises(DataError, match="no view 'other'"):
        fitted("joint").separate("other")
    with pytest.raises(KeyboardInterrupt):
        Ddprism(problem, config=JOINT).fit(tmp_path, progress=Killed(2))
    assert (tmp_path / FILE).exists()
    with pytest.raises(RunError, match="already holds a fit"):
        Ddprism(problem, config=JOINT).fit(tmp_path, progress=False)
    with pytest.raises(RunError, match="another problem"):
        other = manifold_problem(count=128, seed=1)
        Ddprism(other, config=JOINT).fit(tmp_path, resume=True, progress=False)
    with pytest.raises(RunError, match=r"other settings \(tau: 0.1 before, 0.2 now\)"):
        config = dataclasses.replace(JOINT, tau=0.2, batch_size=64)
        Ddprism(problem, config=config).fit(tmp_path, resume=True, progress=False)
