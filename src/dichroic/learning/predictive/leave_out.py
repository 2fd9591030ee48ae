"""Entries left out of observations, and what priors say of them given the entries that remain.

A fold leaves the same entries out of some of the observations, so that there are few patterns of missing entries;
over all folds each entry is left out once. With `A_k`, `A_o` the rows kept and left out, a draw of these is

    y_o = A_o x + Σ_ok Σ_kk⁻¹ (y_k − A_k x) + ε,   x ~ p(x | y_k),   ε ~ N(0, Σ_oo − Σ_ok Σ_kk⁻¹ Σ_ko),

so noise that is correlated is predicted too. Where all priors are mixtures the density of what was left out is
exact: `log p(y_o | y_k) = log p(y) − log p(y_k)`. Sources with bounds are drawn within them, of which the density
knows nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from dichroic.config import FitConfig
from dichroic.inference.sampling import draw
from dichroic.learning.mixture.em import log_evidences
from dichroic.learning.predictive.linear_predictor import BLOCK
from dichroic.learning.predictive.residuals import LeftOut
from dichroic.numerics.batching import take
from dichroic.numerics.deterministic_map import map_observations
from dichroic.numerics.finite import finite
from dichroic.operators.noise import Masked, observed_entries
from dichroic.priors import Denoiser, GaussianMixture
from dichroic.problem.observations import Observations

FOLDS = 5
PAIRED = 10  # entries, from which on neighbours are left out together
MOST_BLOCKS = 4  # of neighbouring entries, of which some are left out
_KEY = ""  # beside sources, whose names are not empty


@dataclass(frozen=True)
class Fold:
    """The observations with `numbers` `(n,)`, and what is left out of them: booleans `left` `(M,)`."""

    numbers: np.ndarray
    left: np.ndarray


def seen_of(obs: Observations) -> np.ndarray:
    """Booleans `(n, M)`: what was observed."""
    seen = np.asarray(observed_entries(obs.noise, obs.size)) > 0
    return np.broadcast_to(seen, (obs.count, obs.size))


def candidates(seen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The numbers of the entries that may be left out: all, or a few blocks of very many."""
    entries = np.flatnonzero(seen.any(axis=0))
    blocks = np.array_split(entries, -(-len(entries) // BLOCK))
    some = np.sort(rng.permutation(len(blocks))[:MOST_BLOCKS])
    return np.concatenate([blocks[i] for i in some])


def folds(count: int, size: int, entries: np.ndarray, rng: np.random.Generator) -> list[Fold]:
    """Folds of `count` observations of `size` entries, of which `entries` are left out; of equal sizes."""
    width = 2 if len(entries) >= PAIRED else 1
    units = np.array_split(entries, -(-len(entries) // width))
    n = min(FOLDS, len(units), count)
    which, out = rng.permutation(len(units)) % n, []
    for f in range(n):
        left = np.zeros(size, bool)
        left[np.concatenate([units[i] for i in np.flatnonzero(which == f)])] = True
        out.append(Fold(np.arange(f, count - count % n, n), left))
    return out


def predict(
    denoisers: Mapping[str, Denoiser],
    obs: Observations,
    fold: Fold,
    lines: np.ndarray,
    key: PRNGKeyArray,
    config: FitConfig,
    n_draws: int,
) -> tuple[LeftOut, np.ndarray] | None:
    """What is left out with `n_draws` of what it could be, and its log density `(n,)`; `None` if not finite.

    Entries with neighbouring numbers are neighbours if they have the same number in `lines` `(M,)`. The density is
    NaN unless all priors are mixtures.
    """
    some = take(obs, fold.numbers)
    masked = _without(some, fold.left)
    key_x, key_y = jax.random.split(key)
    used, entries = {k: denoisers[k] for k in obs.sources}, np.flatnonzero(fold.left)
    often = take(masked, np.tile(np.arange(masked.count), n_draws))  # of one draw each: one program
    x = draw(used, often, key_x, config).x
    draws = _completed(often, {k: v[0] for k, v in x.items()}, key_y)[:, entries]
    draws = draws.reshape(n_draws, masked.count, -1)
    density = _log_density(used, some, masked, config)
    if not (finite(draws) and finite(np.nan_to_num(density, nan=0.0, posinf=np.inf))):
        return None
    joined = (np.diff(entries) == 1) & (np.diff(lines[entries]) == 0)
    seen, y = seen_of(some)[:, entries], np.asarray(some.y, np.float64)[:, entries]
    return LeftOut(fold.numbers, entries, seen, y, draws.astype(np.float64), joined), density


def noise_deviations(obs: Observations) -> np.ndarray:
    """The standard deviation of the noise of each entry, `(n, M)`."""
    return map_observations(_deviations, obs, {_KEY: np.zeros(obs.count)}).astype(np.float64)


def _deviations(row: Observations, _: dict[str, Array]) -> Array:
    return jnp.sqrt(row.noise.variances(row.size))


def _without(obs: Observations, left: np.ndarray) -> Observations:
    """The observations with the entries `left` missing."""
    kept = np.where(left, 0.0, 1.0)
    y = np.where(left, 0, np.asarray(obs.y)).astype(np.asarray(obs.y).dtype)
    return Observations(y, obs.operators, Masked(obs.noise, kept))


def _log_density(
    used: Mapping[str, Denoiser], whole: Observations, masked: Observations, config: FitConfig
) -> np.ndarray:
    """`log p(y_o | y_k)` of each observation, NaN unless all priors are mixtures."""
    mixtures = {k: d for k, d in used.items() if isinstance(d, GaussianMixture)}
    if len(mixtures) < len(used):
        return np.full(whole.count, np.nan)
    alike = _without(whole, np.zeros(whole.size, bool))  # of the type of the other: one program
    both = [
        log_evidences(mixtures, obs, beam_width=config.mixture.beam_width)
        for obs in (alike, masked)
    ]
    left = seen_of(whole).sum(axis=1) - seen_of(masked).sum(axis=1)
    return both[0] - both[1] - 0.5 * left * np.log(2 * np.pi)  # of unit noise at 0, where missing


def _completed(masked: Observations, x: dict[str, np.ndarray], key: PRNGKeyArray) -> np.ndarray:
    """Whole observations `(n, M)`, drawn given sources `x` and the entries that are not masked."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(masked.count))
    return map_observations(_complete, masked, {**x, _KEY: np.asarray(jax.random.key_data(keys))})


def _complete(row: Observations, x: dict[str, Array]) -> Array:
    """One completed observation: a draw of noise, moved to what the entries that were kept leave of it."""
    masked = row.noise
    assert isinstance(masked, Masked)
    whole = Observations(row.y, row.operators, masked.noise)
    key = jax.random.wrap_key_data(x[_KEY])
    signal = whole.apply({k: x[k] for k in row.sources})
    noise = masked.noise.sample(key, row.size)
    std = jnp.sqrt(masked.variances(row.size))
    r = masked.observed(row.size) * (row.y - signal - noise) / std
    v, _ = jax.scipy.sparse.linalg.cg(lambda v: masked.mv(v / std) / std, r, maxiter=64)
    return signal + noise + masked.noise.mv(masked.observed(row.size) * v / std)
