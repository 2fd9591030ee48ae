"""Convolution with a kernel, by FFT, and what the axes of a kernel stand for: they are stated, never guessed.

(A x)[i] = Σ_j kernel[j] x[i − j + centre],      0 outside the source, same size out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from dichroic.errors import ShapeError
from dichroic.numerics.batching import as_float, observation_axes
from dichroic.operators.base import Shape, as_shape
from dichroic.operators.elementary import Square

Channels = Literal["all", "each"]


@dataclass(frozen=True)
class Axes:
    """How a kernel is read: the last `convolved` axes are convolved, of `one` for one observation."""

    convolved: int
    channels: Channels
    one: int


def kernel_axes(
    kernel: Shape, source: Shape, ndim: int | None = None, channels: str | None = None
) -> Axes:
    """How a kernel of shape `kernel` is read on a source of shape `source`: see `Convolve`.

    Raises `ShapeError` where it does not fit, or where sizes leave open what its axes are.
    """
    if channels not in (None, "all", "each"):
        raise ShapeError(f"Convolve: channels={channels!r}; expected 'each' or 'all'")
    if ndim is None:
        ndim = len(source) if channels is None else len(source) - 1
    leading = source[: len(source) - ndim]
    if not 1 <= ndim <= len(source) or (channels and not leading):
        raise ShapeError(
            f"Convolve: a source of shape {source} has no {ndim} axes to convolve"
            + (" beside those of channels" if channels else "")
        )
    axes = Axes(ndim, "each" if channels == "each" else "all", ndim)
    if channels == "each":
        axes = Axes(ndim, "each", len(source))
    rows = len(kernel) - axes.one
    if rows not in (0, 1) or (channels == "each" and kernel[rows : rows + len(leading)] != leading):
        raise ShapeError(_misfit(kernel, source, axes))
    return axes


def check_stated(kernel: Shape, source: Shape, ndim: int | None, channels: str | None) -> None:
    """Raise a `ShapeError` where sizes leave open whether a kernel is one per channel; it says how to state it."""
    if channels is not None or len(source) < 2 or ndim == len(source):
        return
    if ndim is None:
        own = kernel[len(kernel) - len(source) :]
        open_ = len(source) > 2 or (own[0] == source[0] and own[1] < source[1])
        if open_ and len(kernel) >= len(source):
            raise ShapeError(_unstated(kernel, source))
    elif len(kernel) == ndim + 1 and kernel[0] == source[len(source) - ndim - 1]:
        raise ShapeError(_unstated(kernel, source))


def _unstated(kernel: Shape, source: Shape) -> str:
    return (
        f"Convolve: is a kernel of shape {kernel}, on a source of shape {source}, one for each channel, for each "
        "observation, or for all axes? Say channels='each' (kernels (C, …), or (n, C, …) per observation), "
        f"channels='all' (one for all channels; (n, …) per observation), or ndim={len(source)} (convolve all "
        "axes, channels too)"
    )


def _misfit(kernel: Shape, source: Shape, axes: Axes) -> str:
    if axes.channels == "each":
        leading = source[: len(source) - axes.convolved]
        want = ", ".join([*map(str, leading), *"…" * axes.convolved])
        return (
            f"Convolve: a kernel of shape {kernel} is not one for each channel of a source of shape {source}; "
            f"expected ({want}), or (n, {want}) for one per observation"
        )
    return (
        f"Convolve: a kernel of shape {kernel} does not fit {axes.convolved} axes "
        f"of a source of shape {source}; give ndim=, the number of axes to convolve, or channels='all' or "
        "'each', if the first axis of the source is one of channels"
    )


class Convolve(Square):
    """Convolution with `kernel` over the last axes of the source, zero outside it, same size out.

    Args:
        kernel: a point-spread function, of any sizes; its axes are the convolved ones of the source, `k` of them.
            With one more axis in front, `(n, …)`, one kernel per observation.
        shape: the shape of the source.
        ndim: `k`. By default all axes of the source, and with `channels` all but the first.
        channels: for sources with axes in front that are not convolved, such as bands `(C, H, W)`: `"all"` for
            one kernel for all channels, `(h, w)` or `(n, h, w)`; `"each"` for one for each, `(C, h, w)` or
            `(n, C, h, w)`.
        centre: the entry of the kernel that a source of one entry keeps in its place, an integer for all `k` axes
            or one for each. By default `size // 2`, as in `numpy.fft.fftshift`: the middle of odd sizes, the
            first entry of the second half of even ones.

    What sizes leave open is refused, unless `ndim` or `channels` states it: a kernel with as many axes as a source
    of three or more; one of two axes whose first is as long as the first of a source `(C, T)`, and whose last is
    shorter than that of the source (a kernel as large as an image is one of two axes); and with `ndim` alone, one
    whose axis in front is as long as that of the channels.
    """

    shape: Shape = eqx.field(static=True)
    axes: Axes = eqx.field(static=True)
    centre: tuple[int, ...] = eqx.field(static=True)
    kernel: Float[Array, "..."] = eqx.field(
        converter=as_float, metadata=observation_axes(lambda op: op.axes.one)
    )

    def __init__(
        self,
        kernel: Any,
        *,
        shape: int | tuple[int, ...],
        ndim: int | None = None,
        channels: str | None = None,
        centre: int | Sequence[int] | None = None,
    ):
        self.shape, self.kernel = as_shape(shape), as_float(kernel)
        self.axes = kernel_axes(self.kernel.shape, self.shape, ndim, channels)
        check_stated(self.kernel.shape, self.shape, ndim, channels)
        self.centre = _centre(centre, self._sizes)

    @property
    def _sizes(self) -> Shape:
        return self.kernel.shape[-self.axes.convolved :]

    def mv(self, x: Array) -> Array:
        return self._filter(x, self.kernel, self.centre)

    def rmv(self, y: Array) -> Array:
        turned = jnp.flip(self.kernel, range(-self.axes.convolved, 0))
        mirrored = tuple(k - 1 - c for k, c in zip(self._sizes, self.centre, strict=True))
        return self._filter(y, turned, mirrored)

    def row_squares(self) -> Array:
        return jnp.maximum(self._filter(jnp.ones(self.shape), self.kernel**2, self.centre), 0)

    def _filter(self, x: Array, kernel: Array, centre: Shape) -> Array:
        ndim = self.axes.convolved
        dims, axes = self.shape[-ndim:], tuple(range(-ndim, 0))
        size = [d + k - 1 for d, k in zip(dims, self._sizes, strict=True)]
        spectrum = jnp.fft.rfftn(x, size, axes=axes) * jnp.fft.rfftn(kernel, size, axes=axes)
        full = jnp.fft.irfftn(spectrum, size, axes=axes)
        return full[(..., *(slice(c, c + d) for c, d in zip(centre, dims, strict=True)))]


def _centre(centre: int | Sequence[int] | None, sizes: Shape) -> tuple[int, ...]:
    """The centre of a kernel along each axis, `size // 2` where it is not given."""
    if centre is None:
        return tuple(k // 2 for k in sizes)
    found = (centre,) * len(sizes) if isinstance(centre, int) else tuple(centre)
    if len(found) != len(sizes) or not all(
        c == int(c) and 0 <= c < k for c, k in zip(found, sizes, strict=True)
    ):
        raise ShapeError(
            f"Convolve: centre={centre!r}; expected an entry of a kernel of shape {sizes}, one integer per axis"
        )
    return tuple(int(c) for c in found)
