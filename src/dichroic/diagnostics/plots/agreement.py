"""How far to believe a fit: χ² of its draws, their coverage and their ranks, and residuals by entry."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from dichroic.diagnostics.plots.canvas import (
    DARK,
    GREY,
    STYLES,
    colour,
    label,
    legend,
    new_figure,
    tidy,
)
from dichroic.learning.predictive.residuals import Residuals
from dichroic.metrics import RankHistogram


def data_fit(chi2: np.ndarray, entries: int | None) -> Any:
    """The histogram of χ² per entry, and its density if all draws are calibrated."""
    values = chi2[np.isfinite(chi2)]
    figure = new_figure(5.2, 2.9)
    axis = tidy(figure.subplots(), "χ² per observed entry, of every draw", "density")
    if not values.size:
        axis.text(0.5, 0.5, "no χ² is finite", transform=axis.transAxes, ha="center")
        return figure
    high = max(2.0, float(np.percentile(values, 99.5)) * 1.05)
    bins = np.linspace(0, high, 51).tolist()
    axis.hist(np.clip(values, 0, high), bins=bins, density=True, color=GREY, label="draws")
    if entries:
        x = np.linspace(high / 400, high, 400)
        axis.plot(
            x, stats.chi2.pdf(x * entries, entries) * entries, color=DARK, lw=1, label="ideal"
        )
        axis.set_ylim(top=1.05 * axis.dataLim.y1 if entries > 2 else 3)
    axis.axvline(1, color="#D55E00", lw=1.5, label="1")
    axis.axvline(values.mean(), color="black", ls="--", lw=1.2, label="mean")
    legend(axis)
    return figure


def residuals(found: Residuals) -> Any:
    """The mean and root mean square of the normal scores of each entry; what is beyond chance is red."""
    figure = new_figure(8.8, 2.6)
    bad = np.isin(found.entries, found.bad)
    panels = (("mean", found.mean, 0), ("root mean square", np.sqrt(found.square), 1))
    for axis, (title, values, ideal) in zip(figure.subplots(1, 2), panels, strict=True):
        tidy(axis, "entry", title)
        axis.axhline(ideal, color="black", lw=0.8)
        axis.plot(found.entries[~bad], values[~bad], ".", color=DARK, ms=3)
        axis.plot(found.entries[bad], values[bad], "o", color="#D55E00", ms=4)
    return figure


def calibration(
    curves: Mapping[tuple[int, str, int], tuple[np.ndarray, np.ndarray, np.ndarray]],
    ranks: Mapping[tuple[int, str, int], RankHistogram],
) -> Any:
    """Coverage against nominal level, and rank histograms, by `(source, label, view)` numbers.

    A curve is `(levels, coverages, standard errors)`.
    """
    rows = -(-len(ranks) // 2)
    figure = new_figure(8.8, 3.6 + 1.9 * rows)
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.6, 1.9 * rows])
    axis = tidy(top.subplots(), "nominal level", "coverage", "Intervals that hold the truth")
    axis.plot([0, 1], [0, 1], color="black", lw=0.8, label="ideal")
    for (i, name, j), (levels, values, errors) in curves.items():
        style = {"color": colour(i), "ls": STYLES[j % len(STYLES)], "marker": ".", "lw": 1.2}
        axis.errorbar(levels, values, 2 * errors, label=label(name), **style)
    axis.set_aspect("equal")
    legend(axis, loc="upper left", bbox_to_anchor=(1, 1))
    axes = bottom.subplots(rows, 2, squeeze=False).ravel()
    for axis in axes[len(ranks) :]:
        axis.set_visible(False)
    for axis, ((i, name, _), ranked) in zip(axes, ranks.items(), strict=False):
        _rank_panel(axis, ranked, colour(i), label(name))
    return figure


def _rank_panel(axis: Any, ranked: RankHistogram, tint: str, name: str) -> None:
    bins = len(ranked.frequencies)
    centres = (np.arange(bins) + 0.5) / bins
    tidy(axis, "rank of the truth among its draws", "frequency", name)
    axis.bar(centres, ranked.frequencies, width=0.94 / bins, color=tint, alpha=0.75)
    band = 2 * np.append(ranked.standard_errors, ranked.standard_errors[-1])
    edges = np.linspace(0, 1, bins + 1)
    options = {"step": "post", "color": "black", "alpha": 0.18, "lw": 0}
    axis.fill_between(edges, 1 / bins - band, 1 / bins + band, **options)
    axis.axhline(1 / bins, color="black", lw=0.8)
    axis.set_xlim(0, 1)
