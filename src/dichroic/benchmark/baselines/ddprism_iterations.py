"""The iterations of DDPRISM as published: settings, draws of all observations, and what is learned from them.

An iteration is a pure function from one `State` to the next. Its draws come from the priors that the last
iteration learned; those with an entry beyond `±limit` are dropped or, with Gibbs sampling, replaced by the draws
of the iteration before.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from dichroic.benchmark.baselines.ddprism_sampling import (
    Absolute,
    PublishedGibbs,
    PublishedPredictorCorrector,
    Started,
)
from dichroic.benchmark.baselines.ddprism_training import (
    Training,
    network_denoiser,
    ppca,
    train,
    wide_gaussian,
)
from dichroic.errors import ConfigError, DataError
from dichroic.inference.samplers import Draws, Progress, sample_posterior
from dichroic.inference.sampling import Denoisers
from dichroic.operators import Shape
from dichroic.priors import Denoiser, DiffusionPrior
from dichroic.priors.schedule import Geometric
from dichroic.problem.observations import Observations
from dichroic.runtime.tracking import Tracker

Samples = dict[str, np.ndarray]


@dataclass(frozen=True)
class DdprismConfig:
    """The settings; by default those published for contrastive problems of one-dimensional manifolds.

    Noise levels and `limit` are in multiples of `unit`, the size of the sources (published: sources in
    [−2, 2] and `unit` 1).
    """

    sampling: Literal["joint", "gibbs"] = "joint"
    steps: int = 16384  # of the sampler
    gaussian_steps: int = 16384  # of the sampler, in the Gaussian iterations
    rounds: int = 64  # of Gibbs sampling, with `steps` sampler steps each
    tau: float = 0.1  # size of the Langevin corrections
    corrections: int = 1  # after each step
    cg_steps: int = 1
    ridge: float = 0.0  # added to the diagonal of C_y
    sigma_min: float = 1e-3
    sigma_max: float = 10.0
    gaussian_iterations: int = 16
    rank: int = 2  # of the Gaussians
    iterations: tuple[int, ...] = (
        16,
        32,
        64,
    )  # with networks, per group; the last for any later one
    training_steps: int = 65536  # of each iteration
    training_batch: int = 1024
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-6
    width: int = 256
    depth: int = 3
    time_features: int = 64
    limit: float = 4.0
    unit: float = 1.0
    batch_size: int = 1024  # observations sampled at once; changes no result

    def __post_init__(self) -> None:
        if self.sampling not in ("joint", "gibbs"):
            raise ConfigError(f"sampling: {self.sampling!r} is none of 'joint', 'gibbs'")
        object.__setattr__(self, "iterations", tuple(self.iterations))
        at_least_one = "steps gaussian_steps rounds cg_steps rank training_steps training_batch"
        for name in f"{at_least_one} width depth time_features batch_size".split():
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)!r}")
        for name in ("tau", "limit", "unit", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: must be positive, got {getattr(self, name)!r}")
        for name in ("ridge", "final_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: must not be negative, got {getattr(self, name)!r}")
        if (
            not self.iterations
            or min(self.iterations) < 0
            or self.gaussian_iterations < 1
            or self.corrections < 0
        ):
            raise ConfigError(
                "iterations: give one number or more, none negative, and one Gaussian iteration at least; got "
                f"iterations={self.iterations}, gaussian_iterations={self.gaussian_iterations}, "
                f"corrections={self.corrections}"
            )
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    @classmethod
    def published(
        cls,
        kind: Literal["contrastive", "mixed"] = "contrastive",
        sampling: Literal["joint", "gibbs"] = "joint",
    ) -> "DdprismConfig":
        """The published settings of one-dimensional manifolds: days on one processor."""
        if kind == "contrastive":
            if sampling == "gibbs":
                return cls(sampling=sampling, steps=256, gaussian_steps=256, tau=0.08)
            return cls(sampling=sampling)
        if kind != "mixed":
            raise ConfigError(f"published: {kind!r} is none of 'contrastive', 'mixed'")
        mixed = cls(
            sampling=sampling,
            gaussian_steps=32,
            tau=0.08,
            ridge=1e-3,
            sigma_min=5e-3,
            sigma_max=15.0,
            gaussian_iterations=8192,
            iterations=(128,),
            training_steps=32768,
            learning_rate=1e-4,
            final_learning_rate=1e-5,
            time_features=128,
        )
        gibbs = {
            "steps": 256,
            "rounds": 512,
            "tau": 0.1,
            "gaussian_iterations": 16,
            "iterations": (13,),
        }
        return dataclasses.replace(mixed, **gibbs) if sampling == "gibbs" else mixed

    @classmethod
    def small(cls, sampling: Literal["joint", "gibbs"] = "joint") -> "DdprismConfig":
        """The same algorithm scaled to minutes on two cores, for some ten thousand observations."""
        config = cls(
            sampling=sampling,
            steps=256,
            gaussian_steps=64,
            gaussian_iterations=8,
            iterations=(4, 8),
            training_steps=2000,
            training_batch=512,
            width=64,
        )
        gibbs = {"steps": 32, "gaussian_steps": 16, "rounds": 8, "tau": 0.08}
        return dataclasses.replace(config, **gibbs) if sampling == "gibbs" else config

    @property
    def training(self) -> Training:
        """What the training of a network needs."""
        return Training(
            self.training_steps,
            self.training_batch,
            self.learning_rate,
            self.final_learning_rate,
            self.sigma_min,
            self.sigma_max,
        )

    def diffusion_iterations(self, group: int) -> int:
        """The number of diffusion iterations of a group of sources."""
        return self.iterations[min(group, len(self.iterations) - 1)]


@dataclass(frozen=True)
class State:
    """All that a fit remembers between iterations; `samples` are the last draws of each view (Gibbs only)."""

    group: int = 0
    phase: str = "gaussian"  # gaussian, diffusion, done
    iteration: int = 0  # within the phase
    total: int = 0
    denoisers: Denoisers = dataclasses.field(default_factory=dict)
    samples: dict[int, Samples] = dataclasses.field(default_factory=dict)
    metrics: tuple[dict[str, Any], ...] = ()

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.phase == "done"


# The E-step


def make_sampler(config: DdprismConfig, steps: int) -> PublishedPredictorCorrector:
    """The published sampler with `steps` steps."""
    c = config
    schedule = Geometric(c.sigma_min, c.sigma_max)
    return PublishedPredictorCorrector(steps, schedule, c.corrections, c.tau, c.cg_steps, c.ridge)


def in_turn(obs: Observations, config: DdprismConfig) -> bool:
    """Whether the sources of these observations are drawn by Gibbs sampling; never a single one."""
    return config.sampling == "gibbs" and len(obs.sources) > 1


def alone_steps(config: DdprismConfig, steps: int) -> int:
    """The sampler steps of a single source: those of all rounds together."""
    return steps * (config.rounds if config.sampling == "gibbs" else 1)


def draw(
    denoisers: Mapping[str, Denoiser],
    obs: Observations,
    key: PRNGKeyArray,
    config: DdprismConfig,
    steps: int,
    **options: Any,
) -> Draws:
    """Draws by the published sampler: joint ones, or Gibbs with `rounds` rounds of `steps` steps.

    Observations of a single source are drawn with as many steps as all rounds together have.
    """
    known: dict[str, Denoiser] = {k: Absolute(denoisers[k], config.unit) for k in obs.sources}
    sampler: Any = make_sampler(config, alone_steps(config, steps))
    if in_turn(obs, config):
        sampler = PublishedGibbs(make_sampler(config, steps), config.rounds)
    options = {"batch_size": config.batch_size, **options}
    return sample_posterior(known, obs, key, sampler=sampler, **options)


def in_range(x: Samples, limit: float) -> np.ndarray:
    """True for the observations whose draws `{name: (n, *shape)}` all lie within `±limit`; not for NaN."""
    largest = [np.abs(a).reshape(len(a), -1).max(axis=1) for a in x.values()]
    return np.all([a < limit for a in largest], axis=0)


def expectation(
    denoisers: Denoisers,
    obs: Observations,
    key: PRNGKeyArray,
    config: DdprismConfig,
    steps: int,
    *,
    last: Samples | None = None,
    progress: Progress | None = None,
) -> tuple[Samples, np.ndarray]:
    """`(draws to learn from, which draws were in range)`; `last` are the last iteration's (Gibbs, else zeros)."""
    gibbs = in_turn(obs, config)
    if gibbs:
        last = last or _zeros(obs)
        start = {k: jnp.asarray(x, float) for k, x in last.items()}
        obs = Started(obs.y, obs.operators, obs.noise, start)
    draws = draw(denoisers, obs, key, config, steps, progress=progress)
    x = {k: a[0] for k, a in draws.x.items()}
    good = in_range(x, config.limit * config.unit)
    if gibbs and last:
        keep = lambda new, old: np.where(good.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        return {k: keep(a, last[k]) for k, a in x.items()}, good
    return {k: a[good] for k, a in x.items()}, good


def _zeros(obs: Observations) -> Samples:
    shapes = {k: op.in_shape for k, op in obs.operators.items()}
    return {k: np.zeros((obs.count, *shape), np.float32) for k, shape in shapes.items()}


# Iterations


def advance(
    state: State,
    data: Sequence[Observations],
    order: Sequence[Sequence[str]],
    seed: int,
    config: DdprismConfig,
    tracker: Tracker,
) -> State:
    """One iteration: draws with what is known, and what is learned from them."""
    began, names = time.perf_counter(), order[state.group]
    views = views_of_group(state.group, data, order)
    key = jax.random.fold_in(jax.random.key(seed), state.total)
    if state.phase == "gaussian" and state.iteration == 0:
        state = dataclasses.replace(
            state, denoisers={**state.denoisers, **_start(names, views, config)}
        )
    label = f"{'+'.join(names)}, {state.phase} iteration {state.iteration + 1}"
    samples, good = _draw_views(state, views, key, config, tracker, label)
    learned, losses = _learn(state, names, samples, views, key, config, tracker, label)
    metrics = {
        "iteration": state.total + 1,
        "phase": state.phase,
        "sources": "+".join(names),
        "out_of_range": 1 - float(np.mean(np.concatenate(good))),
        **losses,
        "seconds": round(time.perf_counter() - began, 3),
    }
    state = dataclasses.replace(
        state,
        iteration=state.iteration + 1,
        total=state.total + 1,
        denoisers={**state.denoisers, **learned},
        samples={i: x for i, x in samples.items() if in_turn(views[i], config)},
        metrics=(*state.metrics, metrics),
    )
    return _next(state, len(order), config)


def views_of_group(
    group: int, data: Sequence[Observations], order: Sequence[Sequence[str]]
) -> dict[int, Observations]:
    """The views that a group of sources is learned from: they see some of it, and nothing later."""
    names = set(order[group])
    usable = names.union(*order[:group])
    return {i: o for i, o in enumerate(data) if names & set(o.sources) and set(o.sources) <= usable}


def _start(
    names: Sequence[str], views: Mapping[int, Observations], config: DdprismConfig
) -> Denoisers:
    shapes = {k: op.in_shape for o in views.values() for k, op in o.operators.items()}
    return {k: wide_gaussian(shapes[k], rank=config.rank, unit=config.unit) for k in names}


def _draw_views(
    state: State,
    views: Mapping[int, Observations],
    key: PRNGKeyArray,
    config: DdprismConfig,
    tracker: Tracker,
    label: str,
) -> tuple[dict[int, Samples], list[np.ndarray]]:
    """The draws of every view, and which were in range."""
    steps = config.gaussian_steps if state.phase == "gaussian" else config.steps
    samples: dict[int, Samples] = {}
    good: list[np.ndarray] = []
    for i, obs in views.items():
        samples[i], ok = expectation(
            state.denoisers,
            obs,
            jax.random.fold_in(key, i),
            config,
            steps,
            last=state.samples.get(i),
            progress=lambda done, n: tracker.progress(f"E-step of {label}", done, n),
        )
        good.append(ok)
    return samples, good


def _learn(
    state: State,
    names: Sequence[str],
    samples: Mapping[int, Samples],
    views: Mapping[int, Observations],
    key: PRNGKeyArray,
    config: DdprismConfig,
    tracker: Tracker,
    label: str,
) -> tuple[dict[str, Denoiser], dict[str, float]]:
    """The new denoisers of the group, and the losses of their training."""
    learned: dict[str, Denoiser] = {}
    losses: dict[str, float] = {}
    for j, name in enumerate(names):
        x = _pool(samples, name, config)
        if state.phase == "gaussian":
            learned[name] = ppca(x, rank=config.rank)
            continue
        key_fresh, key_train = jax.random.split(jax.random.fold_in(key, 1000 + j))
        denoiser = state.denoisers[name]
        if not isinstance(denoiser, DiffusionPrior):
            denoiser = fresh_network(denoiser.shape, key_fresh, config)
        learned[name], losses[f"loss_{name}"] = train(
            denoiser,
            x,
            key_train,
            config=config.training,
            room=sum(o.count for o in views.values() if name in o.sources),
            progress=lambda done, n: tracker.progress(f"M-step of {label}", done, n),
        )
    return learned, losses


def _pool(samples: Mapping[int, Samples], name: str, config: DdprismConfig) -> np.ndarray:
    """The draws of `name` from all views."""
    found = np.concatenate([x[name] for x in samples.values() if name in x])
    if len(found) < 2:
        raise DataError(
            f"source {name!r}: no draws within ±{config.limit * config.unit:g} are left to learn from; "
            "set `unit` to the size of the sources, or `limit`"
        )
    return found


def fresh_network(shape: Shape, key: PRNGKeyArray, config: DdprismConfig) -> DiffusionPrior:
    """A denoiser with a network that knows nothing yet."""
    c = config
    return network_denoiser(
        shape, key, width=c.width, depth=c.depth, time_features=c.time_features, unit=c.unit
    )


def _next(state: State, groups: int, config: DdprismConfig) -> State:
    """Where the next iteration starts."""
    diffusion = config.diffusion_iterations(state.group)
    if state.iteration < (config.gaussian_iterations if state.phase == "gaussian" else diffusion):
        return state
    if state.phase == "gaussian" and diffusion:
        return dataclasses.replace(state, phase="diffusion", iteration=0)
    phase = "gaussian" if state.group + 1 < groups else "done"
    return dataclasses.replace(state, phase=phase, iteration=0, group=state.group + 1, samples={})
