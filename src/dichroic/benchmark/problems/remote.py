"""Files that a data set needs: in a folder of the user's, or fetched once and kept."""

import os
from dataclasses import dataclass
from pathlib import Path

from dichroic.benchmark.problems.download import Patience, download
from dichroic.errors import DataError
from dichroic.runtime.files import user_cache

DATA_VARIABLE = "DICHROIC_DATA"


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
    return [*([Path(stated)] if stated else []), user_cache()]


def find_file(name: str, data_dir: str | Path | None = None) -> Path | None:
    """The file called `name` in one of the `data_folders`, if there is one."""
    return next((p for d in data_folders(data_dir) if (p := d / name).is_file()), None)


def fetch(
    file: RemoteFile, data_dir: str | Path | None = None, *, patience: Patience | None = None
) -> Path:
    """The path of `file`, which is fetched and kept if it is not there.

    Raises `DataError` where it cannot be fetched or is not what it should be; what has come of it by then is
    kept, and the next call goes on from there. A file of the user's own is taken as it is.
    """
    found = find_file(file.name, data_dir)
    if found:
        return found
    folders = data_folders(data_dir)
    target = folders[-1] / file.name
    try:
        download(
            file.url, target, size=file.size, sha256=file.sha256, patience=patience or Patience()
        )
    except DataError as error:
        raise DataError(
            f"{file.name} is not in {', '.join(map(str, folders))}: {error}. If you have it, put it in a "
            f"folder and give that as --data-dir or as the variable {DATA_VARIABLE}"
        ) from error
    return target
