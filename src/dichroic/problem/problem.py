"""What a user states: sources, views of mixtures of them, and the problem they make.

    y_i = Σ_β A_i^{αβ} x_i^β + η_i,   η_i ~ N(0, Σ_i^α)        (view α, observation i, source β)

Everything is checked here (by parts, in `checks`), before any work starts; `joint_observations` turns
the views into the `Observations` that the rest of the package computes with.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dichroic.errors import DataError, ShapeError
from dichroic.numerics.batching import row_counts, take
from dichroic.operators import Operator, Shape, Stack, Zero
from dichroic.operators.base import as_shape
from dichroic.operators.learnable import Parameters, is_known, parameters
from dichroic.operators.noise import JointNoise
from dichroic.operators.parameter_gradients import check_slopes, fixed_entries
from dichroic.operators.scaling import offsets_of
from dichroic.problem.lazy_view import AnyView
from dichroic.problem.observations import Observations
from dichroic.problem.view import View as View
from dichroic.problem.view import bytes_each, numbering
from dichroic.problem.view import missing_fraction as missing_fraction
from dichroic.problem.view_validation import check_seen, check_view, sees, with_operators
from dichroic.runtime import distributed
from dichroic.runtime.fingerprint import fingerprint

SETTLING = 8  # observations whose own operators are asked whether they settle the scale of a source
BLOCK_BYTES = 16 * 2**20  # of the observations that `check_values` reads at a time


@dataclass(frozen=True, init=False)
class Source:
    """A kind of signal that is to be learned: its name, and the shape of one draw of it."""

    name: str
    shape: Shape

    def __init__(self, name: str, shape: Shape | int):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "shape", as_shape(shape))
        if fault := name_fault(self.name):
            raise ShapeError(fault)


def name_fault(name: str) -> str | None:
    """What is wrong with `name` as that of a source, which names files; `None` if nothing is."""
    long = len(name.encode(errors="replace")) > 200
    if name and name.isprintable() and not long and not any(c in "/\\:. " for c in name):
        return None
    return f"source name {name[:200]!r}: use letters, digits, '_' and '-' (it names files)"


@dataclass(frozen=True, eq=False)
class Problem:
    """Several views of mixtures of several sources. Checked on construction.

    Of a view that stays in its files, that is what is stated and the first observations; `check_values` reads
    the others. `origin` is the file that states the problem, if there is one.
    """

    sources: Sequence[Source]
    views: Sequence[AnyView]
    origin: str = ""

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        named = tuple(
            replace(v, name=f"view{i + 1}") if isinstance(v, View) and not v.name else v
            for i, v in enumerate(self.views)
        )
        object.__setattr__(self, "views", named)
        _check_names(self)
        views = tuple(with_operators(v, self.shapes) for v in self.views)
        object.__setattr__(self, "views", views)
        for view in self.views:
            check_view(view, self.shapes)
            check_seen(view)
            if view.head.nothing_observed and view.head.count == view.count:
                raise _nothing_observed(view)
        for group in self.joint_views():
            _check_group(group)
        _check_learned(self)
        unseen = [s.name for s in self.sources if not self.seen_by(s.name)]
        if unseen:
            raise DataError(
                f"source {unseen[0]!r} is seen by no view: nothing can be learned of it; give a view "
                "an operator for it, or leave the source out"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(s.name for s in self.sources)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each source."""
        return {s.name: s.shape for s in self.sources}

    def view(self, name: str) -> AnyView:
        """The view called `name`."""
        for view in self.views:
            if view.name == name:
                return view
        raise DataError(f"no view {name!r}; there are {', '.join(v.name for v in self.views)}")

    def seen_by(self, source: str) -> tuple[str, ...]:
        """The names of the views that see `source`."""
        return tuple(v.name for v in self.views if sees(v, source))

    def joint_views(self) -> list[list[AnyView]]:
        """The views, those of one group together, in the order of their first member."""
        groups: dict[str, list[AnyView]] = {}
        for view in self.views:
            key = f"group {view.group}" if view.group else f"view {view.name}"
            groups.setdefault(key, []).append(view)
        return list(groups.values())

    def fingerprint(self) -> str:
        """A hash of everything stated that a fit depends on: all but the truth.

        Of a view that stays in its files, 256 observations stand for all (see `LazyView.fingerprint_payload`).
        """
        return fingerprint((self.sources, [v.fingerprint_payload for v in self.views]))


def named_views(
    view: AnyView | str | Sequence[AnyView], problem: Problem | None, *, what: str = "separator"
) -> list[AnyView]:
    """The views that `view` stands for: itself, several, or by name one of `problem` and its group.

    `what` is how the message calls the one that has no problem to look a name up in.
    """
    if not isinstance(view, str):
        return list(view) if isinstance(view, Iterable) else [view]
    if problem is None:
        raise DataError(f"this {what} has no problem to find view {view!r} in; give a View")
    found = problem.view(view)
    return next(group for group in problem.joint_views() if found in group)


def _check_learned(problem: Problem) -> None:
    """Operators to be learned agree and can be learned, and something settles the scale of every source."""
    learned = parameters([v.operators for v in problem.views])
    if not learned:
        return
    check_slopes([v.operators for v in problem.views if v.probe])
    for name in problem.names:
        seeing = [v for v in problem.views if sees(v, name)]
        if seeing and not any(is_known(v.operators[name]) or _settles(v, name) for v in seeing):
            raise DataError(
                f"source {name!r} is seen only through operators that are to be learned, so nothing settles "
                "its scale; give one view a known operator for it. Where one observation holds several "
                "outputs, such as "
                "all frequencies, either let the operator be 1 at a reference, whatever its parameters, or state "
                "a view for each output, co-observed (group=…), with a known operator at the reference"
            )


def _settles(view: AnyView, name: str) -> bool:
    """Whether entries that are observed see the source `name` as they do whatever the parameters are."""
    head = view.head
    op = head.operators[name]
    seen = head.observed()
    rows = range(min(SETTLING, head.count)) if row_counts(op) else [0]
    return any((fixed_entries(take(op, i)) & seen.any(axis=0)).any() for i in rows)


def check_known(problem: Problem, what: str) -> None:
    """Raise `DataError` if operators of `problem` are to be learned, which `what` cannot."""
    learned = parameters([v.operators for v in problem.views])
    if learned:
        raise DataError(
            f"{what} needs operators that are known, and {', '.join(learned)} of this problem are to be "
            "learned; put their values in place of Learnable(…)"
        )


def joint_observations(
    views: Sequence[AnyView], parameters: Parameters | None = None
) -> Observations:
    """The `Observations` of one view, or of the stack of several co-observed ones.

    With `parameters`, what a fit has learned of operators; sources are in its units then, less its offsets.
    """
    parts = [view.prepare(offsets_of(parameters or {})) for view in views]
    found = parts[0] if len(parts) == 1 else _stacked(views, parts)
    return found.at(parameters) if parameters else found


def _stacked(views: Sequence[AnyView], parts: Sequence[Observations]) -> Observations:
    _check_group(views)
    shapes = {k: op.in_shape for part in parts for k, op in part.operators.items()}
    operators: dict[str, Operator] = {
        name: Stack(
            tuple(p.operators.get(name, Zero(in_shape=shape, out_shape=(p.size,))) for p in parts)
        )
        for name, shape in shapes.items()
    }
    noise = JointNoise(tuple(p.noise for p in parts), tuple(p.size for p in parts))
    return Observations(np.concatenate([p.y for p in parts], axis=1), operators, noise)


def _check_group(views: Sequence[AnyView]) -> None:
    counts = {view.name: view.count for view in views}
    if len(set(counts.values())) > 1:
        raise ShapeError(
            f"co-observed views (group {views[0].group!r}) need the same number of observations, "
            f"got {counts}"
        )
    chosen = [v.held_out_mask for v in views if v.held_out_mask is not None]
    if any(not np.array_equal(chosen[0], other) for other in chosen[1:]):
        raise DataError(f"co-observed views (group {views[0].group!r}) differ in held_out")


def _check_names(problem: Problem) -> None:
    for kind, names in (("source", problem.names), ("view", [v.name for v in problem.views])):
        if not names:
            raise DataError(f"a problem needs at least one {kind}")
        twice = [n for n in names if list(names).count(n) > 1]
        if twice:
            raise DataError(f"two {kind}s are called {twice[0]!r}; names must differ")


def _nothing_observed(view: AnyView) -> DataError:
    return DataError(f"{view.label}: the mask leaves nothing observed")


def check_values(
    problem: Problem,
    block_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read all observations of views that stay in their files once, and check them; those in memory have been.

    Args:
        problem: of views in files or in memory.
        block_rows: observations to read at a time; by default as many as take 16 MiB.
        progress: called with the observations that are done and the number of all of this process.

    Raises:
        DichroicError: at the first block with a fault; the message says which observations it is of.
    """
    stored = [v for v in problem.views if v.head.count < v.count]
    own = [distributed.local_span(v.count) for v in stored]
    done, total = 0, sum(stop - first for first, stop in own)

    def observed(view: AnyView, first: int, last: int) -> int:
        """How many blocks of those of this process have something that was observed."""
        nonlocal done
        rows, found = block_rows or max(BLOCK_BYTES // bytes_each(view.head), 1), 0
        for start in range(first, last, rows):
            stop = min(start + rows, last)
            with numbering(start, stop):
                found += not view.select(slice(start, stop)).nothing_observed
            done += stop - start
            if progress:
                progress(done, total)
        return found

    for view, span in zip(stored, own, strict=True):
        if not distributed.all_reduce_sum(distributed.run_on_all(partial(observed, view, *span))):
            raise _nothing_observed(view)
