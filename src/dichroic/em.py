"""Expectation-maximisation: learn every source's prior from mixtures alone.

A fit is a sequence of laps, and a lap is a pure function from one `State` to the next; all that a fit
has to remember is in the state, so a run that was killed goes on from its last checkpoint to the
same result, bit for bit. The phases:

    mixture    for each group of sources in turn: exact EM of mixtures of Gaussians, doubling the
               number of components until the held-out evidence no longer grows
    polish     exact EM of all sources on all views together (after more than one group)
    diffusion  E-step: joint posterior draws of all training observations; M-step: score matching;
               a source keeps its new prior if that raises the held-out evidence (`evidence_gain`)

No phase looks at the truth; where it is known, scores against it are reported.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from dichroic import layout
from dichroic.bounds import check_learned
from dichroic.config import FitConfig, MixtureConfig
from dichroic.data import Data
from dichroic.dataset import StoredDataset, shared_out
from dichroic.denoise import Mixture
from dichroic.drawing import Denoisers, draw
from dichroic.drawn import StoredDraws, draw_to_disk
from dichroic.fingerprint import fingerprint
from dichroic.guards import check_draws, guarded, no_prior, trained
from dichroic.machine import peak_memory
from dichroic.mixture_em import (
    Mixtures,
    chosen_units,
    em_lap,
    gain_in_evidence,
    initial_gaussians,
    mean_log_evidence,
    split_components,
)
from dichroic.mixture_step import LOST
from dichroic.observations import Observations, Observed, numbered
from dichroic.operator_em import operator_lap
from dichroic.operators.learned import Parameters
from dichroic.operators.units import as_parameters, units_of, without_units
from dichroic.pace import LEAST_RANK, costs_left, laps_of, seconds_left
from dichroic.posterior import is_large
from dichroic.scoring import scores
from dichroic.tracking import Clock, Tracker
from dichroic.train import evidence_gain, is_gain, with_network

Metrics = dict[str, Any]
SHRINKAGE = (10.0, 2.5, 0.6, 0.15, 0.0)  # pseudo-observations: what is tried, one after the other
CLEAR = 0.2  # nats that the first step down this ladder has to gain for each held-out observation
SURE = 3.0  # standard errors of a gain that counts
EACH = 10  # observations for each component, at least


@dataclass(frozen=True)
class State:
    """All that a fit remembers between laps."""

    phase: str = "mixture"  # mixture, polish, diffusion, done
    group: int = 0
    lap: int = 0  # within the phase (mixture: within the size)
    stale: int = 0  # sizes or laps without a better score
    total: int = 0  # laps done since the start
    score: float = -math.inf  # of `best`
    seconds: float = 0.0
    metrics_length: int = 0
    current: Denoisers = dataclasses.field(default_factory=dict)
    best: Denoisers = dataclasses.field(default_factory=dict)
    operators: Parameters = dataclasses.field(default_factory=dict)  # learned, with `current`
    best_operators: Parameters = dataclasses.field(default_factory=dict)
    shrinkage: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of each source

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.phase == "done"


def advance(
    state: State, data: Data, config: FitConfig, tracker: Tracker | None = None
) -> tuple[State, Metrics]:
    """One lap: the next state, and what was measured."""
    began, clock = time.perf_counter(), Clock(tracker)
    laps = {"mixture": _mixture_lap, "polish": _polish_lap, "diffusion": _diffusion_lap}
    at = data.at(state.operators)
    new, metrics = guarded(laps[state.phase], state, at, config, clock)
    took = time.perf_counter() - began
    new = dataclasses.replace(new, total=state.total + 1, seconds=state.seconds + took)
    cost: dict[str, float] = {"seconds": round(new.seconds, 3), **clock.metrics}
    cost["seconds_left"] = _seconds_left(state, new, took, data, config)
    cost["peak_memory_mib"] = round(peak_memory(), 1)
    return new, {"lap": new.total, "phase": state.phase, **metrics, **cost}


def _seconds_left(old: State, new: State, took: float, data: Data, config: FitConfig) -> float:
    """What is left of the phase of the lap from `old` to `new`, which took `took` seconds, at most."""
    if new.phase != old.phase:
        return 0.0
    size = lambda s: _components(s.current, data.order[s.group]) if s.phase == "mixture" else 1
    more, large = len(data.order) - new.group - 1, is_large(data.train)
    costs = costs_left(new.phase, new.lap, size(new), more, config, large=large)
    return seconds_left(took, size(old), list(costs))


def _components(current: Denoisers, names: Sequence[str]) -> int:
    found = current.get(names[0])
    return found.log_weights.size if isinstance(found, Mixture) else 1


# Mixture phase


def _mixture_lap(
    state: State, data: Data, config: FitConfig, clock: Clock
) -> tuple[State, Metrics]:
    names, c = data.order[state.group], config.mixture
    usable = set(names).union(*data.order[: state.group])
    relevant = lambda obs: set(names) & set(obs.sources) and set(obs.sources) <= usable
    train = [obs for obs in data.train if relevant(obs)]
    current = state.current
    if names[0] not in current:
        rank = min(LEAST_RANK, c.rank) if is_large(data.train) else None
        current = {**current, **initial_gaussians(names, train, current, rank, data.stationary)}
    first = SHRINKAGE[0] if c.shrinkage is None else c.shrinkage
    shrinkage = {**dict.fromkeys(names, first), **state.shrinkage}
    current, evidence = em_lap(current, train, names, c, clock, shrinkage)
    with clock.during("m_step"):
        operators, told = _learn_operators(state, current, train, c)
    size = _components(current, names)
    laps = laps_of(size, c)
    low = [n for n in names if not current[n].full_rank]  # of a rank that is to be found
    rank = current[low[0]].variances.shape[1] if low else None
    metrics: Metrics = {"sources": "+".join(names), "components": size, "log_evidence": evidence}
    metrics |= {} if rank is None else {"rank": rank}
    metrics |= told
    state = dataclasses.replace(state, operators=operators)
    clock.progress(f"{'+'.join(names)}: {size} components", state.lap + 1, laps)
    lost = LOST in clock.metrics  # further laps of this size would be no better
    if state.lap + 1 < laps and not lost:
        return dataclasses.replace(state, current=current, lap=state.lap + 1), metrics

    data = data.at(operators)
    test = [i for i, obs in enumerate(data.test) if relevant(obs)]
    held_out = [data.test[i] for i in test]
    if size > 1 and c.shrinkage is None and not low:
        train = [obs for obs in data.train if relevant(obs)]
        current, shrinkage = _with_less(current, shrinkage, train, held_out, names, c, clock)
        metrics["shrinkage"] = shrinkage[names[0]]
    state = dataclasses.replace(state, shrinkage=shrinkage)
    with clock.during("scoring"):
        score = mean_log_evidence(current, held_out, max_tuples=c.max_tuples)
        better = score > state.score  # false for NaN
        if size > 1 and not without_units(operators):
            pulled = not low and shrinkage[names[0]] > 0
            gain, error = gain_in_evidence(state.best, current, held_out, max_tuples=c.max_tuples)
            no_worse = gain > -error and score > state.score - 2 * error
            better = no_worse if pulled else gain > error
    metrics["heldout_log_evidence"] = score
    learned = math.isfinite(evidence) or state.lap > 0
    if names[0] not in state.best:
        if not (better and learned):
            raise no_prior(names, evidence, score, data)
        as_it_is = {n: current[n] for n in names if n not in units_of(operators)}
        check_learned(as_it_is, config.bounds)
    best, best_operators = (current, operators) if better else (state.best, state.best_operators)
    state = dataclasses.replace(state, best_operators=best_operators)
    if size == 1 and rank is not None:
        most = min(c.rank, *(current[n].dim - 1 for n in low))
        if better and rank < most:
            wider = initial_gaussians(low, train, current, min(2 * rank, most))
            wider = {**current, **wider}
            wide = dataclasses.replace(state, current=wider, best=best, score=score, lap=0)
            return wide, metrics
        current = {**current, **{n: best[n] for n in names}}  # of the rank with the best score
        known = set(low) & set(units_of(best_operators))
        if not known and (units := chosen_units({n: current[n] for n in low}, c.units)):
            return _in_units(state, names, units), metrics
    stale = 0 if better or size == 1 else state.stale + 1
    stale = c.patience if lost and not better else stale
    most = min(c.components, max(sum(obs.count for obs in train) // EACH, 1))
    if size < most and stale < c.patience:
        target = min(2 * size, most)
        grown = {n: split_components(current[n], target).ordered() for n in names}
        grown = dataclasses.replace(
            state,
            current={**current, **grown},
            best=best,
            score=max(score, state.score),
            lap=0,
            stale=stale,
        )
        return grown, metrics
    with clock.during("scoring"):
        metrics |= scores(best, data.at(best_operators), test, config)
    return _next_group(state, best, data, config), metrics


def _with_less(
    current: Mixtures,
    shrinkage: Mapping[str, float],
    train: Sequence[Observed],
    held_out: Sequence[Observed],
    names: Sequence[str],
    config: MixtureConfig,
    clock: Clock,
) -> tuple[Mixtures, dict[str, float]]:
    """The mixtures with as little shrinkage as held-out observations clearly ask for, and that of each source.

    It is lowered where a lap with less raises their evidence by more than three standard errors. What the evidence
    does not see, what another source hides, suffers first: so the first time the gain has to be large, too.
    """
    kept = dict(shrinkage)
    while kept[names[0]] > 0:
        place = SHRINKAGE.index(kept[names[0]])
        lower = {**kept, **dict.fromkeys(names, SHRINKAGE[place + 1])}
        trial, _ = em_lap(current, train, names, config, clock, lower)
        with clock.during("scoring"):
            gain, error = gain_in_evidence(current, trial, held_out, max_tuples=config.max_tuples)
        if not gain > SURE * error + (0.0 if place else CLEAR):
            break
        current, kept = trial, lower
    return current, kept


def _in_units(state: State, names: Sequence[str], units: Mapping[str, np.ndarray]) -> State:
    """From one Gaussian again for each of the sources `names`, of which some are in `units` from here on."""
    rest = {k: d for k, d in state.current.items() if k not in names}
    values = {**state.best_operators, **as_parameters(units)}
    return dataclasses.replace(
        state,
        current=rest,
        best=rest,
        operators=values,
        best_operators=values,
        score=-math.inf,
        lap=0,
    )


def _learn_operators(
    state: State, current: Mapping[str, Any], train: Sequence[Observed], config: MixtureConfig
) -> tuple[Parameters, Metrics]:
    """The operators after an M-step on `train`, and the values and errors of those that are one number."""
    found, errors = operator_lap(current, train, config)
    told: Metrics = {}
    for name, arrays in found.items():
        if sum(a.size for a in arrays) == 1:
            told[f"operator_{name}"] = float(arrays[0].ravel()[0])
            told[f"operator_error_{name}"] = float(errors[name][0].ravel()[0])
    return {**state.operators, **found}, told


def _next_group(state: State, best: Denoisers, data: Data, config: FitConfig) -> State:
    fresh = dataclasses.replace(
        state,
        current=best,
        best=best,
        operators=state.best_operators,
        lap=0,
        stale=0,
        score=-math.inf,
        group=state.group + 1,
    )
    if fresh.group < len(data.order):
        return fresh
    after, polish = _after_mixture(fresh, config), len(data.order) > 1 and config.polish > 0
    return dataclasses.replace(after, phase="polish") if polish else after


def _after_mixture(state: State, config: FitConfig) -> State:
    phase = "diffusion" if config.diffusion.laps > 0 else "done"
    return dataclasses.replace(state, phase=phase, lap=0, stale=0, score=-math.inf)


# Polish phase


def _polish_lap(state: State, data: Data, config: FitConfig, clock: Clock) -> tuple[State, Metrics]:
    names = [n for group in data.order for n in group]
    evaluate = partial(mean_log_evidence, max_tuples=config.mixture.max_tuples)
    with clock.during("scoring"):
        score = evaluate(state.current, data.test) if state.lap == 0 else state.score
    current, evidence = em_lap(
        state.current, data.train, names, config.mixture, clock, state.shrinkage
    )
    with clock.during("m_step"):
        operators, told = _learn_operators(state, current, data.train, config.mixture)
    clock.progress("all sources together", state.lap + 1, config.polish)
    metrics: Metrics = {"sources": "+".join(names), "log_evidence": evidence, **told}
    state = dataclasses.replace(state, operators=operators, lap=state.lap + 1, score=score)
    if state.lap < config.polish:
        return dataclasses.replace(state, current=current), metrics
    with clock.during("scoring"):
        new = evaluate(current, data.at(operators).test)
    if new > score:
        state = dataclasses.replace(state, best=current, best_operators=operators)
    metrics["heldout_log_evidence"] = max(new, score)
    best = data.at(state.best_operators)
    with clock.during("scoring"):
        metrics |= scores(state.best, best, range(len(data.test)), config)
    state = dataclasses.replace(state, current=state.best, operators=state.best_operators)
    return _after_mixture(state, config), metrics


# Diffusion phase


def _diffusion_lap(
    state: State, data: Data, config: FitConfig, clock: Clock
) -> tuple[State, Metrics]:
    c, old = config.diffusion, state.current
    key = jax.random.fold_in(jax.random.key(config.seed), state.lap + 1)
    few = shared_out([obs.head(c.evidence_observations) for obs in data.test])
    key_judge, sigma_min = jax.random.fold_in(key, 1), config.sampler.sigma_min
    with clock.during("scoring"):
        judges = expectation(old, few, data.names, key_judge, config, c.evidence_draws)
    with clock.during("e_step"):
        samples = _training_draws(old, data, key, config, clock)
    with clock.during("m_step"):
        new, metrics = _maximisation(old, samples, key, config, clock)
    kept, gained = dict(old), 0.0
    for i, (name, x) in enumerate(sorted(judges.items())):
        key_gain = jax.random.fold_in(key, 2000 + i)
        with clock.during("scoring"):
            gain, error = evidence_gain(old[name], new[name], x, key_gain, sigma_min=sigma_min)
        metrics |= {f"evidence_gain_{name}": gain, f"evidence_gain_error_{name}": error}
        if c.keep == "all" or is_gain(gain, error):
            kept[name], gained = new[name], gained + gain
    with clock.during("scoring"):
        metrics |= {"sources": "+".join(old), **scores(kept, data, range(len(data.test)), config)}
    stale = 0 if gained > 0 else state.stale + 1
    ended = state.lap + 1 >= c.laps or stale >= c.patience
    state = dataclasses.replace(
        state,
        phase="done" if ended else "diffusion",
        current=kept,
        best=kept,
        score=gained + (state.score if state.lap else 0.0),
        lap=state.lap + 1,
        stale=stale,
    )
    return state, metrics


def expectation(
    current: Denoisers,
    views: Sequence[Observed],
    names: Sequence[str],
    key: PRNGKeyArray,
    config: FitConfig,
    n_draws: int,
    clock: Clock | None = None,
) -> dict[str, np.ndarray]:
    """Joint posterior draws `(n_draws, n, *shape)` of the observations of all `views`, per source."""
    found: dict[str, list[np.ndarray]] = {}
    clock = clock or Clock()
    for i, (obs, name) in enumerate(zip(views, names, strict=True)):
        own = partial(
            _own_draws, current, obs, name, jax.random.fold_in(key, i), config, n_draws, clock
        )
        for source, x in layout.each(own).items():
            found.setdefault(source, []).append(obs.gathered(x, 1))
    return {source: np.concatenate(parts, axis=1) for source, parts in found.items()}


def _own_draws(
    current: Denoisers,
    obs: Observed,
    name: str,
    key: PRNGKeyArray,
    config: FitConfig,
    n_draws: int,
    clock: Clock,
) -> dict[str, np.ndarray]:
    """Those of the observations of this process."""
    found: dict[str, list[np.ndarray]] = {}
    say = partial(clock.progress, f"E-step {name}")
    for first, block in numbered(obs):
        options = {"n_draws": n_draws, "first_index": first, "progress": say}
        for source, x in _checked_draws(current, block, name, key, config, **options).items():
            found.setdefault(source, []).append(x)
    return {source: np.concatenate(parts, axis=1) for source, parts in found.items()}


def _checked_draws(
    current: Denoisers,
    obs: Observations,
    name: str,
    key: PRNGKeyArray,
    config: FitConfig,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Draws of each source for some observations of the view `name`; raises `RunError` unless they are finite."""
    draws = draw(current, obs, key, config, **options)
    check_draws(name, obs, draws, current)
    return draws.x


def _training_draws(
    current: Denoisers, data: Data, key: PRNGKeyArray, config: FitConfig, clock: Clock
) -> Mapping[str, np.ndarray | StoredDraws]:
    """One posterior draw of every training observation, per source; on disk where the observations are."""
    views = [obs for obs in data.train if isinstance(obs, StoredDataset)]
    if not views:
        drawn = expectation(current, data.train, data.names, key, config, 1, clock)
        return {source: x[0] for source, x in drawn.items()}

    def draw_some(i: int, obs: Observations, first: int) -> dict[str, np.ndarray]:
        at = jax.random.fold_in(key, i)
        return _checked_draws(current, obs, data.names[i], at, config, first_index=first)

    about = (current, [obs.parameters for obs in views], config.to_dict(), jax.random.key_data(key))
    return draw_to_disk(
        data.scratch,
        views,
        data.names,
        [partial(draw_some, i) for i in range(len(views))],
        model=fingerprint(about),
        memory=data.memory,
        seed=int(jax.random.randint(key, (), 0, 2**31 - 1)),
        progress=clock.progress,
    )


def _maximisation(current, samples, key, config, clock: Clock) -> tuple[Denoisers, Metrics]:
    updated, metrics = {}, {}
    for i, (name, x) in enumerate(sorted(samples.items())):
        key_init, key_train = jax.random.split(jax.random.fold_in(key, 1000 + i))
        say = lambda done, n, name=name: clock.progress(f"M-step {name}", done, n)
        start = with_network(current[name], key_init, config)
        updated[name], told = trained(current[name], start, x, key_train, name, config, say)
        metrics |= told
    return updated, metrics
