"""Observations that float32 does not hold relative to their noise: handled exactly, or refused."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic import Identity, Problem, Separator, Source, View
from dichroic.benchmark.baselines import ClvmLinear
from dichroic.config import FitConfig
from dichroic.errors import DataError, DichroicWarning, FormatError
from dichroic.io import load_problem
from dichroic.learning.data import prepare
from dichroic.learning.fit import InitialPriors
from dichroic.operators import Dense, Diagonal, FunctionOperator, Learnable, Scale
from dichroic.operators.double_precision import adjoints, images, rounding
from dichroic.operators.noise import IsotropicNoise
from dichroic.operators.scaling import check_scaling, offset_parameters, offsets_of
from dichroic.problem.identifiability import advice
from dichroic.problem.offsets import NEEDED, offsets
from dichroic.problem.screening import screened
from dichroic.separation.streaming import separate_to_zarr

N, D, STD = 300, 8, 0.05
SOURCES = [Source("wave", (D,)), Source("pulse", (D,))]
FAST = {
    "mixture": {"components": 2, "gaussian_iterations": 3, "iterations": 1, "final_iterations": 1},
    "diffusion": {"iterations": 0},
}
A = Identity((D,))


def signals(seed=0, n=N):
    """Waves with noise, waves and pulses with noise, and the pulses."""
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, D)
    of = lambda low, high: rng.uniform(low, high, (n, 1))
    wave = lambda: np.sin(2 * np.pi * (t + of(0, 1))) * of(0.5, 1.5)
    pulse = np.exp(-(((t - of(0.3, 0.7)) / 0.1) ** 2)) * of(1, 2)
    noise = lambda: STD * rng.normal(size=(n, D))
    return wave() + noise(), wave() + pulse + noise(), pulse


def problem(alone, mixed, wave=A, pulse=A, noise=STD, **stated):
    views = [
        View(alone, {"wave": wave}, noise, name="alone", **stated),
        View(mixed, {"wave": wave, "pulse": pulse}, noise, name="mixed", **stated),
    ]
    return Problem(SOURCES, views)


def fitted(alone, mixed, **stated):
    return Separator(problem(alone, mixed, **stated), FAST).fit(progress=False)


def decibels(mean, truth):
    return 10 * np.log10((truth**2).sum() / ((mean - truth) ** 2).sum())


@pytest.fixture(scope="module")
def plain():
    """Signals, and what is found without an offset."""
    alone, mixed, pulse = signals()
    return alone, mixed, pulse, fitted(alone, mixed)


@pytest.fixture(scope="module")
def high(plain):
    """What is found with an offset of 10⁸."""
    return fitted(plain[0] + 1e8, plain[1] + 1e8)


def prior_of(separator, name):
    return np.asarray(separator.denoisers[name].location)


# What is found


@pytest.mark.parametrize("offset", [1e6, 1e8, np.linspace(-1e7, 1e7, D)])
def test_an_offset_changes_nothing_but_the_source_that_has_it(plain, offset):
    alone, mixed, pulse, without = plain
    separator = fitted(alone + offset, mixed + offset)
    assert set(offsets_of(separator.operators)) == {"wave"}
    a, b = (s.separate("mixed", n_draws=4) for s in (without, separator))
    assert abs(decibels(a.mean["pulse"], pulse) - decibels(b.mean["pulse"], pulse)) < 0.2
    assert abs(a.chi2.mean() - b.chi2.mean()) < 0.02
    assert b.draws["wave"].dtype == np.float64 and b.draws["pulse"].dtype == np.float32
    np.testing.assert_allclose(b.mean["wave"] - offset, a.mean["wave"], atol=0.1)
    assert abs(b.std["wave"].mean() - a.std["wave"].mean()) < 0.01
    drawn = separator.sample_prior("wave", 200) - offset
    assert np.abs(drawn.mean()) < 0.3 and 0.4 < drawn.std() < 1.1


def test_without_need_nothing_changes(plain):
    alone, mixed, _, without = plain
    assert not without.operators
    again = fitted(alone.astype(np.float32), mixed.astype(np.float32))
    for name in ("wave", "pulse"):
        np.testing.assert_array_equal(prior_of(again, name), prior_of(without, name))


def test_integers_beyond_those_of_float32_are_exact(plain):
    alone, mixed, pulse, _ = plain
    counts = [np.round(y / STD * 4).astype(np.int64) for y in (alone, mixed)]
    low = fitted(*counts, noise=4.0)
    high = fitted(counts[0] + 2**30, (counts[1] + 2**30).astype(np.int32), noise=4.0)
    found = [s.separate("mixed", n_draws=4).mean["pulse"] * STD / 4 for s in (low, high)]
    assert abs(decibels(found[0], pulse) - decibels(found[1], pulse)) < 0.2


def test_of_a_model_on_disk_and_of_other_names_too(plain, high, tmp_path):
    alone, mixed, *_ = plain
    high.save(tmp_path / "model")
    loaded = Separator.load(tmp_path / "model")
    view = View(mixed[:20] + 1e8, {"wave": A, "pulse": A}, STD)
    want = high.separate(view, n_draws=2)
    got = loaded.separate(view, n_draws=2)
    np.testing.assert_array_equal(got.draws["wave"], want.draws["wave"])
    other = loaded.with_sources({"a": "wave", "b": "wave"})
    two = View(alone[:20] + 2e8, {"a": A, "b": A}, STD)
    total = sum(other.separate(two, n_draws=2).draws.values())
    assert np.abs(total - alone[:20] - 2e8).max() < 1


def test_parts_of_a_view_give_the_same_bits(high, tmp_path):
    whole = high.separate("mixed", n_draws=2)
    for first, part in high.stream("mixed", n_draws=2, chunk=100):
        stop = first + part.chi2.shape[1]
        np.testing.assert_array_equal(part.draws["wave"], whole.draws["wave"][:, first:stop])
    zarr = pytest.importorskip("zarr")
    separate_to_zarr(tmp_path / "out.zarr", high, "mixed", n_draws=2, chunk=128)
    stored = zarr.open_group(tmp_path / "out.zarr", mode="r")
    np.testing.assert_array_equal(stored["draws/wave"][:], whole.draws["wave"])
    assert stored["draws/pulse"].dtype == np.float32


def test_views_in_files_give_what_those_in_memory_do(plain, high, tmp_path):
    alone, mixed, *_ = plain
    for name, y in (("alone", alone), ("mixed", mixed)):
        np.save(tmp_path / f"{name}.npy", y + 1e8)
    (tmp_path / "problem.yaml").write_text(
        "sources: {wave: {shape: [8]}, pulse: {shape: [8]}}\n"
        "views:\n"
        "  alone: {observations: alone.npy, noise: 0.05, operators: {wave: identity}}\n"
        "  mixed: {observations: mixed.npy, noise: 0.05, operators: {wave: identity, pulse: identity}}\n"
    )
    stated, _ = load_problem(tmp_path / "problem.yaml", stored=True)
    stored = Separator(stated, FAST).fit(tmp_path / "run", progress=False, memory=2**34)
    np.testing.assert_allclose(prior_of(stored, "wave"), prior_of(high, "wave"), atol=0.02)
    loaded = Separator.load(tmp_path / "run")
    view = View(mixed[:9] + 1e8, {"wave": A, "pulse": A}, STD)
    found = loaded.separate(view)
    total = found.draws["wave"] + found.draws["pulse"]
    assert np.abs(total - mixed[:9] - 1e8).max() < 0.5
    again = Separator(stated, FAST).fit(tmp_path / "run", progress=False, memory=2**34, resume=True)
    np.testing.assert_array_equal(prior_of(again, "wave"), prior_of(stored, "wave"))


def test_a_fit_that_goes_on_from_another_keeps_its_offsets(plain, high):
    alone, mixed, *_ = plain
    config = FitConfig.from_dict({"diffusion": {"iterations": 1}})
    start, near = (
        InitialPriors(high.denoisers, high.operators),
        problem(alone + 1e8 + 3, mixed + 1e8 + 3),
    )
    start.check(near, config)
    data = prepare(near, config, known=start.offsets(near))
    state = start.state(near, data)
    for values in (data.operators, state.operators, state.best_operators):
        np.testing.assert_array_equal(
            offsets_of(values)["wave"], offsets_of(high.operators)["wave"]
        )
    elsewhere = Separator(problem(alone + 3e8, mixed + 3e8), config)
    with pytest.raises(DataError, match="far from those of the fit"):
        elsewhere.fit(progress=False, start=high)


def test_scores_against_the_truth_are_those_without_an_offset(plain):
    alone, mixed, pulse, _ = plain
    found = []
    for offset in (0, 1e8):
        truth = {"pulse": pulse, "wave": mixed - pulse + offset}
        views = list(problem(alone + offset, mixed + offset).views)
        views[1] = View(mixed + offset, views[1].operators, STD, name="mixed", truth=truth)
        s = Separator(Problem(SOURCES, views), FAST).fit(progress=False)
        found.append(s.metrics[-1]["psnr_wave_mixed"])
    assert abs(found[0] - found[1]) < 0.2


# What is looked at


def test_values_under_masks_and_outliers_ask_for_nothing(plain):
    alone, mixed, *_ = plain
    mask = np.random.default_rng(0).random(alone.shape) < 0.7
    hidden = np.where(mask, alone, 1e9)
    assert not offsets(problem(hidden, mixed, mask=mask)).parameters
    far = alone.copy()
    far[5] = 1e15
    assert not offsets(problem(far, mixed)).parameters
    hidden = np.where(mask, alone + 1e8, np.nan)
    found = offsets(problem(hidden, np.where(mask, mixed + 1e8, 1e30), mask=mask)).parameters
    np.testing.assert_allclose(offsets_of(found)["wave"], 1e8, rtol=1e-6)


def test_outliers_are_found_on_top_of_an_offset(plain):
    alone, mixed, *_ = plain
    far = alone + 1e8
    far[7] += 300
    found = screened(problem(far, mixed + 1e8))
    assert found[0].far.number.tolist() == [7] and not found[0].notes
    assert len(found[1].far.number) == 0 and not found[1].notes


def test_it_is_the_noise_that_decides(plain):
    alone, mixed, *_ = plain
    level = NEEDED * STD * 2**23
    assert not offsets(problem(alone + 0.4 * level, mixed)).parameters
    assert offsets(problem(alone + 2.5 * level, mixed + 2.5 * level)).parameters
    each = IsotropicNoise(np.full(N, STD * 10))
    assert not offsets(problem(alone + 2.5 * level, mixed + 2.5 * level, noise=each)).parameters


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_units_do_not_matter(plain, scale):
    alone, mixed, *_ = plain
    stated = problem(scale * (alone + 1e8), scale * (mixed + 1e8), noise=scale * STD)
    found = offsets_of(offsets(stated).parameters)
    np.testing.assert_allclose(found["wave"] / scale, 1e8, rtol=1e-6)
    assert "pulse" not in found


def test_operators_of_each_observation(plain):
    alone, mixed, *_ = plain
    amplitude = np.random.default_rng(0).choice([0.5, 1, 2], N)
    op, by = Scale((D,), amplitude), amplitude[:, None]
    found = offsets(problem(by * (alone + 1e8), by * (mixed + 1e8), wave=op, pulse=op)).parameters
    np.testing.assert_allclose(offsets_of(found)["wave"], 1e8, rtol=1e-6)


# What is refused


MATRIX = np.random.default_rng(3).normal(size=(D, D))


@pytest.mark.parametrize("offset", [1e7, 1e8])
def test_what_operators_are_too_rough_for_is_refused(plain, offset):
    alone, mixed, *_ = plain
    seen = [y @ MATRIX.T for y in (alone + offset, mixed + offset)]
    for op in (Dense(MATRIX), FunctionOperator(lambda x: jnp.asarray(MATRIX) @ x, in_shape=(D,))):
        with pytest.raises(DataError, match="'alone'.* at entry .*rounding of the operators"):
            Separator(problem(*seen, wave=op, pulse=op), FAST).fit(progress=False)
    halves = np.round(2 * MATRIX) / 2
    seen = [y @ halves.T for y in (alone + offset, mixed + offset)]
    assert offsets(problem(*seen, wave=Dense(halves), pulse=Dense(halves))).parameters


def test_a_range_that_no_offset_accounts_for_is_refused_or_warned_of(plain):
    alone, mixed, *_ = plain
    wide = alone.copy()
    wide[:, 3] *= 1e7
    with pytest.raises(DataError, match=r"'alone'.*float32.*entry 3 .* times the noise.*subtract"):
        fitted(wide, mixed)
    wide[:, 3] /= 100
    assert any("times the noise" in text for text in advice(problem(wide, mixed)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_was_rounded_before_is_refused(plain, dtype):
    alone, mixed, *_ = plain
    level = 1e7 if dtype == np.float32 else 1e3
    given = [np.asarray(y + level, dtype) for y in (alone, mixed)]
    with pytest.raises(DataError, match="how the observations are given"):
        fitted(*given)


def test_learned_operators_are_refused(plain):
    alone, mixed, *_ = plain
    views = [
        View(alone + 1e8, {"wave": A}, STD, name="alone"),
        View(mixed + 1e8, {"wave": Learnable(Scale((D,), 1.0), "gain"), "pulse": A}, STD),
    ]
    with pytest.raises(DataError, match=r"to be learned \(gain\).*subtract the mean"):
        Separator(Problem(SOURCES, views), FAST).fit(progress=False)


def test_sources_with_bounds_keep_their_values(plain):
    alone, mixed, *_ = plain
    stated = problem(alone + 1e8, mixed + 1e8)
    bounded = Separator(stated, {**FAST, "bounds": {"pulse": [0, None]}}).fit(progress=False)
    draws = bounded.separate("mixed").draws
    assert draws["pulse"].min() >= 0 and set(offsets_of(bounded.operators)) == {"wave"}
    with pytest.raises(DataError, match=r"bounds \(wave\).*bounds of what is left"):
        Separator(stated, {**FAST, "bounds": {"wave": [0, None]}}).fit(progress=False)


def test_baselines_say_that_they_have_no_offsets(plain):
    alone, mixed, *_ = plain
    with pytest.raises(DataError, match="CLVM-linear.*subtract the mean"):
        ClvmLinear(problem(alone + 1e8, mixed + 1e8)).fit(progress=False)


def test_a_new_view_from_elsewhere_is_refused(plain, high):
    _, mixed, _, without = plain
    view = lambda y: View(y, {"wave": A, "pulse": A}, STD)
    near, low = high.separate(view(mixed[:20] + 1e8 + 9)), without.separate(view(mixed[:20] + 9))
    np.testing.assert_allclose(near.mean["wave"] - 1e8, low.mean["wave"], atol=0.5)
    for known, y in ((high, mixed[:20]), (without, mixed[:20] + 1e8)):
        with pytest.raises(DataError, match="times the noise"):
            known.separate(view(y))
    some = mixed[:20] + 1e8
    some[3] += 1e7
    with pytest.warns(DichroicWarning, match="1 of 20 observations"):
        high.separate(view(some))


def test_offsets_on_disk_are_checked():
    with pytest.raises(FormatError, match="its offset"):
        check_scaling(offset_parameters({"a": np.ones(3)}), {"a": (2,)}, "here")


# Products in double precision


def test_products_are_those_of_the_operators_as_they_are(rng):
    matrix = rng.normal(size=(3, 5, 4)).astype(np.float32)
    ops = {"a": Dense(matrix), "b": Diagonal(np.ones(5, np.float32))}
    x = {"a": 1e8 * rng.normal(size=4), "b": 1e8 * rng.normal(size=5)}
    got = images(ops, x)
    want = matrix.astype(float) @ x["a"] + x["b"]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-13)
    v = rng.normal(size=(3, 5))
    np.testing.assert_allclose(
        adjoints(ops, v)["a"], np.einsum("nij,ni->j", matrix.astype(float), v), rtol=1e-12
    )


def test_what_the_rounding_of_an_operator_changes(rng):
    matrix, x = rng.normal(size=(200, 20)), {"a": np.full(20, 1e7)}
    true = (matrix.astype(np.float32).astype(float) - matrix) @ x["a"]
    estimate = rounding({"a": Dense(matrix)}, x)
    assert 0.7 < np.sqrt(np.mean(true**2) / np.mean(estimate**2)) < 1.4
    exact = {"a": Scale((20,), 0.5)}
    assert np.all(rounding(exact, x) == 0)


def test_what_single_precision_alone_can_evaluate_is_refused(plain):
    alone, mixed, *_ = plain
    op = FunctionOperator(lambda x: x.astype(jnp.float32), in_shape=(D,))
    with pytest.raises(DataError, match="double precision"):
        offsets(problem(alone + 1e8, mixed + 1e8, wave=op))


def test_functions_work_in_single_precision_afterwards():
    matrix = np.eye(3) * 0.5
    fn = FunctionOperator(lambda x: jnp.asarray(matrix) @ x, in_shape=(3,))
    x = {"a": np.full(3, 1e8)}
    assert np.all(adjoints({"a": fn}, images({"a": fn}, x))["a"] == 0.25e8)
    assert np.all(rounding({"a": fn}, x) == 0)
    assert jnp.asarray(matrix).dtype == np.float32
    assert np.all(jax.jit(fn.mv)(jnp.ones(3)) == 0.5)


def test_operators_of_draws_in_double_precision():
    x = np.full((2, 3, D), 1e8 + 0.25)
    got = Scale((D,), 0.5).each(x)
    assert got.dtype == np.float64 and np.all(got == 0.5 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Scale((D,), 0.5).each(jax.numpy.ones((3, D))).dtype == np.float32
