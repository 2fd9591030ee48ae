"""Operators and noise models, by the name of their kind: `{kind: arguments}`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dichroic import operators
from dichroic.config import check_keys
from dichroic.errors import ConfigError, ShapeError
from dichroic.io.location import Location, known_table, naming, require
from dichroic.io.references import is_reference
from dichroic.io.values import as_number, is_integer, parse_count, parse_shape, short
from dichroic.numerics.arrays import as_booleans, unmasked
from dichroic.numerics.batching import as_float_or_nan
from dichroic.operators import Operator, Shape
from dichroic.operators.base import broadcasts
from dichroic.operators.convolve import check_stated, kernel_axes
from dichroic.operators.noise import (
    DenseNoise,
    DiagonalNoise,
    IsotropicNoise,
    LowRankNoise,
    Noise,
    StationaryNoise,
)

ops: Any = operators  # type checkers do not see the constructors that equinox derives


def build_operator(
    spec: Any, in_shape: Shape, out_shape: Shape | None, location: Location
) -> Operator:
    """The operator of `spec` on arrays of `in_shape`; it must give `out_shape`, where known."""
    kind, args = _kind(spec, _OPERATORS, location)
    with naming(location.at(kind)):
        return _OPERATORS[kind](args, in_shape, out_shape, location.at(kind))


def build_noise(spec: Any, shape: Shape, location: Location) -> Noise | float:
    """The noise model of `spec` of observations of `shape`; a standard deviation, where `spec` is a number.

    A reference to an array in a file stands for the number that the array is.
    """
    number = as_number(spec)
    if number is not None and not math.isfinite(number):
        raise ConfigError(f"{location}: the standard deviation must be finite, got {short(spec)}")
    if number is not None:
        return number
    if isinstance(spec, (np.ndarray, np.generic, jax.Array)):
        return _isotropic(spec, shape, location)
    if _refers(spec, location):
        return _one_std(spec, location)
    if isinstance(spec, str) and spec not in NOISES:
        raise ConfigError(
            f"{location}: expected the standard deviation, a number, or one {{kind: …}} of "
            f"{', '.join(NOISES)}, got {spec!r}"
        )
    kind, args = _kind(spec, NOISES, location)
    with naming(location.at(kind)):
        return NOISES[kind](args, shape, location.at(kind))


def _refers(spec: Any, location: Location) -> bool:
    """Whether `spec` is a reference to an array in a file, rather than the name of a kind."""
    if isinstance(spec, str):
        return spec not in NOISES and is_reference(spec, location.folder)
    return isinstance(spec, Mapping) and "file" in spec


def _one_std(reference: Any, location: Location) -> Noise:
    """Isotropic noise, whose standard deviation is an array of no axes in a file."""
    array = location.array(reference)
    if array.ndim:
        raise ShapeError(
            f"{location}: {short(reference)} has shape {array.shape}, not one number, the standard deviation. "
            "Say what several numbers are: {isotropic: …} standard deviations, one per observation, or "
            "{diagonal: …} variances of the entries"
        )
    return IsotropicNoise(as_float_or_nan(array))


def _kind(spec: Any, kinds: Mapping[str, Any], location: Location) -> tuple[str, Any]:
    """`(kind, arguments)` of `kind` or `{kind: arguments}`."""
    if isinstance(spec, str):
        spec = {spec: None}
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ConfigError(
            f"{location}: expected one {{kind: …}} of {', '.join(kinds)}, got {short(spec)}"
        )
    check_keys(spec, kinds, str(location))
    ((kind, args),) = spec.items()
    if args is None and kind not in ("identity", "zero"):
        raise ConfigError(f"{location}: {kind} needs a value: {{{kind}: …}}")
    return kind, args


def _arguments(args: Any, main: str, others: Sequence[str], location: Location) -> dict[str, Any]:
    """The arguments by name; a bare value, or a `{file, key}` reference, is that of `main`."""
    if not isinstance(args, Mapping) or "file" in args:
        return {main: args}
    check_keys(args, (main, *others), str(location))
    require(args, (main,), location)
    return dict(args)


def axes(*counts: int) -> Callable[[Shape], bool]:
    """Whether a shape has one of these numbers of axes, which a parameter has that all observations share."""
    return lambda shape: len(shape) in counts


# Operators: `(arguments, input shape, output shape where known, position) → operator`.


def _identity(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    if args is not None:
        raise ConfigError(f"identity takes no arguments, got {short(args)}")
    return ops.Identity(in_shape)


def _zero(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    table = known_table(args, ("out_shape",), location)
    shape = parse_shape(table["out_shape"]) if table else out_shape
    if shape is None:
        raise ConfigError("give the shape that it maps to: {zero: {out_shape: […]}}")
    return ops.Zero(in_shape, shape)


def _scale(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    return ops.Scale(in_shape, location.array(args, axes(0)))


def _diagonal(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    return ops.Diagonal(location.array(args, axes(len(in_shape))), shape=in_shape)


def _mask(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    array = unmasked(location.array(args, axes(len(in_shape))), "a mask")
    as_booleans(
        array, "a mask", "1 for what is seen and 0 for what is not", "weights are a diagonal"
    )
    return ops.Diagonal(array, shape=in_shape)


def _dense(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    values = _arguments(args, "matrix", ("out_shape",), location)
    matrix = location.array(values["matrix"], axes(2))
    if "out_shape" in values:
        out_shape = parse_shape(values["out_shape"])
    elif out_shape is not None and matrix.shape[-2:-1] != (math.prod(out_shape),):
        out_shape = None  # not what the view needs, which its own check says best
    return ops.Dense(matrix, in_shape=in_shape, out_shape=out_shape)


def _block_average(
    args: Any, in_shape: Shape, out_shape: Shape | None, location: Location
) -> Operator:
    return _blocks(ops.BlockAverage, args, in_shape, location)


def _block_project(
    args: Any, in_shape: Shape, out_shape: Shape | None, location: Location
) -> Operator:
    return _blocks(ops.BlockProject, args, in_shape, location)


def _blocks(
    kind: Callable[..., Operator], args: Any, in_shape: Shape, location: Location
) -> Operator:
    values = _arguments(args, "factor", ("axes",), location)
    axes = values.get("axes")
    if axes is not None:
        axes = tuple(axes) if isinstance(axes, (list, tuple)) else (axes,)
        if not all(map(is_integer, axes)):
            raise ConfigError(f"axes: expected a list of integers, got {short(values['axes'])}")
    return kind(in_shape, parse_count(values["factor"], "factor"), axes=axes)


def _convolve(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    values = _arguments(args, "kernel", ("ndim", "channels", "centre"), location)
    ndim, channels = values.get("ndim"), values.get("channels")
    ndim = None if ndim is None else parse_count(ndim, "ndim")
    centre = values.get("centre")
    if centre is not None and not all(map(is_integer, np.atleast_1d(centre).tolist())):
        raise ConfigError(f"centre: expected an integer or a list of them, got {short(centre)}")

    def shared(found: Shape) -> bool:
        check_stated(found, in_shape, ndim, channels)
        return len(found) == kernel_axes(found, in_shape, ndim, channels).one

    kernel = location.array(values["kernel"], shared)
    if location.rows is not None:  # as stated of all rows, whatever the sizes of these
        read = kernel_axes(kernel.shape, in_shape, ndim, channels)
        ndim, channels = read.convolved, read.channels if read.convolved < len(in_shape) else None
    return ops.Convolve(kernel, shape=in_shape, ndim=ndim, channels=channels, centre=centre)


def _patch_placement(
    args: Any, in_shape: Shape, out_shape: Shape | None, location: Location
) -> Operator:
    values = _arguments(args, "offset", ("out_shape",), location)
    if "out_shape" in values:
        out_shape = parse_shape(values["out_shape"])
    if out_shape is None:
        raise ConfigError(
            "give the shape of the scene: {patch_placement: {offset: …, out_shape: […]}}"
        )
    return ops.PatchPlacement(in_shape, out_shape, location.array(values["offset"], axes(1)))


def _compose(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    chain: list[Operator] = []
    for i, spec in reversed(list(enumerate(_several(args, location)))):
        chain.insert(0, build_operator(spec, in_shape, None if i else out_shape, location.at(i)))
        in_shape = chain[0].out_shape
    return ops.Compose(tuple(chain))


def _sum(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    specs = enumerate(_several(args, location))
    return ops.Sum(tuple(build_operator(s, in_shape, out_shape, location.at(i)) for i, s in specs))


def _stack(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    specs = enumerate(_several(args, location))
    return ops.Stack(tuple(build_operator(s, in_shape, None, location.at(i)) for i, s in specs))


def _several(args: Any, location: Location) -> list[Any]:
    if not isinstance(args, (list, tuple)) or not args:
        raise ConfigError(f"expected a list of operators, got {short(args)}")
    return list(args)


def _learnable(args: Any, in_shape: Shape, out_shape: Shape | None, location: Location) -> Operator:
    table = known_table(args, ("name", "operator"), location)
    require(table, ("name", "operator"), location)
    inner = build_operator(table["operator"], in_shape, out_shape, location.at("operator"))
    return ops.Learnable(inner, str(table["name"]))


_OPERATORS: dict[str, Callable[[Any, Shape, Shape | None, Location], Operator]] = {
    "identity": _identity,
    "zero": _zero,
    "scale": _scale,
    "diagonal": _diagonal,
    "mask": _mask,
    "dense": _dense,
    "block_average": _block_average,
    "block_project": _block_project,
    "convolve": _convolve,
    "patch_placement": _patch_placement,
    "compose": _compose,
    "sum": _sum,
    "stack": _stack,
    "learnable": _learnable,
}


# Noise models: `(arguments, shape of an observation, position) → noise`.


def _isotropic(args: Any, shape: Shape, location: Location) -> Noise:
    def shared(found: Shape) -> bool:
        count = None if location.rows is None else location.rows.count
        if count is not None and len(shape) > 1 and found == (shape[0],) != (count,):
            raise ShapeError(
                f"an array of shape {found}, one standard deviation per observation, but there are {count}; "
                "for one per channel, {diagonal: {std: …, per: channel}}"
            )
        return not found

    return IsotropicNoise(_axes(args, (0, 1), "a number or (n,)", shared, location))


def _diagonal_noise(args: Any, shape: Shape, location: Location) -> Noise:
    table = dict(args) if isinstance(args, Mapping) and "file" not in args else {"variance": args}
    check_keys(table, ("variance", "std", "per"), str(location))
    given = [k for k in ("variance", "std") if table.get(k) is not None]
    per = table.get("per", "entry")
    if len(given) != 1 or per not in _PER:
        raise ConfigError(
            f"expected {{variance: …, per: …}}, or std in place of variance, per one of {', '.join(_PER)}; "
            f"got {short(args)}"
        )
    shared, shaped = _PER[per]
    array = as_float_or_nan(location.array(table[given[0]], lambda found: shared(found, shape)))
    array = shaped(array, shape)
    return DiagonalNoise(array**2 if given[0] == "std" else array)


def _per_entry(array: jax.Array, shape: Shape) -> jax.Array:
    if array.ndim == 0:
        raise ShapeError("expected one variance per entry; a number alone is a standard deviation")
    return array


def _per_channel(array: jax.Array, shape: Shape) -> jax.Array:
    if len(shape) < 2 or array.ndim not in (1, 2) or array.shape[-1] != shape[0]:
        raise ShapeError(
            f"an array of shape {array.shape}, but one per channel of observations of shape {shape} has "
            + (
                f"({shape[0]},) or (n, {shape[0]})"
                if len(shape) > 1
                else "no meaning: it has one axis"
            )
        )
    return array.reshape(*array.shape, *(1 for _ in shape[1:]))


def _per_observation(array: jax.Array, shape: Shape) -> jax.Array:
    if array.ndim != 1:
        raise ShapeError(f"an array of shape {array.shape}; one per observation has (n,)")
    return array.reshape(-1, *(1 for _ in shape))


_PER = {  # whether all observations share an array of some shape; the array against an observation's shape
    "entry": (
        lambda found, shape: (
            found == (math.prod(shape),) or (len(found) == len(shape) and broadcasts(found, shape))
        ),
        _per_entry,
    ),
    "channel": (lambda found, shape: len(found) == 1, _per_channel),
    "observation": (lambda found, shape: False, _per_observation),
}


def _low_rank(args: Any, shape: Shape, location: Location) -> Noise:
    table = known_table(args, ("factor", "variance"), location)
    require(table, ("factor", "variance"), location)
    entries = _entries(shape)
    rows = lambda found: entries(found[:-1])
    factor = _axes(table["factor"], (2, 3), "(M, R) or (n, M, R)", rows, location.at("factor"))
    variance = _axes(table["variance"], (1, 2), "(M,) or (n, M)", entries, location.at("variance"))
    return LowRankNoise(factor, variance)


def _dense_noise(args: Any, shape: Shape, location: Location) -> Noise:
    size = math.prod(shape)
    shared = lambda found: found in ((size, size), (*shape, *shape))
    return DenseNoise(_axes(args, (2, 3), "(M, M) or (n, M, M)", shared, location))


def _axes(
    reference: Any,
    ndims: tuple[int, ...],
    expected: str,
    shared: Callable[[Shape], bool],
    location: Location,
) -> jax.Array:
    """The array of `reference`, which must have one of the numbers of axes `ndims`."""
    array = as_float_or_nan(location.array(reference, shared))
    if array.ndim not in ndims:
        raise ShapeError(f"{location}: expected {expected}, got an array of shape {array.shape}")
    return array


def _entries(shape: Shape) -> Callable[[Shape], bool]:
    """Whether an array has one number for every entry of an observation of `shape`, flattened or not."""
    return lambda found: found in (shape, (math.prod(shape),))


def _stationary(args: Any, shape: Shape, location: Location) -> Noise:
    values = _arguments(args, "covariance", ("ndim",), location)
    ndim = values.get("ndim")
    ndim = None if ndim is None else parse_count(ndim, "ndim")
    covariance = location.array(values["covariance"], *([] if ndim is None else [axes(ndim)]))
    return StationaryNoise(covariance, ndim=ndim)


NOISES: dict[str, Callable[[Any, Shape, Location], Noise]] = {
    "isotropic": _isotropic,
    "diagonal": _diagonal_noise,
    "low_rank": _low_rank,
    "dense": _dense_noise,
    "stationary": _stationary,
}
