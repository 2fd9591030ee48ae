"""Exact EM of the mixtures of all sources on all views together, after they were learned group by group."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from dichroic.config import FitConfig
from dichroic.learning.data import Data
from dichroic.learning.mixture.em import em_iteration, mean_log_evidence
from dichroic.learning.phases.base import (
    Context,
    Order,
    as_mixtures,
    ended,
    equal_costs,
    is_last,
    learn_operators,
    learned,
)
from dichroic.learning.scoring import scores
from dichroic.learning.state import Metrics, State


class JointRefinement:
    """All sources at once; what it learned is kept if held-out observations prefer it."""

    name = "refinement"

    def iterate(self, state: State, data: Data, context: Context) -> tuple[State, Metrics]:
        """Some EM steps; after the last of them, the comparison with what was before."""
        config, clock = context.config, context.clock
        names = [n for group in data.order for n in group]
        before = as_mixtures(state.current)
        evaluate = partial(mean_log_evidence, beam_width=config.mixture.beam_width)
        with clock.during("scoring"):
            score = evaluate(before, data.test) if state.iteration == 0 else state.score
        current, evidence = em_iteration(
            before, data.train, names, config.mixture, clock, state.shrinkage
        )
        with clock.during("m_step"):
            operators, values = learn_operators(state, current, data.train, config.mixture)
        clock.progress("all sources together", state.iteration + 1, config.joint_iterations)
        metrics: Metrics = {"sources": "+".join(names), "log_evidence": evidence, **values}
        last = is_last(state, config.joint_iterations)
        state = replace(
            state, current=current, operators=operators, iteration=state.iteration + 1, score=score
        )
        if not last:
            return state, metrics
        with clock.during("scoring"):
            new = evaluate(current, data.at(operators).test)
        if new > score:
            state = replace(state, best=current, best_operators=operators)
        metrics["heldout_log_evidence"] = max(new, score)
        best = data.at(state.best_operators)
        with clock.during("scoring"):
            metrics |= scores(state.best, best, range(len(data.test)), config)
        return ended(replace(state, current=state.best, operators=state.best_operators)), metrics

    def iterations(self, config: FitConfig, order: Order) -> int:
        """None for sources that were all learned together."""
        return config.joint_iterations if len(order) > 1 else 0

    def cost(self, state: State, data: Data) -> float:
        """The cost of an iteration, which is the same for each."""
        return 1.0

    def costs_left(self, state: State, data: Data, config: FitConfig) -> Iterator[float]:
        """The costs of all iterations that are to come."""
        return equal_costs(state, config.joint_iterations)

    def admits(self, state: State, order: Order) -> bool:
        """Whether all sources have mixtures."""
        mixtures = as_mixtures(state.current)
        return len(mixtures) == len(state.current) and learned(state, order)
