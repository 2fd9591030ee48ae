"""Expectation-maximisation of mixtures of Gaussians seen only through noisy, incomplete mixtures.

A step is an E-step (`dichroic.learning.mixture.statistics`) and an M-step (`dichroic.learning.mixture.m_step`);
one that lowers the evidence is taken back, for a standard step, which cannot.

Components are grown by splitting: each becomes two, apart along its principal axis. That converges
far faster than a random start of all of them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from dichroic.config import MixtureConfig
from dichroic.inference.evidence import DEFAULT_BEAM_WIDTH, best_assignments, log_evidence, project
from dichroic.inference.low_rank_background import low_rank_log_evidence
from dichroic.inference.posterior import is_large
from dichroic.learning.mixture.low_rank_em import low_rank_iteration
from dichroic.learning.mixture.m_step import (
    MOST_MEANS,
    Mixtures,
    joint_shifts,
    maximise,
    monotone_em,
)
from dichroic.learning.mixture.statistics import Statistics, chunks, pairs, view_statistics
from dichroic.learning.mixture.statistics_shared import shared_log_evidence, shared_statistics
from dichroic.numerics.batching import split
from dichroic.priors import GaussianMixture
from dichroic.priors.components import Components
from dichroic.problem.batches import AnyObservations, every_block
from dichroic.problem.observations import Observations, is_shared
from dichroic.runtime import distributed
from dichroic.runtime.tracking import Clock

# Assignments (n, T, sources) of each observation; None where a view is one mixture, see
# `dichroic.learning.mixture.statistics_shared`.
Chosen = Integer[Array | np.ndarray, "_ _ _"] | None
_MOST_SHARED = 4096  # assignments of a mixture that all observations share, all of which are kept


def em_iteration(
    mixtures: Mixtures,
    views: Sequence[AnyObservations],
    names: Sequence[str],
    config: MixtureConfig,
    clock: Clock | None = None,
    shrinkage: Mapping[str, float] = MappingProxyType({}),
) -> tuple[Mixtures, float]:
    """`config.steps` EM steps of the sources `names` on the assignments that matter at the start of the iteration.

    Returns all mixtures, and the mean log evidence before the last step. `shrinkage` is the strength of the prior
    on the components of each source, in pseudo-observations (`dichroic.learning.mixture.m_step`). Sources of low
    rank have an EM of their own: `dichroic.learning.mixture.low_rank_em`.
    """
    if any(is_low_rank(mixtures, obs) for obs in views):
        return low_rank_iteration(mixtures, views, names, config, clock)
    clock = clock or Clock()
    with clock.during("e_step"):
        chosen = [choose(mixtures, obs, config) for obs in every_block(views)]
    share = max(len(set(names) & set(obs.sources)) for obs in views)
    free = [n for n in names if not mixtures[n].stationary]  # of whose means each number is
    coupled = free if sum(mixtures[n].means.size for n in free) <= MOST_MEANS else ()

    def evaluate(mixtures: Mixtures) -> tuple[float, Statistics]:
        own = partial(statistics, mixtures, every_block(views), chosen, coupled)
        found = views[0].total(own)
        return float(found.log_evidence), found

    def update(mixtures: Mixtures, found: Statistics, standard: bool) -> Mixtures:
        together = found.cross and not standard
        shifts = joint_shifts(mixtures, found, free, shrinkage) if together else {}

        def new(name: str) -> GaussianMixture:
            floor = config.floor * float(mixtures[name].scale) ** 2
            return maximise(
                mixtures[name],
                found.sums[name],
                floor=floor,
                shrinkage=shrinkage.get(name, 0.0),
                shift=shifts.get(name),
                damping=1 / share,
                standard=standard,
            )

        return {**mixtures, **{n: new(n) for n in names}}

    # With a prior on components a step raises the evidence and that prior together, not the evidence alone.
    pulled = any(shrinkage.get(n) and mixtures[n].log_weights.size > 1 for n in names)
    tolerance = math.inf if pulled else 1e-6
    mixtures, value = monotone_em(
        mixtures, evaluate, update, steps=config.steps, tolerance=tolerance, clock=clock
    )
    return mixtures, value / sum(obs.count for obs in views)


def choose(mixtures: Mixtures, obs: Observations, config: MixtureConfig) -> Chosen:
    """The most probable assignments of components of each observation, `config.active_assignments` for a pair.

    And as many again for every further source: there are then more ways to explain an observation.
    """
    priors = {k: mixtures[k].prior() for k in obs.sources}
    if _one_mixture(priors, obs):
        return None
    index = np.asarray(active_assignments(priors, obs, config))
    return index.astype(np.min_scalar_type(int(index.max())))  # there may be many observations


def active_assignments(
    priors: dict[str, Components], obs: Observations, config: MixtureConfig
) -> Int[Array, "n T sources"]:
    """The assignments that `choose` speaks of, of any view."""
    pairs = max(1, sum(c.log_weights.size > 1 for c in priors.values()) - 1)
    return _view_assignments(priors, obs, config.beam_width, pairs * config.active_assignments)


def statistics(
    mixtures: Mixtures,
    blocks: Iterable[Observations],
    chosen: Sequence[Chosen],
    together: Sequence[str] = (),
) -> Statistics:
    """The E-step over all `blocks`, on the assignments `chosen` for the observations of each, in float64.

    With the sums that couple the sources that are learned `together`.
    """
    total: Statistics | None = None
    for obs, index in zip(blocks, chosen, strict=True):
        priors = {k: mixtures[k].prior() for k in obs.sources}
        coupled = pairs(together, obs.sources)
        if index is None:
            found = shared_statistics(priors, obs, coupled)
        else:
            found = view_statistics(priors, obs, jnp.asarray(index, int), coupled)
        found = jax.tree.map(lambda a: np.asarray(a, np.float64), found)
        total = found if total is None else total + found
    assert total is not None
    return total


def mean_log_evidence(
    mixtures: Mixtures, views: Sequence[AnyObservations], *, beam_width: int = DEFAULT_BEAM_WIDTH
) -> float:
    """The mean of `log p(y)` over all observations of `views`."""
    own = lambda: sum(
        float(log_evidences(mixtures, o, beam_width=beam_width).sum()) for o in every_block(views)
    )
    return views[0].total(own) / sum(obs.count for obs in views)


def gain_in_evidence(
    old: Mixtures,
    new: Mixtures,
    views: Sequence[AnyObservations],
    *,
    beam_width: int = DEFAULT_BEAM_WIDTH,
) -> tuple[float, float]:
    """The mean of `log p(y)` by `new` mixtures less that by the `old`, and its standard error.

    Over all observations of `views`, observation by observation.
    """

    def own() -> np.ndarray:
        of = lambda mixtures, obs: log_evidences(mixtures, obs, beam_width=beam_width)
        gains = [of(new, obs) - of(old, obs) for obs in every_block(views)]
        return sum((np.array([g.sum(), (g**2).sum()]) for g in gains), np.zeros(2))

    n = sum(obs.count for obs in views)
    mean, square = views[0].total(own) / n
    return float(mean), math.sqrt(max(square - mean**2, 0.0) / max(n - 1, 1))


def log_evidences(
    mixtures: Mixtures, obs: Observations, *, beam_width: int = DEFAULT_BEAM_WIDTH
) -> np.ndarray:
    """`log p(y)` of each observation, `(n,)`."""
    if is_low_rank(mixtures, obs):
        return low_rank_log_evidence(mixtures, obs)
    priors = {k: mixtures[k].prior() for k in obs.sources}
    if _one_mixture(priors, obs):
        return shared_log_evidence(priors, obs)
    return np.asarray(_view_log_evidence(priors, obs, beam_width), np.float64)


def is_low_rank(mixtures: Mixtures, obs: AnyObservations) -> bool:
    """Whether `dichroic.inference.low_rank` is for this view."""
    return is_large([obs]) or any(not mixtures[k].full_rank for k in obs.sources)


def _one_mixture(priors: dict[str, Components], obs: Observations) -> bool:
    """Whether all observations share one mixture, of no more components than can all be kept."""
    return is_shared(obs) and _count(priors) <= _MOST_SHARED


def _count(priors: dict[str, Components]) -> int:
    return math.prod(c.log_weights.size for c in priors.values())


@eqx.filter_jit
def _view_assignments(
    priors: dict[str, Components], obs: Observations, beam_width: int, active: int
) -> Int[Array, "n T sources"]:
    rows, shared = split(obs)

    def one(row: Observations) -> Array:
        y, matrices, cov_noise, seen = eqx.combine(row, shared).parts()
        views = [project(priors[k], a, seen) for k, a in matrices.items()]
        return best_assignments(y, views, cov_noise, count=active, beam_width=beam_width)

    return _map_observations(one, rows, min(_count(priors), beam_width) * obs.size**2)


@eqx.filter_jit
def _view_log_evidence(
    priors: dict[str, Components], obs: Observations, beam_width: int
) -> Float[Array, " n"]:
    rows, shared = split(obs)

    def one(row: Observations) -> Array:
        y, matrices, cov_noise, seen = eqx.combine(row, shared).parts()
        sources, a = [priors[k] for k in matrices], list(matrices.values())
        return log_evidence(y, a, cov_noise, sources, seen=seen, beam_width=beam_width)

    return _map_observations(one, rows, min(_count(priors), beam_width) * obs.size**2)


def _map_observations(
    function: Callable[[Observations], Array], rows: Observations, numbers: int
) -> Array:
    """`function` of each of the observations `rows`, as many at once as memory allows."""

    def found(rows: Observations) -> Array:
        which, _ = chunks(rows.count, numbers)
        each = jax.vmap(function)
        values = jax.lax.map(lambda i: each(jax.tree.map(lambda a: a[i], rows)), which)
        return values.reshape(-1, *values.shape[2:])[: rows.count]

    return distributed.map_by_device(found, rows)
