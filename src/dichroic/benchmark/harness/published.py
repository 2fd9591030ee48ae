"""The numbers of the paper: arXiv 2510.05205 (NeurIPS 2025), tables 1 and 2.

From 65,536 observations of each view, after 32 hours on a data-centre GPU; of one posterior draw of the
last source (contrastive), or the mean of both sources and views (mixed).
"""

from typing import NamedTuple


class Published(NamedTuple):
    """PSNR in dB of posterior draws, and Sinkhorn divergences of posterior and prior draws."""

    psnr: float
    sinkhorn_posterior: float | None = None
    sinkhorn_prior: float | None = None


PUBLISHED = {
    "contrastive-2": {
        "ddprism": Published(38.27, 0.35, 0.37),
        "clvm-vae": Published(17.15),
        "ddprism-gibbs": Published(12.66),
        "clvm-linear": Published(9.58),
        "pcpca": Published(9.35),
    },
    "contrastive-3": {
        "ddprism": Published(19.78, 0.75, 0.78),
        "clvm-vae": Published(13.09),
        "ddprism-gibbs": Published(9.50),
        "clvm-linear": Published(11.64),
        "pcpca": Published(6.89),
    },
    "mixed-0.1": {
        "ddprism": Published(24.15, 0.05, 0.04),
        "ddprism-gibbs": Published(17.69),
    },
}
