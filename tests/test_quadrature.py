"""The exact posterior on known curves, against sums over fine grids."""

import numpy as np
import pytest
from scipy.special import logsumexp

from dichroic.datasets.manifolds import manifold_curves, manifold_problem
from dichroic.datasets.quadrature import limit_draws, quadrature_draws
from dichroic.errors import DataError, ShapeError
from dichroic.metrics import coverage, rank_histogram

S = 4000


def case(sources, n, noise, seed=0):
    rng = np.random.default_rng(seed)
    curves = manifold_curves(seed, sources)
    x = np.stack([c(rng.uniform(size=n)) for c in curves], axis=1)
    a = rng.normal(size=(n, sources, 3, 5))
    y = np.einsum("nsmd,nsd->nm", a, x) + noise * rng.normal(size=(n, 3))
    return curves, y, a, x


def on_grid(curves, y, a, noise, knots):
    """`log p(y)` and the posterior mean of every source, by the midpoints of a regular grid."""
    s = (np.arange(knots) + 0.5) / knots
    points = [c(s) for c in curves]
    mean = 0
    for i, (p, m) in enumerate(zip(points, a, strict=True)):
        mean = mean + (p @ m.T).reshape(*[1] * i, knots, *[1] * (len(curves) - 1 - i), 3)
    score = -0.5 * np.sum((y - mean) ** 2, axis=-1) / noise**2
    score = score - 3 * np.log(np.sqrt(2 * np.pi) * noise) - len(curves) * np.log(knots)
    total = logsumexp(score)
    w = np.exp(score - total)
    axes = range(len(curves))
    own = [w.sum(axis=tuple(j for j in axes if j != i)) for i in axes]
    return total, np.stack([o @ p for o, p in zip(own, points, strict=True)])


@pytest.mark.parametrize(
    ("sources", "noise", "knots"), [(1, 0.02, 200_000), (2, 0.05, 3000), (3, 0.4, 220)]
)
def test_evidence_and_means_are_those_of_a_fine_grid(sources, noise, knots):
    curves, y, a, _ = case(sources, 3, noise)
    found = quadrature_draws(curves, y, a, noise, n_draws=S)
    for i in range(3):
        evidence, mean = on_grid(curves, y[i], a[i], noise, knots)
        assert abs(found.log_evidence[i] - evidence) < 0.05
        draws = found.draws[:, i]
        error = draws.std(axis=0) / np.sqrt(S) + 1e-4
        assert np.all(np.abs(draws.mean(axis=0) - mean) < 5 * error)


def test_draws_are_calibrated():
    curves, y, a, x = case(2, 150, 0.05, seed=3)
    draws = quadrature_draws(curves, y, a, 0.05, n_draws=15).draws
    inside = coverage(draws, x, level=0.9)
    assert abs(inside.value - 0.9) < 4 * inside.standard_error
    assert rank_histogram(draws, x, bins=8).p_value > 1e-3


def test_an_observations_draws_depend_on_its_number_and_the_seed_only():
    curves, y, a, _ = case(2, 4, 0.1)
    whole = quadrature_draws(curves, y, a, 0.1, n_draws=3, seed=5).draws
    part = quadrature_draws(curves, y[:2], a[:2], 0.1, n_draws=3, seed=5).draws
    np.testing.assert_array_equal(whole[:, :2], part)
    assert not np.array_equal(quadrature_draws(curves, y, a, 0.1, n_draws=3, seed=6).draws, whole)


@pytest.mark.parametrize("per_source", [False, True])
def test_the_limit_of_a_problem_explains_its_observations(per_source):
    problem = manifold_problem(seed=1, f_mix=0.5, count=12, per_source=per_source)
    view = problem.views[0]
    draws = limit_draws(view, manifold_curves(1, 2), n_draws=8, seed=0)
    a = [np.asarray(view.operators[k].matrix) for k in draws]
    mean = sum(np.einsum("nmd,snd->snm", m, x) for m, x in zip(a, draws.values(), strict=True))
    chi2 = np.sum((view.observations - mean) ** 2, axis=-1) / 0.01**2
    # 3 entries less the 2 coordinates that are fitted, plus those two drawn: 3 on average
    assert 1.5 < chi2.mean() < 5


def test_errors():
    curves, y, a, _ = case(2, 4, 0.1)
    with pytest.raises(ShapeError):
        quadrature_draws(curves[:1], y, a, 0.1)
    with pytest.raises(DataError, match="finite"):
        quadrature_draws(curves, y * np.nan, a, 0.1)
    with pytest.raises(DataError, match="noise"):
        quadrature_draws(curves, y, a, 0.0)
    view = manifold_problem(seed=1, count=4).views[1]
    with pytest.raises(DataError, match="1 curves"):
        limit_draws(view, curves[:1], n_draws=1, seed=0)
