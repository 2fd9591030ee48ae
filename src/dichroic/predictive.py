"""Checks that χ² cannot fool: entries left out of held-out observations, predicted from the rest.

χ² says whether draws explain what they were drawn from, which wrong priors do as well as right ones. Here priors
have to say what they have not seen, beside a linear filter of the same training observations, which knows no
operator, no source and no noise: priors that predict worse are wrong, or were learned from too few observations.
Scores are in units of the noise: of an entry that is predicted as well as its noise allows, the root mean square
error is 1 and the log score −1.42.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from scipy import stats

from dichroic.batching import take
from dichroic.config import FitConfig
from dichroic.data import Data
from dichroic.denoise import Denoiser, Mixture
from dichroic.leave_out import candidates, folds, noise_deviations, predict, seen_of
from dichroic.linear_predictor import BLOCK, LinearPredictor, learn
from dichroic.observations import Observations, Observed
from dichroic.residuals import Estimate, LeftOut, Residuals, examine
from dichroic.tables import text_table

OBSERVATIONS, DRAWS = 255, 39  # of each view, and predictive draws of each
FEW_OBSERVATIONS, FEW_DRAWS = 60, 19  # where networks draw
LEAST = 16  # observations, with fewer of which nothing is said
TRAINING = 4096  # observations that the linear filter is learned from
COVERAGE = (0.8, 0.97)  # of 90% intervals, beyond which there is a warning
LEAST_LOSS = 0.02  # nats per entry, or the same part of the mean square error, that is worth a word
_NUMBERS = 2**24  # at once
_MANY = 16  # patterns of missing entries, with more of which blocks are smaller
Shapes = Sequence[tuple[str, tuple[int, ...]]]  # names and shapes of co-observed views


@dataclass(frozen=True)
class Prediction:
    """How well the entries left out of held-out observations of one (joint) view are predicted.

    `log_score` is the mean log density of an entry, NaN unless all priors are mixtures, and `rms` the root mean
    square error of means, of the fitted priors and of the linear filter; `gain` is by how much the priors are better:
    in the log score, or, where that is NaN, in the mean square error relative to the filter's. `residuals` are by
    entry and observation. Where nothing was predicted, `skipped` says why, and the rest is `None`.
    """

    view: str
    shapes: Shapes
    skipped: str = ""
    trained: int = 0  # observations that the priors were learned from
    log_score: float = np.nan
    linear_log_score: float = np.nan
    rms: float = np.nan
    linear_rms: float = np.nan
    gain: Estimate = Estimate(np.nan, np.nan)
    residuals: Residuals | None = None

    @property
    def worse(self) -> bool:
        """Whether the linear filter is better, by more than two standard errors."""
        return self.gain.value < -max(LEAST_LOSS, 2 * self.gain.error)  # false for NaN

    @property
    def warning(self) -> str:
        """A sentence on what is wrong and what to do; empty if nothing is."""
        if self.residuals is None:
            return ""
        said = [*self._losses(), *_intervals(self.residuals.coverage), *self._misfits()]
        if not said:
            return ""
        more = f"; also {' and '.join(what for what, _ in said[1:])}" if said[1:] else ""
        what, advice = said[0]
        return f"view {self.view!r}: {what}{more}; {advice}"

    def _losses(self) -> list[tuple[str, str]]:
        if not self.worse:
            return []
        if np.isnan(self.log_score):
            by = f"root mean square error {self.rms:.2f} against {self.linear_rms:.2f} in units of the noise"
        else:
            by = f"log score {self.log_score:.2f} against {self.linear_log_score:.2f} ± {self.gain.error:.2g}"
        what = (
            "the fitted priors predict entries that are left out worse than a linear filter of the same data "
            f"({by})"
        )
        advice = (
            f"{self.trained:,} observations may be too few for priors of so many components: give more, or set "
            "fit.mixture.components (1 is one Gaussian for each source); if that does not help, look for noise, an "
            "operator or a mask that is not as stated"
        )
        return [(what, advice)]

    def _misfits(self) -> list[tuple[str, str]]:
        found, out = self.residuals, []
        assert found is not None
        if which := found.correlated:
            value = (found.neighbours if which == "neighbouring" else found.common).value
            what = f"residuals of {which} entries are correlated ({value:.2f}) beyond what the model knows"
            out.append(
                (what, "look for noise that is correlated, or for a source that is not stated")
            )
        if len(found.bad):
            what = f"{self._named(found.bad)} {'is' if len(found.bad) == 1 else 'are'} mispredicted"
            advice = "look for an operator, noise or a mask that is not as stated there, or clipped values"
            out.append((what, advice))
        if found.beyond > found.expected:
            what = (
                f"{found.beyond} of {found.judged} observations are unlike all of their predictions"
            )
            out.append(
                (
                    what,
                    "look for outliers, or for noise that differs from one observation to another",
                )
            )
        return out

    def _named(self, entries: np.ndarray, most: int = 4) -> str:
        """Entries in the indices of their views, a few of many."""
        ends = np.cumsum([np.prod(shape, dtype=int) for _, shape in self.shapes])
        names = []
        for j in entries[:most]:
            v = int(np.searchsorted(ends, j, side="right"))
            name, shape = self.shapes[v]
            at = np.unravel_index(int(j) - (int(ends[v - 1]) if v else 0), shape or (1,))
            text = str(int(at[0])) if len(at) == 1 else f"({', '.join(map(str, map(int, at)))})"
            names.append(text + (f" of {name!r}" if len(self.shapes) > 1 else ""))
        rest = f" and {len(entries) - most} more" if len(entries) > most else ""
        return f"{'entry' if len(entries) == 1 else 'entries'} {', '.join(names)}{rest}"

    @property
    def metrics(self) -> dict[str, float]:
        """The scores by name, those that there are."""
        if self.residuals is None:
            return {}
        coverage = self.residuals.coverage
        found = {
            "predictive_coverage": coverage.value,
            "predictive_coverage_error": coverage.error,
            "predictive_log_score": self.log_score,
            "linear_log_score": self.linear_log_score,
            "predictive_rms": self.rms,
            "linear_rms": self.linear_rms,
            "predictive_gain": self.gain.value,
            "predictive_gain_error": self.gain.error,
        }
        return {f"{k}_{self.view}": round(v, 6) for k, v in found.items() if np.isfinite(v)}

    @property
    def row(self) -> list[str]:
        """The cells of a table, see `HEADER`."""
        if self.residuals is None:
            return [self.view, *["–"] * (len(HEADER) - 1)]
        r, c = self.residuals, self.residuals.coverage
        pair = lambda e: "–" if np.isnan(e.value) else f"{e.value:.3f} ± {e.error:.3f}"
        return [
            *(self.view, f"{r.judged:,}", f"{100 * c.value:.1f}% ± {100 * c.error:.1f}%"),
            *(_number(x) for x in (self.log_score, self.linear_log_score)),
            *(_number(x) for x in (self.rms, self.linear_rms)),
            *(pair(self.gain), f"{len(r.bad)} of {len(r.entries):,}"),
            *(f"{r.beyond} (chance: ≤ {r.expected})", pair(r.neighbours), pair(r.common)),
        ]


HEADER = (
    "view",
    "observations",
    "in 90% intervals",
    "log score",
    "linear filter",
    "rms error",
    "linear filter",
    "gain",
    "entries mispredicted",
    "observations beyond draws",
    "correlation of neighbours",
    "of all pairs",
)


@dataclass(frozen=True)
class PredictiveChecks:
    """Those of all views."""

    views: tuple[Prediction, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each view of which something is wrong."""
        return tuple(filter(None, (view.warning for view in self.views)))

    @property
    def metrics(self) -> dict[str, float]:
        """The scores of all views by name."""
        return {k: v for view in self.views for k, v in view.metrics.items()}

    def table(self) -> str:
        """A line for each view."""
        skipped = [f"{v.view}: not checked: {v.skipped}" for v in self.views if v.skipped]
        rows = [v.row[: -4 or None] for v in self.views if not v.skipped]
        parts = [text_table(HEADER[:-4], rows)] if rows else []
        return "\n".join([*parts, *skipped])


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
    train: Observed,
    test: Observed,
    shapes: Shapes,
    config: FitConfig,
    number: int,
) -> Prediction:
    mixtures = all(isinstance(denoisers[k], Mixture) for k in test.sources)
    most, n_draws = (OBSERVATIONS, DRAWS) if mixtures else (FEW_OBSERVATIONS, FEW_DRAWS)
    obs = test.head(min(most, max(LEAST, _NUMBERS // 16 // test.size)))
    obs = take(obs, np.flatnonzero(seen_of(obs).sum(axis=1) > 1))
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
    return Prediction(name, shapes, trained=train.count, residuals=examine(parts), **scores)


def _fault(obs: Observations, test: Observed) -> str:
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


def _linear(train: Observed, obs: Observations, entries: np.ndarray) -> LinearPredictor:
    """The linear filter of `train`, to predict `entries` of the observations `obs`."""
    some = train.some(min(TRAINING, max(LEAST, _NUMBERS // train.size)))
    noise = np.median(noise_deviations(some.head(256)), axis=0) ** 2
    patterns = len(np.unique(seen_of(obs)[:, entries], axis=0))
    block = BLOCK if patterns <= _MANY else BLOCK // 4
    return learn(np.asarray(some.y, np.float64), seen_of(some), noise, entries, block)


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
    """Of each observation: entries, log density and the filter's, squared error and the filter's, `(5, n)`."""
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


def _intervals(coverage: Estimate) -> list[tuple[str, str]]:
    low, high = COVERAGE
    value, error = coverage
    what = f"90% intervals of entries that are left out hold {100 * value:.0f}%"
    if value < low and value + 3 * error < 0.9:
        return [
            (
                what,
                "intervals are too narrow: look for noise that is stated too low, or give more observations",
            )
        ]
    if value > high and value - 3 * error > 0.9:
        return [(what, "intervals are too wide: look for noise that is stated too high")]
    return []


def _number(x: float) -> str:
    return "–" if np.isnan(x) else f"{x:.3f}"
