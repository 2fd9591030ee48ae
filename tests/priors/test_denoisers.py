"""Denoisers against brute-force conditioning, quadrature and Tweedie's formula."""

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dichroic.errors import DataError, ShapeError
from dichroic.priors import CustomDenoiser, DiffusionPrior, GaussianMixture, gaussian
from dichroic.priors.networks import Mlp

DRAWS = 20_000
SIGMAS = [0.01, 0.3, 2.0, 30.0]


def covariance(rng, dim, low=1e-2):
    q, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    return (q * np.geomspace(low, 1.5, dim)) @ q.T


def moments(rng, count, dim):
    """Weights, means and covariances of a mixture."""
    weights = rng.dirichlet(np.full(count, 3.0))
    return weights, rng.normal(size=(count, dim)), [covariance(rng, dim) for _ in range(count)]


def conditioned(weights, means, covs, x_t, sigma):
    """Weights, means and covariances of the components given `x_t`."""
    scores, m, v = [], [], []
    for w, mean, cov in zip(weights, means, covs, strict=True):
        noised = cov + sigma**2 * np.eye(len(mean))
        gain = cov @ np.linalg.inv(noised)
        scores.append(np.log(w) + stats.multivariate_normal(mean, noised).logpdf(x_t))
        m.append(mean + gain @ (x_t - mean))
        v.append(sigma**2 * gain)
    return special.softmax(scores), np.array(m), np.array(v)


def noised_points(rng, means, sigma, count=6):
    which = rng.integers(len(means), size=count)
    return means[which] + np.hypot(1, sigma) * rng.normal(size=(count, means.shape[1]))


def look(denoiser, x_t, sigma):
    """All that a denoiser says at each of `x_t`, in NumPy."""
    seen = _look(denoiser, jnp.asarray(x_t), jnp.asarray(sigma))
    return SimpleNamespace(**jax.tree.map(np.asarray, seen))


@eqx.filter_jit
def _look(denoiser, x_t, sigma):
    def one(x):
        c = denoiser.components(x, sigma)
        return {
            "denoised": denoiser(x, sigma),
            "weights": jnp.exp(c.log_weights),
            "means": c.means,
            "covariances": c.covariances,
            "mean": c.mean,
            "covariance": c.covariance,
        }

    return jax.vmap(one)(x_t)


@eqx.filter_jit
def _linear(denoiser, x_t, sigma):
    flat = lambda v: denoiser(v.reshape(denoiser.shape), sigma).ravel()

    def one(x):
        mean, apply, *_ = denoiser.moments(x, sigma)
        jacobian = jax.jacfwd(flat)(x.ravel())
        return mean, jax.vmap(apply, out_axes=1)(jnp.eye(mean.size)), sigma**2 * jacobian

    return jax.vmap(one)(x_t)


def linear(denoiser, x_t, sigma):
    """`E[x | x_t]` and the matrix of the covariance map, and `σ² ∂D/∂x_t`, in NumPy."""
    return [np.asarray(a) for a in _linear(denoiser, jnp.asarray(x_t), jnp.asarray(sigma))]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_mixture_conditions_each_component(sigma, rng):
    weights, means, covs = moments(rng, 3, 4)
    x_t = noised_points(rng, means, sigma)
    mixture = GaussianMixture.from_moments(weights, means.reshape(3, 2, 2), covs)
    found = look(mixture, x_t.reshape(-1, 2, 2), sigma)
    for i, x in enumerate(x_t):
        w, m, v = conditioned(weights, means, covs, x, sigma)
        np.testing.assert_allclose(found.weights[i], w, atol=1e-4)
        np.testing.assert_allclose(found.means[i], m, atol=2e-5 * max(1, sigma))
        np.testing.assert_allclose(found.covariances[i], v, atol=1e-5)
        np.testing.assert_allclose(found.denoised[i].ravel(), w @ m, atol=1e-4)


@pytest.mark.parametrize("rank", [None, 2, 1])
def test_thin_directions_keep_their_variance_at_high_noise(rank):
    """At σ ≫ √λ the covariance given `x_t` is that of the prior, and the mean moves by `λ / σ²`."""
    variances = np.array([1.0, 3e-5, 1e-5, 1e-5])
    prior = gaussian(np.zeros(4), np.diag(variances), rank=rank)
    if rank == 1:
        variances[1:] = variances[1:].mean()
    gain = variances / (variances + 900)
    found = look(prior, np.ones((1, 4)), 30.0)
    mean, matrix, _ = linear(prior, np.ones((1, 4)), 30.0)
    for covariance in (found.covariances[0, 0], matrix[0]):
        np.testing.assert_allclose(np.diag(covariance), 900 * gain, rtol=1e-5)
    for x in (found.denoised[0], mean[0]):
        np.testing.assert_allclose(x, gain, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_in_one_dimension_a_mixture_is_the_quadrature_of_bayes_rule(sigma):
    weights, means, std = np.array([0.3, 0.7]), np.array([-1.0, 1.5]), np.array([0.4, 0.2])
    mixture = GaussianMixture.from_moments(weights, means[:, None], (std**2)[:, None, None])
    x = np.linspace(-6, 6, 40_001)
    prior = stats.norm(means, std).pdf(x[:, None]) @ weights
    x_t = np.array([-2.0, -0.2, 0.4, 1.5])
    posterior = prior * stats.norm(x, sigma).pdf(x_t[:, None])
    posterior /= posterior.sum(axis=1, keepdims=True)
    mean = posterior @ x
    variance = posterior @ x**2 - mean**2
    found = look(mixture, x_t[:, None], sigma)
    np.testing.assert_allclose(found.mean[:, 0], mean, atol=1e-4)
    np.testing.assert_allclose(found.denoised[:, 0], mean, atol=1e-4)
    np.testing.assert_allclose(found.covariance[:, 0, 0], variance, rtol=1e-3)


@pytest.mark.parametrize("rank", [None, 2])
def test_tweedie_gives_the_covariance(rank, rng, x64):
    weights, means, covs = moments(rng, 3, 4)
    mixture = GaussianMixture.from_moments(weights, means.reshape(3, 2, 2), covs, rank=rank)
    for sigma in SIGMAS:
        x_t = noised_points(rng, means, sigma).reshape(-1, 2, 2)
        mean, matrix, tweedie = linear(mixture, x_t, sigma)
        found = look(mixture, x_t, sigma)
        np.testing.assert_allclose(found.covariance, tweedie, atol=1e-8)
        np.testing.assert_allclose(matrix, tweedie, atol=1e-8)
        np.testing.assert_allclose(mean, found.denoised.reshape(-1, 4), atol=1e-12)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_low_rank_mixture_is_the_dense_one_with_its_covariances(rank, rng, x64):
    weights, means, covs = moments(rng, 3, 4)
    shaped = means.reshape(3, 2, 2)
    low = GaussianMixture.from_moments(weights, shaped, covs, rank=rank)
    dense = GaussianMixture.from_moments(weights, shaped, low.covariances())
    assert not low.full_rank
    assert dense.full_rank
    np.testing.assert_allclose(low.covariances(), dense.covariances(), atol=1e-12)
    np.testing.assert_allclose(low.scale, dense.scale, rtol=1e-12)
    for sigma in (0.05, 1.0):
        x_t = noised_points(rng, means, sigma).reshape(-1, 2, 2)
        ours, theirs = vars(look(low, x_t, sigma)), vars(look(dense, x_t, sigma))
        for k in ours:
            np.testing.assert_allclose(ours[k], theirs[k], atol=1e-10)
        for a, b in zip(linear(low, x_t, sigma), linear(dense, x_t, sigma), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("rank", [0, 2, 4, 5, 9])
def test_rank_keeps_the_leading_eigenvalues_and_the_mean_of_the_rest(rank, rng):
    weights, means, covs = moments(rng, 2, 5)
    found = GaussianMixture.from_moments(weights, means, covs, rank=rank).covariances()
    for got, cov in zip(np.asarray(found, float), covs, strict=True):
        values, vectors = np.linalg.eigh(cov)
        rest = values[: max(5 - rank, 0)]
        values[: rest.size] = rest.mean() if rest.size else 0
        np.testing.assert_allclose(got, (vectors * values) @ vectors.T, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 1])
def test_draws_location_and_scale_are_those_of_the_mixture(rank, rng):
    weights, means, covs = moments(rng, 3, 4)
    mixture = GaussianMixture.from_moments(weights, means.reshape(3, 2, 2), covs, rank=rank)
    covs = np.asarray(mixture.covariances(), float)
    mean = weights @ means
    centred = means - mean
    cov = np.tensordot(weights, covs, 1) + (weights[:, None] * centred).T @ centred
    np.testing.assert_allclose(mixture.location, mean.reshape(2, 2), atol=1e-6)
    np.testing.assert_allclose(mixture.scale, np.sqrt(np.trace(cov) / 4), rtol=1e-5)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    x = np.asarray(jax.jit(jax.vmap(mixture.sample))(keys), float)
    assert x.shape == (DRAWS, 2, 2)
    residual = x.reshape(DRAWS, 4) - mean
    assert np.all(np.abs(residual.mean(0)) < 4.5 * np.sqrt(np.diag(cov) / DRAWS))
    products = residual[:, :, None] * residual[:, None, :]
    assert np.all(np.abs(products.mean(0) - cov) < 4.5 * products.std(0) / np.sqrt(DRAWS))


def test_draws_of_one_component_follow_it(rng):
    weights, means, covs = moments(rng, 2, 3)
    mixture = GaussianMixture.from_moments(weights, means, covs)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    draw = lambda key: mixture.sample_component(jnp.array(1), key)
    x = np.asarray(jax.jit(jax.vmap(draw))(keys), float)
    chi2 = np.einsum("ni,ij,nj->n", x - means[1], np.linalg.inv(covs[1]), x - means[1])
    assert stats.kstest(chi2, stats.chi2(3).cdf).pvalue > 1e-3


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_a_gaussian_denoises_linearly(sigma, rng):
    mean, cov, x_t = rng.normal(size=(2, 2)), covariance(rng, 4), rng.normal(size=(6, 2, 2))
    gain = cov @ np.linalg.inv(cov + sigma**2 * np.eye(4))
    expect = mean + ((x_t - mean).reshape(-1, 4) @ gain.T).reshape(-1, 2, 2)
    np.testing.assert_allclose(look(gaussian(mean, cov), x_t, sigma).denoised, expect, atol=1e-5)


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(lambda key: Mlp((2, 2), width=16, depth=1, key=key))(jax.random.key(0))


@pytest.fixture(scope="module")
def trained(fresh):
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(a.dtype), fresh)


@pytest.mark.parametrize("covariance", ["jacobian", "base"])
def test_an_untrained_network_leaves_the_base_as_it_is(covariance, fresh, rng):
    weights, means, covs = moments(rng, 3, 4)
    base = GaussianMixture.from_moments(weights, means.reshape(3, 2, 2), covs)
    whole = DiffusionPrior(base, fresh, covariance)
    assert whole.shape == (2, 2)
    np.testing.assert_array_equal(whole.location, base.location)
    assert whole.scale == base.scale
    x_t = noised_points(rng, means, 0.5).reshape(-1, 2, 2)
    ours, theirs = look(whole, x_t, 0.5), look(base, x_t, 0.5)
    np.testing.assert_allclose(ours.denoised, theirs.denoised, atol=1e-6)
    np.testing.assert_allclose(ours.mean, theirs.mean, atol=1e-5)
    np.testing.assert_allclose(ours.covariance, theirs.covariance, atol=1e-4)
    assert ours.weights.shape == ((6, 1) if covariance == "jacobian" else (6, 3))


class Probe(eqx.Module):
    """A network whose output shows its arguments."""

    def __call__(self, x, c_noise):
        return jnp.cos(x) + c_noise


def test_the_correction_is_preconditioned_as_in_edm(rng):
    s, mean, x_t = 3.0, rng.normal(size=4), 5 * rng.normal(size=4)
    denoiser = DiffusionPrior(gaussian(mean, s**2 * np.eye(4)), Probe())
    for sigma in (0.02, 0.7, 20.0):
        total = np.hypot(sigma, s)
        skip = mean + s**2 / total**2 * (x_t - mean)
        out = sigma * s / total * (np.cos((x_t - mean) / total) + np.log(sigma / s) / 4)
        got = eqx.filter_jit(denoiser)(jnp.asarray(x_t), jnp.asarray(sigma))
        np.testing.assert_allclose(got, skip + out, rtol=1e-4, atol=1e-5)


def test_the_covariance_of_a_trained_network_is_its_projected_jacobian(trained, rng):
    weights, means, covs = moments(rng, 3, 4)
    base = GaussianMixture.from_moments(weights, means.reshape(3, 2, 2), covs)
    denoiser = DiffusionPrior(base, trained, "jacobian")
    x_t = rng.normal(size=(6, 2, 2))
    mean, matrix, tweedie = linear(denoiser, x_t, 0.5)
    symmetric = 0.5 * (tweedie + tweedie.swapaxes(1, 2)).astype(float)
    values, vectors = np.linalg.eigh(symmetric)
    assert values.min() < -0.02, "the projection has something to do"
    expect = np.einsum("nir,nr,njr->nij", vectors, np.maximum(values, 0), vectors)
    found = look(denoiser, x_t, 0.5)
    assert np.linalg.eigvalsh(found.covariance.astype(float)).min() >= 0
    np.testing.assert_allclose(found.covariance, expect, atol=1e-4 * np.abs(values).max())
    np.testing.assert_allclose(matrix, symmetric, atol=1e-5)
    np.testing.assert_allclose(mean, found.denoised.reshape(-1, 4), atol=1e-6)


def test_components_of_the_base_are_moved_by_the_correction(trained, rng):
    weights, means, covs = moments(rng, 3, 4)
    base = GaussianMixture.from_moments(weights, means.reshape(3, 2, 2), covs)
    x_t = noised_points(rng, means, 0.5).reshape(-1, 2, 2)
    moved, still = look(DiffusionPrior(base, trained, "base"), x_t, 0.5), look(base, x_t, 0.5)
    shift = (moved.denoised - still.denoised).reshape(-1, 1, 4)
    assert np.abs(shift).max() > 0.1
    np.testing.assert_allclose(moved.means, still.means + shift, atol=1e-5)
    np.testing.assert_allclose(moved.covariances, still.covariances, rtol=1e-6)
    np.testing.assert_allclose(moved.weights, still.weights, rtol=1e-5)


@pytest.mark.parametrize("params", [None, {"variance": np.array(4.0)}])
def test_a_wrapped_function_is_the_denoiser_it_computes(params, rng):
    """The posterior mean and covariance of N(1, 4 I) by a user's own code."""
    plain = lambda x, sigma: 1 + 4 / (4 + sigma**2) * (x - 1)
    with_params = lambda p, x, sigma: 1 + p["variance"] / (p["variance"] + sigma**2) * (x - 1)
    fn = plain if params is None else with_params
    wrapped = CustomDenoiser(fn, shape=(2, 2), params=params, mean=1.0, std=2.0)
    exact = gaussian(np.ones((2, 2)), 4 * np.eye(4))
    x_t = rng.normal(size=(6, 2, 2))
    ours, theirs = look(wrapped, x_t, 1.5), look(exact, x_t, 1.5)
    np.testing.assert_allclose(ours.denoised, theirs.denoised, atol=1e-5)
    np.testing.assert_allclose(ours.means, theirs.means, atol=1e-5)
    np.testing.assert_allclose(ours.covariances, theirs.covariances, atol=1e-3)
    np.testing.assert_array_equal(wrapped.location, exact.location)
    np.testing.assert_allclose(wrapped.scale, exact.scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "means", "covs"),
    [
        (np.ones(2), np.zeros((2, 3)), np.ones((2, 4, 4))),
        (np.ones(2), np.zeros((3, 3)), np.ones((2, 3, 3))),
        (np.ones(2), np.zeros((2, 3)), np.ones((2, 3))),
    ],
)
def test_shapes_that_do_not_fit_are_refused(weights, means, covs):
    with pytest.raises(ShapeError, match=r"2 components of 3 entries need covariances \(2, 3, 3\)"):
        GaussianMixture.from_moments(weights, means, covs)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["weight", "mean", "covariance"])
def test_moments_that_are_not_finite_are_refused(where, bad):
    moments = {
        "weight": np.ones(2),
        "mean": np.zeros((2, 3)),
        "covariance": np.stack([np.eye(3)] * 2),
    }
    moments[where].flat[1] = bad
    with pytest.raises(DataError, match=f"GaussianMixture: a {where} is not finite"):
        GaussianMixture.from_moments(*moments.values())


@pytest.mark.parametrize("weights", [[0.0, 0.0], [2.0, -0.5], [-1.0, -1.0]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(
        DataError, match="GaussianMixture: weights must be positive numbers or zero"
    ):
        GaussianMixture.from_moments(weights, np.zeros((2, 1)), np.ones((2, 1, 1)))


def test_a_component_of_weight_zero_changes_nothing():
    whole = GaussianMixture.from_moments([1, 0], np.array([[0.0], [5.0]]), np.ones((2, 1, 1)))
    found = look(whole, np.full((1, 1), 5.0), 1.0)
    np.testing.assert_allclose(found.denoised, 2.5, rtol=1e-6)
    np.testing.assert_allclose(found.covariance, 0.5, rtol=1e-6)


def test_a_covariance_that_is_not_psd_is_refused():
    with pytest.raises(DataError, match=r"not PSD \(eigenvalue -0.5\)"):
        gaussian(np.zeros(2), np.diag([1.0, -0.5]))
