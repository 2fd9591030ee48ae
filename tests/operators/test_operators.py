import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal
from scipy.sparse import csr_array

from dichroic.errors import DataError, ShapeError
from dichroic.numerics.batching import row_counts, split, take
from dichroic.operators import (
    BlockAverage,
    BlockProject,
    Compose,
    Convolve,
    Dense,
    Diagonal,
    External,
    FunctionOperator,
    Identity,
    Learnable,
    PatchPlacement,
    Scale,
    Sparse,
    Stack,
    Sum,
    Zero,
)

N = 3
EPS = np.finfo(np.float32).eps


def normal(*shape):
    return np.random.default_rng(abs(hash(shape)) % 2**32).normal(size=shape).astype(np.float32)


def modulate(x, params):
    return jnp.cumsum(params["gain"] * x, axis=-1)


def function(per_observation):
    gain = normal(N, 4) if per_observation else normal(4)
    return FunctionOperator(
        modulate, in_shape=(2, 4), params={"gain": gain}, per_observation=per_observation
    )


def nested():
    """Shared and per-observation parameters at every depth."""
    blur = Convolve(normal(N, 3, 3), shape=(4, 4)) @ Diagonal(normal(4, 4))
    shift = Scale((4, 4), normal(N)) @ Convolve(normal(3, 1), shape=(4, 4))
    dense = Dense(normal(N, 5, 16), in_shape=(4, 4))
    return Stack((BlockAverage((4, 4), 2) @ (blur + shift), dense, 0.5 * Identity((4, 4))))


SHARED = {
    "identity-vector": lambda: Identity(4),
    "identity-image": lambda: Identity((2, 3)),
    "zero": lambda: Zero((2, 3), 4),
    "sparse": lambda: Sparse(csr_array(normal(6, 8).clip(0)), in_shape=(2, 4), out_shape=(3, 2)),
    "external": lambda: External(np.cumsum, lambda y: np.cumsum(y[::-1])[::-1], in_shape=5),
    "scale": lambda: Scale((2, 3), -1.5),
    "diagonal-vector": lambda: Diagonal(normal(5)),
    "diagonal-image": lambda: Diagonal(normal(2, 3)),
    "dense-vector": lambda: Dense(normal(3, 5)),
    "dense-shaped": lambda: Dense(normal(6, 8), in_shape=(2, 4), out_shape=(3, 2)),
    "function": lambda: function(False),
    "block-project": lambda: BlockProject((4, 6, 3), 2, axes=(0, 1)),
    "learned": lambda: Learnable(Scale(4, 2.0), "gain") @ Learnable(Dense(normal(4, 6)), "matrix"),
    "function-without-params": lambda: FunctionOperator(lambda x: x[::2], in_shape=(5, 2)),
    "compose": lambda: Dense(normal(3, 4)) @ Diagonal(normal(4)) @ Dense(normal(4, 6)),
    "sum": lambda: Dense(normal(4, 4)) + Diagonal(normal(4)) + Identity(4),
    "stack": lambda: Stack((Identity((2, 4)), Dense(normal(3, 8), in_shape=(2, 4)))),
    "block-average-vector": lambda: BlockAverage(12, 3),
    "block-average-image": lambda: BlockAverage((4, 8), 2),
    "block-average-channels": lambda: BlockAverage((4, 6, 3), 2, axes=(0, -2)),
    "convolve-1d": lambda: Convolve(normal(3), shape=7),
    "convolve-longer-than-source": lambda: Convolve(normal(9), shape=4),
    "convolve-image": lambda: Convolve(normal(3, 5), shape=(6, 5)),
    "convolve-channels": lambda: Convolve(normal(5, 3), shape=(2, 6, 5), ndim=2),
    "convolve-even": lambda: Convolve(normal(4, 6), shape=(5, 7)),
    "convolve-off-centre": lambda: Convolve(normal(4, 5), shape=(5, 7), centre=(0, 4)),
    "convolve-each-channel": lambda: Convolve(normal(2, 3, 4), shape=(2, 5, 6), channels="each"),
    "convolve-each-channel-1d": lambda: Convolve(normal(2, 4), shape=(2, 6), channels="each"),
    "diagonal-channels": lambda: Diagonal(normal(2, 1, 1), shape=(2, 3, 4)),
    "convolve-last-axis": lambda: Convolve(normal(3), shape=(4, 6), ndim=1),
    "place": lambda: PatchPlacement((3, 4), (8, 9), (2, 5)),
    "place-partly-outside": lambda: PatchPlacement((3, 4), (8, 9), (-2, 7)),
    "place-outside": lambda: PatchPlacement(4, 6, (9,)),
    "place-larger-than-the-scene": lambda: PatchPlacement((8, 9), (3, 4), (-2, -3)),
}
PER_OBSERVATION = {
    "scale-rows": lambda: Scale((2, 3), normal(N)),
    "diagonal-rows": lambda: Diagonal(normal(N, 2, 3), shape=(2, 3)),
    "dense-rows": lambda: Dense(normal(N, 4, 6), in_shape=(2, 3)),
    "function-rows": lambda: function(True),
    "place-rows": lambda: PatchPlacement((2, 3), (4, 6), [[1, 2], [-1, 4], [9, -9]]),
    "convolve-rows-1d": lambda: Convolve(normal(N, 3), shape=6),
    "convolve-rows-image": lambda: Convolve(normal(N, 3, 3), shape=(5, 4)),
    "convolve-rows-channels": lambda: Convolve(normal(N, 3, 3), shape=(2, 5, 4), ndim=2),
    "convolve-rows-even-1d": lambda: Convolve(normal(N, 4), shape=5),
    "convolve-rows-each-channel": lambda: Convolve(
        normal(N, 2, 3, 4), shape=(2, 5, 6), channels="each"
    ),
    "convolve-rows-of-as-many-channels": lambda: Convolve(
        normal(N, 3, 2), shape=(N, 5, 4), channels="all"
    ),
    "diagonal-rows-channels": lambda: Diagonal(normal(N, 2, 1), shape=(2, 3)),
    "compose-mixed": lambda: Dense(normal(3, 4)) @ Diagonal(normal(N, 4), shape=4),
    "sum-mixed": lambda: Dense(normal(N, 4, 4)) + Identity(4),
    "stack-mixed": lambda: Stack((Scale((4,), normal(N)), Dense(normal(2, 4)))),
    "nested": nested,
}
EVERY = SHARED | PER_OBSERVATION
every_operator = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
per_observation = pytest.mark.parametrize(
    "make", PER_OBSERVATION.values(), ids=PER_OBSERVATION.keys()
)


def ones(operator):
    """The operator of every observation, as a list."""
    return [take(operator, i) for i in range(N)] if row_counts(operator) else [operator]


def over_rows(operator, fn, *args):
    """`fn(operator of one observation, …)` mapped over observations and the leading axis of args."""
    rows, shared = split(operator)
    return jax.vmap(lambda r, *a: fn(eqx.combine(r, shared), *a))(rows, *args)


@every_operator
def test_each_applies_the_operator_of_every_observation(make, rng):
    op = make()
    x = rng.normal(size=(2, N, *op.in_shape)).astype(np.float32)
    expect = [
        [one.mv(jnp.asarray(v)) for one, v in zip((ones(op) * N)[:N], draw, strict=True)]
        for draw in x
    ]
    np.testing.assert_allclose(op.each(x), expect, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(op.each(x[0]), expect[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="expected"):
        op.each(x[0, 0])


@every_operator
def test_adjoint_identity(make, rng):
    for op in ones(make()):
        x = rng.normal(size=op.in_shape).astype(np.float32)
        y = rng.normal(size=op.out_shape).astype(np.float32)
        ax, aty = op.mv(jnp.asarray(x)), op.rmv(jnp.asarray(y))
        assert ax.shape == op.out_shape
        assert aty.shape == op.in_shape
        left, right = np.vdot(np.float64(ax), y), np.vdot(x, np.float64(aty))
        size = np.linalg.norm(ax) * np.linalg.norm(y) + np.linalg.norm(x) * np.linalg.norm(aty)
        assert abs(left - right) <= 16 * EPS * size


@every_operator
def test_matrix_has_the_columns_and_rows_of_the_products(make, rng):
    for op in ones(make()):
        a = np.asarray(op.as_matrix())
        assert a.shape == (np.prod(op.out_shape), np.prod(op.in_shape))
        x = rng.normal(size=op.in_shape).astype(np.float32)
        y = rng.normal(size=op.out_shape).astype(np.float32)
        tolerance = {"rtol": 0, "atol": 64 * EPS * (1 + np.linalg.norm(a))}
        np.testing.assert_allclose(np.ravel(op.mv(jnp.asarray(x))), a @ x.ravel(), **tolerance)
        np.testing.assert_allclose(np.ravel(op.rmv(jnp.asarray(y))), a.T @ y.ravel(), **tolerance)


@per_observation
def test_mapped_over_observations_equals_one_by_one(make, rng):
    op = make()
    x = jnp.asarray(rng.normal(size=(N, *op.in_shape)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(N, *op.out_shape)), jnp.float32)
    forward = jax.jit(lambda o, x: over_rows(o, lambda one, v: one.mv(v), x))(op, x)
    back = jax.jit(lambda o, y: over_rows(o, lambda one, v: one.rmv(v), y))(op, y)
    singles = ones(op)
    expect = jnp.stack([one.mv(v) for one, v in zip(singles, x, strict=True)])
    np.testing.assert_allclose(forward, expect, atol=1e-5)
    expect = jnp.stack([one.rmv(v) for one, v in zip(singles, y, strict=True)])
    np.testing.assert_allclose(back, expect, atol=1e-5)
    assert np.ptp(np.asarray(over_rows(op, lambda one: one.as_matrix())), axis=0).max() > 0


@every_operator
def test_gradient_through_the_product_is_the_adjoint(make, rng):
    op = ones(make())[0]
    x = jnp.asarray(rng.normal(size=op.in_shape), jnp.float32)
    y = jnp.asarray(rng.normal(size=op.out_shape), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x, op: jnp.vdot(op.mv(x), y)))(x, op)
    np.testing.assert_allclose(gradient, op.rmv(y), atol=1e-5)


@pytest.mark.parametrize("name", ["scale", "diagonal-image", "dense-shaped", "convolve-image"])
def test_parameters_are_differentiable(name, rng):
    op = EVERY[name]()
    x = jnp.asarray(rng.normal(size=op.in_shape), jnp.float32)
    y = jnp.asarray(rng.normal(size=op.out_shape), jnp.float32)
    gradient = eqx.filter_grad(lambda op: jnp.vdot(op.mv(x), y))(op)
    product = sum(
        jnp.vdot(g, p) for g, p in zip(jax.tree.leaves(gradient), jax.tree.leaves(op), strict=True)
    )
    # The products are linear in the parameters, so ⟨gradient, parameters⟩ is the product itself.
    np.testing.assert_allclose(product, jnp.vdot(op.mv(x), y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        ((3,), (8,)),
        ((9,), (4,)),
        ((3, 5), (7, 6)),
        ((1, 1), (3, 3)),
        ((4, 2), (5, 6)),
        ((3, 3, 5), (4, 5, 6)),
    ],
)
def test_convolution_is_that_of_scipy(kernel, shape, rng):
    k, x = rng.normal(size=kernel), rng.normal(size=shape)
    full = signal.convolve(x, k, mode="full", method="direct")
    centred = full[tuple(slice(m // 2, m // 2 + d) for m, d in zip(kernel, shape, strict=True))]
    result = Convolve(k, shape=shape, ndim=len(shape)).mv(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(result, centred, atol=1e-5)


def test_a_kernel_per_channel_blurs_each_with_its_own(rng):
    k, x = rng.normal(size=(3, 4, 3)), rng.normal(size=(3, 6, 7))
    crop = (slice(2, 8), slice(1, 8))
    expect = [signal.convolve(a, b, mode="full")[crop] for a, b in zip(x, k, strict=True)]
    op = Convolve(k, shape=(3, 6, 7), channels="each")
    np.testing.assert_allclose(op.mv(jnp.asarray(x, jnp.float32)), expect, atol=1e-5)
    rows = rng.normal(size=(3, 3, 4, 3))  # as many observations as channels
    each = Convolve(rows, shape=(3, 6, 7), channels="each").each(np.stack([x] * 3))
    for y, own in zip(each, rows, strict=True):
        want = Convolve(own, shape=(3, 6, 7), channels="each").mv(jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(y, want, atol=1e-5)


@pytest.mark.parametrize("size", [(1,), (4,), (5,), (4, 4), (3, 6), (7, 2)])
def test_a_delta_at_the_centre_is_the_identity(size, rng):
    x = rng.normal(size=(8, 9)[: len(size)]).astype(np.float32)
    for centre in (None, 0, tuple(n - 1 for n in size)):
        kernel = np.zeros(size)
        at = tuple(n // 2 for n in size) if centre is None else np.broadcast_to(centre, len(size))
        kernel[tuple(at)] = 1
        op = Convolve(kernel, shape=x.shape, centre=centre)
        np.testing.assert_allclose(op.mv(jnp.asarray(x)), x, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "shape", "settings"),
    [
        ((5, 3, 3), (5, 8, 8), {}),
        ((3, 3, 3), (5, 8, 8), {}),
        ((4, 3, 3, 3), (3, 8, 8), {}),
        ((5, 3, 3), (5, 8, 8), {"ndim": 2}),
        ((3, 5), (3, 40), {}),
        ((3, 3), (3, 40), {}),
        ((9, 3, 5), (3, 40), {}),
        ((3, 5), (3, 40), {"ndim": 1}),
    ],
)
def test_what_sizes_leave_open_is_to_be_stated(kernel, shape, settings):
    with pytest.raises(
        ShapeError, match=r"Convolve: is a kernel of shape .* channels='each'.*ndim="
    ):
        Convolve(np.ones(kernel), shape=shape, **settings)


@pytest.mark.parametrize(
    ("kernel", "shape"), [((15, 15), (15, 15)), ((17, 17), (15, 15)), ((4, 15, 15), (15, 15))]
)
def test_a_kernel_as_large_as_an_image_is_one_of_images(kernel, shape):
    assert Convolve(np.ones(kernel), shape=shape).axes.convolved == 2


@pytest.mark.parametrize(
    ("kernel", "shape", "settings", "message"),
    [
        ((4, 3, 3), (5, 8, 8), {"channels": "each"}, r"\(5, …, …\), or \(n, 5, …, …\)"),
        ((3, 3), (5, 8, 8), {"channels": "each"}, "not one for each channel"),
        ((3,), (8,), {"channels": "all"}, "no 0 axes"),
        ((3, 3), (8, 8), {"channels": "each", "ndim": 2}, "beside those of channels"),
        ((3, 3), (8, 8), {"channels": "every"}, "expected 'each' or 'all'"),
        ((3, 3), (8, 8), {"centre": (1,)}, "one integer per axis"),
    ],
)
def test_a_kernel_that_is_not_as_stated_is_refused(kernel, shape, settings, message):
    with pytest.raises(ShapeError, match=message):
        Convolve(np.ones(kernel), shape=shape, **settings)


def test_a_masked_entry_of_a_parameter_is_refused():
    holed = np.ma.masked_array(np.eye(3), np.eye(3) == 0)
    for make in (Dense, Diagonal, lambda a: Convolve(a, shape=(5, 5))):
        with pytest.raises(DataError, match=r"6 entries are masked, the first at \(0, 1\)"):
            make(holed)
    with pytest.raises(DataError, match="an operator takes"):
        Identity(3).each(holed)
    whole = np.ma.masked_array(np.eye(3), np.zeros((3, 3), bool))
    np.testing.assert_array_equal(Dense(whole).matrix, np.eye(3))
    with pytest.raises(DataError, match=r"number 1 has shape \(1,\)"):
        Dense([[1, 2], [3]])


def test_convolution_carries_the_channels_along(rng):
    k, x = rng.normal(size=(3, 3)), rng.normal(size=(2, 5, 6))
    expect = [signal.convolve(channel, k, mode="same") for channel in x]
    result = Convolve(k, shape=(2, 5, 6), ndim=2).mv(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(result, expect, atol=1e-5)


def test_kernel_per_observation_is_its_own_convolution(rng):
    k, x = rng.normal(size=(N, 3, 3)), rng.normal(size=(N, 5, 6))
    op = Convolve(k, shape=(5, 6))
    expect = [signal.convolve(a, b, mode="same") for a, b in zip(x, k, strict=True)]
    result = over_rows(op, lambda one, v: one.mv(v), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(result, expect, atol=1e-5)


def test_block_average_is_a_reshape_and_mean(rng):
    x = rng.normal(size=(4, 6, 3)).astype(np.float32)
    op = BlockAverage((4, 6, 3), 2, axes=(0, 1))
    assert op.out_shape == (2, 3, 3)
    expect = x.reshape(2, 2, 3, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(op.mv(jnp.asarray(x)), expect, atol=1e-6)


def test_place_puts_a_patch_where_it_is_said(rng):
    x, scene = rng.normal(size=(2, 3)).astype(np.float32), np.zeros((4, 6), np.float32)
    scene[1:3, 4:6] = x[:, :2]  # the last column is outside
    np.testing.assert_array_equal(PatchPlacement((2, 3), (4, 6), (1, 4)).mv(jnp.asarray(x)), scene)
    scene[:] = 0
    scene[:1, :3] = x[1:]
    np.testing.assert_array_equal(PatchPlacement((2, 3), (4, 6), (-1, 0)).mv(jnp.asarray(x)), scene)


@pytest.mark.parametrize("offset", [(1,), (1, 2, 3), [[[1, 2]]], (0.5, 1)])
def test_place_needs_whole_offsets_for_every_axis(offset):
    with pytest.raises(ShapeError, match="PatchPlacement: "):
        PatchPlacement((2, 3), (4, 6), offset)


def test_block_average_names_an_axis_once():
    assert BlockAverage((4, 4), 2, axes=(0, -2)).out_shape == (2, 4)
    assert BlockAverage((4, 4), 2, axes=(0, -2)).mv(jnp.ones((4, 4))).shape == (2, 4)


def test_algebra_is_that_of_matrices(rng):
    a, b, c = (rng.normal(size=(3, 3)).astype(np.float32) for _ in range(3))
    op = 2 * (Dense(a) @ Dense(b) + Dense(c)) * 0.5
    np.testing.assert_allclose(op.as_matrix(), a @ b + c, atol=1e-5)


@pytest.mark.parametrize("factor", [3, 3.0, np.float32(3), np.array(3.0), jnp.array(3.0)])
def test_factors_of_any_type_scale_from_both_sides(factor):
    for op in (factor * Identity(2), Identity(2) * factor):
        np.testing.assert_array_equal(op.as_matrix(), 3 * np.eye(2))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_an_array_of_factors_is_one_per_observation(array):
    op = array([1.0, 2.0, 3.0]) * Identity(2)
    assert row_counts(op) == {3}
    np.testing.assert_array_equal(take(op, 2).as_matrix(), 3 * np.eye(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Identity((2, 0)), r"positive integers, got \(2, 0\)"),
        (lambda: Identity(-1), r"positive integers, got \(-1,\)"),
        (lambda: Identity((2.5,)), r"positive integers, got \(2.5,\)"),
        (lambda: BlockAverage((8, 8), 2.5), r"factor must be a whole number, got 2.5"),
        (lambda: BlockProject((8, 8), 2.5), r"factor must be a whole number, got 2.5"),
        (lambda: Scale((2,), np.ones((2, 2))), r"Scale: .*\(2, 2\)"),
        (lambda: Diagonal(np.ones(3), shape=(2, 3)), r"Diagonal: .*\(3,\).*\(2, 3\)"),
        (lambda: Diagonal(np.ones((2, 4)), shape=(3,)), r"Diagonal: .*\(2, 4\).*\(3,\)"),
        (lambda: Diagonal(np.ones((5, 2, 3)), shape=(3,)), r"Diagonal: .*\(5, 2, 3\).*\(3,\)"),
        (lambda: Dense(np.ones(3)), r"Dense: expected .*got \(3,\)"),
        (lambda: Dense(np.ones((3, 4)), in_shape=(2, 3)), r"3 × 4 matrix cannot map \(2, 3\)"),
        (lambda: Dense(np.ones((3, 4)), out_shape=2), r"cannot map \(4,\) to \(2,\)"),
        (lambda: BlockAverage((4, 5), 2), r"BlockAverage: axis 1 of \(4, 5\).*multiple of 2"),
        (lambda: BlockAverage((4, 4), 0), r"BlockAverage: factor must be positive, got 0"),
        (lambda: BlockAverage((4, 4), 2, axes=(2,)), r"BlockAverage: no axis 2 in \(4, 4\)"),
        (lambda: Convolve(np.ones(4), shape=6, centre=4), r"centre=4; expected an entry .*\(4,\)"),
        (lambda: Convolve(np.ones(3), shape=(2, 6)), r"Convolve: .*\(3,\).*\(2, 6\); give ndim="),
        (lambda: Convolve(np.ones((3, 3)), shape=6, ndim=2), r"Convolve: .*2 axes"),
        (lambda: Identity(3) @ Dense(np.ones((2, 3))), r"Compose: Identity takes \(3,\) but Dense"),
        (lambda: Identity(3) + Identity(2), r"Sum: .*different shapes.*\(2,\).*\(3,\)"),
        (lambda: Stack((Identity(3), Identity(2))), r"Stack: .*different shapes.*\(2,\).*\(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_explained(make, message):
    with pytest.raises(ShapeError, match=message):
        make()


@every_operator
def test_split_and_combine_round_trip(make):
    op = make()
    rows, shared = split(op)
    assert eqx.tree_equal(eqx.combine(rows, shared), op)
    assert all(leaf.shape[0] == N for leaf in jax.tree.leaves(rows))
    count = len(jax.tree.leaves(rows)) + len(jax.tree.leaves(shared))
    assert count == len(jax.tree.leaves(op))
    again, none = split(rows)
    assert eqx.tree_equal(again, rows)
    assert not jax.tree.leaves(none)


@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED.keys())
def test_shared_operators_have_no_rows(make):
    op = make()
    assert row_counts(op) == set()
    assert eqx.tree_equal(take(op, slice(0, 2)), op)


@per_observation
def test_take_keeps_the_chosen_rows_in_order(make):
    op = make()
    assert row_counts(op) == {N}
    index = np.array([2, 0])
    some = take(op, index)
    assert row_counts(some) == {2}
    matrices = over_rows(op, lambda one: one.as_matrix())
    np.testing.assert_allclose(over_rows(some, lambda one: one.as_matrix()), matrices[index])
    assert eqx.tree_equal(take(op, slice(None)), op)


def test_nested_composites_split_leaf_by_leaf():
    rows, shared = split({"view": [nested(), Scale((2,), 3.0)], "other": jnp.ones(7)})
    assert sorted(leaf.shape for leaf in jax.tree.leaves(rows)) == [(3,), (3, 3, 3), (3, 5, 16)]
    assert sorted(leaf.shape for leaf in jax.tree.leaves(shared)) == [
        (), (), (3, 1), (4, 4), (7,)
    ]  # fmt: skip


def test_row_counts_show_a_mismatch():
    op = Compose((Scale((4,), normal(2)), Scale((4,), normal(5))))
    assert row_counts(op) == {2, 5}
    assert row_counts(Sum((Identity(4), Identity(4)))) == set()


ESTIMATED = {"external", "function", "function-without-params", "compose", "sum"}
ESTIMATED |= {"function-rows", "sum-mixed", "compose-mixed", "nested"}


@pytest.mark.parametrize("name", EVERY)
def test_row_squares_are_the_diagonal_of_the_operator_with_its_adjoint(name):
    for op in ones(EVERY[name]()):
        expect = np.sum(np.asarray(op.as_matrix()) ** 2, axis=1).reshape(op.out_shape)
        found = op.row_squares()
        assert found.shape == op.out_shape
        if name in ESTIMATED:  # chi-squared of 32 degrees of freedom
            np.testing.assert_allclose(found, expect, rtol=5 * np.sqrt(2 / 32))
            assert np.all(np.asarray(found) >= 0)
        else:
            np.testing.assert_allclose(found, expect, rtol=1e-5, atol=1e-5)


def test_rows_of_a_scaled_operator_are_known():
    blur = Convolve(normal(3, 3), shape=(4, 4))
    for op in (blur @ (0.5 * Identity((4, 4))), Learnable(Scale((4, 4), 0.5), "f") @ blur):
        np.testing.assert_allclose(op.row_squares(), 0.25 * blur.row_squares(), rtol=1e-6)
