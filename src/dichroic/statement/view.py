"""One view as a table states it, in a problem file or alone."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from dichroic.checks import flat_noise
from dichroic.errors import ConfigError
from dichroic.noise import Noise
from dichroic.operators import Shape
from dichroic.problem import View
from dichroic.statement.parts import build_noise, build_operator
from dichroic.statement.spots import Spot, known_table, naming
from dichroic.statement.values import short

VIEW_KEYS = ("observations", "operators", "noise", "mask", "group", "truth", "held_out", "probe")


def build_view(
    name: str, table: Mapping[str, Any], shapes: Mapping[str, Shape], spot: Spot
) -> View:
    """The view that `table` states; without `noise` it is NaN, for `new_view` to replace.

    Where `spot` has rows, the view is of these observations, and none is held out.
    """
    y = spot.at("observations").array(table["observations"], _never)
    shape = y.shape[1:]
    here = spot.at("operators")
    specs = known_table(table.get("operators"), shapes, here)
    operators = {}
    for k, spec in specs.items():
        at = here.at(k)
        operators[k] = at.keep(partial(build_operator, spec, shapes[k], shape, at))
    noise = math.nan if table.get("noise") is None else _noise(name, table["noise"], shape, spot)
    truth = known_table(table.get("truth"), shapes, spot.at("truth"))
    return View(
        y,
        operators,
        noise,
        name,
        _mask(table.get("mask"), shape, spot.at("mask")),
        group_of(table),
        {k: spot.at("truth").at(k).array(v, _never) for k, v in truth.items()},
        held_out_of(table, spot) if spot.rows is None else None,
        probe_of(table, spot),
    )


def _noise(name: str, spec: Any, shape: Shape, spot: Spot) -> Noise | float:
    """The noise that `spec` states; of some observations flat, as it is then kept."""
    here = spot.at("noise")

    def built() -> Noise | float:
        noise = build_noise(spec, shape, here)
        if spot.rows is None or isinstance(noise, float):
            return noise
        with naming(spot):
            return flat_noise(noise, shape, f"view {name!r}")

    return here.keep(built)


def group_of(table: Mapping[str, Any]) -> str | None:
    """The name of the group that `table` states."""
    return None if table.get("group") is None else str(table["group"])


def probe_of(table: Mapping[str, Any], spot: Spot) -> bool:
    """Whether the operators of the view that `table` states are probed: `probe`, true by default."""
    probe = table.get("probe", True)
    if not isinstance(probe, bool):
        raise ConfigError(f"{spot.at('probe')}: expected true or false, got {short(probe)}")
    return probe


def held_out_of(table: Mapping[str, Any], spot: Spot) -> np.ndarray | None:
    """`(n,)` booleans of the `held_out` that `table` states, if it does."""
    held_out = table.get("held_out")
    return None if held_out is None else spot.at("held_out").array(held_out) > 0


def _never(shape: Shape) -> bool:
    """Whether an array that has a row for every observation, always, is shared."""
    return False


def _mask(spec: Any, shape: Shape, spot: Spot) -> Any:
    if spec is None:
        return None
    missing = not isinstance(spec, (list, tuple)) and np.ndim(spec) == 0 and str(spec) == "nan"
    return "nan" if missing else spot.array(spec, lambda found: found == shape)
