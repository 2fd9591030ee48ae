"""Checks that χ² cannot fool: entries left out of held-out observations, predicted from the rest.

χ² says whether draws explain what they were drawn from, which wrong priors do as well as right ones. Here priors
have to say what they have not seen, beside a linear filter of the same training observations, which knows no
operator, no source and no noise: priors that predict worse are wrong, or were learned from too few observations.
Scores are in units of the noise: of an entry that is predicted as well as its noise allows, the root mean square
error is 1 and the log score −1.42.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from scipy import stats

from dichroic.config import FitConfig
from dichroic.learning.data import Data
from dichroic.learning.predictive.leave_out import (
    candidates,
    folds,
    noise_deviations,
    predict,
    seen_of,
)
from dichroic.learning.predictive.linear_predictor import BLOCK, LinearPredictor, learn
from dichroic.learning.predictive.residuals import Estimate, LeftOut, examine
from dichroic.learning.predictive.result import Prediction, PredictiveChecks, Shapes
from dichroic.numerics.batching import take
from dichroic.priors import Denoiser, GaussianMixture
from dichroic.problem.batches import AnyObservations
from dichroic.problem.observations import Observations

OBSERVATIONS, DRAWS = 255, 39  # of each view, and predictive draws of each
FEW_OBSERVATIONS, FEW_DRAWS = 60, 19  # where networks draw
LEAST = 16  # observations, with fewer of which nothing is said
TRAINING = 4096  # observations that the linear filter is learned from
_NUMBERS = 2**24  # at once
_MANY = 16  # patterns of missing entries, with more of which blocks are smaller


def predictive_checks(
    denoisers: Mapping[str, Denoiser], data: Data, config: FitConfig, shapes: Sequence[Shapes]
) -> PredictiveChecks:
    """Check priors on the held-out observations of every view; `shapes` are those of the views of each.

    The same bits for the same data and priors, in any number of processes.
    """
    views = zip(data.names, data.train, data.test, shapes, strict=True)
    return PredictiveChecks(
        tuple(_check(denoisers, *view, config, i) for i, view in enumerate(views))
    )


def _check(
    denoisers: Mapping[str, Denoiser],
    name: str,
    train: AnyObservations,
    test: AnyObservations,
    shapes: Shapes,
    config: FitConfig,
    number: int,
) -> Prediction:
    mixtures = all(isinstance(denoisers[k], GaussianMixture) for k in test.sources)
    most, n_draws = (OBSERVATIONS, DRAWS) if mixtures else (FEW_OBSERVATIONS, FEW_DRAWS)
    obs = test.head(min(most, max(LEAST, _NUMBERS // 16 // test.size)))
    usable = np.flatnonzero(seen_of(obs).sum(axis=1) > 1)
    obs = take(obs, usable)
    if fault := _fault(obs, test):
        return Prediction(name, shapes, skipped=fault)
    rng = np.random.default_rng([config.seed, number])
    entries = candidates(seen_of(obs), rng)
    chosen = folds(obs.count, obs.size, entries, rng)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 2**31 - 3), number)
    lines, parts, densities = _lines(shapes), [], []
    for f, fold in enumerate(chosen):
        at = jax.random.fold_in(key, f)
        found = predict(denoisers, obs, fold, lines, at, config, n_draws)
        if found is None:
            return Prediction(name, shapes, skipped="predictions are not finite")
        parts.append(found[0])
        densities.append(found[1])
    linear = _linear(train, obs, entries)
    scores = _scores(obs, parts, densities, linear)
    found = examine(parts)
    found = replace(found, far=usable[found.far])
    return Prediction(name, shapes, trained=train.count, residuals=found, **scores)


def _fault(obs: Observations, test: AnyObservations) -> str:
    """Why nothing can be predicted; empty if it can."""
    if obs.size < 2 or (obs.count < LEAST <= test.count):
        return "observations of one entry, of which none can be left out"
    if obs.count < LEAST:
        return f"{obs.count} held-out observations, fewer than {LEAST}"
    return ""


def _lines(shapes: Shapes) -> np.ndarray:
    """The number of the line, along the last axis, that each entry of co-observed views is in."""
    lengths = [s[-1] if s else 1 for _, s in shapes for _ in range(int(np.prod(s[:-1], dtype=int)))]
    return np.repeat(np.arange(len(lengths)), lengths)


def _linear(train: AnyObservations, obs: Observations, entries: np.ndarray) -> LinearPredictor:
    """The linear filter of `train`, to predict `entries` of the observations `obs`."""
    some = train.some(min(TRAINING, max(LEAST, _NUMBERS // train.size)))
    patterns = len(np.unique(seen_of(obs)[:, entries], axis=0))
    block = BLOCK if patterns <= _MANY else BLOCK // 4
    return learn(np.asarray(some.y, np.float64), seen_of(some), entries, block)


def _scores(
    obs: Observations,
    parts: Sequence[LeftOut],
    densities: Sequence[np.ndarray],
    linear: LinearPredictor,
) -> dict[str, Any]:
    """The scores of a `Prediction`."""
    y, seen, std = np.asarray(obs.y, np.float64), seen_of(obs), noise_deviations(obs)
    found = [
        _of_part(part, density, y, seen, std, linear)
        for part, density in zip(parts, densities, strict=True)
    ]
    count, score, linear_score, square, linear_square = np.concatenate(found, axis=1)
    mean = lambda x: float(x.sum() / count.sum())
    rms = lambda x: float(np.sqrt(max(mean(x), 0)))
    known = np.isfinite(score).all()
    apart = score - linear_score if known else (linear_square - square) / mean(linear_square)
    return {
        "log_score": mean(score),
        "linear_log_score": mean(linear_score),
        "rms": rms(square),
        "linear_rms": rms(linear_square),
        "gain": _ratio(apart, count),
    }


def _of_part(
    part: LeftOut,
    density: np.ndarray,
    y: np.ndarray,
    seen: np.ndarray,
    std: np.ndarray,
    linear: LinearPredictor,
) -> np.ndarray:
    """Entries, log density and squared error of each observation, and the filter's of both, `(5, n)`."""
    rows, entries, draws = part.numbers, part.entries, part.draws
    left = np.zeros(y.shape[1], bool)
    left[entries] = True
    guess = linear.predict(y[rows], seen[rows] & ~left, seen[rows] & left)
    units = std[np.ix_(rows, entries)]
    total = lambda x: np.sum(np.where(part.seen, x, 0), axis=1)
    unbiased = (part.y - draws.mean(axis=0)) ** 2 - draws.var(axis=0, ddof=1) / len(draws)
    scale = total(np.log(units))
    return np.stack(
        [
            *(part.seen.sum(axis=1), density + scale, guess[0] + scale),
            *(total(unbiased / units**2), total(((part.y - guess[1][:, entries]) / units) ** 2)),
        ]
    )


def _ratio(total: np.ndarray, count: np.ndarray) -> Estimate:
    """`Σ total / Σ count`, with the error over observations, larger where they are few."""
    value, n = total.sum() / count.sum(), len(total)
    error = np.sqrt(np.sum((total - value * count) ** 2) * n / (n - 1)) / count.sum()
    return Estimate(float(value), float(error * stats.t.isf(0.025, n - 1) / 1.96))
