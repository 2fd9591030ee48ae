"""The recipes of the problems, checked on what they give."""

import numpy as np
import pytest

from dichroic.benchmark.problems import digits
from dichroic.benchmark.problems.manifolds import (
    Manifold,
    manifold_curves,
    manifold_problem,
    observe,
    weights,
)
from dichroic.errors import DataError
from dichroic.operators import Dense


@pytest.mark.parametrize(("alpha", "terms"), [(3.0, 10), (4.0, 6), (5.0, 4)])
def test_a_curve_fills_its_range_and_is_the_stated_sum_of_sines(alpha, terms):
    """With K terms the next would be k^-α ≤ 10⁻³; every dimension is scaled to [−2, 2]."""
    curve = Manifold.random(np.random.default_rng(0), alpha, 4)
    assert curve.a.shape == (4, terms)
    assert terms**-alpha <= 1e-3 * (1 + 1e-9) < (terms - 1) ** -alpha
    x = curve(np.linspace(0, 1, 20_001))
    np.testing.assert_allclose(x.min(axis=0), -2, atol=1e-12)
    np.testing.assert_allclose(x.max(axis=0), 2, atol=1e-12)
    s = np.random.default_rng(1).uniform(size=50)
    k = np.arange(1, terms + 1)
    raw = lambda s, d: sum(
        curve.a[d] * k**-alpha * np.sin(2 * np.pi * (k * curve.b[d] * s + curve.c[d]))
    )
    for d in range(4):
        direct = np.array([raw(v, d) for v in s])
        slope, shift = np.polyfit(direct, curve(s)[:, d], 1)
        np.testing.assert_allclose(slope * direct + shift, curve(s)[:, d], atol=1e-9)
        assert slope > 0


def test_views_are_contrastive_or_mixed():
    np.testing.assert_array_equal(weights(3, None), [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(weights(3, 0.2), [[1, 0.2, 0.2], [0.2, 1, 0.2], [0.2, 0.2, 1]])


def test_observations_are_normalised_random_projections_with_noise():
    n, noise = 4000, 0.3
    rng = np.random.default_rng(2)
    x, f = rng.normal(size=(n, 2, 5)), np.array([1.0, 0.4])
    y, a = observe(rng, x, f, obs=3, noise=noise)
    assert (y.shape, a.shape) == ((n, 3), (n, 3, 5))
    np.testing.assert_allclose(np.linalg.norm(a, axis=-1), 1)
    # Rows point anywhere: each entry has mean 0 and mean square 1 / 5.
    assert np.abs(a.mean(axis=(0, 1))).max() < 4.5 * np.sqrt(0.2 / (3 * n))
    np.testing.assert_allclose((a**2).mean(axis=(0, 1)), 0.2, atol=4.5 * 0.3 / np.sqrt(3 * n))
    residual = y - np.einsum("nod,nd->no", a, x[:, 0] + 0.4 * x[:, 1])
    assert abs(residual.std() / noise - 1) < 4.5 / np.sqrt(2 * 3 * n)
    assert abs(residual.mean()) < 4.5 * noise / np.sqrt(3 * n)
    assert np.abs(np.corrcoef(residual.T) - np.eye(3)).max() < 4.5 / np.sqrt(n)


def assert_normalised_and_isotropic(a):
    """Rows `(n, 5)` are of length one and point anywhere: entries of mean 0 and mean square 1 / 5."""
    np.testing.assert_allclose(np.linalg.norm(a, axis=-1), 1, rtol=1e-6)
    assert np.abs(a.mean(axis=0)).max() < 4.5 * np.sqrt(0.2 / len(a))
    np.testing.assert_allclose((a**2).mean(axis=0), 0.2, atol=4.5 * 0.3 / np.sqrt(len(a)))


def test_every_source_can_have_projections_of_its_own():
    n, noise = 4000, 0.3
    rng = np.random.default_rng(2)
    x, f = rng.normal(size=(n, 2, 5)), np.array([1.0, 0.4])
    y, a = observe(rng, x, f, obs=3, noise=noise, per_source=True)
    assert (y.shape, a.shape) == ((n, 3), (n, 2, 3, 5))
    assert_normalised_and_isotropic(a.reshape(-1, 5))
    # Unit vectors in 5 dimensions that are independent have products of variance 1 / 5.
    assert abs(np.sum(a[:, 0] * a[:, 1], axis=-1).mean()) < 4.5 * np.sqrt(0.2 / (3 * n))
    residual = y - np.einsum("nod,nd->no", a[:, 0], x[:, 0])
    residual -= 0.4 * np.einsum("nod,nd->no", a[:, 1], x[:, 1])
    assert abs(residual.std() / noise - 1) < 4.5 / np.sqrt(2 * 3 * n)


@pytest.mark.parametrize("per_source", [False, True])
@pytest.mark.parametrize("f_mix", [None, 0.3])
def test_a_problem_states_the_projections_it_was_made_with(f_mix, per_source):
    problem = manifold_problem(seed=3, f_mix=f_mix, count=500, noise=0.05, per_source=per_source)
    for view, f in zip(problem.views, weights(2, f_mix), strict=True):
        y = np.asarray(view.observations, float)
        a = {k: np.asarray(op.matrix, float) for k, op in view.operators.items()}
        y -= sum(np.einsum("nod,nd->no", a[k], view.truth[k]) for k in a)
        assert abs(y.std() / 0.05 - 1) < 4.5 / np.sqrt(2 * y.size)
        if len(a) == 2:
            same = np.allclose(a["source1"] / f[0], a["source2"] / f[1], atol=1e-6)
            assert same is not per_source
            assert_normalised_and_isotropic(a["source2"].reshape(-1, 5) / f[1])


def test_the_streams_of_random_numbers_are_the_stated_ones():
    """Curves by the seed [0, problem_seed]; then, per view, coordinates, matrix and noise by [1, seed]."""
    problem = manifold_problem(seed=8, problem_seed=4, count=30, dim=4, obs=2, noise=0.1)
    curves, rng = manifold_curves(4, 2, dim=4), np.random.default_rng([1, 8])
    again = np.random.default_rng([0, 4])
    for curve, alpha in zip(curves, (3.0, 4.0), strict=True):
        np.testing.assert_array_equal(curve.a, Manifold.random(again, alpha, 4).a)
    for view, f in zip(problem.views, ([1, 0], [1, 1]), strict=True):
        x = [curve(rng.uniform(size=30)) for curve in curves]
        a = rng.normal(size=(30, 2, 4))
        a /= np.linalg.norm(a, axis=-1, keepdims=True)
        mean = np.einsum("nod,nd->no", a, f[0] * x[0] + f[1] * x[1])
        y = mean + 0.1 * rng.normal(size=(30, 2))
        np.testing.assert_allclose(view.observations, y, rtol=1e-6, atol=1e-6)
        for k, operator in view.operators.items():
            np.testing.assert_array_equal(operator.matrix, a.astype(np.float32))
            truth = x[int(k[-1]) - 1].astype(np.float32)
            np.testing.assert_array_equal(view.truth[k], truth)


@pytest.mark.parametrize("sources", [0, 4])
def test_curves_are_defined_for_up_to_three_sources(sources):
    with pytest.raises(DataError, match="1 to 3"):
        manifold_curves(0, sources)


@pytest.mark.parametrize(
    ("f_mix", "seen"),
    [
        (None, [{"source1": 1.0}, {"source1": 1.0, "source2": 1.0}]),
        (0.3, [{"source1": 1.0, "source2": 0.3}, {"source1": 0.3, "source2": 1.0}]),
    ],
)
def test_a_view_is_the_weighted_sum_of_its_sources_and_noise(f_mix, seen):
    problem = manifold_problem(seed=3, f_mix=f_mix, count=500, noise=0.05)
    for view, expect in zip(problem.views, seen, strict=True):
        assert set(view.operators) == set(view.truth) == set(expect)
        y = np.asarray(view.observations, float)
        for k, f in expect.items():
            op = view.operators[k]
            assert isinstance(op, Dense)
            np.testing.assert_allclose(np.linalg.norm(op.matrix, axis=-1), f, rtol=1e-5)
            y -= np.einsum("nod,nd->no", op.matrix, view.truth[k])
        assert abs(y.std() / 0.05 - 1) < 4.5 / np.sqrt(2 * y.size)
        assert np.abs(np.concatenate(list(view.truth.values()))).max() <= 2 + 1e-3


def test_three_sources_have_their_own_smoothness_and_views():
    problem = manifold_problem(sources=3, count=20, dim=4, obs=2)
    assert problem.shapes == {f"source{i}": (4,) for i in (1, 2, 3)}
    assert [len(v.operators) for v in problem.views] == [1, 2, 3]
    assert [v.shape for v in problem.views] == [(2,)] * 3


def test_the_problem_seed_fixes_the_curves_and_the_seed_the_rest():
    truth = lambda **kw: manifold_problem(count=2000, **kw).views[0].truth["source1"]
    first, again = truth(seed=5), truth(seed=5)
    np.testing.assert_array_equal(first, again)
    new, other = truth(seed=6, problem_seed=5), truth(seed=6)
    assert not np.any(np.all(new == first, axis=1))
    # 2000 points on a curve of length ≈ 20 are 0.01 apart; points of another curve are not near.
    nearest = lambda x: np.min(np.linalg.norm(x[:200, None] - first[None], axis=-1), axis=1)
    assert np.max(nearest(new)) < 0.2
    assert np.median(nearest(other)) > 0.3


@pytest.fixture(scope="module")
def sklearn():
    pytest.importorskip("sklearn")


def windows(held_out):
    """Whether a patch is somewhere in the training or held-out columns of the photographs."""
    photos = digits.load_photographs()
    parts = [
        p[:, int(0.8 * p.shape[1]) :] if held_out else p[:, : int(0.8 * p.shape[1])] for p in photos
    ]
    return [np.lib.stride_tricks.sliding_window_view(p, (8, 8)) for p in parts]


def is_among(patch, views):
    corner = lambda v: np.argwhere(v[:, :, 0, 0] == patch[0, 0])
    return any(np.array_equal(v[i, j], patch) for v in views for i, j in corner(v))


@pytest.mark.usefixtures("sklearn")
@pytest.mark.parametrize("held_out", [False, True])
def test_patches_come_from_their_own_columns(held_out):
    patches = digits.patches(np.random.default_rng(0), 40, held_out=held_out)
    own, other = windows(held_out), windows(not held_out)
    assert all(is_among(p, own) for p in patches)
    assert not any(is_among(p, other) for p in patches)


@pytest.mark.usefixtures("sklearn")
def test_held_out_digits_are_others_than_the_training_ones():
    images = digits.load_digit_images()
    rows = lambda x: {a.tobytes() for a in np.asarray(x, float)}
    train = digits.digits_over_patches(count=2000, seed=0)[1].truth["digit"]
    test = digits.digits_over_patches(count=720, seed=0, held_out=True)[1].truth["digit"]
    assert rows(train) == rows(images[:1437]), "every training digit is used"
    assert rows(test) == rows(images[1437:])
    count = [sum(np.array_equal(d, x) for x in test) for d in images[1437:1445]]
    assert count == [2] * 8, "as often as the others"


@pytest.mark.usefixtures("sklearn")
@pytest.mark.parametrize(("count", "used"), [(10, 10), (1000, 1000), (1400, 1400), (4000, 1437)])
def test_a_tenth_of_the_digits_is_kept_for_stopping(count, used):
    view = digits.digits_over_patches(count=count, seed=1)[1]
    assert digits.digits_over_patches(count=50, seed=1, held_out=True)[1].held_out is None
    kept, held = (
        {a.tobytes() for a in view.truth["digit"][m]} for m in (~view.held_out, view.held_out)
    )
    assert not kept & held
    assert len(kept) + len(held) == used
    assert abs(len(held) - used / 10) < 1


@pytest.mark.usefixtures("sklearn")
def test_views_are_background_and_background_plus_digit_with_noise():
    problem = digits.digits_problem(count=1500, seed=2, noise=0.05)
    assert problem.shapes == {"background": (8, 8), "digit": (8, 8)}
    alone, mixture = problem.views
    assert (set(alone.operators), set(mixture.operators)) == ({"background"}, set(problem.names))
    for view in (alone, mixture):
        assert all(0 <= x.min() < x.max() <= 1 for x in view.truth.values())
        residual = view.observations - sum(view.truth.values())
        assert abs(residual.std() / 0.05 - 1) < 4.5 / np.sqrt(2 * residual.size)
        assert view.noise == 0.05
    assert not np.array_equal(alone.truth["background"], mixture.truth["background"])
    again = digits.digits_problem(count=1500, seed=2, noise=0.05)
    assert again.fingerprint() == problem.fingerprint()
    assert (
        digits.digits_problem(count=1500, seed=3, noise=0.05).fingerprint() != problem.fingerprint()
    )
