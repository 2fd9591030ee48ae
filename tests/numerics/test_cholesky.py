import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.numerics.cholesky import inverse_cholesky, psd_factor, psd_projection, symmetrise

EPS = np.finfo(np.float32).eps
sizes = pytest.mark.parametrize("n", [*range(1, 10), 17, 64])


def positive_definite(rng, *shape, low=0.5, high=5.0):
    """Symmetric with a spectrum between `low` and `high`."""
    q = np.linalg.qr(rng.normal(size=shape + shape[-1:]))[0]
    values = rng.uniform(low, high, size=shape)
    return (q * values[..., None, :]) @ np.swapaxes(q, -1, -2)


def nearest_psd(a):
    s = 0.5 * (a + np.swapaxes(a, -1, -2))
    values, vectors = np.linalg.eigh(s)
    return (vectors * np.maximum(values, 0)[..., None, :]) @ np.swapaxes(vectors, -1, -2)


def with_spectrum(rng, values):
    q = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return (q * np.asarray(values)) @ q.T


@sizes
@pytest.mark.parametrize("batch", [(), (3,)])
def test_inverse_cholesky_is_that_of_numpy(n, batch, rng):
    a = positive_definite(rng, *batch, n)
    inverse, logdet = jax.jit(inverse_cholesky)(jnp.asarray(a, jnp.float32))
    assert inverse.shape == a.shape
    assert logdet.shape == batch
    np.testing.assert_allclose(inverse, np.linalg.inv(np.linalg.cholesky(a)), atol=2e-5)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(a)[1], rtol=1e-5, atol=n * 2e-6)
    assert np.all(np.triu(inverse, 1) == 0)


@pytest.mark.parametrize("n", [3, 6])
def test_inverse_cholesky_in_double_precision(n, rng, x64):
    a = positive_definite(rng, 2, 3, n)
    inverse, logdet = inverse_cholesky(jnp.asarray(a))
    np.testing.assert_allclose(inverse, np.linalg.inv(np.linalg.cholesky(a)), atol=1e-13)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(a)[1], atol=1e-13)


@pytest.mark.parametrize("n", [2, 6])
def test_gradient_of_the_log_determinant_is_the_inverse(n, rng):
    a = positive_definite(rng, 3, n)
    total = lambda a: jnp.sum(inverse_cholesky(symmetrise(a))[1])
    gradient = jax.jit(jax.grad(total))(jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(gradient, np.linalg.inv(a), atol=2e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_inverse_cholesky_does_not_depend_on_the_scale(scale, rng):
    a = positive_definite(rng, 6)
    inverse, logdet = inverse_cholesky(jnp.asarray(scale * a, jnp.float32))
    expect = np.linalg.inv(np.linalg.cholesky(a))
    np.testing.assert_allclose(inverse * np.sqrt(scale), expect, atol=2e-5)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(scale * a)[1], rtol=1e-5)


@sizes
def test_psd_factor_squares_to_the_matrix(n, rng):
    a = positive_definite(rng, 2, n)
    low = np.asarray(jax.jit(psd_factor)(jnp.asarray(a, jnp.float32)), float)
    assert np.all(np.triu(low, 1) == 0)
    np.testing.assert_allclose(low @ np.swapaxes(low, -1, -2), a, atol=2e-5)


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_psd_factor_of_a_matrix_of_less_than_full_rank(rank, scale, rng):
    root = rng.normal(size=(7, rank))
    a = scale * root @ root.T
    low = np.asarray(psd_factor(jnp.asarray(a, jnp.float32)), float)
    assert np.all(np.isfinite(low))
    np.testing.assert_allclose(low @ low.T, a, atol=1e-5 * max(np.trace(a), 1e-30))


def test_psd_factor_adds_the_jitter_it_says(rng):
    a = positive_definite(rng, 5)
    low = np.asarray(psd_factor(jnp.asarray(a, jnp.float32), jitter=0.1), float)
    np.testing.assert_allclose(low @ low.T, a + 0.02 * np.trace(a) * np.eye(5), atol=1e-5)


def check_projection(a, result, *, resolution=1e-4):
    a, result = np.asarray(a, float), np.asarray(result, float)
    norm = np.linalg.norm(0.5 * (a + np.swapaxes(a, -1, -2)), axis=(-2, -1))
    error = np.abs(np.linalg.eigvalsh(result - nearest_psd(a))).max(-1)
    np.testing.assert_array_equal(result, np.swapaxes(result, -1, -2))
    assert np.all(np.linalg.eigvalsh(result)[..., 0] >= -4 * EPS * norm)
    assert np.all(error <= (resolution + 16 * EPS) * norm)


@sizes
def test_projection_of_any_matrix_is_the_clipped_spectrum(n, rng):
    a = jnp.asarray(rng.normal(size=(4, n, n)), jnp.float32)
    check_projection(a, jax.jit(psd_projection)(a))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(
    "values",
    [
        (1, 0.3, -0.2, -1),
        (1, 1e-5, -1e-5, -1e-3),
        (-1, -2, -3, -4),
        (1, 1e-7, 0, -1e-7),
        (1, -1e-4, -5e-5, -2e-5, -1e-6),
        (1e-3, 0, 0, -1),
        (1, 2, 3, 4, 5),
    ],
)
def test_projection_with_small_and_negative_eigenvalues(values, scale, rng):
    a = jnp.asarray(scale * with_spectrum(rng, values), jnp.float32)
    check_projection(a, psd_projection(a))


def test_projection_keeps_a_positive_matrix(rng):
    a = positive_definite(rng, 5)
    result = psd_projection(jnp.asarray(a, jnp.float32), resolution=1e-3)
    np.testing.assert_allclose(result, a, atol=1e-3 * np.linalg.norm(a))


def test_projection_of_zero_is_zero():
    np.testing.assert_array_equal(psd_projection(jnp.zeros((3, 3))), np.zeros((3, 3)))


@pytest.mark.parametrize("function", [psd_factor, psd_projection, symmetrise])
def test_mapping_equals_batching(function, rng):
    a = jnp.asarray(positive_definite(rng, 2, 3, 6), jnp.float32)
    mapped = jax.jit(jax.vmap(jax.vmap(function)))(a)
    np.testing.assert_allclose(mapped, function(a), atol=1e-5)


def test_inverse_cholesky_under_vmap(rng):
    a = positive_definite(rng, 3, 6)
    inverse, logdet = jax.jit(jax.vmap(inverse_cholesky))(jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(inverse, np.linalg.inv(np.linalg.cholesky(a)), atol=2e-5)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(a)[1], atol=2e-5)


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (inverse_cholesky, (3, 2, 1.5, 1, 0.7)),
        (psd_factor, (3, 2, 1.5, 1, 0.7)),
        (psd_projection, (3, 2, 1, -0.7, -1.5)),
    ],
)
def test_gradients_are_those_of_finite_differences(function, values, rng):
    a, weights, towards = with_spectrum(rng, values), *rng.normal(size=(2, 5, 5))
    towards = 0.5 * (towards + towards.T)
    total = lambda a: sum(jnp.sum(weights * part) for part in jax.tree.leaves(function(a)))
    along = jax.jit(lambda h: total(jnp.asarray(a + h * towards, jnp.float32)))
    step = 0.01
    difference = (along(step) - along(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(along)(0.0), difference, rtol=5e-3)


@pytest.mark.parametrize("function", [psd_factor, psd_projection])
def test_gradients_are_finite_at_a_singular_matrix(function):
    a = jnp.diag(jnp.array([1.0, 0.0, 0.0, 0.0, 2.0]))
    gradient = jax.grad(lambda a: jnp.sum(function(a) ** 2))(a)
    assert np.all(np.isfinite(gradient))


def test_nothing_calls_lapack():
    a = jnp.eye(9)
    for function in (inverse_cholesky, psd_factor, psd_projection):
        assert "custom_call" not in jax.jit(function).lower(a).as_text()
