"""State a problem in a YAML file: sources, views of their mixtures, and the settings of a fit.

    y_i = Σ_β A_i^{αβ} x_i^β + η_i          (view α, observation i, source β)

    sources:
      background: [5]                           # x^β: the shape of one draw
      signal: {shape: [8, 8]}
    views:
      mixed:
        observations: {file: data.npz, key: y}  # y_i, stacked along the first axis
        operators:                              # A^{αβ}: one per source that the view sees
          background: {dense: data.npz:A}
          signal: {compose: [{block_average: {factor: 2}}, {convolve: psf.npy}]}
        noise: {diagonal: data.h5:/variance}    # Σ; a number is the std of isotropic noise
        mask: data.zarr:mask                    # or "nan"
        group: pair                             # views of one group are of the same draws
        truth: {signal: data.npz:x}
        held_out: data.npz:test                 # 1 for observations that are kept from training
    fit: {seed: 1, mixture: {components: 16}}

An array is `file.npz:key`, `file.npy`, `file.h5:/dataset`, `file.zarr:path` (relative to the folder
of the YAML file), a number or a list. The input shape of an operator follows from its source; in
`compose` the last acts first, and its output shape feeds the one before. Every error starts with
the file and the position in it, as in `problem.yaml: views.mixed: unknown key 'nose'; …`.
"""

import difflib
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from dichroic import operators
from dichroic.batching import as_float, row_counts
from dichroic.config import check_keys
from dichroic.errors import ConfigError, DataError, DichroicError, ShapeError
from dichroic.noise import (
    DenseNoise,
    DiagonalNoise,
    Isotropic,
    LowRankNoise,
    Masked,
    Noise,
)
from dichroic.operators import Operator, Shape
from dichroic.operators.base import as_shape
from dichroic.problem import Problem, Source, View, check_view, missing_fraction, sees

ops: Any = operators  # type checkers do not see the constructors that equinox derives

_REFERENCE = re.compile(r"(?P<file>.+?\.(?P<kind>npz|npy|hdf5|h5|zarr))(?::(?P<key>.+))?")
_VIEW_KEYS = ("observations", "operators", "noise", "mask", "group", "truth", "held_out")


def load_problem(path: str | Path) -> tuple[Problem, dict[str, Any]]:
    """Read a problem from a YAML file.

    Args:
        path: the file; array references in it are relative to its folder.

    Returns:
        The problem, checked, and the `fit:` section as it stands (`FitConfig.from_dict` checks it).

    Raises:
        DichroicError: if anything is wrong; the message starts with the file and the position.
    """
    table, spot = _read_yaml(Path(path))
    check_keys(table, ("sources", "views", "fit"), str(spot))
    _require(table, ("sources", "views"), spot)
    sources = _sources(table["sources"], spot.at("sources"))
    shapes = {s.name: s.shape for s in sources}
    with _at(spot.at("views")):
        specs = _table(table["views"], spot.at("views"))
    views = [_problem_view(k, v, shapes, spot.at("views").at(k)) for k, v in specs.items()]
    with _at(spot):
        problem = Problem(sources, views, str(Path(path).resolve()))
    return problem, _table(table.get("fit") or {}, spot.at("fit"))


def load_view(
    path_or_spec: str | Path | Mapping[str, Any], problem: Problem, *, like: str | None = None
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

    Raises:
        DichroicError: if the view is malformed, does not fit the sources, or lacks something that
            differs from observation to observation in the view `like`.
    """
    table, spot, name = _view_table(path_or_spec, problem)
    donor = problem.view(like) if like else max(problem.views, key=lambda v: _seen(v, problem))
    check_keys(table, _VIEW_KEYS, str(spot))
    _require(table, ("observations",), spot)
    view = _build_view(name, table, problem.shapes, spot)
    with _at(spot):
        view = _complete(view, table, donor)
        check_view(view, problem.shapes)
    return view


def load_array(reference: Any, base_dir: str | Path) -> np.ndarray:
    """The array that `reference` stands for.

    Args:
        reference: `file.npz:key`, `file.npy`, `file.h5:/dataset`, `file.zarr:path`, the same as
            `{file: …, key: …}`, a number, a (nested) list of numbers, or an array.
        base_dir: the folder that files are relative to.

    Raises:
        DataError: if there is no such file or entry (the message lists what there is), or if it
            holds something other than real numbers.
        ConfigError: if `reference` is none of these forms.
    """
    if isinstance(reference, (np.ndarray, np.generic, jax.Array)):
        return _numeric(np.asarray(reference), "the array")
    if isinstance(reference, Mapping):
        reference = _joined(reference)
    number = _number(reference)
    if number is not None or isinstance(reference, (list, tuple)):
        return _inline(reference if number is None else number)
    match = _REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    if match is None:
        raise ConfigError(
            f"expected an array such as 'file.npz:key', 'file.npy', 'file.h5:/dataset', "
            f"'file.zarr:path', a number or a list, got {_short(reference)}"
        )
    return _read(Path(base_dir) / match["file"], match["kind"], match["key"])


def summary_rows(problem: Problem) -> tuple[list[list[Any]], list[list[Any]]]:
    """What `problem` states: the rows of two tables, of sources and of views, headers first.

    Cells are text and integers. The observations of a source count draws of it: co-observed views
    are of the same ones. `(i)` marks operators and noise that differ from observation to
    observation.
    """
    sources: list[list[Any]] = [["source", "shape", "learned from", "observations"]]
    sources += [_source_row(source, problem) for source in problem.sources]
    views: list[list[Any]] = [["view", "observations", "shape", "sources", "noise"]]
    views[0] += ["missing", "group", "truth"]
    return sources, views + [_view_row(view) for view in problem.views]


# Positions in a file, and the errors that name them.


@dataclass(frozen=True)
class _Spot:
    """A position in a file: the file's name, its folder, and the keys that lead there."""

    file: str
    folder: Path
    path: str = ""

    def at(self, key: str | int) -> "_Spot":
        if isinstance(key, int):
            return replace(self, path=f"{self.path}[{key}]")
        return replace(self, path=f"{self.path}.{key}" if self.path else key)

    def array(self, reference: Any) -> np.ndarray:
        with _at(self):
            return load_array(reference, self.folder)

    def __str__(self):
        return f"{self.file}: {self.path}" if self.path else self.file


@contextmanager
def _at(spot: _Spot) -> Iterator[None]:
    """Let errors raised inside start with `spot`, unless they name a position already."""
    try:
        yield
    except DichroicError as error:
        if str(error).startswith(f"{spot.file}: "):
            raise
        raise type(error)(f"{spot}: {error}") from error
    except (ValueError, TypeError, IndexError, OverflowError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{spot}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that rejects a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} appears twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


def _read_yaml(path: Path) -> tuple[dict[str, Any], _Spot]:
    spot = _Spot(path.name, path.parent)
    if not path.is_file():
        raise ConfigError(f"{spot}: {_no_file(path)}")
    try:
        values = yaml.load(path.read_bytes(), Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{spot}: {line}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{spot}: {error}") from error
    return _table(values, spot), spot


def _table(value: Any, spot: _Spot) -> dict[str, Any]:
    """`value` as a dictionary with text keys."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{spot}: expected a table (key: value), got {_short(value)}")
    for key in value:
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise ConfigError(
                f"{spot}: {key!r} is no name; put names such as 'on' or '1.5' in quotes"
            )
    return {str(k): v for k, v in value.items()}


def _require(table: Mapping[str, Any], keys: Iterable[str], spot: _Spot) -> None:
    for key in keys:
        if table.get(key) is None:
            raise ConfigError(f"{spot}: {key!r} is missing")


def _number(value: Any) -> float | None:
    """`value` as a number, or None; YAML reads `1e-3` as text."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return None
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}…"


def _available(name: str, names: Sequence[str]) -> str:
    """The end of a message that `name` does not exist: the nearest of `names`, and all of them."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return (f"did you mean {near[0]!r}? " if near else "") + f"there is: {listed or 'nothing'}"


# Sources and views.


def _sources(value: Any, spot: _Spot) -> list[Source]:
    sources = []
    for name, spec in _table(value, spot).items():
        here = spot.at(name)
        if isinstance(spec, Mapping):
            check_keys(spec, ("shape",), str(here))
            _require(spec, ("shape",), here)
            spec = spec["shape"]
        with _at(here):
            sources.append(Source(name, _shape(spec)))
    return sources


def _shape(value: Any) -> Shape:
    dims = value if isinstance(value, (list, tuple)) else [value]
    if not dims or not all(isinstance(d, int) and not isinstance(d, bool) for d in dims):
        raise ConfigError(f"expected a shape such as [8, 8], got {_short(value)}")
    return as_shape(tuple(dims))


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{what}: expected a positive integer, got {_short(value)}")
    return value


def _problem_view(name: str, value: Any, shapes: Mapping[str, Shape], spot: _Spot) -> View:
    table = _table(value, spot)
    check_keys(table, _VIEW_KEYS, str(spot))
    _require(table, ("observations", "operators", "noise"), spot)
    view = _build_view(name, table, shapes, spot)
    with _at(spot):
        check_view(view, shapes)
    return view


def _build_view(
    name: str, table: Mapping[str, Any], shapes: Mapping[str, Shape], spot: _Spot
) -> View:
    """The view that `table` states; without `noise` it is NaN, for `_complete` to replace."""
    y = spot.at("observations").array(table["observations"])
    here = spot.at("operators")
    specs = _known(table.get("operators"), shapes, here)
    operators = {k: _operator(v, shapes[k], y.shape[1:], here.at(k)) for k, v in specs.items()}
    noise = math.nan if table.get("noise") is None else _noise(table["noise"], spot.at("noise"))
    truth = _known(table.get("truth"), shapes, spot.at("truth"))
    group, held_out = table.get("group"), table.get("held_out")
    return View(
        y,
        operators,
        noise,
        name,
        _mask(table.get("mask"), spot.at("mask")),
        None if group is None else str(group),
        {k: spot.at("truth").at(k).array(v) for k, v in truth.items()},
        None if held_out is None else spot.at("held_out").array(held_out) > 0,
    )


def _known(value: Any, names: Iterable[str], spot: _Spot) -> dict[str, Any]:
    table = {} if value is None else _table(value, spot)
    check_keys(table, names, str(spot))
    return table


def _mask(spec: Any, spot: _Spot) -> Any:
    if spec is None:
        return None
    missing = not isinstance(spec, (list, tuple)) and np.ndim(spec) == 0 and str(spec) == "nan"
    return "nan" if missing else spot.array(spec)


# Operators and noise models, by the name of their kind.


def _kind(spec: Any, kinds: Mapping[str, Any], spot: _Spot) -> tuple[str, Any]:
    """`(kind, arguments)` of `kind` or `{kind: arguments}`."""
    if isinstance(spec, str):
        spec = {spec: None}
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ConfigError(
            f"{spot}: expected one {{kind: …}} of {', '.join(kinds)}, got {_short(spec)}"
        )
    check_keys(spec, kinds, str(spot))
    ((kind, args),) = spec.items()
    if args is None and kind not in ("identity", "zero"):
        raise ConfigError(f"{spot}: {kind} needs a value: {{{kind}: …}}")
    return kind, args


def _arguments(args: Any, main: str, others: Sequence[str], spot: _Spot) -> dict[str, Any]:
    """The arguments by name; a bare value, or a `{file, key}` reference, is that of `main`."""
    if not isinstance(args, Mapping) or "file" in args:
        return {main: args}
    check_keys(args, (main, *others), str(spot))
    _require(args, (main,), spot)
    return dict(args)


def _operator(spec: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    """The operator of `spec` on arrays of `in_shape`; it must give `out_shape`, where known."""
    kind, args = _kind(spec, _OPERATORS, spot)
    with _at(spot.at(kind)):
        return _OPERATORS[kind](args, in_shape, out_shape, spot.at(kind))


def _identity(args: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    if args:
        raise ConfigError(f"identity takes no arguments, got {_short(args)}")
    return ops.Identity(in_shape)


def _zero(args: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    table = _known(args, ("out_shape",), spot)
    shape = _shape(table["out_shape"]) if table else out_shape
    if shape is None:
        raise ConfigError("give the shape that it maps to: {zero: {out_shape: […]}}")
    return ops.Zero(in_shape, shape)


def _scale(args: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    return ops.Scale(in_shape, spot.array(args))


def _diagonal(args: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    return ops.Diagonal(spot.array(args), shape=in_shape)


def _dense(args: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    values = _arguments(args, "matrix", ("out_shape",), spot)
    matrix = spot.array(values["matrix"])
    if "out_shape" in values:
        out_shape = _shape(values["out_shape"])
    elif out_shape is not None and matrix.shape[-2:-1] != (math.prod(out_shape),):
        out_shape = None  # not what the view needs, which its own check says best
    return ops.Dense(matrix, in_shape=in_shape, out_shape=out_shape)


def _block_average(args: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    values = _arguments(args, "factor", ("axes",), spot)
    axes = values.get("axes")
    if axes is not None:
        axes = tuple(axes) if isinstance(axes, (list, tuple)) else (axes,)
        if not all(isinstance(a, int) for a in axes):
            raise ConfigError(f"axes: expected a list of integers, got {_short(values['axes'])}")
    return ops.BlockAverage(in_shape, _count(values["factor"], "factor"), axes=axes)


def _convolve(args: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    values = _arguments(args, "kernel", ("ndim",), spot)
    ndim = values.get("ndim")
    kernel = spot.array(values["kernel"])
    return ops.Convolve(kernel, shape=in_shape, ndim=None if ndim is None else _count(ndim, "ndim"))


def _several(args: Any, spot: _Spot) -> list[Any]:
    if not isinstance(args, (list, tuple)) or not args:
        raise ConfigError(f"expected a list of operators, got {_short(args)}")
    return list(args)


def _compose(args: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    chain: list[Operator] = []
    for i, spec in reversed(list(enumerate(_several(args, spot)))):
        chain.insert(0, _operator(spec, in_shape, None if i else out_shape, spot.at(i)))
        in_shape = chain[0].out_shape
    return ops.Compose(tuple(chain))


def _sum(args: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    specs = enumerate(_several(args, spot))
    return ops.Sum(tuple(_operator(s, in_shape, out_shape, spot.at(i)) for i, s in specs))


def _stack(args: Any, in_shape: Shape, out_shape: Shape | None, spot: _Spot) -> Operator:
    specs = enumerate(_several(args, spot))
    return ops.Stack(tuple(_operator(s, in_shape, None, spot.at(i)) for i, s in specs))


_OPERATORS: dict[str, Callable[[Any, Shape, Shape | None, _Spot], Operator]] = {
    "identity": _identity,
    "zero": _zero,
    "scale": _scale,
    "diagonal": _diagonal,
    "mask": _diagonal,
    "dense": _dense,
    "block_average": _block_average,
    "convolve": _convolve,
    "compose": _compose,
    "sum": _sum,
    "stack": _stack,
}


def _noise(spec: Any, spot: _Spot) -> Noise | float:
    number = _number(spec)
    if number is not None:
        return number
    if isinstance(spec, (np.ndarray, np.generic, jax.Array)):
        return _isotropic(spec, spot)
    if isinstance(spec, str) and spec not in _NOISES:
        raise ConfigError(
            f"{spot}: expected the standard deviation, a number, or one {{kind: …}} of "
            f"{', '.join(_NOISES)}, got {spec!r}"
        )
    kind, args = _kind(spec, _NOISES, spot)
    with _at(spot.at(kind)):
        return _NOISES[kind](args, spot.at(kind))


def _isotropic(args: Any, spot: _Spot) -> Noise:
    return Isotropic(_axes(args, (0, 1), "a number or (n,)", spot))


def _diagonal_noise(args: Any, spot: _Spot) -> Noise:
    array = as_float(spot.array(args))
    if array.ndim == 0:
        raise ShapeError("expected one variance per entry; a number alone is a standard deviation")
    return DiagonalNoise(array)


def _low_rank(args: Any, spot: _Spot) -> Noise:
    table = _known(args, ("factor", "variance"), spot)
    _require(table, ("factor", "variance"), spot)
    factor = _axes(table["factor"], (2, 3), "(M, R) or (n, M, R)", spot.at("factor"))
    variance = _axes(table["variance"], (1, 2), "(M,) or (n, M)", spot.at("variance"))
    return LowRankNoise(factor, variance)


def _dense_noise(args: Any, spot: _Spot) -> Noise:
    return DenseNoise(_axes(args, (2, 3), "(M, M) or (n, M, M)", spot))


def _axes(reference: Any, ndims: tuple[int, ...], expected: str, spot: _Spot) -> jax.Array:
    """The array of `reference`, which must have one of the numbers of axes `ndims`."""
    array = as_float(spot.array(reference))
    if array.ndim not in ndims:
        raise ShapeError(f"{spot}: expected {expected}, got an array of shape {array.shape}")
    return array


_NOISES: dict[str, Callable[[Any, _Spot], Noise]] = {
    "isotropic": _isotropic,
    "diagonal": _diagonal_noise,
    "low_rank": _low_rank,
    "dense": _dense_noise,
}


# New views, completed from a view of the problem.


def _view_table(source: Any, problem: Problem) -> tuple[dict[str, Any], _Spot, str]:
    """`(table, position, name)` of a view stated in a file or a mapping."""
    if isinstance(source, Mapping):
        spot = _Spot("view", Path())
        return _table(source, spot), spot, "view"
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return *_read_yaml(path), path.stem
    if path.suffix != ".npz":
        raise ConfigError(f"{path.name}: expected a view in an .npz or a .yaml file")
    spot = _Spot(path.name, path.parent)
    if not path.is_file():
        raise DataError(f"{spot}: {_no_file(path)}")
    with _at(spot):
        return _npz_table(path, problem.names, spot), spot, path.stem


def _npz_table(path: Path, names: Sequence[str], spot: _Spot) -> dict[str, Any]:
    """The view in an `.npz` file, in the form of a YAML file's."""
    noises = [f"noise/{kind}" for kind in _NOISES if kind != "low_rank"]
    per_source = [f"{what}/{name}" for what in ("operator", "truth") for name in names]
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        check_keys(archive, ("observations", "mask", "noise", *noises, *per_source), str(spot))
        values = {key: archive[key] for key in archive}
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


def _seen(view: View, problem: Problem) -> int:
    return sum(sees(view, name) for name in problem.names)


def _complete(view: View, table: Mapping[str, Any], donor: View) -> View:
    """`view` with what `table` leaves out taken from `donor`."""
    lent = {name: op for name, op in donor.operators.items() if name not in view.operators}
    for name, op in lent.items():
        _check_shared(op, f"operator for source {name!r}", donor, f"'operator/{name}' in an .npz")
    noise = _donor_noise(donor) if table.get("noise") is None else view.noise
    mask = _donor_mask(donor) if view.mask is None and lent else view.mask
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
    noise = donor.prepare().noise
    noise = noise.noise if isinstance(noise, Masked) else noise
    _check_shared(noise, "noise", donor, "'noise' in an .npz")
    return noise


def _check_shared(tree: Any, what: str, donor: View, hint: str) -> None:
    if row_counts(tree):
        raise DataError(_varies(what, donor, hint))


def _varies(what: str, donor: View, hint: str) -> str:
    return (
        f"no {what}, and that of {donor.label} differs from observation to observation, so it "
        f"cannot be taken over: give one ({hint})"
    )


# Arrays in files.


def _numeric(array: np.ndarray, what: str) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} holds {array.dtype}, not real numbers")
    return array


def _joined(reference: Mapping[str, Any]) -> str:
    """`{file: …, key: …}` as `file:key`."""
    check_keys(reference, ("file", "key"), "array")
    file, key = reference.get("file"), reference.get("key")
    if not isinstance(file, str):
        raise ConfigError(f"expected {{file: …, key: …}}, got {_short(dict(reference))}")
    return file if key is None else f"{file}:{key}"


def _inline(value: Any) -> np.ndarray:
    try:
        return np.asarray(value, dtype=float)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{_short(value)} is no array of numbers: {error}") from error


def _no_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"no folder {str(folder)!r}"
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return f"no file {path.name!r} in {str(folder)!r}; {_available(path.name, names)}"


def _read(path: Path, kind: str, key: str | None) -> np.ndarray:
    if not path.exists():
        raise DataError(_no_file(path))
    try:
        return _numeric(_READERS[kind](path, key), f"{path.name}:{key}" if key else path.name)
    except DichroicError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path.name!r}: {error}") from error


def _entry(path: Path, key: str | None, names: Sequence[str]) -> str:
    """`key`, if it is one of `names`, or the only name; otherwise an error that lists them."""
    names = sorted(names)
    if key is None and len(names) == 1:
        return names[0]
    if key is None:
        raise DataError(
            f"{path.name!r}: say which array, '{path.name}:key'; {_available('', names)}"
        )
    if key.strip("/") not in [name.strip("/") for name in names]:
        raise DataError(f"no {key!r} in {path.name!r}; {_available(key, names)}")
    return key


def _read_npz(path: Path, key: str | None) -> np.ndarray:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return archive[_entry(path, key, archive.files)]


def _read_npy(path: Path, key: str | None) -> np.ndarray:
    if key is not None:
        raise DataError(f"{path.name!r} holds one array; leave out ':{key}'")
    with path.open("rb") as file:
        return np.load(file, allow_pickle=False)


def _read_hdf5(path: Path, key: str | None) -> np.ndarray:
    try:
        import h5py
    except ImportError as error:
        raise DataError(_needs("h5py", path)) from error
    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda k, v: names.append(f"/{k}") if isinstance(v, h5py.Dataset) else None)
        dataset: Any = file[_entry(path, key, names)]
        return np.asarray(dataset[...])


def _read_zarr(path: Path, key: str | None) -> np.ndarray:
    try:
        import zarr
    except ImportError as error:
        raise DataError(_needs("zarr", path)) from error
    node: Any = zarr.open(path, mode="r")
    if isinstance(node, zarr.Group):
        members = node.members(max_depth=None)
        names = [name for name, child in members if isinstance(child, zarr.Array)]
        node = node[_entry(path, key, names).strip("/")]
    elif key is not None:
        raise DataError(f"{path.name!r} holds one array; leave out ':{key}'")
    return np.asarray(node[...])


def _needs(package: str, path: Path) -> str:
    return f"reading {path.name!r} needs {package}: pip install 'dichroic[data]'"


_READERS: dict[str, Callable[[Path, str | None], np.ndarray]] = {
    "npz": _read_npz,
    "npy": _read_npy,
    "h5": _read_hdf5,
    "hdf5": _read_hdf5,
    "zarr": _read_zarr,
}


# Tables that describe a problem.


def _source_row(source: Source, problem: Problem) -> list[Any]:
    joint = [views for views in problem.joint_views() if any(sees(v, source.name) for v in views)]
    count = sum(views[0].count for views in joint)
    return [source.name, _times(source.shape), ", ".join(problem.seen_by(source.name)), count]


def _view_row(view: View) -> list[Any]:
    seen = {k: op for k, op in view.operators.items() if sees(view, k)}
    return [
        view.name,
        view.count,
        _times(view.shape),
        ", ".join(f"{k}: {_kind_name(op)}{_marker(op)}" for k, op in seen.items()),
        _noise_kind(view),
        f"{100 * missing_fraction(view):.1f}%",
        view.group or "–",
        "yes" if view.truth else "no",
    ]


def _times(shape: Shape) -> str:
    return " × ".join(map(str, shape))


def _marker(tree: Any) -> str:
    return " (i)" if row_counts(tree) else ""


def _kind_name(op: Any) -> str:
    """The kind as a problem file spells it, with the parts of compositions, sums and stacks."""
    if isinstance(op, (ops.Compose, ops.Sum, ops.Stack)):
        parts = [_kind_name(part) for part in op.operators]
        sign = {ops.Compose: " ∘ ", ops.Sum: " + ", ops.Stack: ", "}[type(op)]
        return parts[0] if len(parts) == 1 else f"({sign.join(parts)})"
    if isinstance(op, ops.Function):
        return f"function {getattr(op.fn, '__name__', '')}".strip()
    return _snake(type(op).__name__)


def _noise_kind(view: View) -> str:
    if isinstance(view.noise, (int, float)):
        return "isotropic"
    noise = view.prepare().noise
    noise = noise.noise if isinstance(noise, Masked) else noise
    return _snake(type(noise).__name__.removesuffix("Noise")) + _marker(noise)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
