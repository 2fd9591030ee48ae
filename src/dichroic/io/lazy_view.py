"""A view that stays in its files: what it states, its first observations, and others where they are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from dichroic.errors import DataError
from dichroic.io.arrays import array_shape
from dichroic.io.location import Location, Rows, naming
from dichroic.io.view_spec import build_view, group_of, held_out_of, probe_of
from dichroic.operators import Operator, Shape
from dichroic.operators.noise import Noise
from dichroic.problem.observations import Observations
from dichroic.problem.view import View, check_some, check_view, numbering, spread

HEAD = 64  # observations
STATED = 32, 8  # runs of as many observations that tell one view from another


@dataclass(frozen=True, eq=False)
class StoredView:
    """A view that stays in its files: `select` reads no more than the observations asked for.

    `table` is what is stated at `location`, `shapes` are those of the sources. Everything that is read is checked,
    and raises a `DichroicError` as `load_problem` does.
    """

    name: str
    table: Mapping[str, Any]
    location: Location
    shapes: Mapping[str, Shape]

    @property
    def label(self) -> str:
        """How messages call the view."""
        return f"view {self.name!r}"

    @cached_property
    def _array_shape(self) -> Shape:
        here = self.location.at("observations")
        with naming(here):
            return array_shape(self.table["observations"], here.folder)

    @property
    def count(self) -> int:
        """The number of observations, without reading them."""
        return next(iter(self._array_shape), 0)

    @property
    def shape(self) -> Shape:
        """The shape of one observation."""
        return self._array_shape[1:]

    @property
    def group(self) -> str | None:
        """Views of one group are co-observed."""
        return group_of(self.table)

    @property
    def probe(self) -> bool:
        """Whether operators are probed."""
        return probe_of(self.table, self.location)

    @cached_property
    def held_out(self) -> np.ndarray | None:
        """`(n,)`, true for the observations that are kept from training, where that is stated."""
        return held_out_of(self.table, self.location)

    @property
    def chosen(self) -> np.ndarray | None:
        """The same."""
        return self.held_out

    @cached_property
    def head(self) -> View:
        """The first 64 observations."""
        check_some(self._array_shape, f"{self.location}: {self.label}", self.table["observations"])
        return self.select(slice(0, HEAD))

    @property
    def operators(self) -> Mapping[str, Operator]:
        """The operators; those that differ from observation to observation are of the first 64."""
        return self.head.operators

    @property
    def noise_model(self) -> Noise:
        """The noise model; where it differs from observation to observation, of the first 64."""
        return self.head.noise_model

    @property
    def stated(self) -> tuple[Any, ...]:
        """What tells this view from others: sizes, and 256 observations in 32 runs, evenly spread."""
        some = self.select(spread(self.count, *STATED)).stated
        return (*some, self.count, self.shape, self.chosen)

    def select(self, index: slice | np.ndarray) -> View:
        """Some observations: consecutive ones, or by increasing numbers; what all share is read as a whole."""
        if isinstance(index, slice):
            start, stop, step = index.indices(self.count)
            if step != 1 or stop <= start:
                raise DataError(
                    f"{self.location}: no consecutive observations of {self.count}: {index}"
                )
            return self._read_rows(slice(start, stop))
        index = np.asarray(index)
        bounds = np.concatenate([[-1], index, [self.count]])
        if not len(index) or np.any(np.diff(bounds) < 1):
            raise DataError(f"{self.location}: no increasing numbers of {self.count} observations")
        with numbering(int(index[0]), int(index[-1]) + 1, len(index)):
            return self._read_rows(index)

    def read(self) -> View:
        """All of it."""
        return self._read(self.location)

    def prepare(self, offsets: Mapping[str, np.ndarray] | None = None) -> Observations:
        """All of it, as `Observations`, less what sources of the values `offsets` look like."""
        return self.read().prepare(offsets)

    def _read_rows(self, index: slice | np.ndarray) -> View:
        return self._read(replace(self.location, rows=Rows(index, self.count)))

    def _read(self, location: Location) -> View:
        view = build_view(self.name, self.table, self.shapes, location)
        with naming(location):
            view = self._completed(view)
            check_view(view, self.shapes)
        return view

    def _completed(self, view: View) -> View:
        """`view` with what is not in the files."""
        return view
