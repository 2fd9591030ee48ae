"""One view as a table states it, in a problem file or alone."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from dichroic.errors import ConfigError
from dichroic.io.flags import bad_bits, flag_bits
from dichroic.io.location import Location, known_table, naming, require
from dichroic.io.operator_spec import build_noise, build_operator
from dichroic.io.values import short
from dichroic.numerics.arrays import as_booleans, split_mask, unmasked
from dichroic.operators import Shape
from dichroic.operators.noise import Noise
from dichroic.problem.noise_validation import flat_noise
from dichroic.problem.view import View

VIEW_KEYS = ("observations", "operators", "noise", "mask", "group", "truth", "held_out", "probe")


def build_view(
    name: str, table: Mapping[str, Any], shapes: Mapping[str, Shape], location: Location
) -> View:
    """The view that `table` states; without `noise` it is NaN, for `new_view` to replace.

    Where `location` has rows, the view is of these observations, and none is held out.
    """
    y = location.at("observations").array(table["observations"], _never)
    shape = y.shape[1:]
    here = location.at("operators")
    specs = known_table(table.get("operators"), shapes, here)
    operators = {}
    for k, spec in specs.items():
        at = here.at(k)
        operators[k] = at.keep(partial(build_operator, spec, shapes[k], shape, at))
    noise = (
        math.nan if table.get("noise") is None else _noise(name, table["noise"], shape, location)
    )
    truth = known_table(table.get("truth"), shapes, location.at("truth"))
    mask = _mask(table.get("mask"), shape, location.at("mask"))
    known = {k: location.at("truth").at(k).array(v, _never) for k, v in truth.items()}
    held_out = held_out_of(table, location) if location.rows is None else None
    probe = probe_of(table, location)
    with naming(location):
        return View(y, operators, noise, name, mask, group_of(table), known, held_out, probe)


def _noise(name: str, spec: Any, shape: Shape, location: Location) -> Noise | float:
    """The noise that `spec` states; of some observations flat, as it is then kept."""
    here = location.at("noise")

    def built() -> Noise | float:
        noise = build_noise(spec, shape, here)
        if location.rows is None or isinstance(noise, float):
            return noise
        with naming(location):
            return flat_noise(noise, shape, f"view {name!r}", location.rows.count)

    return here.keep(built)


def group_of(table: Mapping[str, Any]) -> str | None:
    """The name of the group that `table` states."""
    return None if table.get("group") is None else str(table["group"])


def probe_of(table: Mapping[str, Any], location: Location) -> bool:
    """Whether the operators of the view that `table` states are probed: `probe`, true by default."""
    probe = table.get("probe", True)
    if not isinstance(probe, bool):
        raise ConfigError(f"{location.at('probe')}: expected true or false, got {short(probe)}")
    return probe


def held_out_of(table: Mapping[str, Any], location: Location) -> np.ndarray | None:
    """`(n,)` booleans of the `held_out` that `table` states, if it does."""
    if table.get("held_out") is None:
        return None
    here = location.at("held_out")
    with naming(here):
        chosen = unmasked(here.array(table["held_out"]), "held_out")
        return as_booleans(chosen, "held_out", "1 for what is held out, else 0")


def _never(shape: Shape) -> bool:
    """Whether an array that has a row for every observation, always, is shared."""
    return False


def _mask(spec: Any, shape: Shape, location: Location) -> Any:
    shared = lambda found: found == shape
    if spec is None:
        return None
    if isinstance(spec, Mapping) and "file" not in spec:
        return _unflagged(spec, shared, location)
    missing = (
        not isinstance(spec, (list, tuple, Mapping)) and np.ndim(spec) == 0 and str(spec) == "nan"
    )
    return "nan" if missing else location.array(spec, shared)


def _unflagged(
    spec: Mapping[str, Any], shared: Callable[[Shape], bool], location: Location
) -> np.ndarray:
    """True where none of the bits `bad` of flags is set, or none at all; what is masked in them is missing."""
    table = known_table(spec, ("flags", "bad"), location)
    require(table, ("flags",), location)
    flags, hidden = split_mask(location.at("flags").array(table["flags"], shared), "flags")
    bits = flag_bits(flags, isinstance(table["flags"], (list, tuple)), location.at("flags"))
    good = bits & bad_bits(table.get("bad"), bits.dtype, location.at("bad")) == 0
    return good if hidden is None else good & ~hidden
