"""The E-step of diffusion models: joint posterior draws of all sources, of every observation."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from dichroic.config import FitConfig
from dichroic.inference.sampling import Denoisers, draw
from dichroic.learning.data import Data
from dichroic.learning.diffusion.draw_cache import StoredDraws, draw_to_disk
from dichroic.learning.safeguards import check_draws
from dichroic.problem.batches import AnyObservations, ObservationBatches, numbered
from dichroic.problem.observations import Observations
from dichroic.runtime import distributed
from dichroic.runtime.fingerprint import fingerprint
from dichroic.runtime.tracking import Clock

Samples = Mapping[str, np.ndarray | StoredDraws]


def expectation(
    current: Denoisers,
    views: Sequence[AnyObservations],
    names: Sequence[str],
    key: PRNGKeyArray,
    config: FitConfig,
    n_draws: int,
    clock: Clock | None = None,
) -> dict[str, np.ndarray]:
    """Joint posterior draws `(n_draws, n, *shape)` of the observations of all `views`, per source."""
    found: dict[str, list[np.ndarray]] = {}
    clock = clock or Clock()
    for i, (obs, name) in enumerate(zip(views, names, strict=True)):
        own = partial(
            _own_draws, current, obs, name, jax.random.fold_in(key, i), config, n_draws, clock
        )
        for source, x in distributed.run_on_all(own).items():
            found.setdefault(source, []).append(obs.gathered(x, 1))
    return {source: np.concatenate(parts, axis=1) for source, parts in found.items()}


def _own_draws(
    current: Denoisers,
    obs: AnyObservations,
    name: str,
    key: PRNGKeyArray,
    config: FitConfig,
    n_draws: int,
    clock: Clock,
) -> dict[str, np.ndarray]:
    """Draws for the observations of this process."""
    found: dict[str, list[np.ndarray]] = {}
    say = partial(clock.progress, f"E-step {name}")
    for first, block in numbered(obs):
        options = {"n_draws": n_draws, "first_index": first, "progress": say}
        for source, x in _checked_draws(current, block, name, key, config, **options).items():
            found.setdefault(source, []).append(x)
    return {source: np.concatenate(parts, axis=1) for source, parts in found.items()}


def _checked_draws(
    current: Denoisers,
    obs: Observations,
    name: str,
    key: PRNGKeyArray,
    config: FitConfig,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Draws of each source for some observations of the view `name`; raises `RunError` unless they are finite."""
    draws = draw(current, obs, key, config, **options)
    check_draws(name, obs, draws, current)
    return draws.x


def training_draws(
    current: Denoisers, data: Data, key: PRNGKeyArray, config: FitConfig, clock: Clock
) -> Samples:
    """One posterior draw of every training observation, per source; on disk where the observations are."""
    views = [obs for obs in data.train if isinstance(obs, ObservationBatches) and obs.batch_size]
    if not views:
        drawn = expectation(current, data.train, data.names, key, config, 1, clock)
        return {source: x[0] for source, x in drawn.items()}

    def draw_some(i: int, obs: Observations, first: int) -> dict[str, np.ndarray]:
        at = jax.random.fold_in(key, i)
        return _checked_draws(current, obs, data.names[i], at, config, first_index=first)

    about = (current, [data.operators] * len(views), config.to_dict(), jax.random.key_data(key))
    return draw_to_disk(
        data.scratch,
        views,
        data.names,
        [partial(draw_some, i) for i in range(len(views))],
        model=fingerprint(about),
        memory=data.memory,
        seed=int(jax.random.randint(key, (), 0, 2**31 - 1)),
        progress=clock.progress,
    )
