"""The M-step of diffusion models: training of the network of every source on its posterior draws."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from dichroic.config import FitConfig
from dichroic.inference.samplers import Progress
from dichroic.inference.sampling import Denoisers
from dichroic.learning.diffusion.draw_cache import StoredDraws
from dichroic.learning.diffusion.e_step import Samples
from dichroic.learning.diffusion.score_matching import train_denoiser, with_network
from dichroic.learning.state import Metrics
from dichroic.numerics.finite import finite
from dichroic.priors import Denoiser, DiffusionPrior
from dichroic.runtime.tracking import Clock, warn

_SLOWER = 0.1  # of the learning rate, after a training that diverged


def maximisation(
    current: Denoisers, samples: Samples, key: PRNGKeyArray, config: FitConfig, clock: Clock
) -> tuple[Denoisers, Metrics]:
    """The priors of all sources after training on their `samples`, and the losses."""
    updated: dict[str, Denoiser] = {}
    metrics: Metrics = {}
    for i, (name, x) in enumerate(sorted(samples.items())):
        key_init, key_train = jax.random.split(jax.random.fold_in(key, 1000 + i))
        say = lambda done, n, name=name: clock.progress(f"M-step {name}", done, n)
        start = with_network(current[name], key_init, config)
        updated[name], losses = trained(current[name], start, x, key_train, name, config, say)
        metrics |= losses
    return updated, metrics


def trained(
    old: Denoiser,
    start: DiffusionPrior,
    samples: np.ndarray | StoredDraws,
    key: PRNGKeyArray,
    name: str,
    config: FitConfig,
    progress: Progress,
) -> tuple[Denoiser, dict[str, float]]:
    """The denoiser `start` of the source `name` after training on `samples`, and its loss.

    A training that diverges is tried once more with a tenth of the learning rate; where that diverges too, the
    denoiser is `old`.
    """
    diffusion, told = config.diffusion, {}
    train = partial(train_denoiser, sigma_min=config.sampler.sigma_min, progress=progress)
    for times, share in enumerate((1.0, _SLOWER), 1):
        rate = share * diffusion.learning_rate
        slower = dataclasses.replace(diffusion, learning_rate=rate)
        new, loss = train(start, samples, key, config=slower)
        told[f"loss_{name}"] = loss
        if math.isfinite(loss) and finite(new):
            return new, told
        told[f"diverged_{name}"] = times
        warn(
            f"the training of {name!r} diverged at a learning rate of {rate:g} (loss {loss:g}); "
            + ("once more with a tenth of it" if share == 1 else "the prior of before is kept"),
        )
    return old, told
