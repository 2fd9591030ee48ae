"""Files in the formats of a field, written by the field's own libraries."""

import gzip
import sys
import warnings

import numpy as np
import pytest
import soundfile
from astropy.io import fits
from PIL import Image

from dichroic.errors import ConfigError, DataError, DichroicError, ShapeError
from dichroic.io import load_array, load_problem
from dichroic.runtime.limits import VARIABLE

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


@pytest.mark.parametrize("name", ["a.FITS", "a.fit", "a.fts", "a.fits.gz", "A.Fit.GZ", "b.fits"])
def test_fits_may_end_otherwise_and_be_packed(tmp_path, sky, name):
    data = (tmp_path / "sky.fits").read_bytes()
    packed = name.lower().endswith(".gz") or name == "b.fits"  # which astropy would unpack, too
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
    np.testing.assert_array_equal(load_array(f"{name}:SCI", tmp_path), sky["image"])
    np.testing.assert_array_equal(load_array(f"{name}:CAT/MAG", tmp_path), sky["mag"])


def test_packed_fits_is_bounded(tmp_path, sky, monkeypatch):
    data = (tmp_path / "sky.fits").read_bytes()
    (tmp_path / "a.fits.gz").write_bytes(gzip.compress(data))
    (tmp_path / "cut.fits.gz").write_bytes(gzip.compress(data)[:-200])
    (tmp_path / "twice.fits.gz").write_bytes(gzip.compress(gzip.compress(data)))
    (tmp_path / "text.fits").write_bytes(b"BZh9 other packing")
    for name in ("twice.fits.gz", "text.fits"):
        with pytest.raises(DataError, match=f"cannot read '{name}': it is no FITS file"):
            load_array(name, tmp_path)
    with pytest.raises(DataError, match=r"cannot read 'cut.fits.gz'"):
        load_array("cut.fits.gz:SCI", tmp_path)
    monkeypatch.setenv(VARIABLE, "0.00001")
    with pytest.raises(DataError, match=rf"'a.fits.gz' unpacks to more than .* GiB.*{VARIABLE}"):
        load_array("a.fits.gz:SCI", tmp_path)


@pytest.mark.parametrize("name", ["a.jpeg", "a.JPG", "a.bmp", "a.PNG", "a.TIFF"])
def test_pictures_may_end_otherwise(tmp_path, name):
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / name)
    np.testing.assert_array_equal(load_array(name, tmp_path), np.ones((8, 8)))


def test_an_unknown_ending_lists_the_known_ones(tmp_path):
    said = r"got 'a.xyz'; files end in .npz, .npy, .h5, .*\.fits\.gz, .*\.jpeg, .*\.wav, .*\.mseed, .*, or exist and begin as"
    with pytest.raises(ConfigError, match=said):
        load_array("a.xyz", tmp_path)


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


@pytest.mark.parametrize("name", ["x.tif", "x.png"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 3)])
def test_the_pages_of_a_picture_are_stacked(tmp_path, rng, name, shape):
    pages = rng.integers(0, 256, size=shape, dtype=np.uint8)
    first, *others = map(Image.fromarray, pages)
    first.save(tmp_path / name, save_all=True, append_images=others)
    want = pages / 255 if pages.ndim == 3 else np.moveaxis(pages, -1, 1) / 255
    np.testing.assert_allclose(load_array(name, tmp_path), want, rtol=1e-6)
    assert load_array(name, tmp_path, lambda shape: slice(1, 2)).shape == (1, *want.shape[1:])


def test_deep_pages_of_either_order_have_full_range_one(tmp_path, rng):
    deep = rng.integers(0, 65536, size=(2, 4, 5), dtype=np.uint16)
    first, other = (Image.fromarray(a) for a in deep)
    first.save(tmp_path / "little.tif", save_all=True, append_images=[other])
    Image.frombytes("I;16B", (5, 4), deep[0].astype(">u2").tobytes()).save(tmp_path / "big.tif")
    np.testing.assert_allclose(load_array("little.tif", tmp_path), deep / 65535, rtol=1e-6)
    np.testing.assert_allclose(load_array("big.tif", tmp_path), deep[0] / 65535, rtol=1e-6)


def test_pages_that_differ_or_are_too_many_are_refused(tmp_path, monkeypatch):
    page = lambda *shape: Image.fromarray(np.zeros(shape, np.uint8))
    page(4, 5).save(tmp_path / "size.tif", save_all=True, append_images=[page(4, 6)])
    page(4, 5).save(tmp_path / "colour.tif", save_all=True, append_images=[page(4, 5, 3)])
    page(99, 99).save(
        tmp_path / "many.tif",
        compression="tiff_lzw",
        save_all=True,
        append_images=[page(99, 99)] * 9,
    )
    for name, shape in {"size.tif": r"\(4, 6\)", "colour.tif": r"\(3, 4, 5\)"}.items():
        said = rf"page 1 of '{name}' has shape {shape} and page 0 \(4, 5\)"
        with pytest.raises(ShapeError, match=said):
            load_array(name, tmp_path)
    monkeypatch.setenv(VARIABLE, "0.0001")
    with pytest.raises(DataError, match=rf"many.tif states an array of .*set {VARIABLE}=1"):
        load_array("many.tif", tmp_path)


def test_the_previews_in_a_picture_of_a_camera_are_left_out(tmp_path):
    preview = Image.fromarray(np.zeros((4, 4), np.uint8))
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(
        tmp_path / "x.jpg", "MPO", save_all=True, append_images=[preview]
    )
    np.testing.assert_array_equal(load_array("x.jpg", tmp_path), np.ones((8, 8)))


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
    with pytest.raises(DataError, match=r"'uneven.mseed' differ in .* 200 samples; .* 101 samples"):
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


def test_numbered_files_are_in_natural_order(tmp_path):
    for i in (1, 2, 9, 10, 11, 100):
        np.save(tmp_path / f"truth{i}.npy", np.full(2, i))
        np.save(tmp_path / f"mask_{i:03}.npy", np.full(2, i))
    want = [1, 2, 9, 10, 11, 100]
    assert load_array("truth*.npy", tmp_path)[:, 0].tolist() == want
    assert load_array("mask_*.npy", tmp_path)[:, 0].tolist() == want
    some = load_array("truth*.npy", tmp_path, lambda shape: slice(2, 5))
    assert some[:, 0].tolist() == want[2:5]


def test_pictures_that_are_stacked_have_the_same_colours(tmp_path, rng):
    colour = rng.integers(0, 256, size=(4, 5, 4), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.tif")
    Image.fromarray(colour, "CMYK").save(tmp_path / "b.tif")
    with pytest.raises(DataError, match="'b.tif' has colours CMYK and 'a.tif' RGBA"):
        load_array("*.tif", tmp_path)
    first, *others = (Image.open(tmp_path / f"{name}.tif") for name in "ab")
    first.save(tmp_path / "pages.tiff", save_all=True, append_images=others)
    with pytest.raises(DataError, match="page 1 of 'pages.tiff' has colours CMYK and page 0 RGBA"):
        load_array("pages.tiff", tmp_path)
    Image.fromarray(colour[..., 0]).save(tmp_path / "c.png")
    Image.fromarray(colour[..., 0].astype(np.uint16) * 257).save(tmp_path / "d.png")
    found = load_array("*.png", tmp_path)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize("name", ["data.dat", "data", "12:30:00", "a.b:c.d"])
def test_the_first_bytes_tell_what_the_name_does_not(tmp_path, sky, rng, name):
    np.savez(tmp_path / "x.npz", y=np.arange(3))
    np.save(tmp_path / "x.npy", np.arange(3))
    Image.fromarray(np.full((4, 5), 255, np.uint8)).save(tmp_path / "x.png")
    for made, key, want in [
        ("x.npz", "y", np.arange(3)),
        ("x.npy", None, np.arange(3)),
        ("x.png", None, np.ones((4, 5))),
        ("sky.fits", "SCI", sky["image"]),
    ]:
        (tmp_path / made).rename(tmp_path / name)
        reference = name if key is None else f"{name}:{key}"
        np.testing.assert_array_equal(load_array(reference, tmp_path), want)
        np.testing.assert_array_equal(load_array({"file": name, "key": key}, tmp_path), want)
    (tmp_path / name).write_bytes(b"nothing that is known")
    with pytest.raises(DataError, match=f"cannot tell the format of '{name}'.* files end in .npz"):
        load_array(name, tmp_path)


@pytest.mark.parametrize("name", ["x" * 400, "a\0b", "a**b.png", "a**b", "**", "x" * 5000, ""])
def test_a_name_that_no_file_can_have_is_an_error(tmp_path, name):
    with pytest.raises(DichroicError):
        load_array(name, tmp_path)


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
