"""Arrays in files, by references such as `file.npz:key`: `.npz`, `.npy`, HDF5, zarr, and the formats of a field.

`folder/*.png` stands for all such files, stacked in the order of their names; the pages of one picture (TIFF) are
stacked, too. Endings may be in capitals. Where some rows are asked for, no more is read of `.npy`, `.npz`, HDF5
and zarr arrays, and of stacked files; of the others, all is.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax
import numpy as np

from dichroic.arrays import PAD, hidden_entries, stacked, with_mask
from dichroic.config import check_keys
from dichroic.errors import ConfigError, DataError, DichroicError, ShapeError
from dichroic.limits import check_room
from dichroic.operators import Shape
from dichroic.optional import library
from dichroic.statement.formats import READERS
from dichroic.statement.guard import (
    check_hdf5,
    check_npy,
    check_npz,
    check_numbers,
    check_zarr,
    open_entry,
)
from dichroic.statement.rows import Rows, chunked_rows, npy_rows, shape_of
from dichroic.statement.values import as_number, available, short

_NPY = b"\x93NUMPY"
_ZIP = b"PK\x03\x04", b"PK\x05\x06"  # with and without entries
Part = Callable[[Shape], Rows | EllipsisType]  # which rows of an array of some shape; `...`: all


def all_rows(shape: Shape) -> EllipsisType:
    """The `Part` that is everything."""
    return ...


def load_array(reference: Any, base_dir: str | Path, part: Part = all_rows) -> np.ndarray:
    """The array that `reference` stands for.

    Args:
        reference: `file.npz:key`, `file.npy`, `file.h5:/dataset`, `file.zarr:path`, `file.fits:unit`,
            `file.fits:unit/column`, `file.png`, `file.tif` (of any number of pages), `file.wav`,
            `file.mseed:channel`, the same as `{file: …, key: …}`, with `*` in the name for several
            files, stacked; a number, a (nested) list of numbers, or an array.
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
    if isinstance(reference, Mapping):
        reference = _joined(reference)
    number = as_number(reference)
    if number is not None or isinstance(reference, (list, tuple)):
        array = _inline(reference if number is None else number)
        return array[part(array.shape)]
    is_name = isinstance(reference, str) and len(reference) < 4096
    match = _REFERENCE.fullmatch(reference) if is_name else None
    if match is None:
        raise ConfigError(
            f"expected an array such as 'file.npz:key', 'file.npy', 'file.h5:/dataset', "
            f"'file.zarr:path', 'file.fits:unit', 'files/*.png', a number or a list, got {short(reference)}; "
            f"files end in {', '.join(f'.{kind}' for kind in _KINDS)}"
        )
    path, kind, key = Path(base_dir) / match["file"], match["kind"].lower(), match["key"]
    return _stacked(path, kind, key, part) if "*" in path.name else _read(path, kind, key, part)


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


def _stacked(pattern: Path, kind: str, key: str | None, part: Part) -> np.ndarray:
    """The arrays of all files that match, in the order of their names."""
    paths = sorted(pattern.parent.glob(pattern.name))
    if not paths:
        raise DataError(no_file(pattern))
    first = _read(paths[0], kind, key)
    rows = part((len(paths), *first.shape))
    chosen = [paths[i] for i in np.arange(len(paths))[rows]]
    arrays = [first if path is paths[0] else _read(path, kind, key) for path in chosen]
    for path, array in zip(chosen, arrays, strict=True):
        if array.shape != first.shape:
            raise ShapeError(
                f"{path.name!r} has shape {array.shape} and {paths[0].name!r} {first.shape}: files "
                f"that are stacked need the same. {PAD}; save that as one file, and its mask"
            )
    return stacked(arrays, str(pattern)) if arrays else np.empty((0, *first.shape), first.dtype)


def no_file(path: Path) -> str:
    """The message that there is no file `path`: what is nearest, and what there is."""
    folder = path.parent
    if not folder.is_dir():
        return f"no folder {str(folder)!r}"
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return f"no file {path.name!r} in {str(folder)!r}; {available(path.name, names)}"


def _numeric(array: np.ndarray, what: str) -> np.ndarray:
    check_numbers(array.dtype, what)
    return array


def _joined(reference: Mapping[str, Any]) -> str:
    """`{file: …, key: …}` as `file:key`."""
    check_keys(reference, ("file", "key"), "array")
    file, key = reference.get("file"), reference.get("key")
    if not isinstance(file, str):
        raise ConfigError(f"expected {{file: …, key: …}}, got {short(dict(reference))}")
    return file if key is None else f"{file}:{key}"


def _inline(value: Any) -> np.ndarray:
    try:
        return np.asarray(value, dtype=float)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{short(value)} is no array of numbers: {error}") from error


def _read(path: Path, kind: str, key: str | None, part: Part = all_rows) -> np.ndarray:
    if not (path.exists() if kind == "zarr" else path.is_file()):
        raise DataError(no_file(path))
    with _reading(path):
        what = f"{path.name}:{key}" if key else path.name
        if kind in _PART_READERS:
            return _numeric(_PART_READERS[kind](path, key, part), what)
        check_room((path.stat().st_size,), 1, what)
        array = READERS[kind](path, key)
        return _numeric(array[part(array.shape)], what)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Let whatever a reader raises inside, at a damaged file, name the file."""
    try:
        yield
    except DichroicError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot read {path.name!r}: {reason}") from error


@contextmanager
def open_npz(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
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
    if key is not None:
        raise DataError(f"{path.name!r} holds one array; leave out ':{key}'")
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
    elif key is not None:
        raise DataError(f"{path.name!r} holds one array; leave out ':{key}'")
    rows = part(node.shape)
    check_zarr(node, path.name, shape_of(node.shape, rows))
    return chunked_rows(node, rows, path.name)


def _library(name: str, path: Path) -> Any:
    return library(name, "data", f"reading {path.name!r}")


_PART_READERS: dict[str, Callable[[Path, str | None, Part], np.ndarray]] = {
    "npz": _read_npz,
    "npy": _read_npy,
    "h5": _read_hdf5,
    "hdf5": _read_hdf5,
    "zarr": _read_zarr,
}
_KINDS = (*_PART_READERS, *READERS)
_REFERENCE = re.compile(
    rf"(?P<file>.+?\.(?P<kind>(?i:{'|'.join(map(re.escape, _KINDS))})))(?::(?P<key>.+))?"
)
