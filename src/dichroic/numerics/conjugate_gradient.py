"""Conjugate gradients for one symmetric system; under `vmap`, for a batch with a status per sample."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

RUNNING, CONVERGED, NEGATIVE_CURVATURE, OUT_OF_STEPS = 0, 1, 2, 3
STATUS = ("running", "converged", "negative curvature", "out of steps")


class Solution(eqx.Module):
    """The result of an iterative solve: `residual` is `‖b − A x‖ / ‖b‖`."""

    x: Float[Array, " size"]
    steps: Int[Array, ""]
    residual: Float[Array, ""]
    status: Int[Array, ""]

    @property
    def converged(self) -> Bool[Array, "*batch"]:
        """Whether the residual reached the tolerance."""
        return self.status == CONVERGED


class _State(NamedTuple):
    x: Array
    r: Array
    p: Array
    rho: Array
    steps: Array
    status: Array


def conjugate_gradient(
    matvec: Callable[[Array], Array],
    b: Float[Array, " size"],
    *,
    x0: Float[Array, " size"] | None = None,
    precondition: Callable[[Array], Array] = lambda r: r,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> Solution:
    """Solve `A x = b` for symmetric positive definite `A` given as `matvec`.

    Stops where `‖r‖ ≤ tolerance ‖b‖`, whatever the scale of the problem; at a direction of zero or
    negative curvature, keeping the last iterate (so a slightly indefinite `A` gives a usable answer);
    or after `max_steps`. `precondition` applies an approximation of `A⁻¹` (Hestenes and Stiefel, 1952). Starts
    from zero, or, for one product more, from the multiple of `x0` nearest to the solution in the norm of `A`.
    """
    scale = jnp.max(jnp.abs(b))
    scale = jnp.where(scale > 0, scale, 1)
    unit = b / scale
    x, r = (jnp.zeros_like(b), unit) if x0 is None else _nearest(matvec, unit, x0 / scale)
    goal = tolerance**2 * (unit @ unit)
    z = precondition(r)
    status = jnp.where(r @ r <= goal, CONVERGED, RUNNING)
    start = _State(x, r, z, r @ z, jnp.zeros((), int), status)

    def body(s: _State) -> _State:
        a_p = matvec(s.p)
        curvature = s.p @ a_p
        ok = curvature > 0
        alpha = jnp.where(ok, s.rho / jnp.where(ok, curvature, 1), 0)
        x, r = s.x + alpha * s.p, s.r - alpha * a_p
        z = precondition(r)
        rho = r @ z
        status = jnp.where(r @ r <= goal, CONVERGED, RUNNING)
        status = jnp.where(ok, status, NEGATIVE_CURVATURE)
        return _State(x, r, z + rho / s.rho * s.p, rho, s.steps + 1, status)

    running = lambda s: (s.status == RUNNING) & (s.steps < max_steps)
    end = jax.lax.while_loop(running, body, start)
    norm = jnp.sqrt(unit @ unit)
    residual = jnp.sqrt(end.r @ end.r) / jnp.where(norm > 0, norm, 1)
    status = jnp.where(end.status == RUNNING, OUT_OF_STEPS, end.status)
    return Solution(scale * end.x, end.steps, residual, status)


def _nearest(matvec: Callable[[Array], Array], b: Array, x: Array) -> tuple[Array, Array]:
    """The multiple `w x` that is nearest to `A⁻¹ b` in the norm of `A`, never farther than 0, and `b − w A x`."""
    a_x = matvec(x)
    curvature = x @ a_x
    ok = curvature > 0
    weight = (x @ b) / jnp.where(ok, curvature, 1)
    return jnp.where(ok, weight * x, 0), jnp.where(ok, b - weight * a_x, b)
