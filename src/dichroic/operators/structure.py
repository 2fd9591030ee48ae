"""Operators made of operators: composition, sum, stack."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dichroic.errors import ShapeError
from dichroic.operators.base import Operator, Shape
from dichroic.operators.elementary import Diagonal, Identity, Scale
from dichroic.operators.learnable import Learnable


class Compose(Operator):
    """`A x = A₁ A₂ … x`: the last operator acts first, as in `A₁ @ A₂`."""

    operators: tuple[Operator, ...] = eqx.field(converter=tuple)

    def __check_init__(self):
        for left, right in zip(self.operators, self.operators[1:], strict=False):
            if left.in_shape != right.out_shape:
                raise ShapeError(
                    f"Compose: {type(left).__name__} takes {left.in_shape} but "
                    f"{type(right).__name__} gives {right.out_shape}"
                )

    @property
    def in_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operators[-1].in_shape

    @property
    def out_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operators[0].out_shape

    def mv(self, x: Array) -> Array:
        for op in reversed(self.operators):
            x = op.mv(x)
        return x

    def rmv(self, y: Array) -> Array:
        for op in self.operators:
            y = op.rmv(y)
        return y

    def row_squares(self) -> Array:
        first, *rest = factors(self)
        if not rest:
            return first.row_squares()
        if isinstance(first, Identity | Scale | Diagonal):  # scales rows
            return first.row_squares() * Compose(rest).row_squares()
        if isinstance(rest[-1], Identity | Scale):  # scales all
            factor = rest[-1].row_squares().ravel()[0]
            return factor * Compose((first, *rest[:-1])).row_squares()
        return super().row_squares()


def factors(op: Operator) -> list[Operator]:
    """The factors of `op`, whether or not they are learned."""
    if isinstance(op, Learnable):
        return factors(op.operator)
    return [f for part in op.operators for f in factors(part)] if isinstance(op, Compose) else [op]


class Sum(Operator):
    """`A x = A₁ x + A₂ x + …`."""

    operators: tuple[Operator, ...] = eqx.field(converter=tuple)

    def __check_init__(self):
        shapes = {(op.in_shape, op.out_shape) for op in self.operators}
        if len(shapes) > 1:
            raise ShapeError(f"Sum: operators of different shapes (in, out): {sorted(shapes)}")

    @property
    def in_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operators[0].in_shape

    @property
    def out_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operators[0].out_shape

    def mv(self, x: Array) -> Array:
        return sum((op.mv(x) for op in self.operators[1:]), self.operators[0].mv(x))

    def rmv(self, y: Array) -> Array:
        return sum((op.rmv(y) for op in self.operators[1:]), self.operators[0].rmv(y))


class Stack(Operator):
    """`A x = (A₁ x, A₂ x, …)`: several observations of one source, flattened and concatenated."""

    operators: tuple[Operator, ...] = eqx.field(converter=tuple)

    def __check_init__(self):
        shapes = {op.in_shape for op in self.operators}
        if len(shapes) > 1:
            raise ShapeError(f"Stack: operators of sources of different shapes: {sorted(shapes)}")

    @property
    def in_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operators[0].in_shape

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(int(np.prod(op.out_shape)) for op in self.operators)

    @property
    def out_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (sum(self.sizes),)

    def mv(self, x: Array) -> Array:
        return jnp.concatenate([op.mv(x).ravel() for op in self.operators])

    def rmv(self, y: Array) -> Array:
        parts = jnp.split(y, np.cumsum(self.sizes)[:-1])
        pairs = zip(self.operators, parts, strict=True)
        terms = [op.rmv(part.reshape(op.out_shape)) for op, part in pairs]
        return sum(terms[1:], terms[0])

    def row_squares(self) -> Array:
        return jnp.concatenate([op.row_squares().ravel() for op in self.operators])
