"""What follows a fit, and how several things do."""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    """Follows a fit. `iteration` gets the metrics of a finished iteration, `progress` the steps within one.

    Where a tracker has them, `start(about)` is called before the first iteration with what is fitted, as nested
    plain values, and `close()` after the last one, or when the fit ends otherwise.
    """

    def iteration(self, metrics: dict[str, Any]) -> None:
        """One iteration is finished."""
        ...

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of `what` are finished."""
        ...


class Silent:
    """Says nothing."""

    def iteration(self, metrics: dict[str, Any]) -> None:
        """Nothing."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Nothing."""


class Several:
    """Hands everything on to several trackers, in their order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def start(self, about: dict[str, Any]) -> None:
        """The fit begins."""
        for tracker in self._trackers:
            getattr(tracker, "start", _nothing)(about)

    def iteration(self, metrics: dict[str, Any]) -> None:
        """One iteration is finished."""
        for tracker in self._trackers:
            tracker.iteration(metrics)

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of `what` are finished."""
        for tracker in self._trackers:
            tracker.progress(what, done, total)

    def close(self) -> None:
        """The fit has ended."""
        for tracker in self._trackers:
            getattr(tracker, "close", _nothing)()


def _nothing(*args: Any) -> None:
    """What a tracker does that does not have a method."""


@contextmanager
def following(tracker: Tracker, about: dict[str, Any]) -> Generator[None, None, None]:
    """`tracker` told of the start and the end of what happens inside."""
    all_of_it = Several([tracker])
    all_of_it.start(about)
    try:
        yield
    finally:
        all_of_it.close()


class Clock:
    """Hands progress on to a tracker, adds up the seconds of parts of an iteration, and counts what happens."""

    def __init__(self, tracker: Tracker | None = None) -> None:
        self._tracker: Tracker = tracker or Silent()
        self._spent: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of `what` are finished."""
        self._tracker.progress(what, done, total)

    @contextmanager
    def during(self, part: str) -> Generator[None, None, None]:
        """Count the time inside as that of `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] = self._spent.get(part, 0.0) + time.perf_counter() - began

    def count(self, what: str) -> None:
        """Count that `what` happened once more."""
        self._counts[what] = self._counts.get(what, 0) + 1

    @property
    def metrics(self) -> dict[str, float]:
        """`seconds_<part>` of every part, and what happened how often."""
        spent = {f"seconds_{part}": round(seconds, 3) for part, seconds in self._spent.items()}
        return {**self._counts, **spent}
