"""Expectation-maximisation of mixtures of Gaussians seen only through noisy, incomplete mixtures.

The E-step is a sum over observations and tuples of components (`dichroic.evidence.Sums`): per component,
with `u = Aᵀ C_y⁻¹ (y − m)` and means over its share of the observations, the force `g = E[u]`, the
scatter `S = E[u uᵀ]` and the information `W = E[Aᵀ C_y⁻¹ A]`. Textbook EM, with the source itself as
missing data, is then (Xu and Jordan, Neural Computation 8, 1996)

    μ ← μ + C g,   C ← C + C (S − g gᵀ − W) C.

It never lowers the evidence, but hardly moves a component that is thinner than what the noise resolves:
a variance c that should be 0 falls as σ² / √(2 steps). The M-step here has the same fixed points (g = 0,
S = W), is the same for complete data (W = C⁻¹), and does not stall: with `C = L L`, `X = L W L + ε`,

    μ ← μ + L X⁻¹ L g,   C ← L X^{-½} (L (S − g gᵀ) L + ε) X^{-½} L.

The first is exact given C (the tuple alone is missing data); the second is the fixed-point iteration for
variance components (Anderson, Annals of Statistics 1, 1973), where a c that should be 0 falls as
σ² / steps. `ε` keeps what no observation sees. A step that lowers the evidence is taken back, for
a textbook step.

Components are grown by splitting: each becomes two, apart along its principal axis. That converges
far faster than a random start of all of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dichroic.batching import row_counts, split, take
from dichroic.config import MixtureConfig
from dichroic.denoise import Mixture, gaussian
from dichroic.evidence import (
    DEFAULT_MAX_TUPLES,
    Components,
    Sums,
    best_tuples,
    component_sums,
    log_evidence,
    project,
)
from dichroic.lowrank import low_rank_log_evidence
from dichroic.lowrank_em import initial_low_rank, low_rank_lap
from dichroic.observations import Observations
from dichroic.posterior import EXACT_LIMIT
from dichroic.shared import is_shared, shared_log_evidence, shared_statistics

Mixtures = dict[str, Mixture]
# Tuples (n, T, sources) of each observation; None where a view is one mixture, see `dichroic.shared`.
Chosen = Int[Array, "_ _ _"] | None
_CHUNK_BYTES = 64 * 2**20
_CHUNK_MOST = 512
_MOST_SHARED = 4096  # tuples of a mixture that all observations share, all of which are kept
_PROBES = 16
_UNSEEN = 1e-7  # ε: the information about a component that counts as none


class Statistics(eqx.Module):
    """The E-step: the log evidence of all observations, and the sums of every source."""

    log_evidence: Float[Array | np.ndarray, ""] | float
    sums: dict[str, Sums]

    def __add__(self, other: "Statistics") -> "Statistics":
        merged = dict(self.sums)
        for name, s in other.sums.items():
            merged[name] = jax.tree.map(np.add, merged[name], s) if name in merged else s
        return Statistics(self.log_evidence + other.log_evidence, merged)


def em_lap(
    mixtures: Mixtures,
    views: Sequence[Observations],
    names: Sequence[str],
    config: MixtureConfig,
) -> tuple[Mixtures, float]:
    """`config.steps` EM steps of the sources `names` on the tuples that matter at the start of the lap.

    Returns all mixtures, and the mean log evidence before the last step. Sources of low rank, in views whose
    observations share their operators, have an EM of their own: `dichroic.lowrank_em`.
    """
    if any(is_low_rank(mixtures, obs) for obs in views):
        return low_rank_lap(mixtures, views, names, config)
    chosen = [choose(mixtures, obs, config) for obs in views]
    share = max(len(set(names) & set(obs.sources)) for obs in views)
    before, value = None, -math.inf
    for _ in range(config.steps):
        found = statistics(mixtures, views, chosen)
        fell = before is not None and float(found.log_evidence) < value - 1e-6 * abs(value)
        if fell and before is not None:
            mixtures, found = before
        value = float(found.log_evidence)
        before = None if fell else (mixtures, found)
        new = {n: _update(mixtures[n], found.sums[n], config, fell, share) for n in names}
        mixtures = {**mixtures, **new}
    return mixtures, value / sum(obs.count for obs in views)


def _update(m: Mixture, sums: Sums, config: MixtureConfig, fell: bool, share: int) -> Mixture:
    floor = config.floor * float(m.scale) ** 2
    return maximise(
        m, sums, floor=floor, shrinkage=config.shrinkage, textbook=fell, damping=1 / share
    )


def choose(mixtures: Mixtures, obs: Observations, config: MixtureConfig) -> Chosen:
    """The most probable tuples of components of each observation, `config.active_tuples` for a pair.

    And as many again for every further source: there are then more ways to explain an observation.
    """
    priors = {k: mixtures[k].prior() for k in obs.sources}
    return None if _one_mixture(priors, obs) else active_tuples(priors, obs, config)


def active_tuples(
    priors: dict[str, Components], obs: Observations, config: MixtureConfig
) -> Int[Array, "n T sources"]:
    """The tuples that `choose` speaks of, of any view."""
    pairs = max(1, sum(c.log_weights.size > 1 for c in priors.values()) - 1)
    return _view_tuples(priors, obs, config.max_tuples, pairs * config.active_tuples)


def statistics(
    mixtures: Mixtures, views: Sequence[Observations], chosen: Sequence[Chosen]
) -> Statistics:
    """The E-step over all `views`, on the tuples `chosen` for the observations of each."""
    parts = []
    for obs, index in zip(views, chosen, strict=True):
        priors = {k: mixtures[k].prior() for k in obs.sources}
        if index is None:
            parts.append(Statistics(*shared_statistics(priors, obs)))
        else:
            parts.append(_view_statistics(priors, obs, index))
    return sum(parts[1:], parts[0])


def mean_log_evidence(
    mixtures: Mixtures, views: Sequence[Observations], *, max_tuples: int = DEFAULT_MAX_TUPLES
) -> float:
    """The mean of `log p(y)` over all observations of `views`."""
    total = 0.0
    for obs in views:
        if is_low_rank(mixtures, obs):
            total += low_rank_log_evidence(mixtures, obs)
            continue
        priors = {k: mixtures[k].prior() for k in obs.sources}
        if _one_mixture(priors, obs):
            total += shared_log_evidence(priors, obs)
        else:
            total += float(_view_log_evidence(priors, obs, max_tuples))
    return total / sum(obs.count for obs in views)


def is_low_rank(mixtures: Mixtures, obs: Observations) -> bool:
    """Whether `dichroic.lowrank` is for this view."""
    return is_shared(obs) and any(not mixtures[k].full_rank for k in obs.sources)


def is_large(views: Sequence[Observations]) -> bool:
    """Whether sources start as mixtures of low rank: many numbers, and operators that observations share."""
    largest = max(max(obs.size, *obs.dims.values()) for obs in views)
    return largest > EXACT_LIMIT and all(map(is_shared, views))


def _one_mixture(priors: dict[str, Components], obs: Observations) -> bool:
    """Whether all observations share one mixture, of no more components than can all be kept."""
    return is_shared(obs) and _count(priors) <= _MOST_SHARED


def _count(priors: dict[str, Components]) -> int:
    return math.prod(c.log_weights.size for c in priors.values())


@eqx.filter_jit
def _view_tuples(priors, obs, max_tuples, active) -> Int[Array, "n T sources"]:
    rows, shared = split(obs)

    def one(row: Observations) -> Array:
        y, views, cov_noise, _ = _projected(priors, eqx.combine(row, shared))
        return best_tuples(y, list(views.values()), cov_noise, count=active, max_tuples=max_tuples)

    which, _ = chunks(obs.count, min(_count(priors), max_tuples) * obs.size**2)
    index = jax.lax.map(lambda i: jax.vmap(one)(jax.tree.map(lambda a: a[i], rows)), which)
    return index.reshape(-1, *index.shape[2:])[: obs.count]


@eqx.filter_jit
def _view_statistics(priors, obs, chosen) -> Statistics:
    """Where operators are shared, sums are taken back to the sources once, not per observation."""
    shared = not row_counts(obs.operators)
    back = lambda sums, ops: {k: s.pull_back(ops[k].as_matrix()) for k, s in sums.items()}

    def one(row: Observations, index: Array) -> tuple[Array, dict[str, Sums]]:
        y, views, cov_noise, seen = _projected(priors, row)
        value, sums = component_sums(y, list(views.values()), cov_noise, seen, index)
        named = dict(zip(views, sums, strict=True))
        return value, named if shared else back(named, row.operators)

    entries = obs.size**2 if shared else sum(d**2 for d in obs.dims.values())
    components = sum(c.log_weights.size for c in priors.values())
    numbers = chosen.shape[1] * obs.size**2 + components * entries
    value, sums = _total(one, obs, chosen, numbers)
    return Statistics(value, back(sums, obs.operators) if shared else sums)


def _projected(priors, row: Observations) -> tuple[Array, dict[str, Components], Array, Array]:
    """`Observations.parts` with the mixture of `A_β x_β` in place of `A_β`."""
    y, matrices, cov_noise, seen = row.parts()
    return y, {k: project(priors[k], a, seen) for k, a in matrices.items()}, cov_noise, seen


@eqx.filter_jit
def _view_log_evidence(priors, obs, max_tuples) -> Array:
    def one(row: Observations, _) -> Array:
        y, matrices, cov_noise, seen = row.parts()
        sources, a = [priors[k] for k in matrices], list(matrices.values())
        return log_evidence(y, a, cov_noise, sources, seen=seen, max_tuples=max_tuples)

    return _total(one, obs, None, min(_count(priors), max_tuples) * obs.size**2)


def _total(function: Callable, obs: Observations, extra: Any, numbers: int) -> Any:
    """`Σ_i function(observation i, extra[i])`, each in memory for a few times `numbers` numbers."""
    rows, shared = split(obs)
    evaluate = lambda row, e: function(eqx.combine(row, shared), e)
    pick = lambda index: jax.tree.map(lambda a: a[index], (rows, extra))

    def body(total, chunk):
        index, w = chunk
        parts = jax.vmap(evaluate)(*pick(index))
        return jax.tree.map(lambda t, p: t + jnp.tensordot(w, p, 1), total, parts), None

    result = jax.eval_shape(evaluate, *pick(0))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), result)
    return jax.lax.scan(body, zero, chunks(obs.count, numbers))[0]


def chunks(count: int, numbers: int) -> tuple[Int[Array, "c size"], Float[Array, "c size"]]:
    """Indices of `count` observations in chunks that fit in memory, and their weights: 0 for padding."""
    size = int(np.clip(_CHUNK_BYTES // (16 * numbers), 1, min(count, _CHUNK_MOST)))
    index = jnp.arange(-(-count // size) * size).reshape(-1, size)
    return jnp.minimum(index, count - 1), (index < count).astype(float)


def maximise(
    mixture: Mixture,
    sums: Sums,
    *,
    floor: float,
    shrinkage: float = 0.0,
    damping: float = 1.0,
    textbook: bool = False,
) -> Mixture:
    """The M-step of one source, in float64: see the formulas above; `textbook` picks the first pair.

    Eigenvalues are kept above `floor`; `shrinkage` is the number of pseudo-observations that pull each
    covariance towards the mean of all; `damping` scales the step of the means, where several sources
    that are seen together move at once. Components with next to no observations left stay as
    they are, with their small weight.
    """
    n, g, s, w = (np.asarray(a, np.float64) for a in jax.tree.leaves(sums))
    mean, cov = (np.asarray(a, np.float64) for a in (mixture.means, mixture.covariances()))
    n = np.maximum(n, 0)
    alive = n > 1e-2
    share = np.where(alive, n, 1)[:, None, None]
    g, s, w = g[..., None] / share, s / share, w / share
    delta, new = _textbook_step(cov, g, s, w) if textbook else _step(cov, g, s, w, damping)
    pooled = np.einsum("k,kij->ij", n / n.sum(), new)
    pull = shrinkage / (shrinkage + share)
    new = _power((1 - pull) * new + pull * pooled, 1, floor)
    keep = alive[:, None]
    return Mixture.from_moments(
        np.maximum(n, 1e-6 * n.sum()),
        np.where(keep, mean + delta[..., 0], mean).reshape(-1, *mixture.shape),
        np.where(keep[..., None], new, cov),
        shape=mixture.shape,
    )


def _textbook_step(c, g, s, w):
    delta = c @ g
    return delta, c + c @ (s - w) @ c - delta @ _t(delta)


def _step(c, g, s, w, damping):
    unseen = _UNSEEN * np.eye(c.shape[-1])
    root = _power(c, 0.5)
    left = root @ _power(root @ w @ root + unseen, -0.5)
    still = s - (2 * damping - damping**2) * g @ _t(g)
    return damping * left @ (_t(left) @ g), left @ (root @ still @ root + unseen) @ _t(left)


def _t(a: np.ndarray) -> np.ndarray:
    return a.swapaxes(1, 2)


def _power(a: np.ndarray, exponent: float | int, floor: float = 1e-300) -> np.ndarray:
    """`a^exponent` of symmetric matrices, with eigenvalues lifted to `floor`."""
    values, vectors = np.linalg.eigh(0.5 * (a + _t(a)))
    return (vectors * np.maximum(values, floor)[:, None] ** exponent) @ _t(vectors)


def initial_gaussian(
    name: str,
    views: Sequence[Observations],
    group: Sequence[str],
    *,
    known: Mixtures | None = None,
    rank: int | None = None,
) -> Mixture:
    """A Gaussian with the variance that explains the power of the views, shared equally by the `group`.

    Isotropic; or, with a `rank`, from the moments that the sources `known` leave (`initial_low_rank`). At least
    one of `views` sees it: see `dichroic.data.prepare`.
    """
    seeing, powers = [obs for obs in views if name in obs.sources], []
    for obs in seeing:
        some = take(obs, np.arange(min(obs.count, 64)))
        gain = sum(_mean_gain(some, n) for n in obs.sources if n in group)
        power = float(np.mean(np.sum(np.asarray(some.y) ** 2, axis=-1)))
        powers.append(power / max(gain, 1e-30))
    variance, shape = max(min(powers), 1e-30), seeing[0].operators[name].in_shape
    if rank is not None:
        return initial_low_rank(name, seeing, rank, variance, known or {}, len(group))
    return gaussian(np.zeros(shape), variance * np.eye(math.prod(shape)))


def _mean_gain(obs: Observations, name: str) -> float:
    """`tr(A Aᵀ)`, the mean over observations; for large ones from random vectors."""
    rows, shared = split(obs)

    def norm(r) -> Array:
        one = eqx.combine(r, shared)
        if max(one.size, one.dims[name]) <= EXACT_LIMIT:
            return jnp.sum(one.system()[1][name] ** 2)
        probes = jax.random.normal(jax.random.key(0), (_PROBES, one.size))
        return jnp.sum(jax.vmap(lambda v: one.adjoint(v)[name])(probes) ** 2) / _PROBES

    return float(jnp.mean(jax.vmap(norm)(rows)))


def split_components(mixture: Mixture, components: int) -> Mixture:
    """Up to twice as many components, at most `components`: the heaviest are split in two.

    A component `N(μ, C)` with principal axis `λ u uᵀ` becomes `N(μ ± √(λ/2) u, C − ½ λ u uᵀ)`, which
    keeps its mean and covariance.
    """
    log_weights, means, variances = (
        np.array(a, np.float64) for a in (mixture.log_weights, mixture.means, mixture.variances)
    )
    basis, floor = np.asarray(mixture.basis, np.float64), np.asarray(mixture.floor, np.float64)
    parents = np.argsort(-log_weights)[: max(0, components - log_weights.size)]
    which = np.argmax(variances[parents], axis=1)
    along = floor[parents] if mixture.full_rank else np.zeros(len(parents))
    value = variances[parents, which] + along
    axis = np.sqrt(value / 2)[:, None] * basis[parents, :, which]
    log_weights[parents] -= np.log(2)
    child_means = means[parents] + axis
    means[parents] -= axis
    variances[parents, which] = np.maximum(value / 2 - along, 0)
    grown = lambda a: np.concatenate([a, a[parents]])
    return Mixture(
        log_weights=grown(log_weights),
        means=np.concatenate([means, child_means]),
        basis=grown(basis),
        variances=grown(variances),
        floor=grown(floor),
        shape=mixture.shape,
    )
