"""Arrays in files, by references such as `file.npz:key`: `.npz`, `.npy`, HDF5, zarr, and the formats of a field.

`folder/*.png` stands for all such files, stacked in the natural order of their names (`img2.png` before
`img10.png`); they must agree in what they say of their arrays, such as the sampling rate. The pages of one picture
(TIFF) are stacked, too. Endings may be in capitals; where an ending is not known, the first bytes of the file tell
its format. Where some rows are asked for, no more is read of `.npy`, `.npz`, HDF5 and zarr arrays, and of stacked
files; of the others, all is.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from numpy.lib.npyio import NpzFile

from dichroic.errors import DataError, DichroicError, ShapeError
from dichroic.io.array_safety import (
    check_hdf5,
    check_npy,
    check_npz,
    check_numbers,
    check_zarr,
    open_entry,
)
from dichroic.io.formats import READERS
from dichroic.io.recorded import Recorded, no_key
from dichroic.io.references import PART_KINDS, Reference, locate, matching, no_file
from dichroic.io.row_reader import Rows, chunked_rows, npy_rows, shape_of
from dichroic.io.values import as_number, available, short
from dichroic.numerics.arrays import PAD, hidden_entries, stacked, with_mask
from dichroic.operators import Shape
from dichroic.runtime.limits import check_room
from dichroic.runtime.optional_imports import library

_NPY = b"\x93NUMPY"
_ZIP = b"PK\x03\x04", b"PK\x05\x06"  # with and without entries
Part = Callable[[Shape], Rows | EllipsisType]  # which rows of an array of some shape; `...`: all


def all_rows(shape: Shape) -> EllipsisType:
    """The `Part` that is everything."""
    return ...


def load_array(reference: Any, base_dir: str | Path, part: Part = all_rows) -> np.ndarray:
    """The array that `reference` stands for.

    Args:
        reference: `file.npz:key`, `file.npy`, `file.h5:/dataset`, `file.zarr:path`, `file.fits:unit`
            (also `.fits.fz`; `SCI,2` is the second unit of that name), `file.fits:unit/column`, `file.png`,
            `file.tif` (of any number of pages), `file.wav` (`.flac`, `.ogg`, `.aiff`), `file.edf:label` (also
            BDF), `file.mseed:channel` (also SAC; `STATION.CHANNEL`, `NET.STA.LOC.CHA`, with `*` for any);
            the same as `{file: …, key: …}`, with `*` in the name for several files, stacked in the natural
            order of their names; a number, a (nested) list of numbers, or an array.
        base_dir: the folder that files are relative to.
        part: the rows (of its first axis) that are wanted of an array of a given shape; all by default.

    Raises:
        DataError: if there is no such file or entry (the message lists what there is), or if it
            holds something other than real numbers.
        ConfigError: if `reference` is none of these forms.
    """
    if _holds_arrays(reference):
        array = np.asanyarray(with_mask(reference, "the array"))
        return _numeric(array[part(array.shape)], "the array")
    number = as_number(reference)
    if number is not None or isinstance(reference, (list, tuple)):
        array = _inline(reference if number is None else number)
        return array[part(array.shape)]
    found = locate(reference, base_dir)
    return _stacked(found, part) if found.several else _read(found.path, found, part).array


def _holds_arrays(reference: Any) -> bool:
    """Whether `reference` is an array already, masked or not, or a list of some."""
    kinds = (np.ndarray, np.generic, jax.Array)
    parts = reference if isinstance(reference, (list, tuple)) else [reference]
    return any(isinstance(p, kinds) or hidden_entries(p) is not None for p in parts)


def array_shape(reference: Any, base_dir: str | Path) -> Shape:
    """The shape of the array that `reference` stands for, without reading it; raises as `load_array`."""
    found: list[Shape] = []

    def nothing(shape: Shape) -> Rows | EllipsisType:
        found.append(shape)
        return slice(0, 0) if shape else ...

    load_array(reference, base_dir, nothing)
    return found[-1]


def _stacked(found: Reference, part: Part) -> np.ndarray:
    """The arrays of all files that match, in the natural order of their names."""
    with _reading(found.path):
        paths = matching(found.path)
    if not paths:
        raise DataError(no_file(found.path))
    first = _read(paths[0], found)
    rows = part((len(paths), *first.array.shape))
    chosen = [paths[i] for i in np.arange(len(paths))[rows]]
    arrays = []
    for path in chosen:
        other = first if path is paths[0] else _read(path, found)
        _check_alike(other, path, first, paths[0])
        arrays.append(other.array)
    return (
        stacked(arrays, str(found.path))
        if arrays
        else np.empty((0, *first.array.shape), first.array.dtype)
    )


def _check_alike(other: Recorded, path: Path, first: Recorded, like: Path) -> None:
    """Raise a `DichroicError` unless an array has the shape of the first, and its file says the same of it."""
    for what, value in first.common.items():
        got = other.common.get(what, value)
        if got != value:
            raise DataError(
                f"{path.name!r} has {what} {got} and {like.name!r} {value}: files that are stacked need the same"
            )
    if other.array.shape != first.array.shape:
        raise ShapeError(
            f"{path.name!r} has shape {other.array.shape} and {like.name!r} {first.array.shape}: files "
            f"that are stacked need the same. {PAD}; save that as one file, and its mask"
        )


def _numeric(array: np.ndarray, what: str) -> np.ndarray:
    check_numbers(array.dtype, what)
    return array


def _inline(value: Any) -> np.ndarray:
    try:
        return np.asarray(value, dtype=float)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{short(value)} is no array of numbers: {error}") from error


def _read(path: Path, found: Reference, part: Part = all_rows) -> Recorded:
    """The array in the file `path`, one of those that `found` stands for."""
    kind, key = found.kind, found.key
    if not (path.exists() if kind == "zarr" else path.is_file()):
        raise DataError(no_file(path))
    with _reading(path):
        what = f"{path.name}:{key}" if key else path.name
        if kind in PART_KINDS:
            return Recorded(_numeric(_PART_READERS[kind](path, key, part), what))
        check_room((path.stat().st_size,), 1, what)
        read = READERS[kind](path, key)
        return Recorded(_numeric(read.array[part(read.array.shape)], what), read.common)


@contextmanager
def _reading(path: Path) -> Generator[None, None, None]:
    """Let whatever a reader raises inside, at a damaged file, name the file."""
    try:
        yield
    except DichroicError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot read {path.name!r}: {reason}") from error


@contextmanager
def open_npz(path: Path) -> Generator[NpzFile, None, None]:
    """The arrays of an `.npz` file by name, while it is open; errors name the file."""
    with _reading(path), path.open("rb") as file:
        magic = file.read(len(_NPY))
        if magic == _NPY:
            raise DataError(f"{path.name!r} holds a single array, as .npy files do: rename it")
        if magic and not magic.startswith(_ZIP):  # numpy would advise to unpickle it
            raise DataError(f"cannot read {path.name!r}: it is no archive of arrays (.npz)")
        file.seek(0)
        archive = np.load(file, allow_pickle=False)
        yield archive


def _entry(path: Path, key: str | None, names: Sequence[str]) -> str:
    """`key`, if it is one of `names`, or the only name; otherwise an error that lists them."""
    names = sorted(names)
    if key is None and len(names) == 1:
        return names[0]
    if key is None:
        raise DataError(
            f"{path.name!r}: say which array, '{path.name}:key'; {available('', names)}"
        )
    same = [name for name in names if name.strip("/") == key.strip("/")]
    if not same:
        raise DataError(f"no {key!r} in {path.name!r}; {available(key, names)}")
    return key if key in same else same[0]


# One reader for every kind of file.


def _read_npz(path: Path, key: str | None, part: Part) -> np.ndarray:
    with open_npz(path) as archive:
        name = _entry(path, key, list(archive))
        what = f"{path.name}:{name}"
        assert archive.zip is not None
        check_npz(archive.zip, path.name, [name])
        entry = next(e for e in archive.zip.infolist() if e.filename in (name, f"{name}.npy"))
        with open_entry(archive.zip, entry) as file:
            size = file.tell() + entry.file_size
            header = check_npy(file, size, path.name, packed=entry.compress_size)
            rows = part(header[0])
            if not isinstance(rows, EllipsisType):
                return npy_rows(file, header, rows, what)
        check_room(header[0], header[2].itemsize, what)
        return archive[name]


def _read_npy(path: Path, key: str | None, part: Part) -> np.ndarray:
    no_key(path, key)
    with path.open("rb") as file:
        magic = file.read(len(_NPY))
        if magic.startswith(b"PK"):
            raise DataError(f"{path.name!r} is an archive of arrays, as .npz files are: rename it")
        if magic != _NPY:
            raise DataError(f"cannot read {path.name!r}: it holds no array of numpy's (.npy)")
        file.seek(0)
        header = check_npy(file, path.stat().st_size, path.name)
        return npy_rows(file, header, part(header[0]), path.name)


def _read_hdf5(path: Path, key: str | None, part: Part) -> np.ndarray:
    h5py = _library("h5py", path)
    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda k, v: names.append(f"/{k}") if isinstance(v, h5py.Dataset) else None)
        name = _entry(path, key, names)
        dataset: Any = file[name]
        rows, what = part(dataset.shape or ()), f"{path.name}:{name}"
        check_hdf5(dataset, what, shape_of(dataset.shape or (), rows))
        return chunked_rows(dataset, rows, what)


def _read_zarr(path: Path, key: str | None, part: Part) -> np.ndarray:
    zarr = _library("zarr", path)
    node: Any = zarr.open(path, mode="r")
    if isinstance(node, zarr.Group):
        known = None if key is None or ".." in key else node.get(key.strip("/"))
        if not isinstance(known, zarr.Array):
            members = node.members(max_depth=None)
            names = [name for name, child in members if isinstance(child, zarr.Array)]
            known = node[_entry(path, key, names).strip("/")]
        node = known
    else:
        no_key(path, key)
    rows = part(node.shape)
    check_zarr(node, path.name, shape_of(node.shape, rows))
    return chunked_rows(node, rows, path.name)


def _library(name: str, path: Path) -> Any:
    return library(name, "data", f"reading {path.name!r}")


_PART_READERS: dict[str, Callable[[Path, str | None, Part], np.ndarray]] = dict(
    zip(PART_KINDS, (_read_npz, _read_npy, _read_hdf5, _read_hdf5, _read_zarr), strict=True)
)
