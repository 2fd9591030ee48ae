"""What a problem states, as the rows of tables."""

import re
from typing import Any

from dichroic import operators
from dichroic.numerics.batching import row_counts
from dichroic.operators import Shape
from dichroic.operators.noise import Masked
from dichroic.problem.lazy_view import AnyView, some_of
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import missing_fraction
from dichroic.problem.view_validation import sees

ops: Any = operators  # type checkers do not see the constructors that equinox derives


def summary_rows(problem: Problem) -> tuple[list[list[Any]], list[list[Any]]]:
    """What `problem` states: the rows of two tables, of sources and of views, headers first.

    Cells are text and integers. The observations of a source count draws of it: co-observed views
    are of the same ones. `(i)` marks operators and noise that differ from observation to
    observation. Where a view stays in its files, entries that are missing are counted in some thousands of its
    observations (`≈`).
    """
    sources: list[list[Any]] = [["source", "shape", "learned from", "observations"]]
    sources += [_source_row(source, problem) for source in problem.sources]
    views: list[list[Any]] = [["view", "observations", "shape", "sources", "noise"]]
    views[0] += ["missing", "group", "truth"]
    return sources, views + [_view_row(view) for view in problem.views]


def _source_row(source: Source, problem: Problem) -> list[Any]:
    joint = [views for views in problem.joint_views() if any(sees(v, source.name) for v in views)]
    count = sum(views[0].count for views in joint)
    return [source.name, _times(source.shape), ", ".join(problem.seen_by(source.name)), count]


def _view_row(view: AnyView) -> list[Any]:
    seen = {k: op for k, op in view.operators.items() if sees(view, k)}
    (some,) = some_of([view])
    about = "" if some.count == view.count else "≈ "
    return [
        view.name,
        view.count,
        _times(view.shape),
        ", ".join(f"{k}: {_kind_name(op)}{_marker(op)}" for k, op in seen.items()),
        _noise_kind(view),
        f"{about}{100 * missing_fraction(some):.1f}%",
        view.group or "–",
        "yes" if view.head.truth else "no",
    ]


def _times(shape: Shape) -> str:
    return " × ".join(map(str, shape))


def _marker(tree: Any) -> str:
    return " (i)" if row_counts(tree) else ""


def _kind_name(op: Any) -> str:
    """The kind as a problem file spells it, with the parts of compositions, sums and stacks."""
    if isinstance(op, (ops.Compose, ops.Sum, ops.Stack)):
        parts = [_kind_name(part) for part in op.operators]
        sign = {ops.Compose: " ∘ ", ops.Sum: " + ", ops.Stack: ", "}[type(op)]
        return parts[0] if len(parts) == 1 else f"({sign.join(parts)})"
    if isinstance(op, ops.Learnable):
        return f"learned {op.name} ({_kind_name(op.operator)})"
    if isinstance(op, ops.FunctionOperator):
        return f"function {op.label}"
    return _snake(type(op).__name__)


def _noise_kind(view: AnyView) -> str:
    noise = view.noise_model
    while isinstance(noise, Masked):
        noise = noise.noise
    return _snake(type(noise).__name__.removesuffix("Noise")) + _marker(noise)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
