"""A statement that cannot be used is refused with a message that says where."""

import numpy as np
import pytest

from dichroic.errors import DataError, ShapeError
from dichroic.noise import DenseNoise, DiagonalNoise
from dichroic.operators import Dense, Identity, Zero
from dichroic.problem import Problem, Source, View, holdout, joint_observations

A, B = Source("a", (2, 2)), Source("b", (3,))
Y = np.ones((6, 2, 2))


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
        ([A], {"noise": DiagonalNoise(np.zeros(4))}, DataError, "positive everywhere"),
        ([A], {"noise": 0.0}, DataError, "standard deviation must be positive"),
        ([A, B], {}, DataError, "source 'b' is seen by no view"),
        ([A], {"operators": {"c": Identity((2, 2))}}, DataError, "'c', which is no source"),
        ([A], {"observations": np.ones((0, 2, 2))}, DataError, "no observations"),
        ([A], {"operators": {"a": Zero((2, 2), (2, 2))}}, DataError, "sees no source"),
        ([A], {"mask": np.ones(3)}, ShapeError, "a mask of shape"),
        ([A], {"mask": np.zeros((2, 2))}, DataError, "leaves nothing observed"),
        ([A], {"truth": {"a": np.ones((6, 4))}}, ShapeError, "the truth has"),
        ([A, A], {}, DataError, "two sources are called 'a'"),
    ],
)
def test_bad_statements_are_refused(sources, changes, error, words):
    with pytest.raises(error, match=words):
        Problem(sources, [view(**changes)])


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
    problem = Problem([A], [one, View(**{**vars(two), "operators": {"a": Identity((2, 2))}})])
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


def test_the_fingerprint_sees_every_number():
    base = Problem([A], [view()]).fingerprint()
    assert Problem([A], [view()]).fingerprint() == base
    changed = Y.copy()
    changed[3, 1, 1] += 1e-3
    assert Problem([A], [view(observations=changed)]).fingerprint() != base
    assert Problem([A], [view(noise=0.11)]).fingerprint() != base
