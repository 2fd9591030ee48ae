"""Noise as a view states it: flattened, without what is stated of missing entries, and checked where observed."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dichroic.errors import DataError, DichroicError, ShapeError
from dichroic.numerics.arrays import check_real, entry_at
from dichroic.numerics.batching import split
from dichroic.operators import Shape
from dichroic.operators.base import broadcasts
from dichroic.operators.noise import (
    DenseNoise,
    DiagonalNoise,
    IsotropicNoise,
    JointNoise,
    LowRankNoise,
    Masked,
    Noise,
    StationaryNoise,
    observed_entries,
)
from dichroic.problem.validation import check_finite, once

_LARGEST = 1e36  # variance of noise, and inverse of the smallest
_AXES: dict[type[Noise], dict[str, str]] = {  # of every parameter, for one observation of M entries
    IsotropicNoise: {"std": ""},
    DiagonalNoise: {"variance": "M"},
    LowRankNoise: {"factor": "MR", "variance": "M"},
    DenseNoise: {"covariance": "MM"},
    Masked: {"mask": "M"},
}


def flat_noise(noise: Any, shape: Shape, label: str, count: int | None = None) -> Noise:
    """The noise model with arrays over the flattened observation, whatever shape they came in.

    `count` is the number of observations, where it is known: with it, shapes that two readings fit are refused.
    """
    if isinstance(noise, (int, float, np.generic, np.ndarray, jax.Array)) and np.ndim(noise) == 0:
        check_real(noise, f"{label}: a noise standard deviation")
        return IsotropicNoise(float(noise))
    if not isinstance(noise, Noise):
        raise DataError(
            f"{label}: noise of type {type(noise).__name__}; expected a number (the standard "
            "deviation) or a model such as DiagonalNoise(variance)"
        )
    if isinstance(noise, JointNoise):
        return _flat_joint(noise, math.prod(shape), label)
    if isinstance(noise, Masked):
        noise = Masked(flat_noise(noise.noise, shape, label, count), noise.mask)
    if isinstance(noise, StationaryNoise):
        return noise.on(shape, label)
    for name, axes in next((a for kind, a in _AXES.items() if isinstance(noise, kind)), {}).items():
        array = getattr(noise, name)
        flat = _flat(array, axes, shape, f"{label}: the noise {name}", count)
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


def _flat(array: Any, axes: str, shape: Shape, what: str, count: int | None) -> Any:
    """`array`, per observation or not, with the entries of an observation along one axis."""
    got, size = np.shape(array), math.prod(shape)
    for entries in (shape, (size,)):
        want = sum((entries if a == "M" else got[-1:] for a in axes), ())
        rows = len(got) - len(want)
        if rows in (0, 1) and got[rows:] == want:
            want = (*got[:rows], *(size if a == "M" else got[-1] for a in axes))
            return array if want == got else array.reshape(want)
    if axes == "M" and broadcasts(got, shape):
        _check_reading(got, shape, what, count)
        rows = got[: len(got) - len(shape)]
        return jnp.broadcast_to(array, (*rows, *shape)).reshape(*rows, size)
    raise ShapeError(f"{what} has shape {got}; {_expected(axes, shape)}")


def _check_reading(got: Shape, shape: Shape, what: str, count: int | None) -> None:
    """`(C, 1)` of C observations of C channels: one per channel, or one per observation?"""
    if len(got) == len(shape) == 2 and got == (count, 1):
        raise ShapeError(
            f"{what} has shape {got}, one for each of {count} channels or of {count} observations: for one per "
            f"channel give it in full, numpy.broadcast_to(array, {shape}), and for one per observation as "
            f"array.reshape({count}, 1, 1)"
        )


def _expected(axes: str, shape: Shape) -> str:
    size = math.prod(shape)
    if not axes:
        return "expected (), or (n,) for one per observation; DiagonalNoise takes variances per channel or entry"
    one = [str(size) if a == "M" else a for a in axes]
    text = (
        f"expected ({', '.join(one)}), or ({', '.join(['n', *one])}) for one per observation, where an "
        f"observation of shape {shape} has {size} entries"
    )
    if axes != "M" or len(shape) < 2:
        return text
    ones = ", 1" * (len(shape) - 1)
    return f"{text}; one per channel has shape ({shape[0]}{ones}), or (n, {shape[0]}{ones})"


# What is masked.


def own_mask(noise: Noise, size: int, label: str) -> np.ndarray | None:
    """True where `noise` says that an entry was observed, `(M,)` or `(n, M)`; None if it says nothing of it."""
    masks = [node for node in _nodes(noise) if isinstance(node, Masked)]
    if not masks:
        return None
    if not all(np.all(np.isin(node.mask, (0, 1))) for node in masks):
        raise DataError(f"{label}: the mask of the noise must be 1 (observed) or 0 (missing)")
    seen = np.asarray(observed_entries(noise, size)) > 0
    return seen[0] if len(seen) == 1 else seen


def _nodes(noise: Noise) -> list[Noise]:
    """`noise` and all that it is made of."""
    inner = noise.noises if isinstance(noise, JointNoise) else ()
    inner = (noise.noise,) if isinstance(noise, Masked) else inner
    return [noise, *(node for part in inner for node in _nodes(part))]


def without_masked(noise: Noise, seen: np.ndarray) -> Noise:
    """`noise` with independent noise of variance 1 where `seen` is false, `(M,)` or `(n, M)`.

    So nothing that is stated of missing entries, such as an infinite or unknown variance, is computed with. What
    all observations share is replaced where none has the entry.
    """
    if isinstance(noise, Masked):
        inner = without_masked(noise.noise, seen & (np.asarray(noise.mask) > 0))
        return Masked(inner, noise.mask)
    if isinstance(noise, JointNoise):
        parts = np.split(seen, np.cumsum(noise.sizes)[:-1], axis=-1)
        pairs = zip(noise.noises, parts, strict=True)
        return JointNoise(tuple(without_masked(n, s) for n, s in pairs), noise.sizes)
    if isinstance(noise, IsotropicNoise):
        some = _of(seen, noise.std.ndim).any(-1)
        return IsotropicNoise(np.where(some, noise.std, 1))
    if isinstance(noise, DiagonalNoise):
        return DiagonalNoise(np.where(_of(seen, noise.variance.ndim - 1), noise.variance, 1))
    if isinstance(noise, LowRankNoise):
        factor = np.where(_of(seen, noise.factor.ndim - 2)[..., None], noise.factor, 0)
        return LowRankNoise(factor, np.where(_of(seen, noise.variance.ndim - 1), noise.variance, 1))
    if isinstance(noise, DenseNoise):
        some = _of(seen, noise.covariance.ndim - 2)
        both = some[..., :, None] & some[..., None, :]
        return DenseNoise(np.where(both, noise.covariance, np.eye(some.shape[-1])))
    if isinstance(noise, StationaryNoise) and noise.covariance.ndim > noise.ndim:
        some = _of(seen, 1).any(-1)
        return noise.white_unless(np.broadcast_to(some, len(noise.covariance)))
    return noise


def _of(seen: np.ndarray, rows: int) -> np.ndarray:
    """`seen` for a parameter with `rows` (0 or 1) axes of observations; for a shared one, what any has."""
    return np.any(seen, axis=0) if seen.ndim == 2 and not rows else seen


# Checks.


def checked_noise(noise: Noise, seen: np.ndarray | None, shape: Shape, label: str) -> Noise:
    """`noise`, checked, without what is stated of entries that are not `seen`; raises a `DichroicError`."""
    if seen is None:
        check_noise(noise, label, shape)
        return noise
    clean = without_masked(noise, seen)
    if not _is_good(noise, label, shape):  # then it is good without some rows, too
        check_noise(clean, label, shape)
    return clean


def _is_good(noise: Noise, label: str, shape: Shape) -> bool:
    try:
        check_noise(noise, label, shape)
    except DichroicError:
        return False
    return True


@once
def check_noise(noise: Noise, label: str, shape: Shape) -> None:
    """Raise a `DataError` unless `noise`, over an observation of `shape`, has a positive definite covariance."""
    if isinstance(noise, JointNoise):
        for part, size in zip(noise.noises, noise.sizes, strict=True):
            check_noise(part, label, (size,))
    elif isinstance(noise, Masked):
        check_noise(noise.noise, label, shape)
    elif isinstance(noise, IsotropicNoise):
        std = np.asarray(noise.std, np.float64)
        fine = np.isfinite(std) & (std > 0)
        _check_each(
            std, fine, 0, (), f"{label}: the noise standard deviation", "it must be positive"
        )
        _check_units(std**2, 0, (), label)
    elif isinstance(noise, (DiagonalNoise, LowRankNoise)):
        if isinstance(noise, LowRankNoise):
            _check_factor(np.asarray(noise.factor), shape, label)
        variance = np.asarray(noise.variance)
        fine = np.isfinite(variance) & (variance > 0)
        _check_each(variance, fine, 1, shape, f"{label}: the noise variance", _WITH_MASK)
        _check_units(variance, 1, shape, label)
    elif isinstance(noise, DenseNoise):
        _check_dense(np.asarray(noise.covariance, np.float64), shape, label)
    else:
        check_finite(noise, f"{label}: the noise")
        if isinstance(noise, StationaryNoise):
            _check_stationary(noise, label)


_WITH_MASK = (
    "it must be positive and finite wherever an entry was observed: mark those that are missing with a mask, "
    "such as mask=variance > 0"
)


def _check_each(
    values: np.ndarray, fine: np.ndarray, axes: int, shape: Shape, what: str, advice: str
) -> None:
    """Raise a `DataError` that says where `values`, of which the last `axes` are entries, are not `fine`."""
    if fine.all():
        return
    first = np.argwhere(~fine)[0]
    count = int((~fine).sum())
    more = f" ({count:,} such)" if count > 1 else ""
    raise DataError(
        f"{what} is {values[tuple(first)]:.3g}{_place(first, axes, shape)}{more}; {advice}"
    )


def _place(index: Any, axes: int, shape: Shape) -> str:
    """Where an index, that of an observation before those of `axes` entries, points to."""
    rows = [int(i) for i in index[: len(index) - axes]]
    entries = [entry_at(i, shape) for i in index[len(index) - axes :]]
    at = [f"observation {rows[0]}"] if rows else []
    at += [f"entry {entries[0]}"] if len(entries) == 1 else []
    at += [f"entries {entries[0]} and {entries[1]}"] if len(entries) == 2 else []
    return " at " + ", ".join(at) if at else ""


def _check_factor(factor: np.ndarray, shape: Shape, label: str) -> None:
    fine = np.asarray(np.isfinite(factor).all(-1))
    sums = np.where(fine, 0, np.nan)
    _check_each(sums, fine, 1, shape, f"{label}: the noise factor", _WITH_MASK.split(":")[0])


def _check_dense(cov: np.ndarray, shape: Shape, label: str) -> None:
    """Finite, symmetric and positive definite."""
    what = f"{label}: the noise covariance"
    advice = "mark entries that are missing with a mask"
    _check_each(cov, np.isfinite(cov), 2, shape, what, advice)
    turned = cov.swapaxes(-1, -2)
    skew = np.abs(cov - turned).max()
    lowest = np.linalg.eigvalsh(0.5 * (cov + turned)).min(-1)
    if lowest.min() <= 0 or skew > 1e-4 * np.abs(cov).max():
        where = f" of observation {int(lowest.argmin())}" if lowest.ndim else ""
        raise DataError(
            f"{what}{where} is not symmetric positive definite (smallest "
            f"eigenvalue {lowest.min():.3g}, asymmetry {skew:.3g})"
        )
    _check_units(np.diagonal(cov, axis1=-2, axis2=-1), 1, shape, label)


def _check_units(variances: np.ndarray, axes: int, shape: Shape, label: str) -> None:
    """Variances that single precision holds, and products with them."""
    for pick in (np.argmin, np.argmax):
        at = np.unravel_index(pick(variances), variances.shape)
        extreme = float(variances[at])
        if not 1 / _LARGEST <= extreme <= _LARGEST:
            factor = 10.0 ** -round(0.5 * math.log10(extreme)) if extreme > 0 else math.inf
            raise DataError(
                f"{label}: a noise variance of {extreme:.3g}{_place(at, axes, shape)}; single precision works "
                f"with {1 / _LARGEST:g} to {_LARGEST:g}: give observations and noise in other units, such as "
                f"multiplied by {factor:g}"
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
    one: Callable[[StationaryNoise], Array] = lambda r: eqx.combine(r, shared).spectrum()
    spectrum = np.asarray(jax.vmap(one)(rows) if jax.tree.leaves(rows) else noise.spectrum())
    if spectrum.min() <= 0:
        raise DataError(
            f"{label}: the noise covariance is not positive definite on the grid: its spectrum falls to "
            f"{spectrum.min():.3g} of {spectrum.max():.3g}; taper it towards large lags, or raise the variance"
        )
