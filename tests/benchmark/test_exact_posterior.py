"""The exact posterior on known curves: against brute force, Laplace's formula and its own calibration."""

import numpy as np
import pytest
from scipy.ndimage import label
from scipy.spatial import KDTree

from dichroic.benchmark.problems import exact_posterior
from dichroic.benchmark.problems.exact_posterior import (
    images,
    limit_draws,
    partition,
    quadrature_draws,
)
from dichroic.benchmark.problems.manifolds import manifold_curves, manifold_problem, observe
from dichroic.errors import DataError, ShapeError
from dichroic.metrics import coverage, psnr, rank_histogram
from dichroic.operators import Dense, Identity
from dichroic.problem.view import View


def simulate(sources, n, *, noise, seed=0, obs=3, f=1.0):
    """Curves, `y`, effective matrices `(n, S, M, D)`, and true coordinates `(n, S)` and points."""
    curves = manifold_curves(seed, sources)
    rng = np.random.default_rng([7, seed])
    s = rng.uniform(size=(n, sources))
    x = np.stack([curve(s[:, k]) for k, curve in enumerate(curves)], axis=1)
    f = np.full(sources, f)
    y, a = observe(rng, x, f, obs=obs, noise=noise, per_source=True)
    return curves, y, f[:, None, None] * a, s, x


def brute_force(curves, y, a, noise, points):
    """Probabilities at the midpoints of a grid of `points` per source, the points, and `log p(y)`."""
    s = (np.arange(points) + 0.5) / points
    x = [curve(s) for curve in curves]
    mean = np.zeros((1,) * len(x) + (len(y),))
    for k, (xk, ak) in enumerate(zip(x, a, strict=True)):
        mean = mean + np.expand_dims(xk @ ak.T, [j for j in range(len(x)) if j != k])
    log = -0.5 * np.sum((y - mean) ** 2, axis=-1) / noise**2
    top = log.max()
    p = np.exp(log - top)
    evidence = top + np.log(p.mean()) - len(y) / 2 * np.log(2 * np.pi * noise**2)
    return p / p.sum(), x, evidence


def features(x):
    """Smooth functions of points `(n, D)`, which tell modes apart: `(n, 4 D)`."""
    return np.concatenate([x, x**2, np.sin(3 * x), np.cos(3 * x)], axis=1)


def assert_mean(samples, mean, square):
    """Samples `(n, …)` have the given mean, and mean square."""
    error = 4.5 * np.sqrt(np.maximum(square - mean**2, 1e-12) / len(samples))
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - mean), error)


def assert_draws_follow(draws, p, x):
    """Draws `(n, S, D)` are of the points `x` with probabilities `p`: each source, and each pair."""
    sources = draws.shape[1]
    for k in range(sources):
        pk = p.sum(axis=tuple(j for j in range(sources) if j != k))
        phi = features(x[k])
        assert_mean(features(draws[:, k]), pk @ phi, pk @ phi**2)
    for k, j in [(0, 1), (0, 2), (1, 2)][: sources * (sources - 1) // 2]:
        pair = p.sum(axis=tuple(l for l in range(sources) if l not in (k, j)))
        one, two = features(x[k]), features(x[j])
        seen = np.einsum("na,nb->nab", features(draws[:, k]), features(draws[:, j]))
        assert_mean(seen, one.T @ pair @ two, (one**2).T @ pair @ two**2)


CASES = [(1, 3, 0.02, 200_000), (1, 1, 0.05, 200_000), (2, 3, 0.1, 1500), (2, 1, 0.1, 1500)]
CASES += [(2, 5, 0.05, 2500), (3, 3, 0.3, 128), (3, 4, 0.3, 128)]


@pytest.mark.parametrize(("sources", "obs", "noise", "points"), CASES)
def test_draws_and_evidence_are_those_of_brute_force(sources, obs, noise, points):
    n = 3
    curves, y, a, _, _ = simulate(sources, n, noise=noise, seed=obs, obs=obs)
    found = quadrature_draws(curves, y, a, noise, n_draws=3000, levels=12, width=0.5)
    assert found.draws.shape == (3000, n, sources, 5)
    assert np.all(found.lost < 1e-5)
    assert np.all(found.acceptance > 0.1)
    for i in range(n):
        p, x, evidence = brute_force(curves, y[i], a[i], noise, points)
        assert abs(found.log_evidence[i] - evidence) < (6e-3 if obs >= sources else 0.03)
        assert_draws_follow(found.draws[:, i], p, x)


@pytest.mark.parametrize("options", [{"levels": 7}, {"max_boxes": 100}, {"width": 10.0}])
def test_draws_are_exact_where_boxes_are_large(options):
    """Only the share of proposals accepted depends on the boxes."""
    noise = 0.1
    curves, y, a, _, _ = simulate(2, 2, noise=noise, seed=4)
    found = quadrature_draws(curves, y, a, noise, n_draws=3000, **options)
    fine = quadrature_draws(curves, y, a, noise, levels=12)
    assert np.all(found.acceptance < fine.acceptance)
    for i in range(2):
        p, x, _ = brute_force(curves, y[i], a[i], noise, 1500)
        assert_draws_follow(found.draws[:, i], p, x)


def test_the_bounds_hold_within_every_box_and_boxes_are_apart():
    curves, y, a, _, _ = simulate(2, 1, noise=0.05)
    knots = np.linspace(0, 1, 2**9 + 1)
    bends = np.stack([c.bend() for c in curves]) / 4**9 / 8
    points = np.stack([c(knots) for c in curves])
    boxes, _ = partition(
        y[0] / 0.05, images(points, bends, a[0] / 0.05), width=2.0, max_boxes=10**6
    )
    size = 2.0 ** np.floor(np.log2(boxes.nodes))
    np.testing.assert_allclose(boxes.volume, -np.log(size).sum(axis=1))
    at = lambda u: (boxes.nodes + u) / size - 1
    for seed in range(20):
        s = at(np.random.default_rng(seed).uniform(size=boxes.nodes.shape))
        log = exact_posterior._fit(curves, y[0] / 0.05, a[0] / 0.05, s)
        assert np.all(log <= boxes.upper)
    log = exact_posterior._fit(curves, y[0] / 0.05, a[0] / 0.05, at(0.5))
    # The middle of a smallest interval is that of its chord: off by `bends` in a direction.
    np.testing.assert_allclose(log, boxes.centre, rtol=1e-3, atol=1e-2)
    # No box contains the centre of another.
    inside = np.all(np.abs(at(0.5)[:, None] - at(0.5)) * size < 0.5, axis=2)
    np.testing.assert_array_equal(inside, np.eye(len(inside), dtype=bool))


def test_the_bound_on_the_bend_of_a_curve_holds_and_is_not_loose():
    h = 1e-4
    s = np.linspace(h, 1 - h, 20_001)
    for curve in manifold_curves(3, 3):
        second = (curve(s + h) - 2 * curve(s) + curve(s - h)) / h**2
        assert np.all(np.abs(second).max(axis=0) <= curve.bend() * (1 + 1e-4))
        assert np.all(np.abs(second).max(axis=0) > 0.1 * curve.bend())


def test_one_source_with_little_noise_has_the_width_and_evidence_of_laplace():
    """`s | y ≈ N(ŝ, σ² / ‖A x'‖²)`, `log p(y) ≈ −‖r‖²/2σ² + log(√(2π) σ / ‖A x'‖) − M log(√(2π) σ)`."""
    noise, n, n_draws = 1e-3, 6, 2000
    curves, y, a, s, _ = simulate(1, n, noise=noise, seed=2, obs=5)
    s = s[:, 0]
    image = lambda s: np.einsum("nmd,nd->nm", a[:, 0], curves[0](s))
    for _ in range(5):  # Gauss-Newton from the truth
        slope = (image(s + 1e-6) - image(s - 1e-6)) / 2e-6
        s = s + np.sum(slope * (y - image(s)), axis=1) / np.sum(slope**2, axis=1)
    speed = np.linalg.norm(slope, axis=1)
    tangent = (curves[0](s + 1e-6) - curves[0](s - 1e-6)) / 2e-6
    found = quadrature_draws(curves, y, a, noise, n_draws=n_draws, width=0.25)
    along = np.einsum("knd,nd->kn", found.draws[:, :, 0] - curves[0](s), tangent)
    z = along / np.sum(tangent**2, axis=1) * speed / noise
    assert np.all(np.abs(z.mean(axis=0)) < 4.5 / n_draws**0.5 + 0.02)
    assert np.all(np.abs(z.std(axis=0) - 1) < 4.5 / (2 * n_draws) ** 0.5 + 0.02)
    root = np.sqrt(2 * np.pi) * noise
    r = (y - image(s)) / noise
    expect = -0.5 * np.sum(r**2, axis=1) + np.log(root / speed) - 5 * np.log(root)
    np.testing.assert_allclose(found.log_evidence, expect, atol=0.01)


@pytest.mark.parametrize(("sources", "n", "noise"), [(1, 600, 0.1), (2, 400, 0.1), (3, 120, 0.2)])
def test_the_truth_ranks_like_a_draw_and_residuals_are_noise(sources, n, noise):
    """Truth and draws are exchangeable: uniform ranks, and `E ‖y − Σ_β A_β x_β‖²/σ² = M`, of draws too."""
    n_draws, bins = 19, 5
    curves, y, a, _, x = simulate(sources, n, noise=noise, seed=11)
    found = quadrature_draws(curves, y, a, noise, n_draws=n_draws, levels=10, width=2.0)
    chi2 = np.sum((y - np.einsum("nsmd,knsd->knm", a, found.draws)) ** 2, axis=2) / noise**2
    assert abs(chi2[0].mean() - 3) < 4.5 * np.sqrt(2 * 3 / n)
    rank = np.sum(found.draws < x, axis=0)  # 0 … n_draws
    for k in range(sources):
        for d in range(5):
            counts = np.bincount(rank[:, k, d] * bins // (n_draws + 1), minlength=bins)
            fit = np.sum((counts - n / bins) ** 2) / (n / bins)
            assert fit < 22, "χ² with 4 degrees of freedom: 2e-4 by chance"


def test_weights_and_matrices_are_each_source_its_own():
    """A source with a matrix of zeros is drawn from its prior, whatever the other one is."""
    noise = 0.02
    curves, y, a, _, _ = simulate(1, 2, noise=noise, seed=6)
    both = manifold_curves(6, 2)
    a = np.stack([np.zeros_like(a[:, 0]), a[:, 0]], axis=1)
    found = quadrature_draws([both[1], curves[0]], y, a, noise, n_draws=2000, width=0.5)
    prior = both[1](np.linspace(0, 1, 100_001))
    free = found.draws[:, :, 0]
    assert np.all(np.abs(free.mean(axis=0) - prior.mean(axis=0)) < 4.5 * prior.std() / 2000**0.5)
    alone = quadrature_draws(curves, y, a[:, 1:], noise, width=0.5)
    np.testing.assert_allclose(found.log_evidence, alone.log_evidence, atol=6e-3)


def test_draws_are_points_of_the_curves_and_reproducible():
    curves, y, a, _, _ = simulate(2, 3, noise=0.1)
    options = {"n_draws": 4, "levels": 11}
    draws = quadrature_draws(curves, y, a, 0.1, seed=5, **options).draws
    fewer = quadrature_draws(curves, y[:2], a[:2], 0.1, seed=5, **options).draws
    np.testing.assert_array_equal(draws[:, :2], fewer)
    assert not np.any(draws == quadrature_draws(curves, y, a, 0.1, seed=6, **options).draws)
    for k, curve in enumerate(curves):
        grid = curve(np.linspace(0, 1, 20_001))
        step = np.linalg.norm(np.diff(grid, axis=0), axis=1).max()
        near = np.linalg.norm(draws[:, :, k, None] - grid, axis=-1).min(axis=-1)
        assert near.max() <= step


@pytest.mark.parametrize(
    ("options", "low"),
    [
        ({}, {"source1": 50, "source2": 50}),
        ({"f_mix": 0.1}, {"source1": 26, "source2": 47}),
        ({"per_source": True}, {"source1": 50, "source2": 50}),
    ],
)
def test_the_limit_of_a_problem_is_high_for_every_source(options, low):
    """40 observations spread by about 12 dB: the mean is within 9 of what many more give (53 and 34)."""
    problem = manifold_problem(seed=1000, problem_seed=0, count=40, **options)
    view = problem.views[1]
    draws = limit_draws(view, manifold_curves(0, 2), n_draws=2)
    assert set(draws) == set(low)
    for name, x in draws.items():
        assert x.shape == (2, 40, 5)
        assert low[name] < psnr(x[0], view.truth[name], data_range=4) < 62
    residual = view.observations - sum(
        np.einsum("nmd,nd->nm", view.operators[k].matrix, x[0]) for k, x in draws.items()
    )
    assert abs(np.mean(residual**2) / 0.01**2 - 1) < 4.5 * np.sqrt(2 / residual.size)


def test_a_view_sees_its_sources_only_and_may_share_a_matrix():
    curves = manifold_curves(2, 3)
    view = manifold_problem(seed=2, sources=3, count=5).views[0]
    draws = limit_draws(view, curves, seed=3)
    assert {k: x.shape for k, x in draws.items()} == {"source1": (1, 5, 5)}
    x = curves[1](np.array([0.3, 0.6]))
    shared = View(x, {"source2": Dense(np.eye(5))}, 0.01)
    one = limit_draws(shared, curves)["source2"]
    assert np.abs(one[0] - x).max() < 0.05


def test_what_does_not_fit_is_said():
    curves, y, a, _, _ = simulate(2, 3, noise=0.1)
    for bad in [
        (y[0], a),
        (y[:2], a),
        (y, a[:, :1]),
        (y[:, :2], a),
        (y, a[..., :4]),
        (y[:0], a[:0]),
    ]:
        with pytest.raises(ShapeError, match=r"expected \(n, M\)"):
            quadrature_draws(curves, *bad, 0.1)
    with pytest.raises(ShapeError, match="one dimension"):
        quadrature_draws([curves[0], manifold_curves(0, 1, dim=4)[0]], y, a, 0.1)
    with pytest.raises(DataError, match="finite"):
        quadrature_draws(curves, np.full_like(y, np.nan), a, 0.1)
    for noise in (0.0, np.inf):
        with pytest.raises(DataError, match="standard deviation"):
            quadrature_draws(curves, y, a, noise)
    for options in ({"n_draws": 0}, {"levels": 0}, {"width": 0.0}):
        with pytest.raises(DataError, match="need n_draws"):
            quadrature_draws(curves, y, a, 0.1, **options)


def test_intervals_that_are_too_wide_are_said(monkeypatch):
    monkeypatch.setattr(exact_posterior, "_TRIALS", 1000)
    curves, y, a, _, _ = simulate(2, 1, noise=1e-4)
    with pytest.raises(DataError, match="more levels"):
        quadrature_draws(curves, y, a, 1e-4, levels=2)


def test_a_view_of_another_kind_is_refused():
    curves = manifold_curves(0, 1)
    y = np.zeros((2, 5), np.float32)
    eye = Dense(np.eye(5))
    with pytest.raises(DataError, match="1 curves"):
        limit_draws(View(y, {"source2": eye}, 0.1), curves)
    with pytest.raises(DataError, match="no mask"):
        limit_draws(View(y, {"source1": eye}, 0.1, mask=np.ones(5)), curves)
    with pytest.raises(DataError, match="Dense"):
        limit_draws(View(y, {"source1": Identity(5)}, 0.1), curves)


def modes_of(draws, p, x):
    """The islands where `p` exceeds 1e-6 of its peak: their probabilities, and shares of `draws`."""
    islands, count = label(p > 1e-6 * p.max())
    cell = tuple(KDTree(xk).query(draws[:, k])[1] for k, xk in enumerate(x))
    exact = np.bincount(islands.ravel(), weights=p.ravel(), minlength=count + 1)
    return exact, np.bincount(islands[cell], minlength=count + 1) / len(draws)


@pytest.mark.parametrize(
    ("sources", "obs", "noise", "points"), [(1, 1, 0.05, 20_000), (2, 3, 0.1, 1200)]
)
def test_modes_have_their_probabilities(sources, obs, noise, points):
    """The share of draws in a mode of probability p is off by `√(p (1 − p) / n)`."""
    n, n_draws = 6, 2000
    curves, y, a, _, _ = simulate(sources, n, noise=noise, seed=2, obs=obs)
    draws = quadrature_draws(curves, y, a, noise, n_draws=n_draws, levels=12).draws
    second = []
    for i in range(n):
        p, x, _ = brute_force(curves, y[i], a[i], noise, points)
        exact, share = modes_of(draws[:, i], p, x)
        floor = np.maximum(exact * (1 - exact), 1 / n_draws)
        np.testing.assert_array_less(np.abs(share - exact), 4.5 * np.sqrt(floor / n_draws))
        second.append(np.sort(exact)[-2])
    assert max(second) > 0.05, "an observation has more modes than one"


@pytest.mark.parametrize(("sources", "n"), [(1, 150), (2, 100), (3, 30)])
def test_the_draws_of_simulated_views_are_calibrated(sources, n):
    problem = manifold_problem(seed=21, problem_seed=3, sources=sources, count=n, noise=0.2)
    view = problem.views[-1]
    draws = limit_draws(view, manifold_curves(3, sources), n_draws=19, seed=4)
    draws = np.concatenate([draws[k] for k in sorted(draws)], axis=2)
    truth = np.concatenate([view.truth[k] for k in sorted(view.truth)], axis=1)
    assert rank_histogram(draws, truth, bins=5).p_value > 1e-3
    inside = coverage(draws, truth, level=0.9)
    assert abs(inside.value - 0.9) < 4 * inside.standard_error
    # The same draws, half as wide, fail both: the checks can see it.
    narrow = draws.mean(axis=0) + (draws - draws.mean(axis=0)) / 2
    assert rank_histogram(narrow, truth, bins=5).p_value < 1e-3
    inside = coverage(narrow, truth, level=0.9)
    assert inside.value < 0.9 - 4 * inside.standard_error
