"""Plain values in a file, and how messages show them."""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

from dichroic.errors import ConfigError
from dichroic.operators import Shape
from dichroic.operators.base import as_shape
from dichroic.runtime.limits import MOST_NUMBERS


def as_number(value: Any) -> float | None:
    """`value` as a number, or None; YAML reads `1e-3` as text."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return None
    return None


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def parse_shape(value: Any) -> Shape:
    """`value`, an integer or a list of them, as a shape."""
    dims = value if isinstance(value, (list, tuple)) else [value]
    if not dims or not all(map(is_integer, dims)):
        raise ConfigError(f"expected a shape such as [8, 8], got {short(value)}")
    shape = as_shape(tuple(dims))
    if math.prod(shape) > MOST_NUMBERS:
        raise ConfigError(f"{short(value)}: at most {MOST_NUMBERS:,} entries are supported")
    return shape


def parse_count(value: Any, what: str) -> int:
    """`value`, which must be a positive integer; an error calls it `what`."""
    if not is_integer(value) or value < 1:
        raise ConfigError(f"{what}: expected a positive integer, got {short(value)}")
    return value


def short(value: Any) -> str:
    """`value` as messages show it."""
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}…"


def available(name: str, names: Sequence[str]) -> str:
    """The end of a message that `name` does not exist: the nearest of `names`, and all of them."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    there = listed(names) or "nothing"
    return (f"did you mean {near[0]!r}? " if near else "") + f"there is: {there}"


def listed(names: Sequence[str], between: str = ", ", most: int = 20) -> str:
    """The first `names`, as messages list them."""
    return between.join(names[:most]) + (f"{between}…" if len(names) > most else "")


def natural(name: str) -> tuple[list[str | int], str]:
    """What sorts names in natural order, by the numbers in them: `img2.png` before `img10.png`."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
