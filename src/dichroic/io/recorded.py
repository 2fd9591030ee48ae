"""What readers of a field's formats return, and what they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.errors import DataError
from dichroic.runtime.limits import check_array, check_room
from dichroic.runtime.optional_imports import library


@dataclass(frozen=True)
class Recorded:
    """An array from a file.

    `common` is what files that are stacked need to have in common, such as `{"sampling rate": "100 Hz"}`.
    """

    array: np.ndarray
    common: Mapping[str, str] = field(default_factory=dict)


def check_stated(shape: Sequence[int], itemsize: int, path: Path, held: int = 0) -> None:
    """Raise a `DichroicError` if an array that `path` states is larger than one may have, or than the memory.

    `held` are bytes that the file is known to hold.
    """
    check_array(shape, itemsize, path.name, held=held)
    check_room(shape, itemsize, path.name)


def no_key(path: Path, key: str | None) -> None:
    """Raise a `DataError` if there is a `key` for a file that holds one array."""
    if key is not None:
        raise DataError(f"{path.name!r} holds one array; leave out ':{key}'")


def reader_library(name: str, extra: str, path: Path) -> Any:
    """The module `name`, which reading `path` needs and the extra `extra` installs."""
    return library(name, extra, f"reading {path.name!r}")


def starts_with(path: Path, *magic: bytes) -> bool:
    """Whether the file `path` begins with one of `magic`."""
    with path.open("rb") as file:
        return file.read(max(map(len, magic))).startswith(magic)
