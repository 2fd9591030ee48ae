"""References to arrays in files, such as `file.npz:key`: which file, of what kind, and the key.

The ending of a name says the kind of a file; where it does not, the first bytes of the file do.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dichroic.config import check_keys
from dichroic.errors import ConfigError, DataError
from dichroic.io.formats import READERS, kind_by_content
from dichroic.io.values import available, natural, short

PART_KINDS = ("npz", "npy", "h5", "hdf5", "zarr")  # of which some rows are read alone
_LONGEST = 4096  # characters


def _kinds() -> tuple[str, ...]:
    """The endings of the files that can be read, those that users have added to `READERS` among them."""
    return (*PART_KINDS, *READERS)


def _file_pattern() -> str:
    kinds = "|".join(map(re.escape, _kinds()))
    return rf"(?P<file>.+?\.(?P<kind>(?i:{kinds})))"


@dataclass(frozen=True)
class Reference:
    """The array `key` of a file, or of all files that match its name, of one `kind`."""

    path: Path
    kind: str
    key: str | None

    @property
    def several(self) -> bool:
        """Whether it stands for all files that match."""
        return "*" in self.path.name


def locate(reference: Any, base_dir: str | Path) -> Reference:
    """What `reference`, `file:key` or `{file: …, key: …}`, stands for; relative to the folder `base_dir`.

    Raises `ConfigError` where it is neither, `DataError` where the kind of a file cannot be told.
    """
    found = None
    if isinstance(reference, Mapping):
        check_keys(reference, ("file", "key"), "array")
        file, key = reference.get("file"), reference.get("key")
        if not isinstance(file, str):
            raise ConfigError(f"expected {{file: …, key: …}}, got {short(dict(reference))}")
        found = _parse(file, base_dir) if key is None else _whole(file, str(key), Path(base_dir))
    elif isinstance(reference, str):
        found = _parse(reference, base_dir)
    if found is None:
        raise ConfigError(
            f"expected an array such as 'file.npz:key', 'file.npy', 'file.h5:/dataset', "
            f"'file.zarr:path', 'file.fits:unit', 'files/*.png', a number or a list, got {short(reference)}; "
            f"files end in {', '.join(f'.{kind}' for kind in _kinds())}, or exist and begin as such files do"
        )
    return found


def is_reference(text: str, base_dir: str | Path) -> bool:
    """Whether `text` has the form of a reference, or is the name of a file that exists."""
    return bool(_fits(_file_pattern() + "(?::(?P<key>.+))?", text)) or any(
        _first(Path(base_dir) / file) for file, _ in _splits(text)
    )


def _parse(text: str, base_dir: str | Path) -> Reference | None:
    match = _fits(_file_pattern() + "(?::(?P<key>.+))?", text)
    if match:
        return Reference(Path(base_dir) / match["file"], match["kind"].lower(), match["key"])
    for file, key in _splits(text):
        if found := _by_content(Path(base_dir) / file, key):
            return found
    return None


def _whole(file: str, key: str, base_dir: Path) -> Reference | None:
    """The entry `key` of `file`, whose name may hold colons."""
    match = _fits(_file_pattern(), file)
    if match:
        return Reference(base_dir / file, match["kind"].lower(), key)
    return _by_content(base_dir / file, key)


def _fits(pattern: str, text: str) -> re.Match[str] | None:
    return re.fullmatch(pattern, text) if len(text) < _LONGEST else None


def _splits(text: str) -> Iterator[tuple[str, str | None]]:
    """`text` as the name of a file, and as name and key at each of its colons."""
    if len(text) >= _LONGEST:
        return
    yield text, None
    for i in reversed([i for i, c in enumerate(text) if c == ":"]):
        if text[:i] and text[i + 1 :]:
            yield text[:i], text[i + 1 :]


def _by_content(path: Path, key: str | None) -> Reference | None:
    """The reference to `path`, whose ending is none of those known, if there is such a file."""
    file = _first(path)
    if file is None:
        return None
    kind = kind_by_content(file)
    if kind is None:
        raise DataError(
            f"cannot tell the format of {file.name!r}, by its ending or its first bytes; files end in "
            f"{', '.join(f'.{kind}' for kind in _kinds())}"
        )
    return Reference(path, kind, key)


def _first(path: Path) -> Path | None:
    """The file `path`, or the first that matches."""
    try:
        found = matching(path) if "*" in path.name else [path]
        return next((p for p in found if p.is_file()), None)
    except (OSError, ValueError):  # no name that a file can have
        return None


def matching(pattern: Path) -> list[Path]:
    """All files that match `pattern`, in the natural order of their names."""
    return sorted(pattern.parent.glob(pattern.name), key=lambda p: natural(p.name))


def no_file(path: Path) -> str:
    """The message that there is no file `path`: what is nearest, and what there is."""
    folder = path.parent
    if not folder.is_dir():
        return f"no folder {str(folder)!r}"
    names = sorted((p.name for p in folder.iterdir() if not p.name.startswith(".")), key=natural)
    return f"no file {path.name!r} in {str(folder)!r}; {available(path.name, names)}"
