"""Checks of array files before they are read: what they state is there, and they refer to nothing else.

None of the formats runs code by itself. What could is left out: pickled objects, codecs of zarr other
than those below. So is what makes one file read another: virtual and external data sets of HDF5.
"""

import math
import struct
import zipfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from dichroic.errors import DataError
from dichroic.runtime.limits import check_array

MOST_CHUNKS = 1_000_000
ZARR_CODECS = {
    *(
        "bytes",
        "endian",
        "transpose",
        "sharding_indexed",
        "crc32c",
        "blosc",
        "zstd",
        "gzip",
        "zlib",
    ),
    *(
        "bz2",
        "lzma",
        "lz4",
        "delta",
        "shuffle",
        "bitround",
        "fixedscaleoffset",
        "quantize",
        "packbits",
    ),
    *("astype", "crc32", "adler32", "fletcher32"),
}


def check_npy(
    file: IO[bytes], size: int, what: str, *, packed: int | None = None
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """`(shape, in the order of Fortran, dtype)` of the `.npy` data in `file`, of `size` bytes.

    Raises `DataError` unless they hold the numbers that they state. With `packed`, the bytes that they have in
    an archive, nothing may follow them there. `file` is read up to the end of the header.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{what} holds something other than a plain array")
    read = (
        np.lib.format.read_array_header_1_0
        if version[0] == 1
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise DataError(f"{what} holds pickled objects, which are not read: they can run code")
    left = size - file.tell()
    stated = check_array(shape, dtype.itemsize, what, held=left if packed is None else packed)
    if stated > left or (packed is not None and stated != left):
        raise DataError(
            f"{what} is damaged: it states {stated:,} bytes of numbers, and has {left:,}"
        )
    return shape, fortran, dtype


def check_npz(archive: Any, file: str, names: Iterable[str]) -> None:
    """Raise `DataError` unless the entries `names` of `archive`, opened from `file`, are plain arrays."""
    entries = archive.infolist()
    if len({e.filename for e in entries}) < len(entries):
        raise DataError(f"{file!r} is damaged: two arrays have the same name")
    stated = _stated_count(archive)
    if stated not in (None, 0xFFFF, len(entries)):
        raise DataError(f"{file!r} is damaged: it does not have as many arrays as it states")
    by_name = {e.filename.removesuffix(".npy"): e for e in entries}
    for name in names:
        entry, what = by_name[name.removesuffix(".npy")], f"{file}:{name}"
        if not entry.filename.endswith(".npy"):
            raise DataError(f"{what} is no array")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{what} is compressed in a way that numpy does not write")
        with archive.open(entry) as data:
            check_npy(data, entry.file_size, what, packed=entry.compress_size)


@contextmanager
def open_entry(archive: Any, entry: zipfile.ZipInfo) -> Generator[IO[bytes], None, None]:
    """The data of one entry of `archive`, to be read; where they are not compressed, in the file itself.

    There, what comes before some rows need not be read. Raises `DataError` where the file ends before the entry.
    """
    with archive.open(entry) as file:
        if entry.compress_type != zipfile.ZIP_STORED:
            yield file
            return
    whole = archive.fp
    size = whole.seek(0, 2)
    whole.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", whole.read(4))
    begin = whole.tell() + name + extra
    if begin + entry.file_size > size:
        raise DataError(f"the entry {entry.filename!r} is damaged: it ends after its file")
    whole.seek(begin)
    yield whole


def _stated_count(archive: Any) -> int | None:
    """The number of entries that the end of an archive states (0xFFFF: too many for its field)."""
    archive.fp.seek(0, 2)
    archive.fp.seek(max(archive.fp.tell() - 2**16 - 22, 0))
    end = archive.fp.read()
    at = end.rfind(b"PK\x05\x06")
    return int.from_bytes(end[at + 10 : at + 12], "little") if at >= 0 else None


def check_hdf5(dataset: Any, what: str, shape: Sequence[int] | None = None) -> None:
    """Raise `DataError` unless `dataset` holds numbers that are in the file itself.

    `shape` is that of the part of it that is to be read, where that is not all.
    """
    whole: Sequence[int] = dataset.shape or ()
    check_numbers(dataset.dtype, what)
    if dataset.is_virtual or dataset.external:
        raise DataError(f"{what} is kept in other files, which are not read; copy it into this one")
    held = dataset.id.get_storage_size()
    check_array(whole if shape is None else shape, dataset.dtype.itemsize, what, held=held)
    _check_chunks(whole, dataset.chunks, dataset.dtype.itemsize, what)


def check_zarr(array: Any, what: str, shape: Sequence[int] | None = None) -> None:
    """Raise `DataError` unless `array` holds numbers, in chunks whose codecs are known to be harmless.

    `shape` is that of the part of it that is to be read, where that is not all.
    """
    about = array.metadata.to_dict()
    names = {str(n).lower().removeprefix("numcodecs.") for n in _codecs(about)}
    if unknown := names - ZARR_CODECS:
        raise DataError(f"{what} has a codec that is not read: {', '.join(sorted(unknown))}")
    check_numbers(array.dtype, what)
    check_array(array.shape if shape is None else shape, array.dtype.itemsize, what)
    _check_chunks(array.shape, array.chunks, array.dtype.itemsize, what)
    _check_chunks(array.shape, getattr(array, "shards", None), array.dtype.itemsize, what)


def check_numbers(dtype: np.dtype, what: str) -> None:
    """Raise `DataError` unless `dtype` is one of real numbers."""
    if dtype.kind not in "biuf":
        raise DataError(f"{what} holds {dtype}, not real numbers")


def _check_chunks(
    shape: Sequence[int], chunks: Sequence[int] | None, itemsize: int, what: str
) -> None:
    if chunks is None:
        return
    check_array(chunks, itemsize, f"a chunk of {what}")
    count = math.prod(-(-n // max(c, 1)) for n, c in zip(shape, chunks, strict=True))
    if count > MOST_CHUNKS:
        raise DataError(f"{what} has {count:,} chunks, more than {MOST_CHUNKS:,}: make them larger")


def _codecs(about: Any, inside: bool = False) -> Iterator[Any]:
    """The names of all codecs in the metadata of a zarr array, those within others too."""
    if isinstance(about, (list, tuple)):
        for part in about:
            yield from _codecs(part, inside)
    elif isinstance(about, Mapping):
        if inside and ("id" in about or "name" in about):
            yield about.get("id", about.get("name"))
        for key, part in about.items():
            listed = key in ("filters", "compressor", "codecs", "index_codecs")
            if listed or key == "configuration":
                yield from _codecs(part, listed)
    elif inside and about is not None:  # an object, as `numcodecs` has them
        yield from _codecs(
            about.to_dict() if hasattr(about, "to_dict") else about.get_config(), True
        )
