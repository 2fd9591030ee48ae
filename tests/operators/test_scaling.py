"""Sources in units of their own: operators on them, and fits whose answers are known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from followers import KillAt, Killed
from scipy.stats import multivariate_normal

from dichroic import Problem, Separator, Source, View
from dichroic.errors import FormatError
from dichroic.inference.low_rank import moments
from dichroic.inference.low_rank_background import low_rank_log_evidence
from dichroic.inference.matrix_free import diagonal_of
from dichroic.learning.data import prepare
from dichroic.learning.fit import InitialPriors
from dichroic.learning.mixture.initialisation import MIN_SCALE, chosen_scales, deviations
from dichroic.learning.mixture.low_rank_em import from_columns
from dichroic.operators import Dense, Diagonal, Identity, Learnable, Scale
from dichroic.operators.scaling import (
    check_scaling,
    renamed_scaling,
    scale_parameters,
    scaled_operators,
    scales_of,
    unscaled,
    without_scaling,
)
from dichroic.priors import gaussian

DIM, LOUD, NOISE, OWN = 150, 50, 0.3, 0.5
FIT = {
    "mixture": {
        "components": 2,
        "rank": 8,
        "gaussian_iterations": 3,
        "iterations": 1,
        "final_iterations": 1,
    },
    "diffusion": {"iterations": 0},
}


def case(count=1500, seed=0):
    """Numbers of which the first ones vary, together and each for itself, and the others are 0."""
    rng, basis = np.random.default_rng(seed), np.random.default_rng(9).normal(size=(3, LOUD))
    x = np.zeros((count, DIM))
    x[:, :LOUD] = rng.normal(size=(count, 3)) @ basis + OWN * rng.normal(size=(count, LOUD))
    y = x + NOISE * rng.normal(size=x.shape)
    cov = np.zeros((DIM, DIM))
    cov[:LOUD, :LOUD] = basis.T @ basis + OWN**2 * np.eye(LOUD)
    return x, View(y, {"a": Identity(DIM)}, NOISE, name="y", truth={"a": x}), cov


@pytest.fixture(scope="module")
def fits():
    """With numbers in the same units, and in units of what each varies by."""
    problem = Problem([Source("a", (DIM,))], [case()[1]])
    made = lambda units: {**FIT, "mixture": {**FIT["mixture"], "scaling": units}}
    return {u: Separator(problem, made(u)).fit(progress=False) for u in ("common", "per-entry")}


@pytest.mark.parametrize(
    "op", [Identity(4), Scale(4, 0.5), Dense(np.arange(12.0).reshape(3, 4)), Scale(4, 2.0) @ Diagonal(np.arange(4.0))]
)  # fmt: skip
def test_an_operator_acts_on_a_source_in_units(op, rng):
    s, other, u, v = jnp.asarray(rng.uniform(0.5, 2, size=(4, 4)), jnp.float32)
    seen = scaled_operators({"a": op, "b": op}, scale_parameters({"a": other, "c": s}))
    seen = scaled_operators(seen, scale_parameters({"a": s}))  # which replace those before
    np.testing.assert_allclose(seen["a"].mv(u), op.mv(s * u), rtol=1e-6)
    left = v[: seen["a"].out_shape[0]]
    np.testing.assert_allclose(left @ seen["a"].mv(u), seen["a"].rmv(left) @ u, rtol=1e-5)
    np.testing.assert_allclose(seen["b"].mv(u), op.mv(u))
    assert (diagonal_of(seen["a"]) is None) == (diagonal_of(op) is None)


def test_a_learned_gain_is_diagonal_in_units():
    op = scaled_operators(
        {"a": Learnable(Scale(3, 2.0), "gain")}, scale_parameters({"a": np.arange(3.0)})
    )["a"]
    np.testing.assert_allclose(diagonal_of(op), [0, 2, 4])


def test_units_are_kept_by_source_among_what_is_learned():
    values = {"gain": (jnp.ones(1),), **scale_parameters({"a": np.array([1.0, 2.0])})}
    assert list(scales_of(values)) == ["a"]
    assert list(without_scaling(values)) == ["gain"]
    assert sorted(scales_of(renamed_scaling(values, {"x": "a", "y": "a", "z": "b"}))) == ["x", "y"]
    x = unscaled({"a": np.ones((5, 2)), "b": np.ones(3)}, values)
    np.testing.assert_allclose(x["a"], [[1, 2]] * 5)
    np.testing.assert_allclose(x["b"], np.ones(3))


@pytest.mark.parametrize("units", [{"b": np.ones(2)}, {"a": np.ones(3)}, {"a": np.array([1.0, 0])}])
def test_units_that_are_none_of_a_source_are_refused(units):
    check_scaling(scale_parameters({"a": np.ones(2)}), {"a": (2,)}, "here")
    with pytest.raises(FormatError, match="here: is damaged: the units of"):
        check_scaling(scale_parameters(units), {"a": (2,)}, "here")


def test_deviations_are_those_of_a_gaussian():
    cov = np.diag([4.0, 1.0, 0.0, 1.0])
    want = np.sqrt(np.diag(cov) / 1.5)
    want[2] = MIN_SCALE
    np.testing.assert_allclose(deviations(gaussian(np.zeros(4), cov)), want, rtol=1e-4, atol=1e-4)


def test_units_are_chosen_where_some_numbers_vary_much_less():
    even, uneven = (gaussian(np.zeros(4), np.diag(v)) for v in ([1.0, 1, 2, 0.5], [1, 1, 0.01, 1]))
    both = {"a": even, "b": uneven}
    assert chosen_scales(both, "common") == {}
    assert list(chosen_scales(both, "per-entry")) == ["a", "b"]
    (name,) = chosen = chosen_scales(both, "auto")
    assert name == "b"
    np.testing.assert_array_equal(chosen["b"], deviations(uneven))


def test_a_fit_chooses_the_units_that_help(fits):
    separator = Separator(fits["per-entry"].problem, FIT).fit(progress=False)
    x = case(5, seed=1)[1]
    want = fits["per-entry"].separate(x).draws["a"]
    np.testing.assert_array_equal(separator.separate(x).draws["a"], want)


def test_bounds_are_compared_with_a_source_before_it_is_in_units(fits, monkeypatch):
    problem, compared = fits["per-entry"].problem, []
    keep = lambda priors, bounds: compared.append((list(priors), dict(bounds)))
    monkeypatch.setattr("dichroic.learning.phases.mixture.check_learned", keep)
    separator = Separator(problem, {**FIT, "bounds": {"a": [-9, 9]}}).fit(progress=False)
    assert list(scales_of(separator.operators)) == ["a"]
    assert compared == [(["a"], {"a": (-9, 9)}), ([], {"a": (-9, 9)})]


def test_the_evidence_in_units_is_that_of_the_source(rng):
    columns, s = rng.normal(size=(2, 6, 3)), rng.uniform(0.2, 3, size=6)
    mixture = from_columns(np.array([1.0, 2.0]), columns, 0.3, (6,))
    a, y = rng.normal(size=(4, 6)), rng.normal(size=(9, 4))
    obs = View(y, {"a": Dense(a)}, 0.2).prepare().at(scale_parameters({"a": s}))
    parts, (c, floor) = [], moments(mixture)
    for k, weight in enumerate(np.exp(mixture.log_weights)):
        cov = s[:, None] * (c[k, :, 1:] @ c[k, :, 1:].T + floor * np.eye(6)) * s
        normal = multivariate_normal(a @ (s * c[k, :, 0]), a @ cov @ a.T + 0.04 * np.eye(4))
        parts.append(np.log(weight) + normal.logpdf(y))
    want = np.logaddexp.reduce(parts, axis=0).sum()
    assert low_rank_log_evidence({"a": mixture}, obs).sum() == pytest.approx(want, rel=1e-5)


def test_numbers_that_do_not_vary_are_known_in_units_of_their_own(fits):
    x, view, cov = case(200, seed=1)
    mean = np.asarray(view.observations) @ np.linalg.solve(cov + NOISE**2 * np.eye(DIM), cov)
    best = np.sqrt(np.mean((mean - x) ** 2))
    found = {u: s.separate(view, n_draws=16) for u, s in fits.items()}
    error = {u: np.sqrt(np.mean((r.mean["a"] - x) ** 2)) for u, r in found.items()}
    silent = {u: np.sqrt(np.mean(r.draws["a"][..., LOUD:] ** 2)) for u, r in found.items()}
    assert error["per-entry"] < 1.15 * best < 1.3 * best < error["common"]
    assert silent["per-entry"] < 0.5 * silent["common"]
    last = {
        u: max(m.get("heldout_log_evidence", -np.inf) for m in s.metrics) for u, s in fits.items()
    }
    assert last["per-entry"] > last["common"] + 10
    assert abs(np.mean(found["per-entry"].chi2) - 1) < 0.05
    prior = fits["per-entry"].sample_prior("a", 500)
    np.testing.assert_allclose(prior[:, :LOUD].std(0), np.sqrt(np.diag(cov))[:LOUD], rtol=0.25)
    assert prior[:, LOUD:].std() < 0.1


def test_models_in_units_are_kept_and_go_on(fits, tmp_path):
    separator, view = fits["per-entry"], case(20, seed=1)[1]
    separator.save(tmp_path / "model")
    loaded = Separator.load(tmp_path / "model")
    want = separator.separate(view).draws["a"]
    np.testing.assert_array_equal(loaded.separate(view).draws["a"], want)
    np.testing.assert_array_equal(loaded.sample_prior("a", 3), separator.sample_prior("a", 3))
    renamed = dataclasses.replace(view, operators={"b": view.operators["a"]}, truth={})
    other = loaded.with_sources({"b": "a"})
    np.testing.assert_array_equal(other.separate(renamed).draws["b"], want)
    state = InitialPriors(separator.denoisers, separator.operators)
    problem = Problem([Source("a", (DIM,))], [view])
    found = state.state(problem, prepare(problem, separator.config)).operators
    np.testing.assert_array_equal(scales_of(found)["a"], scales_of(separator.operators)["a"])


def test_a_fit_in_units_goes_on_where_it_was(fits, tmp_path):
    separator = fits["per-entry"]
    again = Separator(separator.problem, separator.config)
    with pytest.raises(Killed):  # in the second iteration after units were found
        again.fit(tmp_path / "run", progress=KillAt(5))
    again.fit(tmp_path / "run", resume=True, progress=False)
    view = case(20, seed=1)[1]
    np.testing.assert_array_equal(
        again.separate(view).draws["a"], separator.separate(view).draws["a"]
    )


def test_a_fit_in_units_from_files_is_that_from_memory(fits, tmp_path):
    import h5py

    separator, view = fits["per-entry"], fits["per-entry"].problem.views[0]
    with h5py.File(tmp_path / "y.h5", "w") as file:
        file["y"] = np.asarray(view.observations, np.float32)
    with h5py.File(tmp_path / "y.h5") as file:
        stored = View(file["y"], dict(view.operators), NOISE, name="y")
        problem = Problem([Source("a", (DIM,))], [stored])
        found = Separator(problem, separator.config).fit(progress=False, memory=2**36)
    want, got = scales_of(separator.operators)["a"], scales_of(found.operators)["a"]
    np.testing.assert_allclose(got, want, rtol=1e-3)
    x = case(20, seed=1)[1]
    np.testing.assert_allclose(
        found.separate(x).draws["a"], separator.separate(x).draws["a"], atol=0.02
    )
