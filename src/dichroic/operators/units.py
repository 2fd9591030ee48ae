"""Sources in units of their own: with `x = s ∘ u`, an operator `A` on `x` is `A diag(s)` on `u`.

A mixture of probabilistic PCA has one floor for all numbers of a source. Numbers that vary little, such as those
where no object ever is, would be as uncertain as any other; in units of what each number varies by they are not.

Units are kept among the parameters of operators that a fit learns (`dichroic.operators.learned`), by the name of
the source.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from dichroic.batching import as_float
from dichroic.errors import FormatError
from dichroic.operators.base import Operator, Shape
from dichroic.operators.elementary import Diagonal
from dichroic.operators.learned import Parameters
from dichroic.operators.structure import Compose

Numbers = TypeVar("Numbers")
_PREFIX = "units:"  # which no name of an operator has


class Units(Diagonal):
    """`diag(s)`, as the last factor of the operators of a source."""


def as_parameters(units: Mapping[str, Any]) -> Parameters:
    """The units of each source, `(*shape)`, among what is learned of operators."""
    return {_PREFIX + name: (as_float(s),) for name, s in units.items()}


def units_of(values: Parameters) -> dict[str, Any]:
    """The units of each source that has some, by its name."""
    cut = len(_PREFIX)
    return {k[cut:]: s for k, (s, *_) in values.items() if k.startswith(_PREFIX)}


def without_units(values: Parameters) -> Parameters:
    """What was learned of operators alone."""
    return {k: v for k, v in values.items() if not k.startswith(_PREFIX)}


def named_units(values: Parameters, names: Mapping[str, str]) -> Parameters:
    """The units of the sources `names`, `{new name: known source}`."""
    known = units_of(values)
    return as_parameters({new: known[old] for new, old in names.items() if old in known})


def in_units(operators: dict[str, Operator], values: Parameters) -> dict[str, Operator]:
    """The operators of each source, acting on it in its units; units that it has already are replaced."""
    known = units_of(values)
    return {k: _acting(op, known[k]) if k in known else op for k, op in operators.items()}


def from_units(x: Mapping[str, Numbers], values: Parameters) -> dict[str, Numbers]:
    """Sources `(…, *shape)` as they are, from those in units."""
    known = {k: np.asarray(s) for k, s in units_of(values).items()}
    return {k: a * known[k] if k in known else a for k, a in x.items()}  # type: ignore[operator]


def own_units(op: Operator) -> Any:
    """The units that an operator has its source in; 1 where there are none."""
    last = op.operators[-1] if isinstance(op, Compose) else None
    return np.asarray(last.diagonal) if isinstance(last, Units) else 1.0


def check_units(values: Parameters, shapes: Mapping[str, Shape], where: str) -> None:
    """Raise `FormatError` unless units are positive and of sources of their shapes."""
    for name, s in units_of(values).items():
        if (
            name not in shapes
            or np.shape(s) != tuple(shapes[name])
            or not np.all(np.asarray(s) > 0)
        ):
            raise FormatError(
                f"{where}: is damaged: the units of {name!r} are not those of a source"
            )


def _acting(op: Operator, s: Any) -> Operator:
    parts = op.operators if isinstance(op, Compose) else (op,)
    parts = parts[:-1] if isinstance(parts[-1], Units) else parts
    return Compose((*parts, Units(s)))
