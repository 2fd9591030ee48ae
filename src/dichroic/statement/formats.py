"""Arrays from the file formats of a field: FITS images and columns, pictures, sound, seismograms.

Each reader takes a path and a key, and returns an array. It needs the library that the field keeps for it, which
extras install: astropy (`astronomy`), pillow (`images`), soundfile (`audio`), obspy (`seismology`).
"""

import gzip
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.arrays import stacked
from dichroic.errors import DataError, ShapeError
from dichroic.limits import VARIABLE, check_array, most_bytes
from dichroic.optional import library
from dichroic.statement.values import available

Reader = Callable[[Path, str | None], np.ndarray]
_FULL_RANGE = {"uint8": 255, "uint16": 65535}
_PAGED = ("TIFF", "PNG", "GIF")  # pictures of the same kind; the others of a JPEG are previews
_FITS, _GZIP = b"SIMPLE  =", b"\x1f\x8b"


def read_fits(path: Path, key: str | None) -> np.ndarray:
    """An image of a FITS file, or with `unit/column` a column of a table; a unit is a name or a number.

    Without a key, the only unit that holds an image. What gzip packed is unpacked, up to what an array may have.
    """
    fits = _library("astropy.io.fits", "astronomy", path)
    unit, _, column = (key or "").partition("/")
    with _plain_fits(path) as plain, fits.open(plain, memmap=False) as units:
        names = [u.name or str(i) for i, u in enumerate(units)]
        images = [i for i, u in enumerate(units) if u.is_image and u.shape]
        if not unit and len(images) != 1:
            raise DataError(
                f"{path.name!r} holds {len(images)} images: say which, '{path.name}:unit'; "
                f"{available('', [names[i] for i in images])}"
            )
        found = units[_unit(unit, names, path) if unit else images[0]]
        if found.is_image:
            if column or not found.shape:
                raise DataError(
                    f"unit {unit!r} of {path.name!r} is an image, without columns"
                    if column
                    else f"unit {unit!r} of {path.name!r} is empty"
                )
            width, held = abs(found.header["BITPIX"]) // 8, plain.stat().st_size
            check_array(found.shape, width, path.name, held=held)
            return _native(found.data)
        columns = list(found.columns.names)
        if column not in columns:
            raise DataError(
                f"unit {unit!r} of {path.name!r} is a table: say which column, "
                f"'{path.name}:{unit}/column'; {available(column, columns)}"
            )
        return _native(found.data[column])


@contextmanager
def _plain_fits(path: Path) -> Iterator[Path]:
    """The FITS file `path`, unpacked: astropy would unpack whatever it is, without bounds."""
    with tempfile.TemporaryDirectory() as folder:
        plain = path
        if _starts_with(path, _GZIP):
            plain = Path(folder) / "plain.fits"
            _unpack(path, plain)
        if not _starts_with(plain, _FITS):
            raise DataError(
                f"cannot read {path.name!r}: it is no FITS file, nor one that gzip packed"
            )
        yield plain


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _unpack(packed: Path, plain: Path) -> None:
    """Write what gzip packed to `plain`; raises `DataError` where that is more than an array may have."""
    left = most_bytes()
    with gzip.open(packed) as source, plain.open("wb") as target:
        while block := source.read(2**20):
            left -= len(block)
            if left < 0:
                raise DataError(
                    f"{packed.name!r} unpacks to more than {most_bytes() / 2**30:g} GiB: unpack it first, or "
                    f"set {VARIABLE} in the environment to as many GiB as it may have"
                )
            target.write(block)


def _unit(unit: str, names: list[str], path: Path) -> int:
    if unit.isdigit() and int(unit) < len(names):
        return int(unit)
    if unit.upper() not in names:
        raise DataError(f"no unit {unit!r} in {path.name!r}; {available(unit, names)}")
    return names.index(unit.upper())


def _native(data: Any) -> np.ndarray:
    """With the byte order of the machine: FITS is big-endian."""
    array = np.asanyarray(data)
    return array.astype(array.dtype.newbyteorder("="))


def read_picture(path: Path, key: str | None) -> np.ndarray:
    """A picture, `(H, W)` or `(C, H, W)`, with full range 1 (8 and 16 bits); of several pages, `(pages, …)`."""
    _no_key(path, key)
    image = _library("PIL.Image", "images", path)
    with image.open(path) as picture:
        count = getattr(picture, "n_frames", 1) if picture.format in _PAGED else 1
        size, first = picture.size, _page(picture)
        if count == 1:
            return first
        check_array((count, *first.shape), first.itemsize, path.name, held=path.stat().st_size)
        pages = np.empty((count, *first.shape), np.float32)
        for i in range(count):
            picture.seek(i)
            page = (
                _page(picture) if picture.size == size else None
            )  # what is too large is not unpacked
            if page is None or page.shape != first.shape:
                found = picture.size[::-1] if page is None else page.shape
                raise ShapeError(
                    f"page {i} of {path.name!r} has shape {found} and page 0 {first.shape}: pages are stacked, "
                    "and need the same"
                )
            pages[i] = page
    return pages


def _page(picture: Any) -> np.ndarray:
    """The page of `picture` that is open."""
    if picture.mode in ("P", "1"):
        picture = picture.convert("RGB" if picture.mode == "P" else "L")
    array = np.asarray(picture)
    full = _FULL_RANGE.get(array.dtype.name)
    array = array.astype(np.float32) if full is None else array / np.float32(full)
    return np.moveaxis(array, -1, 0) if array.ndim == 3 else array


def read_sound(path: Path, key: str | None) -> np.ndarray:
    """A recording, `(samples,)` or `(channels, samples)`, with full range 1."""
    _no_key(path, key)
    samples, _ = _library("soundfile", "audio", path).read(path, dtype="float32")
    return np.asarray(samples).T


def read_seismogram(path: Path, key: str | None) -> np.ndarray:
    """The traces of a MiniSEED file, `(traces, samples)`; with a channel as the key (`BHZ`), its only.

    Raises `DataError` where traces differ in length: gaps are for the user to fill.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of obspy, about its own dependencies
        obspy = _library("obspy", "seismology", path)
        stream = obspy.read(str(path))
    channels = sorted({t.stats.channel for t in stream})
    if key is not None:
        stream = stream.select(channel=key)
        if not stream:
            raise DataError(f"no channel {key!r} in {path.name!r}; {available(key, channels)}")
    lengths = sorted({t.stats.npts for t in stream})
    if len(lengths) != 1:
        raise DataError(
            f"the {len(stream)} traces of {path.name!r} have {lengths[0]:,} to {lengths[-1]:,} samples: cut "
            "them to the same span, and fill gaps, first (obspy's trim and merge)"
        )
    return stacked([t.data for t in stream], path.name)


def _no_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise DataError(f"{path.name!r} holds one array; leave out ':{key}'")


def _library(name: str, extra: str, path: Path) -> Any:
    return library(name, extra, f"reading {path.name!r}")


_FITS_ENDINGS = ("fits", "fit", "fts")
READERS: dict[str, Reader] = {
    **dict.fromkeys((*_FITS_ENDINGS, *(f"{e}.gz" for e in _FITS_ENDINGS)), read_fits),
    **dict.fromkeys(("png", "tif", "tiff", "jpg", "jpeg", "bmp"), read_picture),
    **dict.fromkeys(("wav", "flac"), read_sound),
    "mseed": read_seismogram,
}
