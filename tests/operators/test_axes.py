"""What the axes of kernels and noise stand for is stated, also where there are as many observations as channels."""

import numpy as np
import pytest

from dichroic import View, load_problem
from dichroic.errors import DichroicError, ShapeError
from dichroic.operators import Convolve, Diagonal, Identity, Scale
from dichroic.operators.noise import DiagonalNoise, IsotropicNoise, LowRankNoise, StationaryNoise

C, SHAPE = 3, (3, 4, 5)
VARIANCE = np.arange(1.0, 4.0)


def variances(noise, count=7, shape=SHAPE):
    """The variances of every observation, as the view has them."""
    obs = View(np.zeros((count, *shape)), {"x": Identity(shape)}, noise).prepare()
    return np.stack([obs.one(i).noise.variances(obs.size).reshape(shape) for i in range(count)])


@pytest.mark.parametrize("count", [C, 7])
def test_noise_per_channel_and_per_observation(count):
    per_channel = np.broadcast_to(VARIANCE[:, None, None], (count, *SHAPE))
    np.testing.assert_array_equal(
        variances(DiagonalNoise(VARIANCE[:, None, None]), count), per_channel
    )
    own = np.arange(1.0, count + 1)[:, None, None, None]
    both = own * VARIANCE[:, None, None]
    np.testing.assert_array_equal(variances(DiagonalNoise(both), count), both * np.ones(SHAPE))
    np.testing.assert_array_equal(variances(DiagonalNoise(own), count), own * np.ones(SHAPE))
    std = np.sqrt(own[:, 0, 0, 0])
    np.testing.assert_allclose(
        variances(IsotropicNoise(std), count), own * np.ones(SHAPE), rtol=1e-6
    )
    low_rank = LowRankNoise(np.zeros((60, 1)), VARIANCE[:, None, None])
    np.testing.assert_array_equal(variances(low_rank, count), per_channel)


@pytest.mark.parametrize(
    ("noise", "shape", "count", "message"),
    [
        (DiagonalNoise(VARIANCE), SHAPE, C, r"one per channel has shape \(3, 1, 1\), or \(n, 3, 1, 1\)"),
        (DiagonalNoise(VARIANCE), SHAPE, 7, r"one per channel has shape \(3, 1, 1\)"),
        (DiagonalNoise(VARIANCE[:, None]), (C, 9), C, r"broadcast_to\(array, \(3, 9\)\).*reshape\(3, 1, 1\)"),
        (IsotropicNoise(VARIANCE), SHAPE, 7, r"for 3 observations, .* are 7 .*; for one per channel, .*\(3, 1, 1\)"),
        (IsotropicNoise(np.ones((C, 1, 1))), SHAPE, 7, r"expected \(\), or \(n,\) .*DiagonalNoise takes"),
        (StationaryNoise(np.eye(3)), (C, 9), 7, r"lags, ndim=2 .*ndim=1 for one per observation"),
    ],
)  # fmt: skip
def test_noise_whose_axes_are_left_open_is_refused(noise, shape, count, message):
    with pytest.raises(ShapeError, match=message):
        variances(noise, count, shape)


def test_lags_along_three_axes_are_to_be_stated():
    with pytest.raises(ShapeError, match="ndim=3"):
        StationaryNoise(np.ones((3, 3, 3)))
    assert StationaryNoise(np.ones((3, 3, 3)), ndim=2).ndim == 2
    cov = np.zeros((3, 3))
    cov[1, 1] = 2
    assert np.all(variances(StationaryNoise(cov, ndim=2), shape=(C, 9)) == 2)


def test_factors_per_channel_are_not_those_of_observations():
    y = np.zeros((7, *SHAPE))
    with pytest.raises(ShapeError, match=r"for 3 observations.*Diagonal .*\(3, 1, 1\)"):
        View(y, {"x": Scale(SHAPE, VARIANCE)}, 1.0).prepare()
    op = Diagonal(VARIANCE[:, None, None], shape=SHAPE)
    assert View(y, {"x": op}, 1.0).prepare().operators["x"].diagonal.shape == SHAPE
    with pytest.raises(ShapeError, match=r"one factor per channel has shape \(3, 1, 1\)"):
        Diagonal(VARIANCE, shape=SHAPE)


FILE = """
sources: {x: [3, 4, 5]}
views:
  v: {observations: y.npy, operators: {x: OPERATOR}, noise: NOISE}
"""


@pytest.fixture(params=[C, 7], ids=["as-many-observations-as-channels", "more"])
def load(request, tmp_path):
    rng, n = np.random.default_rng(0), request.param
    arrays = {
        "y": rng.normal(size=(n, *SHAPE)),
        "each": rng.uniform(0.1, 1, size=(C, 3, 2)),
        "rows": rng.uniform(0.1, 1, size=(n, 3, 2)),
        "rows_each": rng.uniform(0.1, 1, size=(n, C, 3, 2)),
        "channel": VARIANCE,
        "own": np.arange(1.0, n + 1),
        "both": np.arange(1.0, n + 1)[:, None] * VARIANCE,
        "full": VARIANCE[:, None, None],
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)

    def load(operator, noise, stored):
        text = FILE.replace("OPERATOR", operator).replace("NOISE", noise)
        (tmp_path / "p.yaml").write_text(text)
        return load_problem(tmp_path / "p.yaml", stored=stored)[0].views[0], arrays

    return load


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    ("spec", "kernel", "settings"),
    [
        ("{convolve: {kernel: each.npy, channels: each}}", "each", {"channels": "each"}),
        ("{convolve: {kernel: rows.npy, channels: all}}", "rows", {"channels": "all"}),
        ("{convolve: {kernel: rows_each.npy, channels: each}}", "rows_each", {"channels": "each"}),
        (
            "{convolve: {kernel: rows.npy, channels: all, centre: [1, 0]}}",
            "rows",
            {"channels": "all", "centre": (1, 0)},
        ),
    ],
)
def test_kernels_in_a_problem_file(load, stored, spec, kernel, settings):
    view, arrays = load(spec, "1", stored)
    x = np.random.default_rng(1).normal(size=arrays["y"].shape)
    want = Convolve(arrays[kernel], shape=SHAPE, **settings).each(x)
    np.testing.assert_array_equal(view.select(slice(0, len(x))).operators["x"].each(x), want)
    for rows in (slice(1, 4), np.array([0, 2])):  # three, as many as channels, and two
        some = view.select(rows).operators["x"].each(x[rows])
        np.testing.assert_allclose(some, want[rows], atol=1e-5)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("{diagonal: {variance: channel.npy, per: channel}}", lambda own: VARIANCE[:, None, None]),
        ("{diagonal: {std: channel.npy, per: channel}}", lambda own: VARIANCE[:, None, None] ** 2),
        ("{diagonal: full.npy}", lambda own: VARIANCE[:, None, None]),
        ("{diagonal: {variance: both.npy, per: channel}}", lambda own: own * VARIANCE[:, None, None]),
        ("{diagonal: {std: own.npy, per: observation}}", lambda own: own**2),
        ("{isotropic: own.npy}", lambda own: own**2),
    ],
)  # fmt: skip
def test_noise_in_a_problem_file(load, stored, spec, want):
    view, arrays = load("identity", spec, stored)
    n = len(arrays["y"])
    expected = np.broadcast_to(want(arrays["own"][:, None, None, None]), (n, *SHAPE))
    for rows in (slice(0, n), slice(0, 3), np.array([0, 2])):
        obs = view.select(rows).prepare()
        got = [obs.one(i).noise.variances(60).reshape(SHAPE) for i in range(obs.count)]
        np.testing.assert_allclose(got, expected[rows], rtol=1e-5)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    ("operator", "noise", "message"),
    [
        ("{convolve: each.npy}", "1", r"x.convolve: Convolve: is a kernel .*channels='each'"),
        ("{convolve: {kernel: each.npy, ndim: 2}}", "1", r"x.convolve: Convolve: is a kernel .*'each'"),
        ("{convolve: {kernel: each.npy, channels: most}}", "1", "channels='most'"),
        ("{convolve: {kernel: each.npy, channels: each, centre: 0.5}}", "1", "centre: expected an integer"),
        ("identity", "{diagonal: channel.npy}", r"(one per channel has shape|one row per observation)"),
        ("identity", "{diagonal: {variance: rows.npy, per: channel}}", "one per channel|one row per"),
        ("identity", "{diagonal: {variance: full.npy, per: band}}", "per one of entry, channel, obs"),
        ("identity", "{diagonal: {variance: full.npy, std: full.npy}}", "expected {variance: …, per"),
    ],
)  # fmt: skip
def test_what_a_problem_file_leaves_open_is_refused(load, operator, noise, message, stored):
    with pytest.raises(DichroicError, match="^p.yaml: .*" + message):
        load(operator, noise, stored)[0].prepare()


@pytest.mark.parametrize("load", [7], indirect=True)
@pytest.mark.parametrize("stored", [False, True])
def test_a_standard_deviation_per_channel_is_not_one_per_observation(load, stored):
    with pytest.raises(ShapeError, match="one per channel"):
        load("identity", "{isotropic: channel.npy}", stored)
