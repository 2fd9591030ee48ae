import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from dichroic.numerics.conjugate_gradient import (
    CONVERGED,
    NEGATIVE_CURVATURE,
    OUT_OF_STEPS,
    STATUS,
    conjugate_gradient,
)


def symmetric(rng, values):
    q = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    a = (q * np.asarray(values)) @ q.T
    return 0.5 * (a + a.T)


def batch(rng, count=4, size=12):
    a = np.stack([symmetric(rng, np.geomspace(1, 10.0**i, size)) for i in range(count)])
    return a, rng.normal(size=(count, size))


@jax.jit
def solve_all(a, b):
    solve = lambda a, b: conjugate_gradient(lambda v: a @ v, b, tolerance=1e-11, max_steps=200)
    return jax.vmap(solve)(a, b)


@jax.jit
def lineax_all(a, b):
    def solve(a, b):
        operator = lx.MatrixLinearOperator(a, lx.positive_semidefinite_tag)
        solver = lx.CG(rtol=1e-12, atol=1e-12, max_steps=200)
        return lx.linear_solve(operator, b, solver, throw=False).value

    return jax.vmap(solve)(a, b)


def relative(x, expect):
    return np.linalg.norm(x - expect, axis=-1) / np.linalg.norm(expect, axis=-1)


def test_batch_agrees_with_lineax_and_numpy(rng, x64):
    a, b = batch(rng)
    solution = solve_all(a, b)
    exact = np.linalg.solve(a, b[..., None])[..., 0]
    assert solution.x.dtype == jnp.float64
    assert np.all(solution.status == CONVERGED)
    assert np.all(solution.converged)
    assert np.all(solution.residual <= 1.01e-11)
    assert np.all(relative(solution.x, exact) < 1e-8)
    assert np.all(relative(solution.x, lineax_all(a, b)) < 1e-8)


def test_each_of_a_batch_stops_for_itself(rng, x64):
    a, b = batch(rng)
    together = solve_all(a, b)
    alone = [solve_all(a[i : i + 1], b[i : i + 1]) for i in range(len(a))]
    np.testing.assert_array_equal(together.steps, [int(one.steps[0]) for one in alone])
    np.testing.assert_allclose(together.x, np.concatenate([one.x for one in alone]), rtol=1e-9)
    assert len(set(together.steps.tolist())) > 1
    assert together.steps[0] == 1  # The identity.


def test_residual_is_that_of_the_solution(rng, x64):
    a, b = symmetric(rng, np.geomspace(1, 100, 60)), rng.normal(size=60)
    solution = conjugate_gradient(lambda v: a @ v, jnp.asarray(b), tolerance=1e-3)
    residual = np.linalg.norm(b - a @ np.asarray(solution.x)) / np.linalg.norm(b)
    np.testing.assert_allclose(solution.residual, residual, rtol=1e-8)
    assert residual <= 1e-3


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("warm", [False, True])
def test_stop_does_not_depend_on_the_scale(scale, warm, rng):
    a = jnp.asarray(symmetric(rng, np.geomspace(1, 30, 8)), jnp.float32)
    b, x0 = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    solve = lambda s: conjugate_gradient(lambda v: a @ v, s * b, x0=s * x0 if warm else None)
    unit, scaled = solve(1.0), solve(jnp.float32(scale))
    assert scaled.status == unit.status == CONVERGED
    assert scaled.steps == unit.steps > 1
    np.testing.assert_allclose(scaled.x / jnp.float32(scale), unit.x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.residual, unit.residual, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_stop_does_not_depend_on_the_scale_of_the_operator(scale, rng):
    a = jnp.asarray(symmetric(rng, np.geomspace(1, 30, 8)), jnp.float32)
    b = jnp.asarray(rng.normal(size=8), jnp.float32)
    solution = conjugate_gradient(lambda v: scale * (a @ v), b)
    assert solution.status == CONVERGED
    np.testing.assert_allclose(scale * solution.x, np.linalg.solve(a, b), rtol=5e-3, atol=1e-3)


def test_indefinite_operator_reports_negative_curvature(rng):
    a = jnp.asarray(symmetric(rng, [3.0, 2.0, 1.0, -2.0]), jnp.float32)
    solution = conjugate_gradient(lambda v: a @ v, jnp.asarray(rng.normal(size=4), jnp.float32))
    assert STATUS[int(solution.status)] == "negative curvature"
    assert not solution.converged
    assert np.all(np.isfinite(solution.x))


def test_iterate_before_negative_curvature_is_kept():
    diagonal, b = jnp.array([1.0, 1.0, -1e-3]), jnp.array([1.0, 1.0, 1e-2])
    solution = conjugate_gradient(lambda v: diagonal * v, b, tolerance=1e-6)
    assert solution.status == NEGATIVE_CURVATURE
    np.testing.assert_allclose(solution.x[:2], b[:2], rtol=1e-3)
    np.testing.assert_allclose(solution.residual, 1e-2 / np.sqrt(2), rtol=0.02)


def test_negative_curvature_of_one_leaves_the_others_alone(x64):
    diagonals = jnp.array([[1.0, 2.0, 3.0], [1.0, -2.0, -3.0], [5.0, 5.0, 5.0]])
    b = jnp.ones((3, 3))
    solve = lambda d, b: conjugate_gradient(lambda v: d * v, b, tolerance=1e-10)
    solution = jax.vmap(solve)(diagonals, b)
    assert solution.status.tolist() == [CONVERGED, NEGATIVE_CURVATURE, CONVERGED]
    np.testing.assert_allclose(solution.x[::2], (b / diagonals)[::2], rtol=1e-9)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_too_few_steps_are_reported(steps, rng):
    a = jnp.asarray(symmetric(rng, np.geomspace(1, 1e4, 30)), jnp.float32)
    b = jnp.asarray(rng.normal(size=30), jnp.float32)
    solution = conjugate_gradient(lambda v: a @ v, b, max_steps=steps)
    assert solution.status == OUT_OF_STEPS
    assert solution.steps == steps
    assert solution.residual > 1e-4


def test_convergence_in_the_last_step_counts():
    solution = conjugate_gradient(lambda v: 2.0 * v, jnp.ones(3), max_steps=1)
    assert solution.status == CONVERGED
    assert solution.steps == 1


def test_zero_right_hand_side_is_solved_by_zero():
    solution = jax.jit(lambda b: conjugate_gradient(lambda v: 2.0 * v, b))(jnp.zeros(3))
    assert solution.status == CONVERGED
    assert solution.steps == 0
    assert solution.residual == 0
    np.testing.assert_array_equal(solution.x, np.zeros(3))


def test_warm_start_saves_steps_and_a_solution_needs_none(rng, x64):
    a, b = symmetric(rng, np.geomspace(1, 1e3, 20)), jnp.asarray(rng.normal(size=20))
    exact = jnp.asarray(np.linalg.solve(a, b))
    solve = lambda x0: conjugate_gradient(lambda v: a @ v, b, x0=x0, tolerance=1e-6)
    cold, near, there = solve(None), solve(exact * (1 + 1e-5)), solve(exact)
    assert near.steps < cold.steps
    assert there.steps == 0
    for solution in (cold, near, there):
        assert solution.converged
        np.testing.assert_allclose(solution.x, exact, atol=2e-5 * np.linalg.norm(exact))


def test_a_guess_counts_by_its_direction(rng, x64):
    """Its best multiple is where the search starts: of the solution, done; across it, as from zero."""
    a, b = symmetric(rng, np.geomspace(1, 1e3, 20)), jnp.asarray(rng.normal(size=20))
    exact = np.linalg.solve(a, b)
    across = rng.normal(size=20)
    across -= (across @ b) / (exact @ b) * exact
    solve = lambda x0: conjugate_gradient(lambda v: a @ v, b, x0=x0, tolerance=1e-6)
    scaled, useless, cold = solve(jnp.asarray(-50 * exact)), solve(jnp.asarray(across)), solve(None)
    assert scaled.steps == 0
    assert abs(useless.steps - cold.steps) <= 2  # to rounding, which is that of the processor
    np.testing.assert_allclose(useless.x, cold.x, rtol=1e-6)
    none = solve(jnp.zeros(20))
    np.testing.assert_array_equal(none.x, cold.x)


def test_preconditioner_cuts_the_steps(rng, x64):
    diagonal = np.geomspace(1, 1e4, 40)
    a = np.diag(diagonal) + 0.1 * symmetric(rng, np.linspace(0, 1, 40))
    b = jnp.asarray(rng.normal(size=40))
    solve = lambda **options: conjugate_gradient(
        lambda v: a @ v, b, tolerance=1e-8, max_steps=400, **options
    )
    plain, fast = solve(), solve(precondition=lambda r: r / jnp.asarray(diagonal))
    exact_inverse = solve(precondition=lambda r: jnp.linalg.solve(a, r))
    assert exact_inverse.steps == 1
    assert 3 * fast.steps < plain.steps
    for solution in (plain, fast, exact_inverse):
        assert solution.converged
        np.testing.assert_allclose(solution.x, np.linalg.solve(a, b), rtol=1e-5, atol=1e-8)
