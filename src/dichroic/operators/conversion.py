"""Operators from what other libraries have: matrices, sparse matrices, linear operators, functions."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dichroic.errors import DataError, DichroicError, ShapeError
from dichroic.operators.base import Operator, as_shape
from dichroic.operators.elementary import Dense, FunctionOperator
from dichroic.operators.external import External
from dichroic.operators.sparse import Sparse

_Given = int | tuple[int, ...] | None


def as_operator(
    given: Any,
    *,
    in_shape: _Given = None,
    out_shape: _Given = None,
    adjoint: Callable[[np.ndarray], Any] | None = None,
) -> Operator:
    """The operator that `given` stands for.

    Args:
        given: an array `(M, D)`, or `(n, M, D)` for one per observation; a SciPy sparse matrix or array;
            a `scipy.sparse.linalg.LinearOperator` or what is like one (pylops), with `shape`, `matvec` and
            `rmatvec`; a function of JAX; a function of NumPy arrays with its `adjoint`; or an operator.
        in_shape: the shape of the source; `(D,)` by default. A function needs it.
        out_shape: the shape of an observation; `(M,)` by default, and of a function what it gives.
        adjoint: of a function that JAX cannot trace: takes arrays of `out_shape` to `in_shape`,
            `⟨A x, y⟩ = ⟨x, Aᵀ y⟩`.

    Raises:
        DichroicError: if `given` is none of these, has complex numbers, no adjoint, or other shapes.
    """
    shapes = {"in_shape": in_shape, "out_shape": out_shape}
    if isinstance(given, Operator):
        return given
    if isinstance(given, np.ma.MaskedArray):
        raise DataError("a masked array as an operator: fill it (`.filled(0)`)")
    if isinstance(given, np.ndarray | jax.Array):
        return Dense(given, **shapes)
    if hasattr(given, "tocsr"):
        return Sparse(given, **shapes)
    if hasattr(given, "matvec") and len(np.shape(getattr(given, "shape", ()))) == 1:
        return _linear_operator(given, in_shape, out_shape)
    if callable(given):
        return _function(given, in_shape, out_shape, adjoint)
    raise DataError(
        f"an operator of type {type(given).__name__}; expected one such as Dense(matrix), a matrix, a "
        "SciPy sparse "
        "matrix, a LinearOperator, or a function"
    )


def _linear_operator(given: Any, in_shape: _Given, out_shape: _Given) -> Operator:
    rows, columns = (int(n) for n in given.shape)
    if np.dtype(getattr(given, "dtype", None) or float).kind == "c":
        raise DataError(
            f"{type(given).__name__}: of type {given.dtype}; expected real numbers: stack the real and the "
            "imaginary parts"
        )
    if not hasattr(given, "rmatvec"):
        raise DataError(f"{type(given).__name__}: has no rmatvec, the product with its adjoint")
    shape = as_shape(columns if in_shape is None else in_shape)
    out = as_shape(rows if out_shape is None else out_shape)
    if (np.prod(out), np.prod(shape)) != (rows, columns):
        raise ShapeError(
            f"{type(given).__name__}: a {rows} × {columns} operator cannot map {shape} to {out}"
        )
    forward, back = (
        lambda x: given.matvec(np.ravel(x)),
        lambda y: given.rmatvec(np.ravel(y)),
    )
    return External(forward, back, in_shape=shape, out_shape=out)


def _function(
    given: Callable[..., Any], in_shape: _Given, out_shape: _Given, adjoint: Any
) -> Operator:
    if in_shape is None:
        raise ShapeError("a function as an operator: give the shape of its argument, in_shape=…")
    try:
        traced = FunctionOperator(given, in_shape=in_shape)
        if adjoint is not None:
            jax.eval_shape(traced.rmv, jax.ShapeDtypeStruct(traced.out_shape, np.float32))
    except (DichroicError, NotImplementedError):
        if adjoint is None:
            raise
        return External(given, adjoint, in_shape=in_shape, out_shape=out_shape)
    return traced
