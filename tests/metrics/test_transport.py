import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

from dichroic.errors import DataError, ShapeError
from dichroic.metrics import sinkhorn_divergence, transport
from dichroic.numerics.precision import float64


def pot_divergence(x, y, epsilon):
    """The Sinkhorn divergence by POT's plans, with the KL regularisation written out."""
    return pot_cost(x, y, epsilon) - 0.5 * pot_cost(x, x, epsilon) - 0.5 * pot_cost(y, y, epsilon)


def pot_cost(x, y, epsilon):
    a, b = np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y))
    cost = ot.dist(x, y)
    plan = ot.sinkhorn(a, b, cost, epsilon, stopThr=1e-9, numItermax=50_000, warn=False)
    ratio = np.where(plan > 0, plan / np.outer(a, b), 1.0)
    return np.sum(plan * cost) + epsilon * np.sum(plan * np.log(ratio))


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_agrees_with_pot(epsilon):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 3)), 0.5 + 1.5 * rng.normal(size=(90, 3))
    result = sinkhorn_divergence(x, y, epsilon=epsilon, tolerance=1e-7)
    assert result.converged
    assert result.error <= 1e-7
    assert result.value == pytest.approx(pot_divergence(x, y, epsilon), rel=1e-6)


def test_small_epsilon_approaches_exact_transport():
    n, epsilon = 200, 1e-3
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(n, 2)), 1.2 * rng.normal(size=(n, 2))
    exact = ot.emd2(np.full(n, 1 / n), np.full(n, 1 / n), ot.dist(x, y))
    result = sinkhorn_divergence(x, y, epsilon=epsilon)
    # Each of the three terms exceeds its unregularised value by 0 to ε log n.
    assert result.converged
    assert abs(result.value - exact) < epsilon * np.log(n)


@pytest.mark.parametrize("epsilon", [0.01, 1.0, 100.0])
def test_translation_has_a_closed_form_at_any_epsilon(epsilon):
    rng = np.random.default_rng(2)
    x, c = rng.normal(size=(100, 4)), np.array([1.0, -2.0, 0.5, 0.0])
    result = sinkhorn_divergence(x, x + c, epsilon=epsilon, tolerance=1e-6)
    assert result.converged
    assert result.value == pytest.approx(c @ c, abs=1e-4)


def test_large_epsilon_leaves_the_distance_between_means():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(80, 3)), 1.0 + 2 * rng.normal(size=(120, 3))
    epsilon = 1e5
    result = sinkhorn_divergence(x, y, epsilon=epsilon, tolerance=1e-9)
    cost = ot.dist(x, y)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2)
    # The next term of the expansion in 1/ε is of the order of the variance of the cost over ε.
    assert abs(result.value - expected) < cost.var() / epsilon


def test_gaussians_have_a_closed_form():
    """Janati et al., arXiv 2006.02572: one dimension, ε = 2σ², entropy relative to the product."""
    epsilon, n, seeds, mean, scale = 0.8, 400, 10, 0.7, 1.8

    def cost(shift, a, b):
        s2 = epsilon / 2
        d = np.sqrt(4 * a * b + s2**2)
        return shift**2 + a + b - d + s2 * (1 - np.log(2 * s2)) + s2 * np.log(d + s2)

    expected = cost(mean, 1, scale**2) - 0.5 * cost(0, 1, 1) - 0.5 * cost(0, scale**2, scale**2)
    values = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(n, 1)), mean + scale * rng.normal(size=(n, 1))
        values.append(sinkhorn_divergence(x, y, epsilon=epsilon).value)
    assert abs(np.mean(values) - expected) < 4 * np.std(values, ddof=1) / np.sqrt(seeds)


def test_a_sample_has_no_divergence_from_itself():
    x = np.random.default_rng(4).normal(size=(300, 5))
    shuffled = np.random.default_rng(5).permutation(x)
    result = sinkhorn_divergence(x, shuffled, epsilon=0.05, tolerance=1e-6)
    assert result.converged
    assert abs(result.value) < 1e-5


def test_momentum_converges_on_a_curve_at_small_epsilon():
    rng = np.random.default_rng(6)
    t, s = rng.uniform(0, 2 * np.pi, size=(2, 400))
    curve = lambda u: np.stack([np.cos(u), np.sin(2 * u), np.sin(3 * u)], axis=1)
    result = sinkhorn_divergence(curve(t), curve(s), epsilon=1e-3)
    assert result.converged
    assert result.iterations < 1500


def test_soft_minimum_does_not_depend_on_blocks(monkeypatch):
    rng = np.random.default_rng(7)
    x, y, g = rng.normal(size=(37, 3)), rng.normal(size=(23, 3)), rng.normal(size=23)
    cost = ot.dist(x, y)
    expected = -0.3 * np.log(np.mean(np.exp((g - cost) / 0.3), axis=1))
    for block in (1, 100, 10**6):
        monkeypatch.setattr(transport, "_BLOCK", block)
        with float64():
            found = transport._soft_min(*map(jnp.asarray, (x, y, g)), 0.3)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_memory_is_bounded_for_many_points():
    n = 16_384
    with float64():
        points = jax.ShapeDtypeStruct((n, 5), jnp.float64)
        compiled = transport._transport.lower(points, points, 1e-3, 2000, 1e-4).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 8 * (6 * transport._BLOCK + 100 * n)
    assert temporary < 8 * n * n / 10


def test_single_precision_input_and_the_global_default():
    x = jax.random.normal(jax.random.key(0), (50, 2))
    y = 0.5 + jax.random.normal(jax.random.key(1), (60, 2))
    result = sinkhorn_divergence(x, y, epsilon=0.5, tolerance=1e-9)
    double = sinkhorn_divergence(
        np.asarray(x, float), np.asarray(y, float), epsilon=0.5, tolerance=1e-9
    )
    assert result == double
    assert isinstance(result.value, float)
    assert jnp.ones(1).dtype == x.dtype


def test_one_point_each():
    result = sinkhorn_divergence(np.zeros((1, 2)), np.array([[3.0, 4.0]]), epsilon=1.0)
    assert result.value == pytest.approx(25.0)


def test_too_few_iterations_are_reported():
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(50, 2)), 2.0 + rng.normal(size=(50, 2))
    stopped = sinkhorn_divergence(x, y, epsilon=1e-3, max_iterations=3)
    assert not stopped.converged
    assert stopped.iterations == 3
    assert stopped.error > 1e-4


def test_bad_input():
    x = np.zeros((5, 2))
    with pytest.raises(ShapeError, match=r"x has shape \(5,\), expected \(n, d\)"):
        sinkhorn_divergence(x[:, 0], x)
    with pytest.raises(ShapeError, match="2 dimensions and y has 1"):
        sinkhorn_divergence(x, x[:, :1])
    with pytest.raises(DataError, match="y has 10 NaN"):
        sinkhorn_divergence(x, x * np.nan)
    with pytest.raises(DataError, match="epsilon must be positive"):
        sinkhorn_divergence(x, x, epsilon=0.0)
    with pytest.raises(DataError, match="max_iterations"):
        sinkhorn_divergence(x, x, max_iterations=0)
