"""The preconditioner against dense inverses, and what it saves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.inference.posterior import MatrixFreePosterior
from dichroic.inference.woodbury import approximate_inverse
from dichroic.numerics.batching import split
from dichroic.operators import Convolve, Dense, Diagonal, Identity, Scale
from dichroic.operators.noise import DiagonalNoise, IsotropicNoise, Masked
from dichroic.priors import CustomDenoiser, GaussianMixture
from dichroic.problem.observations import Observations

D, RANK, ROWS = 24, 3, 4


def low_rank(seed, size=5.0, kinds=1):
    """`kinds` Gaussians of three wide directions above a floor, about means of their own."""
    rng = np.random.default_rng(seed)
    basis = np.stack([np.linalg.qr(rng.normal(size=(D, RANK)))[0] for _ in range(kinds)])
    variances, means = np.full((kinds, RANK), size**2), 3 * rng.normal(size=(kinds, D))
    return GaussianMixture(
        np.full(kinds, -np.log(kinds)), means, basis, variances, np.full(kinds, 0.1), (D,)
    )


def observations(kind, rng):
    """Of two sources, one row for each of four; noise far below the sources."""
    y, std = rng.normal(size=(ROWS, D)), rng.uniform(0.02, 0.3, size=(ROWS, D))
    mask = (rng.uniform(size=(ROWS, D)) < 0.7).astype(float)
    if kind == "shared":
        return Observations(y, {"a": Identity(D), "b": Scale(D, 0.5)}, IsotropicNoise(0.05))
    if kind == "masked":
        gains = Diagonal(rng.uniform(0.5, 2, size=(ROWS, D)), shape=D)
        return Observations(
            mask * y, {"a": Identity(D), "b": gains}, Masked(DiagonalNoise(std**2), mask)
        )
    if kind == "per observation":
        rotations = np.linalg.qr(rng.normal(size=(ROWS, D, D)))[0]
        return Observations(y, {"a": Dense(rotations), "b": Identity(D)}, IsotropicNoise(std[:, 0]))
    kernels = Convolve(np.abs(rng.normal(size=(ROWS, 3))), shape=D)
    return Observations(mask * y, {"a": kernels, "b": kernels}, Masked(IsotropicNoise(0.05), mask))


EXACT = ["shared", "masked", "per observation"]
SIGMA = {"a": jnp.array(0.7), "b": jnp.array(0.4)}


def over_rows(obs, fn):
    rows, shared = split(obs)
    return jax.jit(jax.vmap(lambda row: fn(eqx.combine(row, shared))))(rows)


def both(priors):
    """A function of one observation: `C_y` and the approximation of its inverse, as matrices."""

    def matrices(obs):
        given = {k: p.moments(jnp.ones(p.shape), SIGMA[k]) for k, p in priors.items()}
        back = lambda v: {k: given[k].covariance(u.ravel()) for k, u in obs.adjoint(v).items()}
        cov = lambda v: obs.noise.mv(v) + obs.apply(back(v))
        inverse = approximate_inverse(obs, given)
        return jax.vmap(cov)(jnp.eye(D)), jax.vmap(inverse)(jnp.eye(D))

    return matrices


@pytest.mark.parametrize("kind", EXACT)
def test_the_inverse_is_exact_for_low_rank_and_orthogonal_rows(kind, rng, x64):
    priors = {"a": low_rank(0), "b": low_rank(1)}
    cov, inverse = over_rows(observations(kind, rng), both(priors))
    np.testing.assert_allclose(cov @ inverse, np.tile(np.eye(D), (ROWS, 1, 1)), atol=1e-8)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_it_stays_positive_definite_where_rounding_takes_all(size, rng):
    """In single precision, with variances 10⁷ and 10¹¹ times those of the noise."""
    priors = {"a": low_rank(0, size), "b": low_rank(1, size)}
    _, inverse = over_rows(observations("masked", rng), both(priors))
    inverse = np.asarray(inverse, np.float64)
    np.testing.assert_allclose(
        inverse, inverse.swapaxes(1, 2), rtol=1e-3, atol=1e-4 * inverse.max()
    )
    assert np.linalg.eigvalsh(0.5 * (inverse + inverse.swapaxes(1, 2))).min() > 0


def solved(priors, obs, **options):
    x_t = {k: jnp.ones(p.shape) for k, p in priors.items()}
    return over_rows(
        obs, lambda one: MatrixFreePosterior(priors, one, 1e-5, 400, **options)(x_t, SIGMA)
    )


def stationary(fn):
    return CustomDenoiser(fn, shape=D, spectrum=np.geomspace(30, 0.01, D))


PRIORS = {
    "low rank": {"a": low_rank(0), "b": low_rank(1)},
    "mixtures": {"a": low_rank(0, kinds=3), "b": low_rank(1, kinds=2)},
    "function": {
        "a": stationary(
            lambda x, s: jax.scipy.fft.idct(
                jax.scipy.fft.dct(x, norm="ortho") / (1 + s**2 / np.geomspace(30, 0.01, D)),
                norm="ortho",
            )
        ),
        "b": low_rank(1),
    },
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("low rank", k) for k in (*EXACT, "blurred")),
        ("mixtures", "masked"),
        ("function", "masked"),
    ],
)
def test_the_solution_is_that_without_it_in_fewer_steps(name, kind, rng, x64):
    obs = observations(kind, rng)
    plain, fast = (solved(PRIORS[name], obs, precondition=p) for p in (False, True))
    assert np.all(plain.effort.converged) and np.all(fast.effort.converged)
    for k in ("a", "b"):
        np.testing.assert_allclose(fast.mean[k], plain.mean[k], atol=2e-3)
    saved = plain.effort.steps.sum() / fast.effort.steps.sum()
    assert saved > (1.15 if kind == "blurred" else 1.8)
    if name == "low rank" and kind != "blurred":
        assert np.all(fast.effort.steps <= 2)
