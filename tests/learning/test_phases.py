"""Whole fits of small problems whose answer is known, iteration by iteration."""

import dataclasses
from itertools import groupby

import jax
import numpy as np
import pytest

from dichroic.config import FitConfig
from dichroic.errors import ConfigError
from dichroic.inference.sampling import draw
from dichroic.io.model_files import pack
from dichroic.learning.data import learning_order, prepare
from dichroic.learning.diffusion.score_matching import with_network
from dichroic.learning.fit import fit
from dichroic.learning.mixture.em import mean_log_evidence
from dichroic.learning.mixture.initialisation import initial_gaussian
from dichroic.learning.phases.schedule import advance
from dichroic.learning.scoring import scores
from dichroic.learning.state import State
from dichroic.operators import Dense, Identity, Scale
from dichroic.operators.noise import IsotropicNoise
from dichroic.priors import DiffusionPrior, GaussianMixture, gaussian
from dichroic.problem.observations import Observations
from dichroic.problem.problem import Problem, Source, joint_observations
from dichroic.problem.view import View
from dichroic.separation.separator import Separator

DIM, NOISE = 2, 0.1
COVARIANCE = {
    "a": np.array([[1.0, 0.8], [0.8, 1.0]]),
    "b": np.array([[1.0, -0.6], [-0.6, 0.5]]),
    "c": np.diag([0.1, 2.0]),
}
TINY = FitConfig(joint_iterations=3, batch_size=128).replace(
    {
        "mixture.components": 1,
        "mixture.gaussian_iterations": 4,
        "mixture.steps": 5,
        "diffusion.iterations": 0,
        "diffusion.steps": 20,
        "diffusion.width": 16,
        "diffusion.depth": 1,
        "diffusion.evidence_draws": 2,
        "diffusion.evidence_observations": 64,
    }
)


def gaussian_problem(mixing, *, count=400, seed=0, truth=True, group=None):
    """Views of Gaussian sources `a, b, …`, `y = Σ_β f_β x_β + η`, with one row of `f` for each view.

    Co-observed views (`group`) share their draws."""
    rng = np.random.default_rng(seed)
    names = "abc"[: len(mixing[0])]
    draw = lambda: {k: rng.multivariate_normal(np.zeros(DIM), COVARIANCE[k], count) for k in names}
    common, views = draw(), []
    for i, row in enumerate(mixing):
        x = common if group else draw()
        seen = {k: f for k, f in zip(names, row, strict=True) if f}
        y = sum(f * x[k] for k, f in seen.items()) + NOISE * rng.normal(size=(count, DIM))
        ops = {k: Scale(DIM, f) for k, f in seen.items()}
        known = {k: x[k] for k in seen} if truth else {}
        views.append(View(y, ops, NOISE, f"view{i + 1}", group=group, truth=known))
    return Problem([Source(k, DIM) for k in names], views)


CONTRASTIVE = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
MIXED = [[1, 0.3], [0.3, 1]]


def iterations(problem, config):
    """`(state after the iteration, metrics)` of all iterations."""
    data, state, out = prepare(problem, config), State(), []
    while not state.done:
        state, metrics = advance(state, data, config)
        out.append((state, metrics))
    return data, out


def sees(*names):
    return Observations(np.ones((3, DIM)), {k: Identity(DIM) for k in names}, IsotropicNoise(1.0))


@pytest.mark.parametrize(
    ("views", "order"),
    [
        (["a", "ab", "abc"], [("a",), ("b",), ("c",)]),
        (["abc", "a", "ab"], [("a",), ("b",), ("c",)]),
        (["abc", "abc"], [("a", "b", "c")]),
        (["ab", "bc"], [("a", "b"), ("c",)]),
        (["abc", "bc"], [("b", "c"), ("a",)]),
        (["c", "bc", "abcd"], [("c",), ("b",), ("a", "d")]),
        (["ba"], [("a", "b")]),
    ],
)
def test_sources_are_learned_where_the_fewest_are_new(views, order):
    assert learning_order([sees(*names) for names in views]) == tuple(order)


@pytest.mark.parametrize(
    "order",
    [(("a",), ("b",)), (("a", "b", "c"), ("c",)), (("a", "b", "c", "d"),), (("a", "b", "c"), ())],
)
def test_an_order_that_is_none_of_all_sources_is_refused(order):
    problem = gaussian_problem(CONTRASTIVE, count=10)
    with pytest.raises(ConfigError, match="must list every source exactly once"):
        prepare(problem, FitConfig(order=order))


@pytest.mark.parametrize(
    ("order", "source", "why"),
    [
        ((("c",), ("b",), ("a",)), "c", "view3: a, b"),
        ((("a",), ("c",), ("b",)), "c", "view3: b"),
        ((("b",), ("a", "c")), "b", "view2: a; view3: a, c"),
    ],
)
def test_an_order_in_which_a_source_cannot_be_learned_is_refused(order, source, why):
    problem = gaussian_problem(CONTRASTIVE, count=10)
    with pytest.raises(ConfigError, match=rf"^fit\.order: '{source}' cannot be .*\({why}\); put"):
        prepare(problem, FitConfig(order=order))


def test_the_held_out_observations_of_a_view_are_honoured():
    base = gaussian_problem([[1, 0], [1, 1]], count=40)
    chosen = np.arange(40) % 7 == 2
    first = dataclasses.replace(base.views[0], held_out=chosen)
    data = prepare(Problem(base.sources, [first, base.views[1]]), FitConfig(holdout=0.25))
    y, truth = (np.asarray(a, np.float32) for a in (first.observations, first.truth["a"]))
    np.testing.assert_array_equal(data.test[0].y, y[chosen])
    np.testing.assert_array_equal(data.train[0].y, y[~chosen])
    np.testing.assert_allclose(data.truth[0]["a"], truth[chosen], rtol=1e-6)
    # Of the other view a quarter is held out; nothing is lost, nothing is in both.
    assert [obs.count for obs in (data.test[1], data.train[1])] == [10, 30]
    both = np.concatenate([data.test[1].y, data.train[1].y])
    assert {r.tobytes() for r in both} == {
        r.tobytes() for r in np.asarray(base.views[1].observations, np.float32)
    }


def test_co_observed_views_are_held_out_together():
    problem = gaussian_problem([[1, 1], [1, -0.5]], count=50, group="g")
    data = prepare(problem, FitConfig(holdout=0.2))
    assert data.names == ("view1+view2",)
    assert (data.train[0].y.shape, data.test[0].y.shape) == ((40, 4), (10, 4))
    x = data.truth[0]
    expect = np.concatenate([x["a"] + x["b"], x["a"] - 0.5 * x["b"]], axis=1)
    assert np.abs(data.test[0].y - expect).max() < 5 * NOISE


def test_a_fit_starts_from_the_power_of_the_views(rng):
    """`E‖y‖² = v Σ_β tr(A_β A_βᵀ)` for sources `N(0, v I)`; the weakest view counts."""
    n, v, std = 64, 2.5, 0.01
    a = {k: rng.normal(size=(n, 3, DIM)) for k in "ab"}
    x = {k: np.sqrt(v) * rng.normal(size=(n, DIM)) for k in "ab"}
    y = sum(np.einsum("nmd,nd->nm", a[k], x[k]) for k in "ab")
    obs = Observations(y, {k: Dense(a[k]) for k in "ab"}, IsotropicNoise(std))
    gain = sum(np.mean(np.sum(a[k] ** 2, axis=(1, 2))) for k in "ab")
    expect = np.mean(np.sum(y**2, axis=1)) / gain
    prior = initial_gaussian("a", [obs], ("a", "b"))
    np.testing.assert_allclose(prior.covariances()[0], expect * np.eye(DIM), atol=1e-5)
    np.testing.assert_array_equal(prior.location, 0)
    loud = Observations(3 * y, obs.operators, obs.noise)
    prior = initial_gaussian("a", [loud, obs], ("a", "b"))
    np.testing.assert_allclose(prior.covariances()[0], expect * np.eye(DIM), atol=1e-5)


def runs(metrics):
    """`(phase, sources, components, number of iterations)` of the fit."""
    key = lambda m: (m["phase"], m["sources"], m.get("components"))
    return [(*k, len(list(g))) for k, g in groupby(metrics, key)]


@pytest.fixture(scope="module")
def contrastive():
    return iterations(gaussian_problem(CONTRASTIVE), TINY)


def test_contrastive_sources_are_learned_in_turn_and_then_together(contrastive):
    _, out = contrastive
    assert runs([m for _, m in out]) == [
        *[("mixture", k, 1, 4) for k in "abc"],
        ("refinement", "a+b+c", None, 3),
    ]
    states, metrics = zip(*out, strict=True)
    assert [m["iteration"] for m in metrics] == [s.total for s in states] == list(range(1, 16))
    assert [s.phase for s in states[-4:]] == ["refinement"] * 3 + ["done"]
    assert np.diff([s.seconds for s in states]).min() > 0
    scores = {f"psnr_{k}_view{i}" for i in (1, 2, 3) for k in "abc"[:i]}
    assert scores | {f"chi2_view{i}" for i in (1, 2, 3)} <= metrics[-1].keys()


def test_held_out_chi2_is_of_what_was_observed():
    """Of every second observation nothing is."""
    (view,) = gaussian_problem([[1]], count=400).views
    half = dataclasses.replace(view, mask=np.arange(400)[:, None] % 2 * np.ones(DIM, bool) > 0)
    config = TINY.replace({"holdout": 0.5, "diffusion.evidence_observations": 400})
    data = prepare(Problem([Source("a", DIM)], [half]), config)
    prior = {"a": gaussian(np.zeros(DIM), COVARIANCE["a"])}
    found = scores(prior, data, [0], config)["chi2_view1"]
    seen = int(np.sum(np.any(data.test[0].noise.observed(DIM), axis=1)))
    assert 80 < seen < 120
    assert abs(found - 1) < 4 * np.sqrt(2 / (DIM * seen))


def test_contrastive_sources_are_recovered_within_the_sampling_error(contrastive):
    """As for moments: view i has the covariance of the sum of i sources."""
    _, out = contrastive
    sums = np.cumsum([NOISE**2 * np.eye(DIM), *COVARIANCE.values()], axis=0)
    scatter = [(np.outer(np.diag(s), np.diag(s)) + s**2) / 360 for s in sums]
    for i, (k, cov) in enumerate(COVARIANCE.items()):
        found = np.asarray(out[-1][0].best[k].prior().covariance)
        error = np.sqrt(scatter[i + 1] + (scatter[i] if i else 0))
        assert np.all(np.abs(found - cov) < 4 * error)


def test_the_evidence_grows_within_each_size(contrastive):
    _, out = contrastive
    for _, group in groupby((m for _, m in out), lambda m: (m["sources"], m.get("components"))):
        assert np.diff([m["log_evidence"] for m in group]).min() > -1e-4


def test_every_iteration_is_a_function_of_the_state_before_it(contrastive):
    data, out = contrastive
    states = [State(), *(s for s, _ in out)]
    for i in (0, 3, 4, 11, 12, 14):
        again, metrics = advance(states[i], data, TINY)
        assert arrays(again.current) == arrays(states[i + 1].current)
        assert arrays(again.best) == arrays(states[i + 1].best)
        drop = lambda m: {k: v for k, v in m.items() if not k.startswith(("seconds", "peak_"))}
        assert drop(metrics) == drop(out[i][1])


def arrays(denoisers):
    """All the bits of some denoisers."""
    return {(name, k): a.tobytes() for name, d in denoisers.items() for k, a in pack(d)[0].items()}


OVERFIT = TINY.replace(
    {
        "mixture.components": 4,
        "mixture.iterations": 4,
        "mixture.patience": 9,
        "mixture.shrinkage": 0.0,
        "holdout": 0.5,
    }
)


@pytest.fixture(scope="module")
def overfitted():
    """Few observations of Gaussians: more components fit them better and predict others worse."""
    return iterations(gaussian_problem([[1, 0], [1, 1]], count=60, seed=1), OVERFIT)


def scores_of(out, source):
    return [
        m["heldout_log_evidence"]
        for _, m in out
        if m["phase"] == "mixture" and m["sources"] == source and "heldout_log_evidence" in m
    ]


def test_with_a_prior_on_components_more_of_them_hardly_predict_worse(overfitted):
    free = scores_of(overfitted[1], "a")
    config = OVERFIT.replace({"mixture.shrinkage": None})
    pulled = scores_of(
        iterations(gaussian_problem([[1, 0], [1, 1]], count=60, seed=1), config)[1], "a"
    )
    assert len(pulled) == len(free) == 3
    assert pulled[0] == pytest.approx(free[0], abs=1e-5)
    assert min(free) < free[0] - 0.25
    assert min(pulled) > free[0] - 0.1


@pytest.mark.parametrize("source", ["a", "b"])
def test_the_best_state_has_the_highest_held_out_evidence(source, overfitted):
    data, out = overfitted
    own = [(s, m) for s, m in out if m["phase"] == "mixture" and m["sources"] == source]
    scores = scores_of(out, source)
    assert len(scores) == 3, "sizes 1, 2, 3: ten observations for each component"
    assert np.argmax(scores) < 2, "there is something to choose"
    best = own[-1][0].best
    view = {"a": 0, "b": 1}[source]
    np.testing.assert_allclose(mean_log_evidence(best, [data.test[view]]), max(scores), rtol=1e-5)


def test_refinement_never_lowers_the_held_out_evidence(overfitted):
    data, out = overfitted
    at = [m["phase"] for _, m in out].index("refinement")
    before, after = (mean_log_evidence(out[i][0].best, data.test) for i in (at - 1, -1))
    assert after >= before
    np.testing.assert_allclose(out[-1][1]["heldout_log_evidence"], after, rtol=1e-5)


def test_growth_stops_after_sizes_without_a_better_score():
    config = TINY.replace(
        {
            "mixture.components": 64,
            "mixture.iterations": 4,
            "mixture.patience": 1,
            "mixture.shrinkage": 0.0,
            "holdout": 0.5,
        }
    )
    _, out = iterations(gaussian_problem([[1]], count=60, seed=1), config)
    scores = [m["heldout_log_evidence"] for _, m in out if "heldout_log_evidence" in m]
    better = np.diff(scores) > 0
    assert np.all(better[:-1])
    assert not better[-1]
    assert len(scores) < 7, "not all sizes up to 64"


def test_mixed_sources_are_learned_at_once():
    _, out = iterations(gaussian_problem(MIXED), TINY)
    assert runs([m for _, m in out]) == [("mixture", "a+b", 1, 4)]
    # A view says 0.3 times as much of one source as of the other, so of both there is something to know.
    found = {k: np.asarray(d.prior().covariance) for k, d in out[-1][0].best.items()}
    assert all(np.abs(found[k] - COVARIANCE[k]).max() < 0.3 for k in found)


@pytest.fixture(scope="module")
def diffused():
    config = TINY.replace({"diffusion.iterations": 1, "sampler.name": "ddpm", "sampler.steps": 8})
    return config, iterations(gaussian_problem([[1]]), config)


def test_diffusion_keeps_what_gains_evidence(diffused):
    _, (_, out) = diffused
    assert runs([m for _, m in out]) == [("mixture", "a", 1, 4), ("diffusion", "a", None, 1)]
    (before, _), (last, metrics) = out[-2:]
    gain, error = metrics["evidence_gain_a"], metrics["evidence_gain_error_a"]
    assert last.done
    assert (last.best["a"] is before.best["a"]) == (gain <= 2 * error)
    assert last.score == (gain if gain > 2 * error else 0)


def test_a_iteration_without_a_gain_ends_the_fit_and_changes_nothing(monkeypatch):
    config = TINY.replace({"diffusion.iterations": 3})
    for gain, count in ((-1.0, 1), (0.19, 1), (0.21, 3)):
        monkeypatch.setattr(
            "dichroic.learning.phases.diffusion.evidence_gain", lambda *a, g=gain, **k: (g, 0.1)
        )
        state, rows = fit(gaussian_problem([[1]]), config)
        assert runs(rows)[-1] == ("diffusion", "a", None, count)
        assert isinstance(state.best["a"], GaussianMixture) == (count == 1)
        assert state.score == pytest.approx(3 * gain if count == 3 else 0)


def test_every_network_is_kept_where_that_is_asked_for(monkeypatch):
    """Iterations without a gain still count as such."""
    monkeypatch.setattr(
        "dichroic.learning.phases.diffusion.evidence_gain", lambda *a, **k: (-1.0, 0.1)
    )
    config = TINY.replace(
        {"diffusion.iterations": 3, "diffusion.keep": "all", "diffusion.patience": 2}
    )
    state, rows = fit(gaussian_problem([[1]]), config)
    assert runs(rows)[-1] == ("diffusion", "a", None, 2)
    assert isinstance(state.best["a"], DiffusionPrior)


def test_the_truth_changes_nothing_but_the_scores(diffused):
    config, (_, out) = diffused
    state, rows = fit(gaussian_problem([[1]], truth=False), config)
    assert arrays(state.current) == arrays(out[-1][0].current)
    assert arrays(state.best) == arrays(out[-1][0].best)
    for without, (_, full) in zip(rows, out, strict=True):
        assert without.keys() == {k for k in full if not k.startswith("psnr_")}
        cost = ("seconds", "peak_memory")
        assert all(without[k] == full[k] for k in without if not k.startswith(cost))
    assert any(k.startswith("psnr_") for k in out[-1][1])


def test_sources_are_learned_in_the_order_asked_for():
    config = dataclasses.replace(TINY, order=(("a", "b"), ("c",)))
    state, rows = fit(gaussian_problem(CONTRASTIVE), config)
    assert [r[:2] for r in runs(rows)] == [
        ("mixture", "a+b"),
        ("mixture", "c"),
        ("refinement", "a+b+c"),
    ]
    assert set(state.best) == {"a", "b", "c"}


def error(separator, views, truth):
    """The root mean square error of one posterior draw of `a`."""
    found = separator.separate(views).draws["a"][0]
    return np.sqrt(np.mean((found - truth) ** 2))


@pytest.mark.slow
def test_co_observed_views_separate_better_together_than_alone():
    """With both views the sources are all but solved for: a draw is off by √2 posterior deviations."""
    mixing = np.array([[1, 1], [1, -0.5]])
    problem = gaussian_problem(mixing, group="g")
    config = TINY.replace({"mixture.gaussian_iterations": 10})
    truth = problem.views[0].truth["a"]
    joint = error(Separator(problem, config).fit(progress=False), list(problem.views), truth)
    alone = [
        error(Separator(Problem(problem.sources, [v]), config).fit(progress=False), v, truth)
        for v in (dataclasses.replace(v, group=None) for v in problem.views)
    ]
    both = np.kron(mixing, np.eye(DIM))
    prior = np.zeros((4, 4))
    prior[:2, :2], prior[2:, 2:] = COVARIANCE["a"], COVARIANCE["b"]
    posterior = np.linalg.inv(np.linalg.inv(prior) + both.T @ both / NOISE**2)
    expect = np.sqrt(2 * np.trace(posterior[:2, :2]) / DIM)
    np.testing.assert_allclose(joint, expect, rtol=0.1)
    assert joint < 0.25 * min(alone)


def image_problem(count, seed):
    """Faint or bright sums of fixed waves, alone and under a bump in one of three places: 12 × 12 entries."""
    rng = np.random.default_rng(seed)
    u, v = np.meshgrid(np.arange(12), np.arange(12), indexing="ij")
    waves = np.stack([np.cos(0.5 * (i * u + j * v)) for i, j in np.ndindex(2, 4) if i + j])
    places = [(3, 3), (8, 4), (6, 9)]
    shapes = np.stack([np.exp(-((u - i) ** 2 + (v - j) ** 2) / 6) for i, j in places])
    bright = lambda: rng.choice([0.1, 0.3, 1.0, 3.0], size=(count, 1)) / 2
    stripes = lambda: np.einsum(
        "nk,kij->nij", bright() * rng.normal(size=(count, len(waves))), waves
    )
    bumps = lambda: rng.uniform(1, 3, size=(count, 1, 1)) * shapes[rng.integers(3, size=count)]

    noise = lambda: 0.1 * rng.normal(size=(count, 12, 12))
    shape = (12, 12)
    alone, behind, bump = stripes(), stripes(), bumps()
    operators = {"bump": Identity(shape), "stripes": Identity(shape)}
    return Problem(
        [Source("stripes", shape), Source("bump", shape)],
        [
            View(alone + noise(), {"stripes": Identity(shape)}, 0.1, "alone"),
            View(behind + bump + noise(), operators, 0.1, "both", truth={"bump": bump}),
        ],
    )


@pytest.mark.parametrize(
    ("true", "most", "found"), [(3, 64, 8), (14, 64, 16), (14, 8, 8), (40, 64, 64)]
)
def test_the_rank_of_large_sources_doubles_while_held_out_evidence_grows(true, most, found):
    rng = np.random.default_rng(true)
    x = rng.normal(size=(800, true)) @ rng.normal(size=(true, 150)) / np.sqrt(true)
    view = View(x + 0.1 * rng.normal(size=x.shape), {"a": Identity(150)}, 0.1)
    settings = {"components": 1, "rank": most, "gaussian_iterations": 2}
    config = {"mixture": settings, "diffusion": {"iterations": 0}}
    separator = Separator(Problem([Source("a", (150,))], [view]), config).fit(progress=False)
    assert separator.denoisers["a"].variances.shape == (1, found)
    tried = [m["rank"] for m in separator.metrics if "heldout_log_evidence" in m]
    assert tried == [r for r in (8, 16, 32, 64) if r <= min(2 * found, most)]


def test_large_gaussians_of_full_rank_are_drawn_from_exactly(rng):
    """More numbers than the dense draws are for: means and variances over 2,000 draws."""
    dim, n_draws = 140, 2000
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    cov = (basis * np.linspace(0.01, 2, dim)) @ basis.T
    obs = joint_observations([View(rng.normal(size=(3, dim)), {"a": Identity(dim)}, 0.3)])
    prior = {"a": gaussian(np.zeros(dim), cov)}
    x = draw(prior, obs, jax.random.key(0), FitConfig(), n_draws=n_draws).x["a"]
    gain = cov @ np.linalg.inv(cov + 0.09 * np.eye(dim))
    variance = np.diag(cov - gain @ cov)
    off = (x.mean(axis=0) - np.asarray(obs.y) @ gain.T) / np.sqrt(variance / n_draws)
    assert np.abs(off).max() < 5
    assert np.abs(x.var(axis=0) / variance - 1).max() < 5 * np.sqrt(2 / n_draws)


@pytest.mark.slow
def test_images_are_separated_by_mixtures_of_low_rank_and_a_unet():
    config = TINY.replace(
        {
            "mixture.components": 4,
            "mixture.rank": 8,
            "mixture.gaussian_iterations": 3,
            "mixture.iterations": 2,
            "mixture.final_iterations": 8,
            "diffusion.iterations": 1,
            "diffusion.evidence_draws": 1,
            "diffusion.steps": 5,
            "diffusion.batch_size": 64,
            "diffusion.channels": 8,
            "diffusion.levels": 1,
            "diffusion.level_depth": 1,
            "sampler.steps": 4,
        }
    )
    separator = Separator(image_problem(1500, 0), config).fit(progress=False)
    base = separator.denoisers["bump"]
    assert (base.basis.shape[1:], base.full_rank) == ((144, 8), False)
    last = separator.metrics[-1]
    assert last["phase"] == "diffusion"
    assert np.isfinite([last["evidence_gain_bump"], last["loss_bump"]]).all()
    view = image_problem(176, 1).views[1]
    found = separator.separate(view, n_draws=8, seed=2)
    truth = view.truth["bump"]
    error = np.sqrt(np.mean((found.mean["bump"] - truth) ** 2))
    assert error < 0.6 * truth.std()
    assert abs(found.chi2.mean() - 1) < 0.1
    # A network that corrects both mixtures, whatever it has learned, is sampled with.
    key = jax.random.key(0)
    corrected = {k: with_network(d, key, config) for k, d in separator.denoisers.items()}
    joined = joint_observations([view])
    chain = draw(corrected, joined, key, config, n_draws=8)
    exact = draw(separator.denoisers, joined, key, config, n_draws=8)
    assert chain.x["bump"].shape == (8, 176, 12, 12)
    spread = lambda x: np.sqrt(np.mean((x["bump"] - truth) ** 2))
    assert spread(chain.x) == pytest.approx(spread(exact.x), rel=0.1)
