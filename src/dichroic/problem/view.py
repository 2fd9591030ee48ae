"""A view as a user states it: observations of mixtures, with operators, noise, masks and truth, checked by itself.

A view is in memory (`View`) or stays in its files (`io.StoredView`); `AnyView` is what both can do. What
all observations share (shapes, kinds of operators) is read off `head`, and what is to be estimated off `some_of`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import jax
import numpy as np

from dichroic.errors import DataError, DichroicError
from dichroic.numerics.arrays import as_booleans, check_real, unmasked
from dichroic.numerics.batching import row_counts, split, take
from dichroic.operators import Operator, Shape, Zero, as_operator
from dichroic.operators.double_precision import images
from dichroic.operators.linearity import is_zero
from dichroic.operators.noise import Masked, Noise, observed_entries
from dichroic.problem.noise_validation import checked_noise, flat_noise, own_mask
from dichroic.problem.observations import Observations
from dichroic.problem.validation import (
    check_linear,
    check_operator,
    check_rows,
    check_same_shape,
    plain_observations,
    values_and_mask,
)

SOME = 4096  # observations that are looked at where not all are in memory,
RUNS = 64  # in runs of neighbours, evenly spread,
SOME_BYTES = 64 * 2**20  # and fewer of them where they are large


class AnyView(Protocol):
    """A view, in memory or in its files."""

    @property
    def name(self) -> str:
        """How reports call the view."""
        ...

    @property
    def label(self) -> str:
        """How messages call the view."""
        ...

    @property
    def count(self) -> int:
        """The number of observations."""
        ...

    @property
    def shape(self) -> Shape:
        """The shape of one observation."""
        ...

    @property
    def group(self) -> str | None:
        """Views of one group are co-observed."""
        ...

    @property
    def operators(self) -> Mapping[str, Operator]:
        """One operator per source that the view sees; of each observation, those of `head` have theirs."""
        ...

    @property
    def noise_model(self) -> Noise:
        """The noise model, over the flattened observation; of each observation, as that of `head`."""
        ...

    @property
    def probe(self) -> bool:
        """Whether operators are probed: whether they are linear, with their adjoint, and other than zero."""
        ...

    @property
    def held_out(self) -> Any:
        """`(n,)`, true for the observations that are kept from training, where that is stated."""
        ...

    @property
    def chosen(self) -> np.ndarray | None:
        """`held_out` as booleans, where it is given."""
        ...

    @property
    def head(self) -> "View":
        """The first observations, in memory: all of them, where the view is."""
        ...

    @property
    def stated(self) -> Any:
        """What a fit depends on, to be hashed."""
        ...

    def select(self, index: Any) -> "View":
        """Some observations, in memory."""
        ...

    def prepare(self, offsets: Mapping[str, np.ndarray] | None = None) -> Observations:
        """All observations, in memory, less what sources of the values `offsets` look like."""
        ...


@dataclass(frozen=True, eq=False)
class View:
    """Observations of one kind of mixture.

    Args:
        observations: `(n, *shape)`, where `shape` is the output shape of the operators. What is masked in a
            masked array (`numpy.ma`, astropy) is missing; stamps of unequal sizes become one by `pad_stamps`.
        operators: one operator per source that this view sees, by the source's name; also what `as_operator`
            takes: matrices, SciPy sparse matrices, `LinearOperator`s, JAX functions.
        noise: a noise model, or a number: the standard deviation of isotropic noise.
        name: how reports call the view (`view1`, `view2`, … by default).
        mask: 1 (or true) where an entry was observed and 0 where it is missing, `shape` or `(n, *shape)`;
            or `"nan"`: entries that are NaN are missing. Of flags, `(flags & BAD) == 0`. What is missing is not
            looked at: its values and variances may be anything.
        group: views with the same group are *co-observed*: observation `i` of each is of the same
            draw of the sources.
        truth: true sources by name, `(n, *source shape)`; only ever used to score.
        held_out: `(n,)` booleans, true for the observations to be kept from training and used for
            stopping and scoring; a random fraction by default. Choose them where observations are
            not independent (the same object seen twice, neighbouring regions).
        probe: false to take operators at their word: that they are linear, that their adjoint is that,
            and that they are not zero everywhere.
    """

    observations: Any
    operators: Mapping[str, Any]
    noise: Noise | float
    name: str = ""
    mask: Any = None
    group: str | None = None
    truth: Mapping[str, Any] = field(default_factory=dict)
    held_out: Any = None
    probe: bool = True

    def __post_init__(self):
        y, mask = plain_observations(self.observations, self.mask, self.label)
        known = lambda k: unmasked(self.truth[k], f"{self.label}, source {k!r}: the truth")
        fields = {"observations": y, "mask": mask, "truth": {k: known(k) for k in self.truth}}
        fields["held_out"] = unmasked(self.held_out, f"{self.label}: held_out")
        for name, value in fields.items():
            object.__setattr__(self, name, value)

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
        return flat_noise(self.noise, self.shape, self.label, self.count)

    @property
    def head(self) -> "View":
        """The observations that are in memory: all."""
        return self

    @property
    def stated(self) -> tuple[Any, ...]:
        """Everything that a fit depends on: all but the truth."""
        return (
            *(self.name, self.group, self.observations, self.operators),
            *(self.noise, self.mask, self.chosen),
        )

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
            self.probe and "_checked" not in self.__dict__,  # what was found good as a whole
        )

    @property
    def values(self) -> np.ndarray:
        """The observations as they are given, not rounded to float32: `(n, M)`, 0 where missing."""
        y, mask = np.asarray(self.observations).reshape(self.count, -1), self._checked[1]
        return y if mask is None else np.where(mask, y, y.dtype.type(0))

    def prepare(self, offsets: Mapping[str, np.ndarray] | None = None) -> Observations:
        """The view, checked by itself, as `Observations`; raises a `DichroicError`.

        What sources of the values `offsets`, by name, look like is subtracted in float64, before observations are
        rounded to float32.
        """
        y, mask, operators, noise = self._checked
        known = {k: offsets[k] for k in operators if k in offsets} if offsets else {}
        if known:
            rest = self.values - images(operators, known)
            y = (rest if mask is None else np.where(mask, rest, 0)).astype(y.dtype)
        return Observations(y, operators, noise if mask is None else Masked(noise, mask))

    @cached_property
    def _checked(self) -> tuple[np.ndarray, np.ndarray | None, dict[str, Operator], Noise]:
        """Values, mask, operators and noise for `prepare`: checked and copied once per view."""
        return _check_alone(self)


def _rows(array: Any, index: Any) -> np.ndarray:
    """The rows `index` of `array`; what is read by slicing (HDF5, zarr) is not read as a whole for a slice."""
    lazy = isinstance(index, slice) and hasattr(array, "shape") and hasattr(array, "dtype")
    return np.asarray(array[index]) if lazy else np.asarray(array)[index]


def with_operators(view: AnyView, shapes: Mapping[str, Shape]) -> AnyView:
    """`view`, with the operators that its matrices and functions stand for, on sources of the given `shapes`."""
    if not isinstance(view, View) or all(
        isinstance(op, Operator) for op in view.operators.values()
    ):
        return view
    made = lambda k, op: _operator(op, view.label, k, shapes.get(k), view.shape)
    return replace(view, operators={k: made(k, op) for k, op in view.operators.items()})


def _operator(given: Any, label: str, name: str, in_shape: Shape | None, shape: Shape) -> Operator:
    if isinstance(given, Operator):
        return given
    try:
        return as_operator(given, in_shape=in_shape, out_shape=shape)
    except DichroicError as error:
        raise type(error)(f"{label}, source {name!r}: {error}") from error


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
        op = _operator(op, view.label, name, shapes[name], head.shape)
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
    _ = head._checked


def _check_alone(view: View) -> tuple[np.ndarray, np.ndarray | None, dict[str, Operator], Noise]:
    known = {k: op for k, op in view.operators.items() if not isinstance(op, Zero)}
    operators = {k: _operator(op, view.label, k, None, view.shape) for k, op in known.items()}
    if not operators:
        raise DataError(f"{view.label} sees no source; give it an operator for at least one")
    check_some(np.shape(view.observations), view.label, view.observations)
    for name, op in operators.items():
        check_same_shape(
            op.out_shape,
            view.shape,
            f"{view.label}, source {name!r}: the operator gives arrays of",
            "the observations have",
        )
        what = f"{view.label}: the operator of source {name!r}"
        check_rows(row_counts(op), view.count, what, op.out_shape)
        check_operator(op, f"{view.label}, source {name!r}")
        if view.probe:
            check_linear(op, f"{view.label}, source {name!r}")
    noise = view.noise_model
    check_rows(row_counts(noise), view.count, f"{view.label}: the noise", view.shape)
    also = own_mask(noise, math.prod(view.shape), view.label)
    y, mask = values_and_mask(view.observations, view.mask, view.label, also)
    masks = [m for m in (mask, also) if m is not None]
    seen = np.logical_and(masks[0], masks[-1]) if masks else None
    return y, mask, operators, checked_noise(noise, seen, view.shape, view.label)


def sees(view: AnyView, source: str) -> bool:
    """Whether `view` has an operator other than zero for `source`."""
    return source in view.operators and not isinstance(view.operators[source], Zero)


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


def check_some(shape: Shape, label: str, stated: Any) -> None:
    """Raise a `DataError` unless an array of observations, of `shape` and as `stated`, holds any."""
    if not shape:
        raise DataError(
            f"{label}: the observations are one number ({stated}); expected an array (n, …), one row for "
            "each of n ≥ 1 observations"
        )
    if len(shape) < 2 or shape[0] == 0:
        raise DataError(
            f"{label} has no observations (an array of shape {shape}); "
            "expected (n, …) with n ≥ 1 observations"
        )


@contextmanager
def numbering(start: int, stop: int, count: int | None = None) -> Iterator[None]:
    """Let errors raised inside say of which observations they are: `start` up to `stop`, or `count` of these."""
    try:
        yield
    except DichroicError as error:
        some = "observations" if count in (None, stop - start) else f"{count} of observations"
        where = f"in {some} {start} to {stop - 1} (numbered from 0 there)"
        raise type(error)(f"{error}; {where}") from error


# A part that stands for all.


def some_of(views: Sequence[AnyView]) -> list[View]:
    """Co-observed views, as they are where they are in memory; else the same few observations of each.

    Of those in files at most 4,096, evenly spread in 64 runs, that take some 64 MiB together.
    """
    heads = [view.head for view in views]
    if all(head is view for head, view in zip(heads, views, strict=True)):
        return heads
    each = sum(bytes_each(head) for head in heads)
    most = min(max(SOME_BYTES // each, RUNS), SOME)
    index = spread(views[0].count, RUNS, most // RUNS)
    return [view.select(index) for view in views]


def bytes_each(view: View) -> int:
    """The bytes of what each observation of `view` has of its own: values, masks, operators, noise."""
    rows = jax.tree.leaves(split(view.prepare())[0])
    return max(sum(leaf.nbytes for leaf in rows) // view.count, 1)


def spread(count: int, runs: int, each: int) -> np.ndarray:
    """The numbers of `runs` times `each` neighbouring observations, evenly spread over `count`; all, if few."""
    if count <= runs * each:
        return np.arange(count)
    starts = np.linspace(0, count - each, runs).astype(int)
    return (starts[:, None] + np.arange(each)).ravel()


def missing_fraction(view: View) -> float:
    """The fraction of entries of `view` that are missing."""
    return 1 - float(np.mean(view.observed()))
