"""A problem file: its sources, its views, and the settings of a fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dichroic.config import check_keys
from dichroic.io.lazy_view import lazy_view
from dichroic.io.location import Location, as_table, naming, read_yaml, require
from dichroic.io.values import parse_shape
from dichroic.io.view_spec import VIEW_KEYS
from dichroic.operators import Shape
from dichroic.problem.lazy_view import LazyView
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View
from dichroic.problem.view_validation import check_view


def load_problem(
    path: str | Path, *, stored: bool = False, probe: bool = True
) -> tuple[Problem, dict[str, Any]]:
    """Read a problem from a YAML file.

    Args:
        path: the file; array references in it are relative to its folder.
        stored: leave the arrays in their files, for more observations than fit in memory: the views are
            `LazyView`s, checked as far as their statements and first observations go; `check_values` reads
            and checks the others.
        probe: false to probe no operators, whatever the file says (see `View`).

    Returns:
        The problem, checked, and the `fit:` section as it stands (`FitConfig.from_dict` checks it).

    Raises:
        DichroicError: if anything is wrong; the message starts with the file and the position.
    """
    table, location = read_yaml(Path(path))
    check_keys(table, ("sources", "views", "fit"), str(location))
    require(table, ("sources", "views"), location)
    sources = _sources(table["sources"], location.at("sources"))
    shapes = {s.name: s.shape for s in sources}
    here = location.at("views")
    specs = as_table(table["views"], here)
    views = [_problem_view(k, v, shapes, here.at(k), stored, probe) for k, v in specs.items()]
    with naming(location):
        problem = Problem(sources, views, str(Path(path).resolve()))
    section = table.get("fit")
    return problem, {} if section is None else as_table(section, location.at("fit"))


def _sources(value: Any, location: Location) -> list[Source]:
    sources = []
    for name, spec in as_table(value, location).items():
        here = location.at(name)
        if isinstance(spec, Mapping):
            check_keys(spec, ("shape",), str(here))
            require(spec, ("shape",), here)
            spec = spec["shape"]
        with naming(here):
            sources.append(Source(name, parse_shape(spec)))
    return sources


def _problem_view(
    name: str,
    value: Any,
    shapes: Mapping[str, Shape],
    location: Location,
    stored: bool,
    probe: bool,
) -> View | LazyView:
    table = as_table(value, location) | ({} if probe else {"probe": False})
    check_keys(table, VIEW_KEYS, str(location))
    require(table, ("observations", "operators", "noise"), location)
    view = lazy_view(name, table, location, shapes)
    if not stored:
        return view.read()
    with naming(location):
        check_view(view, shapes)
    return view
