"""Fetching a file over a connection that may break.

What comes is kept beside the file, as `.NAME.part`, until all of it is there and has the size and the hash that it
should have; then it is renamed. A connection that breaks or a process that ends loses nothing: the next try, of
this process or another, asks the server for the rest alone (RFC 9110, section 14). One process at a time fetches,
and others wait for it.
"""

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dichroic.errors import DataError
from dichroic.runtime.files import flush_folder, taking_turns, writing

_BLOCK = 2**16
_WORTH_ANOTHER_TRY = (408, 416, 425, 429, 500, 502, 503, 504)  # of a server's refusals


@dataclass(frozen=True)
class Patience:
    """How often to try; seconds before the second try, twice as many before the next; seconds of silence."""

    tries: int = 4
    wait: float = 1.0
    silence: float = 60.0


def download(url: str, target: Path, *, size: int, sha256: str, patience: Patience) -> None:
    """Fetch `url` to `target`, unless it is there by then; raises `DataError` where that fails."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with taking_turns(target.with_name(f".{target.name}.lock")):
        if not target.exists():
            part = target.with_name(f".{target.name}.part")
            _fetch(url, part, size, sha256, patience)
            with writing(target):
                os.replace(part, target)
                flush_folder(target.parent)


def _fetch(url: str, path: Path, size: int, sha256: str, patience: Patience) -> None:
    """Fetch `url` to `path`, where the beginning of it may be."""
    with writing(path):
        file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (it is closed below)
    try:
        with file:
            part = _Part(file, path)
            _complete(part, url, size, patience)
    finally:
        if not path.stat().st_size:
            path.unlink()
    if (found := part.digest.hexdigest()) != sha256:
        path.unlink()
        raise DataError(
            f"{url} is not what it was: {size:,} bytes with SHA-256 {found}, expected {sha256}; nothing "
            "was kept"
        )


class _Part:
    """What there is of a file, and its hash."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self.length, self.digest = 0, hashlib.sha256()
        while block := file.read(_BLOCK):
            self._count(block)

    def _count(self, block: bytes) -> None:
        self.digest.update(block)
        self.length += len(block)

    def add(self, block: bytes) -> None:
        """Keep `block`, which comes next."""
        with writing(self._path):
            self._file.write(block)
            self._file.flush()
        self._count(block)

    def start_anew(self) -> None:
        """Let go of everything."""
        self._file.seek(0)
        self._file.truncate()
        self.length, self.digest = 0, hashlib.sha256()

    def finish(self) -> None:
        """Have it on the disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())


def _complete(part: _Part, url: str, size: int, patience: Patience) -> None:
    """Try until all `size` bytes are there; raises `DataError` where they are not in the end."""
    tries, why = 0, ""
    while part.length != size:
        if tries == patience.tries:
            raise DataError(_interrupted(part.length, url, size, tries, why))
        if tries:
            time.sleep(patience.wait * 2 ** (tries - 1))
        tries += 1
        try:
            _go_on(part, url, size, patience.silence)
        except urllib.error.HTTPError as error:
            if error.code not in _WORTH_ANOTHER_TRY:
                raise DataError(f"it could not be fetched from {url} ({error})") from error
            if error.code == 416:  # the server has no more than this
                part.start_anew()
            why = str(error)
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
    part.finish()


def _interrupted(length: int, url: str, size: int, tries: int, why: str) -> str:
    if not length:
        return f"it could not be fetched from {url} in {tries} tries ({why})"
    return (
        f"{length:,} of {size:,} bytes came from {url} in {tries} tries ({why}); they are kept, and the same "
        "command goes on from there"
    )


def _go_on(part: _Part, url: str, size: int, silence: float) -> None:
    """Add to `part` what the server sends, from where `part` ends if the server can do that."""
    if part.length > size:
        part.start_anew()
    wanted = {"Range": f"bytes={part.length}-"} if part.length else {}
    request = urllib.request.Request(url, headers=wanted)
    with urllib.request.urlopen(request, timeout=silence) as answer:
        start, total = _extent(answer)
        if total not in (None, size):
            raise DataError(f"{url} is not what it was: {total:,} bytes, expected {size:,}")
        if start != part.length:
            part.start_anew()
        if start != part.length:
            raise ConnectionError("the server sent another part than it was asked for")
        while part.length <= size and (block := answer.read1(_BLOCK)):
            part.add(block)
    if part.length > size:
        part.start_anew()
        raise DataError(f"{url} is not what it was: more than {size:,} bytes; nothing was kept")
    if part.length < size:
        raise ConnectionError("the connection was cut")


def _extent(answer: Any) -> tuple[int, int | None]:
    """Where what a server sends starts in the file, and how long the file is, if it says so."""
    if answer.status == 206:
        stated = re.match(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if stated is None:
            return -1, None
        return int(stated[1]), None if stated[2] == "*" else int(stated[2])
    length = answer.headers.get("Content-Length")
    return 0, int(length) if length and length.isdigit() else None
