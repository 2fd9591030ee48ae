"""FITS files: images, compressed ones too, and columns of tables."""

import gzip
import io
import math
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.errors import DataError
from dichroic.io.recorded import Recorded, check_stated, reader_library, starts_with
from dichroic.io.values import available
from dichroic.runtime.limits import VARIABLE, most_bytes

FITS, GZIP = b"SIMPLE  =", b"\x1f\x8b"  # how the files begin


def read_fits(path: Path, key: str | None) -> Recorded:
    """An image of a FITS file, or with `unit/column` a column of a table.

    A unit is a name, a name and a version (`SCI,2`), or a number; without a key, the only one that holds an image.
    What gzip packed and compressed images (`.fz`) are unpacked, up to what an array may have. Undefined integers
    (BLANK, TNULL) are NaN. Files that are stacked have the same physical unit (BUNIT, TUNIT), where they state it.
    """
    fits = reader_library("astropy.io.fits", "astronomy", path)
    unit, _, column = (key or "").partition("/")
    with _plain_fits(path) as plain, _units(fits, plain) as units:
        labels = _labels(units)
        images = [i for i, u in enumerate(units) if u.is_image and u.shape]
        if not unit and len(images) != 1:
            raise DataError(
                f"{path.name!r} holds {len(images)} images: say which, '{path.name}:unit'; "
                f"{available('', [labels[i] for i in images])}"
            )
        i = _unit(unit, [(u.name, u.ver) for u in units], labels, path) if unit else images[0]
        if not units[i].is_image:
            return _column(
                units[i], column, f"unit {unit!r} of {path.name!r}", f"{path.name}:{unit}"
            )
        if column or not units[i].shape:
            problem = "is an image, without columns" if column else "is empty"
            raise DataError(f"unit {unit!r} of {path.name!r} {problem}")
        return _image(fits, plain, units[i], i, path)


@contextmanager
def _plain_fits(path: Path) -> Generator[Path, None, None]:
    """The FITS file `path`, unpacked: astropy would unpack whatever it is, without bounds."""
    with tempfile.TemporaryDirectory() as folder:
        plain = path
        if starts_with(path, GZIP):
            plain = Path(folder) / "plain.fits"
            _unpack(path, plain)
        if not starts_with(plain, FITS):
            raise DataError(
                f"cannot read {path.name!r}: it is no FITS file, nor one that gzip packed"
            )
        yield plain


@contextmanager
def _units(fits: Any, plain: Path, **options: bool) -> Generator[Any, None, None]:
    """The units of a FITS file, which is closed at the end; astropy leaves open what is damaged."""
    with plain.open("rb") as file, fits.open(file, memmap=False, **options) as units:
        yield units


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


# Which unit.


def _labels(units: Sequence[Any]) -> list[str]:
    """How to ask for each unit: by its name if no other has it, by name and version, or by its number."""
    names = Counter(u.name for u in units)
    versions = Counter((u.name, u.ver) for u in units)

    def label(i: int, unit: Any) -> str:
        if not unit.name or versions[unit.name, unit.ver] > 1:
            return str(i)
        return unit.name if names[unit.name] == 1 else f"{unit.name},{unit.ver}"

    return [label(i, u) for i, u in enumerate(units)]


def _unit(unit: str, names: Sequence[tuple[str, int]], labels: Sequence[str], path: Path) -> int:
    """The number of the unit that is called `unit`; `names` are `(name, version)`."""
    if unit.isdecimal() and int(unit) < len(names):
        return int(unit)
    name, _, version = unit.upper().rpartition(",")
    found = [i for i, (known, _) in enumerate(names) if known.upper() == unit.upper()]
    if not found and version.strip().isdecimal():
        want = name.strip(), int(version)
        found = [i for i, (known, ver) in enumerate(names) if (known.upper(), ver) == want]
    if not found:
        raise DataError(f"no unit {unit!r} in {path.name!r}; {available(unit, labels)}")
    if len(found) > 1:
        same = " or ".join(f"'{path.name}:{labels[i]}'" for i in found[:9])
        raise DataError(f"{path.name!r} holds {len(found)} units {unit!r}: say which, {same}")
    return found[0]


# What it holds.


def _image(fits: Any, plain: Path, unit: Any, index: int, path: Path) -> Recorded:
    """The image in `unit`, the unit `index` of the file `plain`, which is `path` unpacked."""
    header, compressed = unit.header, isinstance(unit, fits.CompImageHDU)
    width = abs(header["BITPIX"]) // 8
    check_stated(unit.shape, width, path, 0 if compressed else plain.stat().st_size)
    if compressed:
        _check_tiles(fits, plain, index, 8 * math.prod(unit.shape), path.name)
    blank = header.get("BLANK") if header["BITPIX"] > 0 else None
    common = {"BUNIT": str(header["BUNIT"])} if header.get("BUNIT") else {}
    if blank is None:
        return Recorded(_native(unit.data), common)
    scale, zero = header.get("BSCALE", 1), header.get("BZERO", 0)
    with _units(fits, plain, do_not_scale_image_data=True) as units:
        raw = np.asarray(units[index].data)
    return Recorded(_undefined(raw * float(scale) + float(zero), raw == blank), common)


def _check_tiles(fits: Any, plain: Path, index: int, most: int, file: str) -> None:
    """Raise a `DataError` if a tile of a compressed image, packed by gzip, unpacks to more than `most` bytes."""
    with _units(fits, plain, disable_image_compression=True) as units:
        data = units[index].data
        for name in {"COMPRESSED_DATA", "GZIP_COMPRESSED_DATA"} & set(data.names):
            for tile in data[name]:
                packed = np.asarray(tile).tobytes()
                if packed.startswith(GZIP):
                    with gzip.open(io.BytesIO(packed)) as source:
                        if len(source.read(most + 1)) > most:
                            raise DataError(f"{file} is damaged: a tile is larger than its image")


def _column(unit: Any, column: str, what: str, reference: str) -> Recorded:
    """A column of the table in `unit`."""
    columns = list(unit.columns.names)
    if column not in columns:
        raise DataError(
            f"{what} is a table: say which column, '{reference}/column'; {available(column, columns)}"
        )
    about, values = unit.columns[column], unit.data[column]
    common = {"TUNIT": about.unit} if about.unit else {}
    if about.null is None:
        return Recorded(_native(values), common)
    raw = np.recarray.field(unit.data, column)
    if raw.dtype.kind == "S":  # a table in text
        return Recorded(_undefined(values, np.char.strip(raw) == _text(about.null)), common)
    return Recorded(_undefined(values, raw == about.null), common)


def _text(null: Any) -> bytes:
    return str(null).strip().encode("ascii", "replace")


def _undefined(values: Any, where: np.ndarray) -> np.ndarray:
    """`values` with NaN where they are undefined."""
    if not where.any():
        return _native(values)
    return np.where(where, np.nan, np.asarray(values))


def _native(data: Any) -> np.ndarray:
    """With the byte order of the machine: FITS is big-endian."""
    array = np.asarray(data)
    return array.astype(array.dtype.newbyteorder("="))
