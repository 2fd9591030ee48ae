"""Arrays as users have them: lists of arrays, and arrays that carry a mask of what is missing.

NumPy drops masks silently wherever it makes a plain array (`np.asarray`), so that saturated or absent values pass
for observed ones. Here they are taken apart first, or refused. A mask is that of `numpy.ma` and of whatever else
has a boolean `mask`, true where an entry is *not* to be used, such as astropy's masked arrays and columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dichroic.errors import DataError


def split_mask(value: Any, what: str) -> tuple[Any, np.ndarray | None]:
    """`(array, where it is masked)` of `value`: a plain array, and booleans of its shape, or None if nothing is.

    Lists, and arrays of arrays, become one array. What is read by slicing (HDF5, zarr) stays as it is. Raises
    `DataError`, which calls the array `what`, where the arrays of a list differ in shape.
    """
    value = joined(value, what)
    hidden = hidden_entries(value)
    if hidden is not None:
        value = getattr(value, "unmasked", value)
    if hidden is not None or isinstance(value, np.ma.MaskedArray):
        value = np.asarray(value)
    return value, hidden


def with_mask(value: Any, what: str) -> Any:
    """`value` as one array, in `numpy.ma` with its mask where entries are masked; raises as `split_mask`."""
    array, hidden = split_mask(value, what)
    return array if hidden is None else np.ma.MaskedArray(array, hidden)


def hidden_entries(value: Any) -> np.ndarray | None:
    """Where `value` is masked, as booleans of its shape; None if nothing is."""
    mask = getattr(value, "mask", None)
    if mask is None or callable(mask):
        return None
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape not in ((), np.shape(value)) or not mask.any():
        return None
    return np.broadcast_to(mask, np.shape(value))


def joined(value: Any, what: str) -> Any:
    """`value` as one array with the masks of its parts, if it is a list of arrays or numbers; else `value`."""
    nested = isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 1
    if not isinstance(value, (list, tuple)) and not (nested and any(map(np.size, value))):
        return value
    if nested and not any(map(_is_array, value)):
        return value
    if not any(map(_is_array, value)):
        return np.asarray(value)
    return stacked([np.asanyarray(joined(part, what)) for part in value], what)


def _is_array(part: Any) -> bool:
    plain = isinstance(part, np.generic)  # a number of numpy's
    return isinstance(part, (list, tuple)) or (hasattr(part, "__array__") and not plain)


def stacked(arrays: Sequence[Any], what: str) -> np.ndarray:
    """`arrays` along a new first axis, with their masks; a `DataError` says which differ in shape."""
    first = np.shape(arrays[0])
    for i, array in enumerate(arrays):
        if np.shape(array) != first:
            raise DataError(
                f"{what}: number {i} has shape {np.shape(array)}, and number 0 {first}: all need one shape. "
                f"{PAD}"
            )
    parts = [
        split_mask(array, what) for array in arrays
    ]  # np.ma.stack looks at numpy's masks alone
    values = np.stack([array for array, _ in parts])
    if all(hidden is None for _, hidden in parts):
        return values
    masks = [np.zeros(first, bool) if hidden is None else hidden for _, hidden in parts]
    return np.ma.MaskedArray(values, np.stack(masks))


PAD = (
    "dichroic.pad_stamps(arrays) pads them to the largest and masks what it adds; in a scene, operators "
    "such as PatchPlacement say where each one is"
)


def unmasked(value: Any, what: str) -> Any:
    """`value` without a mask; raises `DataError`, which calls it `what`, where entries are masked."""
    value, hidden = split_mask(value, what)
    if hidden is not None:
        first = tuple(int(i) for i in np.argwhere(hidden)[0])
        raise DataError(
            f"{what}: {int(hidden.sum())} entries are masked, the first at {first}; every entry is needed: "
            "give values for them (array.filled(0))"
        )
    return value


def nan_where_masked(value: Any) -> Any:
    """`value` without a mask, NaN where entries are masked."""
    array, hidden = split_mask(value, "an array")
    return array if hidden is None else np.where(hidden, np.nan, array)


def check_real(array: Any, what: str) -> None:
    """Raise a `DataError` unless `array` holds real numbers (or booleans)."""
    dtype = np.asarray(array).dtype
    if dtype.kind not in "biuf":
        raise DataError(f"{what} of type {dtype}; expected real numbers")


def as_booleans(values: Any, what: str, meaning: str, otherwise: str = "") -> np.ndarray:
    """`values`, booleans or 0 and 1, as booleans.

    Raises `DataError` with the values found where there are others, what 0 and 1 mean, and what to do `otherwise`.
    """
    values = np.asarray(values)
    check_real(values, what)
    if values.dtype == bool:
        return values
    if missing := int(np.count_nonzero(np.isnan(values))) if values.dtype.kind == "f" else 0:
        raise DataError(f"{what} with {missing} NaN; expected {meaning}")
    good = values == 1
    if not np.all(good | (values == 0)):
        found = np.unique(values)
        listed = ", ".join(f"{v:.10g}" for v in found[:6]) + (", …" if len(found) > 6 else "")
        way = f"; {otherwise}" if otherwise else ""
        raise DataError(f"{what} with values {listed}; expected {meaning}{way}")
    return good


def entry_at(flat: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """The index of the entry `flat` of an array of `shape`, in C order."""
    return tuple(int(i) for i in np.unravel_index(int(flat), tuple(shape)))


def shown_entry(flat: Any, shape: Sequence[int]) -> int | tuple[int, ...]:
    """That index as messages show it: a number where there is one axis."""
    at = entry_at(flat, shape)
    return at[0] if len(at) == 1 else at
