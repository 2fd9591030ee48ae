"""A fit on disk: a run folder that survives being killed.

run.json                what is fitted: format version, fingerprint of the problem, configuration
metrics.jsonl           one line per iteration
log.jsonl               when it was started, gone back, ended (`dichroic.runtime.tracking.events`)
latest.safetensors      the state after the last finished iteration, replaced atomically
previous.safetensors    the state before it (`dichroic.learning.checkpoint`)
best/                   the best model so far (`dichroic.io.model_files.load_model`)
draws/                  draws of training observations that are in files, while fitting
run.lock                held by the process that is fitting
"""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dichroic.config import FitConfig
from dichroic.errors import ConfigError, RunError
from dichroic.inference.sampling import Denoisers
from dichroic.io.model_files import save_model
from dichroic.learning.checkpoint import LATEST, PREVIOUS, agreed, last_state, save_state
from dichroic.learning.data import Data, prepare
from dichroic.learning.phases.schedule import advance
from dichroic.learning.state import State
from dichroic.operators.learnable import Parameters, parameters, to_lists, with_parameters
from dichroic.operators.scaling import offset_parameters, offsets_of, renamed_scaling
from dichroic.problem.offsets import check_start
from dichroic.problem.problem import Problem
from dichroic.problem.validation import check_same_shape
from dichroic.problem.view import View
from dichroic.runtime import distributed
from dichroic.runtime.files import locked, writing
from dichroic.runtime.fingerprint import fingerprint
from dichroic.runtime.hardware import machine
from dichroic.runtime.limits import within
from dichroic.runtime.records import read_record, write_record
from dichroic.runtime.tracking import (
    MetricsFile,
    Silent,
    Tracker,
    event,
    following,
    logged,
    quiet,
    read_metrics,
    warn,
)

FREE_SETTINGS = ("batch_size",)  # may differ when a run is resumed: they change no result
DRAWS = "draws"
CHECKPOINT_SECONDS = 1.0  # iterations of closed-form EM can be far shorter than a flush to the disk


@dataclass(frozen=True)
class InitialPriors:
    """Priors that were learned before, and what was learned of operators, in place of the mixture phase."""

    denoisers: Denoisers
    operators: Parameters

    def check(self, problem: Problem, config: FitConfig) -> None:
        """Raise a `DichroicError` unless a fit of `problem` can go on from here."""
        for name, shape in problem.shapes.items():
            if name not in self.denoisers:
                have = ", ".join(self.denoisers)
                raise RunError(f"the start has no prior of {name!r}, only of {have}")
            found = self.denoisers[name].shape
            check_same_shape(found, shape, f"source {name!r}: the prior of the start is of")
        with_parameters([view.operators for view in problem.views], self.operators)
        check_start(problem, self.operators)
        if not config.diffusion.iterations:
            raise ConfigError(
                "diffusion.iterations: a fit with a start has diffusion iterations alone, so at least 1"
            )

    def offsets(self, problem: Problem) -> Parameters:
        """The offsets of the sources of `problem`, which its priors are from."""
        known = offset_parameters(offsets_of(self.operators))
        return renamed_scaling(known, {name: name for name in problem.names})

    def state(self, problem: Problem, data: Data) -> State:
        """The state of a fit before its diffusion iterations."""
        priors = {name: self.denoisers[name] for name in problem.names}
        own = parameters([view.operators for view in problem.views])
        units = renamed_scaling(self.operators, {name: name for name in problem.names})
        learned = {k: v for k, v in self.operators.items() if k in own} | units
        return State(
            phase="diffusion",
            group=len(data.order),
            current=priors,
            best=priors,
            operators=learned,
            best_operators=learned,
        )


def fit(
    problem: Problem,
    config: FitConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    tracker: Tracker | None = None,
    memory: int | None = None,
    start: InitialPriors | None = None,
    advice: Callable[[], Iterable[str]] = tuple,
    at_end: Callable[[State, Data], dict[str, Any]] | None = None,
) -> tuple[State, list[dict[str, Any]]]:
    """Run all iterations; the final state and the metrics of each. With a `start`, diffusion iterations alone.

    What `advice` gives is warned of where the fit begins, not where it goes on, by the first process alone. What
    `at_end` measures of the final state is added to the metrics of the last iteration.

    With `out`, the run is kept in that folder; `resume` goes on with what is there (and starts where
    nothing is). With `memory`, in bytes, training observations stay in their files, and draws are kept on disk.
    Raises `RunError` if the folder holds a run and `resume` is not given, if its run
    belongs to another problem or other settings, if another process is fitting there, or if it cannot
    be written to; `FormatError` if the run is damaged.
    """
    tracker = (tracker if distributed.is_primary() else None) or Silent()
    if start is not None:
        start.check(problem, config)
    _check_alike(problem, config)
    with following(tracker, stated(problem, config)), ExitStack() as held:
        held.enter_context(within(memory))
        held.enter_context(quiet(when=not distributed.is_primary()))
        scratch = None if memory is None else held.enter_context(_scratch(out))
        known = None if start is None else start.offsets(problem)
        data = prepare(problem, config, memory, scratch, known)
        if start is None:
            first = State(operators=data.operators, best_operators=data.operators)
        else:
            first = start.state(problem, data)
        folders: list[RunFolder] = []  # one, in the first process: it alone has the files

        def begin() -> State:
            if out is None:
                return first
            opened = _opened(Path(out), problem, config, data, first, resume=resume)
            folders.append(held.enter_context(opened))
            return folders[0].state

        state, rows = agreed(begin), [row for folder in folders for row in folder.rows]
        record = folders[0].record if folders else lambda state, metrics: state
        if distributed.is_primary() and not state.total:
            warn(*advice())
        with distributed.detect_lost_process():
            state, rows = _run(state, rows, data, config, tracker, record, at_end)
        if folders:
            event("finished", iterations=state.total, seconds=round(state.seconds, 3))
        return state, rows


@contextmanager
def _scratch(out: str | Path | None) -> Generator[Path, None, None]:
    """A folder for draws, removed once the fit has ended well: until then they need not be drawn again."""
    if out is None and distributed.processes() > 1:
        raise RunError(
            "several processes that fit within so much memory need a run folder in common"
        )
    path = Path(tempfile.mkdtemp() if out is None else Path(out) / DRAWS)
    try:
        yield path
    finally:
        if out is None:
            shutil.rmtree(path)
    if out is not None and distributed.is_primary():
        shutil.rmtree(path, ignore_errors=True)


def _check_alike(problem: Problem, config: FitConfig) -> None:
    """Raise `RunError` unless all processes are to fit the same."""
    if distributed.processes() == 1:  # there is nothing to hash all for
        return
    said = distributed.all_gather_bytes(f"{problem.fingerprint()} {config.to_dict()}".encode())
    if len(set(said)) > 1:
        raise RunError("the processes were given different problems or settings: give all the same")


@contextmanager
def _opened(
    path: Path, problem: Problem, config: FitConfig, data: Data, first: State, *, resume: bool
) -> Generator["RunFolder", None, None]:
    """The run folder `path`, held; what was recorded is on the disk afterwards, however it ends."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path), logged(path / "log.jsonl"):
        folder = RunFolder.open(path, problem, config, data, first, resume=resume)
        event(
            "fitting",
            iterations_done=len(folder.rows),
            processes=distributed.processes(),
            **machine(),
        )
        try:
            yield folder
        finally:
            folder.flush()


def _run(
    state: State,
    rows: list[dict[str, Any]],
    data: Data,
    config: FitConfig,
    tracker: Tracker,
    record: Callable[[State, dict[str, Any]], State],
    at_end: Callable[[State, Data], dict[str, Any]] | None,
) -> tuple[State, list[dict[str, Any]]]:
    """All iterations from `state` on; `record` keeps each of them, in the first process."""
    while not state.done:
        new, metrics = advance(state, data, config, tracker)
        if new.done and at_end is not None:
            metrics |= at_end(new, data.at(new.best_operators))
        rows.append(metrics)
        state = agreed(partial(record, new, metrics))
        tracker.iteration(metrics)
    return state, rows


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path, state: State, problem: Problem, config: FitConfig):
        self.path, self.state, self._problem, self._config = path, state, problem, config
        self._metrics = MetricsFile(path / "metrics.jsonl", length=state.metrics_length)
        if (kept := len(self.rows)) < state.total:
            warn(
                f"{path / 'metrics.jsonl'} has lost iterations: it has {kept} of {state.total}",
            )
        self._saved = time.monotonic()
        self._pending: State | None = None
        self._best: Denoisers | None = None
        self._save_best(state)  # a kill may have come between a state and its model

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics of the iterations so far."""
        return read_metrics(self.path / "metrics.jsonl")

    @classmethod
    def open(
        cls,
        path: Path,
        problem: Problem,
        config: FitConfig,
        data: Data,
        first: State,
        *,
        resume: bool,
    ) -> "RunFolder":
        """A new run from the state `first`, or, with `resume`, the one in `path`."""
        sweep(path)
        known = describe(problem, config)
        if first.current:
            known["start"] = fingerprint((first.current, first.operators))
        if data.operators:
            known["offsets"] = fingerprint(data.operators)
        if not (path / "run.json").exists():
            _clear(path)
            if first.current:
                save_state(path / LATEST, first)
            write_record(path / "run.json", known)
            return cls(path, first, problem, config)
        if not resume:
            raise RunError(
                f"{path} already holds a run; resume it (--resume) or choose another folder"
            )
        saved, state = check_same(path, known), last_state(path, problem.shapes, data.order)
        if "start" in saved and not state.current:
            raise RunError(
                f"{path} holds a run that started from a model, but no state of it: restore "
                f"{LATEST}, or choose another folder"
            )
        return cls(path, state if state.total else first, problem, config)

    def record(self, state: State, metrics: dict[str, Any]) -> State:
        """Append the metrics and keep the state; the returned state knows the metrics' length."""
        self._metrics.append(metrics)
        state = dataclasses.replace(state, metrics_length=self._metrics.length)
        self._pending = state
        if state.done or time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.flush()
        self._save_best(state)
        return state

    def flush(self) -> None:
        """Write the last recorded state, if it is not on disk yet."""
        if self._pending is not None:
            save_state(self.path / LATEST, self._pending, keep=self.path / PREVIOUS)
            self._pending, self._saved = None, time.monotonic()

    def _save_best(self, state: State) -> None:
        """Write the best model, if it has every source and is not on disk yet."""
        complete = set(state.best) == set(self._problem.names)
        if complete and (self._best is None or not _same(self._best, state.best)):
            info = model_info(self._problem, self._config, state)
            save_model(self.path / "best", state.best, info)
            self._best = state.best


def sweep(path: Path) -> None:
    """Remove what writes that were killed have left in a run folder that nobody else writes to."""
    for folder in (path, path / "best"):
        for left in [*folder.glob(".*.safetensors.*"), *folder.glob(".*.json.*")]:
            left.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Make way for a new run, of which a kill may have left the state that it started from."""
    if (path / "metrics.jsonl").exists():
        raise RunError(
            f"{path} holds a run without its run.json: restore that, or choose another folder"
        )
    for state in (LATEST, PREVIOUS):
        (path / state).unlink(missing_ok=True)


def _same(a: Denoisers, b: Denoisers) -> bool:
    return a.keys() == b.keys() and all(a[k] is b[k] for k in a)


def describe(problem: Problem, config: FitConfig) -> dict[str, Any]:
    """The contents of `run.json`."""
    in_files = not all(isinstance(v, View) for v in problem.views)
    known = {"fingerprint": problem.fingerprint(), "in_files": in_files}
    return known | stated(problem, config)


def stated(problem: Problem, config: FitConfig) -> dict[str, Any]:
    """What is fitted, as plain values."""
    return {
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


def check_same(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the run in `path` is; raises `RunError` unless it is what is `known` of this one.

    `known` is as by `describe`, and its start.
    """
    saved = read_record(path / "run.json")
    begun = saved.get("in_files", known["in_files"])
    if begun != known["in_files"]:
        how = "with" if begun else "without"
        raise RunError(f"{path} holds a run that was begun {how} --memory: go on {how} it")
    if saved.get("fingerprint") != known["fingerprint"]:
        raise RunError(
            f"{path} holds a run of another problem (its names, observations, operators, noise, masks or "
            "held-out observations differ); choose another folder"
        )
    if "start" in known and saved.get("start") != known["start"]:
        raise RunError(f"{path} holds a run with another start; choose another folder")
    if saved.get("offsets") != known.get("offsets", saved.get("offsets")):
        raise RunError(
            f"{path} holds a run with other offsets of sources, which this machine finds by other rounding: go on "
            "with it on a machine like the one that began it"
        )
    before = FitConfig.from_dict(saved.get("config"), where=f"{path}/run.json").to_dict()
    changed = [
        f"{k}: {a!r} before, {b!r} now"
        for k, a, b in _differences(before, known["config"])
        if k not in FREE_SETTINGS
    ]
    if changed:
        raise RunError(
            f"{path} holds a run with other settings ({'; '.join(changed)}); "
            "use the same settings, or choose another folder"
        )
    return saved


def _differences(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in {**a, **b}:
        old, new = a.get(key), b.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, old, new
