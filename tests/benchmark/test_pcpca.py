"""Contrastive components against their closed form, dense likelihoods and analytic posteriors."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from dichroic import Problem, Source, View
from dichroic.benchmark.baselines import ClvmLinear, Pcpca
from dichroic.benchmark.baselines import linear_gaussian as g
from dichroic.benchmark.baselines.pcpca import Role, _falling, assign, noise_level
from dichroic.benchmark.baselines.pcpca_objective import Pair, closed_form
from dichroic.errors import ConfigError, RunError
from dichroic.operators import Dense, Identity, Scale
from dichroic.operators.noise import DenseNoise, IsotropicNoise, Masked
from dichroic.problem.observations import Observations

FLOOR = 1e-4


def scatter(y):
    return y.T @ y / len(y)


def two_sets(rng, n=400, m=600, dim=5):
    """Background strong along axis 0; the foreground has that, and less along axis 1."""
    background = 0.5 * rng.normal(size=(m, dim))
    background[:, 0] += 2 * rng.normal(size=m)
    foreground = 0.5 * rng.normal(size=(n, dim))
    foreground[:, 0] += 2 * rng.normal(size=n)
    foreground[:, 1] += 1.5 * rng.normal(size=n)
    return foreground, background


def observed(y, operator=None, mask=None):
    noise = IsotropicNoise(1.0) if mask is None else Masked(IsotropicNoise(1.0), mask)
    return g.gather(Observations(y, {"a": operator or Identity((y.shape[1],))}, noise))


def pair(foreground, background, floor=FLOOR):
    return Pair("a", observed(foreground), observed(background), floor)


def gram(w):
    return w @ w.T


# The closed form


def test_without_contrast_it_is_probabilistic_pca(rng):
    """Tipping and Bishop: σ² is the mean of the lost eigenvalues, W Wᵀ = U (Λ − σ²) Uᵀ."""
    y, _ = two_sets(rng)
    w, noise = closed_form([scatter(y)], 0.0, 2, floor=FLOOR)
    values, axes = np.linalg.svd(y)[1] ** 2 / len(y), np.linalg.svd(y)[2]
    np.testing.assert_allclose(noise, values[2:].mean())
    expect = axes[:2].T @ np.diag(values[:2] - noise) @ axes[:2]
    np.testing.assert_allclose(gram(w), expect, atol=1e-10)


def test_it_is_that_of_the_paper(rng):
    """With unnormalised scatters, n − γm in place of n."""
    y, x = two_sets(rng)
    n, m, gamma = len(y), len(x), 0.4
    w, noise = closed_form([scatter(y), scatter(x)], gamma * m / n, 2, floor=FLOOR)
    values, vectors = np.linalg.eigh(y.T @ y - gamma * x.T @ x)
    np.testing.assert_allclose(noise, values[:-2].sum() / ((n - gamma * m) * 3))
    top = vectors[:, -2:]
    expect = top @ np.diag(values[-2:] / (n - gamma * m) - noise) @ top.T
    np.testing.assert_allclose(gram(w), expect, atol=1e-10)


def test_the_objective_is_the_difference_of_likelihoods(rng, x64):
    """And its gradient in W and σ², with operators of their own and missing entries."""
    n, m, contrast, noise = 7, 9, 0.6, 0.7
    a, b = rng.normal(size=(n, 3, 5)), rng.normal(size=(m, 3, 5))
    y, x = rng.normal(size=(n, 3)), rng.normal(size=(m, 3))
    seen = rng.uniform(size=(n, 3)) < 0.8
    data = Pair("a", observed(y, Dense(a), seen), observed(x, Dense(b)), FLOOR)
    w = rng.normal(size=(5, 2))

    def likelihood(y, a, seen, w, s):
        total = 0.0
        for v, op, keep in zip(y, a, seen, strict=True):
            op = op[keep]
            cov = op @ gram(w) @ op.T + s * np.eye(len(op))
            total += multivariate_normal.logpdf(v[keep], None, cov) if keep.any() else 0.0
        return total

    def direct(w, s):
        whole = np.ones((m, 3), bool)
        gamma = contrast * n / m
        return (likelihood(y, a, seen, w, s) - gamma * likelihood(x, b, whole, w, s)) / n

    found, h, u = data.objective(w, noise, contrast), 1e-5, rng.normal(size=w.shape)
    np.testing.assert_allclose(found.value, direct(w, noise), rtol=1e-9)
    along = (direct(w + h * u, noise) - direct(w - h * u, noise)) / (2 * h)
    np.testing.assert_allclose(np.sum(found.factors["a"] * u), along, rtol=1e-6)
    along = (direct(w, noise + h) - direct(w, noise - h)) / (2 * h)
    np.testing.assert_allclose(found.noise, along, rtol=1e-6)


# The general maximum


@pytest.mark.parametrize("contrast", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("rank", [1, 2])
def test_ascent_from_a_random_start_finds_the_closed_form(contrast, rank, rng):
    y, x = two_sets(rng)
    begin = rng.normal(size=(5, rank)), 3.0
    found = pair(y, x).fit(contrast, rank, begin, tolerance=1e-14)
    # the same single-precision observations
    y, x = (np.asarray(v, np.float32).astype(float) for v in (y, x))
    w, noise = closed_form([scatter(y), scatter(x)], contrast, rank, floor=FLOOR)
    np.testing.assert_allclose(gram(found.factor), gram(w), atol=1e-3 * gram(w).max())
    np.testing.assert_allclose(found.noise, noise, rtol=1e-3)
    assert found.bounded


def test_the_closed_form_is_kept_by_the_ascent(rng):
    y, x = two_sets(rng)
    found = pair(y, x).fit(0.5, 2)
    w, noise = closed_form([scatter(y), scatter(x)], 0.5, 2, floor=FLOOR)
    np.testing.assert_allclose(gram(found.factor), gram(w), atol=1e-4 * gram(w).max())
    np.testing.assert_allclose(found.noise, noise, rtol=1e-4)


@pytest.mark.parametrize("complete", [True, False])
def test_perturbations_lower_the_objective(complete, rng):
    y, x = two_sets(rng)
    data = pair(y, x)
    if not complete:
        a, b = (rng.normal(size=(len(v), 3, 5)) for v in (y, x))
        project = lambda a, v: np.einsum("nmd,nd->nm", a, v)
        sets = observed(project(a, y), Dense(a)), observed(project(b, x), Dense(b))
        data = Pair("a", *sets, FLOOR)
    best = data.fit(0.5, 2, tolerance=1e-14)
    value = data.objective(best.factor, best.noise, 0.5).value
    assert value == pytest.approx(best.value)
    for _ in range(20):
        u = 0.05 * rng.normal(size=best.factor.shape)
        assert data.objective(best.factor + u, best.noise, 0.5).value < value
    for factor in (0.95, 1.05):
        assert data.objective(best.factor, factor * best.noise, 0.5).value < value


def test_the_noise_does_not_fall_below_that_stated(rng):
    """The last eigenvalues of the difference sum to less than zero: without a floor there is no maximum."""
    y, x = 0.2 * rng.normal(size=(300, 4)), rng.normal(size=(300, 4))
    y[:, 0] += 3 * rng.normal(size=300)
    found = pair(y, x, 0.01).fit(0.9, 1)
    w, noise = closed_form([scatter(y), scatter(x)], 0.9, 1, floor=0.01)
    assert noise == 0.01
    assert found.noise == pytest.approx(0.01)
    np.testing.assert_allclose(gram(found.factor), gram(w), atol=1e-3 * gram(w).max())


def test_incomplete_data_give_the_subspace_of_complete_data(rng):
    """Three random numbers of five: the angle is a few times that of complete data, ~√(1 / n)."""
    y, x = two_sets(rng, n=3000, m=3000)
    a, b = rng.normal(size=(2, 3000, 3, 5))
    project = lambda a, v: np.einsum("nmd,nd->nm", a, v)
    data = Pair("a", observed(project(a, y), Dense(a)), observed(project(b, x), Dense(b)), FLOOR)
    found = data.fit(0.8, 1)
    assert found.bounded
    w, _ = closed_form([scatter(y), scatter(x)], 0.8, 1, floor=FLOOR)
    unit = lambda v: v[:, 0] / np.linalg.norm(v)
    assert abs(unit(found.factor) @ unit(w)) > 0.99


def scaled_pair(foreground, background, scales, *, rows=False):
    """Of `y = c x + η`, by their moments or one by one."""
    data = []
    for y, c in zip((foreground, background), scales, strict=True):
        obs = Observations(y, {"a": Scale((y.shape[1],), c)}, IsotropicNoise(1.0))
        data.append(g.Rows(obs) if rows else g.Moments(obs))
    return Pair("a", *data, FLOOR)


@pytest.mark.parametrize("contrast", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_exact_maximum_is_that_of_the_ascent(contrast, rank, rng):
    """Over single observations, which have no closed form, from a start of its own."""
    y, x = two_sets(rng)
    exact = scaled_pair(y, x, (0.5, 0.5)).exact(contrast, rank)
    rows = scaled_pair(y, x, (0.5, 0.5), rows=True)
    assert rows.exact(contrast, rank) is None
    found = rows.fit(contrast, rank, tolerance=1e-13)
    assert exact.value == pytest.approx(found.value, rel=1e-6)
    assert exact.noise == pytest.approx(found.noise, rel=2e-3)
    scale = gram(exact.factor).max()
    np.testing.assert_allclose(gram(exact.factor), gram(found.factor), atol=2e-3 * scale)
    assert exact.bounded


def test_two_multiples_of_the_identity_have_the_maximum_of_single_observations(rng):
    y, x = two_sets(rng)
    moments, rows = (scaled_pair(y, x, (0.5, 1.0), rows=rows) for rows in (False, True))
    assert moments.exact(0.5, 2) is None
    assert moments.exact(0.0, 2) is not None
    one, other = (p.best(0.5, 2, tolerance=1e-13) for p in (moments, rows))
    assert one.value == pytest.approx(other.value, rel=1e-6)
    np.testing.assert_allclose(
        gram(one.factor), gram(other.factor), atol=2e-3 * gram(one.factor).max()
    )


def test_covariances_of_a_multiple_of_the_identity_need_no_ascent(rng):
    y, x = two_sets(rng)
    moments, rows = (scaled_pair(y, x, (0.5, 1.0), rows=rows) for rows in (False, True))
    for one, other in zip(moments.covariances, rows.covariances, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3 * one.max())


# Problems


def contrast_problem(rng, n=400, m=600):
    y, x = two_sets(rng, n, m)
    eye = Identity((5,))
    views = [View(x, {"b": eye}, 0.1, "background"), View(y, {"b": eye, "t": eye}, 0.1, "both")]
    return Problem([Source("b", (5,)), Source("t", (5,))], views)


def axis(model, name):
    w, v = np.linalg.eigh(np.asarray(model.denoisers[name].covariances()[0], float))
    return np.abs(v[:, -1])


def test_contrast_turns_the_target_away_from_the_background(rng):
    """The angle of an axis errs by √(λ₁ λ₂ / n) / (λ₁ − λ₂) ≈ 0.1: three of those leave a cosine of 0.95."""
    problem = contrast_problem(rng)
    plain, contrasted = (
        Pcpca(problem, gamma=gamma, rank=1).fit(progress=False) for gamma in (0.0, 0.55)
    )
    assert axis(plain, "t")[0] > 0.95
    assert axis(contrasted, "t")[1] > 0.95
    for model in (plain, contrasted):
        assert axis(model, "b")[0] > 0.95
    assert contrasted.chosen["t"]["background"] == "background"
    assert contrasted.chosen["t"]["gamma"] == pytest.approx(0.55)
    assert contrasted.chosen["b"] | {"noise": 0, "heldout_log_evidence": 0} == {
        "foreground": "background",
        "background": None,
        "gamma": 0.0,
        "rank": 1,
        "noise": 0,
        "heldout_log_evidence": 0,
    }


def test_gamma_and_rank_are_chosen_by_held_out_evidence(rng):
    model = Pcpca(contrast_problem(rng)).fit(progress=False)
    chosen = model.chosen["t"]
    scores = []
    for gamma in (0.0, 0.3, 0.55):
        other = Pcpca(contrast_problem(np.random.default_rng(20240229)), gamma=gamma, rank=1)
        scores.append(other.fit(progress=False).chosen["t"]["heldout_log_evidence"])
    assert chosen["heldout_log_evidence"] > min(scores)
    assert 0 <= chosen["gamma"] < 360 / 540 + 1e-6
    assert 1 <= chosen["rank"] <= 5


def test_a_contrast_is_given_up_after_two_falls_in_succession():
    assert _falling([1.0, 3.0, 2.0, 1.0])
    assert not _falling([3.0, 2.0])
    assert not _falling([3.0, 1.0, 2.0])
    assert not _falling([1.0, 3.0, 2.0])


def test_draws_of_each_source_are_from_its_own_model(rng):
    """Analytic posterior of `y − μ_other = x + ε`, ε ~ N(0, σ²), also with a missing entry."""
    n, mask = 1000, np.array([1, 1, 1, 0, 1.0])
    problem = contrast_problem(rng, n, n)
    model = Pcpca(problem, gamma=0.5, rank=2).fit(progress=False)
    y = np.asarray(problem.view("both").observations)
    view = View(y, problem.view("both").operators, 0.1, mask=mask)
    found = model.separate(view, n_draws=2, seed=4)
    mean = {k: np.asarray(d.location, float) for k, d in model.denoisers.items()}
    for name, other in (("t", "b"), ("b", "t")):
        c = np.asarray(model.denoisers[name].covariances()[0], float)
        a = np.diag(mask)[mask > 0]
        noise = model.chosen[name]["noise"] * np.eye(4)
        gain = c @ a.T @ np.linalg.inv(noise + a @ c @ a.T)
        expect = mean[name] + (y - mean[other] - mean[name]) @ a.T @ gain.T
        v = c - gain @ a @ c
        r = (found.draws[name] - expect).reshape(-1, 5)
        values, vectors = np.linalg.eigh(v)
        z = r @ vectors[:, -2:] / np.sqrt(values[-2:])
        assert abs(np.mean(z**2) - 1) < 5 * np.sqrt(2 / z.size)
        assert np.abs(np.mean(z, axis=0)).max() < 5 / np.sqrt(len(z))
        assert np.abs(r @ vectors[:, :-2]).max() < 1e-2 * np.sqrt(values[-1])
    assert found.chi2.shape == (2, n)
    assert np.all(found.residual == 0)
    assert np.all(found.converged == 1)
    later = model.separate(view.select(slice(30, None)), n_draws=2, seed=4, first_index=30)
    np.testing.assert_array_equal(later.draws["t"], found.draws["t"][:, 30:])


def test_prior_draws_and_progress(rng):
    problem = contrast_problem(rng)
    model = Pcpca(problem, gamma=0.5, rank=1).fit(progress=False)
    x = model.sample_prior("t", 3000, seed=2)
    c = np.asarray(model.denoisers["t"].covariances()[0], float)
    np.testing.assert_allclose(np.cov(x.T), c, atol=5 * np.sqrt(2 / 3000) * c.max())
    seen = []
    model.separate("both", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (800, 800)
    assert all(a[0] < b[0] for a, b in zip(seen, seen[1:], strict=False))


def test_a_finished_model_is_kept_with_its_noise(rng, tmp_path):
    problem = contrast_problem(rng)
    model = Pcpca(problem, gamma=0.3, rank=1).fit(tmp_path, progress=False)
    loaded = Pcpca.load(tmp_path, problem=problem)
    again = Pcpca(problem, gamma=0.3, rank=1).fit(tmp_path, resume=True, progress=False)
    for other in (loaded, again):
        assert other.chosen == model.chosen
        a, b = (m.separate("both", seed=1).draws["t"] for m in (model, other))
        np.testing.assert_array_equal(a, b)
    with pytest.raises(RunError, match="other settings"):
        Pcpca(problem, gamma=0.4, rank=1).fit(tmp_path, resume=True, progress=False)
    with pytest.raises(RunError, match="no model of CLVM-linear, but of PCPCA"):
        ClvmLinear.load(tmp_path)


def views(*spec):
    """Observations of views given as `{source: (strength, size)}`, and their shares."""
    made = []
    for sources in spec:
        operators = {k: Dense(f * np.eye(3, d)) for k, (f, d) in sources.items()}
        made.append(Observations(np.zeros((4, 3)), operators, IsotropicNoise(1.0)))
    power = lambda obs: {k: float(np.sum(op.as_matrix() ** 2)) for k, op in obs.operators.items()}
    shares = [{k: v / sum(power(o).values()) for k, v in power(o).items()} for o in made]
    return made, shares


def test_foreground_and_background_of_contrastive_views():
    one = (1.0, 3)
    made = views({"a": one}, {"a": one, "b": one}, {"a": one, "b": one, "c": one})
    assert assign("a", *made) == Role(0)
    assert assign("b", *made) == Role(1, 0, "a")
    assert assign("c", *made) == Role(2, 1, "a")


def test_foreground_and_background_of_mixed_views():
    weak, strong = (0.1, 3), (1.0, 3)
    made = views({"a": strong, "b": weak}, {"a": weak, "b": strong})
    assert assign("a", *made) == Role(0, 1, "b")
    assert assign("b", *made) == Role(1, 0, "a")
    same = views({"a": strong, "b": strong}, {"a": strong, "b": strong})
    assert assign("a", *same) == Role(0)


def test_no_background_where_shapes_or_sources_do_not_fit():
    made = views({"b": (1.0, 2)}, {"b": (1.0, 2), "t": (1.0, 3)})
    assert assign("t", *made) == Role(1)
    made = views({"b": (1.0, 3), "c": (1.0, 3)}, {"b": (1.0, 3), "t": (1.0, 3)})
    assert assign("t", *made) == Role(1)


def test_noise_level_is_the_mean_over_observed_entries(rng):
    cov = np.diag([1.0, 4.0, 9.0])
    noise = Masked(DenseNoise(cov), np.array([[1, 1, 0], [1, 0, 0]]))
    obs = Observations(np.zeros((2, 3)), {"a": Identity((3,))}, noise)
    assert noise_level(obs) == pytest.approx(2.0)


def test_nonsense_is_refused(rng):
    problem = contrast_problem(rng)
    for gamma in (-0.1, np.inf, np.nan):
        with pytest.raises(ConfigError, match="zero or positive"):
            Pcpca(problem, gamma=gamma)
    with pytest.raises(ConfigError, match="below n / m = 0.6667"):
        Pcpca(problem, gamma=0.7).fit(progress=False)
    with pytest.raises(ConfigError, match="between 1 and 5"):
        Pcpca(problem, rank=6).fit(progress=False)


def test_a_contrast_that_missing_entries_leave_unbounded_is_refused(rng):
    """Axis 1 is missing from nine tenths of the foreground, so that γ = 0.5 is too large for it."""
    y, x = two_sets(rng, 400, 400)
    x[:, 1] *= 0.1
    mask = np.ones((400, 5))
    mask[:360, 1] = 0
    eye = Identity((5,))
    given = [View(x, {"b": eye}, 0.1), View(y, {"b": eye, "t": eye}, 0.1, mask=mask)]
    problem = Problem([Source("b", (5,)), Source("t", (5,))], given)
    with pytest.raises(ConfigError, match="missing from more of the foreground"):
        Pcpca(problem, gamma=0.5, rank=2).fit(progress=False)
    chosen = Pcpca(problem, rank=2).fit(progress=False).chosen["t"]
    assert chosen["gamma"] < 0.5
