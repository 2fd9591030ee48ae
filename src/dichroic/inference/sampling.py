"""Joint posterior draws by whatever sampler suits the priors, and how well they explain what was observed."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from dichroic.config import FitConfig
from dichroic.inference.constraints import bounded, of_others
from dichroic.inference.low_rank_sampling import is_low_rank_prior, low_rank_draws
from dichroic.inference.posterior import choose_solver, is_large
from dichroic.inference.samplers import Draws, Progress, make_sampler, sample_posterior
from dichroic.numerics.deterministic_map import map_observations
from dichroic.priors import Denoiser, DiffusionPrior, GaussianMixture
from dichroic.problem.observations import Observations, whitened_chi2

Denoisers = Mapping[str, Denoiser]
_AGAIN = 2**32 - 1  # where the numbers of second draws begin, backwards: far from any observation's


def draw(
    denoisers: Denoisers, obs: Observations, key: PRNGKeyArray, config: FitConfig, **kwargs: Any
) -> Draws:
    """Joint posterior draws: exact ones if every prior is a mixture, by the sampler of `config` if not.

    Those of sources with bounds are within them, and the others drawn anew given these: see
    `dichroic.inference.constraints`.
    """
    if not set(config.bounds) & set(obs.sources):
        return _free_draws(denoisers, obs, key, config, **kwargs)
    return _bounded_draws(denoisers, obs, key, config, **kwargs)


def _bounded_draws(
    denoisers: Denoisers,
    obs: Observations,
    key: PRNGKeyArray,
    config: FitConfig,
    *,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Draws:
    """Sources are moved within their bounds in the order of `config.bounds`, the rest drawn again after each."""
    known = [k for k in config.bounds if k in obs.sources]
    passes = min(len(known) + 1, len(obs.sources))
    draws = _free_draws(
        denoisers, obs, key, config, progress=partial(_part, progress, 0, passes), **kwargs
    )
    x = dict(draws.x)
    for i, name in enumerate(known, 1):
        x[name] = bounded(x[name], obs.operators[name], config.bounds[name])
        if i < passes:
            say = partial(_part, progress, i, passes)
            again = _draws_given(
                {k: x[k] for k in known[:i]}, denoisers, obs, key, config, say, **kwargs
            )
            x |= again.x
            draws = dataclasses.replace(
                draws,
                residual=np.maximum(draws.residual, again.residual),
                converged=np.minimum(draws.converged, again.converged),
                steps=draws.steps + again.steps,
            )
    return dataclasses.replace(draws, x=x)


def _draws_given(
    x: dict[str, np.ndarray],
    denoisers: Denoisers,
    obs: Observations,
    key: PRNGKeyArray,
    config: FitConfig,
    progress: Progress,
    **kwargs: Any,
) -> Draws:
    """A draw of the other sources for each draw of the sources `x`, `(n_draws, n, *shape)`."""
    n, first = kwargs.pop("n_draws", 1), kwargs.get("first_index", 0)
    again, found = jax.random.fold_in(key, _AGAIN - len(x)), []
    for i in range(n):
        others = of_others(obs, {k: a[i] for k, a in x.items()}, first)
        own = jax.random.fold_in(again, i)
        say = partial(_part, progress, i, n)
        found.append(_free_draws(denoisers, others, own, config, progress=say, **kwargs))
    return jax.tree.map(lambda *a: np.concatenate(a), *found)


def _part(progress: Progress | None, number: int, parts: int, done: int, count: int) -> None:
    """Say how far part `number` of `parts` is."""
    if progress:
        progress(number * count + done, parts * count)


def _free_draws(
    denoisers: Denoisers, obs: Observations, key: PRNGKeyArray, config: FitConfig, **kwargs: Any
) -> Draws:
    s, used = config.sampler, {k: denoisers[k] for k in obs.sources}
    mixtures = all(isinstance(d, GaussianMixture) for d in used.values())
    low_rank = all(map(is_low_rank_prior, used.values())) or (mixtures and is_large([obs]))
    if low_rank and (mixtures or s.name in ("auto", "ancestral")):
        kwargs.pop("batch_size", None)
        sampler = None if mixtures else make_sampler(s)
        known = {k: d for k, d in used.items() if isinstance(d, GaussianMixture | DiffusionPrior)}
        return low_rank_draws(known, obs, key, sampler=sampler, **kwargs)
    solver = choose_solver(obs, s.solver)
    exact = solver == "exact" and mixtures
    kwargs = {"batch_size": config.batch_size, **kwargs}
    return sample_posterior(
        used,
        obs,
        key,
        sampler=None if exact else make_sampler(s),
        **({} if exact else {"solver": solver}),
        beam_width=config.mixture.beam_width if exact else s.beam_width,
        **kwargs,
    )


def predictive_chi2(obs: Observations, draws: Draws, first_index: int = 0) -> np.ndarray:
    """`rᵀ Σ⁻¹ r / M` of every draw, `(n_draws, n)`; 1 on average when the posterior is calibrated.

    NaN for an observation of which nothing was observed: see `metrics.mean_chi2`. `first_index` is the global
    number of the first observation.
    """
    each = [{k: x[d] for k, x in draws.x.items()} for d in range(len(draws.evidence))]
    return np.stack([map_observations(_chi2, obs, x, first_index) for x in each])


def _chi2(obs: Observations, x: dict[str, Array]) -> Array:
    """`rᵀ Σ⁻¹ r / M` of one observation."""
    chi2, count = whitened_chi2(obs, x)
    return jnp.where(count > 0, chi2 / jnp.maximum(count, 1), jnp.nan)
