"""How good priors are by held-out observations, as a fit reports it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dichroic.config import FitConfig
from dichroic.inference.sampling import Denoisers, draw, predictive_chi2
from dichroic.learning.data import Data
from dichroic.learning.safeguards import usable
from dichroic.metrics import mean_chi2, psnr
from dichroic.operators.scaling import unscaled


def scores(
    denoisers: Denoisers, data: Data, which: Sequence[int] | range, config: FitConfig
) -> dict[str, Any]:
    """χ² of held-out draws, and the PSNR of one draw where the truth is known."""
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 2)
    metrics: dict[str, Any] = {}
    for i in which:
        some = data.test[i].head(config.diffusion.evidence_observations)
        draws = draw(denoisers, some, jax.random.fold_in(key, i), config)
        if not usable(data.names[i], some, draws, denoisers):
            continue
        chi2 = predictive_chi2(some, draws)
        metrics[f"chi2_{data.names[i]}"] = mean_chi2(chi2)
        for name, x in unscaled(draws.x, data.operators).items():
            truth = data.truth[i].get(name)
            if truth is not None and np.ptp(truth) > 0:  # false for NaN too
                score = psnr(x[0], truth[: some.count], data_range=float(np.ptp(truth)))
                metrics[f"psnr_{name}_{data.names[i]}"] = score
    return metrics
