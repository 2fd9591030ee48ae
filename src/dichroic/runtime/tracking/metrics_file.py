"""Metrics as JSON lines: what a run keeps of its iterations."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.errors import FormatError
from dichroic.runtime.files import writing
from dichroic.runtime.records import parse_object

_TEXT = ("phase", "sources")
_NUMBERS = (
    "iteration",
    "seconds",
    "components",
    "rank",
    "log_evidence",
    "heldout",
    "evidence",
    "loss",
    "psnr",
    "chi2",
    "operator",
    "peak_memory",
)
_MOST_LINE = 2**20


class MetricsFile:
    """Metrics as JSON lines; `length` is what a checkpoint remembers, so that a resumed run goes on there.

    Where the file has become shorter than that, it goes on after its last complete line.
    """

    def __init__(self, path: str | Path, *, length: int = 0) -> None:
        self._path = Path(path)
        with writing(self._path), open(self._path, "a+b") as f:
            f.seek(0)
            self.length = f.read(length).rfind(b"\n") + 1
            f.truncate(self.length)

    def append(self, metrics: dict[str, Any]) -> None:
        """Append one line and flush it to the disk."""
        line = (json.dumps({k: _plain(v) for k, v in metrics.items()}) + "\n").encode()
        with writing(self._path), open(self._path, "ab") as f:
            f.write(line)
            f.flush()
            os.fsync(f.fileno())
        self.length += len(line)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The iterations recorded in a metrics file, oldest first, up to the first line that is damaged."""
    rows: list[dict[str, Any]] = []
    if not Path(path).is_file():
        return rows
    with open(path, "rb") as f:
        while line := f.readline(_MOST_LINE):
            try:
                row = parse_object(line.decode(), path)
            except (FormatError, UnicodeDecodeError):
                break
            if not all(_fits(k, v) for k, v in row.items()):
                break
            rows.append(row)
    return rows


def _fits(key: str, value: Any) -> bool:
    if key in _TEXT:
        return isinstance(value, str)
    if isinstance(value, str):
        return not key.startswith(_NUMBERS)
    return value is None or (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
