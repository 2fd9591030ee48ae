"""Sources with bounds: draws within them, and the others' exact conditional distribution given these."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from followers import KillAt, Killed
from scipy.stats import chi2, kstest

from dichroic import FitConfig, Problem, Separator, Source, View
from dichroic.benchmark.harness.scores import posterior_scores
from dichroic.cli.options import bounds as parse
from dichroic.errors import ConfigError
from dichroic.inference.constraints import _excess, bounded, check_learned, of_others, within_bounds
from dichroic.inference.sampling import draw, predictive_chi2
from dichroic.learning.data import prepare
from dichroic.learning.diffusion.e_step import expectation
from dichroic.metrics import psnr
from dichroic.operators import Dense, Diagonal, Identity, Scale
from dichroic.operators.scaling import scale_parameters
from dichroic.priors import gaussian

DIM, NOISE = 6, 0.05
FIT = {
    "mixture": {"components": 2, "gaussian_iterations": 3, "iterations": 1, "final_iterations": 2},
    "joint_iterations": 0,
    "diffusion": {"iterations": 0},
}
KEY = jax.random.key(3)


def settings(bounds, **rest):
    return FitConfig.from_dict({**FIT, "bounds": bounds, **rest})


def two_gaussians(rng, dim=DIM, n=40, view_rows=None):
    """Priors of `a` and `b`, an operator on each, and observations of both; dense covariances too."""
    rows = view_rows or dim
    roots = {k: rng.normal(size=(dim, dim)) / np.sqrt(dim) for k in "ab"}
    covs = {k: r @ r.T + 0.1 * np.eye(dim) for k, r in roots.items()}
    means = {"a": rng.normal(size=dim), "b": np.full(dim, 0.3)}
    ops = {k: np.eye(rows, dim) + 0.1 * rng.normal(size=(rows, dim)) for k in "ab"}
    x = {k: means[k] + rng.multivariate_normal(np.zeros(dim), covs[k], size=n) for k in "ab"}
    y = sum(x[k] @ ops[k].T for k in "ab") + NOISE * rng.normal(size=(n, rows))
    priors = {k: gaussian(means[k], covs[k]) for k in "ab"}
    view = View(y.astype(np.float32), {k: Dense(a) for k, a in ops.items()}, NOISE, name="both")
    return priors, view, (means, covs, ops, y)


@pytest.mark.parametrize("dim", [DIM, 140])  # dense, and of low rank
def test_draws_are_moved_and_the_others_follow_their_posterior(rng, dim):
    priors, view, (means, covs, ops, y) = two_gaussians(rng, dim)
    obs, config = view.prepare(), settings({"b": [0, None]})
    free = draw(priors, obs, KEY, settings({}), n_draws=8)
    found = draw(priors, obs, KEY, config, n_draws=8)
    assert list(found.x) == list(free.x)
    np.testing.assert_array_equal(found.x["b"], np.maximum(free.x["b"], 0))
    assert 0.2 < np.mean(found.x["b"] == 0) < 0.5

    gram = ops["a"] @ covs["a"] @ ops["a"].T + NOISE**2 * np.eye(dim)
    gain = covs["a"] @ ops["a"].T @ np.linalg.inv(gram)
    cov = covs["a"] - gain @ ops["a"] @ covs["a"]
    rest = y - found.x["b"] @ ops["b"].T - ops["a"] @ means["a"]
    off = (found.x["a"] - means["a"] - rest @ gain.T).reshape(-1, dim)
    z = np.linalg.solve(np.linalg.cholesky(cov), off.T)
    assert kstest(z.ravel()[:: max(1, z.size // 4000)], "norm").pvalue > 1e-3
    total = np.sum(z**2)  # of as many degrees of freedom
    assert chi2.cdf(total, z.size) == pytest.approx(0.5, abs=0.4999)
    alone = dataclasses.replace(free, x={**free.x, "b": found.x["b"]})
    assert np.mean(predictive_chi2(obs, found)) < 0.1 * np.mean(predictive_chi2(obs, alone))


def test_where_all_sources_have_bounds_each_makes_room_for_the_next(rng):
    priors, view, _ = two_gaussians(rng)
    obs = view.prepare()
    wide = [-50.0, 50.0]
    first = draw(priors, obs, KEY, settings({"b": [0, None], "a": wide}), n_draws=4)
    alone = draw(priors, obs, KEY, settings({"b": [0, None]}), n_draws=4)
    for k in "ab":  # no draw of `a` is beyond its bounds
        np.testing.assert_array_equal(first.x[k], alone.x[k])
    last = draw(priors, obs, KEY, settings({"a": wide, "b": [0, None]}), n_draws=4)
    assert last.x["b"].min() == 0
    assert np.mean(predictive_chi2(obs, last)) > 2 * np.mean(predictive_chi2(obs, first))


def test_a_source_alone_is_moved_and_nothing_else(rng):
    prior = {"b": gaussian(np.zeros(DIM), np.eye(DIM))}
    obs = View(rng.normal(size=(9, DIM)), {"b": Identity(DIM)}, 0.5, name="b").prepare()
    free, found = (draw(prior, obs, KEY, settings(b)) for b in ({}, {"b": [-0.5, 0.5]}))
    np.testing.assert_array_equal(found.x["b"], np.clip(free.x["b"], -0.5, 0.5))
    for name in ("residual", "converged", "steps"):
        np.testing.assert_array_equal(getattr(found, name), getattr(free, name))


def test_progress_reaches_its_end_once_and_never_falls(rng):
    priors, view, _ = two_gaussians(rng)
    told = []
    config = settings({"b": [0, None]})
    draw(priors, view.prepare(), KEY, config, n_draws=3, progress=lambda *p: told.append(p))
    shares = [done / count for done, count in told]
    assert shares == sorted(shares) and shares.count(1.0) == 1 and min(shares) < 0.5


def test_what_is_left_for_the_others(rng):
    n, mask = 150, rng.uniform(size=(150, 4)) > 0.2
    each = rng.normal(size=(n, 4, 3))
    ops = {"a": Scale(4, 2.0), "b": Dense(each), "c": Diagonal(np.arange(4.0))}
    y = rng.normal(size=(n, 4))
    obs = View(y, ops, 0.1, name="v", mask=mask).prepare()
    x = {"b": rng.normal(size=(n, 3)), "a": rng.normal(size=(n, 4))}
    rest = of_others(obs, x)
    assert rest.sources == ("c",)
    want = y - np.einsum("nij,nj->ni", each, x["b"]) - 2 * x["a"]
    np.testing.assert_allclose(rest.y * mask, want * mask, atol=1e-5)
    part = View(y[70:], {**ops, "b": Dense(each[70:])}, 0.1, name="v", mask=mask[70:]).prepare()
    again = of_others(part, {k: a[70:] for k, a in x.items()}, 70)
    np.testing.assert_array_equal(rest.y[70:], again.y)


def test_bounds_are_of_the_source_whatever_its_units(rng):
    s = jnp.asarray(rng.uniform(0.5, 2, size=5), jnp.float32)
    obs = View(rng.normal(size=(3, 5)), {"a": Scale(5, 2.0)}, 0.1, name="v").prepare()
    u = rng.normal(size=(3, 5)).astype(np.float32)
    for values, units in (({}, 1.0), (scale_parameters({"a": s}), s)):
        moved = bounded(u, obs.at(values).operators["a"], (-0.2, 0.3))
        np.testing.assert_allclose(moved * units, np.clip(u * units, -0.2, 0.3), rtol=1e-6)
    one = within_bounds({"a": u, "b": u}, {"a": (0.1, None)})
    assert one["a"].min() == np.float32(0.1) and one["b"] is u


@pytest.mark.parametrize("z", [-3.0, -0.5, 0.0, 2.0])
def test_the_squares_beyond_a_bound(z, rng):
    u = np.maximum(z - rng.normal(size=10**6), 0) ** 2
    assert _excess(np.array(z)) == pytest.approx(u.mean(), abs=5 * u.std() / 1e3 + 1e-9)


@pytest.mark.parametrize(
    ("mean", "std", "ends"),
    [(0.0, 1.0, (0.0, None)), (0.1, 0.3, (0.0, 1.0)), (-0.02, 0.1, (0.0, None)), (5.0, 3.0, (None, 6.0))],
)  # fmt: skip
def test_bounds_that_a_source_may_have(mean, std, ends):
    check_learned({"a": gaussian(np.full(4, mean), std**2 * np.eye(4))}, {"a": ends, "b": (0, 1)})


@pytest.mark.parametrize(
    ("mean", "std", "ends"), [(33.0, 79.0, (0.0, 1.0)), (-5.0, 1.0, (0.0, None)), (9.0, 1.0, (-1.0, 0.5))]
)  # fmt: skip
def test_bounds_that_contradict_a_source(mean, std, ends):
    prior = {"a": gaussian(np.full(4, mean), std**2 * np.eye(4))}
    with pytest.raises(ConfigError, match=r"fit\.bounds\.a: .* in the units of the source"):
        check_learned(prior, {"a": ends})


def sparse_problem(n, seed=0, unit=1.0):
    """`sky` alone, and behind `star`: most of whose entries are 0, and none below."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(5).normal(size=(2, DIM))
    sky = lambda: rng.normal(size=(n, 2)) @ basis + 0.3 * rng.normal(size=(n, DIM))
    star = unit * rng.exponential(size=(n, DIM)) * (rng.uniform(size=(n, DIM)) < 0.3)
    noisy = lambda x: (x + NOISE * rng.normal(size=x.shape)).astype(np.float32)
    alone, behind = sky(), sky()
    op = Identity(DIM)
    views = [
        View(noisy(alone), {"sky": op}, NOISE, name="sky"),
        View(
            noisy(behind + star),
            {"sky": op, "star": op},
            NOISE,
            name="both",
            truth={"sky": behind, "star": star},
        ),
    ]
    return Problem([Source("sky", (DIM,)), Source("star", (DIM,))], views)


@pytest.fixture(scope="module")
def fits():
    """Without and with what is known of the source."""
    problem = sparse_problem(1000)
    made = lambda bounds: Separator(problem, settings(bounds)).fit(progress=False)
    return made({}), made({"star": [0, None]})


@pytest.mark.slow
def test_draws_within_bounds_are_nearer_to_the_truth(fits):
    view = sparse_problem(400, seed=1).views[1]
    free, found = (s.separate(view, n_draws=8) for s in fits)
    for name, truth in view.truth.items():
        score = lambda r, name=name, truth=truth: psnr(r.draws[name][0], truth, data_range=1.0)
        assert score(found) > score(free) + 0.3
    assert found.draws["star"].min() == 0 > free.draws["star"].min()
    assert abs(np.mean(found.chi2) - np.mean(free.chi2)) < 0.1
    assert fits[1].sample_prior("star", 100).min() == 0 > fits[0].sample_prior("star", 100).min()
    scores = posterior_scores(
        free.draws, view.truth, {"sky": 1.0, "star": 1.0}, 9, {"star": (0, None)}
    )
    moved = np.maximum(free.draws["star"], 0)
    assert scores["star"]["within"]["psnr"] == psnr(moved[0], view.truth["star"], data_range=1.0)
    assert "within" not in scores["sky"]


def test_draws_within_bounds_depend_on_no_other(fits):
    view = sparse_problem(150, seed=1).views[1]
    want = fits[1].separate(view, n_draws=2).draws
    for name, x in fits[1].separate(view, n_draws=3).draws.items():
        np.testing.assert_array_equal(x[:2], want[name])
    for first, part in fits[1].stream(view, n_draws=2, chunk=70):
        for name, x in part.draws.items():
            np.testing.assert_array_equal(x, want[name][:, first : first + x.shape[1]])


def test_bounds_go_with_the_model(fits, tmp_path):
    separator, view = fits[1], sparse_problem(20, seed=1).views[1]
    separator.save(tmp_path / "model")
    loaded, want = Separator.load(tmp_path / "model"), separator.separate(view).draws
    np.testing.assert_array_equal(loaded.separate(view).draws["star"], want["star"])
    blend = {"left": "star", "right": "star", "sky": "sky"}
    both = View(view.observations, dict.fromkeys(blend, Identity(DIM)), NOISE, name="blend")
    found = loaded.with_sources(blend).separate(both).draws
    assert found["left"].min() == found["right"].min() == 0 > found["sky"].min()


@pytest.mark.slow
def test_networks_learn_from_draws_within_bounds(fits):
    separator = fits[1]
    data = prepare(separator.problem, separator.config)
    x = expectation(separator.denoisers, data.train, data.names, KEY, separator.config, 1)
    assert x["star"].min() == 0


def test_a_run_with_bounds_goes_on_with_these_alone(tmp_path):
    problem, config = sparse_problem(300), settings({"star": [0, None]})
    with pytest.raises(Killed):
        Separator(problem, config).fit(tmp_path, progress=KillAt(2))
    for other in ({}, {"star": [0, 9]}, {"star": [0, None], "sky": [-9, 9]}):
        with pytest.raises(Exception, match=r"other settings \(bounds"):
            Separator(problem, settings(other)).fit(tmp_path, resume=True, progress=False)
    Separator(problem, config).fit(tmp_path, resume=True, progress=False)


def test_bounds_in_other_units_are_found_out():
    problem = sparse_problem(300, unit=255.0)
    with pytest.raises(ConfigError, match=r"fit\.bounds\.star: \[0, 1\], but"):
        Separator(problem, settings({"star": [0, 1]})).fit(progress=False)


def test_bounds_of_no_source_are_refused():
    with pytest.raises(ConfigError, match=r"fit\.bounds: there is no source 'stars'"):
        prepare(sparse_problem(20), settings({"stars": [0, 1]}))


@pytest.mark.parametrize(
    "bounds",
    [{"a": [0]}, {"a": [0, 1, 2]}, {"a": [1, 0]}, {"a": [1, 1]}, {"a": [None, None]}, {"a": []}],
)
def test_bounds_that_are_none(bounds):
    with pytest.raises(ConfigError, match=r"bounds\.a: expected a lower and an upper bound"):
        settings(bounds)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (3, r"fit\.bounds: expected a table"),
        ({"a": 3}, r"fit\.bounds\.a: expected a list"),
        ({"a": ["low", 1]}, r"fit\.bounds\.a: expected float"),
        ({"a": [float("nan"), 1]}, r"fit\.bounds\.a: must be finite"),
    ],
)
def test_bounds_of_a_wrong_type(bounds, message):
    with pytest.raises(ConfigError, match=message):
        settings(bounds)


def test_bounds_on_the_command_line():
    assert parse("a=0:1, b=:2.5,c=-1e3:") == {"a": [0, 1], "b": [None, 2.5], "c": [-1e3, None]}
    for text in ("a", "a=", "a=1", "a=1:2:3", "a=x:1"):
        with pytest.raises(ConfigError, match="expected NAME=LOW:HIGH"):
            parse(text)
