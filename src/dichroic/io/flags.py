"""A mask stated by the flags of a survey: integers whose bits say what is wrong with an entry."""

from typing import Any

import numpy as np

from dichroic.errors import ConfigError, DataError
from dichroic.io.location import Location
from dichroic.io.values import is_integer, short


def flag_bits(flags: np.ndarray, listed: bool, location: Location) -> np.ndarray:
    """Flags as unsigned integers of their own width; those `listed` in the file itself are read as floats."""
    if listed and np.all(flags == np.round(flags)) and np.all(np.abs(flags) < 2**53):
        flags = flags.astype(np.int64)
    if flags.dtype.kind == "b":
        flags = flags.astype(np.uint8)
    if flags.dtype.kind not in "iu":
        raise DataError(f"{location}: flags of type {flags.dtype}; expected integers")
    native = np.ascontiguousarray(flags, flags.dtype.newbyteorder("="))
    return native.view(f"u{native.itemsize}").reshape(flags.shape)


def bad_bits(bad: Any, dtype: np.dtype, location: Location) -> np.integer:
    """The bits that make an entry of flags of `dtype` missing: those of `bad`, one or a list; all, without it."""
    most = np.iinfo(dtype).max
    values = bad if isinstance(bad, (list, tuple)) else [most if bad is None else bad]
    wrong = [v for v in values if not is_integer(v) or not 0 < v <= most]
    if wrong or not values:
        raise ConfigError(
            f"{location}: expected the bits that mark an entry as missing, such as [1, 8], each an integer "
            f"from 1 to {most} in flags of type {dtype}; got {short(wrong[0] if wrong else bad)}"
        )
    return np.bitwise_or.reduce(np.array(values, dtype))
