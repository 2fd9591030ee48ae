"""JSON files: plain ones, and records that carry a hash of what they say.

A record is an object with a format version and the SHA-256 of everything else in it, so that a damaged
byte is noticed. Version 1 had no hash and is still read.
"""

import contextlib
import hashlib
import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from dichroic.errors import ConfigError, DichroicError, FormatError, VersionError
from dichroic.runtime.files import write_atomic
from dichroic.runtime.limits import TEXT_BYTES, check_text

RECORD_VERSION = 2
MOST_NESTED = 64


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; raises `FormatError` where it is missing, damaged or far too large."""
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        check_text(path, TEXT_BYTES, "no file that dichroic writes is as large")
        return parse_object(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from None


def parse_object(text: str, where: str | Path) -> dict[str, Any]:
    """The JSON object that `text` is; raises `FormatError` where it is none."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is damaged: {error}") from None
    if _deeper(value, MOST_NESTED):
        raise FormatError(f"{where} is damaged: it is nested too deeply")
    if not isinstance(value, dict):
        raise FormatError(f"{where} is damaged: expected an object")
    return value


def _deeper(value: Any, most: int) -> bool:
    """Whether tables and lists in `value` are nested more than `most` deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(most):
        level = [c for x in level for c in (x.values() if isinstance(x, dict) else x)]
        level = [c for c in level if isinstance(c, (dict, list))]
    return bool(level)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"a key appears twice among {', '.join(k for k, _ in pairs)}"[:200])
    return table


def write_record(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` with a format version and its hash, atomically."""
    record = json.loads(json.dumps({"format_version": RECORD_VERSION, **content}))
    write_json(path, {**record, "sha256": _digest(record)})


def read_record(path: str | Path) -> dict[str, Any]:
    """What `write_record` was given; raises `FormatError` where it was changed, or of another version."""
    record = read_json(path)
    version, found = record.get("format_version"), record.pop("sha256", None)
    check_version(version, path, known=(1, RECORD_VERSION))
    if (found is not None or version != 1) and found != _digest(record):
        raise FormatError(f"{path} is damaged: its contents do not match its hash")
    return {k: v for k, v in record.items() if k != "format_version"}


def check_version(found: Any, path: str | Path, *, known: tuple[int, ...]) -> None:
    """Raise `VersionError` unless `found` is a format version that this release reads."""
    if str(found) not in map(str, known):
        raise VersionError(
            f"{path} has format version {str(found)[:20]}; this release of dichroic reads version "
            f"{' and '.join(map(str, known))}: use the release that wrote it, or fit again"
        )


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def understanding(path: str | Path) -> Generator[None, None, None]:
    """Let what goes wrong inside, at contents of another form than expected, be a `FormatError`."""
    try:
        yield
    except DichroicError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is damaged: {type(error).__name__}: {error}"[:500]) from error
