"""Outliers, common values and copies: those that are there are named, and what is legitimate is left alone."""

import warnings

import numpy as np
import pytest
import yaml

from dichroic import DichroicWarning, FitConfig, Identity, Problem, Separator, Source, View
from dichroic.benchmark.problems.digits import digits_problem
from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.io import load_problem
from dichroic.learning.data import prepare
from dichroic.operators.noise import DiagonalNoise
from dichroic.problem.screening import left_out, screened, suspicions

NOISE = 0.05
SHORT = {
    "mixture": {"components": 2, "gaussian_iterations": 2, "iterations": 1, "final_iterations": 1},
    "joint_iterations": 0,
    "diffusion": {"iterations": 0},
}


def series(rng, n, amplitude=None):
    """A wave of random phase and a pulse somewhere, `(n, 8)` each; `amplitude` gives those of `n` observations."""
    t = np.linspace(0, 1, 8)
    amplitude = amplitude or (lambda: rng.uniform(0.5, 1.5, (n, 1)))
    wave = np.sin(2 * np.pi * (t + rng.uniform(size=(n, 1)))) * amplitude()
    pulse = np.exp(-(((t - rng.uniform(0.3, 0.7, (n, 1))) / 0.1) ** 2)) * 1.5 * amplitude()
    return wave, pulse


def mixed(rng, n=1500, **options):
    return sum(series(rng, n, **options)) + NOISE * rng.normal(size=(n, 8))


def one_view(y, noise=NOISE, **options):
    y = np.asarray(y, np.float32)
    op = Identity(y.shape[1:])
    return Problem([Source("x", y.shape[1:])], [View(y, {"x": op}, noise, name="mixed", **options)])


def far(problem, view=0):
    return left_out(problem, "exclude")[view].tolist()


# What is far


@pytest.mark.parametrize("share", [0.003, 0.01])
@pytest.mark.parametrize("levels", [100, 1e3, 1e6])
def test_wrong_observations_are_found_and_no_others(rng, share, levels):
    y = mixed(rng)
    bad = np.sort(rng.choice(1500, round(share * 1500), replace=False))
    y[bad] += levels * NOISE * rng.normal(size=(len(bad), 8))
    assert far(one_view(y)) == bad.tolist()


@pytest.mark.parametrize("levels", [1e3, 1e6])
def test_a_single_wrong_entry_is_named(rng, levels):
    y = mixed(rng)
    y[42, 3] += levels * NOISE
    (text,) = suspicions(one_view(y))
    assert text.startswith("view 'mixed': 1 of 1,500 observations is far from all others")
    assert "42 (at entry 3 alone)" in text
    assert "mask entries that are wrong" in text


def test_one_wrong_sample_of_a_thousand_is_named(rng):
    weights, shapes = 10 * rng.normal(size=(300, 5)), rng.normal(size=(5, 1000))
    y = weights @ shapes + 0.1 * rng.normal(size=(300, 1000))
    y[17, 500] += 10.0  # as large as the signal, a hundred levels of the noise
    (text,) = suspicions(one_view(y, 0.1))
    assert "17 (at entry 500 alone)" in text


def test_the_entry_of_an_image_and_of_a_co_observed_view_is_named(rng):
    y = mixed(rng).reshape(-1, 2, 4)
    y[7, 1, 2] = 1e4
    assert "7 (at entry (1, 2) alone)" in suspicions(one_view(y))[0]
    views = [
        View(mixed(rng), {"x": Identity((8,))}, NOISE, name="first", group="g"),
        View(y.reshape(-1, 8), {"x": Identity((8,))}, NOISE, name="second", group="g"),
    ]
    together = Problem([Source("x", (8,))], views)
    assert far(together) == [7]
    assert "7 (at entry 6 alone of view 'second')" in suspicions(together)[0]


def test_what_is_masked_is_not_looked_at(rng):
    y = mixed(rng)
    y[42, 3] = 1e6
    mask = np.ones(y.shape)
    mask[42, 3] = 0
    assert far(one_view(y, mask=mask)) == []
    y[42, 3] = np.nan
    y[rng.random(y.shape) < 0.3] = np.nan
    assert far(one_view(y, mask="nan")) == []


def test_an_observation_with_much_stated_noise_is_not_far(rng):
    y, variance = mixed(rng), np.full((1500, 8), NOISE**2)
    variance[42] = 1e4
    y[42] += 100 * rng.normal(size=8)
    assert far(one_view(y, DiagonalNoise(variance))) == []
    assert far(one_view(y)) == [42]


AMPLITUDES = {
    "exponential": lambda rng, n: rng.exponential(1, (n, 1)),
    "lognormal": lambda rng, n: np.exp(rng.normal(size=(n, 1))),
    "Student": lambda rng, n: np.abs(rng.standard_t(3, (n, 1))),
    "rare": lambda rng, n: rng.uniform(0.5, 1.5, (n, 1)) * (rng.random((n, 1)) < 0.02),
    "sparse": lambda rng, n: rng.exponential(1, (n, 1)) * (rng.random((n, 1)) < 0.05),
}


@pytest.mark.parametrize("kind", AMPLITUDES)
def test_heavy_tails_and_rare_sources_are_not_far(kind):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        y = mixed(rng, amplitude=lambda rng=rng: AMPLITUDES[kind](rng, 1500))
        assert far(one_view(y)) == []


def test_galaxies_of_log_normal_fluxes_are_not_far():
    axis = np.arange(16) - 7.5
    for seed in range(3):
        rng = np.random.default_rng(seed)
        width, flux = rng.uniform(1, 3, 1000), np.exp(rng.normal(size=1000))
        r2 = (axis[:, None] ** 2 + axis**2)[None] / width[:, None, None] ** 2
        images = flux[:, None, None] * np.exp(-r2 / 2) + 0.01 * rng.normal(size=(1000, 16, 16))
        assert far(one_view(images, 0.01)) == []


@pytest.mark.parametrize("seed", range(3))
def test_the_problems_of_the_project_have_no_outliers(seed):
    problems = [manifold_problem(seed=seed, count=1000), digits_problem(seed=seed, count=500)]
    problems += [manifold_problem(seed=seed, count=1000, f_mix=0.1)]
    for problem in problems:
        assert [len(x) for x in left_out(problem, "exclude")] == [0] * len(problem.views)
        assert suspicions(problem) == ()


def test_more_than_a_few_are_said_and_kept(rng):
    y = mixed(rng)
    y[:75] *= 1e6
    problem = one_view(y)
    assert far(problem) == []
    (text,) = suspicions(problem)
    assert "5.0% of the observations are more than 1,000 times as far" in text
    assert "such as 0, 1, 2" in text


# What a fit does


def glitches(rng, n=600):
    """Two views, the second with four wrong observations, and those."""
    wave, pulse = series(rng, n)
    noise = lambda: NOISE * rng.normal(size=(n, 8))
    y, bad, op = wave + pulse + noise(), [3, 42, 97, 500], Identity((8,))
    y[bad] += 1e5 * rng.normal(size=(4, 8))
    views = [View(series(rng, n)[0] + noise(), {"wave": op}, NOISE, name="alone")]
    views.append(View(y, {"wave": op, "pulse": op}, NOISE, name="mixed", truth={"pulse": pulse}))
    return Problem([Source("wave", (8,)), Source("pulse", (8,))], views), bad


def test_outliers_are_left_out_of_training_and_of_scores(rng):
    problem, bad = glitches(rng)
    data, all_of_it = (prepare(problem, FitConfig(outliers=o)) for o in ("exclude", "keep"))
    count = lambda d: d.train[1].count + d.test[1].count
    assert (count(data), count(all_of_it)) == (600 - len(bad), 600)
    assert np.abs(np.concatenate([data.train[1].y, data.test[1].y])).max() < 10
    assert len(data.truth[1]["pulse"]) == data.test[1].count
    assert (data.train[0].count, all_of_it.train[0].count) == (540, 540)


def test_without_outliers_the_split_is_as_it_was(rng):
    problem = one_view(mixed(rng))
    some, everything = (prepare(problem, FitConfig(outliers=o)) for o in ("exclude", "keep"))
    np.testing.assert_array_equal(some.train[0].y, everything.train[0].y)
    np.testing.assert_array_equal(some.test[0].y, everything.test[0].y)


def test_outliers_do_not_spoil_a_fit_of_the_others(rng):
    problem, bad = glitches(rng)
    separator = Separator(problem, SHORT)
    with pytest.warns(DichroicWarning, match="4 of 600 observations are far") as caught:
        separator.fit(progress=False)
    assert sum("are far from all others" in str(w.message) for w in caught) == 1
    found, truth = separator.separate("mixed", n_draws=4), problem.views[1].truth["pulse"]
    good = np.setdiff1d(np.arange(600), bad)
    assert found.mean["pulse"].shape == truth.shape  # outliers are separated too
    error = (found.mean["pulse"] - truth)[good]
    assert 10 * np.log10(np.sum(truth[good] ** 2) / np.sum(error**2)) > 8


def test_observations_in_files_are_looked_at_too(rng, tmp_path):
    y = mixed(rng, 6000)
    bad = [5, 1234, 5999]
    y[bad] += 1e4 * rng.normal(size=(3, 8))
    np.save(tmp_path / "y.npy", y.astype(np.float32))
    view = {"observations": "y.npy", "operators": {"x": "identity"}, "noise": NOISE}
    stated = {"sources": {"x": {"shape": [8]}}, "views": {"mixed": view}}
    (tmp_path / "problem.yaml").write_text(yaml.safe_dump(stated))
    in_files, _ = load_problem(tmp_path / "problem.yaml", stored=True)
    in_memory, _ = load_problem(tmp_path / "problem.yaml")
    assert far(in_files) == far(in_memory) == bad
    assert suspicions(in_files) == suspicions(in_memory)
    data = prepare(in_files, FitConfig(), 2**31, tmp_path)
    want = prepare(in_memory, FitConfig())
    assert data.train[0].count == want.train[0].count
    np.testing.assert_array_equal(next(data.train[0].blocks()).y, want.train[0].y[:4096])
    np.testing.assert_array_equal(data.test[0].y, want.test[0].y)


def test_a_problem_is_looked_at_once(rng):
    problem = one_view(mixed(rng))
    assert screened(problem) is screened(problem)


# Values and copies


def test_clipped_values_are_said(rng):
    y = np.clip(mixed(rng), -1, 1.5)
    low, high = suspicions(one_view(y))
    assert "of the entries are exactly -1, the smallest of its values: clipped" in low
    assert "of the entries are exactly 1.5, the largest of its values: clipped" in high
    assert f"{np.mean(y == 1.5):.1%}" in high
    (left,) = suspicions(one_view(np.where(y < 1.5, y, np.nan), mask="nan"))
    assert "exactly -1" in left


def test_values_that_were_filled_in_are_said(rng):
    y = mixed(rng)
    y[rng.random(y.shape) < 0.03] = 0
    (text,) = suspicions(one_view(y))
    assert "of the entries are exactly 0, one of its values: clipped, or filled in" in text


def test_counts_and_classes_are_not_clipped(rng):
    for y in (
        rng.poisson(0.5, (500, 8)),
        rng.poisson(1e4, (500, 8)),
        rng.integers(0, 17, (500, 8)),
    ):
        assert suspicions(one_view(y)) == ()


def test_sixteen_bit_samples_are_clipped_at_the_rail_alone(rng):
    y = np.round(mixed(rng, 3000) * 1e4)
    assert suspicions(one_view(y / 2**15)) == ()
    (text,) = suspicions(one_view(np.minimum(y, 1.2e4) / 2**15))
    assert "the largest" in text


def test_copies_are_said(rng):
    y = mixed(rng, 500)
    y[400:] = y[:100]
    (text,) = suspicions(one_view(y))
    assert "100 of 500 observations are exact copies of another" in text
    y[450:] = np.nan  # of these, nothing
    (text,) = suspicions(one_view(y, mask="nan"))
    assert "50 of 450 observations" in text


def test_a_fit_without_anything_suspicious_does_not_warn_of_it(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Separator(one_view(mixed(rng)), SHORT).fit(progress=False)
