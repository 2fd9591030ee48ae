import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.errors import DataError, ShapeError
from dichroic.io import load_problem
from dichroic.numerics.batching import row_counts, split, take
from dichroic.operators import BlockProject, Identity
from dichroic.operators.noise import (
    DenseNoise,
    DiagonalNoise,
    IsotropicNoise,
    JointNoise,
    LowRankNoise,
    Masked,
    StationaryNoise,
    observed_entries,
)
from dichroic.problem.observations import Observations, whitened_chi2
from dichroic.problem.view import View

N, M = 3, 4
DRAWS = 20_000
RNG = np.random.default_rng(11)
FACTOR, VARIANCE = RNG.normal(size=(N, M, 2)), RNG.uniform(0.2, 2.0, size=(N, M))
COVARIANCE = FACTOR @ FACTOR.swapaxes(1, 2) + np.stack([np.diag(v) for v in VARIANCE])
STD = np.array([0.5, 1.0, 2.0])
MASK = np.array([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
DIAGONALS = np.stack([np.diag(v) for v in VARIANCE])


LAGS = np.array([[0.2, 0.5, 1.5, 0.5, 0.2], [0, -0.3, 1, -0.3, 0], [0.1, 0.1, 0.7, 0.1, 0.1]])
DISTANCE = np.abs(np.subtract.outer(np.arange(M), np.arange(M)))
TOEPLITZ = np.where(DISTANCE < 3, LAGS[:, 2 + np.minimum(DISTANCE, 2)], 0)
GRID_LAGS = np.array([[0.1, 0.3, -0.2], [0.4, 2.0, 0.4], [-0.2, 0.3, 0.1]])  # even, not symmetric
CELLS = np.array([(i, j) for i in range(2) for j in range(2)])
GRID = GRID_LAGS[tuple((1 + CELLS[:, None] - CELLS).transpose(2, 0, 1))]


def masked(covariance, mask):
    kept = mask[..., :, None] * mask[..., None, :]
    return kept * covariance + np.eye(M) * (1 - mask)[..., None, :]


def block_diagonal(a, b):
    corner = np.zeros((N, a.shape[-2], b.shape[-1]))
    a, b = np.broadcast_to(a, (N, *a.shape[-2:])), np.broadcast_to(b, (N, *b.shape[-2:]))
    return np.block([[a, corner], [corner.swapaxes(1, 2), b]])


def joint():
    """A masked and correlated view beside an isotropic one."""
    inner = Masked(DenseNoise(COVARIANCE[0]), MASK)
    return JointNoise((inner, IsotropicNoise(STD)), (M, 2))


# name: the model, and its covariance for every observation.
MODELS = {
    "isotropic": (lambda: IsotropicNoise(0.7), 0.49 * np.eye(M)),
    "isotropic-rows": (lambda: IsotropicNoise(STD), STD[:, None, None] ** 2 * np.eye(M)),
    "diagonal": (lambda: DiagonalNoise(VARIANCE[0]), DIAGONALS[0]),
    "diagonal-rows": (lambda: DiagonalNoise(VARIANCE), DIAGONALS),
    "low-rank": (lambda: LowRankNoise(FACTOR[0], VARIANCE[0]), COVARIANCE[0]),
    "low-rank-rows": (lambda: LowRankNoise(FACTOR, VARIANCE), COVARIANCE),
    "low-rank-mixed": (
        lambda: LowRankNoise(FACTOR, VARIANCE[0]),
        COVARIANCE - DIAGONALS + DIAGONALS[0],
    ),
    "dense": (lambda: DenseNoise(COVARIANCE[0]), COVARIANCE[0]),
    "dense-rows": (lambda: DenseNoise(COVARIANCE), COVARIANCE),
    "stationary": (lambda: StationaryNoise(LAGS[0], shape=(M,)), TOEPLITZ[0]),
    "stationary-rows": (lambda: StationaryNoise(LAGS, shape=(M,), ndim=1), TOEPLITZ),
    "stationary-grid": (lambda: StationaryNoise(GRID_LAGS, shape=(2, 2)), GRID),
    "stationary-channels": (
        lambda: StationaryNoise(LAGS[0][1:4], shape=(2, 2)),
        np.kron(np.eye(2), TOEPLITZ[0][:2, :2]),
    ),
    "masked-rows": (lambda: Masked(DenseNoise(COVARIANCE), MASK), masked(COVARIANCE, MASK)),
    "masked-shared": (
        lambda: Masked(DiagonalNoise(VARIANCE), MASK[0]),
        masked(DIAGONALS, MASK[0]),
    ),
    "masked-all-shared": (
        lambda: Masked(IsotropicNoise(2.0), MASK[0]),
        masked(4.0 * np.eye(M), MASK[0]),
    ),
    "masked-twice": (
        lambda: Masked(Masked(DenseNoise(COVARIANCE), MASK), MASK[0]),
        masked(COVARIANCE, MASK * MASK[0]),
    ),
    "joint": (
        joint,
        block_diagonal(masked(COVARIANCE[0], MASK), STD[:, None, None] ** 2 * np.eye(2)),
    ),
    "joint-shared": (
        lambda: JointNoise((DiagonalNoise(VARIANCE[0]), IsotropicNoise(0.7)), (M, 3)),
        block_diagonal(DIAGONALS[0], 0.49 * np.eye(3))[0],
    ),
}
every_model = pytest.mark.parametrize(("make", "covariance"), MODELS.values(), ids=MODELS.keys())


def per_observation(noise, fn):
    """`fn(noise of one observation)`, for every observation if there are several."""
    rows, shared = split(noise)
    if not jax.tree.leaves(rows):
        return fn(noise)
    return jax.vmap(lambda r: fn(eqx.combine(r, shared)))(rows)


@every_model
def test_matrix_is_the_covariance_of_the_definition(make, covariance):
    noise, size = make(), covariance.shape[-1]
    assert row_counts(noise) == ({N} if covariance.ndim == 3 else set())
    matrix = jax.jit(lambda noise: per_observation(noise, lambda one: one.as_matrix(size)))(noise)
    np.testing.assert_allclose(matrix, covariance, atol=1e-5)
    variances = per_observation(noise, lambda one: one.variances(size))
    np.testing.assert_allclose(variances, np.diagonal(covariance, 0, -2, -1), atol=1e-5)


@every_model
def test_products_are_those_of_the_matrix(make, covariance, rng):
    v = rng.normal(size=covariance.shape[-1])
    result = per_observation(make(), lambda one: one.mv(jnp.asarray(v, jnp.float32)))
    np.testing.assert_allclose(result, covariance @ v, atol=2e-5)


@every_model
def test_draws_have_the_covariance_of_the_observed_entries(make, covariance):
    noise, size = make(), covariance.shape[-1]
    keys = jax.random.split(jax.random.key(5), DRAWS)
    draw = jax.jit(
        lambda noise: per_observation(
            noise, lambda one: jax.vmap(lambda k: one.sample(k, size))(keys)
        )
    )
    draws = np.asarray(draw(noise), float)
    seen = np.asarray(per_observation(noise, lambda one: one.observed(size)))
    expect = covariance * seen[..., :, None] * seen[..., None, :]
    variance = np.diagonal(expect, axis1=-2, axis2=-1)
    # The variance of an entry of the sample second moment of Gaussians is (Σᵢᵢ Σⱼⱼ + Σᵢⱼ²) / draws.
    error = np.sqrt((variance[..., :, None] * variance[..., None, :] + expect**2) / DRAWS)
    moment = np.swapaxes(draws, -1, -2) @ draws / DRAWS
    assert np.all(np.abs(moment - expect) <= 4.5 * error)
    assert np.all(np.abs(draws.mean(-2)) <= 4.5 * np.sqrt(variance / DRAWS))


@pytest.mark.parametrize("name", ["masked-rows", "masked-shared", "joint"])
def test_missing_entries_are_zero_in_draws_and_decoupled_in_the_matrix(name):
    make, covariance = MODELS[name]
    noise, size = make(), covariance.shape[-1]
    seen = np.asarray(per_observation(noise, lambda one: one.observed(size)))
    missing = seen == 0
    draws = np.asarray(per_observation(noise, lambda one: one.sample(jax.random.key(0), size)))
    matrix = np.asarray(per_observation(noise, lambda one: one.as_matrix(size)))
    assert missing.any()
    assert np.all(draws[np.broadcast_to(missing, draws.shape)] == 0)
    for index in np.argwhere(np.broadcast_to(missing, matrix.shape[:-1])):
        np.testing.assert_array_equal(matrix[tuple(index)], np.eye(size)[index[-1]])


def test_observed_is_one_without_a_mask_and_concatenates():
    np.testing.assert_array_equal(IsotropicNoise(1.0).observed(3), np.ones(3))
    expect = np.concatenate([MASK, np.ones((N, 2))], axis=1)
    np.testing.assert_array_equal(per_observation(joint(), lambda one: one.observed(6)), expect)


@every_model
def test_observed_entries_are_those_of_every_observation(make, covariance):
    noise, size = make(), covariance.shape[-1]
    expect = np.atleast_2d(per_observation(noise, lambda one: one.observed(size)))
    np.testing.assert_array_equal(observed_entries(noise, size), expect)


@every_model
def test_chi2_is_that_of_the_matrix(make, covariance, rng):
    """Of the observed entries of what is left of observations of nothing."""
    noise, size = make(), covariance.shape[-1]
    observed = np.broadcast_to(observed_entries(noise, size), (N, size))
    y = observed * rng.normal(size=(N, size))
    nothing = {"x": jnp.zeros(size)}
    of = lambda one, y: whitened_chi2(Observations(y, {"x": Identity((size,))}, one), nothing)
    chi2, count = [], []
    for i in range(N):
        found = of(take(noise, i) if row_counts(noise) else noise, jnp.asarray(y[i], jnp.float32))
        chi2.append(found[0])
        count.append(found[1])
    expect = [
        r @ np.linalg.solve(c, r)
        for r, c in zip(y, np.broadcast_to(covariance, (N, size, size)), strict=True)
    ]
    np.testing.assert_allclose(chi2, expect, rtol=1e-4)
    np.testing.assert_array_equal(count, observed.sum(axis=1))


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_chi2_is_the_same_in_all_units(unit, rng):
    """Of observations some of which are known a million times better than others."""
    std = unit * np.logspace(0, 3, 300)
    y = jnp.asarray(std * rng.normal(size=300), jnp.float32)
    obs = Observations(y, {"x": Identity((300,))}, DiagonalNoise(jnp.asarray(std**2, jnp.float32)))
    chi2, _ = whitened_chi2(obs, {"x": jnp.zeros(300)})
    np.testing.assert_allclose(chi2, np.sum((np.asarray(y, float) / std) ** 2), rtol=1e-5)


def test_masking_marginalises_correlated_noise(rng):
    mask, y = MASK[0].astype(bool), rng.normal(size=M)
    one = take(Masked(DenseNoise(COVARIANCE), MASK), 0)
    matrix = np.asarray(one.as_matrix(M), float)
    sub = COVARIANCE[0][np.ix_(mask, mask)]
    quadratic = (mask * y) @ np.linalg.solve(matrix, mask * y)
    np.testing.assert_allclose(quadratic, y[mask] @ np.linalg.solve(sub, y[mask]), rtol=1e-4)
    np.testing.assert_allclose(np.linalg.slogdet(matrix)[1], np.linalg.slogdet(sub)[1], atol=1e-5)


def test_views_of_a_joint_draw_are_independent_of_each_other():
    noise = JointNoise((IsotropicNoise(1.0), IsotropicNoise(1.0)), (M, M))
    draw = noise.sample(jax.random.key(3), 2 * M)
    assert not np.any(np.isclose(draw[:M], draw[M:]))


def test_parameters_are_differentiable():
    trace = lambda noise: jnp.trace(noise.as_matrix(M))
    gradient = eqx.filter_grad(trace)(LowRankNoise(FACTOR[0], VARIANCE[0]))
    np.testing.assert_allclose(gradient.factor, 2 * FACTOR[0], rtol=1e-5)
    np.testing.assert_allclose(gradient.variance, np.ones(M))


def stationary_view(covariance):
    noise = StationaryNoise(covariance)
    return View(np.zeros((2, 3, 4)), {"a": Identity((3, 4))}, noise, name="sky")


def test_the_grid_of_stationary_noise_is_that_of_the_view():
    found = (
        View(np.zeros((2, 3, 4)), {"a": Identity((3, 4))}, StationaryNoise(GRID_LAGS, ndim=2))
        .prepare()
        .noise
    )
    assert found.shape == (3, 4)
    with pytest.raises(ShapeError, match=r"grid of shape \(4, 3\)"):
        noise = StationaryNoise(GRID_LAGS, shape=(4, 3), ndim=2)
        View(np.zeros((2, 3, 4)), {"a": Identity((3, 4))}, noise).prepare()


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        ([[0.1, 1, 0.3]], "opposite lags"),
        ([[0.7, 1.0, 0.7]], "not positive definite"),
        ([[0.1, np.nan, 0.1]], "NaN"),
    ],
)
def test_a_covariance_that_is_none_is_said(covariance, message):
    with pytest.raises(DataError, match=message):
        stationary_view(np.array(covariance)).prepare()


@pytest.mark.parametrize("options", [{}, {"ndim": 0}, {"ndim": 3}])
def test_an_even_number_of_lags_has_no_middle(options):
    with pytest.raises(ShapeError, match="odd numbers of lags"):
        StationaryNoise(np.ones((3, 4)), **options)


def test_stationary_noise_from_a_file(tmp_path):
    np.savez(tmp_path / "data.npz", y=np.zeros((5, 3, 4)), lags=GRID_LAGS)
    (tmp_path / "p.yaml").write_text(
        "sources: {a: [3, 4]}\nviews:\n  sky:\n    observations: data.npz:y\n"
        "    operators: {a: {block_project: {factor: 2, axes: [1]}}}\n"
        "    noise: {stationary: {covariance: data.npz:lags, ndim: 2}}\n"
    )
    view = load_problem(tmp_path / "p.yaml")[0].views[0]
    np.testing.assert_allclose(
        view.noise_model.as_matrix(12),
        StationaryNoise(GRID_LAGS, shape=(3, 4), ndim=2).as_matrix(12),
    )
    assert isinstance(view.operators["a"], BlockProject)
