"""Peak signal-to-noise ratio, the usual measure of pixelwise reconstruction error.

For an observation with root-mean-square error `rmse` over its entries and a signal that spans
`data_range`,

    PSNR = 20 log₁₀(data_range / (rmse + 10⁻⁶)) dB.

The constant keeps a perfect reconstruction finite: 120 dB for a data range of one. Ratios are
averaged over observations in decibels, that is, geometrically.
"""

import numpy as np
from jaxtyping import ArrayLike, Float

from dichroic.metrics._inputs import finite, positive, same_shape

_FLOOR = 1e-6


def psnr(
    draw: Float[ArrayLike, " n *shape"], truth: Float[ArrayLike, " n *shape"], *, data_range: float
) -> float:
    """The mean over observations of the peak signal-to-noise ratio, in decibels.

    `1/n Σᵢ 20 log₁₀(data_range / (rmseᵢ + 10⁻⁶))`, `rmseᵢ² = mean((drawᵢ − truthᵢ)²)`.

    - `draw`, `truth`: `(n, *shape)`, reconstructions and what they reconstruct.
    - `data_range`: the largest minus the smallest value that the signal can take.

    Returns a float. Reference: Horé and Ziou, ICPR 2010, "Image quality metrics: PSNR vs. SSIM".
    """
    a, b = finite("psnr", "draw", draw), finite("psnr", "truth", truth)
    same_shape("psnr", draw=a, truth=b)
    positive("psnr", data_range=data_range)
    squared = (a.astype(float) - b).reshape(len(a), -1) ** 2
    rmse = np.sqrt(squared.mean(axis=1))
    return float(np.mean(20 * np.log10(data_range / (rmse + _FLOOR))))
