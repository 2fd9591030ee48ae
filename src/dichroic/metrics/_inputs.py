"""Checks that metrics make of their arguments, with errors that name the metric and argument."""

import numpy as np
from jaxtyping import ArrayLike, Float

from dichroic.errors import DataError, ShapeError
from dichroic.numerics.arrays import unmasked


def positive(where: str, **values: float) -> None:
    """Raise a `DataError` unless every value is a finite positive number."""
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise DataError(f"{where}: {name} must be positive and finite, got {value}")


def finite(where: str, name: str, values: ArrayLike) -> Float[np.ndarray, "..."]:
    """`values` as a floating NumPy array, or a `DataError` if one of them is NaN or infinite."""
    array = np.asarray(unmasked(values, f"{where}: {name}"))
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(float)
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"{where}: {name} has {int(bad.sum())} NaN or infinite values, the first at index "
            f"{first}; leave those observations out"
        )
    return array


def same_shape(where: str, **arrays: np.ndarray) -> None:
    """Raise a `ShapeError` unless all arrays have one shape, `(n, …)` with at least one value."""
    shapes = {name: a.shape for name, a in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ShapeError(f"{where}: {listed} must have the same shape")
    for name, shape in shapes.items():
        if not shape or 0 in shape:
            raise ShapeError(f"{where}: {name} has shape {shape}, expected (n, …) and n > 0")


def clouds(
    where: str, x: ArrayLike, y: ArrayLike, *, at_least: int = 1
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]]:
    """`x` and `y` as float64 point clouds in one space, with `at_least` points each."""
    pair = [finite(where, name, a).astype(float) for name, a in (("x", x), ("y", y))]
    for name, a in zip("xy", pair, strict=True):
        if a.ndim != 2:
            raise ShapeError(
                f"{where}: {name} has shape {a.shape}, expected (n, d); flatten each sample, "
                f"as in {name}.reshape(len({name}), -1)"
            )
        if len(a) < at_least or a.shape[1] == 0:
            raise ShapeError(
                f"{where}: {name} has shape {a.shape}, needs at least {at_least} points and d > 0"
            )
    if pair[0].shape[1] != pair[1].shape[1]:
        raise ShapeError(
            f"{where}: x has {pair[0].shape[1]} dimensions and y has {pair[1].shape[1]}; "
            "samples must live in the same space"
        )
    return pair[0], pair[1]
