"""Some rows of an array in a file, in memory for these rows and one window more, however far apart they are.

A window is a bounded part of the file: rows near each other are read together with what lies between them, but in
no more than `WINDOW` bytes at a time. Of arrays in chunks, windows are made of whole chunks, so that each chunk is
decoded once; a chunk that is larger than a window is one by itself.
"""

import itertools
import math
from collections.abc import Iterator
from types import EllipsisType
from typing import IO, Any

import numpy as np

from dichroic.errors import DataError
from dichroic.operators import Shape
from dichroic.runtime.limits import check_chunk, check_room

Rows = slice | np.ndarray  # some rows of an array: consecutive ones, or their numbers, increasing
WINDOW = 2**24  # bytes that are read at a time
AHEAD = 2**17  # bytes between two rows of a plain file that are read along rather than left out,
NEAR = 2**20  # and of an array in chunks, where every read costs more


def shape_of(shape: Shape, rows: Rows | EllipsisType) -> Shape:
    """The shape that `rows` of an array of `shape` have."""
    if isinstance(rows, EllipsisType):
        return shape
    count = len(range(*rows.indices(shape[0]))) if isinstance(rows, slice) else len(rows)
    return (count, *shape[1:])


def runs(
    rows: Rows, count: int, window: int, near: int, chunk: int = 1
) -> Iterator[tuple[slice, slice, slice | np.ndarray]]:
    """How to read `rows` of `count`: `(places among rows, rows to read, those wanted of what is read)`, in order.

    No read crosses a multiple of `window` rows, itself one of `chunk`; rows more than `near` apart are left out
    unless they are of one chunk.
    """
    if isinstance(rows, slice):
        first, stop, _ = rows.indices(count)
        for start in range(first - first % window, stop, window):
            read = slice(max(start, first), min(start + window, stop))
            yield slice(read.start - first, read.stop - first), read, slice(None)
        return
    window_of, chunk_of = rows // window, rows // chunk
    apart = (np.diff(rows) > near) & (np.diff(chunk_of) > 0)
    edges = [0, *(np.flatnonzero(apart | (np.diff(window_of) > 0)) + 1), len(rows)]
    for i, j in itertools.pairwise(edges if len(rows) else []):
        read = slice(int(rows[i]), int(rows[j - 1]) + 1)
        dense = read.stop - read.start == j - i
        yield slice(i, j), read, slice(None) if dense else rows[i:j] - read.start


def npy_rows(
    file: IO[bytes], header: tuple[Shape, bool, np.dtype], rows: Rows | EllipsisType, what: str
) -> np.ndarray:
    """Some rows of the `.npy` data in `file`, read up to the end of its `header`, in memory of their own."""
    shape, fortran, dtype = header
    begin, want = file.tell(), shape_of(shape, rows)
    check_room(want, dtype.itemsize, what)
    if isinstance(rows, EllipsisType):
        whole = np.empty(math.prod(shape), dtype)
        _read_into(file, begin, whole)
        return whole.reshape(shape, order="F" if fortran else "C")
    if not fortran:
        out = np.empty(want, dtype)
        _read_rows(file, begin, shape[0], rows, out)
        return out
    columns = np.empty((math.prod(shape[1:]), want[0]), dtype)
    for i, column in enumerate(columns):
        _read_rows(file, begin + i * shape[0] * dtype.itemsize, shape[0], rows, column)
    return columns.reshape((*shape[:0:-1], want[0])).transpose()


def _read_rows(file: IO[bytes], begin: int, count: int, rows: Rows, out: np.ndarray) -> None:
    """Fill `out` with `rows` of the `count` that begin at a place of `file`."""
    each = max(math.prod(out.shape[1:]) * out.itemsize, 1)
    window = max(WINDOW // each, 1)
    for places, read, wanted in runs(rows, count, window, max(AHEAD // each, 1)):
        at = begin + read.start * each
        if isinstance(wanted, slice):
            _read_into(file, at, out[places])
        else:
            piece = np.empty((read.stop - read.start, *out.shape[1:]), out.dtype)
            _read_into(file, at, piece)
            out[places] = piece[wanted]


def _read_into(file: IO[bytes], at: int, array: np.ndarray) -> None:
    """Fill `array` from a place of `file`, a window at a time, of which what unpacks a file makes a copy."""
    into = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
    file.seek(at)
    for start in range(0, len(into), WINDOW):
        part = into[start : start + WINDOW]
        if file.readinto(part) < len(part):  # type: ignore[attr-defined]
            raise DataError("the file ends before its numbers do")


def chunked_rows(array: Any, rows: Rows | EllipsisType, what: str) -> np.ndarray:
    """Some rows of an HDF5 or zarr array.

    Raises `ConfigError` where they, or a chunk of the array, take too much of the memory.
    """
    shape = tuple(int(n) for n in array.shape or ())
    size = array.dtype.itemsize
    check_room(shape_of(shape, rows), size, what)
    if isinstance(rows, EllipsisType):
        return np.asarray(array[...])
    check_chunk(array.chunks or (), size, what)
    out = np.empty(shape_of(shape, rows), array.dtype)
    if not out.size:
        return out
    chunks: Shape = tuple(array.chunks or (1, *shape[1:]))
    window = _window(shape, chunks, size)
    near = max(NEAR * shape[0] // (math.prod(shape) * size), 1)
    others = [
        [slice(i, min(i + step, n)) for i in range(0, n, step)]
        for n, step in zip(shape[1:], window[1:], strict=True)
    ]
    for places, read, wanted in runs(rows, shape[0], window[0], near, chunks[0]):
        for beside in itertools.product(*others):
            piece = np.asarray(array[(read, *beside)])
            out[(places, *beside)] = piece[wanted]
    return out


def _window(shape: Shape, chunks: Shape, itemsize: int) -> Shape:
    """The numbers along each axis that are read at a time: whole chunks of at most `WINDOW` bytes, or one."""
    window = [min(c, n) for c, n in zip(chunks, shape, strict=True)]
    for axis in reversed(range(len(shape))):
        more = max(WINDOW // (math.prod(window) * itemsize), 1)
        whole = axis > 0 and window[axis] * more >= shape[axis]
        window[axis] = shape[axis] if whole else window[axis] * more
    return tuple(window)
