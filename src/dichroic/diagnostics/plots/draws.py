"""Posterior draws of a separated source, beside its truth and the observation."""

from typing import Any

import numpy as np

from dichroic.diagnostics.plots.arrays import pairs
from dichroic.diagnostics.plots.canvas import (
    POINTS,
    as_images,
    draw_image,
    kind,
    legend,
    limits,
    new_figure,
    tidy,
)


def separated(
    draws: np.ndarray, truth: np.ndarray | None, observation: np.ndarray | None, tint: str
) -> dict[str, Any]:
    """Figures of the draws `(n_draws, n, *shape)` of one source, by what they show."""
    form = kind(draws.shape[2:])
    if form == "image":
        return {"images": _image_rows(draws, truth, observation)}
    flat = draws.reshape(*draws.shape[:2], -1)
    true = None if truth is None else truth.reshape(len(truth), -1)
    if form == "lines":
        return {"lines": _bands(flat, true, tint)}
    figures = {"pairs": pairs(flat[0], true, tint, what="one draw of each observation")}
    if true is not None:
        figures["truth-vs-draw"] = _against_truth(flat[0], true, tint)
    return figures


def _image_rows(draws: np.ndarray, truth: np.ndarray | None, observation: np.ndarray | None) -> Any:
    """Rows of observation | truth | posterior mean | draws | standard deviation."""
    n = min(6, draws.shape[1])
    signal: list[tuple[str, np.ndarray]] = (
        [] if truth is None else [("truth", as_images(truth[:n]))]
    )
    signal.append(("posterior mean", as_images(draws[:, :n].mean(axis=0))))
    signal += [(f"draw {d + 1}", as_images(draws[d, :n])) for d in range(min(3, len(draws)))]
    groups = (
        [] if observation is None else [([("observation", as_images(observation[:n]))], "viridis")]
    )
    groups.append((signal, "viridis"))
    if len(draws) > 1:
        std = as_images(draws[:, :n].std(axis=0, ddof=1), rgb=False)
        groups.append(([("std. dev.", std)], "magma"))
    columns = sum(len(group) for group, _ in groups)
    height, width = signal[0][1].shape[1:3]
    figure = new_figure(columns * 1.15, n * 1.1 * min(max(height / width, 0.3), 2) + 0.9)
    axes = figure.subplots(n, columns, squeeze=False)
    start = 0
    for group, cmap in groups:
        _image_group(figure, axes[:, start : start + len(group)], group, cmap)
        start += len(group)
    return figure


def _image_group(figure: Any, axes: Any, group: list[tuple[str, np.ndarray]], cmap: str) -> None:
    """Images that share a scale: of colours, which have a bar, or of RGB row by row."""
    for axis, (title, _) in zip(axes[0], group, strict=True):
        axis.set_title(title, fontsize=9)
    rgb = group[0][1].ndim == 4
    low, high = limits([x for _, x in group])
    low = 0.0 if cmap == "magma" else low
    shown = None
    for r, row in enumerate(axes):
        low, high = limits([x[r] for _, x in group]) if rgb else (low, high)
        for axis, (_, x) in zip(row, group, strict=True):
            shown = draw_image(axis, x[r], low, high, cmap)
    if rgb:
        return
    bar = figure.colorbar(
        shown, ax=axes, location="bottom", aspect=11 * len(group), pad=0.01, fraction=0.03
    )
    bar.ax.tick_params(labelsize=7)
    if len(group) > 1:
        bar.ax.locator_params(nbins=6)
        return
    bar.set_ticks([low, high], labels=[_short(low), _short(high)])  # there is no room for more
    for text, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=True):
        text.set_horizontalalignment(side)


def _short(x: float) -> str:
    """Two digits of a number."""
    return f"{x:.2g}".replace("e+0", "e").replace("e-0", "e-").replace("-", "−")


def _bands(draws: np.ndarray, truth: np.ndarray | None, tint: str) -> Any:
    """Posterior means and 90% bands of a few observations, with their truth."""
    n = min(6, draws.shape[1])
    columns = 2 if n > 1 else 1
    figure = new_figure(7.5, 1.7 * -(-n // columns) + 0.6)
    axes = figure.subplots(-(-n // columns), columns, squeeze=False, sharex=True, sharey=True)
    entries = np.arange(1, draws.shape[2] + 1)
    for i, axis in enumerate(axes.ravel()):
        axis.set_visible(i < n)
        if i >= n:
            continue
        tidy(axis, "entry" if i + columns >= n else "", "value" if i % columns == 0 else "")
        low, high = np.quantile(draws[:, i], [0.05, 0.95], axis=0)
        axis.fill_between(entries, low, high, color=tint, alpha=0.3, lw=0, label="90% band")
        axis.plot(entries, draws[:, i].mean(axis=0), color=tint, lw=1.2, label="posterior mean")
        if truth is not None:
            axis.plot(entries, truth[i], color="black", lw=0.9, ls="--", label="truth")
    legend(axes[0, 0], ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _against_truth(draw: np.ndarray, truth: np.ndarray, tint: str) -> Any:
    figure = new_figure(3.9, 3.9)
    axis = tidy(figure.subplots(), "truth, all entries", "one draw")
    low, high = float(min(truth.min(), draw.min())), float(max(truth.max(), draw.max()))
    axis.plot([low, high], [low, high], color="black", lw=0.8)
    axis.plot(truth.ravel()[:POINTS], draw.ravel()[:POINTS], ".", color=tint, ms=3, alpha=0.5)
    axis.set_aspect("equal")
    return figure
