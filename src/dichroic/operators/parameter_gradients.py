"""Whether operators that are to be learned (`operators.Learnable`) can be: by derivatives of products with them.

A fit climbs the evidence along its slope in the parameters θ, which it has only if `∂ A(θ) x / ∂θ` is not zero:
a whole-number offset, or anything that rounds, has none. Outputs on which no θ has an effect, though a source is
seen there, settle the scale of that source, as a known operator would.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dichroic.errors import DataError
from dichroic.operators import Operator
from dichroic.operators.learnable import learned_parts, parameters, with_parameters

_AWAY = 1e-2  # from where parameters start, relative to them, and absolute: where slopes are looked at too
_FIXED = 1e-5  # of an output: what moves less, for parameters that move by as much as themselves, is fixed
_TRIALS = 3  # random directions


def check_slopes(operators: Iterable[Mapping[str, Operator]]) -> None:
    """Raise a `DataError` where a parameter that is to be learned has no slope, or one that is not finite."""
    found: dict[str, list[list[np.ndarray]]] = {}
    for part in learned_parts(list(operators)):
        slopes = found.setdefault(part.name, [])
        slopes.append([_slopes(part.operator, part.name, away) for away in (0.0, _AWAY)])
    for name, parts in found.items():
        here, away = (np.sum([np.abs(p[k]) for p in parts], axis=0) for k in (0, 1))
        if not np.isfinite(here).all():
            raise DataError(
                f"Learnable {name!r}: the derivative of A x with respect to {_which(~np.isfinite(here))} is "
                "not finite where "
                "it starts; start it elsewhere"
            )
        flat = (here == 0) & (away == 0)
        if flat.any():
            raise DataError(
                f"Learnable {name!r}: A x does not change with {_which(flat)}, as with whole-number offsets "
                "(PatchPlacement) and "
                "whatever is rounded, so a fit cannot learn it. What works is a parameter that A x "
                "changes with smoothly, "
                "such as a delay t as a Function, by the phases of Fourier transforms (lambda x, t: "
                "irfft(rfft(x) * exp(-2j * pi * rfftfreq(n) * t), n)); or fits with one known offset "
                "after the other, "
                "compared by their evidence"
            )
        if not here.any():
            raise DataError(
                f"Learnable {name!r}: A x does not change with its parameters at their start: start elsewhere"
            )


def _which(which: np.ndarray) -> str:
    """How messages call some of the parameters of an operator."""
    if which.all():
        return "its parameters" if which.size > 1 else "its parameter"
    return f"{which.sum()} of its {which.size} parameters (such as number {int(np.argmax(which))})"


def _slopes(operator: Operator, name: str, away: float) -> np.ndarray:
    """The derivatives of a random combination of `A(θ) x` with respect to each number of θ, for a random `x`."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), float) for s in (operator.in_shape, operator.out_shape))
    theta, rest = eqx.partition(operator, eqx.is_inexact_array)
    moved = jax.tree.map(lambda a: _moved(a, away, rng), theta)
    try:
        slopes = _gradient(moved, rest, x, y)
    except Exception as error:
        raise DataError(
            f"Learnable {name!r}: A x has no derivative with respect to its parameters "
            f"({type(error).__name__}: {error}), "
            "so a fit cannot learn them"
        ) from error
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(slopes)])


def _moved(a: Array, away: float, rng: np.random.Generator) -> Array:
    step = away * (1 + np.abs(a)) * rng.uniform(0.5, 1, np.shape(a))
    return jnp.asarray(a + step, a.dtype)


@eqx.filter_jit
def _gradient(theta: Any, rest: Any, x: Array, y: Array) -> Any:
    return jax.grad(lambda t: jnp.vdot(y, eqx.combine(t, rest).mv(x)))(theta)


def fixed_entries(op: Operator) -> np.ndarray:
    """`(*out_shape)`, true for the outputs of one observation that see the source, the same whatever θ is."""
    rng = np.random.default_rng(0)
    start = parameters(op)
    fixed = np.ones(op.out_shape, bool)
    for away in (0.0, _AWAY):
        theta = jax.tree.map(lambda a, away=away: _moved(a, away, rng), start)
        for _ in range(_TRIALS):
            x = jnp.asarray(rng.normal(size=op.in_shape), float)
            step = jax.tree.map(lambda a: (1 + jnp.abs(a)) * rng.normal(size=a.shape), theta)
            y, slope = _change(op, theta, step, x)
            fixed &= (np.asarray(y) != 0) & (np.abs(slope) <= _FIXED * np.abs(y))
    return fixed


@eqx.filter_jit
def _change(op: Operator, theta: Any, step: Any, x: Array) -> tuple[Array, Array]:
    return jax.jvp(lambda t: with_parameters(op, t).mv(x), (theta,), (step,))
