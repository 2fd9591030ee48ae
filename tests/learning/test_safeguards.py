"""Values that are not finite, in every phase of a fit: it goes on with the last that were, or says what is wrong."""

import dataclasses
import json

import equinox as eqx
import jax
import numpy as np
import pytest
from followers import Rows

from dichroic.config import FitConfig
from dichroic.errors import RunError
from dichroic.inference.sampling import draw
from dichroic.io.model_files import load_model, pack
from dichroic.learning import fit as runs
from dichroic.learning import safeguards, scoring
from dichroic.learning.checkpoint import load_state
from dichroic.learning.diffusion import e_step, m_step
from dichroic.learning.diffusion.score_matching import with_network
from dichroic.learning.mixture import em as mixture_em
from dichroic.learning.mixture import low_rank_em, operator_em
from dichroic.learning.phases import base, diffusion, mixture
from dichroic.numerics.finite import finite
from dichroic.operators import Identity, Learnable, Scale
from dichroic.priors import GaussianMixture
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View
from dichroic.runtime.tracking import read_metrics
from dichroic.separation.separator import Separator

COUNT = 80
CONFIG = FitConfig(joint_iterations=2, batch_size=128).replace(
    {
        "mixture.components": 2,
        "mixture.gaussian_iterations": 3,
        "mixture.iterations": 2,
        "mixture.final_iterations": 2,
        "mixture.steps": 4,
        "diffusion.iterations": 0,
        "diffusion.steps": 20,
        "diffusion.width": 16,
        "diffusion.depth": 1,
        "diffusion.evidence_draws": 2,
        "sampler.name": "ddpm",
        "sampler.steps": 8,
    }
)
DIFFUSION = CONFIG.replace(
    {"mixture.components": 1, "diffusion.iterations": 2, "diffusion.patience": 9}
)
LATEST = "latest.safetensors"


def sources(names, gain=None):
    """`a` alone, and where there is a `b` the sum of both, `a` with an unknown `gain` if it has one."""
    rng = np.random.default_rng(0)
    a, c, b = rng.normal(size=(3, COUNT, 2)) * [1.0, 0.4]
    noise = lambda: 0.1 * rng.normal(size=(COUNT, 2))
    see = Learnable(Scale(2, gain), "gain") if gain else Identity(2)
    views = [View(a + noise(), {"a": Identity(2)}, 0.1, "alone")]
    if "b" in names:
        views.append(View(c + b[:, ::-1] + noise(), {"a": see, "b": Identity(2)}, 0.1, "both"))
    return Problem([Source(k, 2) for k in names], views)


@pytest.fixture(autouse=True)
def every_iteration_is_kept(monkeypatch):
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def one():
    return sources("a")


@pytest.fixture(scope="module")
def two():
    return sources("ab")


def fit(problem, folder, config=CONFIG, tracker=False):
    return Separator(problem, config).fit(folder, progress=tracker, resume=True)


@pytest.fixture(scope="module")
def whole_one(one):
    return fit(one, None)


@pytest.fixture(scope="module")
def whole_two(two):
    return fit(two, None)


@pytest.fixture(scope="module")
def whole_diffusion(one):
    return fit(one, None, DIFFUSION)


def said(denoisers):
    return {k: {n: a.tobytes() for n, a in pack(d)[0].items()} for k, d in denoisers.items()}


def warnings_of(folder):
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [e["event"] for e in events if e["level"] == "warning"]


def no_numbers(tree):
    """The same with NaN for every number."""
    return jax.tree.map(lambda a: a * np.nan if eqx.is_inexact_array_like(a) else a, tree)


class Breaking:
    """`breaking(module, name, first, count, change)`: what those calls of a function give is changed, until `mend`."""

    def __init__(self):
        self.patch = pytest.MonkeyPatch()
        self.mend = self.patch.undo

    def __call__(self, module, name, first, count=1, change=no_numbers):
        real, calls = getattr(module, name), [0]

        def broken(*args, **kwargs):
            calls[0] += 1
            out = real(*args, **kwargs)
            return change(out) if first <= calls[0] < first + count else out

        self.patch.setattr(module, name, broken)


@pytest.fixture
def breaking():
    patch = Breaking()
    yield patch
    patch.mend()


def improbable(statistics):
    return dataclasses.replace(statistics, log_evidence=-np.inf)


def unsolvable(out):
    raise np.linalg.LinAlgError("Singular matrix")


ALWAYS = 10**9
FAULTS = {
    "sums": ("statistics", no_numbers),
    "evidence": ("statistics", improbable),
    "step": ("maximise", no_numbers),
    "matrix": ("maximise", unsolvable),
}


# Iterations of mixtures


@pytest.mark.parametrize("fault", FAULTS)
def test_an_em_step_that_is_not_finite_is_taken_back_for_a_textbook_step(
    one, whole_one, breaking, tmp_path, fault
):
    name, change = FAULTS[fault]
    breaking(mixture_em, name, 6, change=change)
    found = fit(one, tmp_path)
    undone = {m["iteration"]: m["rejected_steps"] for m in found.metrics if "rejected_steps" in m}
    assert undone == {2: 1}
    assert not any("failed_steps" in m for m in found.metrics)
    assert len(found.metrics) == len(whole_one.metrics)
    assert finite(found.denoisers)
    last = [m["heldout_log_evidence"] for m in (found.metrics[-1], whole_one.metrics[-1])]
    assert last[0] == pytest.approx(last[1], abs=0.02)
    assert warnings_of(tmp_path) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_size_whose_steps_are_not_finite_ends_with_its_last_good_mixtures(
    one, breaking, tmp_path, fault
):
    """From a step of the first iteration of two components on: 12 steps of one component come before."""
    name, change = FAULTS[fault]
    breaking(mixture_em, name, 14, ALWAYS, change)
    rows = Rows()
    found = fit(one, tmp_path, tracker=rows)
    last = found.metrics[-1]
    assert last["iteration"] == 4
    assert (last["components"], last["failed_steps"]) == (2, 1)
    told = [rows.rows[-1], read_metrics(tmp_path / "metrics.jsonl")[-1]]
    assert [m["failed_steps"] for m in told] == [1, 1]
    assert [w.split(":")[0] for w in warnings_of(tmp_path)] == [
        "an EM step and a standard step give values that are not finite"
    ]
    assert load_state(tmp_path / LATEST).done
    assert finite(found.denoisers)
    one_component, two_components = (found.metrics[i]["heldout_log_evidence"] for i in (2, 3))
    assert np.isfinite([last["log_evidence"], two_components]).all()
    kept = found.denoisers["a"].log_weights.size
    assert kept == (2 if two_components > one_component else 1)


def test_growth_stops_with_the_best_mixture_where_a_larger_one_has_no_evidence(
    one, breaking, tmp_path
):
    breaking(mixture_em, "statistics", 13, ALWAYS)
    breaking(mixture, "mean_log_evidence", 2, ALWAYS)
    config = CONFIG.replace({"mixture.components": 8})
    found = fit(one, tmp_path, config)
    assert [m["components"] for m in found.metrics] == [1, 1, 1, 2]
    assert np.isnan(found.metrics[-1]["heldout_log_evidence"])
    assert found.denoisers["a"].log_weights.size == 1
    assert warnings_of(tmp_path) == [
        "the evidence of mixtures has values that are not finite: mixtures stay as they were"
    ]


def test_a_first_prior_without_evidence_is_an_error_and_a_resume_goes_on(
    two, whole_two, breaking, tmp_path
):
    """When `a` is learned already, and nothing can be computed of `b`."""
    breaking(mixture_em, "statistics", 5 * 4 + 1, ALWAYS)
    with pytest.raises(
        RunError, match=r"the first prior of b has a log evidence of nan.*are kept\. Iterations run"
    ):
        fit(two, tmp_path)
    breaking.mend()
    state = load_state(tmp_path / LATEST)
    assert (state.group, state.total, set(state.best)) == (1, 5, {"a"})
    assert said(fit(two, tmp_path).denoisers) == said(whole_two.denoisers)


def test_a_refinement_that_is_not_finite_keeps_the_mixtures_of_before(two, breaking, tmp_path):
    breaking(mixture_em, "statistics", 2 * 5 * 4 + 1, ALWAYS)
    found = fit(two, tmp_path)
    rows = [m for m in found.metrics if m["phase"] == "refinement"]
    assert [m["failed_steps"] for m in rows] == [1, 1]
    before = next(m for m in reversed(found.metrics) if m["phase"] == "mixture")
    assert finite(found.denoisers)
    assert all(np.isfinite(rows[-1][k]) for k in before if k.startswith("chi2_"))
    assert load_state(tmp_path / LATEST).done


@pytest.mark.parametrize("reach", [1e3, 1e4, 1e8, 1e15])
def test_an_observation_far_from_the_others_is_borne(reach, tmp_path):
    """One of 81, by up to 10¹⁶ times its noise; a component of its own takes it, and the others stay what they were."""
    base = sources("a").views[0]
    y = np.vstack([base.observations, [[reach, reach]]])
    held_out = np.arange(COUNT + 1) % 8 == 1
    view = dataclasses.replace(base, observations=y, held_out=held_out, truth={})
    config = CONFIG.replace({"mixture.components": 4, "mixture.final_iterations": 8})
    found = fit(Problem([Source("a", 2)], [view]), tmp_path, config)
    assert load_state(tmp_path / LATEST).done
    assert finite(found.denoisers)
    assert np.isfinite(found.separate("alone").draws["a"]).all()
    # Of ten held-out observations of two entries: 1 ± 0.3, where precision allows.
    assert found.metrics[-1]["chi2_alone"] < (2.3 if reach < 1e10 else np.inf)


def test_an_observation_beyond_all_bounds_is_named(tmp_path):
    base = sources("a").views[0]
    y = np.vstack([base.observations, [[1e30, 1e30]]])
    held_out = np.arange(COUNT + 1) % 8 == 1
    for held in (held_out, held_out | (np.arange(COUNT + 1) == COUNT)):
        view = dataclasses.replace(base, observations=y, held_out=held, truth={})
        with pytest.raises(
            RunError,
            match=r"log evidence of .*An observation of 'alone' reaches 1e\+30.*leave it out",
        ):
            fit(Problem([Source("a", 2)], [view]), None, CONFIG.replace({"outliers": "keep"}))


def test_scales_beyond_single_precision_are_an_error():
    y = 1e24 * np.random.default_rng(0).normal(size=(20, 2))
    view = View(y, {"a": Identity(2)}, 9e17, "v")
    with pytest.raises(
        RunError, match=r"iteration 1 \(mixture\) cannot be computed.*single precision"
    ):
        fit(Problem([Source("a", 2)], [view]), None)


@pytest.mark.parametrize("fault", ["low_rank_statistics", "maximise_low_rank"])
def test_steps_of_low_rank_are_taken_back_too(breaking, tmp_path, fault):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(100, 6)) @ rng.normal(size=(6, 140)) + 0.1 * rng.normal(size=(100, 140))
    problem = Problem([Source("a", 140)], [View(y, {"a": Identity(140)}, 0.1, "v")])
    config = CONFIG.replace({"mixture.rank": 8, "mixture.components": 1})
    whole = fit(problem, None, config)
    change = {
        "low_rank_statistics": lambda out: (np.nan, out[1]),
        "maximise_low_rank": no_numbers,
    }[fault]
    breaking(low_rank_em, fault, 6, change=change)
    found = fit(problem, tmp_path, config)
    assert {
        m["iteration"]: m["rejected_steps"] for m in found.metrics if "rejected_steps" in m
    } == {2: 1}
    assert finite(found.denoisers)
    last = [m["heldout_log_evidence"] for m in (found.metrics[-1], whole.metrics[-1])]
    assert last[0] == pytest.approx(last[1], rel=0.02)


# Networks


def test_a_network_that_diverges_is_trained_again_more_slowly(one, breaking, tmp_path, monkeypatch):
    slow = DIFFUSION.diffusion.learning_rate / 10
    real, rates = m_step.train_denoiser, []

    def diverging(*args, config, **kwargs):
        rates.append(config.learning_rate)
        found, loss = real(*args, config=config, **kwargs)
        return (found, loss) if len(rates) % 2 == 0 else (no_numbers(found), np.nan)

    monkeypatch.setattr(m_step, "train_denoiser", diverging)
    monkeypatch.setattr(diffusion, "is_gain", lambda gain, error: True)
    found = fit(one, tmp_path, DIFFUSION)
    np.testing.assert_allclose(rates, [10 * slow, slow] * 2)
    assert [m["diverged_a"] for m in found.metrics if "diverged_a" in m] == [1, 1]
    assert all(np.isfinite(m["loss_a"]) for m in found.metrics if "loss_a" in m)
    monkeypatch.setattr(m_step, "train_denoiser", real)
    expected = fit(one, None, DIFFUSION.replace({"diffusion.learning_rate": slow}))
    assert said(found.denoisers) == said(expected.denoisers)
    assert len(warnings_of(tmp_path)) == 2
    assert all("once more with a tenth of it" in w for w in warnings_of(tmp_path))


def test_a_network_that_cannot_be_trained_leaves_the_prior_as_it_was(one, tmp_path):
    """This learning rate is too high, and so is a tenth of it."""
    config = DIFFUSION.replace({"diffusion.learning_rate": 1e6})
    found = fit(one, tmp_path, config)
    assert load_state(tmp_path / LATEST).done
    assert isinstance(found.denoisers["a"], GaussianMixture)
    iterations = [m for m in found.metrics if m["phase"] == "diffusion"]
    assert [m["diverged_a"] for m in iterations] == [2, 2]
    assert [m["evidence_gain_a"] for m in iterations] == [0, 0]
    assert [w.rpartition("; ")[2] for w in warnings_of(tmp_path)] == [
        "once more with a tenth of it",
        "the prior of before is kept",
    ] * 2
    assert said(load_model(tmp_path / "best")[0]) == said(found.denoisers)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss_a"] is None


def test_a_training_ends_where_it_diverges(one):
    from dichroic.learning.diffusion.score_matching import train_denoiser, with_network

    prior = fit(one, None).denoisers["a"]
    config = dataclasses.replace(DIFFUSION.diffusion, steps=1000, learning_rate=1e30)
    seen = []
    start = with_network(prior, jax.random.key(0), DIFFUSION)
    _, loss = train_denoiser(
        start,
        np.zeros((50, 2), np.float32),
        jax.random.key(1),
        config=config,
        sigma_min=1e-3,
        progress=lambda done, total: seen.append(done),
    )
    assert not np.isfinite(loss)
    assert len(seen) < 10


# Draws


def some_not_finite(draws):
    """Those of three observations."""
    cut = lambda x: np.where(np.arange(x.shape[1])[None, :, None] < 3, np.nan, x)
    return eqx.tree_at(lambda d: d.x, draws, {k: cut(x) for k, x in draws.x.items()})


@pytest.mark.parametrize(("call", "count", "most"), [(1, 8, 6), (2, 72, 3)])
def test_draws_that_are_not_finite_are_an_error_and_cost_no_state(
    one, whole_diffusion, breaking, tmp_path, call, count, most
):
    """The first draws are those that judge, two of each held-out observation; the second train."""
    breaking(e_step, "draw", call, change=some_not_finite)
    draws = count * (2 if call == 1 else 1)
    text = rf"view 'alone': {most} of {draws} posterior draws are not finite, those of 3 of {count} obs"
    with pytest.raises(RunError, match=text):
        fit(one, tmp_path, DIFFUSION)
    breaking.mend()
    state = load_state(tmp_path / LATEST)
    assert (state.phase, state.iteration, state.total) == ("diffusion", 0, 3)
    assert said(load_model(tmp_path / "best")[0]) == said(state.best)
    again = fit(one, tmp_path, DIFFUSION)
    assert said(again.denoisers) == said(whole_diffusion.denoisers)


def test_the_error_of_draws_says_what_to_look_at(one):
    obs = one.views[0].prepare()
    prior = fit(one, None).denoisers
    good = draw(prior, obs, jax.random.key(0), CONFIG)
    safeguards.check_draws("v", obs, good, prior)
    bad = some_not_finite(good)
    with pytest.raises(RunError, match="Iterations run in single precision"):
        safeguards.check_draws("v", obs, bad, prior)
    network = {"a": with_network(prior["a"], jax.random.key(0), CONFIG)}
    with pytest.raises(RunError, match="the network of a, far from what it has seen"):
        safeguards.check_draws("v", obs, bad, network)
    far = eqx.tree_at(lambda o: o.y, obs, obs.y.at[1].set(1e9))
    with pytest.raises(RunError, match=r"An observation of 'v' reaches 1e\+09"):
        safeguards.check_draws("v", far, bad, prior)


def test_draws_that_cannot_be_scored_end_no_fit(one, whole_one, breaking, tmp_path):
    breaking(scoring, "draw", 1, change=some_not_finite)
    found = fit(one, tmp_path)
    assert said(found.denoisers) == said(whole_one.denoisers)
    assert "chi2_alone" in whole_one.metrics[-1]
    assert "chi2_alone" not in found.metrics[-1]
    (warning,) = warnings_of(tmp_path)
    assert warning.startswith("no scores of view 'alone': 3 of 8 posterior draws are not finite")


# Operators, and whatever else


@pytest.fixture(scope="module")
def unknown():
    return sources("ab", gain=0.7)


@pytest.fixture(scope="module")
def whole_unknown(unknown):
    return fit(unknown, None)


def test_operators_whose_scores_are_not_finite_stay_as_they_were(
    unknown, whole_unknown, breaking, tmp_path
):
    breaking(operator_em, "observation_scores", 1, ALWAYS)
    found = fit(unknown, tmp_path)
    gains = [m["operator_gain"] for m in found.metrics if "operator_gain" in m]
    assert gains == [pytest.approx(0.7)] * len(gains)
    assert whole_unknown.metrics[-1]["operator_gain"] != pytest.approx(0.7, abs=1e-3)
    assert finite(found.denoisers)
    assert set(warnings_of(tmp_path)) == {
        "operators stay as they were: their scores are not finite"
    }


def test_operators_whose_step_is_not_finite_are_taken_back(unknown, breaking):
    """The evidence is as high as before, but nothing follows from it."""
    only = lambda s: eqx.tree_at(lambda s: s.information, s, no_numbers(s.information))
    breaking(operator_em, "observation_scores", 2, change=only)
    found = fit(unknown, None)
    told = [m for m in found.metrics if "operator_gain" in m]
    assert np.isfinite([[m["operator_gain"], m["operator_error_gain"]] for m in told]).all()


def test_no_state_is_ever_written_with_a_number_that_is_not_finite(
    unknown, whole_unknown, breaking, tmp_path
):
    breaking(base, "operator_iteration", 7, change=no_numbers)
    with pytest.raises(
        RunError, match=r"iteration \d+ \(mixture\) .*not finite: operators gain; the iterations"
    ):
        fit(unknown, tmp_path)
    state = load_state(tmp_path / LATEST)
    assert finite((state.current, state.best, state.operators))
    breaking.mend()
    again = fit(unknown, tmp_path)
    assert said(again.denoisers) == said(whole_unknown.denoisers)
    assert [m["iteration"] for m in read_metrics(tmp_path / "metrics.jsonl")] == list(
        range(1, len(again.metrics) + 1)
    )


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, True),
        ({"x": np.ones(3), "n": np.arange(3), "f": abs}, True),
        ({"x": [np.ones(3), np.array([1, np.nan])]}, False),
        (np.array(-np.inf), False),
        (np.array([np.inf], np.float32), False),
        ((np.array(["text"]), jax.numpy.zeros(2)), True),
    ],
)
def test_finite_is_every_number_of_a_tree(tree, expected):
    assert finite(tree) is expected
