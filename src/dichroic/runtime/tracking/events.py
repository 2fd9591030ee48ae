"""What happened to a run, as JSON lines in its folder: `log.jsonl`.

One object per line: `time` (UTC), `level`, `event` and what belongs to it. Events are records of the loggers of
`logging.getLogger("dichroic")`, where others can listen too. A warning is a `DichroicWarning` of Python too,
at the line of the user's that led to it.
"""

import inspect
import json
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dichroic.errors import DichroicWarning

ROOT = logging.getLogger("dichroic")
ROOT.addHandler(logging.NullHandler())  # warnings reach standard error as such, not as records too
_PACKAGE = str(Path(__file__).parents[2])


def event(text: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Record that `text` happened, with `fields` (plain values)."""
    ROOT.log(level, "%s", text, extra={"fields": fields})


def warn(*texts: str, **fields: Any) -> None:
    """Warn of each of `texts`: with a `DichroicWarning` at the line of the user, and a record with `fields`."""
    for text in texts:
        event(text, level=logging.WARNING, **fields)
        warnings.warn(text, DichroicWarning, stacklevel=_frames_of_the_package())


def _frames_of_the_package() -> int:
    """The `stacklevel`, in `warn`, of the innermost frame outside of this package, if there is one."""
    here = inspect.currentframe()
    frame, level = here.f_back if here else None, 1  # of `warn`
    while frame and frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def quiet(*, when: bool = True) -> Generator[None, None, None]:
    """Nothing inside is warned of `when` another process does that."""
    with warnings.catch_warnings():
        if when:
            warnings.simplefilter("ignore", DichroicWarning)
        yield


class JsonLines(logging.Handler):
    """Appends records to a file, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Append one line; a full disk is left to what needs the disk more."""
        row = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        try:
            with open(self._path, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError:
            return


@contextmanager
def logged(path: Path) -> Generator[None, None, None]:
    """Write all events inside to the file `path`, and how it ended."""
    before, handler = ROOT.level, JsonLines(path)
    ROOT.setLevel(min(ROOT.getEffectiveLevel(), logging.INFO))
    ROOT.addHandler(handler)
    try:
        yield
    except BaseException as error:
        event("ended early", error=f"{type(error).__name__}: {error}"[:500])
        raise
    finally:
        ROOT.removeHandler(handler)
        ROOT.setLevel(before)
