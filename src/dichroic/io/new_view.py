"""A new view, stated alone, and completed from a view of the problem."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.config import check_keys
from dichroic.errors import ConfigError, DataError
from dichroic.io.array_safety import check_npz
from dichroic.io.arrays import open_npz
from dichroic.io.lazy_view import lazy_view
from dichroic.io.location import Location, as_table, naming, read_yaml, require
from dichroic.io.operator_spec import NOISES
from dichroic.io.references import no_file
from dichroic.io.view_spec import VIEW_KEYS
from dichroic.numerics.batching import row_counts
from dichroic.operators.noise import Noise
from dichroic.problem.lazy_view import AnyView, LazyView
from dichroic.problem.problem import Problem
from dichroic.problem.validation import plain_observations
from dichroic.problem.view import View
from dichroic.problem.view_validation import sees


def open_view(
    path_or_spec: str | Path | Mapping[str, Any],
    problem: Problem,
    *,
    like: str | None = None,
    probe: bool = True,
) -> LazyView:
    """What `load_view` reads, before it is read: for observations that do not fit in memory.

    The arguments are those of `load_view`. Of `.npy`, `.npz`, HDF5 and zarr arrays, and
    of stacked files, `LazyView.select` reads the rows that it needs; files of other formats as a whole.
    """
    table, location, name = _view_table(path_or_spec, problem)
    donor = problem.view(like) if like else max(problem.views, key=lambda v: _seen(v, problem))
    check_keys(table, VIEW_KEYS, str(location))
    require(table, ("observations",), location)
    table = table if probe else {**table, "probe": False}
    completed = partial(_complete, table=table, donor=donor.head)
    return lazy_view(name, table, location, problem.shapes, completed)


def load_view(
    path_or_spec: str | Path | Mapping[str, Any],
    problem: Problem,
    *,
    like: str | None = None,
    probe: bool = True,
) -> View:
    """Read new observations that are to be separated into the sources of `problem`.

    What is not given is taken from a view of `problem`, provided it is shared by all observations
    there: the noise, the operator of each source that has none here (`zero` leaves a source out),
    and with such an operator also the mask.

    Args:
        path_or_spec: an `.npz` file with `observations` `(n, *shape)` and, optionally, `mask`,
            `operator/<source>` (dense, `(M, D)` or `(n, M, D)`), `noise` (standard deviation, a
            number or `(n,)`) or `noise/diagonal`, `noise/dense`, and `truth/<source>`; a YAML file
            that holds one view; or such a view as a mapping, where arrays may stand for references.
        problem: the problem whose sources were learned.
        like: the view that lends what is missing; by default the one that sees most sources.
        probe: false to probe no operators, whatever the file says (see `View`).

    Raises:
        DichroicError: if the view is malformed, does not fit the sources, or lacks something that
            differs from observation to observation in the view `like`.
    """
    return open_view(path_or_spec, problem, like=like, probe=probe).read()


def _seen(view: AnyView, problem: Problem) -> int:
    return sum(sees(view, name) for name in problem.names)


# What the file or mapping says.


def _view_table(source: Any, problem: Problem) -> tuple[dict[str, Any], Location, str]:
    """`(table, position, name)` of a view stated in a file or a mapping."""
    if isinstance(source, Mapping):
        location = Location("view", Path())
        return as_table(source, location), location, "view"
    path = Path(source)
    if path.suffix.lower() in (".yaml", ".yml"):
        return *read_yaml(path), path.stem
    if path.suffix.lower() != ".npz":
        raise ConfigError(f"{path.name}: expected a view in an .npz or a .yaml file")
    location = Location(path.name, path.parent)
    if not path.is_file():
        raise DataError(f"{location}: {no_file(path)}")
    with naming(location):
        return _npz_table(path, problem.names, location), location, path.stem


def _npz_table(path: Path, names: Sequence[str], location: Location) -> dict[str, Any]:
    """The view in an `.npz` file, in the form of a YAML file's."""
    noises = [f"noise/{kind}" for kind in NOISES if kind not in ("low_rank", "stationary")]
    per_source = [f"{what}/{name}" for what in ("operator", "truth") for name in names]
    with open_npz(path) as archive:
        check_keys(archive, ("observations", "mask", "noise", *noises, *per_source), str(location))
        check_npz(archive.zip, path.name, archive)
        values: dict[str, Any] = {key: {"file": path.name, "key": key} for key in archive}
        if "mask" in values and archive["mask"].dtype.kind == "U":  # "nan"
            values["mask"] = str(archive["mask"])
    table: dict[str, Any] = {"operators": {}, "truth": {}}
    given = [key for key in values if key.startswith("noise")]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(map(repr, given))}: give one of them")
    for key, array in values.items():
        what, _, name = key.partition("/")
        if what == "operator":
            table["operators"][name] = {"dense": array}
        elif what == "truth":
            table["truth"][name] = array
        elif what == "noise":
            table["noise"] = {name or "isotropic": array}
        else:
            table[what] = array
    return table


# What the view of the problem lends.


def _complete(view: View, table: Mapping[str, Any], donor: View) -> View:
    """`view` with what `table` leaves out taken from `donor`."""
    lent = {name: op for name, op in donor.operators.items() if name not in view.operators}
    for name, op in lent.items():
        _check_shared(op, f"operator for source {name!r}", donor, f"'operator/{name}' in an .npz")
    noise = _donor_noise(donor) if table.get("noise") is None else view.noise
    mask = view.mask
    if lent and table.get("mask") is None:
        _, mask = plain_observations(view.observations, _donor_mask(donor), view.label, mask)
    return replace(view, operators={**lent, **view.operators}, noise=noise, mask=mask)


def _donor_mask(donor: View) -> Any:
    mask = donor.mask
    if mask is not None and not isinstance(mask, str) and np.shape(mask) != donor.shape:
        raise DataError(
            _varies("mask", donor, "1 where an entry was observed, 0 where it is missing")
        )
    return mask


def _donor_noise(donor: View) -> Noise | float:
    if isinstance(donor.noise, (int, float)):
        return donor.noise
    _check_shared(donor.noise_model, "noise", donor, "'noise' in an .npz")
    return donor.noise_model


def _check_shared(tree: Any, what: str, donor: View, hint: str) -> None:
    if row_counts(tree):
        raise DataError(_varies(what, donor, hint))


def _varies(what: str, donor: View, hint: str) -> str:
    return (
        f"no {what}, and that of {donor.label} differs from observation to observation, so it "
        f"cannot be taken over: give one ({hint})"
    )
