"""Operators that are zero for some observations, which then tell nothing of a source."""

from collections.abc import Iterator, Sequence

from dichroic.numerics.batching import row_counts
from dichroic.operators import Zero
from dichroic.operators.linearity import zero_rows
from dichroic.problem.lazy_view import AnyView, some_of


def zero_operators(views: Sequence[AnyView]) -> tuple[str, ...]:
    """A sentence about every operator of `views` that is zero for some observations, by products with all of them.

    Of views that stay in their files, of those observations that stand for all (see `view.some_of`).
    """
    return tuple(text for view in views for text in _sentences(view))


def _sentences(view: AnyView) -> Iterator[str]:
    if not view.probe or not any(map(row_counts, view.operators.values())):
        return
    (some,) = some_of([view])
    of = "" if some.count == view.count else " that were looked at"
    for name, op in some.operators.items():
        if isinstance(op, Zero) or not row_counts(op):
            continue
        if zeros := int(zero_rows(op).sum()):
            yield (
                f"{view.label}: the operator of {name!r} is zero for {zeros:,} of {some.count:,} "
                f"observations{of}: "
                "offsets outside of the scene?"
            )
