"""The phases of a fit in their order, and one iteration of whichever is at hand."""

import dataclasses
import time

from dichroic.config import FitConfig
from dichroic.learning.data import Data
from dichroic.learning.phases.base import Context, Order, Phase, learned
from dichroic.learning.phases.diffusion import DiffusionEM
from dichroic.learning.phases.mixture import MixtureEM
from dichroic.learning.phases.refinement import JointRefinement
from dichroic.learning.safeguards import guarded
from dichroic.learning.state import Metrics, State
from dichroic.runtime.hardware import peak_memory
from dichroic.runtime.tracking import Clock, Tracker

PHASES: tuple[Phase, ...] = (MixtureEM(), JointRefinement(), DiffusionEM())
DONE = "done"


def advance(
    state: State, data: Data, config: FitConfig, tracker: Tracker | None = None
) -> tuple[State, Metrics]:
    """One iteration: the next state, and what was measured."""
    began, clock = time.perf_counter(), Clock(tracker)
    phase = phase_of(state)
    at, context = data.at(state.operators), Context(config, clock)
    new, metrics = guarded(phase.iterate, state, at, context)
    if not new.phase:
        new = dataclasses.replace(new, phase=_after(phase, config, data.order))
    took = time.perf_counter() - began
    new = dataclasses.replace(new, total=state.total + 1, seconds=state.seconds + took)
    cost: dict[str, float] = {"seconds": round(new.seconds, 3), **clock.metrics}
    cost["seconds_left"] = _seconds_left(state, new, took, data, config)
    cost["peak_memory_mib"] = round(peak_memory(), 1)
    return new, {"iteration": new.total, "phase": state.phase, **metrics, **cost}


def phase_of(state: State) -> Phase:
    """The phase that the next iteration from `state` is of."""
    return next(p for p in PHASES if p.name == state.phase)


def is_possible(state: State, order: Order) -> bool:
    """Whether a fit that learns sources in this `order` can be in `state`."""
    if state.phase == DONE:
        return learned(state, order)
    return any(p.name == state.phase and p.admits(state, order) for p in PHASES)


def _after(phase: Phase, config: FitConfig, order: Order) -> str:
    """The name of the phase that follows, of those that have iterations."""
    later = PHASES[PHASES.index(phase) + 1 :]
    return next((p.name for p in later if p.iterations(config, order)), DONE)


def _seconds_left(old: State, new: State, took: float, data: Data, config: FitConfig) -> float:
    """What is left of the phase of the iteration from `old` to `new`, which took `took` seconds, at most."""
    if new.phase != old.phase:
        return 0.0
    phase = phase_of(new)
    costs = phase.costs_left(new, data, config)
    return round(took / phase.cost(old, data) * sum(costs), 3)
