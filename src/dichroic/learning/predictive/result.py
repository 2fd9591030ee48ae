"""How well entries left out of observations are predicted: scores of each view, what is wrong, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dichroic.learning.predictive.residuals import UNKNOWN, Estimate, Residuals
from dichroic.numerics.arrays import shown_entry
from dichroic.runtime.tables import text_table

COVERAGE = (0.85, 0.97)  # of 90% intervals, beyond which there is a warning
LEAST_LOSS = 0.02  # nats per entry, or the same part of the mean square error, that is worth a word
ENOUGH = (
    20  # observations for each entry, with more of which they are no reason for bad predictions
)
_FEW = (
    "{:,} observations may be too few for priors of so many components: give more, or set "
    "fit.mixture.components (1 is one Gaussian for each source); if that does not help, look for noise, an "
    "operator or a mask that is not as stated"
)
_ENOUGH = (
    "look for noise, an operator or a mask that is not as stated, or for a source that is missing; if there is "
    "none, set other fit.mixture.components"
)
Shapes = Sequence[tuple[str, tuple[int, ...]]]  # names and shapes of co-observed views


@dataclass(frozen=True)
class Prediction:
    """How well the entries left out of held-out observations of one (joint) view are predicted.

    `log_score` is the mean log density of an entry, NaN unless all priors are mixtures, and `rms` the root mean
    square error of means, of the fitted priors and of the linear filter; `gain` is by how much the priors are
    better: in the log score, or, where that is NaN, in the mean square error relative to the filter's.
    `residuals` are by entry and observation, `None` where nothing was predicted: `skipped` says why.
    """

    view: str
    shapes: Shapes
    skipped: str = ""
    trained: int = 0  # observations that the priors were learned from
    log_score: float = np.nan
    linear_log_score: float = np.nan
    rms: float = np.nan
    linear_rms: float = np.nan
    gain: Estimate = UNKNOWN
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
        few = self.trained < ENOUGH * sum(int(np.prod(shape)) for _, shape in self.shapes)
        return [(what, _FEW.format(self.trained) if few else _ENOUGH)]

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
            at = shown_entry(int(j) - (int(ends[v - 1]) if v else 0), shape or (1,))
            names.append(str(at) + (f" of {name!r}" if len(self.shapes) > 1 else ""))
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
        pair = lambda e: "–" if np.isnan(e[0]) else f"{e[0]:.3f} ± {e[1]:.3f}"
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
    """The predictive checks of all views."""

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


def _intervals(coverage: Estimate) -> list[tuple[str, str]]:
    low, high = COVERAGE
    value, error = coverage
    what = f"90% intervals of entries that are left out hold {100 * value:.0f}%"
    if value < low and value + 3 * error < 0.9:
        return [
            (what, "they are too narrow: look for noise that is stated too low, or give more data")
        ]
    if value > high and value - 3 * error > 0.9:
        return [(what, "they are too wide: look for noise that is stated too high")]
    return []


def _number(x: float) -> str:
    return "–" if np.isnan(x) else f"{x:.3f}"
