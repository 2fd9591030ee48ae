"""Arrays by their kind, observations and samples of priors: images, lines, scatter matrices."""

from typing import Any

import numpy as np

from dichroic.diagnostics.plots.canvas import (
    DARK,
    GREY,
    POINTS,
    SMALL,
    as_images,
    draw_image,
    kind,
    legend,
    limits,
    new_figure,
    tidy,
)

PAIRS = 5  # dimensions in a scatter matrix


def several(x: np.ndarray, truth: np.ndarray | None, tint: str, *, what: str) -> Any:
    """Arrays `(n, *shape)` in the form of their `kind`; `truth`, if known, behind points."""
    form = kind(x.shape[1:])
    if form == "image":
        return _gallery(as_images(x[:24]))
    if form == "lines":
        return _curves(x[:8].reshape(min(len(x), 8), -1), tint)
    flat = None if truth is None else truth.reshape(len(truth), -1)
    return pairs(x.reshape(len(x), -1), flat, tint, what=what)


def observed(y: np.ndarray) -> Any:
    """A few observations `(n, *shape)` (NaN where missing); of small ones, two entries."""
    if kind(y.shape[1:]) != "points":
        return several(y, None, DARK, what="observations")
    flat = y.reshape(len(y), -1)[:POINTS]
    figure = new_figure(4.6, 3.6)
    if flat.shape[1] == 1:
        axis = tidy(figure.subplots(), "entry 1", "observations")
        axis.hist(flat[np.isfinite(flat)], bins=40, color=DARK, alpha=0.7)
    else:
        axis = tidy(figure.subplots(), "entry 1", "entry 2")
        axis.plot(flat[:, 0], flat[:, 1], ".", color=DARK, ms=3, alpha=0.6)
    return figure


def _gallery(x: np.ndarray) -> Any:
    columns = min(8, len(x))
    rows = -(-len(x) // columns)
    height, width = x.shape[1:3]
    figure = new_figure(columns * 0.95 + 0.9, rows * 0.95 * min(max(height / width, 0.3), 2) + 0.2)
    axes = figure.subplots(rows, columns, squeeze=False)
    low, high = limits([x])
    shown = None
    for i, axis in enumerate(axes.ravel()):
        axis.axis("off")
        if i < len(x):
            shown = draw_image(axis, x[i], low, high)
    if x.ndim == 3:  # RGB has no scale of colours
        bar = figure.colorbar(shown, ax=axes, shrink=0.9, pad=0.02)
        bar.ax.tick_params(labelsize=SMALL)
    return figure


def _curves(x: np.ndarray, tint: str) -> Any:
    columns = 2 if len(x) > 1 else 1
    rows = -(-len(x) // columns)
    figure = new_figure(7.5, 1.2 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i, axis in enumerate(axes.ravel()):
        axis.set_visible(i < len(x))
        if i < len(x):
            tidy(
                axis, "entry" if i + columns >= len(x) else "", "value" if i % columns == 0 else ""
            )
            axis.plot(np.arange(1, x.shape[1] + 1), x[i], color=tint, lw=1, marker=".", ms=3)
    return figure


def pairs(x: np.ndarray, truth: np.ndarray | None, tint: str, *, what: str) -> Any:
    """A scatter matrix of the first dimensions of points `(n, d)`, the truth grey behind them."""
    d = min(PAIRS, x.shape[1])
    layers = [] if truth is None else [(truth[:POINTS, :d], GREY, "truth")]
    layers.append((x[:POINTS, :d], tint, what))
    layers.sort(key=lambda layer: -len(layer[0]))  # the fewer points in front
    size = 3.8 if d == 1 else max(4.2, 1.45 * d)
    figure = new_figure(size, size)
    axes = figure.subplots(d, d, squeeze=False, sharex="col")
    lows, highs = np.transpose(
        [limits([points[:, i] for points, _, _ in layers]) for i in range(d)]
    )
    margin = 0.06 * (highs - lows)
    for i in range(d):
        for j in range(d):
            axis = axes[i, j]
            axis.set_visible(j <= i)
            if j > i:
                continue
            tidy(axis, f"entry {j + 1}" if i == d - 1 else "")
            axis.set_xlim(lows[j] - margin[j], highs[j] + margin[j])
            if j < i:
                axis.set_ylim(lows[i] - margin[i], highs[i] + margin[i])
            axis.set_ylabel(f"entry {i + 1}" if j == 0 and i > 0 else "", fontsize=9)
            axis.tick_params(
                labelbottom=i == d - 1, labelleft=j == 0 and i > 0, left=j == 0 and i > 0
            )
            _pair(axis, layers, i, j)
    _pair_legend(figure, axes, layers)
    return figure


def _pair(axis: Any, layers: list[tuple[np.ndarray, str, str]], i: int, j: int) -> None:
    for points, tint, name in layers:
        if i == j:
            low, high = axis.get_xlim()
            bins = np.linspace(low, high, 31)
            style = (
                {"histtype": "stepfilled", "alpha": 0.5} if tint == GREY else {"histtype": "step"}
            )
            axis.hist(points[:, i], bins=bins, density=True, color=tint, label=name, **style)
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
        else:
            axis.plot(
                points[:, j], points[:, i], ".", color=tint, ms=3 if tint == GREY else 2, alpha=0.6
            )


def _pair_legend(figure: Any, axes: Any, layers: list[tuple[np.ndarray, str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=c, marker="o", ls="", ms=5, label=name) for _, c, name in layers
    ]
    if len(axes) > 1:
        figure.legend(handles=handles, fontsize=9, frameon=False, loc="upper right")
    else:
        legend(axes[0, 0])
