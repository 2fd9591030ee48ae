"""What a run says while it works: a metrics file (JSON lines) and progress bars."""

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm


@runtime_checkable
class Tracker(Protocol):
    """Follows a fit. `lap` gets the metrics of a finished lap, `progress` the steps within one."""

    def lap(self, metrics: dict[str, Any]) -> None:
        """One lap is finished."""
        ...

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of `what` are finished."""
        ...


class Silent:
    """Says nothing."""

    def lap(self, metrics: dict[str, Any]) -> None:
        """Nothing."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Nothing."""


class Console:
    """One progress bar on standard error, and one line per finished lap that measured something."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._what = ""

    def lap(self, metrics: dict[str, Any]) -> None:
        """Print the lap's scores."""
        numbers = {k: v for k, v in metrics.items() if isinstance(v, float) and k != "seconds"}
        if any(k.startswith(("heldout", "evidence")) for k in numbers):
            self._close()
            text = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            size = f" × {metrics['components']}" if "components" in metrics else ""
            size += f", rank {metrics['rank']}" if "rank" in metrics else ""
            head = f"{metrics['phase']} {metrics['sources']}{size}"
            tqdm.write(f"[{metrics['seconds']:6.1f} s] {head}: {text}", file=sys.stderr)

    def progress(self, what: str, done: int, total: int) -> None:
        """Move the bar (drawn on a terminal only)."""
        if what != self._what or self._bar is None:
            self._close()
            self._bar = tqdm(total=total, desc=what, leave=False, mininterval=0.2, disable=None)
            self._what = what
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def as_tracker(progress: bool | Tracker) -> Tracker:
    """`progress` itself, or for `True` a `Console` and for `False` silence."""
    return (Console() if progress else Silent()) if isinstance(progress, bool) else progress


class MetricsFile:
    """Metrics as JSON lines; `length` is what a checkpoint remembers, so that a resumed run goes on there.

    Where the file has become shorter than that, it goes on after its last complete line.
    """

    def __init__(self, path: str | Path, *, length: int = 0) -> None:
        self._path = Path(path)
        with open(self._path, "a+b") as f:
            f.seek(0)
            self.length = f.read(length).rfind(b"\n") + 1
            f.truncate(self.length)

    def append(self, metrics: dict[str, Any]) -> None:
        """Append one line and flush it to the disk."""
        line = (json.dumps({k: _plain(v) for k, v in metrics.items()}) + "\n").encode()
        with open(self._path, "ab") as f:
            f.write(line)
            f.flush()
            os.fsync(f.fileno())
        self.length += len(line)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The laps recorded in a metrics file, oldest first (a torn last line is left out)."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
