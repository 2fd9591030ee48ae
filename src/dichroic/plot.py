"""Figures of a fit: observations, separated sources, priors, learning curves, fit and calibration.

Every function returns `matplotlib.figure.Figure` objects made without pyplot, so that nothing
global changes and no window opens; `png` renders one. How an array is shown follows from its shape
alone (`kind`): images, lines, or scatter plots of its first entries. Each source has one colour.
"""

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from dichroic.metrics import RankHistogram

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
GREY, DARK = "#8a8a8a", "#333333"
STYLES = ("-", "--", ":", "-.")
LINE_SIZE = 12  # arrays of one axis and more entries than this are drawn as lines
PAIRS = 5  # dimensions in a scatter matrix
POINTS = 2000  # points in a scatter plot
SMALL = 8  # font size of ticks and legends


def colour(i: int) -> str:
    """The colour of source number `i`."""
    return COLOURS[i % len(COLOURS)]


def label(name: str) -> str:
    """`name` as matplotlib shows it literally: no mathematics, not left out of legends."""
    text = name.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def kind(shape: Sequence[int]) -> str:
    """How an array of this shape is shown: `"image"`, `"lines"` or `"points"`."""
    if len(shape) in (2, 3) and sum(n > 1 for n in shape) >= 2:
        return "image"
    return "lines" if math.prod(shape) > LINE_SIZE else "points"


def as_images(x: np.ndarray) -> np.ndarray:
    """`(n, rows, columns)`; of arrays with three axes, the first slice along the shortest."""
    if x.ndim == 4:
        x = np.take(x, 0, axis=1 + int(np.argmin(x.shape[1:])))
    return x


def png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=120, facecolor="white")
    return buffer.getvalue()


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axis: Any, xlabel: str = "", ylabel: str = "", title: str = "") -> Any:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=SMALL)
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_ylabel(ylabel, fontsize=9)
    axis.set_title(title, fontsize=10)
    if xlabel in ("entry", "lap"):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return axis


def _legend(axis: Any, **options: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=SMALL, frameon=False, **options)


# Observations and prior samples


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
    figure = _figure(4.6, 3.6)
    if flat.shape[1] == 1:
        axis = _tidy(figure.subplots(), "entry 1", "observations")
        axis.hist(flat[np.isfinite(flat)], bins=40, color=DARK, alpha=0.7)
    else:
        axis = _tidy(figure.subplots(), "entry 1", "entry 2")
        axis.plot(flat[:, 0], flat[:, 1], ".", color=DARK, ms=3, alpha=0.6)
    return figure


def _gallery(x: np.ndarray) -> Any:
    columns = min(8, len(x))
    rows = -(-len(x) // columns)
    height, width = x.shape[1:]
    figure = _figure(columns * 0.95 + 0.9, rows * 0.95 * min(max(height / width, 0.3), 2) + 0.2)
    axes = figure.subplots(rows, columns, squeeze=False)
    low, high = _limits([x])
    shown = None
    for i, axis in enumerate(axes.ravel()):
        axis.axis("off")
        if i < len(x):
            shown = _image(axis, x[i], low, high)
    bar = figure.colorbar(shown, ax=axes, shrink=0.9, pad=0.02)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def _curves(x: np.ndarray, tint: str) -> Any:
    columns = 2 if len(x) > 1 else 1
    rows = -(-len(x) // columns)
    figure = _figure(7.5, 1.2 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i, axis in enumerate(axes.ravel()):
        axis.set_visible(i < len(x))
        if i < len(x):
            _tidy(
                axis, "entry" if i + columns >= len(x) else "", "value" if i % columns == 0 else ""
            )
            axis.plot(np.arange(1, x.shape[1] + 1), x[i], color=tint, lw=1, marker=".", ms=3)
    return figure


def _image(axis: Any, x: np.ndarray, low: float, high: float, cmap: str = "viridis") -> Any:
    from matplotlib import colormaps

    colours = colormaps[cmap].with_extremes(bad="#e4e4e4")
    axis.set_xticks([])
    axis.set_yticks([])
    return axis.imshow(x, vmin=low, vmax=high, cmap=colours, interpolation="nearest", aspect="auto")


def _limits(parts: Iterable[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([np.ravel(p) for p in parts])
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(values, [0.5, 99.5])
    return float(low), float(high if high > low else low + 1)


# Separated sources


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
        std = as_images(draws[:, :n].std(axis=0, ddof=1))
        groups.append(([("std. dev.", std)], "magma"))
    columns = sum(len(group) for group, _ in groups)
    height, width = signal[0][1].shape[1:]
    figure = _figure(columns * 1.15, n * 1.1 * min(max(height / width, 0.3), 2) + 0.9)
    axes = figure.subplots(n, columns, squeeze=False)
    start = 0
    for group, cmap in groups:
        _image_group(figure, axes[:, start : start + len(group)], group, cmap)
        start += len(group)
    return figure


def _image_group(figure: Any, axes: Any, group: list[tuple[str, np.ndarray]], cmap: str) -> None:
    low, high = _limits([x for _, x in group])
    low = 0.0 if cmap == "magma" else low
    shown = None
    for c, (title, x) in enumerate(group):
        axes[0, c].set_title(title, fontsize=9)
        for r in range(len(axes)):
            shown = _image(axes[r, c], x[r], low, high, cmap)
    bar = figure.colorbar(
        shown, ax=axes, location="bottom", aspect=11 * len(group), pad=0.01, fraction=0.03
    )
    bar.ax.tick_params(labelsize=7)
    bar.ax.locator_params(nbins=3 if len(group) == 1 else 6)


def _bands(draws: np.ndarray, truth: np.ndarray | None, tint: str) -> Any:
    """Posterior means and 90% bands of a few observations, with their truth."""
    n = min(6, draws.shape[1])
    columns = 2 if n > 1 else 1
    figure = _figure(7.5, 1.7 * -(-n // columns) + 0.6)
    axes = figure.subplots(-(-n // columns), columns, squeeze=False, sharex=True, sharey=True)
    entries = np.arange(1, draws.shape[2] + 1)
    for i, axis in enumerate(axes.ravel()):
        axis.set_visible(i < n)
        if i >= n:
            continue
        _tidy(axis, "entry" if i + columns >= n else "", "value" if i % columns == 0 else "")
        low, high = np.quantile(draws[:, i], [0.05, 0.95], axis=0)
        axis.fill_between(entries, low, high, color=tint, alpha=0.3, lw=0, label="90% band")
        axis.plot(entries, draws[:, i].mean(axis=0), color=tint, lw=1.2, label="posterior mean")
        if truth is not None:
            axis.plot(entries, truth[i], color="black", lw=0.9, ls="--", label="truth")
    _legend(axes[0, 0], ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def pairs(x: np.ndarray, truth: np.ndarray | None, tint: str, *, what: str) -> Any:
    """A scatter matrix of the first dimensions of points `(n, d)`, the truth grey behind them."""
    d = min(PAIRS, x.shape[1])
    layers = [] if truth is None else [(truth[:POINTS, :d], GREY, "truth")]
    layers.append((x[:POINTS, :d], tint, what))
    layers.sort(key=lambda layer: -len(layer[0]))  # the fewer points in front
    size = 3.8 if d == 1 else max(4.2, 1.45 * d)
    figure = _figure(size, size)
    axes = figure.subplots(d, d, squeeze=False, sharex="col")
    lows, highs = np.transpose(
        [_limits([points[:, i] for points, _, _ in layers]) for i in range(d)]
    )
    margin = 0.06 * (highs - lows)
    for i in range(d):
        for j in range(d):
            axis = axes[i, j]
            axis.set_visible(j <= i)
            if j > i:
                continue
            _tidy(axis, f"entry {j + 1}" if i == d - 1 else "")
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
        _legend(axes[0, 0])


def _against_truth(draw: np.ndarray, truth: np.ndarray, tint: str) -> Any:
    figure = _figure(3.9, 3.9)
    axis = _tidy(figure.subplots(), "truth, all entries", "one draw")
    low, high = float(min(truth.min(), draw.min())), float(max(truth.max(), draw.max()))
    axis.plot([low, high], [low, high], color="black", lw=0.8)
    axis.plot(truth.ravel()[:POINTS], draw.ravel()[:POINTS], ".", color=tint, ms=3, alpha=0.5)
    axis.set_aspect("equal")
    return figure


# Learning


def learning(
    metrics: Sequence[Mapping[str, Any]], sources: Sequence[str], views: Sequence[str]
) -> Any:
    """Curves over laps: log evidence, bound, PSNR and loss, those that there are; else `None`."""
    panels = []
    for draw, title, ylabel in (
        (_evidence_curves, "Mixtures: log evidence, dots held-out", "nats per observation"),
        (_bound_curve, "Diffusion: evidence bound, held-out", "nats per observation"),
        (_psnr_curves, "PSNR of one draw, held-out", "dB"),
        (_loss_curves, "Diffusion: training loss", "score matching loss"),
    ):
        series = draw(metrics, sources, views)
        if series:
            panels.append((title, ylabel, series))
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(4.4 * columns, 3.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, ylabel, series) in zip(axes, panels, strict=False):
        _tidy(axis, "lap", ylabel, title)
        for points, style in series:
            axis.plot(*np.transpose(points), **style)
        _legend(axis)
    return figure


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    rows = enumerate(metrics, start=1)
    return [(row.get("lap", i), row[key]) for i, row in rows if row.get(key) is not None]


def _tint(group: str, sources: Sequence[str]) -> str:
    return colour(sources.index(group)) if group in sources else DARK


def _evidence_curves(metrics, sources, views) -> list[tuple[Any, dict[str, Any]]]:
    out = []
    for group in dict.fromkeys((row.get("phase"), row.get("sources", "")) for row in metrics):
        rows = [row for row in metrics if (row.get("phase"), row.get("sources", "")) == group]
        train, test = _series(rows, "log_evidence"), _series(rows, "heldout_log_evidence")
        tint, name = _tint(group[1], sources), label(group[1])
        if train:
            out.append((train, {"color": tint, "lw": 1.2, "label": name}))
        if test:
            out.append((test, {"color": tint, "ls": "", "marker": "o", "ms": 4}))
    return out


def _bound_curve(metrics, sources, views) -> list[tuple[Any, dict[str, Any]]]:
    bound = _series(metrics, "evidence_bound")
    if not bound:
        return []
    start = [(bound[0][0], bound[0][1]), (bound[-1][0], bound[0][1])]
    dashed = {"color": GREY, "ls": "--", "lw": 1, "label": "mixtures (start)"}
    return [
        (start, dashed),
        (bound, {"color": DARK, "marker": "o", "ms": 4, "label": "after the lap"}),
    ]


def _psnr_curves(metrics, sources, views) -> list[tuple[Any, dict[str, Any]]]:
    out = []
    for i, source in enumerate(sources):
        for j, view in enumerate(views):
            points = _series(metrics, f"psnr_{source}_{view}")
            style = {"color": colour(i), "ls": STYLES[j % len(STYLES)], "marker": ".", "lw": 1.2}
            if points:
                out.append((points, {**style, "label": f"{label(source)}, {label(view)}"}))
    return out


def _loss_curves(metrics, sources, views) -> list[tuple[Any, dict[str, Any]]]:
    found = [(i, source, _series(metrics, f"loss_{source}")) for i, source in enumerate(sources)]
    return [
        (points, {"color": colour(i), "marker": "o", "ms": 4, "label": label(source)})
        for i, source, points in found
        if points
    ]


# Fit and calibration


def data_fit(chi2: np.ndarray, entries: int | None) -> Any:
    """The histogram of χ² per entry, and its density if all draws are calibrated."""
    values = chi2[np.isfinite(chi2)]
    high = max(2.0, float(np.percentile(values, 99.5)) * 1.05) if values.size else 2.0
    figure = _figure(5.2, 2.9)
    axis = _tidy(figure.subplots(), "χ² per observed entry, of every draw", "density")
    bins = np.linspace(0, high, 51).tolist()
    axis.hist(np.clip(values, 0, high), bins=bins, density=True, color=GREY, label="draws")
    if entries:
        x = np.linspace(high / 400, high, 400)
        axis.plot(
            x, stats.chi2.pdf(x * entries, entries) * entries, color=DARK, lw=1, label="ideal"
        )
        axis.set_ylim(top=1.05 * axis.dataLim.y1 if entries > 2 else 3)
    axis.axvline(1, color="#D55E00", lw=1.5, label="1")
    axis.axvline(
        values.mean() if values.size else np.nan, color="black", ls="--", lw=1.2, label="mean"
    )
    _legend(axis)
    return figure


def calibration(
    curves: Mapping[tuple[int, str, int], tuple[np.ndarray, np.ndarray, np.ndarray]],
    ranks: Mapping[tuple[int, str, int], RankHistogram],
) -> Any:
    """Coverage against nominal level, and rank histograms, by `(source, label, view)` numbers.

    A curve is `(levels, coverages, standard errors)`.
    """
    rows = -(-len(ranks) // 2)
    figure = _figure(8.8, 3.6 + 1.9 * rows)
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.6, 1.9 * rows])
    axis = _tidy(top.subplots(), "nominal level", "coverage", "Intervals that hold the truth")
    axis.plot([0, 1], [0, 1], color="black", lw=0.8, label="ideal")
    for (i, name, j), (levels, values, errors) in curves.items():
        style = {"color": colour(i), "ls": STYLES[j % len(STYLES)], "marker": ".", "lw": 1.2}
        axis.errorbar(levels, values, 2 * errors, label=label(name), **style)
    axis.set_aspect("equal")
    _legend(axis, loc="upper left", bbox_to_anchor=(1, 1))
    axes = bottom.subplots(rows, 2, squeeze=False).ravel()
    for axis in axes[len(ranks) :]:
        axis.set_visible(False)
    for axis, ((i, name, _), ranked) in zip(axes, ranks.items(), strict=False):
        _rank_panel(axis, ranked, colour(i), label(name))
    return figure


def _rank_panel(axis: Any, ranked: RankHistogram, tint: str, name: str) -> None:
    bins = len(ranked.frequencies)
    centres = (np.arange(bins) + 0.5) / bins
    _tidy(axis, "rank of the truth among its draws", "frequency", name)
    axis.bar(centres, ranked.frequencies, width=0.94 / bins, color=tint, alpha=0.75)
    band = 2 * np.append(ranked.standard_errors, ranked.standard_errors[-1])
    edges = np.linspace(0, 1, bins + 1)
    options = {"step": "post", "color": "black", "alpha": 0.18, "lw": 0}
    axis.fill_between(edges, 1 / bins - band, 1 / bins + band, **options)
    axis.axhline(1 / bins, color="black", lw=0.8)
    axis.set_xlim(0, 1)
