"""The local cosine transform: an orthonormal basis of short windowed cosines, and tiles of its coefficients.

With blocks of `B` samples, coefficient `(t, f)` of a signal is its product with

    w_t(s) √(2/B) cos(π (f + ½) (s − tB + ½) / B),

where the window `w_t` rises as a sine over half a block on each side of the block's start, and falls over its end
so that neighbours stay orthogonal; the first and last edge of the signal are sharp. It is computed by folding
the signal at inner edges and a DCT-IV of every block (Coifman and Meyer, C. R. Acad. Sci. 312, 1991; the
modified discrete cosine transform of Princen, Johnson and Bradley, ICASSP 1987, is a case of it). At a sampling
rate `r`, a frame is `B / r` seconds and a bin `r / 2B` Hz. White noise stays white, and stationary noise is nearly
independent, with its spectrum as the variance.
"""

import numpy as np
from scipy.fft import dct

from dichroic.errors import ShapeError


def local_cosine(signals: np.ndarray, block: int) -> np.ndarray:
    """The coefficients `(…, T, block)` of `signals` `(…, T · block)`: frames × bins.

    Raises `ShapeError` unless `block` is even and divides the number of samples.
    """
    x = np.array(signals, float)
    if block < 2 or block % 2 or x.shape[-1] % block:
        raise ShapeError(
            f"local cosine transform: {x.shape[-1]} samples in blocks of {block}; the block must be even "
            "and divide the number of samples"
        )
    return _dct(_turned(x, block, 1).reshape(*x.shape[:-1], -1, block))


def inverse_local_cosine(coefficients: np.ndarray) -> np.ndarray:
    """The signals `(…, T · B)` that have the `coefficients` `(…, T, B)`."""
    x = _dct(np.asarray(coefficients, float))
    return _turned(x.reshape(*x.shape[:-2], -1), x.shape[-1], -1)


def tiles(coefficients: np.ndarray, frames: int, bins: int) -> np.ndarray:
    """Coefficients `(n, T, B)` cut into tiles, `(n · T/frames · B/bins, frames, bins)`.

    Raises `ShapeError` where tiles of that size do not cover them.
    """
    n, t, b = coefficients.shape
    if t % frames or b % bins:
        raise ShapeError(f"{t} frames × {b} bins are not covered by tiles of {frames} × {bins}")
    cut = coefficients.reshape(n, t // frames, frames, b // bins, bins)
    return cut.swapaxes(2, 3).reshape(-1, frames, bins)


def untile(parts: np.ndarray, frames: int, bins: int) -> np.ndarray:
    """The coefficients `(…, n, frames, bins)` that `tiles` cut into `parts` `(…, tiles, f, b)`."""
    *lead, _, f, b = parts.shape
    cut = parts.reshape(*lead, -1, frames // f, bins // b, f, b)
    return cut.swapaxes(-3, -2).reshape(*lead, -1, frames, bins)


def _dct(x: np.ndarray) -> np.ndarray:
    """The DCT-IV, which is its own inverse."""
    return np.asarray(dct(x, type=4, norm="ortho"))


def _turned(x: np.ndarray, block: int, sign: int) -> np.ndarray:
    """Every pair of samples that mirror each other at an inner edge, turned by the window's angle."""
    out, half = x.copy(), block // 2
    angle = np.pi / 4 * (1 + 2 * (np.arange(half) + 0.5) / block)
    rise, fall = np.sin(angle), sign * np.cos(angle)
    for edge in range(block, x.shape[-1], block):
        after, before = slice(edge, edge + half), slice(edge - half, edge)
        a, b = x[..., after], x[..., before][..., ::-1]
        out[..., after] = rise * a + fall * b
        out[..., before] = (rise * b - fall * a)[..., ::-1]
    return out
