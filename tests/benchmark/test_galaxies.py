"""Galaxies: stand-ins for the files, written with astropy; and the real ones where they are at hand."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from matplotlib.axes import Axes
from scipy.ndimage import gaussian_filter

from dichroic.benchmark.problems import blends, galaxies
from dichroic.benchmark.problems.remote import find_file
from dichroic.errors import DataError
from dichroic.io import load_problem
from dichroic.separation.result import save_npz
from dichroic.separation.separator import Separator

EXAMPLE = Path(__file__).parents[2] / "examples/galaxies/problem.yaml"
STD = 0.002


def correlated(rng, shape):
    """Noise of variance 1 with `correlation()`."""
    white = rng.normal(size=(shape[0] + 1, shape[1] + 1))
    return (white[1:, 1:] + white[:-1, 1:] + white[1:, :-1] + white[:-1, :-1]) / 2


def correlation(reach=20):
    tent = np.zeros(2 * reach + 1)
    tent[reach - 1 : reach + 2] = 0.5, 1, 0.5
    return np.outer(tent, tent)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 round galaxies of several sizes and brightnesses, with noise that is known to be correlated."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data")
    (path / "galaxies").mkdir()
    stamps, psfs = [], []
    for i in range(40):
        side = int(rng.choice([30, 42, 54, 66, 90]))
        x = np.arange(side) - (side - 1) / 2
        round_ = np.exp(-np.hypot(x[:, None], x) / rng.uniform(3, 8))
        bright = 10 ** rng.uniform(1, 2.5) * STD
        stamps.append(bright * round_ + STD * correlated(rng, (side, side)))
        spot = np.zeros((65, 51))
        spot[32, 25] = 1
        psfs.append(gaussian_filter(spot, 2.0))
    write = lambda name, units: fits.HDUList(units).writeto(path / f"galaxies/{name}.fits")
    units = lambda images: [fits.PrimaryHDU(images[0]), *map(fits.ImageHDU, images[1:])]
    write(galaxies.STAMPS, units(stamps))
    write(galaxies.PSFS, units(psfs))
    write(galaxies.CORRELATION, [fits.PrimaryHDU(1e-5 * correlation())])
    variance = fits.Column("NOISE_VARIANCE", "D", array=np.full(40, STD**2))
    write(galaxies.CATALOGUE, [fits.PrimaryHDU(), fits.BinTableHDU.from_columns([variance])])
    return path


def test_the_covariance_of_block_means_is_that_of_simulated_noise():
    rng = np.random.default_rng(1)
    fine = np.stack([correlated(rng, (64, 64)) for _ in range(200)])
    coarse = np.stack([galaxies.shrink(f) for f in fine])
    expect = galaxies.blocked_covariance(correlation())
    for dy, dx in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]:
        a, b = coarse[:, dy:, dx:], coarse[:, : 32 - dy, : 32 - dx]
        # 200 fields of about 1000 blocks, neighbours correlated: an error of about 3/√(200 000)
        assert np.mean(a * b) == pytest.approx(expect[6 + dy, 6 + dx], abs=0.01)


def test_stamps_have_noise_of_one_and_masks_of_their_size(folder):
    stamps, camera = galaxies.load_galaxies(folder)
    assert camera.covariance[6, 6] == 1
    assert np.all((stamps.seen == 0) | (stamps.seen == 1))
    np.testing.assert_array_equal(stamps.image[stamps.seen == 0], 0)
    side = np.sqrt(stamps.seen.sum(axis=(1, 2)))
    np.testing.assert_array_equal(side, np.minimum(4 * (stamps.extent // 8), 32))
    edge = stamps.image[stamps.extent == 90][:, [0, -1]]  # where galaxies are faint
    assert np.std(edge - np.median(edge)) == pytest.approx(1, rel=0.5)


def test_the_point_spread_function_is_centred_and_sums_to_one(folder):
    _, camera = galaxies.load_galaxies(folder)
    assert camera.psf.sum() == pytest.approx(1)
    for way in range(8):
        np.testing.assert_allclose(galaxies.turned(camera.psf, way), camera.psf, atol=1e-12)
    x = np.arange(15) - 7
    second = np.sum(camera.psf * x**2)  # 2 pixels of the file, and blocks of two: 1 + (1/2) / 4
    assert second == pytest.approx(1 + 0.5 / 4, rel=0.05)


def test_the_problem_file_states_what_the_camera_sees(folder, tmp_path):
    save_npz(tmp_path / "data.npz", galaxies.galaxy_arrays(sky=32, data_dir=folder))
    (tmp_path / "problem.yaml").write_text(EXAMPLE.read_text())
    problem, settings = load_problem(tmp_path / "problem.yaml")
    _, camera = galaxies.load_galaxies(folder)
    view = problem.view("galaxy")
    x = np.random.default_rng(2).normal(size=(view.count, 32, 32)).astype(np.float32)
    amplitude = galaxies.amplitudes(view.observations)
    expect = camera.look(amplitude).each(x)
    np.testing.assert_allclose(view.operators["galaxy"].each(x), expect, rtol=1e-4, atol=1e-3)
    assert 0 < view.held_out_mask.mean() < 0.5
    assert Separator(problem, settings).config.mixture.components == 4


def test_held_out_galaxies_are_none_of_those_to_learn_from(folder):
    stamps, _ = galaxies.load_galaxies(folder)
    train, stop, held = galaxies.divided(stamps)
    parts = [{x.tobytes() for x in part.image} for part in (train, stop, held)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40
    view, truth, own = galaxies.held_out_view(count=64, data_dir=folder)
    assert np.all((own > 0) & (own < 1))
    rest = (view.observations - truth["galaxy"] - truth["sky"])[view.mask > 0]
    assert np.std(rest) == pytest.approx(1, rel=0.05)
    low, high = galaxies.FAINT
    flux = galaxies.central_flux(truth["galaxy"])
    assert np.all((flux > 0.9 * low) & (flux < 1.1 * high))


def test_a_wiener_filter_brings_galaxies_closer(folder):
    arrays = galaxies.galaxy_arrays(sky=32, data_dir=folder)
    view, truth, _ = galaxies.held_out_view(count=64, data_dir=folder)
    error = lambda x: np.mean((x - truth["galaxy"]) ** 2)
    assert error(galaxies.wiener(view, arrays)) < 0.6 * error(view.observations)


def test_blends_add_up(folder):
    view, truth, own = blends.blend_view(count=6, data_dir=folder)
    np.testing.assert_array_equal(own["left"] == 0, truth["left"] == 0)
    rest = view.observations - truth["left"] - truth["right"]
    assert np.std(rest) == pytest.approx(1, rel=0.1)
    for name, x in truth.items():
        rows = np.sum(x * np.arange(40)[None, :, None], axis=(1, 2)) / x.sum(axis=(1, 2))
        columns = np.sum(x * np.arange(40), axis=(1, 2)) / x.sum(axis=(1, 2))
        assert np.all((columns < 21) if name == "left" else (columns > 18))
        one = np.zeros((6, 32, 32), np.float32)
        one[:, 15:17, 15:17] = 1
        seen = view.operators[name].each(one)
        at = [np.unravel_index(s.argmax(), s.shape) for s in seen]
        np.testing.assert_allclose([a[0] for a in at], rows, atol=3)
        np.testing.assert_allclose([a[1] for a in at], columns, atol=3)


def test_the_picture_of_the_prior_calls_stamps_stamps(folder, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("example", EXAMPLE.with_name("example.py"))
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    arrays = {"galaxy": np.ones((800, 32, 32)), "amplitude": np.ones(800)}
    prior = SimpleNamespace(sample_prior=lambda name, n: np.ones((n, 32, 32)))
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axis, title, **_: titles.append(title))
    example.new_galaxies(prior, arrays, folder, tmp_path)
    assert titles == [f"stamp {i}" for i in range(1, 7)] + [f"new {i}" for i in range(1, 6)]
    assert (tmp_path / "prior.png").stat().st_size > 0


def test_missing_files_are_said(tmp_path):
    with pytest.raises(DataError, match="acs_I_unrot_sci_20_cf.fits in the data folder"):
        galaxies.load_galaxies(tmp_path)
    with pytest.raises(DataError, match="hsc_cosmos_35.npz in the data folder"):
        blends.load_scene(tmp_path)


@pytest.mark.skipif(
    find_file(f"galaxies/{galaxies.STAMPS}.fits") is None, reason="no galaxies (DICHROIC_DATA)"
)
def test_real_galaxies_and_the_real_scene():
    stamps, camera = galaxies.load_galaxies()
    assert len(stamps.image) == 100
    assert np.linalg.eigvalsh(np.asarray(camera.noise.as_matrix(1024), float)).min() > 0
    view = blends.scene_view(blends.load_scene())
    assert (view.count, view.shape, len(view.operators)) == (5, (58, 48), 7)
    first = view.operators["object1"].each(np.ones((5, 32, 32), np.float32))
    brightest = np.unravel_index(first[2].argmax(), (58, 48))
    assert np.hypot(*np.subtract(brightest, (33, 14))) < 3


def test_a_missing_library_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "astropy.io.fits", None)
    with pytest.raises(
        DataError, match=r"\.fits' needs astropy: pip install 'dichroic\[astronomy\]'"
    ):
        galaxies.load_galaxies(folder)
