"""How much a file may ask for: a few bytes can state an array of terabytes.

An array may always be as large as what its file really holds; beyond that, as with compressed ones,
there is a bound. `within` an amount of memory, nothing is read at once that takes more.
"""

import math
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from dichroic.errors import ConfigError, DataError

VARIABLE = "DICHROIC_MAX_GIB"  # raises the bound on one array
ARRAY_GIB = 4.0
TEXT_BYTES = 64 * 2**20  # of a JSON file
MOST_NUMBERS = 2**24  # of one draw of a source
CHUNKS = 8  # of which the memory has to have room for so many
_memory: ContextVar[int | None] = ContextVar("memory", default=None)


def most_bytes() -> int:
    """The bytes that one array from a file may have; raises `ConfigError` if the variable is no number."""
    text = os.environ.get(VARIABLE, "")
    try:
        gib = float(text) if text else ARRAY_GIB
    except ValueError:
        gib = math.nan
    if not 0 < gib < 2**30:
        raise ConfigError(f"{VARIABLE}={text}: expected a number of GiB")
    return int(gib * 2**30)


def check_array(shape: Sequence[Any], itemsize: int, what: str, *, held: int = 0) -> int:
    """The bytes of an array of `shape`; raises `DataError` if they are too many and its file holds only `held`."""
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise DataError(f"{what} is damaged: it states an array of shape {tuple(shape)}")
    size = math.prod(shape) * itemsize
    if size > max(most_bytes(), held):
        gib = math.ceil(size / 2**30)
        raise DataError(
            f"{what} states an array of {gib:,} GiB, more than the {most_bytes() / 2**30:g} GiB that one may "
            f"have; if that is meant, set {VARIABLE}={gib} in the environment"
        )
    return size


@contextmanager
def within(memory: int | None) -> Generator[None, None, None]:
    """Let `check_room` and `check_chunk`, inside, allow for so many bytes of memory; `None` is no bound."""
    before = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(before)


def check_room(shape: Sequence[int], itemsize: int, what: str) -> None:
    """Raise `ConfigError` if an array of `shape`, that is read as a whole, takes more than the memory."""
    memory, size = _memory.get(), math.prod(shape) * itemsize
    if memory is not None and size > memory:
        raise ConfigError(
            f"{what} is read as a whole and takes {_mib(size)}, more than the {_mib(memory)} of memory that are "
            "given: give more"
        )


def check_chunk(shape: Sequence[int], itemsize: int, what: str) -> None:
    """Raise `ConfigError` if a chunk of `shape` takes more than an eighth of the memory.

    It is there at least twice while it is read, beside what it is read for.
    """
    memory, size = _memory.get(), math.prod(shape) * itemsize
    if memory is not None and CHUNKS * size > memory:
        raise ConfigError(
            f"{what} is in chunks of {_mib(size)}, more than an eighth of the {_mib(memory)} of memory that are "
            f"given: write it in smaller chunks, or give {_mib(CHUNKS * size)}"
        )


def _mib(size: int) -> str:
    return f"{math.ceil(size / 2**20):,} MiB"


def check_text(path: Path, most: int, hint: str) -> None:
    """Raise `ConfigError` if the file `path` is larger than `most` bytes."""
    size = path.stat().st_size
    if size > most:
        raise ConfigError(
            f"{path.name} has {size / 2**20:,.1f} MiB, more than {most / 2**20:g}: {hint}"
        )
