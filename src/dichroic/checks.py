"""Checks of the parts of a view: shapes, values, masks and noise; errors say where and what.

Each takes plain parts and the `label` that messages call the view by, and returns what the rest of
the package computes with: values and masks flattened, noise over the flattened observation.
"""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from dichroic.errors import DataError, ShapeError
from dichroic.noise import DenseNoise, DiagonalNoise, Isotropic, LowRankNoise, Noise
from dichroic.operators import Shape


def check_same_shape(
    got: Sequence[int], want: Sequence[int], what: str, than: str = "it must have"
) -> None:
    """Raise a `ShapeError` that names the first axis in which `got` differs from `want`."""
    got, want = tuple(got), tuple(want)
    if got == want:
        return
    if len(got) != len(want):
        detail = f"{len(got)} axes instead of {len(want)}"
    else:
        axis = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        detail = f"axis {axis} is {got[axis]} instead of {want[axis]}"
    raise ShapeError(f"{what} shape {got}, but {than} shape {want}: {detail}")


def check_rows(counts: set[int], n: int, what: str) -> None:
    """Raise a `ShapeError` unless per-observation parameters, of `counts` rows, are for `n`."""
    for count in counts - {n}:
        raise ShapeError(
            f"{what} has per-observation parameters for {count} observations, but "
            f"there are {n} observations (axis 0)"
        )


def check_finite(tree: Any, what: str) -> None:
    """Raise a `DataError` if an array in `tree` holds NaN or infinity."""
    for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)):
        if not np.all(np.isfinite(leaf)):
            raise DataError(f"{what} contains NaN or infinite values")


def values_and_mask(
    observations: Any, given_mask: Any, label: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """`(values (n, M), 0 where missing; mask (M,) or (n, M), or None)` of `(n, *shape)`."""
    y = np.asarray(observations)
    n, shape = len(y), y.shape[1:]
    if not np.issubdtype(y.dtype, np.number) or np.iscomplexobj(y):
        raise DataError(f"{label}: observations of type {y.dtype}; expected real numbers")
    y = y.astype(np.float32 if y.dtype != np.float64 else y.dtype).reshape(n, -1)
    mask = _flat_mask(given_mask, y, shape, label)
    seen = np.ones_like(y, bool) if mask is None else np.broadcast_to(mask, y.shape)
    bad = seen & ~np.isfinite(y)
    if bad.any():
        i, j = np.argwhere(bad)[0]
        where = tuple(int(a) for a in np.unravel_index(j, shape))
        raise DataError(
            f"{label}: observation {i} is {y[i, j]} at entry {where} ({bad.sum()} such entries); "
            "if they are missing, give a mask, or mask='nan' for NaN"
        )
    if mask is not None and not seen.any():
        raise DataError(f"{label}: the mask leaves nothing observed")
    return np.where(seen, y, 0), None if mask is None else mask.astype(np.float32)


def _flat_mask(mask: Any, y: np.ndarray, shape: Shape, label: str) -> np.ndarray | None:
    """True where an entry of `y` `(n, M)` was observed: `(M,)` if shared, or `(n, M)`."""
    if mask is None:
        return None
    if isinstance(mask, str):
        if mask != "nan":
            raise DataError(f"{label}: mask {mask!r}; expected an array or 'nan'")
        return ~np.isnan(y)
    got, each = np.shape(mask), (len(y), *shape)
    if got not in (shape, each):
        raise ShapeError(f"{label}: a mask of shape {got}; expected {shape} (shared) or {each}")
    return (np.asarray(mask) > 0).reshape(-1 if got == shape else y.shape)


def flat_noise(noise: Any, n: int, shape: Shape, label: str) -> Noise:
    """The noise model with arrays over the flattened observation, whatever shape they came in."""
    if isinstance(noise, (int, float, np.floating, np.integer)):
        return Isotropic(float(noise))
    if not isinstance(noise, Noise):
        raise DataError(
            f"{label}: noise of type {type(noise).__name__}; expected a number (the standard "
            "deviation) or a model such as DiagonalNoise(variance)"
        )
    size = math.prod(shape)
    if isinstance(noise, (DiagonalNoise, LowRankNoise)):
        got = noise.variance.shape
        if got in (shape, (n, *shape)):
            flat = (size,) if got == shape else (n, size)
            return eqx.tree_at(lambda m: m.variance, noise, noise.variance.reshape(flat))
        check_same_shape(got[-1:], (size,), f"{label}: the noise variance has")
    if isinstance(noise, LowRankNoise):
        check_same_shape(noise.factor.shape[-2:-1], (size,), f"{label}: the noise factor has")
    if isinstance(noise, DenseNoise):
        got = noise.covariance.shape[-2:]
        check_same_shape(got, (size, size), f"{label}: the noise covariance has")
    return noise


def check_noise(noise: Noise, label: str) -> None:
    """Raise a `DataError` unless the covariance of `noise` is finite and positive definite."""
    check_finite(noise, f"{label}: the noise")
    if isinstance(noise, Isotropic) and not np.all(np.asarray(noise.std) > 0):
        raise DataError(f"{label}: the noise standard deviation must be positive")
    if isinstance(noise, (DiagonalNoise, LowRankNoise)) and not np.all(
        np.asarray(noise.variance) > 0
    ):
        raise DataError(
            f"{label}: the noise variance must be positive everywhere; mark missing entries with a "
            "mask instead"
        )
    if isinstance(noise, DenseNoise):
        cov = np.asarray(noise.covariance, np.float64)
        skew = np.abs(cov - cov.swapaxes(-1, -2)).max()
        lowest = np.linalg.eigvalsh(0.5 * (cov + cov.swapaxes(-1, -2))).min()
        if lowest <= 0 or skew > 1e-4 * np.abs(cov).max():
            raise DataError(
                f"{label}: the noise covariance is not symmetric positive definite (smallest "
                f"eigenvalue {lowest:.3g}, asymmetry {skew:.3g})"
            )
