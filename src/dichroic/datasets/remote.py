"""Files that a data set needs: in a folder of the user's, or fetched once and kept."""

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from dichroic.errors import DataError
from dichroic.files import write_atomic

DATA_VARIABLE = "DICHROIC_DATA"
_SECONDS = 60


@dataclass(frozen=True)
class RemoteFile:
    """A file by its name in a data folder, where to fetch it from, and what it must hold."""

    name: str
    url: str
    sha256: str
    size: int


def data_folders(data_dir: str | Path | None = None) -> list[Path]:
    """Where files are looked for: `data_dir`, else `$DICHROIC_DATA`; then what was fetched before."""
    stated = data_dir or os.environ.get(DATA_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dichroic"
    return [*([Path(stated)] if stated else []), cache]


def find_file(name: str, data_dir: str | Path | None = None) -> Path | None:
    """The file called `name` in one of the `data_folders`, if there is one."""
    return next((p for d in data_folders(data_dir) if (p := d / name).is_file()), None)


def fetch(file: RemoteFile, data_dir: str | Path | None = None) -> Path:
    """The path of `file`, which is fetched and kept if it is not there.

    Raises `DataError` where it cannot be fetched or is not what it should be. A file of the user's own is
    taken as it is.
    """
    found = find_file(file.name, data_dir)
    if found:
        return found
    target = data_folders(data_dir)[-1] / file.name
    advice = f"put it in a folder and give that as --data-dir or as the variable {DATA_VARIABLE}"
    try:
        with urllib.request.urlopen(file.url, timeout=_SECONDS) as answer:
            content = answer.read(file.size + 1)
    except (OSError, urllib.error.URLError) as error:
        raise DataError(
            f"{file.name} is not in {', '.join(map(str, data_folders(data_dir)))}, and could not be "
            f"fetched from {file.url} ({error}); {advice}"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise DataError(
            f"{file.url} is not what it was: {len(content):,} bytes with SHA-256 {digest}, expected "
            f"{file.sha256}; nothing was kept. If you have {file.name}, {advice}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, content)
    return target
