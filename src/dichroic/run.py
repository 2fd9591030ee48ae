"""A fit on disk: a run folder that survives being killed.

run.json             what is fitted: format version, fingerprint of the problem, configuration
metrics.jsonl        one line per lap
latest.safetensors   the state after the last finished lap, replaced atomically
best/                the best model so far (`dichroic.io.load_model`)
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dichroic.config import FitConfig
from dichroic.data import prepare
from dichroic.em import Denoisers, State, advance
from dichroic.errors import RunError
from dichroic.io import (
    FORMAT_VERSION,
    check_version,
    pack,
    read_json,
    read_tensors,
    save_model,
    unpack,
    write_json,
    write_tensors,
)
from dichroic.operators.learned import from_lists, to_lists
from dichroic.problem import Problem
from dichroic.tracking import MetricsFile, Silent, Tracker, read_metrics

FREE_SETTINGS = ("batch_size",)  # may differ when a run is resumed: they change no result
_OPERATORS = ("operators", "best_operators")
CHECKPOINT_SECONDS = 1.0  # laps of closed-form EM can be far shorter than a flush to the disk


def fit(
    problem: Problem,
    config: FitConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    tracker: Tracker | None = None,
) -> tuple[State, list[dict[str, Any]]]:
    """Run all laps; the final state and the metrics of each lap.

    With `out`, the run is kept in that folder; `resume` goes on with what is there (and starts where
    nothing is). Raises `RunError` if the folder holds a run and `resume` is not given, or if its run
    belongs to another problem or other settings.
    """
    tracker = tracker or Silent()
    data = prepare(problem, config)
    folder = None if out is None else RunFolder.open(Path(out), problem, config, resume=resume)
    state = State() if folder is None else folder.state
    rows = [] if folder is None else read_metrics(folder.path / "metrics.jsonl")
    try:
        while not state.done:
            state, metrics = advance(state, data, config, tracker)
            rows.append(metrics)
            if folder is not None:
                state = folder.record(state, metrics, problem, config)
            tracker.lap(metrics)
    finally:
        if folder is not None:
            folder.flush()
    return state, rows


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path, state: State):
        self.path, self.state = path, state
        self._metrics = MetricsFile(path / "metrics.jsonl", length=state.metrics_length)
        self._saved = time.monotonic()
        self._pending: State | None = None
        self._best: Denoisers | None = state.best if (path / "best/model.json").exists() else None

    @classmethod
    def open(cls, path: Path, problem: Problem, config: FitConfig, *, resume: bool) -> "RunFolder":
        """A new run, or, with `resume`, the one in `path`."""
        if not (path / "run.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "run.json", describe(problem, config))
            return cls(path, State())
        if not resume:
            raise RunError(
                f"{path} already holds a run; resume it (--resume) or choose another folder"
            )
        check_same(path, problem, config)
        return cls(path, load_state(path / "latest.safetensors"))

    def record(
        self, state: State, metrics: dict[str, Any], problem: Problem, config: FitConfig
    ) -> State:
        """Append the metrics and keep the state; the returned state knows the metrics' length."""
        self._metrics.append(metrics)
        state = dataclasses.replace(state, metrics_length=self._metrics.length)
        self._pending = state
        if state.done or time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.flush()
        complete = set(state.best) == set(problem.names)
        if complete and (self._best is None or not _same(self._best, state.best)):
            save_model(self.path / "best", state.best, model_info(problem, config, state))
            self._best = state.best
        return state

    def flush(self) -> None:
        """Write the last recorded state, if it is not on disk yet."""
        if self._pending is not None:
            save_state(self.path / "latest.safetensors", self._pending)
            self._pending, self._saved = None, time.monotonic()


def _same(a: Denoisers, b: Denoisers) -> bool:
    return a.keys() == b.keys() and all(a[k] is b[k] for k in a)


def describe(problem: Problem, config: FitConfig) -> dict[str, Any]:
    """The contents of `run.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": problem.fingerprint(),
        "problem_file": problem.origin,
        "config": config.to_dict(),
        "views": [
            {
                "name": v.name,
                "count": v.count,
                "shape": list(v.shape),
                "sources": list(v.operators),
                "group": v.group,
            }
            for v in problem.views
        ],
    }


def model_info(problem: Problem, config: FitConfig, state: State) -> dict[str, Any]:
    """What a saved model says besides its tensors."""
    return {
        "shapes": {k: list(s) for k, s in problem.shapes.items()},
        "config": config.to_dict(),
        "operators": to_lists(state.best_operators),
    }


def check_same(path: Path, problem: Problem, config: FitConfig) -> None:
    """Raise `RunError` unless the run in `path` is of this problem with these settings."""
    saved = read_json(path / "run.json")
    check_version(saved.get("format_version"), path / "run.json")
    if saved.get("fingerprint") != problem.fingerprint():
        raise RunError(
            f"{path} holds a run of another problem (its names, observations, operators, noise, masks or "
            "held-out observations differ); choose another folder"
        )
    before = FitConfig.from_dict(saved.get("config"), where=f"{path}/run.json").to_dict()
    changed = [
        f"{k}: {a!r} before, {b!r} now"
        for k, a, b in _differences(before, config.to_dict())
        if k not in FREE_SETTINGS
    ]
    if changed:
        raise RunError(
            f"{path} holds a run with other settings ({'; '.join(changed)}); "
            "use the same settings, or choose another folder"
        )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""):
    for key in a:
        if isinstance(a[key], Mapping):
            yield from _differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            yield prefix + key, a[key], b[key]


def save_state(path: Path, state: State) -> None:
    """Write a state as one safetensors file."""
    arrays, meta = {}, {}
    for which in ("current", "best"):
        for name, denoiser in getattr(state, which).items():
            tensors, info = pack(denoiser)
            arrays |= {f"{which}:{name}:{k}": a for k, a in tensors.items()}
            meta[f"{which}:{name}"] = info
    counters = {
        f.name: getattr(state, f.name)
        for f in dataclasses.fields(state)
        if f.name not in ("current", "best")
    }
    counters |= {name: to_lists(counters[name]) for name in _OPERATORS}
    counters["score"] = state.score if math.isfinite(state.score) else None
    write_tensors(path, arrays, {"counters": counters, "denoisers": meta})


def load_state(path: Path) -> State:
    """Read a state written by `save_state`; the initial one if there is none yet."""
    if not path.exists():
        return State()
    arrays, meta = read_tensors(path)
    found: dict[str, Denoisers] = {"current": {}, "best": {}}
    for label, info in meta["denoisers"].items():
        which, name = label.split(":")
        prefix = f"{label}:"
        own = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
        found[which][name] = unpack(own, info)
    counters = meta["counters"]
    if counters["score"] is None:
        counters["score"] = -math.inf
    counters |= {name: from_lists(counters.get(name, {}), str(path)) for name in _OPERATORS}
    return State(**counters, **found)
