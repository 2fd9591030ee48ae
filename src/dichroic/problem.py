"""What a user states: sources, views of mixtures of them, and the problem they make.

    y_i = Σ_β A_i^{αβ} x_i^β + η_i,   η_i ~ N(0, Σ_i^α)        (view α, observation i, source β)

Everything is checked here (by parts, in `checks`), before any work starts; `joint_observations` turns
the views into the `Observations` that the rest of the package computes with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from dichroic.batching import row_counts, take
from dichroic.checks import (
    check_noise,
    check_operator,
    check_real,
    check_rows,
    check_same_shape,
    flat_noise,
    values_and_mask,
)
from dichroic.errors import DataError, ShapeError
from dichroic.fingerprint import fingerprint
from dichroic.noise import JointNoise, Masked, Noise, observed_entries
from dichroic.observations import Observations
from dichroic.operators import Operator, Shape, Stack, Zero
from dichroic.operators.base import as_shape
from dichroic.operators.learned import is_known, parameters


@dataclass(frozen=True)
class Source:
    """A kind of signal that is to be learned: its name, and the shape of one draw of it."""

    name: str
    shape: Shape | int

    def __post_init__(self):
        object.__setattr__(self, "shape", as_shape(self.shape))
        if fault := name_fault(self.name):
            raise ShapeError(fault)


def name_fault(name: str) -> str | None:
    """What is wrong with `name` as that of a source, which names files; `None` if nothing is."""
    long = len(name.encode(errors="replace")) > 200
    if name and name.isprintable() and not long and not any(c in "/\\:. " for c in name):
        return None
    return f"source name {name[:200]!r}: use letters, digits, '_' and '-' (it names files)"


@dataclass(frozen=True, eq=False)
class View:
    """Observations of one kind of mixture.

    Args:
        observations: `(n, *shape)`, where `shape` is the output shape of the operators.
        operators: one operator per source that this view sees, by the source's name.
        noise: a noise model, or a number: the standard deviation of isotropic noise.
        name: how reports call the view (`view1`, `view2`, … by default).
        mask: 1 where an entry was observed and 0 where it is missing, `shape` or `(n, *shape)`;
            or `"nan"`: entries that are NaN are missing.
        group: views with the same group are *co-observed*: observation `i` of each is of the same
            draw of the sources.
        truth: true sources by name, `(n, *source shape)`; only ever used to score.
        held_out: `(n,)` booleans, true for the observations to be kept from training and used for
            stopping and scoring; a random fraction by default. Choose them where observations are
            not independent (the same object seen twice, neighbouring regions).
    """

    observations: Any
    operators: Mapping[str, Operator]
    noise: Noise | float
    name: str = ""
    mask: Any = None
    group: str | None = None
    truth: Mapping[str, Any] = field(default_factory=dict)
    held_out: Any = None

    @property
    def label(self) -> str:
        """How messages call the view."""
        return f"view {self.name!r}" if self.name else "a view"

    @property
    def count(self) -> int:
        """The number of observations."""
        return int(np.shape(self.observations)[0])

    @property
    def shape(self) -> Shape:
        """The shape of one observation."""
        return tuple(np.shape(self.observations)[1:])

    @property
    def noise_model(self) -> Noise:
        """The noise model, over the flattened observation."""
        return flat_noise(self.noise, self.shape, self.label)

    @property
    def chosen(self) -> np.ndarray | None:
        """`held_out` as booleans, where it is given."""
        return None if self.held_out is None else np.asarray(self.held_out, bool)

    def observed(self) -> np.ndarray:
        """True where an entry was observed: `(n, *shape)`, or `(1, *shape)` if shared by all."""
        y, mask, _, noise = self._checked
        seen = np.asarray(observed_entries(noise, y.shape[1])) > 0
        return (seen if mask is None else seen & mask).reshape(-1, *self.shape)

    @property
    def nothing_observed(self) -> bool:
        """Whether the mask leaves no entry, from which nothing can be learned."""
        mask = self._checked[1]
        return mask is not None and not mask.any()

    def select(self, index: Any) -> "View":
        """The view restricted to the observations `index` (a slice or an integer array)."""
        mask = self.mask
        if mask is not None and not isinstance(mask, str) and np.shape(mask) != self.shape:
            mask = _rows(mask, index)
        noise = self.noise
        if not isinstance(noise, (int, float)):
            noise = take(self.noise_model, index)
        return View(
            _rows(self.observations, index),
            {k: take(op, index) for k, op in self.operators.items()},
            noise,
            self.name,
            mask,
            self.group,
            {k: _rows(x, index) for k, x in self.truth.items()},
            None,
        )

    def prepare(self) -> Observations:
        """The view, checked by itself, as `Observations`; raises a `DichroicError`."""
        y, mask, operators, noise = self._checked
        return Observations(y, operators, noise if mask is None else Masked(noise, mask))

    @cached_property
    def _checked(self) -> tuple[np.ndarray, np.ndarray | None, dict[str, Operator], Noise]:
        """Values, mask, operators and noise for `prepare`: checked and copied once per view."""
        return _check_alone(self)


def _rows(array: Any, index: Any) -> np.ndarray:
    """The rows `index` of `array`; what is read by slicing (HDF5, zarr) is not read as a whole for a slice."""
    lazy = isinstance(index, slice) and hasattr(array, "shape") and hasattr(array, "dtype")
    return np.asarray(array[index]) if lazy else np.asarray(array)[index]


@dataclass(frozen=True, eq=False)
class Problem:
    """Several views of mixtures of several sources. Checked on construction.

    `origin` is the file that states it, if there is one.
    """

    sources: Sequence[Source]
    views: Sequence[View]
    origin: str = ""

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        named = tuple(
            v if v.name else replace(v, name=f"view{i + 1}") for i, v in enumerate(self.views)
        )
        object.__setattr__(self, "views", named)
        _check_names(self)
        for view in self.views:
            check_view(view, self.shapes)
            if view.nothing_observed:
                raise DataError(f"{view.label}: the mask leaves nothing observed")
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
        return {s.name: as_shape(s.shape) for s in self.sources}

    def view(self, name: str) -> View:
        """The view called `name`."""
        for view in self.views:
            if view.name == name:
                return view
        raise DataError(f"no view {name!r}; there are {', '.join(v.name for v in self.views)}")

    def seen_by(self, source: str) -> tuple[str, ...]:
        """The names of the views that see `source`."""
        return tuple(v.name for v in self.views if sees(v, source))

    def joint_views(self) -> list[list[View]]:
        """The views, those of one group together, in the order of their first member."""
        groups: dict[str, list[View]] = {}
        for view in self.views:
            key = f"group {view.group}" if view.group else f"view {view.name}"
            groups.setdefault(key, []).append(view)
        return list(groups.values())

    def fingerprint(self) -> str:
        """A hash of everything stated that a fit depends on: all but the truth."""
        stated = [
            (v.name, v.group, v.observations, v.operators, v.noise, v.mask, v.chosen)
            for v in self.views
        ]
        return fingerprint((self.sources, stated))


def named_views(
    view: View | str | Sequence[View], problem: Problem | None, *, what: str = "separator"
) -> list[View]:
    """The views that `view` stands for: itself, several, or by name one of `problem` and its group.

    `what` is how the message calls the one that has no problem to look a name up in.
    """
    if isinstance(view, View):
        return [view]
    if not isinstance(view, str):
        return list(view)
    if problem is None:
        raise DataError(f"this {what} has no problem to find view {view!r} in; give a View")
    found = problem.view(view)
    return next(group for group in problem.joint_views() if found in group)


def _check_learned(problem: Problem) -> None:
    """Operators to be learned agree, and every source has a view whose operator for it is known."""
    learned = parameters([v.operators for v in problem.views])
    for name in problem.names if learned else ():
        seen = [v.operators[name] for v in problem.views if sees(v, name)]
        if seen and not any(map(is_known, seen)):
            raise DataError(
                f"source {name!r} is seen only through operators that are to be learned, so nothing settles "
                "its scale; give one view a known operator for it"
            )


def check_known(problem: Problem, what: str) -> None:
    """Raise `DataError` if operators of `problem` are to be learned, which `what` cannot."""
    learned = parameters([v.operators for v in problem.views])
    if learned:
        raise DataError(
            f"{what} needs operators that are known, and {', '.join(learned)} of this problem are to be "
            "learned; put their values in place of Learned(…)"
        )


def sees(view: View, source: str) -> bool:
    """Whether `view` has an operator other than zero for `source`."""
    return source in view.operators and not isinstance(view.operators[source], Zero)


def joint_observations(views: Sequence[View]) -> Observations:
    """The `Observations` of one view, or of the stack of several co-observed ones."""
    parts = [view.prepare() for view in views]
    if len(parts) == 1:
        return parts[0]
    _check_group(views)
    shapes = {k: op.in_shape for part in parts for k, op in part.operators.items()}
    operators = {
        name: Stack(
            tuple(p.operators.get(name, Zero(in_shape=shape, out_shape=(p.size,))) for p in parts)
        )
        for name, shape in shapes.items()
    }
    noise = JointNoise(tuple(p.noise for p in parts), tuple(p.size for p in parts))
    return Observations(np.concatenate([p.y for p in parts], axis=1), operators, noise)


def _check_group(views: Sequence[View]) -> None:
    counts = {view.name: view.count for view in views}
    if len(set(counts.values())) > 1:
        raise ShapeError(
            f"co-observed views (group {views[0].group!r}) need the same number of observations, "
            f"got {counts}"
        )
    chosen = [v.chosen for v in views if v.chosen is not None]
    if any(not np.array_equal(chosen[0], other) for other in chosen[1:]):
        raise DataError(f"co-observed views (group {views[0].group!r}) differ in held_out")


def check_view(view: View, shapes: Mapping[str, Shape]) -> None:
    """Raise a `DichroicError` unless `view` fits sources of the given `shapes`."""
    for name, op in view.operators.items():
        if name not in shapes:
            raise DataError(
                f"{view.label} has an operator for {name!r}, which is no source; "
                f"the sources are {', '.join(shapes)}"
            )
        if not isinstance(op, Operator):
            raise DataError(
                f"{view.label}, source {name!r}: an operator of type {type(op).__name__}; expected "
                "one such as Dense(matrix)"
            )
        check_same_shape(
            op.in_shape,
            shapes[name],
            f"{view.label}, source {name!r}: the operator takes arrays of",
        )
    for name, x in view.truth.items():
        if name not in shapes:
            raise DataError(f"{view.label} has a truth for {name!r}, which is no source")
        want = (view.count, *shapes[name])
        check_same_shape(np.shape(x), want, f"{view.label}, source {name!r}: the truth has")
        check_real(x, f"{view.label}, source {name!r}: a truth")
    if view.held_out is not None:
        check_real(view.held_out, f"{view.label}: held_out")
        check_same_shape(np.shape(view.held_out), (view.count,), f"{view.label}: held_out has")
        if np.all(view.held_out):
            raise DataError(f"{view.label}: held_out leaves no observation to learn from")
    view.prepare()


def _check_alone(view: View) -> tuple[np.ndarray, np.ndarray | None, dict[str, Operator], Noise]:
    operators = {k: op for k, op in view.operators.items() if not isinstance(op, Zero)}
    if not operators:
        raise DataError(f"{view.label} sees no source; give it an operator for at least one")
    if np.ndim(view.observations) < 2 or view.count == 0:
        raise DataError(
            f"{view.label} has no observations (an array of shape {np.shape(view.observations)}); "
            "expected (n, …) with n ≥ 1 observations"
        )
    for name, op in operators.items():
        check_same_shape(
            op.out_shape,
            view.shape,
            f"{view.label}, source {name!r}: the operator gives arrays of",
            "the observations have",
        )
        check_rows(row_counts(op), view.count, f"{view.label}: the operator of source {name!r}")
        check_operator(op, f"{view.label}, source {name!r}")
    noise = view.noise_model
    check_rows(row_counts(noise), view.count, f"{view.label}: the noise")
    check_noise(noise, view.label)
    return *values_and_mask(view.observations, view.mask, view.label), operators, noise


def _check_names(problem: Problem) -> None:
    for kind, names in (("source", problem.names), ("view", [v.name for v in problem.views])):
        if not names:
            raise DataError(f"a problem needs at least one {kind}")
        twice = [n for n in names if list(names).count(n) > 1]
        if twice:
            raise DataError(f"two {kind}s are called {twice[0]!r}; names must differ")


def holdout(views: Sequence[View], fraction: float, seed: int) -> tuple[list[View], list[View]]:
    """Split the observations of (co-observed) `views`: `(training, held out)`, the same for each.

    By the `held_out` of a view that has one, else at random: `fraction` of them, at least one, and
    all but one at most.
    """
    n = views[0].count
    chosen = [v.chosen for v in views if v.chosen is not None]
    if chosen:
        mask = chosen[0]
    else:
        order = np.random.default_rng(seed).permutation(n)
        mask = order < min(max(1, round(fraction * n)), n - 1)
    train, test = np.flatnonzero(~mask), np.flatnonzero(mask)
    return [v.select(train) for v in views], [v.select(test) for v in views]


def missing_fraction(view: View) -> float:
    """The fraction of entries of `view` that are missing."""
    return 1 - float(np.mean(view.observed()))
