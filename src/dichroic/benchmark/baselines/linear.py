"""Linear answers to `y = Σ_β A_β x_β + η`, the floor that a learned prior has to beat.

    back-projection   x_β = A_βᵀ y                      (the observation as it is, where A_β = I)
    least squares     x = A⁺ y with A = (A_1 … A_S), the solution of least norm
    Wiener            x_β = μ_β + C_β A_βᵀ (Σ + Σ_γ A_γ C_γ A_γᵀ)⁻¹ (y − Σ_γ A_γ μ_γ)

The last is the best linear answer there is, if it is given the true means and covariances.
"""

from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dichroic.numerics.batching import split
from dichroic.problem.observations import Observations

Estimates = dict[str, np.ndarray]
Moments = Mapping[str, tuple[np.ndarray, np.ndarray]]


def back_projection(obs: Observations) -> Estimates:
    """`A_βᵀ y` for every source, `(n, *shape)`."""
    return _map(lambda y, a, cov: {k: m.T @ y for k, m in a.items()}, obs)


def least_squares(obs: Observations) -> Estimates:
    """The least-squares solution of least norm for all sources together, `(n, *shape)`."""

    def one(y: Array, a: dict[str, Array], cov: Array) -> dict[str, Array]:
        x = jnp.linalg.pinv(jnp.concatenate(list(a.values()), axis=1)) @ y
        ends = np.cumsum([m.shape[1] for m in a.values()])[:-1]
        return dict(zip(a, jnp.split(x, ends), strict=True))

    return _map(one, obs)


def wiener(obs: Observations, moments: Moments) -> Estimates:
    """The Wiener filter for sources with `moments` (mean, covariance), flattened; `(n, *shape)`."""
    mean = {k: jnp.asarray(moments[k][0], obs.y.dtype) for k in obs.sources}
    cov_x = {k: jnp.asarray(moments[k][1], obs.y.dtype) for k in obs.sources}

    def one(y: Array, a: dict[str, Array], cov: Array) -> dict[str, Array]:
        cov_y = cov + sum(m @ cov_x[k] @ m.T for k, m in a.items())
        v = jnp.linalg.solve(cov_y, y - sum(m @ mean[k] for k, m in a.items()))
        return {k: mean[k] + cov_x[k] @ (m.T @ v) for k, m in a.items()}

    return _map(one, obs)


def second_moments(samples: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and covariance of each source from samples `(n, *shape)`, flattened."""
    flat = {k: np.asarray(x, float).reshape(len(x), -1) for k, x in samples.items()}
    return {k: (x.mean(axis=0), np.cov(x.T)) for k, x in flat.items()}


def _map(one: Callable[..., dict[str, Array]], obs: Observations) -> Estimates:
    rows, shared = split(obs)
    batched = jax.jit(jax.vmap(lambda row: one(*eqx.combine(row, shared).system())))(rows)
    shapes = {k: op.in_shape for k, op in obs.operators.items()}
    return {k: np.asarray(x).reshape(-1, *shapes[k]) for k, x in batched.items()}
