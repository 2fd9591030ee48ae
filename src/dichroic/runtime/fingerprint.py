"""A hash of what a value says, the same in every process: no addresses, no order of sets.

Of a function it sees the name, the code, the defaults and what it closes over, but not the globals
that it uses.
"""

import dataclasses
import functools
import hashlib
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_PART = 2**20  # numbers that are copied at a time


def fingerprint(value: Any) -> str:
    """The hash of `value`: arrays, numbers, text, functions, dataclasses, and containers of them."""
    digest = hashlib.sha256()
    _update(digest, value, ())
    return digest.hexdigest()


def _update(digest: Any, value: Any, inside: tuple[Any, ...]) -> None:
    if any(value is outer for outer in inside):  # such as a function that calls itself
        return
    array = _as_array(value)
    if array is not None:
        digest.update(f"array {array.shape} {array.dtype};".encode())
        flat = array.reshape(-1)
        for start in range(0, flat.size, _PART):
            digest.update(flat[start : start + _PART].tobytes())
        return
    name, parts = _contents(value)
    parts = list(parts)
    digest.update(f"{name} {len(parts)};".encode())
    for part in parts:
        _update(digest, part, (*inside, value))


def _as_array(value: Any) -> np.ndarray | None:
    """`value` as an array of numbers, if it is one."""
    if not isinstance(value, (bool, int, float, complex)) and not hasattr(value, "__array__"):
        return None
    try:
        array = np.asarray(value)
    except TypeError:  # JAX's keys of random numbers
        return None
    return None if array.dtype.hasobject else array


def _contents(value: Any) -> tuple[str, Iterable[Any]]:
    """The name of `value`, and the parts that say the rest."""
    match value:
        case Mapping():
            return "mapping", sorted(value.items(), key=lambda item: repr(item[0]))
        case list() | tuple():
            return "sequence", value
        case set() | frozenset():
            return "set", sorted(map(repr, value))
        case types.ModuleType():
            return value.__name__, ()
        case types.CodeType():
            return "code", (value.co_code, value.co_names, value.co_consts)
        case types.MethodType():
            return "method", (value.__func__, value.__self__)
        case types.FunctionType():
            name = f"{value.__module__}.{value.__qualname__}"
            closed = [cell.cell_contents for cell in value.__closure__ or ()]
            return name, (value.__code__, value.__defaults__, value.__kwdefaults__, closed)
        case functools.partial():
            return "partial", (value.func, value.args, value.keywords)
        case _:
            return _other_contents(value)


def _other_contents(value: Any) -> tuple[str, Iterable[Any]]:
    if hasattr(type(value), "fingerprint_parts"):  # what its fields do not tell
        return type(value).__qualname__, value.fingerprint_parts()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return name, [getattr(value, f.name) for f in dataclasses.fields(value)]
    wrapped = getattr(value, "__wrapped__", None)  # of jax.jit
    if wrapped is not None:
        return type(value).__qualname__, (wrapped,)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)), ()
