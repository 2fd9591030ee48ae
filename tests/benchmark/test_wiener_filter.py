"""The Wiener filter of the data's own moments against sample moments and analytic posteriors."""

import numpy as np
import pytest

from dichroic import Problem, Source, View
from dichroic.benchmark.baselines import WienerFilter
from dichroic.benchmark.baselines.wiener_filter import moments_of
from dichroic.errors import DataError
from dichroic.operators import Dense, Identity, Scale
from dichroic.operators.noise import DiagonalNoise, IsotropicNoise, Masked
from dichroic.problem.observations import Observations

NOISE, DIM = 0.5, 4


def root(rng, dim=DIM, rank=DIM):
    """Orthogonal columns of lengths 1 to 2."""
    return np.linalg.qr(rng.normal(size=(dim, rank)))[0] * np.linspace(1, 2, rank)


def contrastive(rng, alone, mixed, rank=DIM, **options):
    """`a` alone and `a + b` with noise, as they are; `(problem, alone, mixed, b)`."""
    draw = lambda r, m, n: m + rng.normal(size=(n, r.shape[1])) @ r.T
    a, b, eye = root(rng), root(rng, rank=rank), Identity((DIM,))
    signal = draw(b, -2.0, mixed)
    y1, y2 = draw(a, 1.0, alone), draw(a, 1.0, mixed) + signal
    y1, y2 = ((y + NOISE * rng.normal(size=y.shape)).astype(np.float32) for y in (y1, y2))
    views = [View(y1, {"a": eye}, NOISE, name="alone")]
    views += [View(y2, {"a": eye, "b": eye}, NOISE, name="mixed", **options)]
    problem = Problem([Source("a", (DIM,)), Source("b", (DIM,))], views)
    return problem, y1.astype(float), y2.astype(float), signal


def learned(model, name):
    prior = model.denoisers[name]
    return np.asarray(prior.location, float).ravel(), np.asarray(prior.covariances()[0], float)


def test_two_views_give_the_differences_of_their_sample_moments(rng):
    problem, y1, y2, _ = contrastive(rng, 300, 500)
    model = WienerFilter(problem).fit(progress=False)
    (mean_a, cov_a), (mean_b, cov_b) = learned(model, "a"), learned(model, "b")
    difference = np.cov(y2.T) - np.cov(y1.T)
    assert np.linalg.eigvalsh(difference)[0] > 0
    np.testing.assert_allclose(mean_a, y1.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(mean_b, y2.mean(axis=0) - y1.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(cov_a, np.cov(y1.T) - NOISE**2 * np.eye(DIM), atol=1e-4)
    np.testing.assert_allclose(cov_b, difference, atol=1e-4)


def test_negative_eigenvalues_of_the_difference_are_zero(rng):
    problem, y1, y2, _ = contrastive(rng, 30, 400, rank=1)
    values, vectors = np.linalg.eigh(np.cov(y2.T) - np.cov(y1.T))
    assert values[0] < -0.1
    expect = (vectors * np.maximum(values, 0)) @ vectors.T
    _, cov = learned(WienerFilter(problem).fit(progress=False), "b")
    np.testing.assert_allclose(cov, expect, atol=1e-4)


def test_draws_follow_the_filter_of_the_two_covariances(rng):
    """Mean `μ_b + C_b (C_b + cov(y₁))⁻¹ (y₂ − mean(y₂))`; `(x − m)ᵀ V⁻¹ (x − m)` is D ± √(2 D / n) on average."""
    n = 2000
    problem, y1, y2, _ = contrastive(rng, 1000, n)
    found = WienerFilter(problem).fit(progress=False).separate("mixed", seed=1)
    cov = np.cov(y2.T) - np.cov(y1.T)
    gain = cov @ np.linalg.inv(cov + np.cov(y1.T))
    mean = y2.mean(axis=0) - y1.mean(axis=0) + (y2 - y2.mean(axis=0)) @ gain.T
    r = found.draws["b"][0] - mean
    chi2 = np.einsum("ni,ij,nj->n", r, np.linalg.inv(cov - gain @ cov), r)
    assert abs(chi2.mean() - DIM) < 5 * np.sqrt(2 * DIM / n)
    assert abs(found.chi2.mean() - 1) < 5 * np.sqrt(2 / (n * DIM))


def test_observations_that_are_held_out_are_left_out(rng):
    held = np.arange(400) >= 300
    problem, y1, y2, _ = contrastive(rng, 300, 400, held_out=held)
    mean, cov = learned(WienerFilter(problem).fit(progress=False), "b")
    y2 = y2[~held]
    np.testing.assert_allclose(mean, y2.mean(axis=0) - y1.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(cov, np.cov(y2.T) - np.cov(y1.T), atol=1e-4)


def test_shared_operators_are_inverted(rng, x64):
    """`y = A x + η` with a square `A`: `C = A⁻¹ (cov(y) − Σ) A⁻ᵀ`."""
    a, variance = np.eye(3) + 0.3 * rng.normal(size=(3, 3)), np.array([0.1, 0.2, 0.3])
    y = 2 + rng.normal(size=(200, 3)) @ root(rng, 3, 3).T @ a.T
    obs = Observations(y, {"x": Dense(a)}, DiagonalNoise(variance))
    mean, cov = moments_of([obs])["x"]
    back = np.linalg.inv(a)
    np.testing.assert_allclose(mean, back @ y.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(cov, back @ (np.cov(y.T) - np.diag(variance)) @ back.T, atol=1e-4)


def test_observations_one_by_one_are_as_all_together(rng, x64):
    """The same operators and noise, once stated for each observation."""
    n, a, b = 150, rng.normal(size=(3, 2)), rng.normal(size=(3, 3))
    y1, y2 = rng.normal(size=(n, 3)), 3 * rng.normal(size=(n, 3))
    each = lambda m: Dense(np.broadcast_to(m, (n, *m.shape)).copy())
    shared = [Observations(y1, {"a": Dense(a)}, IsotropicNoise(0.3))]
    shared += [Observations(y2, {"a": Dense(a), "b": Dense(b)}, IsotropicNoise(0.3))]
    own = [Observations(y1, {"a": each(a)}, IsotropicNoise(np.full(n, 0.3)))]
    own += [Observations(y2, {"a": each(a), "b": each(b)}, IsotropicNoise(np.full(n, 0.3)))]
    one, other = moments_of(shared), moments_of(own)
    for k in ("a", "b"):
        for x, y in zip(one[k], other[k], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("kind", ["projections", "missing", "noise"])
def test_moments_from_observations_that_differ(kind, rng):
    """Errors a few times those of complete data, √(2 / n) of the covariance."""
    n, r = 6000, root(rng, rank=2)
    x = 1 + rng.normal(size=(n, 2)) @ r.T
    a = rng.normal(size=(n, 3, DIM)) if kind == "projections" else np.eye(DIM)[None]
    std = rng.uniform(0.02, 1.0, n) if kind == "noise" else np.full(n, 0.1)
    y = np.einsum("nmd,nd->nm", np.broadcast_to(a, (n, *a.shape[1:])), x)
    y = y + std[:, None] * rng.normal(size=y.shape)
    noise = IsotropicNoise(std)
    if kind == "missing":
        seen = rng.uniform(size=y.shape) < 0.6
        y, noise = np.where(seen, y, 0), Masked(noise, seen)
    operator = Dense(a) if kind == "projections" else Identity((DIM,))
    mean, cov = moments_of([Observations(y, {"x": operator}, noise)])["x"]
    error, size = np.linalg.norm(cov - r @ r.T), np.linalg.norm(r @ r.T)
    assert error < 4 * np.sqrt(2 / n) * size
    np.testing.assert_allclose(mean, 1.0, atol=5 * np.sqrt(np.sum(r**2) / n))


def test_what_no_observation_sees_has_the_variance_of_the_rest(rng, x64):
    y = rng.normal(size=(500, DIM)) * 2
    seen = np.arange(DIM) != 2
    obs = Observations(y * seen, {"x": Identity((DIM,))}, Masked(IsotropicNoise(0.1), seen))
    mean, cov = moments_of([obs])["x"]
    expect = np.cov(y[:, seen].T) - 0.01 * np.eye(DIM - 1)
    np.testing.assert_allclose(cov[np.ix_(seen, seen)], expect, atol=1e-6)
    np.testing.assert_allclose(cov[2, seen], 0, atol=1e-9)
    assert cov[2, 2] == pytest.approx(4.0, rel=0.2)
    assert abs(mean[2]) < 1e-9


def test_views_of_different_scales(rng, x64):
    """`b` is seen through a hundredth: its covariance is ten thousand times the difference."""
    y1, y2 = rng.normal(size=(400, 3)), 2 * rng.normal(size=(400, 3))
    eye = Identity((3,))
    views = [Observations(y1, {"a": eye}, IsotropicNoise(0.1))]
    views += [Observations(y2, {"a": eye, "b": Scale(3, 0.01)}, IsotropicNoise(0.1))]
    _, cov = moments_of(views)["b"]
    np.testing.assert_allclose(cov, 1e4 * (np.cov(y2.T) - np.cov(y1.T)), rtol=1e-4, atol=0.1)


def test_a_finished_model_is_loaded(rng, tmp_path):
    problem, *_ = contrastive(rng, 100, 100)
    model = WienerFilter(problem).fit(tmp_path / "a", progress=False)
    loaded = WienerFilter.load(tmp_path / "a", problem=problem)
    one, two = (m.separate("mixed", seed=5).draws["b"] for m in (model, loaded))
    np.testing.assert_array_equal(one, two)


def test_sources_of_too_many_entries_are_refused():
    view = View(np.ones((2, 5000)), {"x": Identity((5000,))}, 0.1)
    with pytest.raises(DataError, match="'x' has 5,000 entries"):
        WienerFilter(Problem([Source("x", (5000,))], [view]))
