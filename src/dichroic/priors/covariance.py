"""The two moments of a source given its noised value, without a matrix of its size.

    E[x | x_t] = D,   V[x | x_t] = V = σ² J,   J = ∂D/∂x_t, with eigenvalues in [0, 1].

A draw about the mean is `σ p(J) z` with white `z` and a polynomial `p(t) ≈ √t`: a few products with `J`. And
`V ≈ v I + F Fᵀ` with a few columns `F` is what is known of `V` without any product: it preconditions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from numpy.polynomial import chebyshev

LinearMap = Callable[[Array], Array]
MOST_COLUMNS = 64
ROOT_DEGREE = 4


class Moments(NamedTuple):
    """`x` given `x_t` as one Gaussian, on flattened arrays.

    `mean` `(D,)`; `covariance` is `u ↦ V u`; `deviate` takes a key to a draw from `N(0, V)`; `floor` `v` and
    `columns` `F` `(D, R)` are the rough `V ≈ v I + F Fᵀ`, where `R` may be 0.
    """

    mean: Array
    covariance: LinearMap
    deviate: Callable[[PRNGKeyArray], Array]
    floor: Array
    columns: Array


def _interpolated(
    function: Callable[[np.ndarray], np.ndarray], degree: int
) -> Float[np.ndarray, " coefficients"]:
    """Coefficients of the polynomial that takes the values of `function` at the Chebyshev points."""
    return chebyshev.chebinterpolate(function, degree)  # pyright: ignore[reportCallIssue, reportArgumentType]


def root(
    product: LinearMap, z: Float[Array, " dim"], degree: int = ROOT_DEGREE
) -> Float[Array, " dim"]:
    """`√J z` of a matrix with eigenvalues in [0, 1] given as `product`, by `degree` (≥ 1) products.

    The polynomial interpolates `√t` at the Chebyshev points (Clenshaw's recurrence). Its error is largest at 0,
    about `0.6 / degree`, and falls as `1 / degree²` elsewhere; low degrees stay tame where a learned `J` has
    eigenvalues outside.
    """
    lowest, *middle, highest = _interpolated(lambda t: np.sqrt(0.5 * (t + 1)), degree)
    twice = lambda v: 4 * product(v) - 2 * v
    b, before = highest * z, jnp.zeros_like(z)
    for c in reversed(middle):
        b, before = twice(b) - before + c * z, b
    return 0.5 * twice(b) - before + lowest * z


def strongest(
    basis: Callable[[Array], Array], variances: Float[Array, " rank"], dim: int
) -> tuple[Float[Array, "dim _"], Float[Array, ""]]:
    """`(F, v)` with `F Fᵀ + v I ≈ U diag(λ) Uᵀ`: the largest `λ`, 64 at most, and the mean of the others.

    `basis` takes the numbers of columns to those columns of `U`.
    """
    if variances.size <= MOST_COLUMNS:
        return basis(jnp.arange(variances.size)) * jnp.sqrt(variances), jnp.zeros(())
    top, index = jax.lax.top_k(variances, MOST_COLUMNS)
    left = jnp.maximum(jnp.sum(variances) - jnp.sum(top), 0) / (dim - MOST_COLUMNS)
    return basis(index) * jnp.sqrt(jnp.maximum(top - left, 0)), left
