"""What an iteration of mixture EM and an exact posterior draw cost, against each size of a problem.

From a base case (2 sources of 5 dimensions, 3 entries observed of each mixture, 4,096 observations, 16
components per source, an operator per observation), one size is changed at a time. Seconds of the first call
(with compilation) and of the second.

Run: python benchmarks/cost_curves.py   (five minutes on two cores)
"""

import dataclasses
import time
from dataclasses import dataclass

import jax
import numpy as np
from cost_frame import print_costs

from dichroic.config import MixtureConfig
from dichroic.inference.samplers import ExactSampler, sample_posterior
from dichroic.learning.mixture.em import em_iteration
from dichroic.operators import Dense
from dichroic.priors import GaussianMixture
from dichroic.problem.view import View


@dataclass(frozen=True)
class Size:
    """The sizes of a problem of one view."""

    sources: int = 2
    dim: int = 5
    observed: int = 3
    observations: int = 4096
    components: int = 16


CURVES = {
    "sources": (1, 2, 3, 4),
    "dim": (5, 10, 20, 40),
    "observed": (3, 6, 12, 24),
    "observations": (1024, 4096, 16384),
    "components": (4, 16, 64),
}


def case(size: Size):
    """Mixtures of thin Gaussians, and observations of them."""
    rng = np.random.default_rng(0)
    n, d, m, k = size.observations, size.dim, size.observed, size.components
    mixtures, operators, y = {}, {}, 0.01 * rng.normal(size=(n, m))
    for i in range(size.sources):
        root = 0.1 * rng.normal(size=(k, d, d)) / np.sqrt(d)
        means = rng.normal(size=(k, d))
        mixtures[f"s{i}"] = GaussianMixture.from_moments(
            np.ones(k), means, root @ root.swapaxes(1, 2)
        )
        which, a = rng.integers(k, size=n), rng.normal(size=(n, m, d)) / np.sqrt(d)
        x = means[which] + np.einsum("nij,nj->ni", root[which], rng.normal(size=(n, d)))
        y += np.einsum("nmd,nd->nm", a, x)
        operators[f"s{i}"] = Dense(a)
    return mixtures, View(y, operators, 0.01).prepare()


def twice(work) -> tuple[float, float]:
    """Seconds of the first and of the second call."""
    found = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found[0], found[1]


def measure(size: Size) -> list[str]:
    """Seconds of an iteration (five EM steps), and microseconds of a draw."""
    mixtures, obs = case(size)
    config = MixtureConfig()
    iteration = twice(lambda: em_iteration(mixtures, [obs], list(mixtures), config))
    options = {"sampler": ExactSampler(), "beam_width": config.beam_width, "batch_size": 1024}
    draw = twice(lambda: sample_posterior(mixtures, obs, jax.random.key(0), **options))
    return [
        f"{iteration[0]:.1f}",
        f"{iteration[1]:.2f}",
        f"{draw[0]:.1f}",
        f"{1e6 * draw[1] / obs.count:.0f}",
    ]


def cost(name: str, value: int) -> list[str]:
    """What `measure` says of the base case with one size changed."""
    change = {name: value}
    if name == "dim":  # as many entries observed, relative to the source
        change["observed"] = max(3, 3 * value // 5)
    return measure(dataclasses.replace(Size(), **change))


def main() -> None:
    """One table."""
    print_costs(CURVES, ["first iteration, s", "iteration, s", "first draws, s", "draw, µs"], cost)


if __name__ == "__main__":
    main()
