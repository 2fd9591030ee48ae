import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from dichroic.errors import DataError, ShapeError
from dichroic.metrics import frechet_distance


def with_moments(rng, n, mean, root):
    """A sample whose mean and covariance, root rootᵀ, are exact."""
    z = rng.normal(size=(n, root.shape[1]))
    z -= z.mean(axis=0)
    z = np.linalg.qr(z)[0] * np.sqrt(n - 1)
    return mean + z @ root.T


def reference(x, y):
    cx, cy = np.cov(x.T), np.cov(y.T)
    cross = linalg.sqrtm(cx @ cy)
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cx + cy - 2 * np.real(cross))


def test_agrees_with_scipy_matrix_square_root():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12))
    y = 1.0 + rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    assert frechet_distance(x, y) == pytest.approx(reference(x, y), rel=1e-8)
    assert frechet_distance(jnp.asarray(x), jnp.asarray(y)) == pytest.approx(
        reference(x, y), rel=1e-5
    )


def test_commuting_covariances_have_a_closed_form():
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.1, 3.0, size=(2, 6))
    shift = rng.normal(size=6)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    x = with_moments(rng, 50, np.zeros(6), rotation * a)
    y = with_moments(rng, 80, shift, rotation * b)
    expected = np.sum(shift**2) + np.sum((a - b) ** 2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)


def test_fewer_samples_than_dimensions():
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.normal(size=(200, 4)))[0]
    a, b = rng.uniform(0.5, 2.0, size=(2, 4))
    x = with_moments(rng, 10, np.zeros(200), basis * a)
    y = with_moments(rng, 30, np.zeros(200), basis * b)
    assert frechet_distance(x, y) == pytest.approx(np.sum((a - b) ** 2), rel=1e-10)
    assert abs(frechet_distance(x, x)) < 1e-10


def test_gaussian_samples_approach_the_distance_of_their_distributions():
    n, d = 20_000, 4
    rng = np.random.default_rng(3)
    scale = np.array([0.5, 1.0, 1.5, 2.0])
    x, y = rng.normal(size=(n, d)), 1.0 + scale * rng.normal(size=(n, d))
    # Per dimension, the mean's part has variance 4 (1 + s²)/n and that of deviations
    # 4 (1 − s)² (1 + s²)/(2n); the bias is of order d²/n.
    variance = np.sum(4 * (1 + scale**2) + 2 * (1 - scale) ** 2 * (1 + scale**2)) / n
    tolerance = 4 * np.sqrt(variance) + 2 * d**2 / n
    assert abs(frechet_distance(x, y) - (d + np.sum((1 - scale) ** 2))) < tolerance


def test_bad_input():
    good = np.random.default_rng(0).normal(size=(10, 3))
    with pytest.raises(ShapeError, match="3 dimensions and y has 2"):
        frechet_distance(good, good[:, :2])
    with pytest.raises(ShapeError, match="at least 2 points"):
        frechet_distance(good, good[:1])
    with pytest.raises(ShapeError, match=r"x\.reshape"):
        frechet_distance(good[:, None], good)
    with pytest.raises(DataError, match="y has 10 NaN"):
        frechet_distance(good, np.where([True, False, False], np.inf, good))
