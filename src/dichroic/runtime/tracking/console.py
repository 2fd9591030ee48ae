"""Progress bars, and a line for every iteration that measured something, with a bound on the time that is left."""

import sys
from typing import Any

from tqdm import tqdm

from dichroic.runtime.tables import duration


class Console:
    """One progress bar on standard error, and one line per finished iteration that measured something."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._what = ""
        self._left: float | None = None

    def iteration(self, metrics: dict[str, Any]) -> None:
        """Print the iteration's scores."""
        self._left = metrics.get("seconds_left")
        aside = ("seconds", "peak_memory")
        floats = {k: v for k, v in metrics.items() if isinstance(v, float)}
        numbers = {k: v for k, v in floats.items() if not k.startswith(aside)}
        if any(k.startswith(("heldout", "evidence")) for k in numbers):
            self._close()
            text = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            size = f" × {metrics['components']}" if "components" in metrics else ""
            size += f", rank {metrics['rank']}" if "rank" in metrics else ""
            head = f"{metrics['phase']} {metrics['sources']}{size}"
            when = f"{metrics['seconds']:6.1f} s{_left(self._left)}"
            tqdm.write(f"[{when}] {head}: {text}", file=sys.stderr)

    def progress(self, what: str, done: int, total: int) -> None:
        """Move the bar (drawn on a terminal only)."""
        if what != self._what or self._bar is None:
            self._close()
            said = what + _left(self._left)
            self._bar = tqdm(total=total, desc=said, leave=False, mininterval=0.2, disable=None)
            self._what = what
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _left(seconds: float | None) -> str:
    """What is left of the phase, in words; nothing where it is not known, or nothing is."""
    return f", at most {duration(seconds)} left of this phase" if seconds else ""
