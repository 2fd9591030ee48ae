"""Stamps of unequal sizes, as catalogues of objects have them, as one masked array."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dichroic.errors import DataError, ShapeError
from dichroic.numerics.arrays import split_mask


def pad_stamps(
    stamps: Sequence[Any], shape: Sequence[int] | None = None, *, centre: bool = True
) -> np.ma.MaskedArray:
    """Stamps of unequal sizes as the observations of one view, with what is padded masked.

    Args:
        stamps: arrays with the same number of axes; entries that are masked in them stay masked.
        shape: that of every observation; by default the largest size along each axis.
        centre: whether pixel `size // 2` of a stamp comes to lie at pixel `shape // 2`, along each axis (the
            centre of `Convolve` and `numpy.fft.fftshift`); otherwise pixel 0 at pixel 0.

    Returns:
        `(n, *shape)`, 0 and masked outside the stamps: `View(pad_stamps(stamps), …)` takes it as it is. Padded
        alike, variances go with it: `DiagonalNoise(pad_stamps(variances))`.

    Raises:
        DataError: if there is no stamp.
        ShapeError: if stamps differ in the number of axes, or do not fit into `shape`.
    """
    parts = [split_mask(stamp, "a stamp") for stamp in stamps]
    sizes = [np.shape(array) for array, _ in parts]
    if not sizes:
        raise DataError("pad_stamps: there is no stamp")
    if len({len(size) for size in sizes}) > 1:
        raise ShapeError(
            f"pad_stamps: stamps with different numbers of axes, such as {sizes[0]} and "
            f"{next(s for s in sizes if len(s) != len(sizes[0]))}"
        )
    room = tuple(max(along) for along in zip(*sizes, strict=True)) if shape is None else shape
    room = tuple(int(size) for size in room)
    values = np.zeros((len(sizes), *room), np.result_type(*(np.asarray(a) for a, _ in parts)))
    hidden = np.ones(values.shape, bool)
    for i, (array, masked) in enumerate(parts):
        at = (i, *_window(sizes[i], room, centre, i))
        values[at], hidden[at] = array, False if masked is None else masked
    return np.ma.MaskedArray(values, hidden)


def _window(
    size: tuple[int, ...], room: tuple[int, ...], centre: bool, i: int
) -> tuple[slice, ...]:
    """Where a stamp of `size` lies in `room`."""
    starts = [r // 2 - s // 2 if centre else 0 for s, r in zip(size, room, strict=False)]
    fits = [a >= 0 and a + s <= r for a, s, r in zip(starts, size, room, strict=False)]
    if len(size) != len(room) or not all(fits):
        raise ShapeError(
            f"pad_stamps: stamp {i} of shape {size} does not fit into {room}"
            + (" with its centre, at size // 2, at shape // 2" if centre else "")
        )
    return tuple(slice(a, a + s) for a, s in zip(starts, size, strict=True))
