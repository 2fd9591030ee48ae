import jax.numpy as jnp
import numpy as np
import pytest
from scipy import spatial, stats

from dichroic.errors import DataError, ShapeError
from dichroic.metrics import pqm_pvalues, pqmass


def test_p_values_are_uniform_for_one_distribution():
    rng = np.random.default_rng(0)
    pairs, regions, p, chi2 = 300, 20, [], []
    for seed in range(pairs):
        x, y = rng.normal(size=(500, 4)), rng.normal(size=(300, 4))
        values = pqm_pvalues(x, y, regions=regions, repeats=1, seed=seed)
        p.extend(values[0])
        chi2.extend(values[1])
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert stats.kstest(chi2, stats.chi2(regions - 1).cdf).pvalue > 1e-3
    mean, deviation = regions - 1, np.sqrt(2 * (regions - 1) / pairs)
    assert abs(np.mean(chi2) - mean) < 4 * deviation


@pytest.mark.parametrize("change", [lambda y: y + 0.3, lambda y: 1.3 * y, lambda y: np.abs(y)])
def test_different_distributions_are_told_apart(change):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2000, 3)), change(rng.normal(size=(2000, 3)))
    result = pqmass(x, y, regions=50, repeats=20)
    assert result.p_value < 1e-3
    assert result.chi2_per_dof > 2


def test_chi2_is_that_of_scipy_for_the_same_cells():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(400, 3)), 0.1 + rng.normal(size=(250, 3))
    p, chi2 = pqm_pvalues(x, y, regions=15, repeats=1, seed=5)
    pooled = np.concatenate([x, y])
    references = pooled[np.random.default_rng(5).choice(650, size=15, replace=False)]
    nearest = spatial.KDTree(references).query
    counts = [np.bincount(nearest(part)[1], minlength=15) for part in (x, y)]
    expected = stats.chi2_contingency(np.stack(counts), correction=False)
    np.testing.assert_allclose(chi2, expected.statistic, rtol=1e-10)
    np.testing.assert_allclose(p, expected.pvalue, rtol=1e-8)


def test_summary_and_seed():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 500, 2))
    result = pqmass(jnp.asarray(x), jnp.asarray(y), regions=10, repeats=7, seed=1)
    p, chi2 = pqm_pvalues(jnp.asarray(x), y.astype(np.float32), regions=10, repeats=7, seed=1)
    assert p.shape == chi2.shape == (7,)
    np.testing.assert_array_equal(result.p_values, p)
    assert result.p_value == pytest.approx(p.mean())
    assert result.chi2_per_dof == pytest.approx(chi2.mean() / 9)
    assert not np.array_equal(p, pqm_pvalues(x, y, regions=10, repeats=7, seed=2)[0])


def test_copies_share_cells_and_give_p_values_of_one():
    x = np.repeat(np.random.default_rng(4).normal(size=(100, 2)), 3, axis=0)
    result = pqmass(x, x, regions=20, repeats=5)
    np.testing.assert_allclose(result.chi2, 0.0, atol=1e-12)
    assert result.p_value == 1.0


def test_bad_input():
    x = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises(DataError, match="100 regions for 40 points"):
        pqmass(x, x)
    with pytest.raises(DataError, match="repeats"):
        pqmass(x, x, regions=4, repeats=0)
    with pytest.raises(DataError, match="coincide"):
        pqmass(np.ones((20, 2)), np.ones((20, 2)), regions=4)
    with pytest.raises(ShapeError, match="dimensions"):
        pqm_pvalues(x, x[:, :1], regions=4)
    with pytest.raises(DataError, match="x has 1 NaN"):
        pqm_pvalues(np.where(np.arange(40).reshape(20, 2) == 3, np.nan, x), x, regions=4)
