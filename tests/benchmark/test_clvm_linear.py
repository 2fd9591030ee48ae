"""The linear latent variable model against closed forms, dense evidence and analytic posteriors."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from dichroic import Problem, Source, View
from dichroic.benchmark.baselines import ClvmLinear
from dichroic.benchmark.baselines import clvm_linear as clvm
from dichroic.benchmark.baselines import linear_gaussian as g
from dichroic.benchmark.baselines.ascent import monotone_em, root
from dichroic.benchmark.baselines.fitted import candidate_ranks
from dichroic.errors import ConfigError, RunError
from dichroic.operators import Dense, Identity, Scale
from dichroic.operators.noise import DenseNoise, DiagonalNoise, IsotropicNoise, Masked
from dichroic.problem.observations import Observations
from dichroic.separation.separator import Separator

NOISE = 0.5  # exact in float32


def factor(rng, dim, rank):
    """Orthogonal columns of lengths 1 to 2."""
    return np.linalg.qr(rng.normal(size=(dim, rank)))[0] * np.linspace(1, 2, rank)


def seen_directly(rng, n=400, dim=6, rank=2, name="view1"):
    """A problem of one source seen as it is; the last tenth is held out."""
    x = 1 + rng.normal(size=(n, rank)) @ factor(rng, dim, rank).T
    y = (x + NOISE * rng.normal(size=x.shape)).astype(np.float32)
    held = np.arange(n) >= 0.9 * n
    view = View(y, {"a": Identity((dim,))}, NOISE, name, held_out=held, truth={"a": x})
    return Problem([Source("a", (dim,))], [view]), y[~held].astype(float)


def covariance(model, name):
    return np.asarray(model.denoisers[name].covariances()[0], float)


def mean(model, name):
    return np.asarray(model.denoisers[name].location, float).ravel()


# Evidence and gradient


def observations(kind, rng, n=12, size=4):
    """Observations of sources a (3,) and b (5,), and every `(rows, y, A_a, A_b, Σ)` in float64."""
    rows = () if kind in ("shared", "shared mask") else (n,)
    a, b = rng.normal(size=(*rows, size, 3)), rng.normal(size=(*rows, size, 5))
    y, seen = rng.normal(size=(n, size)), np.ones((n, size), bool)
    root = rng.normal(size=(size, size)) / 2
    cov = root @ root.T + 0.2 * np.eye(size)
    noise = DenseNoise(cov)
    if kind == "diagonal":
        cov = np.diag(rng.uniform(0.1, 1, size))
        noise = DiagonalNoise(np.diagonal(cov))
    if kind.endswith("mask"):
        seen = seen & (rng.uniform(size=(1 if kind == "shared mask" else n, size)) < 0.7)
        noise = Masked(noise, seen[0] if kind == "shared mask" else seen)
    whole = [np.broadcast_to(m, (n, *m.shape[-2:])) for m in (a, b)]
    each = [(s, y[i], whole[0][i], whole[1][i], cov) for i, s in enumerate(seen)]
    return Observations(y, {"a": Dense(a), "b": Dense(b)}, noise), each


def dense_evidence(each, means, factors, s):
    total = 0.0
    for seen, y, a, b, cov in each:
        aw, bw = a @ factors["a"], b @ factors["b"]
        c = (s * cov + aw @ aw.T + bw @ bw.T)[np.ix_(seen, seen)]
        m = (a @ means["a"] + b @ means["b"])[seen]
        total += multivariate_normal.logpdf(y[seen], m, c) if seen.any() else 0.0
    return total


kinds = pytest.mark.parametrize("kind", ["shared", "shared mask", "rows", "rows mask", "diagonal"])


@kinds
@pytest.mark.parametrize("ranks", [(1, 1), (3, 4)])
def test_evidence_and_gradient_are_those_of_dense_gaussians(kind, ranks, rng, x64):
    obs, each = observations(kind, rng)
    means = {"a": rng.normal(size=3), "b": rng.normal(size=5)}
    factors = {"a": rng.normal(size=(3, ranks[0])), "b": rng.normal(size=(5, ranks[1]))}
    data = g.gather(obs)
    assert isinstance(data, g.Moments if kind.startswith("shared") else g.Rows)
    slopes = data.slopes(means, factors, 1.3)
    np.testing.assert_allclose(slopes.value, dense_evidence(each, means, factors, 1.3), rtol=1e-9)
    h = 1e-5
    for part, given in (("means", means), ("factors", factors)):
        for k, value in given.items():
            u = rng.normal(size=value.shape)
            moved = lambda t: {**given, k: value + t * u}
            swap = lambda t: {"means": means, "factors": factors, part: moved(t)}
            up, down = (dense_evidence(each, **swap(t), s=1.3) for t in (h, -h))
            slope = np.sum(getattr(slopes, part)[k] * u)
            np.testing.assert_allclose(slope, (up - down) / (2 * h), rtol=1e-5, atol=1e-5)
    up, down = (dense_evidence(each, means, factors, 1.3 + t) for t in (h, -h))
    np.testing.assert_allclose(slopes.noise, (up - down) / (2 * h), rtol=1e-5, atol=1e-5)


def test_moments_are_the_sum_over_rows(rng, x64):
    for kind in ("shared", "shared mask"):
        obs, _ = observations(kind, rng)
        means = {"a": rng.normal(size=3), "b": rng.normal(size=5)}
        factors = {"a": rng.normal(size=(3, 1)), "b": rng.normal(size=(5, 2))}
        rows, moments = g.Rows(obs), g.Moments(obs)
        for k in means:
            one, other = (d.curvature(means, factors)[k] for d in (rows, moments))
            for a, b in zip(one, other, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-8)
        for a, b in zip(rows.normal(), moments.normal(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("ranks", [(1, 2), (3, 5)])
def test_multiples_of_the_identity_are_the_sum_over_rows(ranks, rng, x64):
    """`A = c I` is kept as `c`, and fewer factors than entries take the way around `C`."""
    operators = {"a": Identity((5,)), "b": Scale((5,), 0.5)}
    obs = Observations(rng.normal(size=(9, 5)), operators, IsotropicNoise(0.3))
    means = {k: rng.normal(size=5) for k in operators}
    factors = {k: rng.normal(size=(5, r)) for k, r in zip(operators, ranks, strict=True)}
    rows, moments = g.Rows(obs), g.Moments(obs)
    assert all(a.ndim == 0 for a in moments.operators.values())
    one, other = (d.slopes(means, factors, 1.3) for d in (rows, moments))
    np.testing.assert_allclose([one.value, one.noise], [other.value, other.noise], rtol=1e-9)
    for k in operators:
        np.testing.assert_allclose(one.means[k], other.means[k], atol=1e-8)
        np.testing.assert_allclose(one.factors[k], other.factors[k], atol=1e-8)
        pair = (d.curvature(means, factors, 1.3)[k] for d in (rows, moments))
        for a, b in zip(*pair, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-8)
    for a, b in zip(rows.normal(), moments.normal(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)


def test_an_ascent_in_coordinates_of_its_curvature_takes_few_steps(rng):
    """The maximum of `−½ ‖Rᵀ(x − x₀)‖²`, whose curvatures are up to 10⁸ apart."""
    axes = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    curvature = axes @ np.diag(np.logspace(-4, 4, 30)) @ axes.T
    best = rng.normal(size=(30, 2))

    def value(arrays):
        off = arrays[0] - best
        return -0.5 * np.sum(off * (curvature @ off)), [-curvature @ off]

    start, options = [np.zeros((30, 2))], {"iterations": 200, "tolerance": 1e-14}
    plain = monotone_em(value, start, **options)
    rooted = monotone_em(value, start, roots=[root(curvature)], **options)
    assert len(rooted.history) < 20 < len(plain.history)
    assert rooted.value > plain.value
    np.testing.assert_allclose(rooted.arrays[0], best, atol=1e-3)


def test_rows_in_many_chunks_are_the_same(rng, monkeypatch):
    obs, _ = observations("rows mask", rng)
    point = ({"a": np.zeros(3), "b": np.zeros(5)}, {"a": np.ones((3, 1)), "b": np.ones((5, 1))})
    whole = g.Rows(obs).slopes(*point)
    monkeypatch.setattr(g, "_CHUNK_BYTES", 8 * 5 * (4 * 9 + 2 * 16))
    monkeypatch.setattr(g, "_CACHE_BYTES", 0)
    parts = g.Rows(obs)
    assert len(list(parts.chunks())) == 3
    np.testing.assert_allclose(parts.slopes(*point).value, whole.value)
    np.testing.assert_allclose(parts.slopes(*point).factors["b"], whole.factors["b"])


# Fits


def test_one_source_seen_as_it_is_gives_probabilistic_pca(rng):
    """Tipping and Bishop: W Wᵀ = U (Λ − σ²) Uᵀ, and the value of the likelihood there."""
    problem, y = seen_directly(rng)
    model = ClvmLinear(problem, rank=2).fit(progress=False)
    values, vectors = np.linalg.eigh(np.cov(y.T, bias=True))
    top = vectors[:, -2:]
    expect = top @ np.diag(values[-2:] - NOISE**2) @ top.T
    np.testing.assert_allclose(covariance(model, "a"), expect, atol=1e-3)
    np.testing.assert_allclose(mean(model, "a"), y.mean(axis=0), atol=1e-4)
    kept = np.sum(np.log(values[-2:]) + 1)
    lost = np.sum(np.log(NOISE**2) + values[:-2] / NOISE**2)
    best = -0.5 * (kept + lost + 6 * np.log(2 * np.pi))
    np.testing.assert_allclose(model.metrics[-1]["log_evidence"], best, rtol=1e-7)


def test_two_views_give_the_difference_of_their_covariances(rng):
    """With `y₁ = a + η` and `y₂ = a + b + η` both views are fitted exactly, where that is PSD."""
    n, dim = 2000, 4
    root_a, root_b = factor(rng, dim, dim), factor(rng, dim, dim)
    draw = lambda root, m: m + rng.normal(size=(n, dim)) @ root.T
    noisy = lambda x: x + NOISE * rng.normal(size=x.shape)
    y1 = noisy(draw(root_a, 1.0))
    y2 = noisy(draw(root_a, 1.0) + draw(root_b, -2.0))
    eye, held = Identity((dim,)), np.arange(n) >= n - 100
    views = [View(y1, {"a": eye}, NOISE, held_out=held)]
    views += [View(y2, {"a": eye, "b": eye}, NOISE, held_out=held)]
    problem = Problem([Source("a", (dim,)), Source("b", (dim,))], views)
    model = ClvmLinear(problem, rank=dim).fit(progress=False)
    s1, s2 = (np.cov(y[~held].T, bias=True) for y in (y1, y2))
    assert np.linalg.eigvalsh(s2 - s1)[0] > 0
    np.testing.assert_allclose(covariance(model, "a"), s1 - NOISE**2 * np.eye(dim), atol=5e-3)
    np.testing.assert_allclose(covariance(model, "b"), s2 - s1, atol=5e-3)
    np.testing.assert_allclose(mean(model, "a"), y1[~held].mean(axis=0), atol=1e-3)
    difference = y2[~held].mean(axis=0) - y1[~held].mean(axis=0)
    np.testing.assert_allclose(mean(model, "b"), difference, atol=1e-3)


def projected(rng, n, root, m):
    """Observations of three random directions of five, and the problem that states them."""
    x = m + rng.normal(size=(n, root.shape[1])) @ root.T
    a = rng.normal(size=(n, 3, 5))
    y = np.einsum("nmd,nd->nm", a, x) + 0.1 * rng.normal(size=(n, 3))
    return Problem([Source("a", (5,))], [View(y, {"a": Dense(a)}, 0.1, truth={"a": x})])


def test_random_projections_give_the_covariance(rng):
    """Three numbers of five each: errors a few times those of complete data, √(2 / n) of the variance."""
    n, root = 4000, factor(rng, 5, 2)
    model = ClvmLinear(projected(rng, n, root, 1.0), rank=2).fit(progress=False)
    error = np.linalg.norm(covariance(model, "a") - root @ root.T)
    assert error < 4 * np.sqrt(2 / n) * np.linalg.norm(root @ root.T)
    np.testing.assert_allclose(mean(model, "a"), 1.0, atol=5 * np.sqrt(np.sum(root**2) / n))


def test_evidence_never_falls_and_ends_at_a_stationary_point(rng):
    data = [g.gather(projected(rng, 500, factor(rng, 5, 3), 0.0).views[0].prepare())]
    begin = clvm.grow(data, clvm.start(data), 3)
    fit = clvm.maximise(data, begin)
    assert len(fit.history) > 5
    assert np.all(np.diff(fit.history) >= 0)
    first = g.mean_evidence(data, begin.means, begin.factors)
    assert first < fit.history[0] <= fit.history[-1] == fit.value
    end = data[0].slopes(fit.means, fit.factors)
    assert np.abs(end.factors["a"]).max() / 500 < 1e-2
    assert np.abs(end.means["a"]).max() / 500 < 1e-2


def test_moments_and_rows_are_fitted_alike(rng):
    problem, _ = seen_directly(rng, n=300, dim=4, rank=2)
    obs = problem.views[0].prepare()
    fits = []
    for data in ([g.Rows(obs)], [g.Moments(obs)]):
        fits.append(clvm.maximise(data, clvm.grow(data, clvm.start(data), 3)))
    one, other = (fit.factors["a"] @ fit.factors["a"].T for fit in fits)
    np.testing.assert_allclose(one, other, atol=1e-3)
    assert fits[0].value == pytest.approx(fits[1].value, rel=1e-7)


def test_growth_never_loses_training_evidence(rng):
    model = ClvmLinear(projected(rng, 600, factor(rng, 5, 3), 0.0)).fit(progress=False)
    assert [row["rank"] for row in model.metrics[:-1]] == [1, 2, 3, 4, 5]
    values = [row["log_evidence"] for row in model.metrics[:-1]]
    assert np.all(np.diff(values) > -1e-3)


def test_rank_is_the_one_with_the_largest_held_out_evidence(rng):
    model = ClvmLinear(seen_directly(rng)[0]).fit(progress=False)
    best = max(model.metrics[:-1], key=lambda row: row["heldout_log_evidence"])
    assert model.chosen == {"rank": best["rank"]}
    assert best["rank"] >= 2
    assert np.linalg.matrix_rank(covariance(model, "a"), tol=1e-4) <= best["rank"]


def test_what_no_observation_sees_stays_small(rng):
    problem, _ = seen_directly(rng, n=200)
    mask = np.ones(6)
    mask[2] = 0
    view = dataclasses.replace(problem.views[0], mask=mask)
    model = ClvmLinear(Problem(problem.sources, [view])).fit(progress=False)
    assert covariance(model, "a")[2, 2] < NOISE**2
    assert abs(mean(model, "a")[2]) < 1e-6


# The public interface


def test_draws_follow_the_analytic_posterior(rng):
    """`(x − m)ᵀ V⁻¹ (x − m)` of D numbers and n draws is D ± √(2 D / n), five of those allowed."""
    n, dim = 3000, 4
    problem, _ = seen_directly(rng, n=n, dim=dim, rank=4)
    model = ClvmLinear(problem, rank=4).fit(progress=False)
    c = covariance(model, "a")
    gain = c @ np.linalg.inv(c + NOISE**2 * np.eye(dim))
    v = c - gain @ c
    y = np.asarray(problem.views[0].observations, float)
    m = mean(model, "a") + (y - mean(model, "a")) @ gain.T
    found = model.separate("view1", seed=3)
    r = found.draws["a"][0] - m
    chi2 = np.einsum("ni,ij,nj->n", r, np.linalg.inv(v), r)
    assert abs(chi2.mean() - dim) < 5 * np.sqrt(2 * dim / n)
    assert abs(found.chi2.mean() - 1) < 5 * np.sqrt(2 / (n * dim))
    later = model.separate(problem.views[0].select(slice(100, 200)), seed=3, first_index=100)
    np.testing.assert_array_equal(later.draws["a"], found.draws["a"][:, 100:200])


def test_prior_draws_have_the_learned_moments(rng):
    model = ClvmLinear(seen_directly(rng)[0], rank=2).fit(progress=False)
    x, c = model.sample_prior("a", 4000, seed=1), covariance(model, "a")
    np.testing.assert_allclose(x.mean(axis=0), mean(model, "a"), atol=5 * np.sqrt(c.max() / 4000))
    np.testing.assert_allclose(np.cov(x.T), c, atol=5 * np.sqrt(2 / 4000) * c.max())


def test_a_finished_model_is_kept_and_loaded(rng, tmp_path, monkeypatch):
    problem, _ = seen_directly(rng)
    model = ClvmLinear(problem, rank=2).fit(tmp_path / "a", progress=False)
    monkeypatch.setattr(clvm, "maximise", None)  # nothing is fitted from here on
    again = ClvmLinear(problem, rank=2).fit(tmp_path / "a", resume=True, progress=False)
    loaded = ClvmLinear.load(tmp_path / "a", problem=problem)
    plain = Separator.load(tmp_path / "a", problem=problem)
    for other in (again, loaded, plain):
        np.testing.assert_array_equal(covariance(other, "a"), covariance(model, "a"))
        one, two = (m.separate("view1", seed=5).draws["a"] for m in (model, other))
        np.testing.assert_array_equal(one, two)
    assert (
        (again.chosen, again.metrics)
        == (loaded.chosen, loaded.metrics)
        == ({"rank": 2}, model.metrics)
    )
    with pytest.raises(RunError, match="already holds a model"):
        ClvmLinear(problem, rank=2).fit(tmp_path / "a", progress=False)
    with pytest.raises(RunError, match="other settings"):
        ClvmLinear(problem, rank=3).fit(tmp_path / "a", resume=True, progress=False)
    with pytest.raises(RunError, match="another problem"):
        other = seen_directly(rng)[0]
        ClvmLinear(other, rank=2).fit(tmp_path / "a", resume=True, progress=False)


def test_errors_say_what_to_do(rng):
    problem, _ = seen_directly(rng)
    for rank in (0, 7, 2.5):
        with pytest.raises(ConfigError, match="between 1 and 6"):
            ClvmLinear(problem, rank=rank).fit(progress=False)
    with pytest.raises(ConfigError, match="holdout"):
        ClvmLinear(problem, holdout=1.0)
    with pytest.raises(RunError, match="without a problem"):
        ClvmLinear().fit()
    with pytest.raises(RunError, match="nothing is learned"):
        ClvmLinear(problem).sample_prior("a", 3)


def test_ranks_grow_by_half_octaves():
    assert candidate_ranks(None, {"a": 5, "b": 2}) == [1, 2, 3, 4, 5]
    assert candidate_ranks(None, {"a": 20}) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert candidate_ranks(None, {"a": 1}) == [1]


def test_isotropic_noise_of_each_observation(rng):
    """Noisier observations count less: the mean is the weighted one where W is small."""
    std = np.where(np.arange(200) % 2, 0.5, 2.0)
    y = 3 + std[:, None] * rng.normal(size=(200, 2))
    obs = Observations(y, {"a": Identity((2,))}, IsotropicNoise(std))
    means = g.least_squares_means([g.gather(obs)])
    weights = std**-2 / np.sum(std**-2)
    np.testing.assert_allclose(means["a"], weights @ y, rtol=1e-3)
