import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from scipy.spatial import distance

from dichroic.errors import DataError, ShapeError
from dichroic.metrics import chi2_per_dim, coverage, mean_chi2, predictive_chi2, rank_histogram


def gaussian_posterior(rng, n, draws, *, entries=1, width=1.0, bias=0.0, noise=0.5):
    """Draws from the posterior of θ ~ N(0, 1) given θ + noise, `width` times too wide, and θ."""
    theta = rng.normal(size=(n, entries))
    y = theta + noise * rng.normal(size=(n, entries))
    variance = noise**2 / (1 + noise**2)
    mean, deviation = y / (1 + noise**2), np.sqrt(variance)
    z = width * rng.normal(size=(draws, n, entries)) + bias
    return mean + deviation * z, theta


def rank_probabilities(draws, width):
    """P(rank of the truth = r) for draws that are `width` times too wide, by quadrature."""

    def integrand(z):
        below = stats.binom.pmf(np.arange(draws + 1), draws, stats.norm.cdf(z / width))
        return below * stats.norm.pdf(z)

    return integrate.quad_vec(integrand, -9, 9)[0]


def expected_coverage(draws, width, level):
    edges = np.arange(draws + 2) / (draws + 1)
    inside = np.clip(edges, 0.5 - level / 2, 0.5 + level / 2)
    return rank_probabilities(draws, width) @ np.diff(inside) * (draws + 1)


@pytest.mark.parametrize("draws", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("level", [0.05, 0.5, 0.68, 0.9, 0.99])
def test_coverage_of_uniform_ranks_is_the_level(draws, level):
    truth = np.arange(draws + 1) - 0.5
    every = np.broadcast_to(np.arange(draws)[:, None], (draws, draws + 1))
    assert coverage(every, truth, level=level).value == pytest.approx(level, abs=1e-12)


@pytest.mark.parametrize("draws", [8, 32, 500])
@pytest.mark.parametrize("width", [0.6, 1.0, 1.6])
def test_coverage_of_a_gaussian_posterior(draws, width):
    sample = gaussian_posterior(np.random.default_rng(0), 4000, draws, width=width)
    result = coverage(*sample, level=0.9)
    assert abs(result.value - expected_coverage(draws, width, 0.9)) < 4 * result.standard_error
    if width == 1.0:
        assert abs(result.value - 0.9) < 4 * np.sqrt(0.09 / 4000)


def test_coverage_tends_to_that_of_intervals_with_many_draws():
    inside = 2 * stats.norm.cdf(1.5 * stats.norm.ppf(0.9)) - 1
    assert expected_coverage(500, 1.5, 0.8) == pytest.approx(inside, abs=5e-3)


def test_standard_error_counts_observations_not_entries():
    rng = np.random.default_rng(1)
    results = []
    for _ in range(200):
        draws, truth = gaussian_posterior(rng, 100, 16)
        copies = [np.repeat(a, 50, axis=-1) for a in (draws, truth)]
        results.append(coverage(*copies, level=0.5))
    scatter = np.std([r.value for r in results], ddof=1)
    estimate = np.mean([r.standard_error for r in results])
    assert estimate == pytest.approx(scatter, rel=4 / np.sqrt(2 * 200))


def test_ties_are_shared():
    truth = np.zeros((4, 3))
    assert coverage(np.zeros((9, 4, 3)), truth, level=0.7).value == pytest.approx(0.7)
    result = rank_histogram(np.zeros((9, 4, 3)), truth, bins=5)
    np.testing.assert_allclose(result.frequencies, 0.2)
    assert result.p_value == 1.0


def test_rank_frequencies_of_a_wrong_width_are_those_of_quadrature():
    n, draws = 5000, 9
    sample = gaussian_posterior(np.random.default_rng(2), n, draws, width=1.5)
    result = rank_histogram(*sample, bins=draws + 1)
    expected = rank_probabilities(draws, 1.5)
    error = np.sqrt(expected * (1 - expected) / n)
    assert np.all(np.abs(result.frequencies - expected) < 4.5 * error)
    assert result.p_value < 1e-6


def test_one_entry_and_matching_bins_give_pearsons_test():
    draws, truth = gaussian_posterior(np.random.default_rng(3), 300, 9)
    result = rank_histogram(draws, truth, bins=10)
    ranks = np.sum(draws < truth, axis=0).ravel()
    pearson = stats.chisquare(np.bincount(ranks, minlength=10))
    assert result.p_value == pytest.approx(pearson.pvalue, rel=1e-8)
    np.testing.assert_allclose(result.standard_errors, np.sqrt(0.1 * 0.9 / 300), rtol=1e-8)


def test_p_values_are_uniform_for_dependent_entries():
    rng = np.random.default_rng(4)
    p = []
    for _ in range(300):
        pool = 0.9 * rng.normal(size=(20, 60, 1)) + 0.4 * rng.normal(size=(20, 60, 8))
        p.append(rank_histogram(pool[1:], pool[0], bins=6).p_value)
    assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("change", [{"width": 0.7}, {"width": 1.4}, {"bias": 0.3}])
def test_rank_histogram_has_power(change):
    sample = gaussian_posterior(np.random.default_rng(5), 1000, 32, entries=2, **change)
    assert rank_histogram(*sample).p_value < 1e-4


def test_histogram_blocks_do_not_matter(monkeypatch):
    sample = gaussian_posterior(np.random.default_rng(6), 50, 12, entries=3)
    whole = rank_histogram(*sample)
    monkeypatch.setattr("dichroic.metrics.calibration._BLOCK", 100)
    parts = rank_histogram(*map(jnp.asarray, sample))
    np.testing.assert_allclose(parts.frequencies, whole.frequencies)
    assert parts.p_value == pytest.approx(whole.p_value)


def random_covariances(rng, n, d, rank):
    roots = rng.normal(size=(n, d, rank))
    return roots @ roots.swapaxes(1, 2), roots


@pytest.mark.parametrize("rank", [3, 5])
def test_chi2_per_dim_agrees_with_scipy(rank):
    rng = np.random.default_rng(7)
    covs, roots = random_covariances(rng, 20, 5, rank)
    mean = rng.normal(size=(20, 5))
    draw = mean + np.einsum("nij,nj->ni", roots, rng.normal(size=(20, rank)))
    expected = [
        distance.mahalanobis(x, m, np.linalg.pinv(c, rcond=1e-10, hermitian=True)) ** 2 / rank
        for x, m, c in zip(draw, mean, covs, strict=True)
    ]
    assert chi2_per_dim(draw, mean, cov=covs) == pytest.approx(np.mean(expected), rel=1e-6)
    shared = stats.multivariate_normal(np.zeros(5), covs[0], allow_singular=True)
    x = shared.rvs(30, random_state=rng)
    peak = shared.logpdf(np.zeros(5))
    expected = np.mean(2 * (peak - shared.logpdf(x))) / rank
    found = chi2_per_dim(x, np.zeros((30, 5)), cov=covs[0])
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("width", [0.8, 1.0, 1.2])
def test_chi2_per_dim_of_draws_is_their_variance_ratio(width):
    n, shape, rank = 2000, (2, 3), 4
    rng = np.random.default_rng(8)
    covs, roots = random_covariances(rng, n, 6, rank)
    draw = width * np.einsum("nij,nj->ni", roots, rng.normal(size=(n, rank)))
    value = chi2_per_dim(draw.reshape(n, *shape), np.zeros((n, *shape)), cov=covs)
    assert abs(value - width**2) < 4 * width**2 * np.sqrt(2 / (n * rank))


def test_chi2_per_dim_of_a_single_precision_singular_covariance():
    rng = np.random.default_rng(9)
    root = rng.normal(size=(6, 4)).astype(np.float32)
    z = rng.normal(size=(500, 4))
    value = chi2_per_dim(z @ root.T, np.zeros((500, 6)), cov=jnp.asarray(root @ root.T))
    assert value == pytest.approx(np.mean(z**2), rel=1e-3)


def test_predictive_chi2_follows_the_chi2_distribution():
    n, d = 2000, 12
    rng = np.random.default_rng(10)
    variance = rng.uniform(0.1, 4.0, size=(n, 3, 4))
    model = rng.normal(size=(n, 3, 4))
    y = model + np.sqrt(variance) * rng.normal(size=(n, 3, 4))
    value = predictive_chi2(y, model, variance=variance)
    assert value.shape == (n,)
    assert stats.kstest(d * value, stats.chi2(d).cdf).pvalue > 1e-3
    assert abs(value.mean() - 1) < 4 * np.sqrt(2 / (n * d))


def test_predictive_chi2_ignores_what_is_not_observed():
    y = np.array([[1.0, np.nan, 3.0], [2.0, 2.0, np.nan], [np.nan] * 3])
    variance = np.array([1.0, 0.25, 4.0])
    mask = ~np.isnan(y)
    value = predictive_chi2(jnp.asarray(y), np.zeros((3, 3)), variance=variance, mask=mask)
    np.testing.assert_allclose(value, [(1 + 9 / 4) / 2, (4 + 16) / 2, np.nan])


@pytest.mark.parametrize(
    ("chi2", "mean"),
    [
        ([[1.0, np.nan, 2.0], [3.0, np.nan, 4.0]], 2.5),  # of the second, nothing was observed
        ([[1.0, 2.0], [np.nan, 4.0]], np.nan),  # a draw that is no number
        ([[1.0, np.inf]], np.inf),
        ([[np.nan, np.nan]], np.nan),
        (np.zeros((2, 0)), np.nan),
    ],
)
def test_the_mean_chi2_is_of_what_was_observed(chi2, mean):
    np.testing.assert_equal(mean_chi2(np.array(chi2)), mean)


def test_bad_draws():
    draws, truth = gaussian_posterior(np.random.default_rng(0), 10, 4, entries=3)
    with pytest.raises(ShapeError, match=r"draws \(4, 10, 3\) and truth \(10, 2\)"):
        coverage(draws, truth[:, :2])
    with pytest.raises(ShapeError, match="do not fit"):
        rank_histogram(draws[0], truth, bins=3)
    with pytest.raises(DataError, match=r"truth has 1 NaN.*\(2, 1\)"):
        coverage(draws, np.where(np.arange(30).reshape(10, 3) == 7, np.nan, truth))
    with pytest.raises(DataError, match="level must be between"):
        coverage(draws, truth, level=1.0)
    with pytest.raises(DataError, match="10 bins for 5 possible ranks"):
        rank_histogram(draws, truth)


def test_bad_chi2_input():
    x, eye = np.zeros((4, 3)), np.eye(3)
    with pytest.raises(ShapeError, match=r"cov has shape \(2, 2\), expected \(3, 3\)"):
        chi2_per_dim(x, x, cov=np.eye(2))
    with pytest.raises(ShapeError, match="same shape"):
        chi2_per_dim(x, x[:2], cov=eye)
    with pytest.raises(DataError, match="not PSD"):
        chi2_per_dim(x, x, cov=np.diag([1.0, 1.0, -0.1]))
    with pytest.raises(DataError, match="zero or negative"):
        chi2_per_dim(x, x, cov=0 * eye)
    with pytest.raises(ShapeError, match="variance has shape"):
        predictive_chi2(x, x, variance=np.ones(2))
    with pytest.raises(DataError, match="variance must be positive"):
        predictive_chi2(x, x, variance=0.0)
    with pytest.raises(DataError, match="observed part of y has 12 NaN"):
        predictive_chi2(x + np.nan, x, variance=1.0)
