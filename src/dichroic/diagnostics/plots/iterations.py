"""Learning curves: what the iterations of a fit measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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

Metrics = Sequence[Mapping[str, Any]]


def learning(
    metrics: Sequence[Mapping[str, Any]], sources: Sequence[str], views: Sequence[str]
) -> Any:
    """Curves over iterations: log evidence, bound, PSNR and loss, those that there are; else `None`."""
    panels = []
    for draw, title, ylabel in (
        (_evidence_curves, "Mixtures: log evidence, dots held-out", "nats per observation"),
        (_gain_curves, "Diffusion: evidence gained, held-out", "nats per observation"),
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
    figure = new_figure(4.4 * columns, 3.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, ylabel, series) in zip(axes, panels, strict=False):
        tidy(axis, "iteration", ylabel, title)
        for points, style in series:
            axis.plot(*np.transpose(points), **style)
        legend(axis)
    return figure


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    rows = enumerate(metrics, start=1)
    return [(row.get("iteration", i), row[key]) for i, row in rows if row.get(key) is not None]


def _tint(group: str, sources: Sequence[str]) -> str:
    return colour(sources.index(group)) if group in sources else DARK


def _evidence_curves(
    metrics: Metrics, sources: Sequence[str], views: Sequence[str]
) -> list[tuple[Any, dict[str, Any]]]:
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


def _gain_curves(
    metrics: Metrics, sources: Sequence[str], views: Sequence[str]
) -> list[tuple[Any, dict[str, Any]]]:
    found = [(i, s, _series(metrics, f"evidence_gain_{s}")) for i, s in enumerate(sources)]
    out: list[tuple[Any, dict[str, Any]]] = [
        (points, {"color": colour(i), "marker": "o", "ms": 4, "label": label(source)})
        for i, source, points in found
        if points
    ]
    if out:
        iterations = [iteration for points, _ in out for iteration, _ in points]
        none = [(min(iterations), 0.0), (max(iterations), 0.0)]
        out.append((none, {"color": GREY, "ls": "--", "lw": 1, "label": "no gain"}))
    return out


def _psnr_curves(
    metrics: Metrics, sources: Sequence[str], views: Sequence[str]
) -> list[tuple[Any, dict[str, Any]]]:
    out = []
    for i, source in enumerate(sources):
        for j, view in enumerate(views):
            points = _series(metrics, f"psnr_{source}_{view}")
            style = {"color": colour(i), "ls": STYLES[j % len(STYLES)], "marker": ".", "lw": 1.2}
            if points:
                out.append((points, {**style, "label": f"{label(source)}, {label(view)}"}))
    return out


def _loss_curves(
    metrics: Metrics, sources: Sequence[str], views: Sequence[str]
) -> list[tuple[Any, dict[str, Any]]]:
    found = [(i, source, _series(metrics, f"loss_{source}")) for i, source in enumerate(sources)]
    return [
        (points, {"color": colour(i), "marker": "o", "ms": 4, "label": label(source)})
        for i, source, points in found
        if points
    ]
