"""The contract of a linear operator `A: source → view`.

An operator is an immutable pytree that describes the map for *one* observation: `mv(x)` takes an array
of shape `in_shape` to one of `out_shape`, and `rmv(y)` is the adjoint, `⟨A x, y⟩ = ⟨x, Aᵀ y⟩`. A
parameter with one more axis than the constructor asks for is per observation (see
`dichroic.numerics.batching`). Operators compose with `@`, add with `+`, and scale with `*`:

    blur @ (0.5 * Identity((8, 8)))
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dichroic.errors import DataError, DichroicError, ShapeError
from dichroic.numerics.arrays import unmasked
from dichroic.numerics.batching import split
from dichroic.numerics.precision import float64

Shape = tuple[int, ...]
_PROBES = 32


def as_shape(shape: int | tuple[int | float, ...] | list[int]) -> Shape:
    """`shape` as a tuple of positive integers."""
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(d < 1 or d % 1 for d in dims):
        raise ShapeError(f"a shape needs positive integers, got {dims}")
    return tuple(int(d) for d in dims)


def check_declared(module: eqx.Module, *names: str) -> None:
    """Raises `DataError` unless `module` has an attribute (a field or a property) of every name."""
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise DataError(
            f"{type(module).__name__} has no {' and no '.join(missing)}: declare a field or a property"
        )


def traced(function: Callable[[Array], Any], in_shape: Shape, what: str) -> jax.ShapeDtypeStruct:
    """The shape and type of what `function` gives of an array of `in_shape`, by tracing it.

    Raises `DataError` where JAX cannot trace `function`, or it gives something else than an array.
    """
    try:
        y = jax.eval_shape(function, jax.ShapeDtypeStruct(in_shape, jnp.zeros(()).dtype))
    except DichroicError:
        raise
    except jax.errors.JAXTypeError as error:
        raise DataError(
            f"{what} needs the values of its argument (by NumPy or SciPy, or an `if` on them), which are "
            "not there while "
            f"JAX traces it ({type(error).__name__}): write it with jax.numpy, or give its adjoint too: "
            "as_operator(function, adjoint=…, in_shape=…)"
        ) from error
    except Exception as error:
        raise DataError(
            f"{what} cannot be traced by JAX on an array of shape {in_shape} ({type(error).__name__}: "
            f"{error}); if it "
            "works on NumPy arrays, give its adjoint too: as_operator(function, adjoint=…, in_shape=…)"
        ) from error
    if not hasattr(y, "dtype"):
        raise DataError(f"{what} gives {type(y).__name__}; expected one array")
    return y


def broadcasts(got: Shape, shape: Shape) -> bool:
    """Whether an array has all axes of `shape`, each of its length or of 1, and at most one more before them."""
    rows = len(got) - len(shape)
    return rows in (0, 1) and all(g in (1, d) for g, d in zip(got[rows:], shape, strict=True))


class _Shapes:
    """Declared apart from the fields of an operator, which are the arguments of its constructor.

    A subclass has a field or a property of each name; pyright does not allow a property in place of a
    variable, though nothing is ever assigned to it.
    """

    in_shape: Shape
    out_shape: Shape


class Operator(_Shapes, eqx.Module):
    """A linear map; subclasses define `in_shape`, `out_shape` and `mv`.

    Raises `DataError` where a subclass leaves one of the shapes out.
    """

    __array_ufunc__ = None  # so that `numpy_array * operator` is left to `__rmul__`

    def __check_init__(self):
        check_declared(self, "in_shape", "out_shape")

    @abstractmethod
    def mv(self, x: Array) -> Array:
        """`A x` for `x` of shape `in_shape`; the result has shape `out_shape`."""

    def rmv(self, y: Array) -> Array:
        """`Aᵀ y` for `y` of shape `out_shape`, by transposing `mv` unless a subclass knows better."""
        x = jax.ShapeDtypeStruct(self.in_shape, y.dtype)
        (transposed,) = jax.linear_transpose(self.mv, x)(y)
        return transposed

    def as_matrix(self) -> Float[Array, "out in"]:
        """The dense matrix, rows and columns in C order of `out_shape` and `in_shape`."""
        size = math.prod(self.in_shape)
        basis = jnp.eye(size).reshape(size, *self.in_shape)
        return jax.vmap(lambda x: self.mv(x).ravel())(basis).T

    def each(self, x: Any) -> np.ndarray:
        """`A_i x_i` of every observation: `(n, *in_shape)` to `(n, *out_shape)`, also of draws `(draws, n, …)`.

        In float64 for `x` in float64.
        So what a source looks like in a view: `view.operators["galaxy"].each(result.draws["galaxy"])`.
        """
        x = np.asarray(unmasked(x, "the sources that an operator takes"))
        if x.ndim - len(self.in_shape) == 2:
            return np.stack([self.each(draw) for draw in x])
        if x.ndim - len(self.in_shape) != 1 or x.shape[1:] != self.in_shape:
            raise ShapeError(f"expected (n, {', '.join(map(str, self.in_shape))}), got {x.shape}")
        if x.dtype != np.float64:
            return np.asarray(_each(self, jnp.asarray(x, float)))
        with float64():
            return np.asarray(_each(in_double(self), jnp.asarray(x)))

    def row_squares(self) -> Array:
        """`Σ_j A_ij²` of every output, the diagonal of `A Aᵀ`, shaped as `out_shape`.

        Exact where a subclass knows it; here the mean of `(A z)²` over a few fixed white `z`, good to
        `√(2 / 32)`, which is enough for what it is used for, to precondition.
        """
        z = jax.random.normal(jax.random.key(0), (_PROBES, *self.in_shape))
        return jnp.mean(jax.vmap(self.mv)(z) ** 2, axis=0)

    def __matmul__(self, other: "Operator") -> "Operator":
        from dichroic.operators.structure import Compose

        return Compose((self, other))

    def __add__(self, other: "Operator") -> "Operator":
        from dichroic.operators.structure import Sum

        return Sum((self, other))

    def __mul__(self, factor: Any) -> "Operator":
        from dichroic.operators.elementary import Scale
        from dichroic.operators.structure import Compose

        return Compose((Scale(self.out_shape, factor), self))

    __rmul__ = __mul__


def in_double(tree: Any) -> Any:
    """`tree` with its arrays in float64, where that is enabled."""
    double = lambda a: jnp.asarray(a, jnp.float64) if eqx.is_inexact_array_like(a) else a
    return jax.tree.map(double, tree)


@eqx.filter_jit
def _each(op: Operator, x: Array) -> Array:
    rows, shared = split(op)
    return jax.vmap(lambda row, x: eqx.combine(row, shared).mv(x))(rows, x)
