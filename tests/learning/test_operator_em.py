"""Semi-blind: operators that are learned, against maxima of the likelihood known in closed form."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from dichroic import Separator
from dichroic.benchmark.baselines import ClvmLinear, ClvmVae, Ddprism, WienerFilter
from dichroic.config import FitConfig, MixtureConfig
from dichroic.errors import DataError, FormatError
from dichroic.io import load_problem, summary_rows
from dichroic.io.model_files import read_tensors, write_tensors
from dichroic.learning.checkpoint import load_state, save_state
from dichroic.learning.mixture.operator_em import observation_scores, operator_iteration
from dichroic.learning.state import State
from dichroic.operators import Dense, FunctionOperator, Identity, Learnable, PatchPlacement, Scale
from dichroic.operators.learnable import from_lists, parameters, to_lists, with_parameters
from dichroic.operators.parameter_gradients import check_slopes
from dichroic.priors import GaussianMixture, gaussian
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View

CONFIG = MixtureConfig()


def iterations(mixtures, views, n):
    """`n` M-steps of the operators alone; the views with them, and the last errors."""
    errors = {}
    for _ in range(n):
        found, errors = operator_iteration(mixtures, views, CONFIG)
        views = with_parameters(views, found)
    return views, errors


def learned(views):
    return {k: [np.asarray(a) for a in x] for k, x in parameters(views).items()}


def test_a_gain_and_its_error_are_those_of_the_closed_form():
    """`y = g x + η`, `x ~ N(0, 1)`: `ĝ² = mean(y²) − σ²`, with information `2 n g² / (g² + σ²)²`."""
    n, g, noise = 3000, 0.7, 0.5
    rng = np.random.default_rng(0)
    y = g * rng.normal(size=(n, 1)) + noise * rng.normal(size=(n, 1))
    obs = View(y, {"x": Learnable(Scale(1, 0.2), "gain")}, noise).prepare()
    views, errors = iterations({"x": gaussian(np.zeros(1), np.eye(1))}, [obs], 6)
    best = np.sqrt(np.mean(y**2) - noise**2)
    assert learned(views)["gain"][0] == pytest.approx(best, abs=1e-4)
    exact = (best**2 + noise**2) / np.sqrt(2 * n) / best
    # Σ s² of n observations is the information to within √(7 / n): s² has a variance of 14 E[s²]² / 2.
    assert errors["gain"][0] == pytest.approx(exact, rel=4.5 * np.sqrt(7 / n) / 2)


def mixture(rng, k, d):
    """`k` thin Gaussians, far apart."""
    root = 0.1 * rng.normal(size=(k, d, d))
    cov = root @ root.swapaxes(1, 2) + 1e-3 * np.eye(d)
    return GaussianMixture.from_moments(np.ones(k), 2 * rng.normal(size=(k, d)), cov)


def draws(rng, m, n):
    k = rng.integers(m.log_weights.size, size=n)
    root = np.linalg.cholesky(np.asarray(m.covariances(), float))[k]
    return np.asarray(m.means)[k] + np.einsum("nij,nj->ni", root, rng.normal(size=(n, m.dim)))


def test_a_matrix_that_is_shared_by_a_view_is_found_within_its_errors():
    """Two sources, one through a matrix to be learned; z-scores of all its entries are standard normal."""
    rng = np.random.default_rng(1)
    n, noise = 2000, 0.05
    mixtures = {"a": mixture(rng, 4, 3), "b": mixture(rng, 3, 2)}
    matrix, other = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    x = {k: draws(rng, m, n) for k, m in mixtures.items()}
    y = x["a"] @ matrix.T + x["b"] @ other.T + noise * rng.normal(size=(n, 4))
    start = Learnable(Dense(matrix + 0.2 * rng.normal(size=matrix.shape)), "matrix")
    obs = View(y, {"a": start, "b": Dense(other)}, noise).prepare()
    views, errors = iterations(mixtures, [obs], 5)
    z = (learned(views)["matrix"][0] - matrix) / np.asarray(errors["matrix"][0])
    assert abs(np.mean(z**2) - 1) < 4.5 * np.sqrt(2 / z.size)


def test_scores_are_the_gradient_of_the_evidence_and_a_step_never_lowers_it():
    rng = np.random.default_rng(2)
    m = mixture(rng, 4, 3)
    matrix = rng.normal(size=(50, 2, 3))
    turn = FunctionOperator(
        lambda x, p: p["g"] * x + p["s"] * x[::-1], in_shape=2, params={"g": 1.0, "s": 0.3}
    )
    y = np.einsum("nij,nj->ni", matrix, draws(rng, m, 50)) + 0.1 * rng.normal(size=(50, 2))
    operators = {"a": Learnable(turn, "turn") @ Dense(matrix)}
    mask = rng.uniform(size=(50, 2)) > 0.2
    obs = View(np.where(mask, y, 0), operators, 0.1, mask=mask).prepare()
    index = np.tile(np.arange(4)[:, None], (50, 1, 1))
    at = lambda values: observation_scores({"a": m.prior()}, obs, index, values, jnp.asarray(0))
    values = parameters(obs)
    here = at(values)
    for i in range(2):
        h = 1e-2
        moved = [tuple(a + s * h * (i == j) for j, a in enumerate(values["turn"])) for s in (1, -1)]
        up, down = (float(at({"turn": v}).log_evidence) for v in moved)
        assert here.score[i] == pytest.approx((up - down) / (2 * h), rel=2e-2, abs=1.0)
    found, _ = operator_iteration({"a": m}, [obs], CONFIG)
    assert at(found).log_evidence >= here.log_evidence
    np.testing.assert_allclose(here.information, here.information.T, rtol=1e-4)


def problem(f, *, start=None, n=1500, seed=0, held_out=None):
    """Two clustered sources, each strong in one view and weaker by `f` in the other."""
    rng = np.random.default_rng(0)
    sources = {"a": mixture(rng, 3, 3), "b": mixture(rng, 3, 3)}
    rng, views = np.random.default_rng([1, seed]), []
    weak = lambda: Scale(3, f) if start is None else Learnable(Scale(3, start), "f")
    for name, strong in (("one", "a"), ("two", "b")):
        x = {k: draws(rng, m, n) for k, m in sources.items()}
        operators = {k: Identity(3) if k == strong else weak() for k in x}
        y = sum((1 if k == strong else f) * x[k] for k in x) + 0.05 * rng.normal(size=(n, 3))
        views.append(View(y, operators, 0.05, name=name, truth=x))
    return Problem([Source("a", 3), Source("b", 3)], views)


FIT = FitConfig.from_dict(
    {
        "mixture": {"components": 4, "gaussian_iterations": 4, "final_iterations": 6},
        "diffusion": {"iterations": 0},
    }
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    run = tmp_path_factory.mktemp("semi-blind") / "run"
    return Separator(problem(0.4, start=0.7), FIT).fit(run, progress=False), run


def test_a_fit_finds_the_weight_of_two_views(fitted):
    separator, _ = fitted
    f = float(separator.operators["f"][0])
    last = [m for m in separator.metrics if "operator_f" in m][-1]
    assert last["operator_f"] == pytest.approx(f)
    # The error is that of known priors; that of the priors adds about as much here.
    assert abs(f - 0.4) < 6 * last["operator_error_f"]
    assert 0 < last["operator_error_f"] < 0.01


def test_new_observations_are_separated_with_what_was_learned(fitted):
    separator, _ = fitted
    wrong, right = problem(0.4, start=0.1, seed=9, n=300), problem(0.4, seed=9, n=300)
    chi2 = [separator.separate(p.views[0], seed=3).chi2.mean() for p in (wrong, right)]
    assert chi2[0] == pytest.approx(chi2[1], rel=0.05)
    assert abs(chi2[0] - 1) < 0.15


def test_what_was_learned_is_saved_and_loaded(fitted, tmp_path):
    separator, run = fitted
    separator.save(tmp_path / "model")
    view = problem(0.4, start=0.9, n=20, seed=5).views[0]
    want = separator.separate(view, seed=1).draws["a"]
    for path in (tmp_path / "model", run):
        np.testing.assert_array_equal(Separator.load(path).separate(view, seed=1).draws["a"], want)
    state = load_state(run / "latest.safetensors")
    assert to_lists(state.operators) == to_lists(separator.operators)


def test_a_run_goes_on_with_the_operators_it_had(tmp_path):
    state = State(operators={"f": (jnp.array(0.1),)}, best_operators={"f": (jnp.array(1 / 3),)})
    save_state(tmp_path / "s.safetensors", state)
    found = load_state(tmp_path / "s.safetensors")
    assert (found.operators["f"][0], found.best_operators["f"][0]) == (
        np.float32(0.1),
        np.float32(1 / 3),
    )


def test_lists_are_json_and_what_is_none_is_damaged():
    values = {"m": (jnp.array([[0.1, 1 / 3]]),), "f": (jnp.array(2.0),)}
    found = from_lists(json.loads(json.dumps(to_lists(values))), "here")
    np.testing.assert_array_equal(found["m"][0], values["m"][0])
    for bad in (3, {"f": 3}, {"f": ["x"]}, {"f": [[1, [2]]]}):
        with pytest.raises(FormatError, match="here"):
            from_lists(bad, "here")


def test_what_cannot_be_learned_is_said():
    with pytest.raises(DataError, match="no number to learn"):
        Learnable(Identity(3), "f")
    with pytest.raises(DataError, match="one entry per observation"):
        Learnable(Scale(3, np.ones(5)), "f")
    with pytest.raises(DataError, match="letters"):
        Learnable(Scale(3, 1.0), "a b")
    with pytest.raises(DataError, match="another Learned"):
        Learnable(Learnable(Scale(3, 1.0), "a"), "b")
    with pytest.raises(DataError, match="4,096"):
        parameters(Learnable(Dense(np.ones((70, 70))), "m"))
    with pytest.raises(DataError, match="different shapes"):
        parameters([Learnable(Scale(3, 1.0), "m"), Learnable(Dense(np.ones((2, 2))), "m")])
    with pytest.raises(DataError, match="start differently"):
        parameters([Learnable(Scale(3, 1.0), "m"), Learnable(Scale(3, 2.0), "m")])
    with pytest.raises(DataError, match="what was learned has"):
        with_parameters(Learnable(Scale(3, 1.0), "m"), {"m": (np.ones(2),)})
    with pytest.raises(DataError, match="settles its scale"):
        Problem(
            [Source("a", 3)], [View(np.ones((4, 3)), {"a": Learnable(Scale(3, 1.0), "f")}, 0.1)]
        )


@pytest.mark.parametrize("kind", [ClvmLinear, ClvmVae, Ddprism, WienerFilter])
def test_baselines_need_known_operators(kind):
    with pytest.raises(DataError, match="f of this problem are to be learned"):
        kind(problem(0.4, start=0.5, n=10)).fit(progress=False)


def test_a_problem_file_states_what_is_to_be_learned(tmp_path):
    np.savez(tmp_path / "data.npz", one=np.ones((8, 3)), two=np.ones((8, 3)))
    (tmp_path / "p.yaml").write_text(
        "sources: {a: [3], b: [3]}\n"
        "views:\n"
        "  one: {observations: 'data.npz:one', operators: {a: identity, b: identity}, noise: 0.1}\n"
        "  two:\n"
        "    observations: data.npz:two\n"
        "    operators:\n"
        "      a: {learnable: {name: f, operator: {scale: 0.3}}}\n"
        "      b: identity\n"
        "    noise: 0.1\n"
    )
    found, _ = load_problem(tmp_path / "p.yaml")
    assert learned([v.operators for v in found.views]) == {"f": [np.float32(0.3)]}
    assert "a: learned f (scale)" in summary_rows(found)[1][2][3]


def test_a_state_written_before_operators_could_be_learned_is_read(tmp_path):
    path = tmp_path / "s.safetensors"
    save_state(path, State(iteration=3))
    arrays, meta = read_tensors(path)
    counters = {k: v for k, v in meta["counters"].items() if "operators" not in k}
    write_tensors(path, arrays, {**meta, "counters": counters})
    assert load_state(path) == State(iteration=3)


NU = np.array([30.0, 44.0, 70.0, 100.0], np.float32) / 30  # the first is the reference


def power(x, beta):
    return NU[:, None] ** beta * x


def spectrum(reference=0.0):
    """A power law of a learned index, which is 1 at the first frequency, or nowhere."""
    law = lambda x, beta: (NU[:, None] + reference) ** beta * x
    return Learnable(FunctionOperator(law, in_shape=4, params=jnp.asarray(-2.5)), "beta")


def all_frequencies(rng, synchrotron):
    cmb, sync = rng.normal(size=(2, 300, 4))
    y = cmb[:, None] + power(sync[:, None], -3.0) + 0.05 * rng.normal(size=(300, 4, 4))
    flat = FunctionOperator(lambda x: jnp.broadcast_to(x, (4, 4)), in_shape=4)
    view = View(y, {"cmb": flat, "sync": synchrotron}, 0.05)
    return Problem([Source("cmb", 4), Source("sync", 4)], [view])


def test_a_reference_that_no_parameter_changes_settles_the_scale(rng):
    mixture = {"components": 1, "gaussian_iterations": 6, "iterations": 1, "final_iterations": 1}
    settings = {"mixture": mixture, "diffusion": {"iterations": 0}}
    separator = Separator(all_frequencies(rng, spectrum()), settings).fit(progress=False)
    assert abs(float(separator.operators["beta"][0]) + 3) < 0.1


def test_without_a_reference_the_error_says_how_to_state_one(rng):
    with pytest.raises(DataError, match="settles its scale.*a view for each output.*group=…"):
        all_frequencies(rng, spectrum(reference=0.5))
    unseen = np.ones((4, 4))
    unseen[0] = 0
    problem = all_frequencies(rng, spectrum())
    with pytest.raises(DataError, match="settles its scale"):  # the reference is masked
        Problem(problem.sources, [dataclasses.replace(problem.views[0], mask=unseen)])


SLOPELESS = {
    "offset": (
        PatchPlacement((8,), (8,), [4]),
        "does not change with its parameter, .*Function, by the phases",
    ),
    "rounded": (
        FunctionOperator(
            lambda x, t: jnp.roll(x, jnp.round(t).astype(int)), in_shape=8, params=jnp.asarray(2.0)
        ),
        "does not change with its parameter",
    ),
    "one-of-three": (
        FunctionOperator(lambda x, p: p[0] * x + p[2] * x[::-1], in_shape=8, params=jnp.ones(3)),
        "1 of its 3 parameters .such as number 1",
    ),
    "at-its-start": (
        FunctionOperator(lambda x, g: g**2 * x, in_shape=8, params=jnp.asarray(0.0)),
        "at their start: start elsewhere",
    ),
    "root-at-0": (
        FunctionOperator(lambda x, g: jnp.sqrt(g) * x, in_shape=8, params=jnp.asarray(0.0)),
        "is not finite where it starts",
    ),
}


@pytest.mark.parametrize(("operator", "why"), SLOPELESS.values(), ids=SLOPELESS.keys())
def test_a_parameter_without_a_slope_is_refused_with_what_works(operator, why):
    y = np.ones((4, 8))
    views = [View(y, {"s": Identity(8)}, 0.1), View(y, {"s": Learnable(operator, "lag")}, 0.1)]
    with pytest.raises(DataError, match=f"Learnable 'lag': .*{why}"):
        Problem([Source("s", 8)], views)


def test_a_delay_by_the_phases_of_a_fourier_transform_has_a_slope():
    phases = lambda t: jnp.exp(-2j * jnp.pi * jnp.fft.rfftfreq(8) * t)
    late = FunctionOperator(
        lambda x, t: jnp.fft.irfft(jnp.fft.rfft(x) * phases(t), 8),
        in_shape=8,
        params=jnp.asarray(2.0),
    )
    check_slopes([{"s": Learnable(late, "lag")}])
