"""An approximate inverse of the covariance of an observation, to precondition conjugate gradients.

With `V_β ≈ v_β I + F_β F_βᵀ` (`Moments`), and what is not of low rank replaced by its diagonal,

    B = diag(Σ) + Σ_β v_β diag(A_β A_βᵀ),   W = B^{-1/2} (A_β F_β)_β,   L Lᵀ = I + Wᵀ W,   H = L⁻¹ Wᵀ,
    (Σ + Σ_β A_β V_β A_βᵀ)⁻¹ ≈ B^{-1/2} (I − (1 − ε) Hᵀ H) B^{-1/2},

exact for independent noise and operators with orthogonal rows. `ε`, of the order of the rounding, keeps it
positive definite: along a column a million times above the noise `I − Hᵀ H` is a difference of rounded numbers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dichroic.numerics.cholesky import inverse_cholesky
from dichroic.operators import Operator
from dichroic.priors.covariance import LinearMap, Moments
from dichroic.problem.observations import Observations

_ROUNDING = 32  # of the smallest difference from 1


def approximate_inverse(obs: Observations, given: Mapping[str, Moments]) -> LinearMap:
    """The map above of one observation, of `(M,)`; missing entries stay as they are."""
    seen = obs.noise.observed(obs.size)
    diagonal = obs.noise.variances(obs.size)
    for k, op in obs.operators.items():
        diagonal = diagonal + given[k].floor * seen * op.row_squares().ravel()
    scale = jax.lax.rsqrt(diagonal)

    def seen_through(op: Operator, columns: Array) -> Array:
        rows = jax.vmap(lambda f: op.mv(f.reshape(op.in_shape)).ravel())(columns.T)
        return scale * seen * rows

    parts = [seen_through(op, given[k].columns) for k, op in obs.operators.items()]
    w = jnp.concatenate(parts)  # Wᵀ
    if not w.shape[0]:
        return lambda r: scale**2 * r
    inverse, _ = inverse_cholesky(jnp.eye(w.shape[0]) + w @ w.T)
    h = inverse @ w
    kept = 1 - _ROUNDING * jnp.finfo(h.dtype).eps

    def apply(r: Array) -> Array:
        u = scale * r
        return scale * (u - kept * (h.T @ (h @ u)))

    return apply
