"""What happened to a run, as JSON lines in its folder: `log.jsonl`.

One object per line: `time` (UTC), `level`, `event` and what belongs to it. Events are records of the loggers of
`logging.getLogger("dichroic")`, where others can listen too; a warning is also written to standard error.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = logging.getLogger("dichroic")


def event(text: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Record that `text` happened, with `fields` (plain values)."""
    ROOT.log(level, "%s", text, extra={"fields": fields})


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
def logged(path: Path) -> Iterator[None]:
    """Write all events inside to the file `path`, and how it ended."""
    handlers: list[logging.Handler] = [JsonLines(path)]
    if not logging.getLogger().handlers:  # nobody listens: warnings go to the terminal
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setLevel(logging.WARNING)
        handlers.append(terminal)
    before = ROOT.level
    ROOT.setLevel(min(ROOT.getEffectiveLevel(), logging.INFO))
    for handler in handlers:
        ROOT.addHandler(handler)
    try:
        yield
    except BaseException as error:
        event("ended early", error=f"{type(error).__name__}: {error}"[:500])
        raise
    finally:
        for handler in handlers:
            ROOT.removeHandler(handler)
        ROOT.setLevel(before)
