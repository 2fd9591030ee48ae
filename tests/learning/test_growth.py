"""Which model comes next, and the bound on the iterations that are left of a phase."""

import pytest

from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.config import FitConfig
from dichroic.learning.growth import (
    Grow,
    Limits,
    Rescale,
    Stop,
    Widen,
    costs_left,
    next_model,
    sizes,
)
from dichroic.learning.phases.diffusion import DiffusionEM
from dichroic.learning.phases.refinement import JointRefinement
from dichroic.learning.state import State
from dichroic.runtime.tracking import Console
from dichroic.separation.separator import Separator

CONFIG = FitConfig().replace(
    {
        "mixture.components": 6,
        "mixture.gaussian_iterations": 3,
        "mixture.iterations": 2,
        "mixture.final_iterations": 4,
        "joint_iterations": 2,
        "diffusion.iterations": 5,
    }
)


def left(done, size=1, groups=0, large=False):
    return list(costs_left(done, size, groups, CONFIG.mixture, large=large))


@pytest.mark.parametrize(
    ("args", "costs"),
    [
        ((0,), [1] * 3 + [2] * 2 + [4] * 2 + [6] * 4),
        ((1, 4), [4] + [6] * 4),
        ((4, 6), []),
        ((3, 6, 1), [6] + [1] * 3 + [2] * 2 + [4] * 2 + [6] * 4),
    ],
)
def test_the_iterations_of_mixtures_that_may_come(args, costs):
    assert left(*args) == costs


@pytest.mark.parametrize(
    ("phase", "done", "costs"),
    [(JointRefinement(), 1, [1]), (DiffusionEM(), 2, [1, 1, 1]), (DiffusionEM(), 5, [])],
)
def test_the_iterations_of_other_phases_that_may_come(phase, done, costs):
    assert list(phase.costs_left(State(iteration=done), None, CONFIG)) == costs


LIMITS = Limits(rank=20, components=6, patience=2)


@pytest.mark.parametrize(
    ("now", "better", "stale", "uneven", "after"),
    [
        ((1, 8), True, 0, True, Widen(16)),
        ((1, 16), True, 0, False, Widen(20)),
        ((1, 20), True, 0, True, Rescale()),
        ((1, 16), False, 0, True, Rescale()),
        ((1, 16), False, 0, False, Grow(2)),
        ((1, None), True, 0, False, Grow(2)),
        ((4, 16), True, 0, False, Grow(6)),
        ((4, None), False, 1, False, Grow(6)),
        ((4, None), False, 2, False, Stop()),
        ((6, None), True, 0, False, Stop()),
    ],
)
def test_the_model_that_comes_next(now, better, stale, uneven, after):
    assert next_model(*now, better=better, stale=stale, uneven=uneven, limits=LIMITS) == after


def test_the_rank_of_large_sources_may_double_before_components_do():
    assert left(0, large=True).count(1) == 2 * 4 * 3  # ranks 8 to 64, and again in units


def test_sizes_double_up_to_the_last():
    assert list(sizes(3, 20)) == [3, 6, 12, 20]
    assert list(sizes(8, 8)) == [8]


def test_a_fit_that_grows_to_the_end_has_the_iterations_of_the_bound():
    small = {
        "mixture.components": 1,
        "mixture.gaussian_iterations": 3,
        "joint_iterations": 2,
        "diffusion.iterations": 0,
    }
    rows = Separator(manifold_problem(seed=1, count=60), FitConfig().replace(small)).fit(
        progress=False
    )
    phases = [row["phase"] for row in rows.metrics]
    assert phases == ["mixture"] * 6 + ["refinement"] * 2
    assert [row["seconds_left"] > 0 for row in rows.metrics] == [True] * 5 + [False, True, False]


def test_the_console_says_what_is_left(capsys):
    iteration = {
        "phase": "mixture",
        "sources": "a",
        "components": 4,
        "seconds": 12.0,
        "seconds_left": 200.0,
    }
    Console().iteration(
        {**iteration, "seconds_e_step": 3.0, "peak_memory_mib": 9.0, "heldout_log_evidence": -1.0}
    )
    assert capsys.readouterr().err == (
        "[  12.0 s, at most 3 min 20 s left of this phase] mixture a × 4: heldout_log_evidence -1\n"
    )
