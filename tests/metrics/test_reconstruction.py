import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.errors import DataError, ShapeError
from dichroic.metrics import psnr


def test_constant_errors_average_in_decibels():
    truth = np.zeros((2, 4, 4))
    draw = np.stack([np.full((4, 4), 0.1), np.full((4, 4), 0.01)])
    assert psnr(draw, truth, data_range=1.0) == pytest.approx(30.0, abs=1e-3)
    assert psnr(draw, truth, data_range=10.0) == pytest.approx(50.0, abs=1e-3)


def test_a_perfect_draw_is_finite():
    truth = np.ones((3, 5), np.float32)
    assert psnr(jnp.asarray(truth), truth, data_range=1.0) == pytest.approx(120.0)


def test_gaussian_errors_give_their_standard_deviation():
    n, d, sigma = 500, 400, 0.2
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(n, d))
    value = psnr(truth + sigma * rng.normal(size=(n, d)), truth, data_range=2.0)
    # log(rmse / sigma) has mean -1/(2d) and standard deviation 1/sqrt(2d), to leading order.
    decibel = 20 / np.log(10)
    expected = 20 * np.log10(2.0 / sigma) + decibel / (2 * d)
    assert abs(value - expected) < 4 * decibel / np.sqrt(2 * d * n)


def test_bad_input():
    good = np.zeros((3, 4))
    with pytest.raises(ShapeError, match=r"draw \(3, 4\) and truth \(3, 5\)"):
        psnr(good, np.zeros((3, 5)), data_range=1.0)
    with pytest.raises(ShapeError, match="n > 0"):
        psnr(np.zeros((0, 4)), np.zeros((0, 4)), data_range=1.0)
    bad = good.copy()
    bad[1, 2] = np.nan
    with pytest.raises(DataError, match=r"truth has 1 NaN.*\(1, 2\)"):
        psnr(good, bad, data_range=1.0)
    with pytest.raises(DataError, match="data_range must be positive"):
        psnr(good, good, data_range=0.0)
