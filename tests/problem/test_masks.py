"""What is masked is missing, however it is stated, and nothing under a mask is looked at."""

import numpy as np
import pytest

from dichroic import Problem, Separator, Source, View, load_problem, load_view, pad_stamps
from dichroic.errors import ConfigError, DataError, ShapeError
from dichroic.metrics import predictive_chi2
from dichroic.operators import Convolve, Diagonal, Identity
from dichroic.operators.noise import (
    DenseNoise,
    DiagonalNoise,
    IsotropicNoise,
    JointNoise,
    LowRankNoise,
    Masked,
    Noise,
    StationaryNoise,
)

N, SHAPE = 12, (2, 3)
BAD = [1, 8]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def view(y, noise: Noise | float = 0.5, **settings):
    return View(y, {"x": Identity(SHAPE)}, noise, "v", **settings)


def problem(*views):
    return Problem([Source("x", SHAPE)], views)


def same(a, b):
    """Whether two views are prepared alike."""
    one, two = a.prepare(), b.prepare()
    np.testing.assert_array_equal(one.y, two.y)
    np.testing.assert_array_equal(a.observed(), b.observed())
    for i in range(len(one.y)):
        np.testing.assert_array_equal(one.one(i).parts()[2], two.one(i).parts()[2])


@pytest.fixture
def data(rng):
    y, good = rng.normal(size=(N, *SHAPE)), rng.random((N, *SHAPE)) > 0.3
    good[:, 0, 1] = False
    return y, good


# Masks.


@pytest.mark.parametrize("values", [[0, 2, 8, 256], [0, 0.3, 1], [0, 1, -1]])
def test_a_mask_of_other_values_than_0_and_1_is_refused(values, rng):
    y, mask = rng.normal(size=(N, *SHAPE)), rng.choice(values, size=(N, *SHAPE))
    with pytest.raises(
        DataError, match=rf"a mask with values .*{max(values)}.*\(flags & BAD\) == 0"
    ):
        problem(view(y, mask=mask))
    with pytest.raises(
        DataError, match=r"held_out with values .*; expected 1 for what is held out"
    ):
        problem(view(y, held_out=mask[:, 0, 0]))
    with pytest.raises(DataError, match="a mask with values"):
        predictive_chi2(y, y, variance=1.0, mask=mask)


def test_masked_observations_are_missing(data):
    y, good = data
    masked = np.ma.masked_array(np.where(good, y, np.nan), ~good)
    plain = view(y, mask=good)
    same(view(masked), plain)
    same(view(list(masked)), plain)
    same(view(masked, mask=np.ma.masked_array(good, np.zeros_like(good))), plain)
    other = np.ones(SHAPE, bool)
    other[1, 2] = False
    same(view(masked, mask=other), view(y, mask=good & other))
    holes = np.where(np.arange(3) == 1, np.nan, y)
    same(view(np.ma.masked_array(holes, ~good), mask="nan"), view(y, mask=good & ~np.isnan(holes)))
    same(view(y, mask=np.ma.masked_array(np.ones(good.shape), ~good)), plain)
    whole = view(np.ma.masked_array(y, np.zeros(y.shape, bool)))
    assert whole.mask is None
    same(whole, view(y))
    assert view(masked).select(slice(2, 5)).observed().tolist() == good[2:5].tolist()
    assert problem(view(masked)).fingerprint() != problem(view(y)).fingerprint()


class Astropylike:
    """As `astropy.nddata.CCDData`: an array of its own with a mask."""

    def __init__(self, data, mask):
        self.data, self.mask = data, mask
        self.shape = data.shape

    def __array__(self, dtype=None, copy=None):
        return self.data


def test_a_mask_of_other_libraries_counts(data):
    y, good = data
    same(view(Astropylike(y, ~good)), view(y, mask=good))


def test_masked_truth_and_held_out_are_refused(data):
    y, good = data
    with pytest.raises(DataError, match=r"view 'v', source 'x': the truth: \d+ entries are masked"):
        view(y, truth={"x": np.ma.masked_array(y, ~good)})
    with pytest.raises(DataError, match="held_out: .* masked"):
        view(y, held_out=np.ma.masked_array(np.arange(N) == 3, np.arange(N) == 1))


# Under the mask.


def noises(good, bad):
    """Noise of every kind, of which what is stated of missing entries is `bad`."""
    flat = good.reshape(N, -1)
    never, m = ~flat.any(0), flat.shape[1]
    variance = np.where(flat, 0.3 + np.arange(m) / 10, bad)
    shared = np.where(never, bad, 0.3 + np.arange(m) / 10)
    cov = np.diag(0.5 + np.arange(m)) + 0.1
    rows = np.where(flat[:, :, None] & flat[:, None], cov, bad)
    factor = np.where(flat[..., None], 0.5, bad)
    return {
        "diagonal": DiagonalNoise(variance),
        "shaped": DiagonalNoise(variance.reshape(N, *SHAPE)),
        "masked": DiagonalNoise(np.ma.masked_array(np.where(flat, variance, 5), ~flat)),
        "shared": DiagonalNoise(shared),
        "dense": DenseNoise(rows),
        "dense-shared": DenseNoise(np.where(never[:, None] | never, bad, cov)),
        "low-rank": LowRankNoise(factor, variance),
        "low-rank-shared": LowRankNoise(np.where(never, bad, 0.5)[:, None], shared),
        "masked-noise": Masked(DiagonalNoise(variance), flat),
        "joint": JointNoise(
            (DiagonalNoise(variance[:, :2]), DiagonalNoise(shared[2:])), (2, m - 2)
        ),
    }


KINDS = list(noises(np.ones((N, *SHAPE), bool), 1.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_what_is_stated_of_missing_entries_is_not_looked_at(kind, bad, data):
    y, good = data
    one = view(np.where(good, y, bad), noises(good, bad)[kind], mask=good)
    two = view(np.where(good, y, 7.0), noises(good, 1.0)[kind], mask=good)
    problem(one)
    same(one, two)
    assert all(np.isfinite(part).all() for part in one.prepare().one(3).system()[2:])
    same(one.select(np.array([1, 4])), two.select(np.array([1, 4])))


def test_noise_with_a_mask_of_its_own_hides_observations_too(data):
    y, good = data
    noise = Masked(IsotropicNoise(0.5), good.reshape(N, -1))
    same(view(np.where(good, y, np.nan), noise), view(np.where(good, y, 3.0), noise))


def test_an_observation_without_any_entry_may_have_any_noise(data):
    y, good = data
    good[4] = False
    lags = np.ones((N, 1, 1))
    for bad in (np.nan, 0.0):
        std, lags[4] = np.where(np.arange(N) == 4, bad, 0.5), bad
        same(view(y, IsotropicNoise(std), mask=good), view(y, IsotropicNoise(0.5), mask=good))
        obs = view(y, StationaryNoise(lags, ndim=2), mask=good).prepare()
        assert all(np.isfinite(obs.one(i).parts()[2]).all() for i in (3, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: DiagonalNoise(v), r"view 'v': the noise variance is nan at observation 3, entry \(1, 2\).*mask"),
        (lambda v: DiagonalNoise(v[3]), r"variance is nan at entry \(1, 2\); .*with a mask"),
        (lambda v: IsotropicNoise(v[:, 1, 2]), "the noise standard deviation is nan at observation 3"),
        (lambda v: DenseNoise(np.diag(v[3].ravel())), r"covariance is nan at entries \(1, 2\) and \(1, 2\)"),
        (lambda v: LowRankNoise(v.reshape(N, -1, 1), np.ones(6)), r"factor is nan at observation 3, entry \(1, 2\)"),
        (lambda v: DiagonalNoise(np.nan_to_num(v, nan=1e37)), r"variance of 1e\+37 at observation 3, entry \(1, 2\)"),
    ],
)  # fmt: skip
def test_bad_noise_where_something_was_observed_says_where(make, message):
    variance = np.ones((N, *SHAPE))
    variance[3, 1, 2] = np.nan
    with pytest.raises(DataError, match=message):
        view(np.ones((N, *SHAPE)), make(variance)).prepare()
    with pytest.raises(DataError, match=message.replace("view 'v': ", "")):
        seen = np.ones((N, *SHAPE))
        seen[5] = 0
        view(np.ones((N, *SHAPE)), make(variance), mask=seen).prepare()


# In files.

FILE = """
sources: {x: [2, 3]}
views:
  v:
    observations: y.npy
    operators: {x: identity}
    noise: {diagonal: variance.npy}
    mask: MASK
"""


@pytest.fixture
def files(tmp_path, data):
    y, good = data
    flags = np.where(good, 4, 4 + 8).astype(">i4")
    flags[1, 1, 1] = 1 - 2**31  # the highest bit of all is set, too
    good[1, 1, 1] = False
    variance = np.where(good, 0.4, 0)
    arrays = {"y": np.where(good, y, 65535), "flags": flags, "variance": variance, "good": good}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)

    def load(mask, **settings):
        (tmp_path / "p.yaml").write_text(FILE.replace("MASK", mask))
        return load_problem(tmp_path / "p.yaml", **settings)[0]

    return tmp_path, load, arrays


@pytest.mark.parametrize("stored", [False, True])
def test_flags_in_a_problem_file(files, stored):
    folder, load, arrays = files
    plain = view(arrays["y"], DiagonalNoise(arrays["variance"]), mask=arrays["good"])
    for mask in (
        "{flags: flags.npy, bad: [1, 8]}",
        "{flags: {file: flags.npy}, bad: 9}",
        "good.npy",
    ):
        found = load(mask, stored=stored).views[0]
        same(found.select(slice(0, N)), plain)
        some = np.array([1, 5, 6])
        same(found.select(some), plain.select(some))


def test_any_flag_is_bad_where_none_is_named(files):
    folder, load, arrays = files
    np.save(folder / "flags.npy", np.where(arrays["good"], 0, 16).astype(np.uint8))
    np.testing.assert_array_equal(load("{flags: flags.npy}").views[0].observed(), arrays["good"])


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("{flags: variance.npy, bad: 1}", DataError, "mask.flags: flags of type float64; expected integers"),
        ("{flags: flags.npy, bad: [0]}", ConfigError, "mask.bad: expected the bits"),
        ("{flags: flags.npy, bad: 8589934592}", ConfigError, "in flags of type uint32; got 8589934592"),
        ("{flags: flags.npy, bad: []}", ConfigError, "mask.bad: expected the bits"),
        ("{bad: 1}", ConfigError, "mask: 'flags' is missing"),
        ("{flags: flags.npy, good: 1}", ConfigError, "unknown key 'good'"),
        ("flags.npy", DataError, r"a mask with values .* mask: \{flags: …, bad:"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stored", [False, True])
def test_flags_that_cannot_be_read_are_refused(files, mask, error, message, stored):
    with pytest.raises(error, match="^p.yaml: .*" + message):
        files[1](mask, stored=stored)


def test_flags_and_masked_arrays_of_a_new_view(files):
    _, load, arrays = files
    known, plain = load("good.npy"), view(arrays["y"], 0.5, mask=arrays["good"])
    flags = {"flags": arrays["flags"], "bad": BAD}
    spec = {"observations": arrays["y"], "noise": 0.5, "operators": {"x": "identity"}}
    same(load_view({**spec, "mask": flags}, known), plain)
    masked = np.ma.masked_array(arrays["y"], ~arrays["good"])
    same(load_view({**spec, "observations": masked}, known), plain)
    same(load_view({**spec, "observations": list(masked)}, known), plain)


def test_the_mask_of_the_problem_and_of_a_new_masked_array_both_count(rng):
    dead = np.array([[1, 1, 0], [1, 1, 1]])
    known = problem(view(rng.normal(size=(N, *SHAPE)), mask=dead))
    y = np.ma.masked_array(rng.normal(size=(2, *SHAPE)), np.zeros((2, *SHAPE), bool))
    y[1, 1, 0] = np.ma.masked
    seen = load_view({"observations": y}, known).observed()
    assert (~seen).sum(axis=(1, 2)).tolist() == [1, 2]
    assert not seen[:, 0, 2].any()


def test_an_operator_that_is_a_mask_has_zeros_and_ones(files):
    folder, _, _ = files
    text = FILE.replace("MASK", "good.npy").replace("identity", "{mask: [[1, 1, 0.3], [1, 1, 1]]}")
    (folder / "p.yaml").write_text(text)
    with pytest.raises(DataError, match="a mask with values 0.3, 1; .*weights are a diagonal"):
        load_problem(folder / "p.yaml")


# Stamps of unequal sizes.


def test_ragged_observations_say_what_to_do():
    stamps = [np.ones((5, 5)), np.ones((6, 6))]
    objects = np.empty(2, object)
    objects[:] = stamps
    for y in (stamps, objects, tuple(stamps)):
        with pytest.raises(
            DataError, match=r"number 1 has shape \(6, 6\), and number 0 \(5, 5\).*pad_stamps"
        ):
            View(y, {"x": Identity((6, 6))}, 0.1)
    objects[0] = np.zeros((6, 6))
    assert View(objects, {"x": Identity((6, 6))}, 0.1).shape == (6, 6)


def test_stamps_are_padded_around_their_centres():
    stamps = [np.arange(1, 10).reshape(3, 3), np.ma.masked_equal(np.full((4, 5), 7.0), 8)]
    stamps[1][0, 0] = np.ma.masked
    padded = pad_stamps(stamps)
    assert padded.shape == (2, 4, 5)
    assert padded[0, 2, 2] == 5  # size // 2 of both
    assert (~padded.mask).sum(axis=(1, 2)).tolist() == [9, 19]
    assert padded.mask[1, 0, 0]
    assert pad_stamps(stamps, (6, 7))[0, 3, 3] == 5
    assert pad_stamps(stamps, centre=False)[0, 0, 0] == 1
    found = View(
        padded, {"x": Identity((4, 5))}, DiagonalNoise(pad_stamps([s * 0 + 2 for s in stamps]))
    )
    np.testing.assert_array_equal(found.observed(), ~padded.mask)
    assert found.prepare().count == 2


@pytest.mark.parametrize(
    ("stamps", "shape", "error"),
    [([], None, DataError), ([np.ones(3), np.ones((2, 2))], None, ShapeError), ([np.ones(5)], (4,), ShapeError)],
)  # fmt: skip
def test_stamps_that_do_not_fit_are_refused(stamps, shape, error):
    with pytest.raises(error, match="pad_stamps"):
        pad_stamps(stamps, shape)


# From beginning to end.


@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.slow
def test_a_survey_cube_is_separated_whatever_lies_under_its_flags(count, rng):
    bands, side = 5, 4
    shape = (bands, side, side)
    widths = np.linspace(0.4, 1.2, bands)[:, None, None]
    at = np.arange(3) - 1
    psf = np.exp(-(at[:, None] ** 2 + at**2) / (2 * widths**2))
    psf /= psf.sum((1, 2), keepdims=True)
    blur = Convolve(psf, shape=shape, channels="each") @ Diagonal(
        np.linspace(1, 2, bands).reshape(bands, 1, 1), shape=shape
    )
    x = rng.normal(size=(count, *shape)).cumsum(axis=1)
    flags = np.where(rng.random(x.shape) < 0.2, rng.choice([2, 8, 256], size=x.shape), 4)
    good = (flags & (2 | 8 | 256)) == 0
    y = blur.each(x) + 0.1 * rng.normal(size=x.shape)
    found = []
    for value, variance in ((65535, 0), (np.nan, np.nan), (-3, 1e3)):
        noise = DiagonalNoise(np.where(good, 0.01, variance))
        seen = View(np.where(good, y, value), {"x": blur}, noise, "v", mask=good)
        settings = {
            "mixture": {
                "components": 1,
                "gaussian_iterations": 2,
                "iterations": 1,
                "final_iterations": 1,
            },
            "diffusion": {"iterations": 0},
        }
        separator = Separator(Problem([Source("x", shape)], [seen]), settings)
        result = separator.fit(progress=False).separate("v", n_draws=2)
        found.append((result.mean["x"], result.draws["x"]))
    for mean, draws in found[1:]:
        np.testing.assert_array_equal(mean, found[0][0])
        np.testing.assert_array_equal(draws, found[0][1])
    assert np.isfinite(found[0][1]).all()
