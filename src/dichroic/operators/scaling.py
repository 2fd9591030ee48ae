"""Sources in units of their own, from offsets of their own: `x = m + s ∘ u`.

An operator `A` on `x` is `A diag(s)` on `u`, and `y` less `A m` is what is observed of `s ∘ u`.

A mixture of probabilistic PCA has one floor for all entries of a source. Entries that vary little, such as those
where no object ever is, would be as uncertain as any other; in units of what each number varies by they are not.
Offsets are there where observations are so large that float32 does not hold them (`dichroic.problem.offsets`).
They are float32 numbers, which are exact, and are subtracted and added in float64.

Both are kept among the parameters of operators that a fit learns (`dichroic.operators.learnable`), by the name of
the source.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from dichroic.errors import FormatError
from dichroic.numerics.batching import as_float
from dichroic.operators.base import Operator, Shape
from dichroic.operators.elementary import Diagonal
from dichroic.operators.learnable import Parameters
from dichroic.operators.structure import Compose

Values = TypeVar("Values")
_SCALE, _OFFSET = "scale:", "offset:"  # which no name of an operator has


class EntryScales(Diagonal):
    """`diag(s)`, as the last factor of the operators of a source."""

    def __init__(self, scales: Any):
        super().__init__(scales)


def scale_parameters(units: Mapping[str, Any]) -> Parameters:
    """The units of each source, `(*shape)`, among what is learned of operators."""
    return {_SCALE + name: (as_float(s),) for name, s in units.items()}


def offset_parameters(offsets: Mapping[str, Any]) -> Parameters:
    """The offset of each source, `(*shape)`, rounded to float32, in the same place."""
    return {_OFFSET + name: (as_float(m),) for name, m in offsets.items()}


def scales_of(values: Parameters) -> dict[str, Any]:
    """The units of each source that has some, by its name."""
    return _named(values, _SCALE)


def offsets_of(values: Parameters) -> dict[str, np.ndarray]:
    """The offset of each source that has one, by its name, in float64."""
    return {k: np.asarray(m, np.float64) for k, m in _named(values, _OFFSET).items()}


def without_scaling(values: Parameters) -> Parameters:
    """What was learned of operators alone: no units, and no offsets."""
    return {k: v for k, v in values.items() if not k.startswith((_SCALE, _OFFSET))}


def renamed_scaling(values: Parameters, names: Mapping[str, str]) -> Parameters:
    """The units and offsets of the sources `names`, `{new name: known source}`."""
    return {
        prefix + new: values[prefix + old]
        for prefix in (_SCALE, _OFFSET)
        for new, old in names.items()
        if prefix + old in values
    }


def _named(values: Parameters, prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): a for k, (a, *_) in values.items() if k.startswith(prefix)}


def scaled_operators(operators: dict[str, Operator], values: Parameters) -> dict[str, Operator]:
    """The operators of each source, acting on it in its units; units that it has already are replaced."""
    known = scales_of(values)
    return {k: _acting(op, known[k]) if k in known else op for k, op in operators.items()}


def unscaled(x: Mapping[str, Values], values: Parameters) -> dict[str, Values]:
    """Sources `(…, *shape)` as they are, from those in units; in float64 where they have an offset."""
    known = {k: np.asarray(s) for k, s in scales_of(values).items()}
    x = {k: a * known[k] if k in known else a for k, a in x.items()}  # type: ignore[operator]
    offsets = offsets_of(values)
    return {k: a + offsets[k] if k in offsets else a for k, a in x.items()}  # type: ignore[operator]


def entry_scales(op: Operator) -> Any:
    """The units that an operator has its source in; 1 where there are none."""
    last = op.operators[-1] if isinstance(op, Compose) else None
    return np.asarray(last.diagonal) if isinstance(last, EntryScales) else 1.0


def check_scaling(values: Parameters, shapes: Mapping[str, Shape], where: str) -> None:
    """Raise `FormatError` unless units are positive, and they and offsets of sources of their shapes."""
    units = scales_of(values)
    for name, a in (*units.items(), *offsets_of(values).items()):
        if name not in shapes or np.shape(a) != tuple(shapes[name]):
            raise FormatError(
                f"{where}: is damaged: the units of {name!r}, or its offset, are not those of a source"
            )
    for name, s in units.items():
        if not np.all(np.asarray(s) > 0):
            raise FormatError(f"{where}: is damaged: the units of {name!r} are not all positive")


def _acting(op: Operator, s: Any) -> Operator:
    parts = op.operators if isinstance(op, Compose) else (op,)
    parts = parts[:-1] if isinstance(parts[-1], EntryScales) else parts
    return Compose((*parts, EntryScales(s)))
