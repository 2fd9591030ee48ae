"""Checks of a view against the sources of its problem."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dichroic.errors import DataError
from dichroic.numerics.arrays import as_booleans, check_real
from dichroic.numerics.batching import row_counts
from dichroic.operators import Operator, Shape, Zero
from dichroic.operators.linearity import is_zero
from dichroic.problem.lazy_view import AnyView
from dichroic.problem.validation import check_same_shape
from dichroic.problem.view import View, check_some, operator_of


def sees(view: AnyView, source: str) -> bool:
    """Whether `view` has an operator other than zero for `source`."""
    return source in view.operators and not isinstance(view.operators[source], Zero)


def with_operators(view: AnyView, shapes: Mapping[str, Shape]) -> AnyView:
    """`view`, with the operators that its matrices and functions stand for, on sources of the given `shapes`."""
    if not isinstance(view, View) or all(
        isinstance(op, Operator) for op in view.operators.values()
    ):
        return view
    made = lambda k, op: operator_of(op, view.label, k, shapes.get(k), view.shape)
    return replace(view, operators={k: made(k, op) for k, op in view.operators.items()})


def check_view(view: AnyView, shapes: Mapping[str, Shape]) -> None:
    """Raise a `DichroicError` unless `view`, as far as it is in memory, fits sources of the given `shapes`."""
    head = view.head
    check_some(np.shape(head.observations), view.label, head.observations)
    for name, op in head.operators.items():
        if name not in shapes:
            raise DataError(
                f"{view.label} has an operator for {name!r}, which is no source; "
                f"the sources are {', '.join(shapes)}"
            )
        op = operator_of(op, view.label, name, shapes[name], head.shape)
        check_same_shape(
            op.in_shape,
            shapes[name],
            f"{view.label}, source {name!r}: the operator takes arrays of",
        )
    for name, x in head.truth.items():
        if name not in shapes:
            raise DataError(f"{view.label} has a truth for {name!r}, which is no source")
        want = (head.count, *shapes[name])
        check_same_shape(np.shape(x), want, f"{view.label}, source {name!r}: the truth has")
        check_real(x, f"{view.label}, source {name!r}: a truth")
    if view.held_out is not None:
        check_real(view.held_out, f"{view.label}: held_out")
        check_same_shape(np.shape(view.held_out), (view.count,), f"{view.label}: held_out has")
        as_booleans(view.held_out, f"{view.label}: held_out", "1 for what is held out, else 0")
        if np.all(view.held_out):
            raise DataError(f"{view.label}: held_out leaves no observation to learn from")
    _ = head.checked


def check_seen(view: AnyView) -> None:
    """Raise a `DataError` where an operator is zero for all observations of `view`, if these are in memory.

    `Zero`, which says so, may be; so may operators that are to be learned, where they start.
    """
    for name, op in view.operators.items() if view.probe else ():
        counts = row_counts(op)
        if isinstance(op, Zero) or (counts and view.head.count < view.count) or not is_zero(op):
            continue
        of_all = f" for all {view.count:,} observations: offsets outside of the scene?"
        raise DataError(
            f"{view.label}: the operator of {name!r} is zero{of_all if counts else ''}; give Zero, or none, "
            "where a view does not see a source"
        )
