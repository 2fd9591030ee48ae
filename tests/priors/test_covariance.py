"""The two moments of a source given its noised value: draws, roots, and what is known without a product."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import dctn

from dichroic.errors import ShapeError
from dichroic.priors import CustomDenoiser, DiffusionPrior, GaussianMixture, dct_spectrum, gaussian
from dichroic.priors.covariance import ROOT_DEGREE, root

DRAWS, SHAPE, SIGMA = 20_000, (2, 3), 0.6


def covariance(rng, dim=6):
    q, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    return (q * np.geomspace(1e-2, 1.5, dim)) @ q.T


@eqx.filter_jit
def told(prior, x_t):
    """The covariance and the rough one, as matrices."""
    moments = prior.moments(x_t, jnp.array(SIGMA))
    eye = jnp.eye(moments.mean.size)
    return jax.vmap(moments.covariance)(
        eye
    ), moments.floor * eye + moments.columns @ moments.columns.T


def mixture(rng, kinds=3, rank=None):
    means = rng.normal(size=(kinds, *SHAPE))
    covs = [covariance(rng) for _ in range(kinds)]
    return GaussianMixture.from_moments(np.ones(kinds), means, covs, rank=rank)


class Wave(eqx.Module):
    """A network that is not zero."""

    def __call__(self, x, c_noise):
        return jnp.sin(3 * x)


@pytest.mark.parametrize("degree", [1, 2, ROOT_DEGREE, 12])
def test_the_root_is_a_polynomial_near_the_square_root(degree):
    values, products = jnp.linspace(0, 1, 201), []

    def product(v):
        products.append(v)
        return values * v

    error = np.abs(root(product, jnp.ones(201), degree) - np.sqrt(values))
    assert len(products) == degree
    assert error.max() < 0.6 / degree
    assert error[values > 0.25].max() < 0.6 / degree**2


@pytest.mark.parametrize("model", ["mixture", "base", "spectrum"])
def test_deviations_have_the_covariance(model, rng):
    """Each of 36 entries of the second moments within five standard errors; means too."""
    prior = mixture(rng)
    if model == "base":
        prior = DiffusionPrior(mixture(rng, rank=2), Wave(), "base")
    if model == "spectrum":
        spectrum = rng.uniform(0.1, 2, size=SHAPE)
        prior = CustomDenoiser(
            lambda x, s: x / (1 + s**2), SHAPE, spectrum=spectrum, covariance="spectrum"
        )
    x_t, sigma = jnp.asarray(rng.normal(size=SHAPE)), jnp.array(SIGMA)

    @jax.jit
    def look(keys):
        moments = prior.moments(x_t, sigma)
        return moments.mean, prior(x_t, sigma), jax.vmap(moments.deviate)(keys)

    mean, expect, e = map(np.asarray, look(jax.random.split(jax.random.key(0), DRAWS)))
    outer = e[:, :, None] * e[:, None, :]
    error = 5 / np.sqrt(DRAWS)
    assert np.all(np.abs(e.mean(axis=0)) < error * e.std(axis=0))
    cov, _ = told(prior, x_t)
    assert np.all(np.abs(outer.mean(axis=0) - cov) < error * outer.std(axis=0) + 1e-6)
    np.testing.assert_allclose(mean, expect.ravel(), atol=1e-5)


def test_deviations_by_the_jacobian_have_nearly_the_covariance(rng):
    """A draw is linear in its random numbers: the root times its transpose, without draws."""
    exact = gaussian(np.zeros(6), covariance(rng))
    prior = CustomDenoiser(lambda d, x, s: d(x, s), 6, exact)
    x_t, key = jnp.asarray(rng.normal(size=6)), jax.random.key(1)
    (found, _), (closed, _) = told(prior, x_t), told(exact, x_t)
    np.testing.assert_allclose(found, closed, atol=1e-5)
    deviate = jax.jit(lambda key: prior.moments(x_t, jnp.array(SIGMA)).deviate(key))
    values, vectors = np.linalg.eigh(np.asarray(closed, np.float64) / SIGMA**2)
    z = vectors.T @ np.asarray(jax.random.normal(key, (6,)))
    error = vectors.T @ np.asarray(deviate(key)) / SIGMA - np.sqrt(values) * z
    assert np.all(np.abs(error) < 0.6 / ROOT_DEGREE * np.abs(z) + 1e-5)


@pytest.mark.parametrize("rank", [6, 2])
def test_the_rough_covariance_of_a_gaussian_is_exact(rank, rng):
    prior = gaussian(np.zeros(6), covariance(rng), rank=rank)
    found, rough = told(prior, jnp.ones(6))
    np.testing.assert_allclose(rough, found, atol=1e-5)


def test_of_many_directions_the_strongest_are_kept(rng):
    """The trace stays; with 100 directions, 64 columns."""
    values = np.geomspace(1e-2, 10, 100)
    prior = gaussian(np.zeros(100), np.diag(values))
    moments = prior.moments(jnp.zeros(100), jnp.array(SIGMA))
    assert moments.columns.shape == (100, 64)
    left = SIGMA**2 * values / (values + SIGMA**2)
    rough = np.asarray(moments.columns @ moments.columns.T) + moments.floor * np.eye(100)
    np.testing.assert_allclose(np.diag(rough)[-64:], left[-64:], rtol=1e-4)
    np.testing.assert_allclose(np.diag(rough)[:-64], left[:-64].mean(), rtol=1e-3)


def test_far_components_are_left_out_of_the_rough_covariance():
    """Where one component is certain, and where two are equally likely."""
    means = np.array([[-4.0, 0, 0, 0], [4.0, 0, 0, 0]])
    prior = GaussianMixture.from_moments([1, 1], means, [np.eye(4)] * 2, rank=1)
    for at, between in (([8.0, 0, 0, 0], 0.0), ([0.0, 0, 0, 0], (0.8 * 4) ** 2)):
        moments = prior.moments(jnp.asarray(at), jnp.array(2.0))
        rough = moments.floor * np.eye(4) + moments.columns @ moments.columns.T
        np.testing.assert_allclose(rough, 0.8 * np.eye(4) + np.diag([between, 0, 0, 0]), atol=1e-2)


def test_a_network_is_preconditioned_by_its_base(rng):
    base = mixture(rng, rank=2)
    x_t = jnp.asarray(rng.normal(size=SHAPE))
    whole, rough = told(base, x_t)
    for model in ("jacobian", "base"):
        found, preconditions = told(DiffusionPrior(base, Wave(), model), x_t)
        np.testing.assert_allclose(preconditions, rough, atol=1e-5)
        assert np.allclose(found, whole, atol=1e-3) is (model == "base")


def test_a_spectrum_is_that_of_the_samples_and_gives_the_covariance(rng, x64):
    """Of a covariance that is diagonal in the transform: exact, with or without a Jacobian."""
    values = rng.uniform(0.1, 3, size=(4, 5))
    transform = dctn(np.eye(20).reshape(20, 4, 5), axes=(1, 2), norm="ortho").reshape(20, 20).T
    cov = transform.T @ np.diag(values.ravel()) @ transform
    exact = gaussian(np.ones((4, 5)), cov)
    samples = np.asarray(jax.vmap(exact.sample)(jax.random.split(jax.random.key(2), 4000)))
    error = np.abs(dct_spectrum(samples) / values - 1)
    assert error.max() < 5 * np.sqrt(2 / 4000)
    x_t = jnp.asarray(rng.normal(size=(4, 5)))
    expect, _ = told(exact, x_t)
    call = lambda d, x, s: d(x, s)
    for model in ("jacobian", "spectrum"):
        prior = CustomDenoiser(call, (4, 5), exact, spectrum=values, covariance=model)
        found, rough = told(prior, x_t)
        np.testing.assert_allclose(found, expect, atol=1e-8)
        np.testing.assert_allclose(rough, expect, atol=1e-8)
    components = eqx.filter_jit(lambda x: prior.components(x, jnp.array(SIGMA)))(x_t)
    np.testing.assert_allclose(components.covariance, expect, atol=1e-8)


@pytest.mark.parametrize("options", [{"spectrum": np.ones(3)}, {"covariance": "spectrum"}])
def test_a_spectrum_has_the_shape_of_the_source(options):
    with pytest.raises(
        ShapeError, match=r"CustomDenoiser: a spectrum of shape .*; expected \(2, 3\)"
    ):
        CustomDenoiser(lambda x, s: x, SHAPE, **options)
