"""The networks' contract with `DiffusionPrior` and the files."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.errors import ConfigError
from dichroic.priors.networks import Mlp, UNet

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


UNETS = {
    "series": ((7,), {}),
    "image": ((6, 9), {}),
    "channels": ((3, 6, 6), {"attention": True}),
    "series-channels": ((3, 10), {"ndim": 1}),
}
SMALL = {"channels": 8, "levels": 2, "depth": 1}
build_unet = eqx.filter_jit(lambda shape, key, **settings: UNet(shape, **settings, key=key))


def unet(shape, **settings):
    return build_unet(shape, jax.random.key(0), **SMALL, **settings)


@pytest.mark.parametrize(("shape", "settings"), UNETS.values(), ids=UNETS)
def test_a_unet_starts_at_zero_keeps_the_shape_and_sees_every_input(shape, settings, rng):
    network = unet(shape, **settings)
    x = rng.normal(size=shape)
    levels = jnp.array([-1.0, 0.5])
    twice = jnp.asarray(np.stack([x, x]))
    np.testing.assert_array_equal(evaluate(network, twice, levels), np.zeros((2, *shape)))
    moved = perturbed(network)
    by_level = np.asarray(evaluate(moved, twice, levels))
    assert by_level.shape == (2, *shape)
    assert np.abs(by_level[0] - by_level[1]).max() > 1e-2
    weight = jnp.asarray(rng.normal(size=shape))
    slope = eqx.filter_jit(jax.grad(lambda u: jnp.sum(weight * moved(u, levels[0]))))
    assert np.abs(slope(jnp.asarray(x))).min() > 1e-5


def test_a_unet_moves_with_what_it_sees(rng):
    """Shifted by what the levels divide positions by, away from the edges (group norms see the same)."""
    network = perturbed(unet((96,)))
    bump = np.zeros(96)
    bump[40:46] = rng.normal(size=6)
    x = jnp.asarray(np.stack([bump, np.roll(bump, 2)]))
    a, b = np.asarray(evaluate(network, x, jnp.zeros(2)))
    assert np.abs(a[30:60]).max() > 1e-2
    np.testing.assert_allclose(a[30:60], b[32:62], atol=1e-4)


def test_half_precision_is_near_and_gives_float32(rng):
    x = jnp.asarray(rng.normal(size=(2, 6, 9)))
    exact = np.asarray(evaluate(perturbed(unet((6, 9))), x, jnp.zeros(2)))
    half = evaluate(perturbed(unet((6, 9), precision="bfloat16")), x, jnp.zeros(2))
    assert half.dtype == jnp.float32
    error = np.sqrt(np.mean((np.asarray(half) - exact) ** 2) / np.mean(exact**2))
    assert 0 < error < 0.1  # eight bits of mantissa through a dozen layers


def test_settings_rebuild_a_unet():
    network = unet((3, 6, 6), attention=True)
    again = build_unet((3, 6, 6), jax.random.key(9), **network.settings)
    assert jax.tree.structure(again) == jax.tree.structure(network)
    assert [a.shape for a in jax.tree.leaves(again)] == [a.shape for a in jax.tree.leaves(network)]


def test_sizes_of_a_unet():
    """From a tenth of a million numbers to sixty million."""
    count = lambda **s: sum(
        a.size
        for a in jax.tree.leaves(
            eqx.filter_eval_shape(lambda k: UNet((28, 28), **s, key=k), jax.random.key(0))
        )
        if isinstance(a, jax.ShapeDtypeStruct)
    )
    assert count(channels=16, levels=2, depth=1) < 0.2e6
    assert count(channels=128, levels=4, attention=True) > 50e6


@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 3, 4, 5), None), ((3, 4, 5), 1), ((4,), 2), ((4, 4), 3)]
)
def test_sources_of_other_forms_are_refused(shape, axes):
    with pytest.raises(ConfigError, match="a U-Net is for series and images"):
        UNet(shape, ndim=axes, key=jax.random.key(0))


def test_a_precision_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="precision: expected float32 or bfloat16, got 'float16'"):
        UNet((4,), precision="float16", key=jax.random.key(0))
