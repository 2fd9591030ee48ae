"""What a fit works on: training and held-out observations, and the order in which sources are learned."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dichroic.config import FitConfig
from dichroic.errors import ConfigError
from dichroic.operators.learnable import Parameters
from dichroic.problem.batches import (
    AnyObservations,
    rows_within,
    shared_by_processes,
    stored_batches,
)
from dichroic.problem.lazy_view import AnyView
from dichroic.problem.offsets import agreed_offsets
from dichroic.problem.problem import Problem, joint_observations
from dichroic.problem.screening import left_out
from dichroic.problem.splits import IndexSet, bits_of, held_out_bits, holdout
from dichroic.problem.view import View, bytes_each
from dichroic.runtime.blocks import GRAIN
from dichroic.runtime.limits import within

MOST_STATIONARY = 4096  # entries of a source, whose covariances are D × D
SCORED = 16384  # observations of files that are held out, at the most, to score with,
PART = 8  # that take this part of the memory together at the most


@dataclass(frozen=True)
class Data:
    """Training and held-out observations, per joint view, with the truth of the latter if known.

    `stationary` has the stationary sources, with how many of their last axes are positions.
    Where training observations are in files: the `memory` to work with, in bytes, and a folder for draws.
    """

    train: tuple[AnyObservations, ...]
    test: tuple[AnyObservations, ...]
    truth: tuple[Mapping[str, np.ndarray], ...]
    names: tuple[str, ...]
    order: tuple[tuple[str, ...], ...]
    stationary: Mapping[str, int] = field(default_factory=dict)
    memory: int = 0
    scratch: Path = Path()
    operators: Parameters = field(default_factory=dict)  # what of them is learned, so far

    def at(self, operators: Parameters) -> "Data":
        """With the parameters of operators that are learned replaced by `operators`."""
        if not operators:
            return self
        train, test = (tuple(obs.at(operators) for obs in part) for part in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test, operators=operators)


def prepare(
    problem: Problem,
    config: FitConfig,
    memory: int | None = None,
    scratch: Path | None = None,
    known: Parameters | None = None,
) -> Data:
    """Split each (joint) view into training and held-out observations, and choose the order.

    With `memory`, in bytes, training observations stay in the files that they are in, to be read block by block,
    and draws are written below the folder `scratch`. Outliers are in neither part, unless they are to be kept.
    Offsets of sources are those that are `known`, if that is given, else what observations need.
    """
    stationary = stationary_axes(problem, config)
    for name in config.bounds:
        _check_source(name, problem, "fit.bounds")
    groups, train, test = problem.joint_views(), [], []
    if memory is not None:
        check_memory(problem, memory)
    operators = agreed_offsets(problem, config.bounds) if known is None else known
    left = left_out(problem, config.outliers)
    for i, views in enumerate(groups):
        seed = config.seed + i
        if memory is None:
            kept, held = holdout(views, config.holdout, seed, left[i])
            train.append(joint_observations(kept, operators))
        else:
            bits, n = held_out_bits(views, config.holdout, seed), views[0].count
            usable = ~bits_of(left[i], n)
            rest, chosen = IndexSet(~bits & usable, n), IndexSet(bits & usable, n)
            most = _scored(views, memory // len(groups))
            index = (chosen if chosen.count else rest).spread(most)
            kept = held = [v.select(index) for v in views]
            train.append(stored_batches(views, rest, memory, operators))
        test.append(held if held[0].count else kept)
    names = tuple("+".join(v.name for v in views) for views in groups)
    order = config.order or learning_order(train)
    _check_order(order, problem.names, dict(zip(names, train, strict=True)))
    judged = shared_by_processes([joint_observations(views, operators) for views in test])
    shared = shared_by_processes(train) if memory is None else tuple(train)
    truth = tuple(map(_truth, test))
    scratch = scratch or Path()
    memory = memory or 0
    return Data(shared, judged, truth, names, order, stationary, memory, scratch, operators)


def check_memory(problem: Problem, memory: int) -> None:
    """Raise `ConfigError` unless a fit can begin within `memory` bytes; next to nothing is read for it."""
    with within(memory):
        for views in problem.joint_views():
            rows_within(memory - views[0].count // 8, views)


def _scored(views: Sequence[AnyView], memory: int) -> int:
    """How many observations of co-observed `views` to score with, within a part of `memory` bytes."""
    each = sum(bytes_each(view.head) for view in views)
    return min(SCORED, max(memory // PART // each, GRAIN))


def _truth(views: Sequence[View]) -> dict[str, np.ndarray]:
    return {k: np.asarray(x) for view in views for k, x in view.truth.items()}


def learning_order(views: Sequence[AnyObservations]) -> tuple[tuple[str, ...], ...]:
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


def stationary_axes(problem: Problem, config: FitConfig) -> dict[str, int]:
    """`Data.stationary`; raises `ConfigError` for sources that do not exist, or cannot be stationary."""
    found, where = {}, "fit.mixture.stationary"
    for name in config.mixture.stationary:
        _check_source(name, problem, where)
        shape = problem.shapes[name]
        found[name] = axes = config.diffusion.spatial_axes or min(len(shape), 2)
        if not 0 <= len(shape) - axes <= 1:
            raise ConfigError(
                f"{where}: source {name!r} of shape {shape} cannot be stationary along its last {axes} axes: "
                "it may have one axis more, of channels; set diffusion.spatial_axes"
            )
        if (size := math.prod(shape)) > MOST_STATIONARY:
            raise ConfigError(
                f"{where}: source {name!r} of {size:,} entries, but at most {MOST_STATIONARY:,} are "
                "supported for one that is stationary: cut it into parts, or leave it out of the list"
            )
    return found


def _check_source(name: str, problem: Problem, where: str) -> None:
    if name not in problem.names:
        raise ConfigError(f"{where}: there is no source {name!r}; there are {list(problem.names)}")


def _check_order(
    order: Sequence[Sequence[str]], names: Sequence[str], views: Mapping[str, AnyObservations]
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
