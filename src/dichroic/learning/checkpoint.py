"""The state of a fit on disk: the last one, and the one before in case the last is damaged.

latest.safetensors     the state after the last iteration that was recorded
previous.safetensors   the one before it
damaged.safetensors    a state that could not be read, put aside

A new state is on the disk before the last one becomes the previous one, so that a kill at any point
leaves at least one of them.
"""

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.errors import FormatError, VersionError
from dichroic.io.model_files import file_of_tensors, pack, read_tensors, unpack, write_tensors
from dichroic.learning.phases.schedule import is_possible
from dichroic.learning.state import State
from dichroic.operators import Shape
from dichroic.operators.learnable import from_lists, to_lists
from dichroic.priors import Denoiser
from dichroic.runtime import distributed
from dichroic.runtime.files import writing
from dichroic.runtime.tracking import warn

LATEST, PREVIOUS, DAMAGED = (f"{n}.safetensors" for n in ("latest", "previous", "damaged"))
_DENOISERS = ("current", "best")
_OPERATORS = ("operators", "best_operators")
_COUNTS = ("group", "iteration", "stale", "total", "metrics_length")


def save_state(path: Path, state: State, *, keep: Path | None = None) -> None:
    """Write a state as one safetensors file; with `keep`, the one that was there is moved to it."""
    write_tensors(path, *_as_tensors(state), keep=keep)


def agreed(make: Callable[[], State]) -> State:
    """What `make` gives in the first process, in all of them: no rounding of theirs can set them apart."""
    if distributed.processes() == 1:
        return make()
    found: list[State] = []

    def first() -> bytes:
        found.append(make())
        return file_of_tensors(*_as_tensors(found[0]))

    content = distributed.broadcast_from_primary(first)
    if found:
        return found[0]
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        return load_state(Path(file.name))


def _as_tensors(state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays, meta = {}, {}
    for which in _DENOISERS:
        for name, denoiser in getattr(state, which).items():
            tensors, info = pack(denoiser)
            arrays |= {f"{which}:{name}:{k}": a for k, a in tensors.items()}
            meta[f"{which}:{name}"] = info
    counters = {
        f.name: getattr(state, f.name)
        for f in dataclasses.fields(state)
        if f.name not in _DENOISERS
    }
    counters |= {name: to_lists(counters[name]) for name in _OPERATORS}
    counters["score"] = state.score if math.isfinite(state.score) else None
    return arrays, {"counters": counters, "denoisers": meta}


def load_state(path: Path) -> State:
    """Read a state written by `save_state`; raises `FormatError` where it is damaged."""
    arrays, meta = read_tensors(path)
    tables, counters = meta.get("denoisers"), meta.get("counters")
    if not isinstance(tables, dict) or not isinstance(counters, dict):
        raise FormatError(f"{path} is damaged: it holds no state of a fit")
    found: dict[str, dict[str, Denoiser]] = {which: {} for which in _DENOISERS}
    for label, info in tables.items():
        which, _, name = label.partition(":")
        if which not in found:
            raise FormatError(f"{path} is damaged: {label!r} is no denoiser of a state")
        found[which][name] = unpack(_own(arrays, f"{label}:"), info, where=f"{path}: {name}")
    try:
        fields: dict[str, Any] = {**_counters(counters, str(path)), **found}
        return State(**fields)
    except TypeError as error:  # counters of other names
        raise FormatError(f"{path} is damaged: {error}") from None


def _own(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}


def _counters(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The plain fields of a state; those that older releases did not write have their defaults."""
    counters = dict(values)
    if counters.get("score") is None:
        counters["score"] = -math.inf
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
    counts = [counters.get(k, 0) for k in _COUNTS]
    seconds, shrinkage = counters.get("seconds", 0.0), counters.get("shrinkage", {})
    if (
        not isinstance(counters.get("phase"), str)
        or not all(isinstance(n, int) and number(n) and 0 <= n < 2**53 for n in counts)
        or not number(counters["score"])
        or not (number(seconds) and 0 <= seconds < math.inf)
        or not (isinstance(shrinkage, dict) and all(map(number, shrinkage.values())))
    ):
        raise FormatError(f"{where} is damaged: it counts what cannot be")
    operators = {name: from_lists(counters.get(name, {}), where) for name in _OPERATORS}
    return {**counters, **operators}


def last_state(folder: Path, shapes: Mapping[str, Shape], order: Sequence[Sequence[str]]) -> State:
    """The last good state in `folder`, or the initial one if there is none yet.

    `shapes` are those of the sources by name, `order` the groups in which they are learned. A damaged
    last state is put aside and the one before is taken, which the log says. Raises `FormatError` if
    that is damaged too, or of another format version.
    """
    latest, previous = folder / LATEST, folder / PREVIOUS
    if not latest.exists():
        return _checked(previous, shapes, order) if previous.exists() else State()
    try:
        return _checked(latest, shapes, order)
    except VersionError:
        raise
    except FormatError as error:
        try:
            state = _checked(previous, shapes, order)
        except FormatError:
            raise FormatError(
                f"{error}; there is no earlier state to go back to: restore the file, or start anew in "
                "another folder"
            ) from None
        with writing(latest):
            os.replace(latest, folder / DAMAGED)
        warn(
            f"{error}; going on from the state before it, of iteration {state.total}",
            damaged=DAMAGED,
            iterations=state.total,
        )
        return state


def _checked(path: Path, shapes: Mapping[str, Shape], order: Sequence[Sequence[str]]) -> State:
    """The state in `path`; raises `FormatError` unless a fit with these sources can be in it."""
    state = load_state(path)
    for denoiser_of in (state.current, state.best):
        for name, denoiser in denoiser_of.items():
            if shapes.get(name) != denoiser.shape:
                raise FormatError(f"{path} is damaged: {name!r} is not as the problem states it")
    if not is_possible(state, order):
        raise FormatError(f"{path} is damaged: no fit of this problem is ever in its state")
    return state
