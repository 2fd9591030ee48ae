"""Joint posterior draws by whatever sampler suits the priors, and how well they explain what was observed."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from dichroic.batching import split
from dichroic.config import FitConfig
from dichroic.denoise import Denoiser, Mixture
from dichroic.lanes import in_lanes, own_lanes
from dichroic.lowrank_sample import is_low_rank_prior, low_rank_draws
from dichroic.mixture_em import is_large
from dichroic.observations import Observations, whitened_chi2
from dichroic.posterior import choose_solver
from dichroic.sample import Draws, draw_posterior, make_sampler

Denoisers = dict[str, Denoiser]
_CHI2_BATCH = 1024


def draw(
    denoisers: Denoisers, obs: Observations, key: PRNGKeyArray, config: FitConfig, **kwargs: Any
) -> Draws:
    """Joint posterior draws: exact ones if every prior is a mixture, by the sampler of `config` if not."""
    s, used = config.sampler, {k: denoisers[k] for k in obs.sources}
    mixtures = all(isinstance(d, Mixture) for d in used.values())
    low_rank = all(map(is_low_rank_prior, used.values())) or (mixtures and is_large([obs]))
    if low_rank and (mixtures or s.name in ("auto", "ancestral")):
        kwargs.pop("batch_size", None)
        sampler = None if mixtures else make_sampler(s)
        return low_rank_draws(used, obs, key, sampler=sampler, **kwargs)
    solver = choose_solver(obs, s.solver)
    exact = solver == "exact" and mixtures
    kwargs = {"batch_size": config.batch_size, **kwargs}
    return draw_posterior(
        denoisers,
        obs,
        key,
        sampler=None if exact else make_sampler(s),
        **({} if exact else {"solver": solver}),
        max_tuples=config.mixture.max_tuples if exact else s.max_tuples,
        **kwargs,
    )


def predictive_chi2(obs: Observations, draws: Draws, first_index: int = 0) -> np.ndarray:
    """`rᵀ Σ⁻¹ r / M` of every draw, `(n_draws, n)`; 1 on average when the posterior is calibrated.

    NaN for an observation of which nothing was observed: see `metrics.mean_chi2`. `first_index` is the global
    number of the first observation.
    """
    each = [{k: x[d] for k, x in draws.x.items()} for d in range(len(draws.evidence))]
    return np.stack([_chi2(x, obs, first_index) for x in each])


def _chi2(x: dict[str, np.ndarray], obs: Observations, first_index: int) -> np.ndarray:
    """`rᵀ Σ⁻¹ r / M` of one draw of every observation, in lanes: none depends on how many others there are."""
    rows, shared = split(obs)
    cuts = in_lanes((rows, x), _CHI2_BATCH, first_index)
    found = [np.asarray(_chi2_lanes(*cut, shared)).ravel() for _, cut, _ in cuts]
    return np.concatenate(found)[own_lanes(obs.count, first_index)]


@eqx.filter_jit
def _chi2_lanes(rows: Observations, x: dict[str, Any], shared: Observations) -> Any:
    def one(row, x):
        chi2, count = whitened_chi2(eqx.combine(row, shared), x)
        return jnp.where(count > 0, chi2 / jnp.maximum(count, 1), jnp.nan)

    return jax.lax.map(lambda lanes: jax.vmap(one)(*lanes), (rows, x))
