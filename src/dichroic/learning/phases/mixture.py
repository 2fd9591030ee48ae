"""Exact EM of mixtures of Gaussians, for one group of sources after the other, growing from one Gaussian."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dichroic.config import FitConfig, MixtureConfig
from dichroic.inference.constraints import check_learned
from dichroic.inference.posterior import is_large
from dichroic.learning.data import Data
from dichroic.learning.growth import (
    INITIAL_RANK,
    LEAST_OBSERVATIONS,
    Grow,
    Limits,
    Rescale,
    Widen,
    costs_left,
    iterations_of,
    next_model,
)
from dichroic.learning.mixture.em import em_iteration, gain_in_evidence, mean_log_evidence
from dichroic.learning.mixture.initialisation import (
    chosen_scales,
    initial_gaussians,
    split_components,
)
from dichroic.learning.mixture.m_step import FAILED, Mixtures
from dichroic.learning.phases.base import Context, Order, as_mixtures, ended, learn_operators
from dichroic.learning.safeguards import no_prior
from dichroic.learning.scoring import scores
from dichroic.learning.state import Metrics, State
from dichroic.operators.scaling import scale_parameters, scales_of, without_scaling
from dichroic.problem.batches import AnyObservations

SHRINKAGE = (10.0, 2.5, 0.6, 0.15, 0.0)  # pseudo-observations: what is tried, one after the other
CLEAR = 0.2  # nats that the first step down this ladder has to gain for each held-out observation
SURE = 3.0  # standard errors of a gain that counts


@dataclass(frozen=True)
class _Group:
    """Sources that are learned together, and the observations they are learned from and scored by."""

    names: tuple[str, ...]
    train: list[AnyObservations]
    test: list[AnyObservations]
    which: list[int]  # joint views that `test` are of

    @classmethod
    def of(cls, state: State, data: Data) -> "_Group":
        """The group that `state` learns, with the views that see its sources and no source that comes later."""
        names = data.order[state.group]
        usable = set(names).union(*data.order[: state.group])
        relevant = lambda obs: set(names) & set(obs.sources) and set(obs.sources) <= usable
        which = [i for i, obs in enumerate(data.test) if relevant(obs)]
        train = [obs for obs in data.train if relevant(obs)]
        return cls(names, train, [data.test[i] for i in which], which)

    def of_low_rank(self, mixtures: Mixtures) -> list[str]:
        """The names of the sources whose rank is to be found."""
        return [n for n in self.names if not mixtures[n].full_rank]

    def of_full_rank(self, mixtures: Mixtures) -> bool:
        """Whether there are none."""
        return not self.of_low_rank(mixtures)


class MixtureEM:
    """For each group of sources in turn: exact EM of mixtures, of more components as long as that pays."""

    name = "mixture"

    def iterate(self, state: State, data: Data, context: Context) -> tuple[State, Metrics]:
        """Some EM steps of the mixtures of one size; after the last of them, what comes next."""
        group, c, clock = _Group.of(state, data), context.config.mixture, context.clock
        current = _begun(as_mixtures(state.current), group, data, c)
        first = SHRINKAGE[0] if c.shrinkage is None else c.shrinkage
        shrinkage = {**dict.fromkeys(group.names, first), **state.shrinkage}
        current, evidence = em_iteration(current, group.train, group.names, c, clock, shrinkage)
        with clock.during("m_step"):
            operators, values = learn_operators(state, current, group.train, c)
        size, rank, label = components(current, group), _rank(current, group), "+".join(group.names)
        metrics: Metrics = {"sources": label, "components": size, "log_evidence": evidence}
        metrics |= {} if rank is None else {"rank": rank}
        metrics |= values
        count = iterations_of(size, c)
        clock.progress(f"{label}: {size} components", state.iteration + 1, count)
        state = replace(
            state,
            current=current,
            operators=operators,
            shrinkage=shrinkage,
            iteration=state.iteration + 1,
        )
        lost = FAILED in clock.metrics  # further iterations of this size would be no better
        if state.iteration < count and not lost:
            return state, metrics
        state, more = self._after_size(state, data.at(operators), context, evidence, lost)
        return state, metrics | more

    def _after_size(
        self, state: State, data: Data, context: Context, evidence: float, lost: bool
    ) -> tuple[State, Metrics]:
        """Score the mixtures of one size on held-out observations, and go on to the next model."""
        group, c, clock, metrics = _Group.of(state, data), context.config.mixture, context.clock, {}
        current, names = as_mixtures(state.current), group.names
        size = components(current, group)
        if size > 1 and c.shrinkage is None and group.of_full_rank(current) and not lost:
            state = _with_less_shrinkage(state, group, context)
            metrics["shrinkage"] = state.shrinkage[names[0]]
        with clock.during("scoring"):
            score, better = _compared(state, group, c)
        metrics["heldout_log_evidence"] = score
        if names[0] not in state.best:
            if not (better and (math.isfinite(evidence) or state.iteration > 1)):
                raise no_prior(names, evidence, score, data)
            scaled = scales_of(state.operators)
            plain = {n: current[n] for n in names if n not in scaled}
            check_learned(plain, context.config.bounds)
        if better:
            state = replace(state, best=state.current, best_operators=state.operators)
        stale = 0 if better or size == 1 else state.stale + 1
        stale = c.patience if lost and not better else stale
        state = replace(state, score=max(score, state.score), stale=stale, iteration=0)
        state, stopped = _grown(state, group, c, better)
        if not stopped:
            return state, metrics
        with clock.during("scoring"):
            data = data.at(state.best_operators)
            metrics |= scores(state.best, data, group.which, context.config)
        return _next_group(state, data), metrics

    def iterations(self, config: FitConfig, order: Order) -> int:
        """There is always one."""
        return 1

    def cost(self, state: State, data: Data) -> float:
        """The number of components."""
        found = as_mixtures(state.current).get(data.order[state.group][0])
        return found.log_weights.size if found else 1

    def costs_left(self, state: State, data: Data, config: FitConfig) -> Iterator[float]:
        """As sizes may still grow, of this group and those after it."""
        later, large = len(data.order) - state.group - 1, is_large(data.train)
        size = int(self.cost(state, data))
        return costs_left(state.iteration, size, later, config.mixture, large=large)

    def admits(self, state: State, order: Order) -> bool:
        """Whether mixtures of all groups before are known, and of this group all or none."""
        if state.group >= len(order) or len(as_mixtures(state.current)) < len(state.current):
            return False
        before = {name for group in order[: state.group] for name in group}
        here = set(order[state.group])
        return before <= set(state.current) and here & set(state.current) in (set(), here)


def components(current: Mixtures, group: _Group) -> int:
    """The number of components of each source of the `group`."""
    return current[group.names[0]].log_weights.size


def _rank(current: Mixtures, group: _Group) -> int | None:
    low = group.of_low_rank(current)
    return current[low[0]].variances.shape[1] if low else None


def _begun(current: Mixtures, group: _Group, data: Data, config: MixtureConfig) -> Mixtures:
    """`current`, with a Gaussian for each source of the `group` if it has none yet."""
    if group.names[0] in current:
        return current
    rank = min(INITIAL_RANK, config.rank) if is_large(data.train) else None
    start = initial_gaussians(group.names, group.train, current, rank, data.stationary)
    return {**current, **start}


def _compared(state: State, group: _Group, config: MixtureConfig) -> tuple[float, bool]:
    """The held-out evidence of the current mixtures, and whether they take the place of the best before."""
    current, best = as_mixtures(state.current), as_mixtures(state.best)
    score = mean_log_evidence(current, group.test, beam_width=config.beam_width)
    if components(current, group) == 1 or without_scaling(state.operators):
        return score, score > state.score  # false for NaN
    pulled = group.of_full_rank(current) and state.shrinkage[group.names[0]] > 0
    gain, error = gain_in_evidence(best, current, group.test, beam_width=config.beam_width)
    if pulled:
        return score, gain > -error and score > state.score - 2 * error
    return score, gain > error


def _with_less_shrinkage(state: State, group: _Group, context: Context) -> State:
    """With as little shrinkage as held-out observations clearly ask for.

    It is lowered where an iteration with less raises their evidence by more than three standard errors. What the
    evidence does not see, what another source hides, suffers first: so the first gain has to be large, too.
    """
    c, names = context.config.mixture, group.names
    current: Mixtures = as_mixtures(state.current)
    kept = dict(state.shrinkage)
    while kept[names[0]] > 0:
        place = SHRINKAGE.index(kept[names[0]])
        lower = {**kept, **dict.fromkeys(names, SHRINKAGE[place + 1])}
        trial, _ = em_iteration(current, group.train, names, c, context.clock, lower)
        with context.clock.during("scoring"):
            gain, error = gain_in_evidence(current, trial, group.test, beam_width=c.beam_width)
        if not gain > SURE * error + (0.0 if place else CLEAR):
            break
        current, kept = trial, lower
    return replace(state, current=current, shrinkage=kept)


def _grown(state: State, group: _Group, config: MixtureConfig, better: bool) -> tuple[State, bool]:
    """The state from which the next model starts, and whether there is none."""
    names, current = group.names, as_mixtures(state.current)
    size, rank, low = components(current, group), _rank(current, group), group.of_low_rank(current)
    scales = _new_scales(state, low, config) if size == 1 and low else {}
    count = sum(obs.count for obs in group.train)
    limits = Limits(
        rank=min(config.rank, *(current[n].dim - 1 for n in low)) if low else 0,
        components=min(config.components, max(count // LEAST_OBSERVATIONS, 1)),
        patience=config.patience,
    )
    after = next_model(
        size, rank, better=better, stale=state.stale, uneven=bool(scales), limits=limits
    )
    if isinstance(after, Widen):
        wider = initial_gaussians(low, group.train, current, after.rank)
        return replace(state, current={**current, **wider}), False
    if size == 1 and low:  # of the rank with the best score
        best = as_mixtures(state.best)
        current = {**current, **{n: best[n] for n in names}}
        state = replace(state, current=current)
    if isinstance(after, Rescale):
        return _rescaled(state, names, scales), False
    if isinstance(after, Grow):
        split = {n: split_components(current[n], after.components).ordered() for n in names}
        return replace(state, current={**current, **split}), False
    return state, True


def _new_scales(state: State, low: Sequence[str], config: MixtureConfig) -> dict[str, np.ndarray]:
    """Scales of the entries of the sources `low`, unless they have some already."""
    if set(low) & set(scales_of(state.best_operators)):
        return {}
    return chosen_scales(
        {n: m for n, m in as_mixtures(state.best).items() if n in low}, config.scaling
    )


def _rescaled(state: State, names: Sequence[str], scales: Mapping[str, np.ndarray]) -> State:
    """From one Gaussian again for each of the sources `names`, of which some have `scales` from here on."""
    rest = {k: d for k, d in state.current.items() if k not in names}
    values = {**state.best_operators, **scale_parameters(scales)}
    return replace(
        state,
        current=rest,
        best=rest,
        operators=values,
        best_operators=values,
        score=-math.inf,
    )


def _next_group(state: State, data: Data) -> State:
    fresh = replace(
        ended(state),
        current=state.best,
        operators=state.best_operators,
        group=state.group + 1,
    )
    return replace(fresh, phase=MixtureEM.name) if fresh.group < len(data.order) else fresh
