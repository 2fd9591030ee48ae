"""The variational contrastive model: its bound against exact evidences, and small fits with known answers."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from dichroic.benchmark.baselines import ClvmVae, clvm_vae
from dichroic.benchmark.baselines.clvm_vae_networks import (
    Datum,
    large_inputs,
    signal_scales,
    white_inputs,
)
from dichroic.benchmark.baselines.clvm_vae_training import elbo, tempering
from dichroic.errors import ConfigError, DataError, FormatError, RunError
from dichroic.numerics.batching import take
from dichroic.operators import Dense, Identity, Scale
from dichroic.operators.noise import DenseNoise, IsotropicNoise, Masked
from dichroic.problem.observations import Observations
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View

N, SIZE, LATENT = 4, 4, 2
SHAPES = {"a": (3,), "b": (2, 2)}


def spd(rng, dim):
    root = rng.normal(size=(dim, dim))
    return root @ root.T / dim + 0.1 * np.eye(dim)


@pytest.fixture
def linear(rng):
    """Observations of linear decoders, and of each `(y, W, b, Σ)` such that `y = W z + b + η`, in float64."""
    a = {k: rng.normal(size=(N, SIZE, int(np.prod(s)))) for k, s in SHAPES.items()}
    y, cov = rng.normal(size=(N, SIZE)), 0.1 * spd(rng, SIZE)
    seen = rng.uniform(size=(N, SIZE)) < 0.7
    seen[:, 0] = True
    ops = {k: Dense(a[k], in_shape=s) for k, s in SHAPES.items()}
    obs = Observations(y, ops, Masked(DenseNoise(cov), seen))
    weight = {k: rng.normal(size=(m.shape[-1], LATENT)) for k, m in a.items()}
    shift = {k: rng.normal(size=m.shape[-1]) for k, m in a.items()}
    each = []
    for i, s in enumerate(seen):
        w = np.concatenate([a[k][i] @ weight[k] for k in SHAPES], axis=1)
        b = sum(a[k][i] @ shift[k] for k in SHAPES)
        each.append((y[i, s], w[s], b[s], cov[np.ix_(s, s)]))

    def decode(z):
        parts = zip(SHAPES.items(), jnp.split(z, 2), strict=True)
        return {k: (weight[k] @ part + shift[k]).reshape(s) for (k, s), part in parts}

    return obs, each, decode


def white(obs):
    view, constant, inputs = white_inputs(obs, jnp.asarray(1.0), True)
    return Datum(view, inputs["x"], constant, True)


def bounds(decode, q, datum, draws=4000):
    """Independent draws of the bound of one observation."""
    q = tuple(jnp.asarray(part) for part in q)
    e = np.random.default_rng(3).normal(size=(draws, q[0].size))
    return np.asarray(_bounds(decode, q, datum, e))


@eqx.filter_jit
def _bounds(decode, q, datum, e):
    return jax.vmap(lambda e: elbo(decode, q, datum, e))(e)


def gaussian_kl(m0, s0, m1, s1):
    inverse, d = np.linalg.inv(s1), m1 - m0
    logs = np.linalg.slogdet(s1)[1] - np.linalg.slogdet(s0)[1]
    return 0.5 * (np.trace(inverse @ s0) + d @ inverse @ d - len(d) + logs)


def agree(values, expected):
    assert abs(values.mean() - expected) < 4.5 * values.std() / np.sqrt(len(values)) + 1e-4


def test_the_bound_of_linear_decoders_is_the_evidence_less_the_divergence_from_the_posterior(
    linear, rng, x64
):
    """log p(y) − ELBO(q) = KL(q ‖ p(z | y)): zero for the exact posterior, known for any other Gaussian."""
    obs, each, decode = linear
    data = white(obs)
    for i, (y, w, b, cov) in enumerate(each):
        evidence = multivariate_normal(b, w @ w.T + cov).logpdf(y)
        precision = np.eye(2 * LATENT) + w.T @ np.linalg.solve(cov, w)
        covariance = np.linalg.inv(precision)
        mean = covariance @ w.T @ np.linalg.solve(cov, y - b)
        tight = bounds(decode, (mean, np.linalg.cholesky(covariance)), take(data, i))
        agree(tight, evidence)
        other = mean + 0.3 * rng.normal(size=mean.size), spd(rng, mean.size)
        loose = bounds(decode, (other[0], np.linalg.cholesky(other[1])), take(data, i))
        agree(loose, evidence - gaussian_kl(*other, mean, covariance))
        assert loose.mean() < evidence


def test_large_views_have_the_same_bound_up_to_the_constant_of_the_noise(linear, x64):
    obs, _, decode = linear
    view, constant, inputs = large_inputs(obs)
    large = Datum(view, inputs["x a"], constant, False)
    small = white(obs)
    for i in range(N):
        q = np.full(2 * LATENT, 0.2), 0.5 * np.eye(2 * LATENT)
        a, b = bounds(decode, q, take(large, i), 8), bounds(decode, q, take(small, i), 8)
        np.testing.assert_allclose(a + small.constant[i], b, atol=1e-3)


@pytest.mark.parametrize("std", [1e-4, 1.0, 1e3])
def test_whitened_residuals_have_the_likelihood_of_the_noise(std, rng):
    """Also for noise far from the unit noise that stands in for missing entries."""
    cov, seen = std**2 * spd(rng, SIZE), np.array([1.0, 0, 1, 1])
    y, a = std * rng.normal(size=SIZE), rng.normal(size=(SIZE, 3))
    data = white(Observations(y, {"a": Dense(a)}, Masked(DenseNoise(cov), seen)))
    got = data.constant - 0.5 * jnp.sum(data.obs.y**2)
    s = seen > 0
    expect = multivariate_normal(np.zeros(3), cov[np.ix_(s, s)]).logpdf(y[s])
    np.testing.assert_allclose(got, expect, rtol=1e-4)
    root = np.linalg.inv(np.linalg.cholesky(cov[np.ix_(s, s)]))
    matrix = np.asarray(data.obs.operators["a"].as_matrix())
    np.testing.assert_allclose(matrix.T @ matrix, (root @ a[s]).T @ (root @ a[s]), rtol=2e-3)


def test_inputs_do_not_depend_on_how_the_observation_is_written_down(rng):
    """A rotation of all entries changes y and A but nothing that the likelihood says of x."""
    y, a = rng.normal(size=SIZE), rng.normal(size=(SIZE, 6))
    turn, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))

    def inputs(y, a):
        ops = {"a": Dense(a[:, :3]), "b": Dense(a[:, 3:])}
        return white_inputs(Observations(y, ops, IsotropicNoise(0.1)), jnp.asarray(2.0), True)[2]

    before, after = inputs(y, a), inputs(turn @ y, turn @ a)
    assert before["x"].shape == (6,) and before["p"].shape == (21,)
    for k in before:
        np.testing.assert_allclose(before[k], after[k], atol=1e-4)
    wiener = 4 * a.T @ np.linalg.solve(4 * a @ a.T + 0.01 * np.eye(SIZE), y)
    np.testing.assert_allclose(before["x"], wiener, rtol=1e-3, atol=1e-4)


def test_the_scale_of_the_sources_and_the_signal_to_noise_ratio_are_those_of_the_data():
    """Relative errors of means of 1024 χ² of 2 × 4 entries, and of as many of `‖A w‖²`: each below 2 %."""
    rng, n = np.random.default_rng(0), 1024
    x, a = 3 * rng.normal(size=(n, 6)), rng.normal(size=(n, 4, 6))
    y = np.einsum("nij,nj->ni", a, x) + 0.5 * rng.normal(size=(n, 4))
    scale, ratio = signal_scales(Observations(y, {"a": Dense(a)}, IsotropicNoise(0.5)))
    assert abs(scale / 3 - 1) < 0.1
    assert abs(ratio / np.sqrt(6 * 9 / 0.25 + 1) - 1) < 0.1


def test_noise_is_inflated_at_first_and_as_stated_at_last():
    t = [float(tempering(jnp.asarray(90.0), jnp.asarray(s), 100)) for s in (0, 30, 60, 99)]
    np.testing.assert_allclose(t, [30, np.sqrt(30), 1, 1], rtol=1e-5)
    assert float(tempering(jnp.asarray(0.5), jnp.asarray(0), 100)) == 1


# Fits


NOISE, RADIUS = 0.05, 2.0


def circle_and_line(count=1500, seed=0):
    """Source a is a circle in a plane, source b a segment across it; view 1 sees a, view 2 both.

    The amplitude of b differs between observations."""
    rng = np.random.default_rng(seed)

    def draw():
        angle, t = rng.uniform(0, 2 * np.pi, count), rng.uniform(-2, 2, count)
        a = RADIUS * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
        return a, t[:, None] * np.array([0.5, 0.0, 1.0])

    (a1, _), (a2, b2) = draw(), draw()
    noisy = lambda x: x + NOISE * rng.normal(size=x.shape)
    f = rng.uniform(0.5, 1.5, count)
    both = {"a": Identity((3,)), "b": Scale((3,), f)}
    views = [
        View(noisy(a1), {"a": Identity((3,))}, NOISE, "alone", truth={"a": a1}),
        View(noisy(a2 + f[:, None] * b2), both, NOISE, "both", truth={"a": a2, "b": b2}),
    ]
    return Problem([Source("a", 3), Source("b", 3)], views)


@pytest.fixture(scope="module")
def fitted():
    return ClvmVae(circle_and_line(), width=48, steps=1600).fit(progress=False)


def rmse(a, b):
    return float(np.sqrt(np.mean((np.asarray(a) - np.asarray(b)) ** 2)))


def test_training_raises_the_held_out_bound_and_separates_far_better_than_the_prior_mean(fitted):
    bound = [row["evidence_bound"] for row in fitted.metrics]
    assert max(bound) > bound[0] + 10
    new = circle_and_line(512, seed=1)
    for view in new.views:
        result = fitted.separate(view)
        for k, truth in view.truth.items():
            assert result.draws[k].shape == (1, 512, 3)
            assert rmse(result.draws[k][0], truth) < 0.25 * rmse(truth.mean(axis=0), truth)


def test_prior_draws_lie_on_the_sources(fitted):
    a = fitted.sample_prior("a", 1000)
    assert a.shape == (1000, 3) and np.isfinite(a).all()
    assert np.median(np.abs(np.hypot(a[:, 0], a[:, 1]) - RADIUS)) < 0.2
    assert np.median(np.abs(a[:, 2])) < 0.2
    np.testing.assert_array_equal(fitted.sample_prior("a", 300), a[:300])
    assert not np.array_equal(fitted.sample_prior("a", 300, seed=1), a[:300])


def test_draws_depend_on_the_seed_and_the_number_of_the_observation_only(fitted, monkeypatch):
    view = fitted.problem.views[1].select(slice(0, 500))
    whole = fitted.separate(view, n_draws=2, seed=7)
    part = fitted.separate(view.select(slice(200, 300)), n_draws=2, seed=7, first_index=200)
    monkeypatch.setattr(clvm_vae, "BATCH", 64)
    small = fitted.separate(view, n_draws=2, seed=7)
    for k, x in whole.draws.items():
        np.testing.assert_array_equal(part.draws[k], x[:, 200:300])
        np.testing.assert_array_equal(small.draws[k], x)
        assert not np.array_equal(x[0], x[1])
        assert not np.array_equal(fitted.separate(view, seed=8).draws[k][0], x[0])
    assert whole.chi2.shape == whole.converged.shape == (2, 500)
    assert (whole.residual == 0).all() and (whole.converged == 1).all()


def test_the_calls_take_the_names_of_views_and_report_progress(fitted):
    seen = []
    result = fitted.separate("both", n_draws=2, progress=lambda *a: seen.append(a))
    assert set(result.draws) == {"a", "b"} and result.std["a"].shape == (1500, 3)
    assert seen[-1] == (3000, 3000)


def small_views(rng, count=80):
    """Co-observed views of images, operators per observation, missing entries."""
    dense = lambda: Dense(rng.normal(size=(count, 3, 6)), in_shape=(2, 3))
    y, mask = rng.normal(size=(2, count, 3)), rng.uniform(size=(2, count, 3)) < 0.8
    views = [
        View(y[0], {"a": dense()}, 0.1, mask=mask[0], group="same"),
        View(y[1], {"b": dense(), "a": dense()}, 0.1, mask=mask[1], group="same"),
    ]
    return Problem([Source("a", (2, 3)), Source("b", (2, 3))], views)


def large_view(rng, count=80):
    """Images of more entries than are whitened, some of them missing."""
    y, mask = rng.normal(size=(count, 12, 12)), rng.uniform(size=(12, 12)) < 0.9
    return Problem([Source("b", (12, 12))], [View(y, {"b": Identity((12, 12))}, 0.3, mask=mask)])


def tiny(problem, seed=0):
    return ClvmVae(problem, seed=seed, width=8, latent=2, steps=12)


@pytest.mark.parametrize("make", [small_views, large_view])
def test_all_kinds_of_views_run(make, rng):
    problem = make(rng)
    model = tiny(problem).fit(progress=False)
    shape = problem.shapes["b"]
    for views in problem.joint_views():
        result = model.separate(views[-1].name)
        assert all(x.shape == (1, 80, *shape) for x in result.draws.values())
        assert all(np.isfinite(x).all() for x in (*result.draws.values(), result.chi2))
    assert model.sample_prior("b", 7).shape == (7, *shape)
    for encoder in model.vae.encoders.values():
        assert (encoder.white, encoder.operators) == (make is small_views,) * 2


def test_a_finished_fit_is_kept_and_taken_up_again(fitted, tmp_path, monkeypatch):
    fitted.save(tmp_path)
    view = fitted.problem.views[1].select(slice(0, 100))
    expected = fitted.separate(view).draws
    monkeypatch.setattr(clvm_vae, "train", None)  # it must not train again
    again = ClvmVae(fitted.problem, width=48, steps=1600).fit(tmp_path, resume=True, progress=False)
    loaded = ClvmVae.load(tmp_path)
    loaded.save(tmp_path)
    again.fit(tmp_path, resume=True)
    for model in (again, loaded):
        assert model.settings == fitted.settings and model.metrics == fitted.metrics
        for k, x in model.separate(view).draws.items():
            np.testing.assert_array_equal(x, expected[k])
    with pytest.raises(RunError, match="already holds a model"):
        ClvmVae(fitted.problem, width=48, steps=1600).fit(tmp_path, progress=False)
    with pytest.raises(RunError, match="other settings"):
        ClvmVae(fitted.problem, width=47, steps=1600).fit(tmp_path, resume=True)
    with pytest.raises(RunError, match="another problem"):
        ClvmVae(circle_and_line(1400), width=48, steps=1600).fit(tmp_path, resume=True)
    with pytest.raises(RunError, match="without a problem"):
        loaded.fit()
    with pytest.raises(DataError, match="no problem to find"):
        loaded.separate("both")


def test_fit_writes_its_folder_once_it_is_done_and_the_same_seed_fits_the_same(tmp_path, rng):
    problem = small_views(rng)
    fit = lambda seed, out: tiny(problem, seed).fit(out, resume=True, progress=False)
    first, second, other = fit(0, tmp_path / "run"), fit(0, None), fit(1, None)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["clvm_vae.safetensors"]
    x = [m.sample_prior("a", 5) for m in (first, fit(0, tmp_path / "run"), second, other)]
    np.testing.assert_array_equal(x[0], x[1])
    np.testing.assert_array_equal(x[0], x[2])
    assert not np.array_equal(x[0], x[3])


def test_errors_say_what_to_do(fitted, tmp_path):
    problem = fitted.problem
    for bad in ({"latent": 0}, {"width": 0}, {"steps": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            ClvmVae(problem, **bad)
    with pytest.raises(RunError, match=r"call fit\(\) first"):
        ClvmVae(problem).separate("both")
    with pytest.raises(DataError, match="no source 'c'; there are a, b"):
        fitted.sample_prior("c", 1)
    view = problem.views[1]
    with pytest.raises(DataError, match="name yours as one of alone, both"):
        fitted.separate(dataclasses.replace(view, name="new"))
    with pytest.raises(DataError, match="sees a, b, but its encoder was trained on a"):
        fitted.separate(dataclasses.replace(view, name="alone"))
    with pytest.raises(FormatError, match="does not exist"):
        ClvmVae.load(tmp_path)
