"""What the phases of a fit have in common."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dichroic.config import FitConfig, MixtureConfig
from dichroic.inference.sampling import Denoisers
from dichroic.learning.data import Data
from dichroic.learning.mixture.operator_em import operator_iteration
from dichroic.learning.state import Metrics, State
from dichroic.operators.learnable import Parameters
from dichroic.priors import GaussianMixture
from dichroic.problem.batches import AnyObservations
from dichroic.runtime.tracking import Clock

Order = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Context:
    """What an iteration takes besides its state and observations."""

    config: FitConfig
    clock: Clock


class Phase(Protocol):
    """A part of a fit: a pure function from one state to the next, until the phase of the state is another."""

    @property
    def name(self) -> str:
        """The name of the phase in states and metrics."""
        ...

    def iterate(self, state: State, data: Data, context: Context) -> tuple[State, Metrics]:
        """One iteration: the next state, and what was measured."""
        ...

    def iterations(self, config: FitConfig, order: Order) -> int:
        """The number of iterations at most; where it is 0, the phase is left out."""
        ...

    def cost(self, state: State, data: Data) -> float:
        """The relative cost of an iteration from `state`."""
        ...

    def costs_left(self, state: State, data: Data, config: FitConfig) -> Iterator[float]:
        """The costs of the iterations that may still come after `state`."""
        ...

    def admits(self, state: State, order: Order) -> bool:
        """Whether a fit that learns sources in this `order` can be in `state`."""
        ...


def is_last(state: State, iterations: int) -> bool:
    """Whether the iteration from `state` is the last of so many."""
    return state.iteration + 1 >= iterations


def equal_costs(state: State, iterations: int) -> Iterator[float]:
    """The costs of the iterations that may still come, of so many that all cost the same."""
    return iter([1.0] * max(iterations - state.iteration, 0))


def ended(state: State) -> State:
    """`state` at the end of its phase, as the next one begins with it."""
    return dataclasses.replace(state, phase="", iteration=0, stale=0, score=-math.inf)


def learned(state: State, order: Order) -> bool:
    """Whether `state` has priors of all sources, of the best model too."""
    needed = {name for group in order for name in group}
    return state.group == len(order) and needed <= set(state.current) and needed <= set(state.best)


def as_mixtures(priors: Denoisers) -> dict[str, GaussianMixture]:
    """The mixtures among `priors`: all of them, in the phases that learn mixtures."""
    return {name: prior for name, prior in priors.items() if isinstance(prior, GaussianMixture)}


def learn_operators(
    state: State,
    current: Mapping[str, Any],
    train: Sequence[AnyObservations],
    config: MixtureConfig,
) -> tuple[Parameters, Metrics]:
    """The operators after an M-step on `train`, and the values and errors of those that are one number."""
    found, errors = operator_iteration(current, train, config)
    metrics: Metrics = {}
    for name, arrays in found.items():
        if sum(a.size for a in arrays) == 1:
            metrics[f"operator_{name}"] = float(arrays[0].ravel()[0])
            metrics[f"operator_error_{name}"] = float(errors[name][0].ravel()[0])
    return {**state.operators, **found}, metrics
