"""Held-out observations separated anew, scores where their truth is known, and what is suspect."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dichroic.metrics import coverage, mean_chi2, psnr
from dichroic.problem.problem import Problem
from dichroic.problem.screening import left_out
from dichroic.problem.splits import IndexSet, bits_of, held_out_bits
from dichroic.problem.view import View
from dichroic.separation.result import Separation
from dichroic.separation.separator import Separator

CHI2_RANGE = (0.8, 1.25)  # beyond it, a warning
COVERAGE_SLACK = 0.05


@dataclass(frozen=True)
class Held:
    """Held-out observations of one view, or of co-observed ones, and their separation."""

    name: str
    views: list[View]
    result: Separation
    truth: dict[str, np.ndarray]
    fresh: bool  # not used in training


@dataclass(frozen=True)
class Score:
    """How well one source is recovered from one (joint) view whose truth is known."""

    source: str
    view: str
    psnr: float
    psnr_draw: float
    coverage: float
    error: float


def separate_held_out(
    separator: Separator, problem: Problem, n_draws: int, most: int
) -> list[Held]:
    """Separate at most `most` held-out observations of each (joint) view, with `n_draws` draws."""
    out, config = [], separator.config
    left = left_out(problem, config.outliers)
    for i, views in enumerate(problem.joint_views()):
        bits, n = held_out_bits(views, config.holdout, config.seed + i), views[0].count
        usable = ~bits_of(left[i], n)
        fresh = IndexSet(bits & usable, n).count > 0
        numbers = IndexSet((bits if fresh else ~bits) & usable, n)
        index = numbers.between(0, min(most, numbers.count))
        some = [v.select(index) for v in views]
        truth = {
            k: np.asarray(x)
            for v in some
            for k, x in v.truth.items()
            if k in problem.names and np.all(np.isfinite(x))
        }
        result = separator.separate(some, n_draws=n_draws, seed=config.seed + i)
        truth = {k: x for k, x in truth.items() if k in result.draws}
        name = "+".join(v.name for v in views)
        out.append(Held(name, some, result, truth, fresh))
    return out


def score(held: Held, source: str) -> Score:
    """Score `source`, whose truth is known; PSNR is relative to the range of the true values."""
    draws, truth = held.result.draws[source], held.truth[source]
    span = float(np.ptp(truth)) or 1.0
    mean, one = (psnr(x, truth, data_range=span) for x in (draws.mean(axis=0), draws[0]))
    inside = coverage(draws, truth, level=0.9)
    return Score(source, held.name, mean, one, inside.value, inside.standard_error)


def own_warnings(held: Sequence[Held], scores: Sequence[Score]) -> list[str]:
    """Sentences on what should not be believed: χ², solves and coverage that are off."""
    out = []
    for h in held:
        chi2, low, high = mean_chi2(h.result.chi2), *CHI2_RANGE
        if not h.fresh:
            out.append(
                f"{h.name}: too few observations to hold any out; scores are of training data."
            )
        if not low <= chi2 <= high:
            out.append(f"{h.name}: χ² per entry is {chi2:.2f}, not 1. " + _chi2_meaning(chi2))
        solved = float(np.mean(h.result.converged))
        if solved < 1:
            worst = float(np.max(h.result.residual))
            out.append(
                f"{h.name}: {100 * (1 - solved):.2g}% of the linear solves did not converge (worst "
                f"relative residual {worst:.2g}); draws may be inexact."
            )
    for s in scores:
        if abs(s.coverage - 0.9) > COVERAGE_SLACK:
            narrow = s.coverage < 0.9
            out.append(
                f"{s.source} in {s.view}: 90% intervals hold {100 * s.coverage:.1f}% of the truth "
                f"(standard error {100 * s.error:.1f}); draws are "
                + ("too narrow or biased." if narrow else "too wide.")
            )
    return out


def _chi2_meaning(chi2: float) -> str:
    if chi2 > 1:
        return (
            "Draws miss the data by more than the stated noise: the noise is understated, an "
            "operator is wrong, the prior is too narrow, or the sampler takes too few steps."
        )
    if chi2 < 1:
        return (
            "Draws follow the data more closely than the stated noise allows: the noise is "
            "overstated, or the learned prior is too wide."
        )
    return "It is not a number: nothing was observed, or draws are not finite."
