"""Checks of the parts of a view: shapes, values and masks; errors say where and what.

Each takes plain parts and the `label` that messages call the view by, and returns what the rest of
the package computes with: values and masks flattened. Those of noise are in `noise_checks`.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any
from weakref import WeakValueDictionary

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from dichroic.errors import DataError, ShapeError
from dichroic.numerics.arrays import as_booleans, check_real, entry_at, hidden_entries, split_mask
from dichroic.numerics.batching import take
from dichroic.numerics.finite import finite
from dichroic.operators import Operator, Shape
from dichroic.operators.base import traced
from dichroic.operators.linearity import probe


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


def check_rows(counts: set[int], n: int, what: str, shape: Shape = ()) -> None:
    """Raise a `ShapeError` unless per-observation parameters, of `counts` rows, are for `n` of `shape`."""
    for count in counts - {n}:
        one_each = (count, *(1 for _ in shape[1:]))
        hint = f"; for one per channel, give Diagonal or DiagonalNoise an array of shape {one_each}"
        raise ShapeError(
            f"{what} has per-observation parameters for {count} observations, but "
            f"there are {n} observations (axis 0)"
            + (hint if len(shape) > 1 and count == shape[0] else "")
        )


def check_finite(tree: Any, what: str) -> None:
    """Raise a `DataError` if an array in `tree` holds NaN or infinity."""
    if not finite(eqx.filter(tree, eqx.is_array)):
        raise DataError(f"{what} contains NaN or infinite values")


def once(check: Callable[..., None]) -> Callable[..., None]:
    """`check`, which passes over what it has found good before: the very same object, which cannot change."""
    good: WeakValueDictionary[int, Any] = WeakValueDictionary()

    @wraps(check)
    def checked(part: Any, *where: Any) -> None:
        if good.get(id(part)) is not part:
            check(part, *where)
            good[id(part)] = part

    return checked


@once
def check_operator(op: Operator, label: str) -> None:
    """Raise a `DichroicError` unless `op` is finite, and gives real arrays of its `out_shape`."""
    check_finite(op, f"{label}: the operator")
    y = traced(take(op, 0).mv, op.in_shape, f"{label}: the operator")
    check_same_shape(y.shape, op.out_shape, f"{label}: mv of the operator gives arrays of")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise DataError(f"{label}: the operator gives {y.dtype}; expected real numbers")


check_linear = once(probe)


def values_and_mask(
    observations: Any, given_mask: Any, label: str, also: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """`(values (n, M), 0 where missing; mask (M,) or (n, M), or None)` of `(n, *shape)`.

    What the mask leaves out, or `also` (true where observed, as the mask), is not looked at.
    """
    given = np.asarray(observations)
    n, shape = len(given), given.shape[1:]
    check_real(given, f"{label}: observations")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
        y = given.astype(jnp.zeros(()).dtype).reshape(n, -1)
    mask = _flat_mask(given_mask, y, shape, label)
    masks = [m for m in (mask, also) if m is not None]
    if not masks and np.all(np.isfinite(y)):
        return y, None
    seen = np.ones_like(y, bool)
    for m in masks:
        seen &= m
    bad = seen & ~np.isfinite(y)
    if bad.any():
        i, j = np.argwhere(bad)[0]
        where = entry_at(j, shape)
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
    if _is_nan(mask, label):
        return ~np.isnan(y)
    seen = _mask_array(mask, (len(y), *shape), label)
    return seen.reshape(-1 if seen.shape == shape else y.shape)


def _is_nan(mask: Any, label: str) -> bool:
    """Whether a mask is the word for "where the observations are NaN"."""
    if isinstance(mask, str) and mask != "nan":
        raise DataError(f"{label}: mask {mask!r}; expected an array or 'nan'")
    return isinstance(mask, str)


def _mask_array(mask: Any, each: Shape, label: str) -> np.ndarray:
    """A mask of observations of shape `each`, or of one of them, as booleans; what is masked in it is missing."""
    values, hidden = split_mask(mask, f"{label}: a mask")
    if np.shape(values) not in (each[1:], each):
        raise ShapeError(
            f"{label}: a mask of shape {np.shape(values)}; expected {each[1:]} (shared) or {each}"
        )
    values = values if hidden is None else np.where(hidden, 0, values)
    return as_booleans(values, f"{label}: a mask", _OBSERVED, _FLAGS)


_OBSERVED = "1 where an entry was observed, 0 where it is missing"
_FLAGS = (
    "of flags, mask=(flags & BAD) == 0, or in a problem file mask: {flags: …, bad: [1, 8]}; "
    "of weights, state the noise of each entry instead"
)


def plain_observations(
    observations: Any, mask: Any, label: str, seen: np.ndarray | None = None
) -> tuple[Any, Any]:
    """`(observations, mask)` where the observations are a plain array; what was masked in them is in the mask.

    So is what is not `seen`, true where an entry was observed, if that is given. Lists become arrays; what is read
    by slicing stays as it is.
    """
    what = f"{label}: the observations"
    y, hidden = split_mask(observations, what)
    if hidden_entries(mask) is not None:
        mask = _mask_array(mask, np.shape(y), label)
    if seen is not None:
        hidden = ~seen if hidden is None else hidden | ~seen
    if hidden is None:
        return y, mask
    if mask is None:
        return y, ~hidden
    if _is_nan(mask, label):
        return y, ~(hidden | np.isnan(y))
    return y, ~hidden & _mask_array(mask, np.shape(y), label)
