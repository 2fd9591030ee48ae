"""Checks of the parts of a view: shapes, values, masks and noise; errors say where and what.

Each takes plain parts and the `label` that messages call the view by, and returns what the rest of
the package computes with: values and masks flattened, noise over the flattened observation.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any
from weakref import WeakValueDictionary

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from dichroic.batching import split, take
from dichroic.errors import DataError, ShapeError
from dichroic.finite import finite
from dichroic.linearity import probe
from dichroic.noise import (
    DenseNoise,
    DiagonalNoise,
    Isotropic,
    JointNoise,
    LowRankNoise,
    Masked,
    Noise,
    StationaryNoise,
)
from dichroic.operators import Operator, Shape
from dichroic.operators.base import traced


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
    if not finite(eqx.filter(tree, eqx.is_array)):
        raise DataError(f"{what} contains NaN or infinite values")


def check_real(array: Any, what: str) -> None:
    """Raise a `DataError` unless `array` holds real numbers (or booleans)."""
    dtype = np.asarray(array).dtype
    if dtype.kind not in "biuf":
        raise DataError(f"{what} of type {dtype}; expected real numbers")


def _once(check: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    """`check`, which passes over what it has found good before: the very same object, which cannot change."""
    good: WeakValueDictionary[int, Any] = WeakValueDictionary()

    @wraps(check)
    def checked(part: Any, label: str) -> None:
        if good.get(id(part)) is not part:
            check(part, label)
            good[id(part)] = part

    return checked


@_once
def check_operator(op: Operator, label: str) -> None:
    """Raise a `DichroicError` unless `op` is finite, and gives real arrays of its `out_shape`."""
    check_finite(op, f"{label}: the operator")
    y = traced(take(op, 0).mv, op.in_shape, f"{label}: the operator")
    check_same_shape(y.shape, op.out_shape, f"{label}: mv of the operator gives arrays of")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise DataError(f"{label}: the operator gives {y.dtype}; expected real numbers")


check_linear = _once(probe)


def values_and_mask(
    observations: Any, given_mask: Any, label: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """`(values (n, M), 0 where missing; mask (M,) or (n, M), or None)` of `(n, *shape)`."""
    given = np.asarray(observations)
    n, shape = len(given), given.shape[1:]
    check_real(given, f"{label}: observations")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
        y = given.astype(jnp.zeros(()).dtype).reshape(n, -1)
    mask = _flat_mask(given_mask, y, shape, label)
    if mask is None and np.all(np.isfinite(y)):
        return y, None
    seen = np.ones_like(y, bool) if mask is None else np.broadcast_to(mask, y.shape)
    bad = seen & ~np.isfinite(y)
    if bad.any():
        i, j = np.argwhere(bad)[0]
        where = tuple(int(a) for a in np.unravel_index(j, shape))
        value = given[(i, *where)]
        if np.isfinite(value):
            raise DataError(
                f"{label}: observation {i} is {value:.3g} at entry {where}, more than {y.dtype} holds "
                f"({np.finfo(y.dtype).max:.2g}): give observations and noise in other units"
            )
        raise DataError(
            f"{label}: observation {i} is {y[i, j]} ({y.dtype}) at entry {where} ({bad.sum()} such "
            "entries); if they are missing, as in gaps of seismograms, give a mask, or mask='nan' for NaN"
        )
    return np.where(seen, y, 0), mask


def _flat_mask(mask: Any, y: np.ndarray, shape: Shape, label: str) -> np.ndarray | None:
    """True where an entry of `y` `(n, M)` was observed: `(M,)` if shared, or `(n, M)`."""
    if mask is None:
        return None
    if isinstance(mask, str):
        if mask != "nan":
            raise DataError(f"{label}: mask {mask!r}; expected an array or 'nan'")
        return ~np.isnan(y)
    check_real(mask, f"{label}: a mask")
    if missing := int(np.count_nonzero(np.isnan(np.asarray(mask)))):
        raise DataError(
            f"{label}: a mask with {missing} NaN; expected 1 where an entry was observed, 0 where it is missing"
        )
    got, each = np.shape(mask), (len(y), *shape)
    if got not in (shape, each):
        raise ShapeError(f"{label}: a mask of shape {got}; expected {shape} (shared) or {each}")
    return (np.asarray(mask) > 0).reshape(-1 if got == shape else y.shape)


_LARGEST = 1e36  # variance of noise, and inverse of the smallest
_AXES: dict[type[Noise], dict[str, str]] = {  # of every parameter, for one observation of M entries
    Isotropic: {"std": ""},
    DiagonalNoise: {"variance": "M"},
    LowRankNoise: {"factor": "MR", "variance": "M"},
    DenseNoise: {"covariance": "MM"},
    Masked: {"mask": "M"},
}


def flat_noise(noise: Any, shape: Shape, label: str) -> Noise:
    """The noise model with arrays over the flattened observation, whatever shape they came in."""
    if isinstance(noise, (int, float, np.generic, np.ndarray, jax.Array)) and np.ndim(noise) == 0:
        check_real(noise, f"{label}: a noise standard deviation")
        return Isotropic(float(noise))
    if not isinstance(noise, Noise):
        raise DataError(
            f"{label}: noise of type {type(noise).__name__}; expected a number (the standard "
            "deviation) or a model such as DiagonalNoise(variance)"
        )
    if isinstance(noise, JointNoise):
        return _flat_joint(noise, math.prod(shape), label)
    if isinstance(noise, Masked):
        noise = Masked(flat_noise(noise.noise, shape, label), noise.mask)
    if isinstance(noise, StationaryNoise):
        if noise.shape not in ((), shape):
            raise ShapeError(
                f"{label}: a noise on a grid of shape {noise.shape}, but observations of shape {shape}"
            )
        return StationaryNoise(noise.covariance, shape=shape, ndim=noise.ndim)
    for name, axes in next((a for kind, a in _AXES.items() if isinstance(noise, kind)), {}).items():
        array = getattr(noise, name)
        flat = _flat(array, axes, shape, f"{label}: the noise {name}")
        if flat is not array:
            noise = eqx.tree_at(lambda m, name=name: getattr(m, name), noise, flat)
    return noise


def _flat_joint(noise: JointNoise, size: int, label: str) -> JointNoise:
    if len(noise.sizes) != len(noise.noises) or sum(noise.sizes) != size:
        raise ShapeError(
            f"{label}: a joint noise of {len(noise.noises)} parts with sizes {noise.sizes}; "
            f"expected one size for each, {size} entries in all"
        )
    parts = enumerate(zip(noise.noises, noise.sizes, strict=True))
    flat = (flat_noise(part, (m,), f"{label}, part {i} of its noise") for i, (part, m) in parts)
    return JointNoise(tuple(flat), noise.sizes)


def _flat(array: Any, axes: str, shape: Shape, what: str) -> Any:
    """`array`, per observation or not, with the entries of an observation along one axis."""
    got, size = np.shape(array), math.prod(shape)
    for entries in (shape, (size,)):
        want = sum((entries if a == "M" else got[-1:] for a in axes), ())
        rows = len(got) - len(want)
        if rows in (0, 1) and got[rows:] == want:
            want = (*got[:rows], *(size if a == "M" else got[-1] for a in axes))
            return array if want == got else array.reshape(want)
    one = [str(size) if a == "M" else a for a in axes]
    raise ShapeError(
        f"{what} has shape {got}; expected ({', '.join(one)}), or ({', '.join(['n', *one])}) for "
        f"one per observation, where an observation of shape {shape} has {size} entries"
    )


@_once
def check_noise(noise: Noise, label: str) -> None:
    """Raise a `DataError` unless the covariance of `noise` is finite and positive definite."""
    check_finite(noise, f"{label}: the noise")
    if isinstance(noise, JointNoise):
        for part in noise.noises:
            check_noise(part, label)
    if isinstance(noise, Masked):
        check_noise(noise.noise, label)
        if not np.all(np.isin(noise.mask, (0, 1))):
            raise DataError(f"{label}: the mask of the noise must be 1 (observed) or 0 (missing)")
    if isinstance(noise, Isotropic) and not np.all(np.asarray(noise.std) > 0):
        raise DataError(f"{label}: the noise standard deviation must be positive")
    if isinstance(noise, (DiagonalNoise, LowRankNoise)) and not np.all(
        np.asarray(noise.variance) > 0
    ):
        raise DataError(
            f"{label}: the noise variance must be positive everywhere; mark missing entries with a "
            "mask instead"
        )
    if isinstance(noise, StationaryNoise):
        _check_stationary(noise, label)
    if isinstance(noise, DenseNoise):
        cov = np.asarray(noise.covariance, np.float64)
        skew = np.abs(cov - cov.swapaxes(-1, -2)).max()
        lowest = np.linalg.eigvalsh(0.5 * (cov + cov.swapaxes(-1, -2))).min()
        if lowest <= 0 or skew > 1e-4 * np.abs(cov).max():
            raise DataError(
                f"{label}: the noise covariance is not symmetric positive definite (smallest "
                f"eigenvalue {lowest:.3g}, asymmetry {skew:.3g})"
            )
    _check_units(noise, label)


def _check_units(noise: Noise, label: str) -> None:
    """Variances that single precision holds, and products with them."""
    if isinstance(noise, Isotropic):
        variances = np.asarray(noise.std, np.float64) ** 2
    elif isinstance(noise, (DiagonalNoise, LowRankNoise)):
        variances = np.asarray(noise.variance)
    elif isinstance(noise, DenseNoise):
        variances = np.diagonal(np.asarray(noise.covariance), axis1=-2, axis2=-1)
    else:  # of one of these, or of covariances that are looked at below
        return
    for extreme in (variances.min(), variances.max()):
        if not 1 / _LARGEST <= extreme <= _LARGEST:
            factor = 10.0 ** -round(0.5 * math.log10(extreme)) if extreme > 0 else math.inf
            raise DataError(
                f"{label}: a noise variance of {extreme:.3g}; single precision works with {1 / _LARGEST:g} to "
                f"{_LARGEST:g}: give observations and noise in other units, such as multiplied by {factor:g}"
            )


def _check_stationary(noise: StationaryNoise, label: str) -> None:
    """Even, and with a positive spectrum."""
    axes = tuple(range(-noise.ndim, 0))
    skew = np.abs(noise.covariance - jnp.flip(noise.covariance, axes)).max()
    largest = np.abs(noise.covariance).max()
    if skew > 1e-4 * largest:
        raise DataError(
            f"{label}: the noise covariance at opposite lags differs (by {skew:.3g} of {largest:.3g}); it must "
            "be even, with lag 0 in the middle"
        )
    rows, shared = split(noise)
    one = lambda r: eqx.combine(r, shared).spectrum()
    spectrum = np.asarray(jax.vmap(one)(rows) if jax.tree.leaves(rows) else noise.spectrum())
    if spectrum.min() <= 0:
        raise DataError(
            f"{label}: the noise covariance is not positive definite on the grid: its spectrum falls to "
            f"{spectrum.min():.3g} of {spectrum.max():.3g}; taper it towards large lags, or raise the variance"
        )
