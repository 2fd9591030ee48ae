"""Products with operators in double precision, for values of sources that single precision rounds too much.

The arrays of an operator are rounded to float32 when it is made; here they count as exact. What that rounding can
do to a product is estimated by moving them by one unit in the last place (`rounding`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dichroic.errors import DataError, DichroicError
from dichroic.numerics.batching import split, take
from dichroic.numerics.precision import float64
from dichroic.operators.base import Operator, in_double
from dichroic.operators.elementary import FunctionOperator

Values = Mapping[str, np.ndarray]  # of each source, `(*shape)`
_LOW_BITS = 12  # of a float32; 0 of numbers that were not rounded, but for one in 4,096
_TRIALS = 4


def images(operators: Mapping[str, Operator], x: Values) -> np.ndarray:
    """`Σ_β A_β x_β` of the sources in `x`, `(n, M)` in float64; `(1, M)` where all observations share operators.

    Raises `DataError` where an operator cannot be evaluated in double precision.
    """
    return _in_double(_images, {k: operators[k] for k in x}, x)


def adjoints(operators: Mapping[str, Operator], v: np.ndarray) -> dict[str, np.ndarray]:
    """`Σ_i A_iβᵀ v_i` of every source, for `v` as `images` gives."""
    return _in_double(_adjoints, dict(operators), v)


def rounding(operators: Mapping[str, Operator], x: Values, row: int = 0) -> np.ndarray:
    """Standard deviations `(M,)` of what the rounding of operators to float32 changes in row `row` of `images`."""

    def changes(known: dict[str, Operator], x: dict[str, Array]) -> Array:
        rng = np.random.default_rng(0)
        made = {k: eqx.filter_closure_convert(op.mv, x[k]) for k, op in known.items()}
        at = lambda fs: sum(jnp.ravel(f(x[k])) for k, f in fs.items())
        moved = lambda leaf: _moved(leaf, rng) if eqx.is_inexact_array(leaf) else leaf
        all_moved = (jax.tree.map(moved, made) for _ in range(_TRIALS))
        return jnp.stack([at(fs) - at(made) for fs in all_moved])

    found = _in_double(changes, take({k: operators[k] for k in x}, row), x)
    return np.sqrt(np.mean(found**2, axis=0) / 12)  # rounding is uniform within one unit


def _in_double(function: Callable[..., Any], operators: dict[str, Operator], *values: Any) -> Any:
    """`function` of operators and values in float64, as NumPy arrays."""
    try:
        with float64():
            found = function(*in_double((_apart(operators), *values)))
            return jax.tree.map(np.asarray, found)
    except DichroicError:
        raise
    except Exception as error:  # of a user's function
        raise DataError(
            f"the operators of {', '.join(operators)} cannot be evaluated in double precision ({error}), which "
            "observations with so large an offset need: subtract the mean from the observations"
        ) from error


_COPIES: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _apart(operators: dict[str, Operator]) -> dict[str, Operator]:
    """`operators` whose functions have NumPy arrays of their own.

    JAX remembers what it made of an array in double precision, and takes that in single precision too.
    """
    is_function = lambda node: isinstance(node, FunctionOperator)

    def apart(node: Any) -> Any:
        if not is_function(node) or not isinstance(node.fn, FunctionType):
            return node
        if node.fn not in _COPIES:
            _COPIES[node.fn] = _own(node.fn)  # the same in all calls: programs are kept by it
        copy = object.__new__(FunctionOperator)
        for field in dataclasses.fields(node):
            value = _COPIES[node.fn] if field.name == "fn" else getattr(node, field.name)
            object.__setattr__(copy, field.name, value)
        return copy

    return jax.tree.map(apart, operators, is_leaf=is_function)


def _own(value: Any) -> Any:
    """A copy of an array, or of a function with copies of those that it refers to."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if not isinstance(value, FunctionType):
        return value
    used = {k: _own(a) for k, a in value.__globals__.items() if k in value.__code__.co_names}
    cells = tuple(CellType(_own(c.cell_contents)) for c in value.__closure__ or ())
    defaults = tuple(map(_own, value.__defaults__ or ()))
    return FunctionType(
        value.__code__, {**value.__globals__, **used}, value.__name__, defaults, cells
    )


@eqx.filter_jit
def _images(operators: dict[str, Operator], x: dict[str, Array]) -> Array:
    one = lambda ops: sum(jnp.ravel(op.mv(x[k])) for k, op in ops.items())
    return _of_rows(one, operators)


@eqx.filter_jit
def _adjoints(operators: dict[str, Operator], v: Array) -> dict[str, Array]:
    rows, shared = split(operators)

    def one(row: dict[str, Operator], v: Array) -> dict[str, Array]:
        return {k: op.rmv(v.reshape(op.out_shape)) for k, op in eqx.combine(row, shared).items()}

    return jax.tree.map(lambda a: a.sum(axis=0), jax.vmap(one)(rows, v))


def _of_rows(one: Callable[[dict[str, Operator]], Any], operators: dict[str, Operator]) -> Any:
    """`one` of the operators of each observation, along a leading axis of length 1 where they are shared."""
    rows, shared = split(operators)
    if not jax.tree.leaves(rows):
        return one(operators)[None]
    return jax.vmap(lambda row: one(eqx.combine(row, shared)))(rows)


def _moved(array: Any, rng: np.random.Generator) -> Array:
    """`array` with each number that was rounded to float32 moved by one unit in its last place, up or down."""
    a = np.asarray(array, np.float32)
    exact = a.view(np.uint32) % 2**_LOW_BITS == 0
    towards = np.where(rng.random(a.shape) < 0.5, np.float32(-np.inf), np.float32(np.inf))
    return jnp.asarray(np.where(exact, a, np.nextafter(a, towards)), array.dtype)
