"""Operators that are not wholly known: parameters that a fit learns along with the sources."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dichroic.errors import DataError, FormatError
from dichroic.numerics.batching import as_float, row_counts
from dichroic.operators.base import Operator, Shape

Tree = TypeVar("Tree")
Parameters = dict[str, tuple[Array, ...]]  # by name: the arrays of the operator
MOST_PARAMETERS = 4096  # numbers of all together: their information matrix is dense


class Learnable(Operator):
    """`operator`, whose arrays are to be learned; those that it has are where the search starts.

    A gain is `Learnable(Scale(shape, 0.3), "gain") @ A`, a matrix shared by a view
    `Learnable(Dense(guess), "instrument")`; any `FunctionOperator` of parameters will do. Operators with one
    `name` are one: they keep the same values. A source needs a view that sees it through known operators alone,
    which settles its scale.
    """

    operator: Operator
    name: str = eqx.field(static=True)

    def __check_init__(self):
        label = f"Learnable {self.name!r}"
        if not self.name or any(c in self.name for c in "/\\:. \t\n"):
            raise DataError(f"{label}: a name has letters, digits, '_' and '-'")
        arrays = _arrays(self.operator)
        if not arrays:
            raise DataError(f"{label}: {type(self.operator).__name__} has no number to learn")
        if row_counts(self.operator):
            raise DataError(
                f"{label}: its arrays have one entry per observation; what is learned is shared by all"
            )
        if any(True for _ in learned_parts(self.operator)):
            raise DataError(f"{label} holds another Learned operator; name them side by side")

    @property
    def in_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operator.in_shape

    @property
    def out_shape(self) -> Shape:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operator.out_shape

    def mv(self, x: Array) -> Array:
        return self.operator.mv(x)

    def rmv(self, y: Array) -> Array:
        return self.operator.rmv(y)

    def as_matrix(self) -> Float[Array, "out in"]:
        return self.operator.as_matrix()

    def row_squares(self) -> Array:
        return self.operator.row_squares()


def _is_learned(node: Any) -> bool:
    return isinstance(node, Learnable)


def learned_parts(tree: Any) -> Iterator[Learnable]:
    """The operators in `tree` that are to be learned."""
    return (n for n in jax.tree.leaves(tree, is_leaf=_is_learned) if _is_learned(n))


def _arrays(operator: Operator) -> tuple[Array, ...]:
    return tuple(jax.tree.leaves(eqx.filter(operator, eqx.is_inexact_array)))


def is_known(tree: Any) -> bool:
    """Whether nothing in `tree` is to be learned."""
    return not any(True for _ in learned_parts(tree))


def parameters(tree: Any) -> Parameters:
    """The arrays that are to be learned in `tree`, by name.

    Raises `DataError` where operators of one name differ in the shapes of their arrays or in where they
    start, or where there are too many parameters.
    """
    found: Parameters = {}
    for node in learned_parts(tree):
        arrays = _arrays(node.operator)
        other = found.setdefault(node.name, arrays)
        if [a.shape for a in other] != [a.shape for a in arrays]:
            raise DataError(
                f"Learnable {node.name!r}: two operators of this name have arrays of different shapes, "
                f"{[a.shape for a in other]} and {[a.shape for a in arrays]}; give each its own name"
            )
        if not all(bool(jnp.array_equal(a, b)) for a, b in zip(other, arrays, strict=True)):
            raise DataError(
                f"Learnable {node.name!r}: two operators of this name start differently"
            )
    size = sum(a.size for arrays in found.values() for a in arrays)
    if size > MOST_PARAMETERS:
        raise DataError(
            f"{size:,} parameters of operators are to be learned ({', '.join(found)}); at most "
            f"{MOST_PARAMETERS:,} are supported: give the operators a form with fewer, such as a Function "
            "of a few parameters"
        )
    return found


def to_lists(values: Parameters) -> dict[str, list[Any]]:
    """`values` as nested lists of numbers, which JSON keeps exactly."""
    return {name: [np.asarray(a).tolist() for a in arrays] for name, arrays in values.items()}


def from_lists(lists: Any, where: str) -> Parameters:
    """What `to_lists` wrote; raises `FormatError` where it is something else."""
    try:
        with np.errstate(over="ignore"):
            found = {k: tuple(as_float(np.asarray(a, float)) for a in x) for k, x in lists.items()}
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{where}: is damaged: {error}") from None
    if not all(np.all(np.isfinite(a)) for arrays in found.values() for a in arrays):
        raise FormatError(f"{where}: is damaged: a number is not finite")
    return found


def with_parameters(tree: Tree, values: Mapping[str, Any]) -> Tree:
    """`tree` with the arrays of the operators named in `values` replaced; others stay as they are."""

    def replaced(node: Any) -> Any:
        if not _is_learned(node) or node.name not in values:
            return node
        arrays, rest = eqx.partition(node.operator, eqx.is_inexact_array)
        new = jax.tree.unflatten(jax.tree.structure(arrays), _like(node, values[node.name]))
        return Learnable(eqx.combine(new, rest), node.name)

    return jax.tree.map(replaced, tree, is_leaf=_is_learned)


def _like(node: Learnable, values: Sequence[Any]) -> list[Array]:
    shapes = [a.shape for a in _arrays(node.operator)], [jnp.shape(a) for a in values]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"Learnable {node.name!r}: arrays of shapes {shapes[0]}, but what was learned has {shapes[1]}"
        )
    return list(values)
