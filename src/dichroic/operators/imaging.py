"""Operators of imaging: block averaging, a patch in a scene."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dichroic.errors import ShapeError
from dichroic.numerics.batching import as_float, observation_axes
from dichroic.operators.base import Operator, Shape, as_shape


class BlockAverage(Operator):
    """Down-sampling: the mean of each block of `factor` samples along every axis of `axes`.

    The output is truly smaller: `(8, 8)` with `factor=2` becomes `(4, 4)`. `axes` are the axes of the
    source to reduce (all by default; leave out a channel axis).
    """

    in_shape: Shape = eqx.field(static=True)
    factor: int = eqx.field(static=True)
    axes: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        in_shape: int | tuple[int, ...],
        factor: int | float,
        *,
        axes: tuple[int, ...] | None = None,
    ):
        if factor % 1:
            raise ShapeError(f"BlockAverage: factor must be a whole number, got {factor}")
        self.in_shape, self.factor = as_shape(in_shape), int(factor)
        ndim = len(self.in_shape)
        beyond = [a for a in axes or () if not -ndim <= a < ndim]
        if self.factor < 1 or beyond:
            raise ShapeError(
                f"BlockAverage: no axis {beyond[0]} in {self.in_shape}"
                if beyond
                else f"BlockAverage: factor must be positive, got {self.factor}"
            )
        self.axes = tuple(sorted({a % ndim for a in (range(ndim) if axes is None else axes)}))
        bad = [a for a in self.axes if self.in_shape[a] % self.factor]
        if bad:
            raise ShapeError(
                f"BlockAverage: axis {bad[0]} of {self.in_shape} is not a multiple of {self.factor}"
            )

    @property
    def out_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        dims = enumerate(self.in_shape)
        return tuple(d // self.factor if a in self.axes else d for a, d in dims)

    def mv(self, x: Array) -> Array:
        for a in self.axes:
            blocks = (*x.shape[:a], x.shape[a] // self.factor, self.factor, *x.shape[a + 1 :])
            x = x.reshape(blocks).mean(axis=a + 1)
        return x

    def rmv(self, y: Array) -> Array:
        for a in self.axes:
            y = jnp.repeat(y, self.factor, axis=a) / self.factor
        return y

    def row_squares(self) -> Array:
        return jnp.full(self.out_shape, 1 / self.factor ** len(self.axes))


class BlockProject(Operator):
    """The mean of each block in place of its samples: a resolution lost on the grid of the source.

    The orthogonal projector `BᵀB · factorᵏ` with `B` the `BlockAverage` over `k` axes: same shape out.
    """

    average: BlockAverage

    def __init__(
        self,
        shape: int | tuple[int, ...],
        factor: int | float,
        *,
        axes: tuple[int, ...] | None = None,
    ):
        self.average = BlockAverage(shape, factor, axes=axes)

    @property
    def in_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.average.in_shape

    @property
    def out_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.average.in_shape

    def mv(self, x: Array) -> Array:
        y = self.average.mv(x)
        for a in self.average.axes:
            y = jnp.repeat(y, self.average.factor, axis=a)
        return y

    def rmv(self, y: Array) -> Array:
        return self.mv(y)

    def row_squares(self) -> Array:
        return jnp.full(self.out_shape, 1 / self.average.factor ** len(self.average.axes))


class PatchPlacement(Operator):
    """A patch put into a larger scene: `(A x)[o + i] = x[i]`, 0 elsewhere; what lies outside is cut off.

    `offset` is where the first number of the patch comes to lie, one integer per axis (possibly negative), or
    `(n, axes)` with one per observation: objects of one kind, each at its own position of the scene.
    """

    in_shape: Shape = eqx.field(static=True)
    out_shape: Shape = eqx.field(static=True)
    offset: Float[Array, "..."] = eqx.field(converter=as_float, metadata=observation_axes(1))

    def __init__(
        self, in_shape: int | tuple[int, ...], out_shape: int | tuple[int, ...], offset: Any
    ):
        self.in_shape, self.out_shape = as_shape(in_shape), as_shape(out_shape)
        self.offset = as_float(offset)
        axes = len(self.in_shape)
        if (
            len(self.out_shape) != axes
            or self.offset.ndim not in (1, 2)
            or (self.offset.shape[-1] != axes)
        ):
            raise ShapeError(
                f"PatchPlacement: a patch of shape {self.in_shape} in a scene of {self.out_shape} needs offsets "
                f"of shape ({axes},) or (n, {axes}), got {self.offset.shape}"
            )
        if not np.all(np.asarray(self.offset) == np.round(self.offset)):
            raise ShapeError("PatchPlacement: offsets are whole numbers of pixels")

    def _start(self) -> list[Array]:
        """Where the patch is in the scene with a margin of the patch's size; outside of it, at its edge."""
        pairs = zip(self.offset.astype(int), self.in_shape, self.out_shape, strict=True)
        return [jnp.clip(o + size, 0, room + size) for o, size, room in pairs]

    def mv(self, x: Array) -> Array:
        room = [o + 2 * i for i, o in zip(self.in_shape, self.out_shape, strict=True)]
        wide = jax.lax.dynamic_update_slice(jnp.zeros(room, x.dtype), x, self._start())
        inner = zip(self.in_shape, self.out_shape, strict=True)
        return wide[tuple(slice(i, i + o) for i, o in inner)]

    def row_squares(self) -> Array:
        return self.mv(jnp.ones(self.in_shape))

    def rmv(self, y: Array) -> Array:
        wide = jnp.pad(y, [(i, i) for i in self.in_shape])
        return jax.lax.dynamic_slice(wide, self._start(), self.in_shape)
