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
from dichroic.lowrank_sample import is_low_rank_prior, low_rank_draws
from dichroic.mixture_em import is_large
from dichroic.observations import Observations, whitened_chi2
from dichroic.posterior import choose_solver
from dichroic.sample import LANES, Draws, draw_posterior, lanes_width, make_sampler

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


def predictive_chi2(obs: Observations, draws: Draws) -> np.ndarray:
    """`rᵀ Σ⁻¹ r / M` of every draw, `(n_draws, n)`; 1 on average when the posterior is calibrated.

    NaN for an observation of which nothing was observed: see `metrics.mean_chi2`.
    """
    return np.stack(
        [_chi2({k: x[d] for k, x in draws.x.items()}, obs) for d in range(len(draws.evidence))]
    )


def _chi2(x: dict[str, np.ndarray], obs: Observations) -> np.ndarray:
    """`rᵀ Σ⁻¹ r / M` of one draw of every observation, in lanes: none depends on how many others there are."""
    rows, shared = split(obs)
    n, out = obs.count, []
    width = lanes_width(n, _CHI2_BATCH)
    for start in range(0, n, width):
        some = np.minimum(np.arange(start, start + width), n - 1)
        cut = lambda a, some=some: a[some].reshape(-1, LANES, *a.shape[1:])
        out.append(np.asarray(_chi2_lanes(*jax.tree.map(cut, (rows, x)), shared)).ravel())
    return np.concatenate(out)[:n]


@eqx.filter_jit
def _chi2_lanes(rows: Observations, x: dict[str, Any], shared: Observations) -> Any:
    def one(row, x):
        chi2, count = whitened_chi2(eqx.combine(row, shared), x)
        return jnp.where(count > 0, chi2 / jnp.maximum(count, 1), jnp.nan)

    return jax.lax.map(lambda lanes: jax.vmap(one)(*lanes), (rows, x))
