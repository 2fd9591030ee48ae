"""EM of diffusion models: posterior draws of all training observations, then score matching on them."""

from collections.abc import Iterator
from dataclasses import replace

import jax

from dichroic.config import FitConfig
from dichroic.learning.data import Data
from dichroic.learning.diffusion.e_step import expectation, training_draws
from dichroic.learning.diffusion.m_step import maximisation
from dichroic.learning.diffusion.score_matching import evidence_gain, is_gain
from dichroic.learning.phases.base import Context, Order, ended, equal_costs, is_last, learned
from dichroic.learning.scoring import scores
from dichroic.learning.state import Metrics, State
from dichroic.problem.batches import shared_by_processes


class DiffusionEM:
    """A source keeps its new prior if that raises the held-out evidence (`evidence_gain`)."""

    name = "diffusion"

    def iterate(self, state: State, data: Data, context: Context) -> tuple[State, Metrics]:
        """Posterior draws, training, and for each source the choice between the prior before and after."""
        config, clock = context.config, context.clock
        c, old = config.diffusion, state.current
        key = jax.random.fold_in(jax.random.key(config.seed), state.iteration + 1)
        few = shared_by_processes([obs.head(c.evidence_observations) for obs in data.test])
        key_judge, sigma_min = jax.random.fold_in(key, 1), config.sampler.sigma_min
        with clock.during("scoring"):
            judges = expectation(old, few, data.names, key_judge, config, c.evidence_draws)
        with clock.during("e_step"):
            samples = training_draws(old, data, key, config, clock)
        with clock.during("m_step"):
            new, metrics = maximisation(old, samples, key, config, clock)
        kept, gained = dict(old), 0.0
        for i, (name, x) in enumerate(sorted(judges.items())):
            key_gain = jax.random.fold_in(key, 2000 + i)
            with clock.during("scoring"):
                gain, error = evidence_gain(old[name], new[name], x, key_gain, sigma_min=sigma_min)
            metrics |= {f"evidence_gain_{name}": gain, f"evidence_gain_error_{name}": error}
            if c.keep == "all" or is_gain(gain, error):
                kept[name], gained = new[name], gained + gain
        with clock.during("scoring"):
            metrics |= {"sources": "+".join(old)}
            metrics |= scores(kept, data, range(len(data.test)), config)
        stale = 0 if gained > 0 else state.stale + 1
        score = gained + (state.score if state.iteration else 0.0)
        state = replace(state, current=kept, best=kept, stale=stale)
        after = replace(state, iteration=state.iteration + 1)
        if is_last(state, c.iterations) or stale >= c.patience:
            after = ended(state)
        return replace(after, score=score), metrics

    def iterations(self, config: FitConfig, order: Order) -> int:
        """As the settings say."""
        return config.diffusion.iterations

    def cost(self, state: State, data: Data) -> float:
        """The cost of an iteration, which is the same for each."""
        return 1.0

    def costs_left(self, state: State, data: Data, config: FitConfig) -> Iterator[float]:
        """The costs of all iterations that may come."""
        return equal_costs(state, config.diffusion.iterations)

    def admits(self, state: State, order: Order) -> bool:
        """Whether all sources have priors."""
        return learned(state, order)
