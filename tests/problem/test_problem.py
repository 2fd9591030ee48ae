"""A statement that cannot be used is refused with a message that says where."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.config import FitConfig
from dichroic.errors import ConfigError, DataError, ShapeError
from dichroic.io import summary_rows
from dichroic.operators import Dense, FunctionOperator, Identity, Zero
from dichroic.operators.noise import (
    DenseNoise,
    DiagonalNoise,
    IsotropicNoise,
    JointNoise,
    LowRankNoise,
    Masked,
)
from dichroic.problem.identifiability import identifiability
from dichroic.problem.problem import Problem, Source, joint_observations
from dichroic.problem.splits import held_out, holdout
from dichroic.problem.validation import values_and_mask
from dichroic.problem.view import View, missing_fraction
from dichroic.runtime.fingerprint import fingerprint

A, B = Source("a", (2, 2)), Source("b", (3,))
Y = np.ones((6, 2, 2))
V = np.random.default_rng(1).uniform(0.5, 1, size=(6, 2, 2)).astype(np.float32)
FFT = FunctionOperator(jnp.fft.fft2, in_shape=(2, 2))


def view(**changes):
    settings = {"observations": Y, "operators": {"a": Identity((2, 2))}, "noise": 0.1, "name": "v"}
    return View(**{**settings, **changes})


@pytest.mark.parametrize(
    ("sources", "changes", "error", "words"),
    [
        (
            [A],
            {"operators": {"a": Identity((2, 3))}},
            ShapeError,
            "source 'a'.*axis 1 is 3 instead of 2",
        ),
        ([A], {"observations": np.ones((6, 2, 5))}, ShapeError, "axis 1 is 2 instead of 5"),
        (
            [A],
            {"observations": np.where(Y > 0, np.nan, 0)},
            DataError,
            "observation 0 is nan.*mask",
        ),
        ([A], {"noise": DenseNoise(-np.eye(4))}, DataError, "not symmetric positive definite"),
        ([A], {"noise": DiagonalNoise(np.zeros(4))}, DataError, "must be positive and finite"),
        ([A], {"noise": 0.0}, DataError, "standard deviation is .*; it must be positive"),
        ([A, B], {}, DataError, "source 'b' is seen by no view"),
        ([A], {"operators": {"c": Identity((2, 2))}}, DataError, "'c', which is no source"),
        ([A], {"observations": np.ones((0, 2, 2))}, DataError, "no observations"),
        ([A], {"operators": {"a": Zero((2, 2), (2, 2))}}, DataError, "sees no source"),
        (
            [A],
            {"operators": {"a": "identity"}},
            DataError,
            "source 'a': an operator of type str",
        ),
        ([A], {"operators": {"a": FFT}}, DataError, "source 'a': the operator gives complex64"),
        (
            [A],
            {"observations": Y * 1j},
            DataError,
            "observations of type complex128; expected real",
        ),
        ([A], {"observations": Y.astype(object)}, DataError, "observations of type object"),
        (
            [A],
            {"observations": np.where(np.arange(24).reshape(6, 2, 2) == 5, 1e300, Y)},
            DataError,
            r"observation 1 is 1e\+300 at entry \(0, 1\), more than float32 holds.*other units",
        ),
        (
            [A],
            {"observations": Y * np.inf},
            DataError,
            r"observation 0 is inf \(float32\) at entry",
        ),
        (
            [A],
            {"observations": 5, "held_out": [1]},
            DataError,
            r"the observations are one number \(5\); expected an array \(n, …\)",
        ),
        ([A], {"mask": np.where(Y[0] > 0, np.nan, 0)}, DataError, "a mask with 4 NaN; expected 1"),
        ([A], {"mask": Y * 1j}, DataError, "a mask of type complex128; expected real"),
        ([A], {"truth": {"a": Y.astype(object)}}, DataError, "a truth of type object"),
        ([A], {"held_out": np.array(list("abcdef"))}, DataError, "held_out of type <U1"),
        ([A], {"mask": np.ones(3)}, ShapeError, "a mask of shape"),
        ([A], {"mask": np.zeros((2, 2))}, DataError, "leaves nothing observed"),
        ([A], {"truth": {"a": np.ones((6, 4))}}, ShapeError, "the truth has"),
        ([A, A], {}, DataError, "two sources are called 'a'"),
    ],
)
def test_bad_statements_are_refused(sources, changes, error, words):
    with pytest.raises(error, match=words):
        Problem(sources, [view(**changes)])


@pytest.mark.parametrize(
    ("noise", "error", "words"),
    [
        (LowRankNoise(np.ones((3, 2)), np.ones(4)), ShapeError, r"noise factor has shape \(3, 2\)"),
        (LowRankNoise(np.ones((3, 2)), np.ones((2, 2))), ShapeError, r"expected \(4, R\), or \(n"),
        (LowRankNoise(np.ones((6, 3, 1)), np.ones((6, 4))), ShapeError, r"factor has .*\(6, 3, 1\)"),
        (LowRankNoise(np.ones((5, 4, 1)), np.ones(4)), ShapeError, "5 observations, but there are 6"),
        (LowRankNoise(np.full((4, 1), np.nan), np.ones(4)), DataError, r"factor is nan at entry \(0, 0\)"),
        (LowRankNoise(np.ones((4, 1)), np.zeros(4)), DataError, "must be positive and finite"),
        (DiagonalNoise(np.ones((6, 2, 3))), ShapeError, r"variance .*shape \(2, 2\) has 4 entries"),
        (DiagonalNoise(np.ones((6, 1, 4))), ShapeError, r"variance has shape \(6, 1, 4\)"),
        (DiagonalNoise(np.ones((5, 2, 2))), ShapeError, "5 observations, but there are 6"),
        (IsotropicNoise(1e-20), DataError, r"variance of 1e-40; .* in other units, .* multiplied by 1e\+20"),
        (DiagonalNoise(np.full(4, 1e37)), DataError, "single precision works with 1e-36 to 1e"),
        (DenseNoise(np.eye(3)), ShapeError, r"covariance has .*expected \(4, 4\), or \(n, 4, 4\)"),
        (IsotropicNoise(np.ones((6, 4))), ShapeError, r"the noise std has shape \(6, 4\); expected \(\)"),
        (Masked(IsotropicNoise(1.0), np.ones(3)), ShapeError, r"the noise mask has shape \(3,\)"),
        (Masked(IsotropicNoise(1.0), np.ones((5, 4))), ShapeError, "5 observations, but there are 6"),
        (Masked(IsotropicNoise(1.0), np.full(4, 0.5)), DataError, r"1 \(observed\) or 0 \(missing\)"),
        (Masked(IsotropicNoise(-1.0), np.ones(4)), DataError, "standard deviation is .*; it must be positive"),
        (Masked(DiagonalNoise(np.ones(3)), np.ones(4)), ShapeError, "the noise variance has shape"),
        (Masked(DenseNoise(-np.eye(4)), np.ones(4)), DataError, "not symmetric positive definite"),
        (JointNoise((IsotropicNoise(1.0),) * 2, (2, 3)), ShapeError, r"sizes \(2, 3\); .* 4 entries in all"),
        (JointNoise((IsotropicNoise(1.0),) * 2, (4,)), ShapeError, "2 parts with sizes"),
        (JointNoise((IsotropicNoise(1.0), IsotropicNoise(-1.0)), (2, 2)), DataError, "must be positive"),
        (
            JointNoise((IsotropicNoise(1.0), DiagonalNoise(np.ones(3))), (2, 2)),
            ShapeError,
            "view 'v', part 1 of its noise: the noise variance has",
        ),
        ("loud", DataError, "noise of type str; expected a number"),
    ],
)  # fmt: skip
def test_bad_noise_is_refused(noise, error, words):
    with pytest.raises(error, match=words):
        view(noise=noise).prepare()


@pytest.mark.parametrize(
    ("given", "flat"),
    [
        (DiagonalNoise(V), DiagonalNoise(V.reshape(6, 4))),
        (DiagonalNoise(V[0]), DiagonalNoise(V[0].ravel())),
        (
            LowRankNoise(V[..., None], V.reshape(6, 4)),
            LowRankNoise(V.reshape(6, 4, 1), V.reshape(6, 4)),
        ),
        (
            Masked(DiagonalNoise(V), V[0] > 0.6),
            Masked(DiagonalNoise(np.where(V[0] > 0.6, V, 1).reshape(6, 4)), V[0].ravel() > 0.6),
        ),
        (
            JointNoise((DiagonalNoise(V[:, 0]), IsotropicNoise(1.0)), (2, 2)),
            JointNoise((DiagonalNoise(V[:, 0]), IsotropicNoise(1.0)), (2, 2)),
        ),
    ],
)
def test_noise_may_have_the_shape_of_the_observations(given, flat):
    assert eqx.tree_equal(view(noise=given).prepare().noise, flat)


def test_the_masks_of_a_view_and_of_its_noise_both_count():
    noise = Masked(DiagonalNoise(V), np.array([[0, 1], [1, 1]]))
    both = view(noise=noise, mask=np.array([[1, 1], [1, 0]]))
    np.testing.assert_array_equal(both.observed(), [[[False, True], [True, False]]] * 6)
    assert missing_fraction(both) == 0.5
    _, matrices, _ = both.prepare().one(0).system()
    np.testing.assert_array_equal(matrices["a"], np.diag([0, 1, 1, 0]))


@pytest.mark.parametrize("kind", ["i8", "u1", "f2", "f4", ">f4", ">f8", ">i2", "?"])
def test_real_numbers_of_any_type_and_layout_are_the_same(kind):
    rng = np.random.default_rng(0)
    y, matrix = rng.integers(0, 2, size=(6, 2, 2)), rng.integers(0, 2, size=(6, 4, 4))

    def stated(as_given):
        op = Dense(as_given(matrix), in_shape=(2, 2), out_shape=(2, 2))
        fn = FunctionOperator(lambda x, p: p * x, in_shape=(2, 2), params=as_given(y[0]))
        noise = Masked(DiagonalNoise(as_given(y + 1 if kind != "?" else y >= 0)), as_given(y[1]))
        truth, chosen = {"a": as_given(y)}, as_given(np.arange(6) == 2)
        changes = {"mask": as_given(y[2]), "truth": truth, "held_out": chosen, "noise": noise}
        return view(observations=as_given(y), operators={"a": op, "b": fn}, **changes)

    sources = [A, Source("b", (2, 2))]
    given = Problem(sources, [stated(lambda a: np.asfortranarray(a.astype(kind)))]).views[0]
    plain = stated(lambda a: a.astype(float) if kind != "?" else (a > 0).astype(float))
    ours, want = (jax.tree.leaves(v.prepare().one(0).system()) for v in (given, plain))
    assert all(np.array_equal(a, b) for a, b in zip(ours, want, strict=True))
    np.testing.assert_array_equal(given.prepare().y, plain.prepare().y)
    assert [v[0].count for v in holdout([given], 0.5, 0)] == [5, 1]


@pytest.mark.parametrize(
    "make",
    [Dense, DiagonalNoise, lambda a: FunctionOperator(lambda x, p: p @ x, in_shape=2, params=a)],
)
@pytest.mark.parametrize(
    "array", [np.array([[1, {}]]), np.array([["a", "b"]]), np.ones((1, 2)) * 1j]
)
def test_parameters_that_are_no_real_numbers_are_refused(make, array):
    with pytest.raises(
        DataError, match=r"of type (object|<U1|complex\d+); expected|gives complex64"
    ):
        operators = {"a": make(array)}
        view(observations=np.ones((6, 1)), operators=operators).prepare()


def test_a_view_is_checked_and_copied_once(monkeypatch):
    calls = []
    count = lambda *args: calls.append(args) or values_and_mask(*args)
    monkeypatch.setattr("dichroic.problem.view.values_and_mask", count)
    problem = Problem([A], [view()])
    summary_rows(problem)
    identifiability(problem)
    problem.views[0].prepare()
    assert len(calls) == 1


def test_a_changed_view_is_prepared_anew():
    first = view(observations=np.arange(24.0).reshape(6, 2, 2))
    first.prepare()
    assert dataclasses.replace(first, observations=2 * Y).prepare().y[0, 0] == 2
    np.testing.assert_array_equal(first.select([5]).prepare().y, [[20, 21, 22, 23]])
    with pytest.raises(DataError, match="must be positive"):
        dataclasses.replace(first, noise=-1).prepare()


def test_per_observation_parameters_must_match_the_observations():
    op = Dense(np.ones((5, 4, 4)), in_shape=(2, 2), out_shape=(2, 2))
    with pytest.raises(ShapeError, match="5 observations, but there are 6"):
        Problem([A], [view(operators={"a": op})])


def test_nan_may_be_declared_missing():
    y = Y.copy()
    y[0, 0, 0] = np.nan
    obs = view(observations=y, mask="nan").prepare()
    assert float(obs.y[0, 0]) == 0
    np.testing.assert_array_equal(np.asarray(obs.noise.mask)[0], [0, 1, 1, 1])


def test_co_observed_views_are_stacked():
    one = view(name="one", group="g")
    two = view(name="two", group="g", operators={"a": Identity((2, 2)), "b": Zero((3,), (2, 2))})
    problem = Problem([A], [one, dataclasses.replace(two, operators={"a": Identity((2, 2))})])
    (group,) = problem.joint_views()
    obs = joint_observations(group)
    y, matrices, cov = obs.one(0).system()
    assert y.shape == (8,)
    np.testing.assert_array_equal(matrices["a"], np.concatenate([np.eye(4)] * 2))
    np.testing.assert_allclose(cov, 0.01 * np.eye(8), rtol=1e-6)


def test_co_observed_views_need_the_same_number_of_observations():
    with pytest.raises(ShapeError, match="same number of observations"):
        Problem([A], [view(name="one", group="g"), view(name="two", group="g", observations=Y[:4])])


def test_held_out_observations_are_the_chosen_ones():
    chosen = np.array([True, False, False, False, False, True])
    train, test = holdout([view(held_out=chosen)], 0.5, 0)
    assert (train[0].count, test[0].count) == (4, 2)


@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("fraction", [0, 0.1, 0.8, 0.99, 1])
def test_at_least_one_observation_stays_for_training(n, fraction):
    train, test = holdout([view(observations=Y[:1].repeat(n, axis=0))], fraction, 0)
    assert train[0].count >= 1
    assert test[0].count >= (n > 1)
    assert train[0].count + test[0].count == n


def test_of_very_many_each_is_held_out_by_itself(monkeypatch):
    views = [view(observations=np.zeros((10_000, 2, 2)))]
    before = held_out(views, 0.3, 1)
    assert before.sum() == 3000
    monkeypatch.setattr("dichroic.problem.splits.SHUFFLED", 1000)
    mask = held_out(views, 0.3, 1)
    parts = mask.reshape(10, 1000)
    assert not np.array_equal(mask, before)
    assert np.all(np.abs(parts.mean(axis=1) - 0.3) < 5 * np.sqrt(0.21 / 1000))
    assert len(np.unique(parts, axis=0)) == 10
    np.testing.assert_array_equal(mask, held_out(views, 0.3, 1))
    assert not np.array_equal(mask, held_out(views, 0.3, 2))
    assert held_out(views, 0.0, 1).sum() == 1


@pytest.mark.parametrize("fraction", [1, 1.5, -0.1, float("nan")])
def test_a_fraction_to_hold_out_is_below_one(fraction):
    with pytest.raises(ConfigError, match="^holdout: must be at least 0 and below 1, got"):
        FitConfig(holdout=fraction)
    with pytest.raises(ConfigError, match=r"^p.yaml: fit.holdout: must "):
        FitConfig.from_dict({"holdout": fraction}, where="p.yaml: fit")


@pytest.mark.parametrize("value", ["nan", "-1e-3", "1e400", float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("name", ["diffusion.learning_rate", "sampler.sigma_max", "seed"])
def test_settings_are_finite(name, value):
    with pytest.raises(ConfigError, match=rf"^settings.{name}: (must|expected)"):
        FitConfig().replace({name: value})


def test_settings_may_be_written_with_an_exponent():
    assert FitConfig().replace({"sampler.sigma_min": "1e-4"}).sampler.sigma_min == 1e-4


def test_the_fingerprint_sees_every_number():
    base = Problem([A], [view()]).fingerprint()
    assert Problem([A], [view()]).fingerprint() == base
    changed = Y.copy()
    changed[3, 1, 1] += 1e-3
    assert Problem([A], [view(observations=changed)]).fingerprint() != base
    assert Problem([A], [view(noise=0.11)]).fingerprint() != base
    chosen = np.arange(6) == 2
    held = Problem([A], [view(held_out=chosen)]).fingerprint()
    assert held != base
    assert Problem([A], [view(held_out=chosen.astype(int))]).fingerprint() == held
    assert Problem([A], [view(held_out=chosen[::-1])]).fingerprint() != held


def functions(scale):
    """Functions that differ, by what they differ in; some twice."""
    return [
        lambda x: x * 2,
        lambda x: x * 3,
        lambda x: x + x,
        lambda x: jnp.flip(x),
        lambda x: jnp.roll(x, 1),
        lambda x: x * scale,
        lambda x: (lambda z: z * 4)(x),
        lambda x: (lambda z: z * 5)(x),
        lambda x, factor=6: x * factor,
        jnp.flip,
        partial(jnp.roll, shift=1),
        partial(jnp.roll, shift=2),
        jax.jit(lambda x: x * 7),
        jax.jit(lambda x: x * 8),
    ]


def prints(scale):
    problems = (
        Problem([A], [view(operators={"a": FunctionOperator(fn, in_shape=(2, 2))})])
        for fn in functions(scale)
    )
    return [problem.fingerprint() for problem in problems]


def test_the_fingerprint_sees_what_functions_do():
    first, second = prints(9.0), prints(np.arange(4.0).reshape(2, 2))
    assert len(set(first)) == len(first)
    assert [i for i, (a, b) in enumerate(zip(first, second)) if a != b] == [5]
    assert prints(9.0) == first


def test_a_function_that_calls_itself_has_a_fingerprint():
    def halve(x, times=2):
        return halve(x / 2, times - 1) if times else x

    assert len(fingerprint(halve)) == 64


def test_the_fingerprint_is_that_of_other_processes():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
    code += "; import test_problem; print(*test_problem.prints(9.0))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == prints(9.0)
