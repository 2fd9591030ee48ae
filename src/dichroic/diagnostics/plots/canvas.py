"""What all figures share: colours, fonts, how an array is shown, and PNG files."""

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
GREY, DARK, MISSING = "#8a8a8a", "#333333", "#e4e4e4"
STYLES = ("-", "--", ":", "-.")
LINE_SIZE = 12  # arrays of one axis and more entries than this are drawn as lines
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


def channels(shape: Sequence[int]) -> int:
    """How many channels arrays of this shape `(C, rows, columns)` have; 1 unless C is less than both others."""
    return shape[0] if len(shape) == 3 and shape[0] < min(shape[1:]) else 1


def shown(shape: Sequence[int]) -> str:
    """What `as_images` shows of an image of this shape, in words; empty where that is all of it."""
    if len(shape) != 3 or min(shape) == 1:
        return ""
    count = channels(shape)
    if count == 1:
        return "first slice along the shortest axis"
    return "RGB" if count == 3 else f"mean over {count} channels"


def as_images(x: np.ndarray, *, rgb: bool = True) -> np.ndarray:
    """`(n, rows, columns)`, or `(n, rows, columns, 3)` of three channels.

    Of other numbers of channels, and of three without `rgb`, the mean over those that are not NaN; of other arrays
    with three axes, the first slice along the shortest.
    """
    if x.ndim < 4:
        return x
    count = channels(x.shape[1:])
    if count == 1:
        return np.take(x, 0, axis=1 + int(np.argmin(x.shape[1:])))
    if count == 3 and rgb:
        return np.moveaxis(x, 1, -1)
    seen = ~np.isnan(x)
    number = seen.sum(axis=1)
    total = np.sum(x, axis=1, where=seen)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=120, facecolor="white")
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Any:
    """A figure of this size in inches, made without pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axis: Any, xlabel: str = "", ylabel: str = "", title: str = "") -> Any:
    """`axis` with its labels, without a box, and with whole numbers of entries and iterations."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=SMALL)
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_ylabel(ylabel, fontsize=9)
    axis.set_title(title, fontsize=10)
    if xlabel in ("entry", "iteration"):
        axis.xaxis.get_major_locator().set_params(integer=True)
    return axis


def legend(axis: Any, **options: Any) -> None:
    """Add a legend, if anything is labelled."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=SMALL, frameon=False, **options)


def draw_image(axis: Any, x: np.ndarray, low: float, high: float, cmap: str = "viridis") -> Any:
    """Draw an image (grey where NaN), its colours from `low` to `high`; returns what has them."""
    from matplotlib import colormaps

    colours = colormaps[cmap].with_extremes(bad=MISSING)
    x = _rgb(x, low, high) if x.ndim == 3 else x
    axis.set_xticks([])
    axis.set_yticks([])
    return axis.imshow(x, vmin=low, vmax=high, cmap=colours, interpolation="nearest", aspect="auto")


def _rgb(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Colours `(rows, columns, 3)` in [0, 1]: what is missing of some channels is dark, of all of them grey."""
    from matplotlib.colors import to_rgb

    missing = np.isnan(x)
    colours = np.where(missing, 0.0, np.clip((x - low) / (high - low), 0, 1))
    return np.where(missing.all(axis=-1, keepdims=True), to_rgb(MISSING), colours)


def limits(parts: Iterable[np.ndarray]) -> tuple[float, float]:
    """The range of all finite values but the most extreme percent."""
    values = np.concatenate([np.ravel(p) for p in parts])
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(values, [0.5, 99.5])
    return float(low), float(high if high > low else low + 1)
