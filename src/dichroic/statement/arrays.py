"""Arrays in files, by references such as `file.npz:key`: `.npz`, `.npy`, HDF5, zarr, and the formats of a field.

`folder/*.png` stands for all such files, stacked in the order of their names. Where some rows are asked for, no
more is read of `.npy`, `.npz`, HDF5 and zarr arrays, and of stacked files; of the others, all is.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import IO, Any

import jax
import numpy as np

from dichroic.config import check_keys
from dichroic.errors import ConfigError, DataError, DichroicError, ShapeError
from dichroic.operators import Shape
from dichroic.statement.formats import READERS
from dichroic.statement.guard import check_hdf5, check_npy, check_npz, check_numbers, check_zarr
from dichroic.statement.values import as_number, available, short

_NPY = b"\x93NUMPY"
Part = Callable[[Shape], slice | EllipsisType]  # which rows of an array of some shape; `...`: all


def all_rows(shape: Shape) -> EllipsisType:
    """The `Part` that is everything."""
    return ...


def load_array(reference: Any, base_dir: str | Path, part: Part = all_rows) -> np.ndarray:
    """The array that `reference` stands for.

    Args:
        reference: `file.npz:key`, `file.npy`, `file.h5:/dataset`, `file.zarr:path`, `file.fits:unit`,
            `file.fits:unit/column`, `file.png`, `file.wav`, `file.mseed:channel`, the same as
            `{file: …, key: …}`, with `*` in the name for several files, stacked; a number, a (nested)
            list of numbers, or an array.
        base_dir: the folder that files are relative to.
        part: the rows (of its first axis) that are wanted of an array of a given shape; all by default.

    Raises:
        DataError: if there is no such file or entry (the message lists what there is), or if it
            holds something other than real numbers.
        ConfigError: if `reference` is none of these forms.
    """
    if isinstance(reference, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(reference)
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
            f"'file.zarr:path', 'file.fits:unit', 'files/*.png', a number or a list, got {short(reference)}"
        )
    path, kind, key = Path(base_dir) / match["file"], match["kind"], match["key"]
    return _stacked(path, kind, key, part) if "*" in path.name else _read(path, kind, key, part)


def array_shape(reference: Any, base_dir: str | Path) -> Shape:
    """The shape of the array that `reference` stands for, without reading it; raises as `load_array`."""
    found: list[Shape] = []

    def nothing(shape: Shape) -> slice | EllipsisType:
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
    chosen = paths if isinstance(rows, EllipsisType) else paths[rows]
    arrays = [first if path is paths[0] else _read(path, kind, key) for path in chosen]
    for path, array in zip(chosen, arrays, strict=True):
        if array.shape != first.shape:
            raise ShapeError(
                f"{path.name!r} has shape {array.shape} and {paths[0].name!r} {first.shape}: files "
                "that are stacked need the same"
            )
    return np.stack(arrays) if arrays else np.empty((0, *first.shape), first.dtype)


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
        if file.read(len(_NPY)) == _NPY:
            raise DataError(f"{path.name!r} holds a single array, as .npy files do: rename it")
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
        check_npz(archive.zip, path.name, [name])
        if part is all_rows:
            return archive[name]
        entry = next(e for e in archive.zip.infolist() if e.filename in (name, f"{name}.npy"))
        with archive.zip.open(entry) as file:
            header = check_npy(file, entry.file_size, path.name, packed=entry.compress_size)
            return _npy_part(file, header, part)


def _npy_part(file: IO[bytes], header: tuple[Shape, bool, np.dtype], part: Part) -> np.ndarray:
    """Some rows of the `.npy` data in `file`, read up to the end of its `header`, in memory of their own."""
    shape, fortran, dtype = header
    rows = part(shape)
    if isinstance(rows, EllipsisType) or fortran:
        data = np.frombuffer(bytearray(file.read()), dtype, count=math.prod(shape))
        return data.reshape(shape, order="F" if fortran else "C")[rows]
    start, stop, _ = rows.indices(shape[0])
    each = math.prod(shape[1:]) * dtype.itemsize
    file.seek(start * each, os.SEEK_CUR)
    data = bytearray(file.read((stop - start) * each))
    return np.frombuffer(data, dtype).reshape(stop - start, *shape[1:])


def _read_npy(path: Path, key: str | None, part: Part) -> np.ndarray:
    if key is not None:
        raise DataError(f"{path.name!r} holds one array; leave out ':{key}'")
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            raise DataError(f"{path.name!r} is an archive of arrays, as .npz files are: rename it")
        file.seek(0)
        return _npy_part(file, check_npy(file, path.stat().st_size, path.name), part)


def _read_hdf5(path: Path, key: str | None, part: Part) -> np.ndarray:
    try:
        import h5py
    except ImportError as error:
        raise DataError(_needs("h5py", path)) from error
    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda k, v: names.append(f"/{k}") if isinstance(v, h5py.Dataset) else None)
        name = _entry(path, key, names)
        dataset: Any = file[name]
        rows = part(dataset.shape or ())
        check_hdf5(dataset, f"{path.name}:{name}", _shape_of(dataset.shape or (), rows))
        return np.asarray(dataset[rows])


def _shape_of(shape: Shape, rows: slice | EllipsisType) -> Shape:
    """The shape that `rows` of an array of `shape` have."""
    if isinstance(rows, EllipsisType):
        return shape
    return (len(range(*rows.indices(shape[0]))), *shape[1:])


def _read_zarr(path: Path, key: str | None, part: Part) -> np.ndarray:
    try:
        import zarr
    except ImportError as error:
        raise DataError(_needs("zarr", path)) from error
    node: Any = zarr.open(path, mode="r")
    if isinstance(node, zarr.Group):
        members = node.members(max_depth=None)
        names = [name for name, child in members if isinstance(child, zarr.Array)]
        node = node[_entry(path, key, names).strip("/")]
    elif key is not None:
        raise DataError(f"{path.name!r} holds one array; leave out ':{key}'")
    rows = part(node.shape)
    check_zarr(node, path.name, _shape_of(node.shape, rows))
    return np.asarray(node[rows])


def _needs(package: str, path: Path) -> str:
    return f"reading {path.name!r} needs {package}: pip install 'dichroic[data]'"


_PART_READERS: dict[str, Callable[[Path, str | None, Part], np.ndarray]] = {
    "npz": _read_npz,
    "npy": _read_npy,
    "h5": _read_hdf5,
    "hdf5": _read_hdf5,
    "zarr": _read_zarr,
}
_REFERENCE = re.compile(
    rf"(?P<file>.+?\.(?P<kind>{'|'.join((*_PART_READERS, *READERS))}))(?::(?P<key>.+))?"
)
