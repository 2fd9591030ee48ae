"""The M-step of operators that are not wholly known (`operators.Learnable`): semi-blind separation.

Their numbers θ are raised on the evidence itself, with the priors held fixed, by Fisher scoring: with the score
`s_i = ∂ log p(y_i | θ) / ∂θ` of each observation,

    θ ← θ + F⁻¹ Σ s_i,     F = Σ E[s sᵀ],     errors² = diag(F⁻¹ (Σ s_i s_iᵀ) F⁻¹),

where the expectation, over observations that the model itself would give, is taken by drawing one anew for
each. (With the s_i themselves in F, steps far from the maximum are tiny.) The errors are those of White
(Econometrica 50, 1982), which hold for a model that is only nearly right. The evidence is the sum over
the assignments of components that matter (`dichroic.inference.evidence`), and never falls: a step that would lower
it is tried again, smaller.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dichroic.config import MixtureConfig
from dichroic.inference.evidence import assignment_log_evidence, project, simulate
from dichroic.learning.mixture.em import active_assignments
from dichroic.learning.mixture.statistics import chunks
from dichroic.numerics.batching import split
from dichroic.numerics.finite import finite
from dichroic.operators.learnable import Parameters, parameters, with_parameters
from dichroic.priors.components import Components
from dichroic.problem.batches import AnyObservations, numbered
from dichroic.problem.observations import Observations
from dichroic.runtime import distributed
from dichroic.runtime.tracking import warn

TRIALS = 4  # evaluations of the evidence and its scores in one M-step
_SHRINK = 0.25  # of a step that lowers the evidence
_RIDGE = 1e-6  # of the information, relative to its diagonal: for what the views do not tell


class Scores(eqx.Module):
    """The log evidence of some observations, `Σ s`, `F` and `Σ s sᵀ` of their scores."""

    log_evidence: Float[Array | np.ndarray, ""]
    score: Float[Array | np.ndarray, " P"]
    information: Float[Array | np.ndarray, "P P"]
    scatter: Float[Array | np.ndarray, "P P"]


def operator_iteration(
    mixtures: Mapping[str, Any], views: Sequence[AnyObservations], config: MixtureConfig
) -> tuple[Parameters, Parameters]:
    """The learned arrays of the operators in `views` after an M-step, and their standard errors.

    The errors are those of the priors as they are: what their uncertainty adds is not in them.
    """
    start = parameters([obs.operators for obs in views])
    if not start:
        return {}, {}
    priors = {k: m.prior() for k, m in mixtures.items()}
    own = lambda obs: {k: priors[k] for k in obs.sources}
    seeing = [obs for obs in views if parameters(obs.operators)]
    blocks = lambda: itertools.chain.from_iterable(map(numbered, seeing))
    chosen = [active_assignments(own(obs), obs, config) for _, obs in blocks()]

    def scores(values: Parameters) -> Scores:
        work = zip(blocks(), chosen, strict=True)
        return _added(
            observation_scores(own(obs), obs, index, values, jnp.asarray(first))
            for (first, obs), index in work
        )

    flat, unravel = ravel_pytree(start)
    best = np.asarray(flat, np.float64)
    theta, step, found = best, np.zeros_like(best), None
    for _ in range(TRIALS):
        values = unravel(jnp.asarray(theta, flat.dtype))
        new = views[0].total(partial(scores, values))
        if found is None or (new.log_evidence >= found.log_evidence and finite(new)):
            best, found = theta, new
            step = _inverse(new.information) @ new.score
        else:
            step = _SHRINK * step
        theta = best + step
    assert found is not None
    if not finite(found):
        warn("operators stay as they were: their scores are not finite")
    inverse = _inverse(found.information)
    errors = np.sqrt(np.diagonal(inverse @ found.scatter @ inverse))
    scale_parameters = lambda x: unravel(jnp.asarray(x, flat.dtype))
    return scale_parameters(best), scale_parameters(errors)


def _added(parts: Iterable[Scores]) -> Scores:
    wide = (jax.tree.map(lambda a: np.asarray(a, np.float64), part) for part in parts)
    return reduce(partial(jax.tree.map, np.add), wide)


def _inverse(information: Array | np.ndarray) -> np.ndarray:
    """The inverse of the information, where a number that no observation tells of has next to none."""
    scale = np.sqrt(np.maximum(np.diagonal(information), np.finfo(float).tiny))
    correlation = information / np.outer(scale, scale) + _RIDGE * np.eye(len(scale))
    return np.linalg.inv(correlation) / np.outer(scale, scale)


@eqx.filter_jit
def observation_scores(
    priors: dict[str, Components],
    obs: Observations,
    chosen: Array,
    values: Parameters,
    first: Int[Array, ""],
) -> Scores:
    """Evidence and scores of `obs` on the assignments `chosen`, with its operators at `values`.

    `first` is the number of the first observation, from which random numbers come.
    """
    rows, shared = split(obs)
    theta, unravel = ravel_pytree(values)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(first + jnp.arange(obs.count))
    rows = (rows, keys)

    def system(theta: Array, row: Observations):
        at = with_parameters(eqx.combine(row, shared), unravel(theta))
        y, matrices, cov_noise, seen = at.parts()
        return y, [project(priors[k], a, seen) for k, a in matrices.items()], cov_noise

    def evidence(theta: Array, row: Observations, index: Array) -> Array:
        return assignment_log_evidence(*system(theta, row), index)

    def one(row: tuple[Observations, PRNGKeyArray], index: Array):
        obs, key = row
        both = jnp.stack([obs.y, simulate(*system(theta, obs), index, key)])
        at = lambda y: eqx.tree_at(lambda o: o.y, obs, y)
        scores = jax.value_and_grad(evidence)
        value, s = jax.vmap(lambda y: scores(theta, at(y), index))(both)
        return value[0], s[0], s[1]

    square = jnp.zeros((theta.size, theta.size))
    zero = Scores(jnp.zeros(()), jnp.zeros(theta.size), square, square)
    numbers = 2 * chosen.shape[1] * obs.size * (obs.size + sum(obs.dims.values())) + 2 * theta.size

    def summed(rows: tuple[tuple[Observations, Array], Array], weights: Array) -> Scores:
        def body(total: Scores, chunk: tuple[Array, Array]):
            which, w = chunk
            value, s, drawn = jax.vmap(one)(*jax.tree.map(lambda a: a[which], rows))
            w = w * weights[which]
            squares = ((w[:, None] * x).T @ x for x in (drawn, s))
            return jax.tree.map(jnp.add, total, Scores(w @ value, w @ s, *squares)), None

        return jax.lax.scan(body, zero, chunks(len(weights), numbers))[0]

    return distributed.sum_by_device(summed, (rows, chosen))
