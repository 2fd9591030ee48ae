"""Files that are never half written, and folders that one process at a time writes to."""

import contextlib
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import IO

from dichroic.errors import RunError, WriteError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = "run.lock"


def user_cache() -> Path:
    """The folder for what can be fetched or made again: `dichroic` in `XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dichroic"


def write_atomic(
    path: str | Path, *data: bytes | memoryview, keep: str | Path | None = None
) -> None:
    """Write `data` to `path` so that a crash leaves the old contents or the new, nothing between.

    With `keep`, what was at `path` is moved there, once the new contents are on the disk. Raises
    `WriteError` where the file cannot be written (a full disk, a folder that is read-only).
    """
    path = Path(path)
    with writing(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as f:
                f.writelines(data)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        flush_folder(path.parent)


@contextlib.contextmanager
def writing(path: str | Path) -> Generator[None, None, None]:
    """Let a failed write to `path` be a `WriteError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}; what was there before is kept: make room, "
            "or choose a folder that can be written to"
        ) from error


def flush_folder(folder: Path) -> None:
    """Let what was renamed in `folder` be on the disk."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None, None, None]:
    """Hold `folder` for this process; raises `RunError` while another one does.

    The system lets go of it when the process ends, however that happens. Where files cannot be locked
    (Windows, some network drives) nothing is held.
    """
    with writing(folder / LOCK):
        file = open(folder / LOCK, "a+")  # noqa: SIM115 (it is closed below)
    with file:
        _lock(file, folder)
        yield


@contextlib.contextmanager
def taking_turns(path: Path) -> Generator[None, None, None]:
    """Hold the file `path`, which is made and stays, for this process, after waiting for others that hold it."""
    with writing(path):
        file = open(path, "a+")  # noqa: SIM115 (it is closed below)
    with file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(file: IO[str], folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise RunError(
            f"another process is fitting in {folder} (pid {file.read(20).strip() or 'unknown'}); wait "
            "until it has finished, or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        return
    with writing(folder / LOCK):
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
