"""The bound on what is left of a phase: the laps that there may be, by what the last one took."""

import pytest

from dichroic.config import FitConfig
from dichroic.datasets.manifolds import manifold_problem
from dichroic.pace import costs_left, seconds_left, sizes
from dichroic.separator import Separator
from dichroic.tracking import Console

CONFIG = FitConfig().replace(
    {
        "mixture.components": 6,
        "mixture.gaussian_laps": 3,
        "mixture.laps": 2,
        "mixture.final_laps": 4,
        "polish": 2,
        "diffusion.laps": 5,
    }
)


def left(phase, lap, size=1, groups=0, large=False):
    return list(costs_left(phase, lap, size, groups, CONFIG, large=large))


@pytest.mark.parametrize(
    ("args", "costs"),
    [
        (("mixture", 0), [1] * 3 + [2] * 2 + [4] * 2 + [6] * 4),
        (("mixture", 1, 4), [4] + [6] * 4),
        (("mixture", 4, 6), []),
        (("mixture", 3, 6, 1), [6] + [1] * 3 + [2] * 2 + [4] * 2 + [6] * 4),
        (("polish", 1), [1]),
        (("diffusion", 2), [1, 1, 1]),
        (("diffusion", 5), []),
    ],
)
def test_the_laps_that_may_come(args, costs):
    assert left(*args) == costs


def test_the_rank_of_large_sources_may_double_before_components_do():
    assert left("mixture", 0, large=True).count(1) == 2 * 4 * 3  # ranks 8 to 64, and again in units


def test_sizes_double_up_to_the_last():
    assert list(sizes(3, 20)) == [3, 6, 12, 20]
    assert list(sizes(8, 8)) == [8]


def test_time_is_proportional_to_cost():
    assert seconds_left(3.0, 2, [2.0, 4.0]) == 9.0


def test_a_fit_that_grows_to_the_end_has_the_laps_of_the_bound():
    small = {"mixture.components": 1, "mixture.gaussian_laps": 3, "polish": 2, "diffusion.laps": 0}
    rows = Separator(manifold_problem(seed=1, count=60), FitConfig().replace(small)).fit(
        progress=False
    )
    phases = [row["phase"] for row in rows.metrics]
    assert phases == ["mixture"] * 6 + ["polish"] * 2
    assert [row["seconds_left"] > 0 for row in rows.metrics] == [True] * 5 + [False, True, False]


def test_the_console_says_what_is_left(capsys):
    lap = {
        "phase": "mixture",
        "sources": "a",
        "components": 4,
        "seconds": 12.0,
        "seconds_left": 200.0,
    }
    Console().lap(
        {**lap, "seconds_e_step": 3.0, "peak_memory_mib": 9.0, "heldout_log_evidence": -1.0}
    )
    assert capsys.readouterr().err == (
        "[  12.0 s, at most 3 min 20 s left of this phase] mixture a × 4: heldout_log_evidence -1\n"
    )
