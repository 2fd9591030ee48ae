import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.errors import ConfigError
from dichroic.priors.schedule import Geometric, Karras

both = pytest.mark.parametrize("kind", [Geometric, Karras])
levels = pytest.mark.parametrize(("low", "high"), [(1e-3, 30.0), (0.02, 0.021), (1e-5, 1e4)])


@both
@levels
def test_ends_are_the_levels_asked_for(kind, low, high):
    schedule = kind(low, high)
    ends = schedule(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(ends, [low, high], rtol=2e-5)
    np.testing.assert_allclose(schedule.grid(7)[jnp.array([-1, 0])], [low, high], rtol=2e-5)


@both
@levels
@pytest.mark.parametrize("steps", [1, 2, 64])
def test_grid_goes_down_strictly(kind, low, high, steps):
    grid = np.asarray(kind(low, high).grid(steps))
    assert grid.shape == (steps + 1,)
    assert np.all(np.diff(grid) < 0)
    assert np.all(grid > 0)


def test_geometric_levels_have_a_constant_ratio():
    grid = np.asarray(Geometric(1e-2, 1e2).grid(8))
    np.testing.assert_allclose(grid[1:] / grid[:-1], 10 ** (-0.5), rtol=1e-5)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_levels_are_those_of_edm(rho):
    low, high, steps = 0.002, 80.0, 18
    i = np.arange(steps)
    root_low, root_high = low ** (1 / rho), high ** (1 / rho)
    expect = (root_high + i / (steps - 1) * (root_low - root_high)) ** rho
    np.testing.assert_allclose(Karras(low, high, rho=rho).grid(steps - 1), expect, rtol=1e-4)


@both
def test_a_schedule_is_static_under_transformations(kind):
    schedule, t = kind(), jnp.array([0.1, 0.5, 0.9])
    assert not jax.tree.leaves(schedule)
    mapped = jax.jit(lambda s, t: jax.vmap(s)(t))(schedule, t)
    np.testing.assert_allclose(mapped, schedule(t), rtol=1e-5)
    slope = jax.vmap(jax.grad(schedule))(t)
    step = 1e-3
    difference = (schedule(t + step) - schedule(t - step)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-2)


@both
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)]
)
def test_levels_out_of_order_are_refused(kind, low, high):
    with pytest.raises(ConfigError, match=f"0 < sigma_min < sigma_max, got {low} and {high}"):
        kind(low, high)
