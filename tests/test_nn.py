"""The networks' contract with `Preconditioned` and the files."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.nn import Mlp

SETTINGS = {"width": 16, "depth": 1, "frequencies": 8}

build = eqx.filter_jit(lambda shape, key, **settings: Mlp(shape, **settings, key=key))
evaluate = eqx.filter_jit(lambda network, x, c: jax.vmap(network)(x, c))


def mlp(shape, seed=0, **settings):
    return build(shape, jax.random.key(seed), **{**SETTINGS, **settings})


def perturbed(network):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(a.dtype), network)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_a_new_network_is_zero_everywhere_and_keeps_the_shape(shape, rng):
    x = jnp.asarray(rng.normal(size=(5, *shape)))
    out = evaluate(mlp(shape), x, jnp.linspace(-2.0, 1.0, 5))
    np.testing.assert_array_equal(out, np.zeros((5, *shape)))


def test_two_dimensional_arrays_are_flattened_in_c_order(rng):
    x, c = rng.normal(size=(5, 4)), jnp.linspace(-2.0, 1.0, 5)
    grid = evaluate(perturbed(mlp((2, 2))), jnp.asarray(x.reshape(5, 2, 2)), c)
    flat = evaluate(perturbed(mlp((4,))), jnp.asarray(x), c)
    assert np.abs(flat).max() > 0.1
    np.testing.assert_allclose(np.asarray(grid).reshape(5, 4), flat, atol=1e-6)


def test_the_output_depends_on_the_noise_level_and_on_every_input(rng):
    network = perturbed(mlp((4,)))
    x = rng.normal(size=4)
    levels = jnp.linspace(-2.0, 1.0, 5)
    by_level = np.asarray(evaluate(network, jnp.asarray(np.tile(x, (5, 1))), levels))
    apart = np.linalg.norm(by_level[:, None] - by_level[None], axis=-1) + np.eye(5)
    assert apart.min() > 1e-2
    moved = np.tile(x, (5, 1))
    moved[:4] += 0.5 * np.eye(4)
    by_input = np.asarray(evaluate(network, jnp.asarray(moved), jnp.full(5, 0.3)))
    assert np.abs(by_input[:4] - by_input[4]).max(axis=1).min() > 1e-2


def test_settings_rebuild_the_same_structure():
    network = mlp((4,), seed=4)
    assert network.settings == SETTINGS
    again = build((4,), jax.random.key(9), **network.settings)
    assert jax.tree.structure(again) == jax.tree.structure(network)
    shapes = lambda n: [a.shape for a in jax.tree.leaves(n)]
    assert shapes(again) == shapes(network)
    for name in SETTINGS:
        other = jax.eval_shape(
            lambda key, name=name: Mlp((4,), **{**SETTINGS, name: 3}, key=key), jax.random.key(0)
        )
        assert other.settings == {**SETTINGS, name: 3}
        assert shapes(other) != shapes(network)


def test_gradients_reach_the_last_layer_first_and_then_all(rng):
    """Behind a last layer of zeros nothing has a gradient until that layer has moved."""
    x, c = jnp.asarray(rng.normal(size=4)), jnp.asarray(-0.4)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda n: jnp.sum((n(x, c) - 1) ** 2)))
    fresh = gradient(mlp((4,)))
    assert np.all(np.asarray(fresh.last.weight) != 0)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves((fresh.first, fresh.blocks)))
    later = [np.asarray(g) for g in jax.tree.leaves(gradient(perturbed(mlp((4,)))))]
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in later)
