"""Arrays from the file formats of a field: FITS images and columns, pictures, sound, seismograms.

Each reader takes a path and a key, and returns an array. It needs the library that the field keeps for it, which
extras install: astropy (`astronomy`), pillow (`images`), soundfile (`audio`), obspy (`seismology`).
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.errors import DataError
from dichroic.limits import check_array
from dichroic.optional import library
from dichroic.statement.values import available

Reader = Callable[[Path, str | None], np.ndarray]
_FULL_RANGE = {"uint8": 255, "uint16": 65535}


def read_fits(path: Path, key: str | None) -> np.ndarray:
    """An image of a FITS file, or with `unit/column` a column of a table; a unit is a name or a number.

    Without a key, the only unit that holds an image.
    """
    fits = _library("astropy.io.fits", "astronomy", path)
    unit, _, column = (key or "").partition("/")
    with fits.open(path, memmap=False) as units:
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
            width, held = abs(found.header["BITPIX"]) // 8, path.stat().st_size
            check_array(found.shape, width, path.name, held=held)
            return _native(found.data)
        columns = list(found.columns.names)
        if column not in columns:
            raise DataError(
                f"unit {unit!r} of {path.name!r} is a table: say which column, "
                f"'{path.name}:{unit}/column'; {available(column, columns)}"
            )
        return _native(found.data[column])


def _unit(unit: str, names: list[str], path: Path) -> int:
    if unit.isdigit() and int(unit) < len(names):
        return int(unit)
    if unit.upper() not in names:
        raise DataError(f"no unit {unit!r} in {path.name!r}; {available(unit, names)}")
    return names.index(unit.upper())


def _native(data: Any) -> np.ndarray:
    """With the byte order of the machine: FITS is big-endian."""
    array = np.asarray(data)
    return array.astype(array.dtype.newbyteorder("="))


def read_picture(path: Path, key: str | None) -> np.ndarray:
    """A picture, `(H, W)` or `(C, H, W)`, with full range 1 (8 and 16 bits)."""
    _no_key(path, key)
    image = _library("PIL.Image", "images", path)
    with image.open(path) as picture:
        if picture.mode == "P" or picture.mode == "1":
            picture = picture.convert("RGB" if picture.mode == "P" else "L")
        array = np.asarray(picture)
    full = _FULL_RANGE.get(str(array.dtype))
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
    return np.stack([np.asarray(t.data) for t in stream])


def _no_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise DataError(f"{path.name!r} holds one array; leave out ':{key}'")


def _library(name: str, extra: str, path: Path) -> Any:
    return library(name, extra, f"reading {path.name!r}")


READERS: dict[str, Reader] = {
    "fits": read_fits,
    "png": read_picture,
    "tif": read_picture,
    "tiff": read_picture,
    "jpg": read_picture,
    "wav": read_sound,
    "flac": read_sound,
    "mseed": read_seismogram,
}
