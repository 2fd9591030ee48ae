"""Files in the formats of a field, written by the field's own libraries."""

import sys
import warnings

import numpy as np
import pytest
import soundfile
from astropy.io import fits
from PIL import Image

from dichroic.errors import DataError, ShapeError
from dichroic.statement import load_array, load_problem

with warnings.catch_warnings():  # of obspy, about its own dependencies
    warnings.simplefilter("ignore")
    import obspy


@pytest.fixture
def sky(tmp_path, rng):
    image, variance = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    table = fits.BinTableHDU.from_columns(
        [
            fits.Column("MAG", "D", array=rng.normal(size=3)),
            fits.Column("ID", "J", array=[1, 2, 3]),
        ],
        name="CAT",
    )
    units = [
        fits.PrimaryHDU(),
        fits.ImageHDU(image, name="SCI"),
        fits.ImageHDU(variance, name="VAR"),
        table,
    ]
    fits.HDUList(units).writeto(tmp_path / "sky.fits")
    fits.PrimaryHDU(image).writeto(tmp_path / "one.fits")
    return {"image": image, "variance": variance, "mag": table.data["MAG"]}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("one.fits", "image"),
        ("one.fits:0", "image"),
        ("sky.fits:SCI", "image"),
        ("sky.fits:2", "variance"),
        ("sky.fits:var", "variance"),
        ("sky.fits:CAT/MAG", "mag"),
        ({"file": "sky.fits", "key": "SCI"}, "image"),
    ],
)
def test_fits(tmp_path, sky, reference, name):
    found = load_array(reference, tmp_path)
    np.testing.assert_array_equal(found, sky[name])
    assert found.dtype.isnative


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        ("sky.fits", "holds 2 images: say which, 'sky.fits:unit'; .*SCI, VAR"),
        ("sky.fits:SCJ", "no unit 'SCJ' in 'sky.fits'; did you mean 'SCI'"),
        ("sky.fits:9", "no unit '9'"),
        ("sky.fits:CAT", "is a table: say which column"),
        ("sky.fits:CAT/MAGS", "did you mean 'MAG'"),
        ("sky.fits:SCI/x", "is an image"),
        ("sky.fits:0", "is empty"),
        ("broken.fits", "cannot read 'broken.fits'"),
    ],
)
def test_a_mistake_in_fits_is_said(tmp_path, sky, reference, match):
    (tmp_path / "broken.fits").write_bytes(b"SIMPLE  = nothing")
    with pytest.raises(DataError, match=match):
        load_array(reference, tmp_path)


def test_pictures_have_full_range_one_and_channels_first(tmp_path, rng):
    grey = rng.integers(0, 256, size=(4, 5), dtype=np.uint8)
    colour = rng.integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
    deep = rng.integers(0, 65536, size=(4, 5), dtype=np.uint16)
    for name, array in {"grey": grey, "colour": colour, "deep": deep}.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    np.testing.assert_allclose(load_array("grey.png", tmp_path), grey / 255, rtol=1e-6)
    np.testing.assert_allclose(
        load_array("colour.png", tmp_path), np.moveaxis(colour, -1, 0) / 255, rtol=1e-6
    )
    np.testing.assert_allclose(load_array("deep.png", tmp_path), deep / 65535, rtol=1e-6)
    with pytest.raises(DataError, match="leave out ':x'"):
        load_array("grey.png:x", tmp_path)


def test_sound_is_channels_by_samples(tmp_path, rng):
    mono, stereo = 0.5 * rng.uniform(-1, 1, size=(50,)), 0.5 * rng.uniform(-1, 1, size=(50, 2))
    soundfile.write(tmp_path / "mono.wav", mono, 100)
    soundfile.write(tmp_path / "stereo.flac", stereo, 100)
    np.testing.assert_allclose(load_array("mono.wav", tmp_path), mono, atol=2**-15)
    np.testing.assert_allclose(load_array("stereo.flac", tmp_path), stereo.T, atol=2**-15)


@pytest.fixture
def record(tmp_path, rng):
    data = rng.normal(size=(3, 200)).astype(np.float32)
    traces = [
        obspy.Trace(x, {"channel": c, "station": "A", "sampling_rate": 100})
        for x, c in zip(data, ("BHE", "BHN", "BHZ"), strict=True)
    ]
    obspy.Stream(traces).write(tmp_path / "r.mseed")
    obspy.Stream([traces[0], traces[1].slice(endtime=traces[1].stats.starttime + 1)]).write(
        tmp_path / "uneven.mseed"
    )
    return data


def test_seismograms_are_traces_by_samples(tmp_path, record):
    np.testing.assert_array_equal(load_array("r.mseed", tmp_path), record)
    np.testing.assert_array_equal(load_array("r.mseed:BHZ", tmp_path), record[2:])
    with pytest.raises(DataError, match="no channel 'BHX' in 'r.mseed'; did you mean"):
        load_array("r.mseed:BHX", tmp_path)
    with pytest.raises(DataError, match=r"the 2 traces of 'uneven.mseed' have 101 to 200 samples"):
        load_array("uneven.mseed", tmp_path)


def test_files_that_match_are_stacked_in_the_order_of_their_names(tmp_path, rng):
    images = rng.integers(0, 256, size=(3, 4, 5), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"s{i}.png")
    np.testing.assert_allclose(load_array("*.png", tmp_path), images / 255, rtol=1e-6)
    with pytest.raises(DataError, match=r"no file 't\*.png'"):
        load_array("t*.png", tmp_path)
    Image.fromarray(images[0, :3]).save(tmp_path / "s3.png")
    with pytest.raises(ShapeError, match=r"'s3.png' has shape \(3, 5\) and 's0.png' \(4, 5\)"):
        load_array("*.png", tmp_path)


def test_a_problem_of_stamps_and_pictures(tmp_path, sky, rng):
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, size=(4, 5), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    (tmp_path / "problem.yaml").write_text(
        "sources: {x: [4, 5]}\n"
        "views:\n"
        "  stamps: {observations: 'sky.fits:SCI', operators: {x: identity}, noise: 0.1}\n"
        "  pictures: {observations: '*.png', operators: {x: identity}, noise: 0.1}\n"
    )
    problem, _ = load_problem(tmp_path / "problem.yaml")
    assert [v.count for v in problem.views] == [3, 4]
    np.testing.assert_array_equal(problem.views[0].observations, sky["image"])


@pytest.mark.parametrize(
    ("file", "module", "package", "extra"),
    [
        ("x.fits", "astropy.io.fits", "astropy", "astronomy"),
        ("x.png", "PIL.Image", "pillow", "images"),
        ("x.wav", "soundfile", "soundfile", "audio"),
        ("x.mseed", "obspy", "obspy", "seismology"),
    ],
)
def test_a_missing_library_names_the_extra(monkeypatch, tmp_path, file, module, package, extra):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / file).touch()
    said = rf"^.*reading '{file}' needs {package}: pip install 'dichroic\[{extra}\]'"
    with pytest.raises(DataError, match=said):
        load_array(file, tmp_path)
