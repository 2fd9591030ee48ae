"""Chunks of zarr arrays, uncompressed, as files that tell whether they are damaged.

    numbers, little-endian, in C order | their CRC-32C, 4 bytes, little-endian

That is zarr's codec `crc32c`, so whatever reads the array checks it too. Without the sum (`summed` is false), as
earlier releases wrote them, only the size of a file can be wrong.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from dichroic.errors import FormatError
from dichroic.runtime.files import write_atomic, writing
from dichroic.runtime.optional_imports import library

_SUM = 4
_PIECE = 2**20  # bytes that are summed at a time
_CHANGED = "does not hold what was written (by its checksum)"


def write_chunk(file: Path, values: np.ndarray, *, summed: bool) -> None:
    """Write `values` as the chunk `file`, whole or not at all; raises `RunError` where that fails."""
    data = np.ascontiguousarray(values, _stored(values.dtype)).data.cast("B")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, data, _sum(_pieces(data)) if summed else b"")


def read_chunk(file: Path, shape: Sequence[int], dtype: str, *, summed: bool) -> np.ndarray:
    """The numbers of the chunk `file`, `shape`; raises `FormatError` unless they are as they were written."""
    wrong = fault(file, shape, dtype, summed=summed)
    try:
        data = b"" if wrong else file.read_bytes()
    except OSError as error:
        wrong, data = _unread(error), b""
    whole = memoryview(data)
    if not wrong and summed and _sum(_pieces(whole[:-_SUM])) != data[-_SUM:]:
        wrong = _CHANGED
    if wrong:
        raise FormatError(f"{file} is damaged: it {wrong}")
    return np.frombuffer(data, _stored(dtype), math.prod(shape)).reshape(shape)


def fault(
    file: Path, shape: Sequence[int], dtype: str, *, summed: bool, read: bool = False
) -> str | None:
    """What is wrong with the chunk `file`: that it is not there, its size, and with `read` its checksum."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    whole = size + _SUM * summed
    try:
        found = file.stat().st_size
        if found != whole:
            return f"has {found:,} of {whole:,} bytes"
        if read and summed:
            with file.open("rb") as f:
                return None if _sum(_read(f, size)) == f.read() else _CHANGED
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return _unread(error)
    return None


def _unread(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"


def _stored(dtype: np.dtype | str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _sum(pieces: Iterable[bytes]) -> bytes:
    crc32c = library("google_crc32c", "data", "checking chunks of zarr arrays")
    return functools.reduce(crc32c.extend, pieces, 0).to_bytes(_SUM, "little")


def _pieces(data: memoryview) -> Iterator[bytes]:
    for start in range(0, len(data), _PIECE):
        yield bytes(data[start : start + _PIECE])


def _read(f: IO[bytes], size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file."""
    for start in range(0, size, _PIECE):
        yield f.read(min(_PIECE, size - start))
