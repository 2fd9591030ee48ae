"""FITS files as telescopes and archives write them: versions of a unit, compressed images, undefined numbers."""

import gzip

import numpy as np
import pytest
from astropy.io import fits

from dichroic.errors import DataError
from dichroic.io import load_array
from dichroic.runtime.limits import VARIABLE


def write(path, *units, name=None):
    fits.HDUList([fits.PrimaryHDU(), *units]).writeto(path, output_verify="silentfix")
    if name is not None:
        path.rename(path.parent / name)


@pytest.fixture
def chips(tmp_path):
    image = lambda k, **more: fits.ImageHDU(np.full((4, 5), k, ">f4"), **more)
    write(
        tmp_path / "two.fits",
        image(1, name="SCI", ver=1),
        image(2, name="ERR"),
        image(3, name="SCI", ver=2),
        image(4, name="SCI", ver=5),
        image(5, name="A,2"),
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("SCI,1", 1), ("SCI,2", 3), ("sci, 5", 4), ("3", 3), ("ERR", 2), ("ERR,1", 2), ("A,2", 5)],
)
def test_a_unit_is_a_name_and_a_version(tmp_path, chips, key, value):
    assert np.all(load_array(f"two.fits:{key}", tmp_path) == value)


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("SCI", "holds 3 units 'SCI': say which, 'two.fits:SCI,1' or 'two.fits:SCI,2' or"),
        ("SCI,3", r"no unit 'SCI,3' in 'two.fits'; .* PRIMARY, SCI,1, ERR, SCI,2, SCI,5"),
        ("SCJ", "SCI,1, ERR, SCI,2"),
    ],
)
def test_units_of_one_name_are_listed_with_their_versions(tmp_path, chips, key, match):
    with pytest.raises(DataError, match=match):
        load_array(f"two.fits:{key}", tmp_path)


def test_units_of_one_name_and_version_are_asked_for_by_number(tmp_path):
    image = lambda k: fits.ImageHDU(np.full((4, 5), k, ">f4"), name="SCI")
    write(tmp_path / "same.fits", image(1), image(2))
    with pytest.raises(DataError, match="2 units 'SCI': say which, 'same.fits:1' or 'same.fits:2'"):
        load_array("same.fits:SCI", tmp_path)
    assert load_array("same.fits:2", tmp_path)[0, 0] == 2


@pytest.mark.parametrize("kind", ["RICE_1", "GZIP_1", "GZIP_2", "PLIO_1", "HCOMPRESS_1"])
@pytest.mark.parametrize("name", ["x.fits.fz", "x.fz", "X.FITS.FZ", "x.fits", "x.fits.gz", "x.dat"])
def test_compressed_images_are_read(tmp_path, kind, name):
    data = np.random.default_rng(0).integers(0, 900, size=(30, 40)).astype(np.int16)
    write(tmp_path / "a.fits", fits.CompImageHDU(data, name="SCI", compression_type=kind))
    held = (tmp_path / "a.fits").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(held) if name.endswith("gz") else held)
    np.testing.assert_array_equal(load_array(f"{name}:SCI", tmp_path), data)
    np.testing.assert_array_equal(load_array(name, tmp_path), data)


def test_a_compressed_image_of_floats_keeps_what_is_undefined(tmp_path):
    data = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    data[3, 4] = np.nan
    write(tmp_path / "x.fits", fits.CompImageHDU(data, quantize_level=64), name="x.fits.fz")
    np.testing.assert_allclose(load_array("x.fits.fz", tmp_path), data, atol=0.05)


def test_a_compressed_image_is_bounded_by_what_it_states(tmp_path, monkeypatch):
    zeros = np.zeros((300, 400), np.float64)
    write(tmp_path / "x.fz", fits.CompImageHDU(zeros, compression_type="GZIP_1"))
    monkeypatch.setenv(VARIABLE, "0.0005")
    with pytest.raises(DataError, match=rf"x.fz states an array of .*set {VARIABLE}=1"):
        load_array("x.fz", tmp_path)


def test_a_tile_that_unpacks_to_more_than_its_image_is_refused(tmp_path):
    tile = np.zeros((1, 4_000_000), np.int32)
    hdu = fits.CompImageHDU(tile, compression_type="GZIP_1", tile_shape=tile.shape)
    write(tmp_path / "x.fz", hdu)
    small = f"{'ZNAXIS1':8}= {40:20d}".encode()
    held = (tmp_path / "x.fz").read_bytes()
    start = held.index(b"ZNAXIS1 =")
    (tmp_path / "x.fz").write_bytes(held[:start] + small + held[start + len(small) :])
    with pytest.raises(DataError, match="x.fz is damaged: a tile is larger than its image"):
        load_array("x.fz", tmp_path)


@pytest.mark.parametrize("blank", [0, -7])
@pytest.mark.parametrize("scale", [(1, 0), (0.5, 3.0), (1, 32768)])
@pytest.mark.parametrize("kind", [fits.ImageHDU, fits.CompImageHDU])
def test_undefined_integers_of_an_image_are_nan(tmp_path, blank, scale, kind):
    raw = np.arange(1, 21, dtype=np.int16).reshape(4, 5)
    raw[1, 2] = blank
    hdu = kind(raw)
    write(tmp_path / "x.fits", hdu)
    with fits.open(tmp_path / "x.fits", mode="update", disable_image_compression=True) as units:
        units[1].header["BSCALE"], units[1].header["BZERO"] = scale
        units[1].header["ZBLANK" if kind is fits.CompImageHDU else "BLANK"] = blank
    found = load_array("x.fits", tmp_path)
    want = np.where(raw == blank, np.nan, raw * float(scale[0]) + scale[1])
    np.testing.assert_allclose(found, want)


def test_unsigned_integers_stay_integers(tmp_path):
    data = np.array([[0, 40_000, 65_535]], np.uint16)
    write(tmp_path / "x.fits", fits.ImageHDU(data))
    found = load_array("x.fits", tmp_path)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, data)


def test_undefined_numbers_of_a_table_are_nan(tmp_path):
    columns = [
        fits.Column("N", "J", array=[1, -99, 3], null=-99),
        fits.Column("S", "I", array=[90, 190, 290], null=290),
        fits.Column("P", "J", array=[1, 2, 3], null=-99),
    ]
    write(tmp_path / "x.fits", fits.BinTableHDU.from_columns(columns, name="CAT"))
    with fits.open(tmp_path / "x.fits", mode="update") as units:
        units[1].header["TSCAL2"], units[1].header["TZERO2"] = 0.1, 1.0
    np.testing.assert_array_equal(load_array("x.fits:CAT/N", tmp_path), [1, np.nan, 3])
    np.testing.assert_allclose(load_array("x.fits:CAT/S", tmp_path), [10, 20, np.nan])
    assert load_array("x.fits:CAT/P", tmp_path).dtype == np.int32
    text = [
        fits.Column("N", "I6", array=[11111, 22222, 33333], null="---", ascii=True),
        fits.Column("F", "F8.2", array=[1.5, 2.5, 3.5], ascii=True),
    ]
    write(tmp_path / "t.fits", fits.TableHDU.from_columns(text, name="CAT"))
    held = (tmp_path / "t.fits").read_bytes()
    (tmp_path / "t.fits").write_bytes(held.replace(b" 22222", b"   ---"))
    np.testing.assert_array_equal(load_array("t.fits:CAT/N", tmp_path), [11111, np.nan, 33333])
    np.testing.assert_array_equal(load_array("t.fits:CAT/F", tmp_path), [1.5, 2.5, 3.5])


def test_files_that_are_stacked_have_one_physical_unit(tmp_path):
    for i, unit in enumerate(["adu", "adu", None, "electron"]):
        hdu = fits.ImageHDU(np.full((4, 5), i, ">f4"), name="SCI")
        if unit:
            hdu.header["BUNIT"] = unit
        write(tmp_path / f"x{i}.fits", hdu)
    with pytest.raises(DataError, match="'x3.fits' has BUNIT electron and 'x0.fits' adu"):
        load_array("x*.fits", tmp_path)
    (tmp_path / "x3.fits").unlink()
    assert load_array("x*.fits:SCI", tmp_path).shape == (3, 4, 5)
