"""A view in memory, as a user states it: observations of mixtures, with operators, noise, masks and truth."""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np

from dichroic.errors import DataError, DichroicError
from dichroic.numerics.arrays import unmasked
from dichroic.numerics.batching import row_counts, split, take
from dichroic.operators import Operator, Shape, Zero, as_operator
from dichroic.operators.double_precision import images
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
    def fingerprint_payload(self) -> tuple[Any, ...]:
        """Everything that a fit depends on: all but the truth."""
        return (
            *(self.name, self.group, self.observations, self.operators),
            *(self.noise, self.mask, self.held_out_mask),
        )

    @property
    def held_out_mask(self) -> np.ndarray | None:
        """`held_out` as booleans, where it is given."""
        return None if self.held_out is None else np.asarray(self.held_out, bool)

    def observed(self) -> np.ndarray:
        """True where an entry was observed: `(n, *shape)`, or `(1, *shape)` if shared by all."""
        y, mask, _, noise = self.checked
        seen = np.asarray(observed_entries(noise, y.shape[1])) > 0
        return (seen if mask is None else seen & mask).reshape(-1, *self.shape)

    @property
    def nothing_observed(self) -> bool:
        """Whether the mask leaves no entry, from which nothing can be learned."""
        mask = self.checked[1]
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
            self.probe and "checked" not in self.__dict__,  # what was found good as a whole
        )

    @property
    def values(self) -> np.ndarray:
        """The observations as they are given, not rounded to float32: `(n, M)`, 0 where missing."""
        y, mask = np.asarray(self.observations).reshape(self.count, -1), self.checked[1]
        return y if mask is None else np.where(mask, y, y.dtype.type(0))

    def prepare(self, offsets: Mapping[str, np.ndarray] | None = None) -> Observations:
        """The view, checked by itself, as `Observations`; raises a `DichroicError`.

        What sources of the values `offsets`, by name, look like is subtracted in float64, before observations are
        rounded to float32.
        """
        y, mask, operators, noise = self.checked
        known = {k: offsets[k] for k in operators if k in offsets} if offsets else {}
        if known:
            rest = self.values - images(operators, known)
            y = (rest if mask is None else np.where(mask, rest, 0)).astype(y.dtype)
        return Observations(y, operators, noise if mask is None else Masked(noise, mask))

    @cached_property
    def checked(self) -> tuple[np.ndarray, np.ndarray | None, dict[str, Operator], Noise]:
        """Values, mask, operators and noise for `prepare`: checked and copied once per view."""
        return _check_alone(self)


def _rows(array: Any, index: Any) -> np.ndarray:
    """The rows `index` of `array`; what is read by slicing (HDF5, zarr) is not read as a whole for a slice."""
    lazy = isinstance(index, slice) and hasattr(array, "shape") and hasattr(array, "dtype")
    return np.asarray(array[index]) if lazy else np.asarray(array)[index]


def operator_of(
    given: Any, label: str, name: str, in_shape: Shape | None, shape: Shape
) -> Operator:
    """The operator that `given` stands for (see `as_operator`), of source `name` in the view called `label`."""
    if isinstance(given, Operator):
        return given
    try:
        return as_operator(given, in_shape=in_shape, out_shape=shape)
    except DichroicError as error:
        raise type(error)(f"{label}, source {name!r}: {error}") from error


def _check_alone(view: View) -> tuple[np.ndarray, np.ndarray | None, dict[str, Operator], Noise]:
    known = {k: op for k, op in view.operators.items() if not isinstance(op, Zero)}
    operators = {k: operator_of(op, view.label, k, None, view.shape) for k, op in known.items()}
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
def numbering(start: int, stop: int, count: int | None = None) -> Generator[None, None, None]:
    """Let errors raised inside say of which observations they are: `start` up to `stop`, or `count` of these."""
    try:
        yield
    except DichroicError as error:
        some = "observations" if count in (None, stop - start) else f"{count} of observations"
        where = f"in {some} {start} to {stop - 1} (numbered from 0 there)"
        raise type(error)(f"{error}; {where}") from error


def bytes_each(view: View) -> int:
    """The bytes of what each observation of `view` has of its own: values, masks, operators, noise."""
    rows = jax.tree.leaves(split(view.prepare())[0])
    return max(sum(leaf.nbytes for leaf in rows) // view.count, 1)


def missing_fraction(view: View) -> float:
    """The fraction of entries of `view` that are missing."""
    return 1 - float(np.mean(view.observed()))
