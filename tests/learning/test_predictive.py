"""Predictive checks against analytic Gaussians: no alarm for right models, one for each kind of wrong one."""

import json
import logging

import jax
import numpy as np
import pytest
from scipy import stats

from dichroic.config import FitConfig
from dichroic.errors import RunError
from dichroic.learning.data import prepare
from dichroic.learning.predictive.checks import predictive_checks
from dichroic.learning.predictive.leave_out import Fold, candidates, folds, predict
from dichroic.learning.predictive.linear_predictor import learn
from dichroic.learning.predictive.residuals import LeftOut, examine
from dichroic.learning.predictive.result import HEADER, PredictiveChecks
from dichroic.operators import Dense, Identity
from dichroic.operators.noise import DenseNoise, IsotropicNoise, StationaryNoise
from dichroic.priors import GaussianMixture, gaussian
from dichroic.problem.problem import Problem, Source, joint_observations
from dichroic.problem.view import View
from dichroic.separation.separator import Separator

pytestmark = pytest.mark.checked

M = 12
CONFIG = FitConfig()
SMALL = {
    "joint_iterations": 0,
    "mixture": {"components": 1, "gaussian_iterations": 3, "iterations": 2, "final_iterations": 2},
    "diffusion": {"iterations": 0},
}


def covariance(length, size=M):
    j = np.arange(size)
    return np.exp(-np.abs(j[:, None] - j) / length)


def draws_of(rng, cov, n):
    return rng.normal(size=(n, len(cov))) @ np.linalg.cholesky(cov).T


def conditional(cov, y, left):
    """Mean and covariance of what is left out given the rest, for a mean of 0."""
    gain = np.linalg.solve(cov[np.ix_(~left, ~left)], cov[np.ix_(~left, left)])
    rest = cov[np.ix_(left, left)] - cov[np.ix_(~left, left)].T @ gain
    return y[:, ~left] @ gain, rest


def log_density(cov, y, left):
    mean, rest = conditional(cov, y, left)
    return stats.multivariate_normal(np.zeros(len(rest)), rest).logpdf(y[:, left] - mean)


# The linear filter


def test_the_linear_filter_is_the_conditional_of_the_gaussian_that_the_data_have(rng):
    cov = covariance(3.0) + 0.2 * np.eye(M)
    y, new = draws_of(rng, cov, 20000), draws_of(rng, cov, 300)
    left = np.isin(np.arange(M), [2, 3, 9])
    found = learn(y + 5, np.ones(y.shape, bool), np.arange(M))
    both = np.broadcast_to(~left, new.shape), np.broadcast_to(left, new.shape)
    density, mean = found.predict(new + 5, *both)
    np.testing.assert_allclose(mean[:, left] - 5, conditional(cov, new, left)[0], atol=0.1)
    assert np.mean(density) == pytest.approx(np.mean(log_density(cov, new, left)), abs=0.02)


def test_the_linear_filter_knows_gaps_and_predicts_what_is_there(rng):
    cov = covariance(3.0) + 0.2 * np.eye(M)
    y, new = draws_of(rng, cov, 5000), draws_of(rng, cov, 4)
    seen = rng.uniform(size=y.shape) > 0.4
    found = learn(np.where(seen, y, 1e6), seen, np.arange(M))
    left = np.isin(np.arange(M), [2, 3, 9])
    kept = np.tile(~left, (4, 1))
    kept[1:, 4] = False
    density, _ = found.predict(np.where(kept | left, new, 1e6), kept, np.tile(left, (4, 1)))
    rest = np.arange(M) != 4
    own = log_density(cov[np.ix_(rest, rest)], new[1:][:, rest], left[rest])
    np.testing.assert_allclose(density[1:], own, atol=0.5)
    np.testing.assert_allclose(density[0], log_density(cov, new, left)[0], atol=0.5)


@pytest.mark.parametrize("gaps", [False, True])
def test_the_linear_filter_needs_no_more_observations_than_entries(rng, gaps):
    cov = covariance(10.0, 60) + 0.1 * np.eye(60)
    y, new = draws_of(rng, cov, 30), draws_of(rng, cov, 500)
    seen = rng.uniform(size=y.shape) > (0.3 if gaps else 0)
    found = learn(y, seen, np.arange(60))
    left = np.arange(60) % 5 == 0
    both = np.broadcast_to(~left, new.shape), np.broadcast_to(left, new.shape)
    _, mean = found.predict(new, *both)
    error = np.mean((new - mean)[:, left] ** 2)
    assert np.mean(log_density(cov, new, left)) / left.sum() > -1.5
    assert error < (0.75 if gaps else 0.5)  # 1.1 for the mean alone


def test_blocks_of_neighbours_predict_their_own_entries(rng):
    cov = covariance(3.0, 40) + 0.2 * np.eye(40)
    y, new = draws_of(rng, cov, 4000), draws_of(rng, cov, 200)
    seen, left = np.ones(y.shape, bool), np.arange(40) % 5 == 2
    both = np.broadcast_to(~left, new.shape), np.broadcast_to(left, new.shape)
    whole, cut = (
        learn(y, seen, np.arange(40), block=b).predict(new, *both)[0].mean() for b in (40, 10)
    )
    assert cut == pytest.approx(whole, abs=0.3)


# What is left out


def test_every_entry_is_left_out_once_and_observations_are_in_one_fold(rng):
    seen = np.ones((23, M), bool)
    found = folds(23, M, candidates(seen, rng), rng)
    np.testing.assert_array_equal(np.sum([f.left for f in found], axis=0), np.ones(M))
    numbers = np.concatenate([f.numbers for f in found])
    assert len(set(numbers)) == len(numbers) == 20
    assert {len(f.numbers) for f in found} == {4}


def test_of_many_entries_some_blocks_are_left_out(rng):
    entries = candidates(np.ones((2, 10000), bool), rng)
    assert 3900 < len(entries) < 4100
    assert np.sum(np.diff(entries) != 1) <= 3


NOISES = {
    "white": (IsotropicNoise(0.5), 0.25 * np.eye(M)),
    "dense": (DenseNoise(0.25 * covariance(2.0)), 0.25 * covariance(2.0)),
    "stationary": (
        StationaryNoise(np.array([0.1, 0.25, 0.1])),
        0.25 * np.eye(M) + 0.1 * (np.eye(M, k=1) + np.eye(M, k=-1)),
    ),
}


def prior(kind, cov):
    if kind == "full":
        return gaussian(np.zeros(M), cov)
    values, axes = np.linalg.eigh(cov)
    floor = float(values[0])
    return GaussianMixture(
        np.zeros(1), np.zeros((1, M)), axes[None], values[None] - floor, np.array([floor]), (M,)
    )


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", ["full", "low rank"])
def test_draws_and_density_of_what_is_left_out_are_those_of_the_gaussian(rng, noise, kind):
    model, own = NOISES[noise]
    a, cov = rng.normal(size=(M, M)) / 3, covariance(3.0)
    y = draws_of(rng, a @ cov @ a.T + own, 12)
    seen = np.arange(M) != 7
    view = View(np.where(seen, y, np.nan), {"x": Dense(a)}, model, "v", mask="nan")
    left = np.isin(np.arange(M), [2, 3, 7, 9])
    obs, fold = joint_observations([view]), Fold(np.arange(12), left)
    denoiser = prior(kind, cov)
    if kind == "low rank":
        denoiser = GaussianMixture(
            denoiser.log_weights,
            denoiser.means,
            denoiser.basis[:, :, 1:],
            denoiser.variances[:, 1:],
            denoiser.floor,
            (M,),
        )
    part, density = predict(
        {"x": denoiser}, obs, fold, np.zeros(M, int), jax.random.key(0), CONFIG, 800
    )
    total = (a @ cov @ a.T + own)[np.ix_(seen, seen)]
    expected = log_density(total, y[:, seen], left[seen])
    np.testing.assert_allclose(density, expected, atol=2e-2)
    mean, rest = conditional(total, y[:, seen], left[seen])
    assert part.seen[0].tolist() == [True, True, False, True]
    got = part.draws[:, :, part.seen[0]]
    z = (got.mean(axis=0) - mean) / np.sqrt(np.diag(rest) / 800)
    assert np.sqrt(np.mean(z**2)) < 1.4
    found = np.mean([np.cov(got[:, i].T) for i in range(12)], axis=0)
    np.testing.assert_allclose(found, rest, atol=0.08 * np.max(rest))


# Residuals


def exchangeable(rng, kind, n, f, s=39):
    shape = (s + 1, n, f)
    z = rng.normal(size=shape) + rng.normal(size=(s + 1, n, 1))
    x = {"normal": z, "heavy": np.sinh(2 * z), "two modes": np.sign(z) + 0.01 * z}[kind]
    x = x * np.exp(rng.normal(size=(n, f))) + 10 * rng.normal(size=(n, f))
    return x[0], x[1:]


@pytest.mark.parametrize("kind", ["normal", "heavy", "two modes"])
def test_values_that_are_like_their_draws_raise_no_alarm(kind):
    found, inside = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        y, draws = exchangeable(rng, kind, 100, 6)
        seen = rng.uniform(size=y.shape) > 0.2
        part = LeftOut(
            np.arange(100), np.arange(6), seen, np.where(seen, y, 0), draws, np.ones(5, bool)
        )
        r = examine([part])
        found += bool(len(r.bad) or r.correlated or r.beyond > r.expected)
        inside.append(r.coverage)
    assert found <= 1
    z = np.array([(c.value - 0.9) / c.error for c in inside])
    assert abs(z.mean()) < 0.5
    assert 0.6 < z.std() < 1.4


def checked(kind, seed=0, n=2000, std=0.5):
    """The check of the right prior, of data of another `kind`."""
    rng = np.random.default_rng(seed)
    cov, j = covariance(3.0), np.arange(M)
    x, noise = draws_of(rng, cov, n), rng.normal(size=(n, M))
    y = x + 0.5 * noise
    if kind == "source":
        y = y + 0.7 * rng.normal(size=(n, 1)) * np.sin(j)
    if kind == "correlated":
        y = x + 0.5 * draws_of(rng, covariance(1.5), n)
    if kind == "detector":
        y = x + 0.3 * np.maximum(x, 0) ** 2 + 0.5 * noise
    if kind == "offset":
        y[:, 3] += 0.8
    if kind == "gain":
        y *= np.exp(0.5 * rng.normal(size=(n, 1)))
    if kind == "far":
        y[::50] *= 30
    problem = Problem([Source("x", (M,))], [View(y, {"x": Identity((M,))}, std, name="v")])
    config = FitConfig(seed=seed)
    return predictive_checks(
        {"x": gaussian(np.zeros(M), cov)}, prepare(problem, config), config, [[("v", (M,))]]
    ).views[0]


def test_a_right_model_raises_no_alarm_and_is_as_good_as_the_linear_filter():
    found = [checked("right", seed) for seed in range(20)]
    assert [f.warning for f in found] == [""] * 20
    gains = np.array([f.gain.value for f in found])
    assert 0 < gains.mean() < 0.02
    assert np.mean([f.residuals.coverage.value for f in found]) == pytest.approx(0.9, abs=0.01)
    cov = covariance(3.0) + 0.25 * np.eye(M)
    alone = [stats.norm.logpdf(0, 0, 1 / np.sqrt(p)) - 0.5 for p in np.diag(np.linalg.inv(cov))]
    best = np.mean(alone) + np.log(0.5)  # of one entry given all others, in units of the noise
    assert best - 0.2 < np.mean([f.log_score for f in found]) < best


@pytest.mark.parametrize(
    ("kind", "std", "words"),
    [
        ("right", 0.25, "worse than a linear filter"),
        ("right", 1.0, "worse than a linear filter"),
        ("source", 0.5, "worse than a linear filter"),
        ("correlated", 0.5, "worse than a linear filter"),
        ("detector", 0.5, "unlike all of their predictions"),
        ("offset", 0.5, "entry 3 is mispredicted"),
        ("gain", 0.5, "unlike all of their predictions"),
    ],
)
def test_wrong_models_raise_an_alarm(kind, std, words):
    assert words in checked(kind, std=std).warning


def test_intervals_that_are_too_narrow_or_too_wide_are_told():
    narrow, wide = checked("right", std=0.02), checked("right", std=2.0)
    assert narrow.residuals.coverage.value < 0.85
    assert wide.residuals.coverage.value > 0.97
    assert "90% intervals of entries that are left out hold" in narrow.warning
    assert "look for noise" in narrow.warning
    assert "hold 100%" in wide.warning


def test_observations_far_from_their_predictions_are_named_by_their_number():
    found, rng = checked("far").residuals.far, np.random.default_rng(0)
    held = np.flatnonzero(rng.permutation(2000) < 200)
    assert set(found) == set(np.flatnonzero(held % 50 == 0))


# In a fit


def small_problem(count=300, dims=M, seed=0, **options):
    rng = np.random.default_rng(seed)
    y = draws_of(rng, covariance(3.0, dims) + 0.25 * np.eye(dims), count)
    return Problem(
        [Source("x", (dims,))], [View(y, {"x": Identity((dims,))}, 0.5, name="v", **options)]
    )


def test_a_fit_ends_with_its_checks_and_they_are_the_same_when_made_anew(tmp_path):
    problem = small_problem()
    separator = Separator(problem, SMALL).fit(tmp_path, progress=False)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    checks = separator.predictive_checks()
    assert checks.metrics.items() <= last.items()
    assert 0.8 < last["predictive_coverage_v"] < 1
    assert last["predictive_log_score_v"] == pytest.approx(last["linear_log_score_v"], abs=0.1)
    again = Separator.load(tmp_path, problem=problem).predictive_checks()
    assert again.metrics == checks.metrics
    assert checks.table() == again.table()
    resumed = Separator(problem, SMALL).fit(tmp_path, resume=True, progress=False)
    assert resumed.predictive_checks().metrics == checks.metrics
    assert resumed.metrics[-1] == last


def test_priors_that_predict_badly_are_warned_of(caplog):
    problem = small_problem(3000)
    wrong = View(problem.views[0].observations, {"x": Identity((M,))}, 3.0, name="v")
    with caplog.at_level(logging.WARNING, logger="dichroic"):
        separator = Separator(Problem(problem.sources, [wrong]), SMALL).fit(progress=False)
    (sentence,) = separator.predictive_checks().warnings
    assert sentence in caplog.messages
    assert sentence.startswith(
        "view 'v': the fitted priors predict entries that are left out worse"
    )
    assert "; look for noise" in sentence


def test_what_cannot_be_checked_says_why():
    few = Separator(small_problem(60), SMALL).fit(progress=False).predictive_checks()
    assert few.table() == "v: not checked: 6 held-out observations, fewer than 16"
    one = Separator(small_problem(300, dims=1), SMALL).fit(progress=False).predictive_checks()
    assert "observations of one entry" in one.table()
    mask = np.zeros((300, M))
    mask[:, 0] = 1
    alone = Separator(small_problem(300, mask=mask), SMALL).fit(progress=False)
    assert "observations of one entry" in alone.predictive_checks().table()
    assert (few.metrics, few.warnings, one.warnings) == ({}, (), ())
    with pytest.raises(RunError, match="need the problem"):
        alone.with_sources({"y": "x"}).predictive_checks()


def test_views_of_one_group_are_checked_together_and_entries_named_by_view():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    y, z = x + 0.3 * rng.normal(size=x.shape), x[:, :4] + 0.3 * rng.normal(size=(400, 4))
    z[:, 2] += 3 * np.sign(rng.normal(size=400))
    views = [
        View(y, {"x": Identity((6,))}, 0.3, "a", group="g"),
        View(
            z.reshape(400, 2, 2), {"x": Dense(np.eye(6)[:4], out_shape=(2, 2))}, 0.3, "b", group="g"
        ),
    ]
    problem = Problem([Source("x", (6,))], views)
    cov = np.cov(x.T)
    config = FitConfig()
    shapes = [[("a", (6,)), ("b", (2, 2))]]
    checks = predictive_checks(
        {"x": gaussian(np.zeros(6), cov)}, prepare(problem, config), config, shapes
    )
    assert checks.views[0].view == "a+b"
    assert 8 in checks.views[0].residuals.bad
    assert "(1, 0) of 'b'" in checks.warnings[0]


def test_networks_have_no_log_score_and_are_judged_by_the_mean_square_error():
    settings = {
        **SMALL,
        "diffusion": {"iterations": 1, "steps": 2, "width": 8, "depth": 1, "keep": "all"},
    }
    separator = Separator(small_problem(), settings).fit(progress=False)
    (found,) = separator.predictive_checks().views
    assert found.residuals.judged == 30
    assert np.isnan(found.log_score)
    assert np.isfinite([found.rms, found.linear_rms, found.gain.value]).all()
    assert abs(found.gain.value) < 0.2
    assert "predictive_log_score_v" not in found.metrics
    assert len(found.row) == len(HEADER)


def test_no_views_make_an_empty_table():
    assert PredictiveChecks(()).table() == ""
