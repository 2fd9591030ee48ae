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

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from dichroic.batching import split, take
from dichroic.config import FitConfig
from dichroic.denoise import Denoiser, Mixture, Preconditioned
from dichroic.errors import ConfigError
from dichroic.metrics.psnr import psnr
from dichroic.mixture_em import em_lap, initial_gaussian, mean_log_evidence, split_components
from dichroic.nn import Mlp
from dichroic.observations import Observations, whitened_chi2
from dichroic.posterior import choose_solver
from dichroic.problem import Problem, View, holdout, joint_observations
from dichroic.sample import Draws, draw_posterior, make_sampler
from dichroic.tracking import Silent, Tracker
from dichroic.train import evidence_gain, is_gain, train_denoiser

Denoisers = dict[str, Denoiser]
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Training and held-out observations, per joint view, with the truth of the latter if known."""

    train: tuple[Observations, ...]
    test: tuple[Observations, ...]
    truth: tuple[Mapping[str, np.ndarray], ...]
    names: tuple[str, ...]
    order: tuple[tuple[str, ...], ...]


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

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.phase == "done"


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
    return Data(tuple(train), tuple(test), tuple(truth), tuple(names), order)


def _truth(views: Sequence[View]) -> dict[str, np.ndarray]:
    return {k: np.asarray(x) for view in views for k, x in view.truth.items()}


def learning_order(views: Sequence[Observations]) -> tuple[tuple[str, ...], ...]:
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
    order: Sequence[Sequence[str]], names: Sequence[str], views: Mapping[str, Observations]
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


def advance(
    state: State, data: Data, config: FitConfig, tracker: Tracker | None = None
) -> tuple[State, Metrics]:
    """One lap: the next state, and what was measured."""
    began = time.perf_counter()
    laps = {"mixture": _mixture_lap, "polish": _polish_lap, "diffusion": _diffusion_lap}
    new, metrics = laps[state.phase](state, data, config, tracker or Silent())
    seconds = state.seconds + time.perf_counter() - began
    new = dataclasses.replace(new, total=state.total + 1, seconds=seconds)
    return new, {"lap": new.total, "phase": state.phase, **metrics, "seconds": round(seconds, 3)}


# Mixture phase


def _mixture_lap(
    state: State, data: Data, config: FitConfig, tracker: Tracker
) -> tuple[State, Metrics]:
    names, c = data.order[state.group], config.mixture
    usable = set(names).union(*data.order[: state.group])
    relevant = lambda obs: set(names) & set(obs.sources) and set(obs.sources) <= usable
    train = [obs for obs in data.train if relevant(obs)]
    current = state.current
    if names[0] not in current:
        current = {**current, **{n: initial_gaussian(n, train, names) for n in names}}
    current, evidence = em_lap(current, train, names, c)
    size = current[names[0]].log_weights.size
    laps = c.final_laps if size >= c.components else c.laps
    laps = c.gaussian_laps if size == 1 else laps
    metrics: Metrics = {"sources": "+".join(names), "components": size, "log_evidence": evidence}
    tracker.progress(f"{'+'.join(names)}: {size} components", state.lap + 1, laps)
    if state.lap + 1 < laps:
        return dataclasses.replace(state, current=current, lap=state.lap + 1), metrics

    test = [i for i, obs in enumerate(data.test) if relevant(obs)]
    score = mean_log_evidence(current, [data.test[i] for i in test], max_tuples=c.max_tuples)
    metrics["heldout_log_evidence"] = score
    better = score > state.score
    best = current if better else state.best
    stale = 0 if better else state.stale + 1
    if size < c.components and stale < c.patience:
        target = min(2 * size, c.components)
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
    metrics |= _scores(best, data, test, config)
    return _next_group(state, best, data, config), metrics


def _next_group(state: State, best: Denoisers, data: Data, config: FitConfig) -> State:
    fresh = dataclasses.replace(
        state, current=best, best=best, lap=0, stale=0, score=-math.inf, group=state.group + 1
    )
    if fresh.group < len(data.order):
        return fresh
    polish = len(data.order) > 1 and config.polish > 0
    return (
        dataclasses.replace(_after_mixture(fresh, config), phase="polish")
        if polish
        else (_after_mixture(fresh, config))
    )


def _after_mixture(state: State, config: FitConfig) -> State:
    phase = "diffusion" if config.diffusion.laps > 0 else "done"
    return dataclasses.replace(state, phase=phase, lap=0, stale=0, score=-math.inf)


# Polish phase


def _polish_lap(
    state: State, data: Data, config: FitConfig, tracker: Tracker
) -> tuple[State, Metrics]:
    names = [n for group in data.order for n in group]
    evaluate = partial(mean_log_evidence, views=data.test, max_tuples=config.mixture.max_tuples)
    score = evaluate(state.current) if state.lap == 0 else state.score
    current, evidence = em_lap(state.current, data.train, names, config.mixture)
    tracker.progress("all sources together", state.lap + 1, config.polish)
    metrics: Metrics = {"sources": "+".join(names), "log_evidence": evidence}
    if state.lap + 1 < config.polish:
        return dataclasses.replace(state, current=current, lap=state.lap + 1, score=score), metrics
    new = evaluate(current)
    best = current if new > score else state.best
    metrics["heldout_log_evidence"] = max(new, score)
    metrics |= _scores(best, data, range(len(data.test)), config)
    return _after_mixture(dataclasses.replace(state, current=best, best=best), config), metrics


# Diffusion phase


def _diffusion_lap(
    state: State, data: Data, config: FitConfig, tracker: Tracker
) -> tuple[State, Metrics]:
    c, old = config.diffusion, state.current
    key = jax.random.fold_in(jax.random.key(config.seed), state.lap + 1)
    few = tuple(take(obs, slice(0, c.evidence_observations)) for obs in data.test)
    judges = _expectation(
        old, few, data.names, jax.random.fold_in(key, 1), config, c.evidence_draws
    )
    samples = _expectation(old, data.train, data.names, key, config, 1, tracker)
    new, metrics = _maximisation(old, {k: x[0] for k, x in samples.items()}, key, config, tracker)
    kept, gained = dict(old), 0.0
    for i, (name, x) in enumerate(sorted(judges.items())):
        key_gain = jax.random.fold_in(key, 2000 + i)
        gain, error = evidence_gain(
            old[name], new[name], x, key_gain, sigma_min=config.sampler.sigma_min
        )
        metrics |= {f"evidence_gain_{name}": gain, f"evidence_gain_error_{name}": error}
        if is_gain(gain, error):
            kept[name], gained = new[name], gained + gain
    metrics |= {"sources": "+".join(old), **_scores(kept, data, range(len(data.test)), config)}
    stale = 0 if gained else state.stale + 1
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


def _expectation(
    current, views, names, key, config, n_draws, tracker: Tracker | None = None
) -> dict[str, np.ndarray]:
    """Joint posterior draws `(n_draws, n, *shape)` of the observations of all `views`, per source."""
    found: dict[str, list[np.ndarray]] = {}
    say = (tracker or Silent()).progress
    for i, (obs, name) in enumerate(zip(views, names, strict=True)):
        draws = draw(
            current,
            obs,
            jax.random.fold_in(key, i),
            config,
            n_draws=n_draws,
            progress=lambda done, n, name=name: say(f"E-step {name}", done, n),
        )
        for source, x in draws.x.items():
            found.setdefault(source, []).append(x)
    return {source: np.concatenate(parts, axis=1) for source, parts in found.items()}


def _maximisation(current, samples, key, config, tracker) -> tuple[Denoisers, Metrics]:
    updated, metrics = {}, {}
    for i, (name, x) in enumerate(sorted(samples.items())):
        key_init, key_train = jax.random.split(jax.random.fold_in(key, 1000 + i))
        updated[name], loss = train_denoiser(
            with_network(current[name], key_init, config),
            x,
            key_train,
            config=config.diffusion,
            sigma_min=config.sampler.sigma_min,
            progress=lambda done, n, name=name: tracker.progress(f"M-step {name}", done, n),
        )
        metrics[f"loss_{name}"] = loss
    return updated, metrics


def with_network(denoiser: Denoiser, key: PRNGKeyArray, config: FitConfig) -> Preconditioned:
    """A mixture corrected by a fresh network; a denoiser that has a network already stays as it is."""
    if isinstance(denoiser, Preconditioned):
        return denoiser
    assert isinstance(denoiser, Mixture)
    c = config.diffusion
    make = eqx.filter_jit(lambda k: Mlp(denoiser.shape, c.width, c.depth, key=k))
    return Preconditioned(denoiser, make(key), covariance=c.covariance)


def draw(
    denoisers: Denoisers, obs: Observations, key: PRNGKeyArray, config: FitConfig, **kwargs: Any
) -> Draws:
    """Joint posterior draws: exact ones if every prior is a mixture, by the sampler of `config` if not."""
    s = config.sampler
    solver = choose_solver(obs, s.solver)
    exact = solver == "exact" and all(isinstance(denoisers[k], Mixture) for k in obs.sources)
    kwargs = {"batch_size": config.batch_size, **kwargs}
    return draw_posterior(
        denoisers,
        obs,
        key,
        sampler=None if exact else make_sampler(s, solver=solver),
        **({} if exact else {"solver": solver}),
        max_tuples=config.mixture.max_tuples if exact else s.max_tuples,
        **kwargs,
    )


def predictive_chi2(obs: Observations, draws: Draws) -> np.ndarray:
    """`rᵀ Σ⁻¹ r / M` of every draw, `(n_draws, n)`; 1 on average when the posterior is calibrated."""
    return np.stack(
        [_chi2(obs, {k: x[d] for k, x in draws.x.items()}) for d in range(len(draws.evidence))]
    )


@eqx.filter_jit
def _chi2(obs: Observations, x: dict[str, Any]) -> Any:
    rows, shared = split(obs)

    def one(row, x):
        chi2, count = whitened_chi2(eqx.combine(row, shared), x)
        return chi2 / jnp.maximum(count, 1)

    return jax.vmap(one)(rows, x)


def _scores(
    denoisers: Denoisers, data: Data, which: Sequence[int] | range, config: FitConfig
) -> Metrics:
    """χ² of held-out draws, and the PSNR of one draw where the truth is known."""
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 2)
    metrics: Metrics = {}
    for i in which:
        some = take(data.test[i], slice(0, config.diffusion.evidence_observations))
        draws = draw(denoisers, some, jax.random.fold_in(key, i), config)
        chi2 = predictive_chi2(some, draws)
        metrics[f"chi2_{data.names[i]}"] = float(np.mean(chi2))
        for name, x in draws.x.items():
            truth = data.truth[i].get(name)
            if truth is not None and np.ptp(truth) > 0:  # false for NaN too
                score = psnr(x[0], truth[: some.count], data_range=float(np.ptp(truth)))
                metrics[f"psnr_{name}_{data.names[i]}"] = score
    return metrics
