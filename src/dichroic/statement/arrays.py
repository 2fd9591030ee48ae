"""Arrays in files, by references such as `file.npz:key`: `.npz`, `.npy`, HDF5, zarr, and the formats of a field.

`folder/*.png` stands for all such files, stacked in the order of their names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dichroic.config import check_keys
from dichroic.errors import ConfigError, DataError, DichroicError, ShapeError
from dichroic.statement.formats import READERS, Reader
from dichroic.statement.guard import check_hdf5, check_npy, check_npz, check_numbers, check_zarr
from dichroic.statement.values import as_number, available, short

_NPY = b"\x93NUMPY"


def load_array(reference: Any, base_dir: str | Path) -> np.ndarray:
    """The array that `reference` stands for.

    Args:
        reference: `file.npz:key`, `file.npy`, `file.h5:/dataset`, `file.zarr:path`, `file.fits:unit`,
            `file.fits:unit/column`, `file.png`, `file.wav`, `file.mseed:channel`, the same as
            `{file: …, key: …}`, with `*` in the name for several files, stacked; a number, a (nested)
            list of numbers, or an array.
        base_dir: the folder that files are relative to.

    Raises:
        DataError: if there is no such file or entry (the message lists what there is), or if it
            holds something other than real numbers.
        ConfigError: if `reference` is none of these forms.
    """
    if isinstance(reference, (np.ndarray, np.generic, jax.Array)):
        return _numeric(np.asarray(reference), "the array")
    if isinstance(reference, Mapping):
        reference = _joined(reference)
    number = as_number(reference)
    if number is not None or isinstance(reference, (list, tuple)):
        return _inline(reference if number is None else number)
    is_name = isinstance(reference, str) and len(reference) < 4096
    match = _REFERENCE.fullmatch(reference) if is_name else None
    if match is None:
        raise ConfigError(
            f"expected an array such as 'file.npz:key', 'file.npy', 'file.h5:/dataset', "
            f"'file.zarr:path', 'file.fits:unit', 'files/*.png', a number or a list, got {short(reference)}"
        )
    path, kind, key = Path(base_dir) / match["file"], match["kind"], match["key"]
    return _stacked(path, kind, key) if "*" in path.name else _read(path, kind, key)


def _stacked(pattern: Path, kind: str, key: str | None) -> np.ndarray:
    """The arrays of all files that match, in the order of their names."""
    paths = sorted(pattern.parent.glob(pattern.name))
    if not paths:
        raise DataError(no_file(pattern))
    arrays = [_read(path, kind, key) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise ShapeError(
                f"{path.name!r} has shape {array.shape} and {paths[0].name!r} {arrays[0].shape}: files "
                "that are stacked need the same"
            )
    return np.stack(arrays)


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


def _read(path: Path, kind: str, key: str | None) -> np.ndarray:
    if not (path.exists() if kind == "zarr" else path.is_file()):
        raise DataError(no_file(path))
    with _reading(path):
        return _numeric(_READERS[kind](path, key), f"{path.name}:{key}" if key else path.name)


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


def _read_npz(path: Path, key: str | None) -> np.ndarray:
    with open_npz(path) as archive:
        name = _entry(path, key, list(archive))
        check_npz(archive.zip, path.name, [name])
        return archive[name]


def _read_npy(path: Path, key: str | None) -> np.ndarray:
    if key is not None:
        raise DataError(f"{path.name!r} holds one array; leave out ':{key}'")
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            raise DataError(f"{path.name!r} is an archive of arrays, as .npz files are: rename it")
        file.seek(0)
        check_npy(file, path.stat().st_size, path.name)
        file.seek(0)
        return np.load(file, allow_pickle=False)


def _read_hdf5(path: Path, key: str | None) -> np.ndarray:
    try:
        import h5py
    except ImportError as error:
        raise DataError(_needs("h5py", path)) from error
    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda k, v: names.append(f"/{k}") if isinstance(v, h5py.Dataset) else None)
        name = _entry(path, key, names)
        dataset: Any = file[name]
        check_hdf5(dataset, f"{path.name}:{name}")
        return np.asarray(dataset[...])


def _read_zarr(path: Path, key: str | None) -> np.ndarray:
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
    check_zarr(node, path.name)
    return np.asarray(node[...])


def _needs(package: str, path: Path) -> str:
    return f"reading {path.name!r} needs {package}: pip install 'dichroic[data]'"


_READERS: dict[str, Reader] = {
    "npz": _read_npz,
    "npy": _read_npy,
    "h5": _read_hdf5,
    "hdf5": _read_hdf5,
    "zarr": _read_zarr,
    **READERS,
}
_REFERENCE = re.compile(rf"(?P<file>.+?\.(?P<kind>{'|'.join(_READERS)}))(?::(?P<key>.+))?")
