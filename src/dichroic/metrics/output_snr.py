"""Output signal-to-noise ratio, the usual measure of a denoised signal whose range means little."""

import numpy as np
from jaxtyping import ArrayLike, Float

from dichroic.metrics._inputs import same_shape
from dichroic.numerics.arrays import unmasked


def output_snr(
    estimate: Float[ArrayLike, " n *shape"], truth: Float[ArrayLike, " n *shape"]
) -> Float[np.ndarray, " n"]:
    """`10 log₁₀ ‖x‖² / ‖x̂ − x‖²` in dB of every estimate, `(n,)`."""
    parts = {"truth": truth, "estimate": estimate}
    x, y = (np.asarray(unmasked(a, f"output_snr: {k}"), float) for k, a in parts.items())
    same_shape("output_snr", estimate=y, truth=x)
    power = lambda a: np.sum(a.reshape(len(a), -1) ** 2, axis=1)
    return 10 * np.log10(power(x) / power(y - x))
