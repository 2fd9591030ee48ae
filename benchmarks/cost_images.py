"""What EM of large sources and exact draws cost in time and memory, against each size of a problem.

From a base case (2 sources of 28 × 28 entries seen as they are, 2,048 observations, 8 components of rank 32 per
source), one size is changed at a time. "own masks": every observation has missing entries of its own, "few masks":
one of eight. Each case is a process of its own, so that its peak memory is known.

Run: python benchmarks/cost_images.py   (ten minutes on two cores)
"""

import dataclasses
import multiprocessing
import time
from dataclasses import dataclass

import numpy as np
from cost_frame import print_costs


@dataclass(frozen=True)
class Size:
    """The sizes of a problem of one view; `masks` is how many differ, 0 for none."""

    side: int = 28
    observations: int = 2048
    components: int = 8
    rank: int = 32
    sources: int = 2
    masks: int = 0


CURVES = {
    "side": (14, 28, 56, 112),
    "observations": (1024, 4096, 16384, 65536),
    "components": (2, 8, 32),
    "rank": (8, 32, 128),
    "sources": (1, 2, 3),
    "masks": (8, 2048),
}


def case(size: Size):
    """Mixtures of low rank, and observations of their sum."""
    from dichroic.learning.mixture.low_rank_em import from_columns
    from dichroic.operators import Identity
    from dichroic.problem.view import View

    rng = np.random.default_rng(0)
    shape, dim = (size.side, size.side), size.side**2
    mixtures, y = {}, 0.1 * rng.normal(size=(size.observations, dim))
    for i in range(size.sources):
        columns = rng.normal(size=(size.components, dim, 1 + size.rank)) / np.sqrt(1 + size.rank)
        mixtures[f"s{i}"] = from_columns(np.ones(size.components), columns, 0.01, shape)
        which = rng.integers(size.components, size=size.observations)
        for k in range(size.components):
            here = which == k
            z = rng.normal(size=(here.sum(), size.rank))
            y[here] += columns[k, :, 0] + z @ columns[k, :, 1:].T
    operators = {name: Identity(shape) for name in mixtures}
    masks = rng.uniform(size=(max(size.masks, 1), *shape)) < 0.8
    mask = masks[np.arange(size.observations) % len(masks)] if size.masks else None
    images = y.reshape(-1, *shape).astype(np.float32)
    return mixtures, View(images, operators, 0.1, mask=mask).prepare()


def measure(size: Size) -> list[str]:
    """Seconds of an EM step, milliseconds of a draw, and MiB: of the data, and at most."""
    import jax

    from dichroic.config import MixtureConfig
    from dichroic.inference.low_rank_sampling import low_rank_draws
    from dichroic.learning.mixture.low_rank_em import low_rank_iteration
    from dichroic.runtime.hardware import peak_memory

    mixtures, obs = case(size)
    data = obs.y.nbytes / 2**20
    config = MixtureConfig(steps=1)
    low_rank_iteration(mixtures, [obs], list(mixtures), config)  # compiles
    began = time.perf_counter()
    low_rank_iteration(mixtures, [obs], list(mixtures), config)
    step = time.perf_counter() - began
    low_rank_draws(mixtures, obs, jax.random.key(0))
    began = time.perf_counter()
    low_rank_draws(mixtures, obs, jax.random.key(1))
    draw = 1e3 * (time.perf_counter() - began) / obs.count
    return [f"{step:.2f}", f"{draw:.2f}", f"{data:.0f}", f"{peak_memory():.0f}"]


def main() -> None:
    """One table."""
    context = multiprocessing.get_context("spawn")

    def cost(name: str, value: int) -> list[str]:
        with context.Pool(1) as pool:
            return pool.apply(measure, (dataclasses.replace(Size(), **{name: value}),))

    print_costs(CURVES, ["EM step, s", "draw, ms", "data, MiB", "peak, MiB"], cost)


if __name__ == "__main__":
    main()
