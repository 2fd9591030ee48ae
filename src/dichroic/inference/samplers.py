"""Samplers: from noise to a draw, for the prior and the posterior alike.

A sampler walks down the noise levels `σ_0 > σ_1 > … > σ_N` with a denoiser `D`:

    ancestral  x ← x₀ + (σ_s² / σ_t²) (x − x₀) + σ_s √(1 − σ_s² / σ_t²) z,  x₀ ~ p(x | x_t, y)
    DDPM   x ← D + (σ_s² / σ_t²) (x − D) + σ_s √(1 − σ_s² / σ_t²) z       (arXiv 2006.11239)
    DDIM   x ← D + (σ_s / σ_t) (x − D)                                  (arXiv 2010.02502)
    Heun   second-order steps of dx/dσ = (x − D) / σ                    (EDM, arXiv 2206.00364)
    PC     a DDPM step, then Langevin corrections at the new level      (arXiv 2011.13456)

and ends with `D(x, σ_N)`. Levels are relative to each source's scale. An observation's random numbers
come from its global index, and observations are computed in batches of a fixed width, in the slot that
its index says, because XLA does not round alike in all of them; so a draw does not depend on how many others are
computed with it.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dichroic.config import SamplerConfig
from dichroic.inference.posterior import (
    Denoise,
    Estimate,
    Posterior,
    Prior,
    SolverStats,
    Sources,
    build_posterior,
)
from dichroic.numerics.deterministic_map import BATCH_WIDTH, chunk_size, chunks, own_slots
from dichroic.priors import Denoiser, GaussianMixture
from dichroic.priors.schedule import Geometric, Karras, Schedule
from dichroic.problem.observations import Observations
from dichroic.runtime import distributed


def noise_like(key: PRNGKeyArray, x: Sources) -> Sources:
    """Standard normal arrays shaped as the leaves of `x`."""
    leaves, treedef = jax.tree.flatten(x)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef, [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    )


class Sampler(eqx.Module):
    """Walks `steps` steps down `schedule`; subclasses define one step."""

    steps: int = eqx.field(static=True, default=64)
    schedule: Schedule = Geometric()

    @abstractmethod
    def step(
        self,
        denoise: Denoise,
        x: Sources,
        key: PRNGKeyArray,
        here: Sources,
        there: Sources,
        guess: Array | None,
    ) -> tuple[Sources, Estimate]:
        """From the noise levels `here` to the lower `there`; also the estimate made at `here`.

        `guess` is the `dual` of the step before; that of the estimate is the guess of the next.
        """

    def last(
        self, denoise: Denoise, x: Sources, key: PRNGKeyArray, here: Sources, guess: Array | None
    ) -> Estimate:
        """The end of the walk at the lowest level `here`."""
        return denoise(x, here, guess)

    def draw(
        self, denoisers: dict[str, Denoiser], obs: Observations, key: PRNGKeyArray, **options: Any
    ) -> "Draw":
        """One joint draw of the sources of one observation; `options` of `build_posterior`."""
        return walk(self, build_posterior(denoisers, obs, **options), denoisers, key)


def _bridge(x: Array, d: Array, z: Array, t: Array, s: Array):
    r = (s / t) ** 2
    return d + r * (x - d) + s * jnp.sqrt(1 - r) * z


class AncestralSampler(Sampler):
    """The reverse chain itself: a draw of `x` given `x_t`, then the bridge to the next level.

    The draw uses the covariance of the estimate and not only its mean, so the chain is exact for
    Gaussian and mixture priors at any number of steps where the solve is exact. With conjugate gradients a
    mixture given `x_t` counts as one Gaussian, and roots of Jacobians are approximate: a few steps are still
    enough (`benchmarks/high_dimensional.py`).
    """

    def step(
        self,
        denoise: Denoise,
        x: Sources,
        key: PRNGKeyArray,
        here: Sources,
        there: Sources,
        guess: Array | None,
    ):
        a, b = jax.random.split(key)
        e = denoise.draw(x, here, a)
        return jax.tree.map(_bridge, x, e.mean, noise_like(b, x), here, there), e

    def last(
        self, denoise: Denoise, x: Sources, key: PRNGKeyArray, here: Sources, guess: Array | None
    ):
        return denoise.draw(x, here, key)


class DDPM(Sampler):
    """Ancestral sampling with the mean of `x` given `x_t` in place of a draw."""

    def step(
        self,
        denoise: Denoise,
        x: Sources,
        key: PRNGKeyArray,
        here: Sources,
        there: Sources,
        guess: Array | None,
    ):
        e = denoise(x, here, guess)
        return jax.tree.map(_bridge, x, e.mean, noise_like(key, x), here, there), e


class DDIM(Sampler):
    """Deterministic steps of the probability-flow equation."""

    def step(
        self,
        denoise: Denoise,
        x: Sources,
        key: PRNGKeyArray,
        here: Sources,
        there: Sources,
        guess: Array | None,
    ):
        e = denoise(x, here, guess)
        move = lambda x, d, t, s: d + s / t * (x - d)
        return jax.tree.map(move, x, e.mean, here, there), e


class Heun(Sampler):
    """Deterministic second-order steps: two evaluations of the denoiser each."""

    def step(
        self,
        denoise: Denoise,
        x: Sources,
        key: PRNGKeyArray,
        here: Sources,
        there: Sources,
        guess: Array | None,
    ):
        e = denoise(x, here, guess)
        slope = jax.tree.map(lambda x, d, t: (x - d) / t, x, e.mean, here)
        euler = jax.tree.map(lambda x, g, t, s: x + (s - t) * g, x, slope, here, there)
        e2 = denoise(euler, there, e.dual)
        slope2 = jax.tree.map(lambda x, d, s: (x - d) / s, euler, e2.mean, there)
        move = lambda x, g, h, t, s: x + 0.5 * (s - t) * (g + h)
        return jax.tree.map(move, x, slope, slope2, here, there), _after(e, e2)


class PredictorCorrector(Sampler):
    """A DDPM step, then `corrections` Langevin steps of size `(snr · σ)²` at the new level."""

    corrections: int = eqx.field(static=True, default=1)
    snr: float = eqx.field(static=True, default=0.2)

    def step(
        self,
        denoise: Denoise,
        x: Sources,
        key: PRNGKeyArray,
        here: Sources,
        there: Sources,
        guess: Array | None,
    ):
        x, e = DDPM.step(self, denoise, x, jax.random.fold_in(key, 0), here, there, guess)  # type: ignore[arg-type]
        for i in range(self.corrections):
            corrected = denoise(x, there, e.dual)
            e, d = _after(e, corrected), corrected.mean
            z = noise_like(jax.random.fold_in(key, i + 1), x)
            move = lambda x, d, z, s: x + self.snr**2 * (d - x) + jnp.sqrt(2.0) * self.snr * s * z
            x = jax.tree.map(move, x, d, z, there)
        return x, e


def _after(first: Estimate, then: Estimate) -> Estimate:
    """`first`, with the effort of both and the dual of the one that came `then`."""
    return dataclasses.replace(first, effort=first.effort + then.effort, dual=then.dual)


class Draw(eqx.Module):
    """One draw of all sources, with what the sampler saw on its way.

    `evidence` is a lower bound of `log p(y)` along the path (see `walk`); `residual` is the largest
    relative residual of the solves, `converged` the fraction of them that converged, and `steps` those of
    conjugate gradients of all of them.
    """

    x: Sources
    evidence: Float[Array, ""]
    residual: Float[Array, ""]
    converged: Float[Array, ""]
    steps: Int[Array, ""]

    @classmethod
    def of(cls, x: Sources, evidence: Float[Array, ""], effort: SolverStats) -> "Draw":
        """`x` with the `effort` of its solves, of which there is one at least."""
        converged = effort.converged / effort.solves
        return cls(x, evidence, effort.residual, converged, effort.steps)


def walk(
    sampler: Sampler, denoise: Denoise, denoisers: dict[str, Denoiser], key: PRNGKeyArray
) -> Draw:
    """One draw by `sampler` with `denoise`, from noise about each prior's mean.

    With DDPM steps the path of the posterior differs from that of the prior by its drift only, so

        log p(y) ≥ E[ log p(y | x_N) − Σ_t ½ ‖D(x_t; y) − D(x_t)‖² (1/σ_s² − 1/σ_t²) ],

    the evidence lower bound of the discrete diffusion; its value on this path is `evidence`.
    """
    scales = {k: d.scale for k, d in denoisers.items()}
    levels = sampler.schedule.grid(sampler.steps)
    at = lambda level: {k: s * level for k, s in scales.items()}
    key_start, key_path = jax.random.split(key)
    z = noise_like(key_start, {k: jnp.zeros(d.shape) for k, d in denoisers.items()})
    start = {
        k: d.location + scales[k] * jnp.sqrt(1 + levels[0] ** 2) * z[k]
        for k, d in denoisers.items()
    }

    def body(carry: tuple[Sources, Array, SolverStats, Array | None], i: Array):
        x, cost, effort, guess = carry
        here, there = at(levels[i]), at(levels[i + 1])
        x, e = sampler.step(denoise, x, jax.random.fold_in(key_path, i), here, there, guess)
        gap = lambda a, b, t, s: 0.5 * jnp.sum((a - b) ** 2) * (1 / s**2 - 1 / t**2)
        cost += sum(jax.tree.leaves(jax.tree.map(gap, e.mean, e.prior, here, there)))
        return (x, cost, effort + e.effort, e.dual), None

    first = start, jnp.zeros(()), SolverStats.none(), denoise.first_guess()
    (x, cost, effort, guess), _ = jax.lax.scan(body, first, jnp.arange(sampler.steps))
    key_last = jax.random.fold_in(key_path, sampler.steps)
    last = sampler.last(denoise, x, key_last, at(levels[-1]), guess)
    return Draw.of(last.mean, last.log_evidence - cost, effort + last.effort)


class Draws(eqx.Module):
    """Draws of every source: `x[name]` is `(n_draws, n, *shape)`; the others `(n_draws, n)`."""

    x: dict[str, np.ndarray]
    evidence: np.ndarray
    residual: np.ndarray
    converged: np.ndarray
    steps: np.ndarray


Progress = Callable[[int, int], None]


def observation_keys(key: PRNGKeyArray, draw: Array, index: Int[Array, "*n"]) -> Array:
    """The key of draw number `draw` of the observations with the global numbers `index`."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(index.ravel())
    return jax.vmap(lambda k: jax.random.fold_in(k, draw))(keys).reshape(index.shape)


class ExactSampler(eqx.Module):
    """Draws without diffusion, exact where every prior is a mixture of Gaussians."""

    def draw(
        self, denoisers: dict[str, Denoiser], obs: Observations, key: PRNGKeyArray, **options: Any
    ) -> Draw:
        """One joint draw of the sources of one observation."""
        x = Posterior(denoisers, obs, **options).draw_without_path(key)
        return Draw.of(x, jnp.zeros(()), SolverStats.one())


class GibbsSampler(eqx.Module):
    """One source at a time given the others' current draws, the residual as its observation.

    Kept for comparison: sources mix slowly where the observation ties them (arXiv 2510.05205, section
    3). `sampler` draws each source, `ExactSampler()` for mixture priors; the first sweep starts from the
    prior means.
    """

    sampler: "Sampler | ExactSampler"
    sweeps: int = eqx.field(static=True, default=16)

    def start(self, denoisers: dict[str, Denoiser], obs: Observations) -> Sources:
        """Where the first sweep starts: the prior means."""
        return {k: denoisers[k].location for k in obs.sources}

    def draw(
        self, denoisers: dict[str, Denoiser], obs: Observations, key: PRNGKeyArray, **options: Any
    ) -> Draw:
        """One draw of all sources of one observation after `sweeps` sweeps."""
        names = obs.sources
        x = self.start(denoisers, obs)

        def sweep(carry: tuple[Sources, SolverStats], i: Int[Array, ""]):
            x, effort = carry
            for j, name in enumerate(names):
                others = obs.apply({**x, name: jnp.zeros_like(x[name])})
                alone = Observations(obs.y - others, {name: obs.operators[name]}, obs.noise)
                k = jax.random.fold_in(jax.random.fold_in(key, i), j)
                new = self.sampler.draw({name: denoisers[name]}, alone, k, **options)
                x = {**x, **new.x}
                effort += SolverStats.one(new.converged == 1, new.residual, new.steps)
            return (x, effort), None

        (x, effort), _ = jax.lax.scan(sweep, (x, SolverStats.none()), jnp.arange(self.sweeps))
        return Draw.of(x, jnp.zeros(()), effort)


def sample_posterior(
    denoisers: dict[str, Denoiser],
    observations: Observations,
    key: PRNGKeyArray,
    *,
    sampler: Sampler | ExactSampler | GibbsSampler | None = None,
    n_draws: int = 1,
    batch_size: int = 1024,
    first_index: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Draws:
    """Joint posterior draws of all sources of every observation.

    Without a `sampler` the draws are `ExactSampler`, which needs every prior to be a mixture. `batch_size`
    (rounded up to batches of 64) bounds memory and changes no draw; `first_index` is the global number of
    the first observation. `options` go to `dichroic.inference.posterior.build_posterior`.
    """
    denoisers = {k: denoisers[k] for k in observations.sources}
    n = observations.count
    parts = []
    for d in range(n_draws):
        for start, (rows, shared), index in chunks(observations, batch_size, first_index):
            keys = observation_keys(key, jnp.asarray(d), index)
            given = denoisers, shared, sampler or ExactSampler(), options
            out = distributed.map_over_devices(
                _draw_batches, given, (rows, keys), compiled=bool(parts)
            )
            parts.append(jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:]), out))
            if progress:
                progress(d * n + min(start + index.size, n), n * n_draws)
    return _gather(parts, n_draws, own_slots(n, first_index))


AnySampler = Sampler | ExactSampler | GibbsSampler


@eqx.filter_jit
def _draw_batches(
    shared: tuple[dict[str, Denoiser], Observations, AnySampler, dict[str, Any]],
    rows: tuple[Observations, Array],
) -> Draw:
    """One draw of each observation, in batches."""
    denoisers, observed, sampler, options = shared

    def one(row: Observations, key: PRNGKeyArray) -> Draw:
        return sampler.draw(denoisers, eqx.combine(row, observed), key, **options)

    return jax.lax.map(lambda group: jax.vmap(one)(*group), rows)


def _gather(parts: list[Draw], n_draws: int, own: slice) -> Draws:
    per_draw = len(parts) // n_draws
    whole = [
        jax.tree.map(lambda *a: np.concatenate(a)[own], *parts[i * per_draw : (i + 1) * per_draw])
        for i in range(n_draws)
    ]
    stacked = jax.tree.map(lambda *a: np.stack(a), *whole)
    rest = stacked.evidence, stacked.residual, stacked.converged, stacked.steps
    return Draws(stacked.x, *rest)


def sample_prior(
    denoiser: Denoiser,
    n: int,
    key: PRNGKeyArray,
    *,
    sampler: Sampler | None = None,
    batch_size: int = 1024,
) -> Float[np.ndarray, "n *shape"]:
    """`n` draws from one source's prior; without a `sampler`, exact ones (mixtures only)."""
    width = chunk_size(n, batch_size)
    out = []
    for start in range(0, n, width):
        index = jnp.arange(start, start + width).reshape(-1, BATCH_WIDTH)
        x = _prior_batches(denoiser, observation_keys(key, jnp.zeros((), int), index), sampler)
        out.append(np.asarray(x).reshape(-1, *x.shape[2:]))
    return np.concatenate(out)[:n]


@eqx.filter_jit
def _prior_batches(denoiser: Denoiser, keys: Array, sampler: Sampler | None) -> Array:
    def one(key: PRNGKeyArray) -> Array:
        if sampler is None:
            assert isinstance(denoiser, GaussianMixture)
            return denoiser.sample(key)
        return walk(sampler, Prior({"x": denoiser}), {"x": denoiser}, key).x["x"]

    return jax.lax.map(jax.vmap(one), keys)


SAMPLERS = {
    "ancestral": AncestralSampler,
    "ddpm": DDPM,
    "ddim": DDIM,
    "heun": Heun,
    "predictor-corrector": PredictorCorrector,
}
SCHEDULES = {"geometric": Geometric, "karras": Karras}


def make_sampler(config: SamplerConfig, *, auto: str = "ancestral") -> Sampler:
    """The sampler that `config` describes, where `"auto"` stands for the sampler `auto`.

    For the posterior that is the ancestral one, with either solve: with networks of 784 entries it needs a
    fifth of the evaluations of Heun's, at a better calibration (`benchmarks/high_dimensional.py`).
    """
    schedule = SCHEDULES[config.schedule](config.sigma_min, config.sigma_max)
    return SAMPLERS[auto if config.name == "auto" else config.name](config.steps, schedule)
