"""Whether operators are what they claim to be: linear, with their adjoint, and other than zero.

An operator is applied to random vectors of several sizes. What is not linear in one of them, such as a clip, a
threshold, a modulus or a constant, shows as

    A(0) ≠ 0,    A(s u) ≠ s A(u),    A(a u + b v) ≠ a A(u) + b A(v),    ⟨A u, h⟩ ≠ ⟨u, Aᵀ h⟩,

by more than rounding. Factors are powers of two, which floating point numbers are multiplied by without rounding,
so `A(s u) = s A(u)` is asked of every entry. Sums and inner products are held to `16 ε √size`. What is not so in
float32 is asked again in float64, where JAX can: the rounding of an ill-conditioned operator is no fault.

The operators of this package are linear by construction, and tested; what is probed is what users bring, wherever
it is in a composition, a sum or a stack.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dichroic import operators as known
from dichroic.errors import DataError
from dichroic.numerics.batching import in_batches, row_counts, split, take
from dichroic.numerics.precision import float64
from dichroic.operators import Operator, Shape
from dichroic.operators.base import traced
from dichroic.operators.learnable import is_known
from dichroic.operators.scaling import EntryScales

SAMPLE = 8  # observations whose own operators are probed, evenly spread
_FACTORS = (2.0, -1.0, 2.0**-30, 2.0**-10, 2.0**10, 2.0**30)
_A, _B = 2.0, -0.5
_SMALL = 2**20  # entries up to which vectors are probed together, and twice
_MATRIX = 2**20  # entries of a matrix that is compared with products
_OVERFLOW = 1e30  # of what is expected: beyond that, infinity is no fault
_BATCH = 2**24  # numbers at a time, of products with the operators of all observations
_PRIMITIVE = (
    *(
        known.Identity,
        known.Zero,
        known.Scale,
        known.Diagonal,
        known.Dense,
        known.Sparse,
        EntryScales,
    ),
    *(known.BlockAverage, known.BlockProject, known.Convolve, known.PatchPlacement),
)
_CONTAINERS = (known.Compose, known.Sum, known.Stack, known.Learnable)
_ANYWAY = "or turn the probe off (probe=False) if it is linear to the accuracy that you need"
_NOT_LINEAR = (
    "not linear; give its derivative at a typical source, and take what is constant off the observations, "
    f"{_ANYWAY}"
)


class Fault(NamedTuple):
    """What is not so, in words."""

    text: str


# What is probed.


def probe(op: Operator, label: str) -> None:
    """Raise a `DataError` unless all parts of `op` that users wrote are linear and have their adjoint.

    Of parts with parameters per observation, `SAMPLE` observations are probed. `label` is how messages call `op`.
    """
    for part in brought(op):
        counts = row_counts(part)
        for i in _sample(min(counts, default=1)):
            _probe(take(part, i), _named(part, label, i if counts else None))


def brought(op: Operator) -> list[Operator]:
    """The parts of `op` that are not of this package."""
    own = lambda n: isinstance(n, Operator) and type(n) not in _CONTAINERS
    leaves = jax.tree.leaves(op, is_leaf=own)
    return [n for n in leaves if isinstance(n, Operator) and type(n) not in _PRIMITIVE]


def _sample(count: int) -> list[int]:
    """The numbers of at most `SAMPLE` observations of `count`, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, count - 1, SAMPLE)})


def _named(part: Operator, label: str, observation: int | None) -> str:
    named = repr(part.label) if isinstance(part, known.FunctionOperator) else ""
    where = "" if observation is None else f", observation {observation}"
    return f"{label}{where}: {type(part).__name__} {named}".rstrip()


def _probe(op: Operator, label: str) -> None:
    transposed = _transpose_fault(op, label)
    fault = _fault(op, transposed is None)
    if fault and transposed is None:
        fault = _in_float64(op, fault)
    if fault:
        raise DataError(f"{label}: {fault.text}")
    if transposed:
        raise transposed


def _transpose_fault(op: Operator, label: str) -> DataError | None:
    """Why there is no product with the adjoint, if so."""
    try:
        back = traced(op.rmv, op.out_shape, f"{label}: rmv")
    except DataError as error:
        cause = error.__cause__ or error
        fault = DataError(
            f"{label}: JAX cannot derive its transpose ({type(cause).__name__}: {cause}): write it with "
            "operations that "
            "are linear in x, or as a class of Operator that has mv and rmv"
        )
        fault.__cause__ = cause
        return fault
    if back.shape != op.in_shape:
        return DataError(f"{label}: rmv gives arrays of shape {back.shape}, not {op.in_shape}")
    return None


def _in_float64(op: Operator, found: Fault) -> Fault | None:
    """The fault of `op` in float64; the one `found` in float32 if it cannot be had."""
    wide = lambda a: np.asarray(a, np.float64) if eqx.is_inexact_array(a) else a
    try:
        with float64():
            return _fault(jax.tree.map(wide, op), True)
    except Exception:  # of functions that insist on float32, in many ways
        return found


# What is not so.


def _fault(op: Operator, adjoint: bool) -> Fault | None:
    """The first thing that is not so of `op`, for one observation."""
    dtype = np.dtype(jnp.zeros(()).dtype)
    x = _vectors(op.in_shape, dtype)
    h = np.random.default_rng(1).normal(size=op.out_shape).astype(dtype)
    found = _products(op, jnp.asarray(x), jnp.asarray(h), adjoint)
    y, back = (None if a is None else np.asarray(a) for a in found)
    assert y is not None
    if y.dtype != dtype:
        raise TypeError(f"{y.dtype} of {dtype}")
    return next(_faults(op, x, y, h, back), None)


def _vectors(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """0, then of each seed `u`, `v`, `a u + b v`, and `u` times each factor."""
    rows = [np.zeros(shape)]
    for seed in range(2 if np.prod(shape) <= _SMALL else 1):
        rng = np.random.default_rng(seed)
        u, v = rng.normal(size=(2, *shape))
        if seed:  # of very different sizes in one vector
            u, v = (a * 10 ** rng.uniform(-3, 3, shape) for a in (u, v))
        u, v = u.astype(dtype), v.astype(dtype)
        rows += [u, v, _A * u + _B * v, *(s * u for s in _FACTORS)]
    return np.stack(rows).astype(dtype)


@eqx.filter_jit
def _products(op: Operator, x: Array, h: Array, adjoint: bool) -> tuple[Array, Array | None]:
    size = max(np.prod(op.in_shape), np.prod(op.out_shape))
    y = jax.vmap(op.mv)(x) if size <= _SMALL else jax.lax.map(op.mv, x)
    return y, op.rmv(h) if adjoint else None


def _faults(
    op: Operator, x: np.ndarray, y: np.ndarray, h: np.ndarray, back: np.ndarray | None
) -> Iterator[Fault]:
    size = max(x[0].size, y[0].size, 1)
    eps = float(np.finfo(y.dtype).eps)
    tolerance = 16 * eps * np.sqrt(size)
    yield from _constant(y[0])
    step = 3 + len(_FACTORS)
    for start in range(1, len(x), step):
        of_u, of_v, of_both, *scaled = y[start : start + step]
        yield from _infinite(of_u)
        yield from _inhomogeneous(of_u, scaled, max(1e-4, tolerance) if eps > 1e-10 else 1e-6)
        yield from _not_additive(of_u, of_v, of_both, tolerance)
    yield from _other_alone(op, x[1], y[1], tolerance)
    if back is not None:
        yield from _not_adjoint(x[1], y[1], h, back, tolerance)


def _constant(zero: np.ndarray) -> Iterator[Fault]:
    if not np.isfinite(zero).all():
        i = np.argwhere(~np.isfinite(zero))[0]
        yield Fault(f"A(0) is {zero[tuple(i)]}, at entry {_entry(i)}; it must be 0")
    if zero.any():
        i = np.unravel_index(np.argmax(np.abs(zero)), zero.shape)
        yield Fault(
            f"A(0) is not 0 (up to {zero[i]:.3g}, at entry {_entry(i)}): take the constant off the "
            "observations, and "
            "off the operator"
        )


def _infinite(of_u: np.ndarray) -> Iterator[Fault]:
    bad = ~np.isfinite(of_u)
    if bad.any():
        yield Fault(f"A(x) is {of_u[bad][0]} for numbers of about 1, at {bad.sum()} entries")


def _inhomogeneous(of_u: np.ndarray, scaled: list[np.ndarray], relative: float) -> Iterator[Fault]:
    one = np.abs(of_u.astype(np.float64))
    tiny = np.finfo(of_u.dtype).tiny * max(of_u.size, 64)
    for s, y in zip(_FACTORS, scaled, strict=True):
        usable = one * abs(s) < _OVERFLOW
        with np.errstate(invalid="ignore", over="ignore"):
            off = np.abs(y.astype(np.float64) / s - of_u)
            bad = usable & ~(off <= relative * one + tiny / min(abs(s), 1))
        if one.max(initial=0) * abs(s) >= _OVERFLOW and not np.isfinite(y).all():
            continue
        if bad.any():
            i = np.unravel_index(
                np.argmax(np.where(bad, np.nan_to_num(off, nan=np.inf), 0)), y.shape
            )
            factor = "-" if s == -1 else f"{s:.3g} "
            yield Fault(
                f"A({factor}x) differs from {factor}A(x){_by(off[i], one[i])}, at entry {_entry(i)}: {_NOT_LINEAR}"
            )


def _not_additive(
    of_u: np.ndarray, of_v: np.ndarray, of_both: np.ndarray, tolerance: float
) -> Iterator[Fault]:
    expected = _A * of_u.astype(np.float64) + _B * of_v
    terms = np.abs(_A * of_u.astype(np.float64)) + np.abs(_B * of_v)
    off = np.abs(of_both - expected)
    i = np.unravel_index(np.argmax(np.nan_to_num(off, nan=np.inf)), off.shape)
    if terms.max() < _OVERFLOW and not off[i] <= tolerance * terms.max():
        yield Fault(
            f"A(x + y) differs from A(x) + A(y){_by(off[i], terms[i])}, at entry {_entry(i)}: {_NOT_LINEAR}"
        )


def _not_adjoint(
    u: np.ndarray, of_u: np.ndarray, h: np.ndarray, back: np.ndarray, tolerance: float
) -> Iterator[Fault]:
    u, of_u, h, back = (a.ravel().astype(np.float64) for a in (u, of_u, h, back))
    there, here = of_u @ h, u @ back
    norms = [np.linalg.norm(a) for a in (of_u, h, u, back)]
    typical = max(norms[0] * norms[1] / np.sqrt(len(h)), norms[2] * norms[3] / np.sqrt(len(u)))
    if not abs(there - here) <= tolerance * typical:
        yield Fault(
            f"<A x, y> = {there:.6g}, but <x, Aᵀ y> = {here:.6g}: rmv is not the adjoint of mv; see to "
            f"both, {_ANYWAY}"
        )


def _other_alone(
    op: Operator, u: np.ndarray, of_u: np.ndarray, tolerance: float
) -> Iterator[Fault]:
    """Products of one vector outside of compiled programs, and by the matrix, that are others."""
    most = tolerance * np.abs(of_u).max(initial=0)
    if not np.all(np.abs(np.asarray(op.mv(jnp.asarray(u))) - of_u) <= most):
        yield Fault("A(x) differs from one call to another, or between jit, vmap and neither")
    own = type(op).as_matrix is not Operator.as_matrix
    if own and u.size * of_u.size <= _MATRIX:
        by_matrix = np.asarray(op.as_matrix(), np.float64) @ u.ravel()
        if not np.all(np.abs(by_matrix - of_u.ravel()) <= most):
            yield Fault("as_matrix() @ x differs from mv(x)")


def _entry(index: Any) -> tuple[int, ...]:
    return tuple(int(i) for i in index)


def _by(off: float, size: float) -> str:
    return f" by {100 * off / size:.3g}%" if size > 0 and np.isfinite(off) else ""


# What is zero.


def is_zero(op: Operator) -> bool:
    """Whether `op` is zero for all observations; where it is not for a few of them, the others are left alone."""
    counts = row_counts(op)
    some = take(op, np.asarray(_sample(min(counts)))) if counts else op
    return bool(zero_rows(some).all() and (not counts or zero_rows(op).all()))


def zero_rows(op: Operator) -> np.ndarray:
    """For each observation, whether `op` is zero for it: `(n,)`, or `(1,)` if all share `op`.

    By a product with one random source. What is to be learned may start at zero, and counts as other.
    """
    rows, shared = split(op)
    source = jnp.asarray(np.random.default_rng(2).normal(size=op.in_shape), float)
    leaves, tree = jax.tree.flatten(rows)
    if not is_known(op):
        return np.zeros(len(leaves[0]) if leaves else 1, bool)
    if not leaves:
        return ~np.asarray(_seen(rows, shared, source))[None]
    most = max(_BATCH // max(np.prod(op.in_shape), np.prod(op.out_shape)), 1)
    seen = lambda *leaves: _seen_rows(jax.tree.unflatten(tree, leaves), shared, source)
    return in_batches(seen, int(min(most, len(leaves[0]))), *leaves) == 0


@eqx.filter_jit
def _seen(rows: Operator, shared: Operator, source: Array) -> Array:
    return jnp.any(eqx.combine(rows, shared).mv(source) != 0)


@eqx.filter_jit
def _seen_rows(rows: Operator, shared: Operator, source: Array) -> Array:
    return jax.vmap(lambda row: _seen(row, shared, source))(rows)
