"""Views that stay in their files: `problem.LazyView`s of what a table states."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dichroic.io.arrays import array_shape
from dichroic.io.location import Location, Rows, naming
from dichroic.io.view_spec import build_view, group_of, held_out_of, probe_of
from dichroic.operators import Shape
from dichroic.problem.lazy_view import LazyView
from dichroic.problem.view import View, check_some
from dichroic.problem.view_validation import check_view


def lazy_view(
    name: str,
    table: Mapping[str, Any],
    location: Location,
    shapes: Mapping[str, Shape],
    completed: Callable[[View], View] = lambda view: view,
) -> LazyView:
    """The view that `table` states at `location`, of sources of the given `shapes`, without reading its arrays.

    `completed` adds what the table leaves out. Raises a `DichroicError`.
    """
    here = location.at("observations")
    with naming(here):
        size = array_shape(table["observations"], here.folder)
    check_some(size, f"{location}: view {name!r}", table["observations"])
    count, shape = size[0], size[1:]

    def read_rows(index: slice | np.ndarray | None) -> View:
        at = location if index is None else replace(location, rows=Rows(index, count))
        view = build_view(name, table, shapes, at)
        with naming(at):
            view = completed(view)
            check_view(view, shapes)
        return view

    held_out, probe = held_out_of(table, location), probe_of(table, location)
    return LazyView(name, count, shape, read_rows, group_of(table), held_out, probe, str(location))
