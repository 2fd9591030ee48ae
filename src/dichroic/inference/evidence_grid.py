"""The evidence over all assignments of components, for observations of a few entries.

The sum of `dichroic.inference.evidence` runs over a grid `K₁ × … × K_S`. For small `M` it is fastest with one
array over the grid per entry of vectors and matrices, so that the whole chain fuses, and with its
gradient written out: with `s` the log of weight × likelihood of an assignment, `r = exp(s − log Σ exp s)`,
`P = C⁻¹` and `v = P (y − m)`, the gradients for one source are sums over the other sources' axes,

    ∂/∂log w_k = Σ r,   ∂/∂m_k = Σ r v,   ∂/∂V_k = ½ Σ r (v vᵀ − P).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SMALL = 6
View = tuple[Array, Array, Array]  # log weights (K,), means (K, M), covariances (K, M, M)


@jax.custom_vjp
def grid_log_evidence(
    y: Float[Array, " obs"], cov_noise: Float[Array, "obs obs"], views: Sequence[View]
) -> Float[Array, ""]:
    """`log p(y)` for projected mixtures `views`; differentiable in the views only."""
    return jax.nn.logsumexp(grid_scores(y, cov_noise, views))


def grid_scores(
    y: Float[Array, " obs"], cov_noise: Float[Array, "obs obs"], views: Sequence[View]
) -> Float[Array, "*grid"]:
    """The log of weight × likelihood of every assignment, an array with one axis per source."""
    return _evaluate(y, cov_noise, views)[0]


def _evaluate(y: Float[Array, " obs"], cov_noise: Float[Array, "obs obs"], views: Sequence[View]):
    """`(s, v, P)`: scores, and the entries of `v` and of the lower triangle of `P`."""
    size, sources = y.shape[0], len(views)
    over = lambda a, s: a.reshape([-1 if i == s else 1 for i in range(sources)])
    total = lambda pick: sum(over(pick(view), s) for s, view in enumerate(views))
    residual = [y[i] - total(lambda view, i=i: view[1][:, i]) for i in range(size)]
    cov = {
        (i, j): cov_noise[i, j] + total(lambda view, i=i, j=j: view[2][:, i, j])
        for i in range(size)
        for j in range(i + 1)
    }
    precision, logdet = _inverse_entries(cov, size)
    at = lambda i, j: precision[max(i, j), min(i, j)]
    v = [sum(at(i, j) * residual[j] for j in range(size)) for i in range(size)]
    quad = sum(a * b for a, b in zip(v, residual, strict=True))
    constant = size * np.log(2 * np.pi)
    return total(lambda view: view[0]) - 0.5 * (quad + logdet + constant), v, precision


def _inverse_entries(cov: dict[tuple[int, int], Array], n: int):
    """Entries of the lower triangle of the inverse, and the log determinant, by Cholesky."""
    low: dict[tuple[int, int], Array] = {}
    inv: dict[tuple[int, int], Array] = {}
    logdet = jnp.zeros(())
    least = jnp.finfo(cov[0, 0].dtype).eps
    for i in range(n):
        for j in range(i):
            low[i, j] = (cov[i, j] - sum(low[i, k] * low[j, k] for k in range(j))) * inv[j, j]
        pivot = cov[i, i] - sum(low[i, k] ** 2 for k in range(i))
        pivot = jnp.maximum(pivot, least * cov[i, i])
        inv[i, i] = jax.lax.rsqrt(pivot)
        logdet = logdet + jnp.log(pivot)
        for j in range(i):
            inv[i, j] = -inv[i, i] * sum(low[i, k] * inv[k, j] for k in range(j, i))
    lower = [(i, j) for i in range(n) for j in range(i + 1)]
    return {(i, j): sum(inv[k, i] * inv[k, j] for k in range(i, n)) for i, j in lower}, logdet


def _forward(y: Float[Array, " obs"], cov_noise: Float[Array, "obs obs"], views: Sequence[View]):
    s, v, precision = _evaluate(y, cov_noise, views)
    value = jax.nn.logsumexp(s)
    r = jnp.exp(s - value)
    n = y.shape[0]
    gradients = []
    for source in range(len(views)):
        others = tuple(a for a in range(len(views)) if a != source)
        moment = {
            (i, j): 0.5 * jnp.sum(r * (v[i] * v[j] - p), others) for (i, j), p in precision.items()
        }
        rows = [[moment[max(i, j), min(i, j)] for j in range(n)] for i in range(n)]
        gradients.append(
            (
                jnp.sum(r, others),
                jnp.stack([jnp.sum(r * v[i], others) for i in range(n)], -1),
                jnp.stack([jnp.stack(row, -1) for row in rows], -2),
            )
        )
    return value, jax.tree.unflatten(jax.tree.structure(views), jax.tree.leaves(gradients))


def _backward(gradients: Sequence[View], cotangent: Array):
    return None, None, jax.tree.map(lambda g: cotangent * g, gradients)


grid_log_evidence.defvjp(_forward, _backward)
