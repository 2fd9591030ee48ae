"""What a fit works on: training and held-out observations, and the order in which sources are learned."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dichroic import layout
from dichroic.batching import take
from dichroic.config import FitConfig
from dichroic.errors import ConfigError
from dichroic.observations import Observations, Observed
from dichroic.operators import Operator
from dichroic.operators.learned import Parameters
from dichroic.problem import Problem, View, holdout, joint_observations

@dataclass(frozen=True)
class Data:
    """Training and held-out observations, per joint view, with the truth of the latter if known."""

    train: tuple[Observed, ...]
    test: tuple[Observed, ...]
    truth: tuple[Mapping[str, np.ndarray], ...]
    names: tuple[str, ...]
    order: tuple[tuple[str, ...], ...]

    def at(self, operators: Parameters) -> "Data":
        """With the numbers of operators that are learned replaced by `operators`."""
        if not operators:
            return self
        train, test = (tuple(obs.at(operators) for obs in part) for part in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)


def prepare(problem: Problem, config: FitConfig) -> Data:
    """Split each (joint) view into training and held-out observations, and choose the order."""
    train, test, truth, names = [], [], [], []
    for i, views in enumerate(problem.joint_views()):
        kept, held = holdout(views, config.holdout, config.seed + i)
        train.append(joint_observations(kept))
        test.append(joint_observations(held) if held[0].count else train[-1])
        truth.append(_truth(held if held[0].count else kept))
        names.append("+".join(v.name for v in views))
    order = config.order or learning_order(train)
    _check_order(order, problem.names, dict(zip(names, train, strict=True)))
    return Data(shared_out(train), shared_out(test), tuple(truth), tuple(names), order)


def _truth(views: Sequence[View]) -> dict[str, np.ndarray]:
    return {k: np.asarray(x) for view in views for k, x in view.truth.items()}


def learning_order(views: Sequence[Observed]) -> tuple[tuple[str, ...], ...]:
    """Groups of sources: first those of the view with the fewest, then the fewest new ones, and so on.

    Contrastive problems (view k sees sources 1…k) are learned source by source, a problem whose views
    all see all sources at once.
    """
    known: set[str] = set()
    order = []
    while True:
        new = [sorted(set(obs.sources) - known) for obs in views]
        new = [n for n in new if n]
        if not new:
            return tuple(order)
        group = min(new, key=len)
        order.append(tuple(group))
        known |= set(group)


def _check_order(
    order: Sequence[Sequence[str]], names: Sequence[str], views: Mapping[str, Observed]
) -> None:
    listed = [name for group in order for name in group]
    if sorted(listed) != sorted(names) or not all(order):
        raise ConfigError(
            f"fit.order lists {[list(group) for group in order]}; it must list every source exactly "
            f"once, in groups of one or more: {list(names)}"
        )
    for i, group in enumerate(order):
        usable = set(group).union(*order[:i])
        for name in group:
            later = {k: set(v.sources) - usable for k, v in views.items() if name in v.sources}
            if all(later.values()):
                why = "; ".join(f"{k}: {', '.join(sorted(s))}" for k, s in later.items())
                raise ConfigError(
                    f"fit.order: {name!r} cannot be learned where it stands, since every view that "
                    f"sees it also sees sources that come later ({why}); put those before it, or in "
                    "one group with it"
                )
