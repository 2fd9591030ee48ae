"""The demonstration: two problems from observations to a table and a report, in a few minutes.

    manifolds   the contrastive problem of the paper (arXiv 2510.05205): two curves in five dimensions,
                seen through a fresh random 3 × 5 projection for every observation
    digits      real 8 × 8 handwritten digits over patches of real photographs

Both are scored on new observations that the fit has not seen, against linear answers; the Wiener filter
among them is given the true means and covariances, which dichroic never sees.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dichroic.benchmark.baselines import back_projection, least_squares, second_moments, wiener
from dichroic.benchmark.problems.digits import digits_over_patches, digits_problem
from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.config import FitConfig
from dichroic.diagnostics.report import write_report
from dichroic.metrics import coverage, mean_chi2, psnr
from dichroic.problem.problem import Problem, joint_observations
from dichroic.problem.view import View
from dichroic.runtime.tables import text_table
from dichroic.separation.result import Separation, save_npz
from dichroic.separation.separator import Separator

DRAWS = 32
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Demo:
    """One problem of the demonstration: what to learn from, and new observations to separate."""

    title: str
    problem: Problem
    test: View
    config: FitConfig
    data_range: float


def manifolds(seed: int, *, quick: bool = False) -> Demo:
    """The synthetic problem, 8,192 observations per view."""
    count = 1024 if quick else 8192
    problem = manifold_problem(seed=seed, count=count)
    test = (
        manifold_problem(seed=seed + 1000, problem_seed=seed, count=min(count, 2048)).views[1].head
    )
    config = FitConfig(seed=seed).replace(
        {
            "diffusion.iterations": 1,
            "diffusion.steps": 1000,
            "mixture.components": 8 if quick else 64,
        }
    )
    return Demo(
        "Two curves in five dimensions, each view a random projection", problem, test, config, 4.0
    )


def digits(seed: int, *, quick: bool = False) -> Demo:
    """Real digits over real photographs."""
    problem = digits_problem(seed=seed, count=2000 if quick else 8000)
    test = digits_over_patches(count=360, seed=seed + 1000, held_out=True)[1]
    config = FitConfig(seed=seed, joint_iterations=0).replace(
        {
            "mixture.components": 4 if quick else 16,
            "mixture.iterations": 2,
            "mixture.final_iterations": 3,
            "diffusion.iterations": 0,
        }
    )
    return Demo("Handwritten digits over photographs (real images)", problem, test, config, 1.0)


DEMOS = {"manifolds": manifolds, "digits": digits}


def run_demo(out: Path, *, seed: int = 0, quick: bool = False) -> None:
    """Fit, separate, score and report each problem; runs and draws are kept below `out`."""
    for name, make in DEMOS.items():
        demo, folder = make(seed, quick=quick), out / name
        print(f"\n{demo.title}\n", flush=True)
        separator = Separator(demo.problem, demo.config).fit(folder, resume=True)
        result = separator.separate(demo.test, n_draws=DRAWS, seed=seed)
        result.save(folder / "heldout-draws.npz")
        save_npz(folder / "heldout-truth.npz", demo.test.truth)
        scores = score(demo, result)
        print(table(scores, demo, result), flush=True)
        page = write_report(
            folder,
            separator=separator,
            metrics=separator.metrics,
            title=demo.title,
            baselines=scores,
        )
        print(f"\nreport: {page}", flush=True)


def score(demo: Demo, result: Separation) -> Scores:
    """PSNR in dB of each answer for each source, on the held-out observations."""
    obs = joint_observations([demo.test])
    known = {k: x for view in demo.problem.views for k, x in view.head.truth.items()}
    answers = {
        "dichroic, posterior mean": result.mean,
        "dichroic, one draw": {k: x[0] for k, x in result.draws.items()},
        "Wiener filter with the true moments": wiener(obs, second_moments(known)),
        "least squares": least_squares(obs),
        "the observation, back-projected": back_projection(obs),
    }
    return {name: _psnr(x, demo) for name, x in answers.items()}


def _psnr(estimate: Mapping[str, np.ndarray], demo: Demo) -> dict[str, float]:
    truth = demo.test.truth
    return {k: psnr(estimate[k], truth[k], data_range=demo.data_range) for k in estimate}


def table(scores: Scores, demo: Demo, result: Separation) -> str:
    """The scores as text, with the coverage of 90% intervals and χ² below."""
    sources = list(next(iter(scores.values())))
    rows = [[name, *(f"{by[s]:.2f}" for s in sources)] for name, by in scores.items()]
    text = text_table(["PSNR in dB on held-out observations", *sources], rows)
    inside = {s: coverage(result.draws[s], demo.test.truth[s], level=0.9) for s in sources}
    words = ", ".join(f"{s} {100 * c.value:.1f}%" for s, c in inside.items())
    return f"{text}\n90% intervals that hold the truth: {words}; χ²/M {mean_chi2(result.chi2):.3f}"
