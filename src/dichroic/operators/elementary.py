"""Identity, zero, scale, diagonal (mask), dense matrix, and any linear JAX function."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dichroic.errors import ShapeError
from dichroic.numerics.batching import as_float, as_jax, observation_axes, per_observation_if
from dichroic.operators.base import Operator, Shape, as_shape, broadcasts, traced


class _Shape:
    """Declared apart from the fields of an operator."""

    shape: Shape


class Square(_Shape, Operator):
    """An operator whose output has the shape of its input, which is its field `shape`."""

    @property
    def in_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shape

    @property
    def out_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shape


class Identity(Square):
    """`A x = x` on arrays of shape `shape`.

    >>> Identity((2, 3)).as_matrix().shape
    (6, 6)
    """

    shape: Shape = eqx.field(static=True, converter=as_shape)

    def mv(self, x: Array) -> Array:
        return x

    def rmv(self, y: Array) -> Array:
        return y

    def as_matrix(self) -> Array:
        return jnp.eye(int(np.prod(self.shape)))

    def row_squares(self) -> Array:
        return jnp.ones(self.shape)


class Zero(Operator):
    """`A x = 0`: a view of shape `out_shape` that does not see a source of shape `in_shape`."""

    in_shape: Shape = eqx.field(static=True, converter=as_shape)
    out_shape: Shape = eqx.field(static=True, converter=as_shape)

    def mv(self, x: Array) -> Array:
        return jnp.zeros(self.out_shape, x.dtype)

    def rmv(self, y: Array) -> Array:
        return jnp.zeros(self.in_shape, y.dtype)

    def row_squares(self) -> Array:
        return jnp.zeros(self.out_shape)


class Scale(Square):
    """`A x = factor · x`; `factor` is a scalar, or `(n,)` for one per observation (an amplitude)."""

    shape: Shape = eqx.field(static=True, converter=as_shape)
    factor: Float[Array, "*n"] = eqx.field(converter=as_float, metadata=observation_axes(0))

    def __check_init__(self):
        if np.ndim(self.factor) > 1:
            raise ShapeError(
                f"Scale: a factor is a scalar or (n,), got {self.factor.shape}; "
                f"use Diagonal for one factor per entry"
            )

    def mv(self, x: Array) -> Array:
        return self.factor * x

    def rmv(self, y: Array) -> Array:
        return self.factor * y

    def row_squares(self) -> Array:
        return jnp.full(self.shape, self.factor**2)


class Diagonal(Square):
    """`A x = diagonal ∘ x`; a mask is a diagonal of zeros and ones.

    `diagonal` has the source's shape; for one per observation, `(n, *shape)` with `shape` given. With `shape`,
    axes may have length 1: `(C, 1, 1)` for one factor per channel, `(n, C, 1, 1)` per channel and observation.
    """

    shape: Shape = eqx.field(static=True)
    diagonal: Float[Array, "..."] = eqx.field(
        converter=as_float, metadata=observation_axes(lambda op: len(op.shape))
    )

    def __init__(self, diagonal: Any, *, shape: int | tuple[int, ...] | None = None):
        array = as_float(diagonal)
        self.shape = array.shape if shape is None else as_shape(shape)
        if not broadcasts(array.shape, self.shape):
            ones = (self.shape[:1] + (1,) * len(self.shape))[: len(self.shape)]
            raise ShapeError(
                f"Diagonal: an array of shape {array.shape} is neither {self.shape} nor (n, *{self.shape})"
                + (f"; one factor per channel has shape {ones}" if len(ones) > 1 else "")
            )
        rows = array.shape[: array.ndim - len(self.shape)]
        self.diagonal = jnp.broadcast_to(array, (*rows, *self.shape))

    def mv(self, x: Array) -> Array:
        return self.diagonal * x

    def rmv(self, y: Array) -> Array:
        return self.diagonal * y

    def row_squares(self) -> Array:
        return self.diagonal**2


def matrix_shapes(
    kind: str,
    size: tuple[int, ...],
    in_shape: int | tuple[int, ...] | None,
    out_shape: int | tuple[int, ...] | None,
) -> tuple[Shape, Shape]:
    """What a matrix of `size` `(M, D)` maps from and to: `(D,)` and `(M,)` by default.

    Raises `ShapeError`, which names the `kind` of operator, where the shapes do not fit the matrix.
    """
    rows, columns = (int(n) for n in size)
    taken = as_shape(columns if in_shape is None else in_shape)
    given = as_shape(rows if out_shape is None else out_shape)
    if (np.prod(given), np.prod(taken)) != (rows, columns):
        raise ShapeError(f"{kind}: a {rows} × {columns} matrix cannot map {taken} to {given}")
    return taken, given


class Dense(Operator):
    """`A x = matrix @ x` on flattened arrays; `matrix` is `(M, D)`, or `(n, M, D)` per observation.

    `in_shape` and `out_shape` default to `(D,)` and `(M,)`.
    """

    matrix: Float[Array, "*n out in"] = eqx.field(converter=as_float, metadata=observation_axes(2))
    in_shape: Shape = eqx.field(static=True)
    out_shape: Shape = eqx.field(static=True)

    def __init__(
        self,
        matrix: Any,
        *,
        in_shape: int | tuple[int, ...] | None = None,
        out_shape: int | tuple[int, ...] | None = None,
    ):
        self.matrix = as_float(matrix)
        if self.matrix.ndim not in (2, 3):
            raise ShapeError(f"Dense: expected (M, D) or (n, M, D), got {self.matrix.shape}")
        size = self.matrix.shape[-2:]
        self.in_shape, self.out_shape = matrix_shapes("Dense", size, in_shape, out_shape)

    def mv(self, x: Array) -> Array:
        return (self.matrix @ x.ravel()).reshape(self.out_shape)

    def rmv(self, y: Array) -> Array:
        return (self.matrix.T @ y.ravel()).reshape(self.in_shape)

    def as_matrix(self) -> Array:
        return self.matrix

    def row_squares(self) -> Array:
        return jnp.sum(self.matrix**2, axis=1).reshape(self.out_shape)


class FunctionOperator(Operator):
    """`A x = fn(x, params)` for any JAX function that is linear in `x`; the adjoint is derived.

    `params` is a pytree of arrays, shared by all observations, or, with `per_observation=True`, with
    a leading axis of one entry per observation on every array. `fn(x)` suffices without `params`.
    """

    fn: Callable[..., Array] = eqx.field(static=True)
    in_shape: Shape = eqx.field(static=True)
    out_shape: Shape = eqx.field(static=True)
    params: Any = eqx.field(metadata=per_observation_if("per_observation"))
    per_observation: bool = eqx.field(static=True)

    def __init__(
        self,
        fn: Callable[..., Array],
        *,
        in_shape: int | tuple[int, ...],
        params: Any = None,
        per_observation: bool = False,
    ):
        self.fn, self.in_shape, self.per_observation = fn, as_shape(in_shape), per_observation
        self.params = jax.tree.map(as_jax, params)
        one = jax.tree.map(lambda a: a[0], self.params) if per_observation else self.params
        call = lambda x: self._call(x, one)
        self.out_shape = traced(call, self.in_shape, f"Function {self.label!r}").shape

    @property
    def label(self) -> str:
        """The name of the function."""
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def _call(self, x: Array, params: Any) -> Array:
        return self.fn(x) if params is None else self.fn(x, params)

    def mv(self, x: Array) -> Array:
        return self._call(x, self.params)
