"""Operators that are computed outside of JAX: by NumPy, SciPy, or a library of linear operators."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from dichroic.errors import DataError, ShapeError
from dichroic.operators.base import Operator, Shape, as_shape

Vector = Callable[[np.ndarray], Any]


@dataclass(frozen=True, eq=False)
class Products:
    """Products with a matrix `A` of `shape` `(M, D)` and with `Aᵀ`, of one vector at a time, in float64."""

    shape: tuple[int, int]
    forward: Vector = field(repr=False)
    adjoint: Vector = field(repr=False)

    def rows(self, x: np.ndarray, transposed: bool) -> np.ndarray:
        """`A` (or `Aᵀ`) times each row of `x` `(…, D)`, of its type."""
        one, size = (self.adjoint, self.shape[1]) if transposed else (self.forward, self.shape[0])
        flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        out = np.stack([np.asarray(one(row)).reshape(size) for row in flat])
        return out.astype(x.dtype).reshape(*x.shape[:-1], size)

    @cached_property
    def matrix(self) -> np.ndarray:
        """`A`, by a product with every unit vector."""
        return self.rows(np.eye(self.shape[1]), transposed=False).T

    def fingerprint_parts(self) -> tuple[Any, ...]:
        """What tells it from others in any process: five digits of a few values that depend on all entries."""
        rng = np.random.default_rng(0)
        y = self.rows(rng.normal(size=(1, self.shape[1])), transposed=False)[0]
        return (*self.shape, *(f"{v:.4e}" for v in rng.normal(size=(4, len(y))) @ y))


class External(Operator):
    """`A x` by a function of NumPy arrays, and `Aᵀ y` by another: for what JAX cannot trace.

    `forward` takes a float64 array of `in_shape` to one of `out_shape`, and `adjoint` back; `as_operator` makes
    one of a `LinearOperator`. Both are called from compiled programs, one vector at a time, so they must give
    the same result for the same argument and must not use JAX.
    """

    products: Products = eqx.field(static=True)
    in_shape: Shape = eqx.field(static=True)
    out_shape: Shape = eqx.field(static=True)

    def __init__(
        self,
        forward: Vector,
        adjoint: Vector,
        *,
        in_shape: int | tuple[int, ...],
        out_shape: int | tuple[int, ...] | None = None,
    ):
        self.in_shape = as_shape(in_shape)
        given = _tried(forward, self.in_shape, "the product with A")
        self.out_shape = given.shape if out_shape is None else as_shape(out_shape)
        _check_size(given, self.out_shape, "A")
        back = _tried(adjoint, self.out_shape, "the product with the adjoint of A")
        _check_size(back, self.in_shape, "the adjoint of A")
        self.products = Products(
            (given.size, back.size),
            lambda x: forward(x.reshape(self.in_shape)),
            lambda y: adjoint(y.reshape(self.out_shape)),
        )

    def mv(self, x: Array) -> Array:
        return _product(self.products, x.ravel(), False).reshape(self.out_shape)

    def rmv(self, y: Array) -> Array:
        return _product(self.products, y.ravel(), True).reshape(self.in_shape)

    def as_matrix(self) -> Array:
        return jnp.asarray(self.products.matrix, float)


def _tried(function: Vector, shape: Shape, what: str) -> np.ndarray:
    """What `function` gives of some array of `shape`."""
    try:
        out = np.asarray(function(np.random.default_rng(0).normal(size=shape)))
    except NotImplementedError as error:
        raise DataError(
            f"{what} is not there ({error or 'not implemented'}): give it, as in LinearOperator(shape, matvec=…, "
            "rmatvec=…) or as_operator(function, adjoint=…, in_shape=…)"
        ) from error
    except Exception as error:
        raise DataError(
            f"{what} fails on an array of shape {shape}: {type(error).__name__}: {error}"
        ) from error
    if out.dtype.kind not in "biuf":
        raise DataError(
            f"{what} gives an array of type {out.dtype}; expected real numbers: stack the real and the "
            "imaginary parts"
        )
    return out


def _check_size(out: np.ndarray, want: Shape, what: str) -> None:
    if out.size != np.prod(want):
        raise ShapeError(f"the product with {what} has shape {out.shape}; expected {want}")


# A primitive of JAX, which is linear: its derivative is itself, its transpose is the other product.

_external = Primitive("external_product")


def _product(products: Products, x: Array, transposed: bool) -> Array:
    return _external.bind(x, products=products, transposed=transposed)


def _shape_out(x: Any, products: Products, transposed: bool) -> Shape:
    return (*x.shape[:-1], products.shape[1 if transposed else 0])


def _called(x: Array, *, products: Products, transposed: bool) -> Array:
    result = jax.ShapeDtypeStruct(_shape_out(x, products, transposed), x.dtype)
    rows = lambda x: products.rows(np.asarray(x), transposed)
    return jax.pure_callback(rows, result, x, vmap_method="broadcast_all")


def _batched(args: Any, axes: Any, **params: Any) -> tuple[Array, int]:
    return _external.bind(jnp.moveaxis(args[0], axes[0], 0), **params), 0


def _transposed(cotangent: Any, x: Any, *, products: Products, transposed: bool) -> list[Array]:
    return [_external.bind(cotangent, products=products, transposed=not transposed)]


def _abstract(x: Any, *, products: Products, transposed: bool) -> Any:
    return ShapedArray(_shape_out(x, products, transposed), x.dtype)


_external.def_impl(jax.jit(_called, static_argnames=("products", "transposed")))
_external.def_abstract_eval(_abstract)
ad.deflinear2(_external, _transposed)
batching.primitive_batchers[_external] = _batched
mlir.register_lowering(_external, mlir.lower_fun(_called, multiple_results=False))
