"""Positions in a file, the errors that name them, and tables read safely from YAML."""

import zipfile
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from dichroic.config import check_keys
from dichroic.errors import ConfigError, DichroicError, ShapeError
from dichroic.io.arrays import load_array
from dichroic.io.references import no_file
from dichroic.io.values import available, short
from dichroic.io.yaml import MOST_BYTES, parse_yaml
from dichroic.numerics.batching import row_counts
from dichroic.operators import Shape
from dichroic.runtime.limits import check_text


@dataclass(frozen=True)
class Rows:
    """Some observations, consecutive or by their numbers, of `count` in all."""

    index: slice | np.ndarray
    count: int

    def of(self, shape: Shape) -> slice | np.ndarray:
        """The rows of an array of `shape`, which has one per observation."""
        if shape[0] != self.count:
            raise ShapeError(
                f"an array of shape {shape}, one row per observation, but there are {self.count} "
                "observations (axis 0)"
            )
        return self.index


@dataclass(frozen=True)
class Location:
    """A position in a file: the file's name, its folder, and the keys that lead there.

    With `rows`, arrays that have one row per observation are read as far as these go; what all observations
    share is `kept` once it is read, for the next rows.
    """

    file: str
    folder: Path
    path: str = ""
    rows: Rows | None = None
    kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def at(self, key: str | int) -> "Location":
        """The position of the entry `key` of the table (or list) that is here."""
        if isinstance(key, int):
            return replace(self, path=f"{self.path}[{key}]")
        return replace(self, path=f"{self.path}.{key}" if self.path else key)

    def array(
        self, reference: Any, shared: Callable[[Shape], bool] = lambda shape: True
    ) -> np.ndarray:
        """The array that `reference`, which is here, stands for.

        `shared` says of which shapes an array is the same for all observations, by what it is there for; of
        another shape, it has one row for each.
        """
        rows = self.rows
        with naming(self):
            if rows is None:
                return load_array(reference, self.folder)
            if self.path in self.kept:
                return self.kept[self.path]
            whole = lambda shape: not shape or shared(shape)
            stated: list[Shape] = []

            def part(shape: Shape) -> slice | np.ndarray | EllipsisType:
                stated.append(shape)
                return ... if whole(shape) else rows.of(shape)

            array = load_array(reference, self.folder, part)
            if whole(stated[-1]):
                self.kept[self.path] = array
            return array

    def keep(self, build: Callable[[], Any]) -> Any:
        """What `build` makes of what is here, kept if all observations share it, in place of arrays in it."""
        if self.rows is not None and self.path in self.kept:
            return self.kept[self.path]
        built = build()
        if self.rows is not None and not row_counts(built):
            for path in [p for p in self.kept if p.startswith(f"{self.path}.")]:
                del self.kept[path]
            self.kept[self.path] = built
        return built

    def __str__(self):
        return f"{self.file}: {self.path}" if self.path else self.file


@contextmanager
def naming(location: Location) -> Generator[None, None, None]:
    """Let errors raised inside start with `location`, unless they name a position already."""
    try:
        yield
    except DichroicError as error:
        if str(error).startswith(f"{location.file}: "):
            raise
        raise type(error)(f"{location}: {error}") from error
    except (ValueError, TypeError, IndexError, OverflowError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{location}: {error}") from error
    except (MemoryError, RecursionError) as error:
        raise ConfigError(f"{location}: it is too large or nested too deeply: {error}") from error


def as_table(value: Any, location: Location) -> dict[str, Any]:
    """`value` as a dictionary with text keys."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{location}: expected a table (key: value), got {short(value)}")
    for key in value:
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise ConfigError(
                f"{location}: {key!r} is no name; put names such as 'on' or '1.5' in quotes"
            )
        if not str(key).isprintable():  # names are shown on terminals
            raise ConfigError(
                f"{location}: {short(key)} is no name: it holds characters that control"
            )
    return {str(k): v for k, v in value.items()}


def known_table(value: Any, names: Iterable[str], location: Location) -> dict[str, Any]:
    """`value`, where there is one, as a dictionary whose keys are among `names`."""
    table = {} if value is None else as_table(value, location)
    check_keys(table, names, str(location))
    return table


def require(table: Mapping[str, Any], keys: Iterable[str], location: Location) -> None:
    """Raise a `ConfigError` unless `table` has a value for each of `keys`."""
    for key in keys:
        if table.get(key) is None:
            raise ConfigError(f"{location}: {key!r} is missing")


def read_yaml(path: Path) -> tuple[dict[str, Any], Location]:
    """The table in a YAML file, and its position."""
    location = Location(path.name, path.parent)
    if path.is_dir():
        there = sorted(p.name for kind in ("*.yaml", "*.yml") for p in path.glob(kind))
        raise ConfigError(
            f"{str(path)!r} is a folder; expected a problem file (YAML); {available('', there)}"
        )
    if not path.is_file():
        raise ConfigError(f"{location}: {no_file(path)}")
    with naming(location):
        check_text(path, MOST_BYTES, "keep arrays in files of their own, and refer to them")
        return as_table(parse_yaml(path.read_bytes()), location), location
