"""Ascent of a smooth function of several arrays by L-BFGS, in coordinates of its own curvature.

Where the function is curved like `−½ tr XᵀJX`, it is round in `X̂ = RᵀX` with `J = R Rᵀ`: the steps of one
ascent are then as long as they should be in every direction. For Gaussian factors `J` is the information
`Σ_i AᵀPA` of `gaussian.Curvature`, whose eigenvalues are up to the signal-to-noise ratio apart.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, OptimizeResult, minimize

_RIDGE = 1e-8  # of the mean eigenvalue: what no observation sees


def root(information: np.ndarray) -> np.ndarray:
    """`R` `(D, D)`, lower triangular, with `R Rᵀ = J`, but for a small multiple of the identity."""
    level = max(float(np.trace(information)) / len(information), 1e-30)
    return np.linalg.cholesky(information + _RIDGE * level * np.eye(len(information)))


class Ascent(NamedTuple):
    """Where an ascent ended: the arrays, the value, and the value of every iterate."""

    arrays: list[np.ndarray]
    value: float
    history: list[float]


def monotone_em(
    function: Callable[[list[np.ndarray]], tuple[float, list[np.ndarray]]],
    start: Sequence[np.ndarray],
    *,
    bounds: Sequence[tuple[float, float]] | None = None,
    roots: Sequence[np.ndarray | None] | None = None,
    tolerance: float,
    iterations: int,
) -> Ascent:
    """Maximise `function`, which returns its value and gradient, by L-BFGS; no iterate falls.

    `bounds` are one pair for all entries of each array, `roots` the `R` of each array `X` that is found as
    `R⁻ᵀ X̂` (its bounds are then those of `X̂`); `tolerance` is the relative gain of one iteration that ends
    the ascent. Source: Byrd, Lu, Nocedal and Zhu, SIAM J. Sci. Comput. 16, 1995.
    """
    shapes, sizes = [a.shape for a in start], [a.size for a in start]
    rooted = [None] * len(start) if roots is None else roots
    inverses = [None if r is None else np.linalg.inv(r) for r in rooted]
    pack = lambda arrays: np.concatenate([np.ravel(a) for a in arrays])
    history: list[float] = []

    def unpack(x: np.ndarray) -> list[np.ndarray]:
        parts = zip(np.split(x, np.cumsum(sizes)[:-1]), shapes, inverses, strict=True)
        arrays = ((a.reshape(shape), inverse) for a, shape, inverse in parts)
        return [a if inverse is None else inverse.T @ a for a, inverse in arrays]

    def negative(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = function(unpack(x))
        pairs = zip(gradient, inverses, strict=True)
        return -value, -pack([d if inverse is None else inverse @ d for d, inverse in pairs])

    def follow(intermediate_result: OptimizeResult) -> None:
        history.append(-float(intermediate_result.fun))

    begin = [a if r is None else r.T @ a for a, r in zip(start, rooted, strict=True)]
    found = minimize(
        negative,
        pack(begin),
        jac=True,
        method="L-BFGS-B",
        bounds=None if bounds is None else Bounds(*np.repeat(bounds, sizes, axis=0).T),
        callback=follow,
        options={
            "maxcor": 20,
            "maxiter": iterations,
            "maxfun": 2 * iterations,
            "ftol": tolerance,
            "gtol": 1e-9,
        },
    )
    return Ascent(unpack(found.x), -float(found.fun), history)
