"""What `test_layout` runs in several processes and on several devices: draws, a network, and a fit, into a file."""

import sys

import jax
import numpy as np

from dichroic.config import DiffusionConfig, FitConfig, SamplerConfig
from dichroic.learning.diffusion.e_step import expectation
from dichroic.learning.diffusion.score_matching import train_denoiser
from dichroic.learning.fit import fit
from dichroic.operators import Dense, Identity
from dichroic.operators.noise import DiagonalNoise
from dichroic.priors import DiffusionPrior, GaussianMixture
from dichroic.priors.networks import Mlp
from dichroic.problem.batches import shared_by_processes
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View
from dichroic.runtime import distributed

N, D, M = 150, 3, 2
RNG = np.random.default_rng(0)


def prior(seed: int) -> GaussianMixture:
    """Two Gaussians."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(2, D, D))
    return GaussianMixture.from_moments(
        [0.4, 0.6], rng.normal(size=(2, D)), factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(D)
    )


def problem() -> Problem:
    """Two sources that are seen through operators and noise of each observation."""
    a, b = RNG.normal(size=(2, N, M, D))
    variance = RNG.uniform(0.01, 0.1, size=(N, M))
    line, ring = np.outer(RNG.normal(size=N), [1, 2, -1]), RNG.normal(size=(N, D)) ** 2
    seen = lambda a, x: np.einsum("nij,nj->ni", a, x)
    noise = lambda: np.sqrt(variance) * RNG.normal(size=(N, M))
    views = [
        View(seen(a, line) + noise(), {"line": Dense(a)}, DiagonalNoise(variance), "alone"),
        View(
            seen(a, line) + seen(b, ring) + noise(),
            {"line": Dense(a), "ring": Dense(b)},
            DiagonalNoise(variance),
            "both",
        ),
    ]
    return Problem([Source("line", (D,)), Source("ring", (D,))], views)


def long_problem() -> Problem:
    """A stationary source of many entries, and one of few directions before it."""
    size, n = 132, 40
    walk = np.cumsum(RNG.normal(size=(2, n, 2 * size)), axis=2)
    sky = walk[:, :, size:] - walk[:, :, :size]
    star = np.outer(RNG.normal(size=n), np.sin(np.arange(size)))
    noisy = lambda x: x + 0.5 * RNG.normal(size=x.shape)
    eye = Identity((size,))
    views = [
        View(noisy(sky[0]), {"sky": eye}, 0.5, "empty"),
        View(noisy(sky[1] + star), {"sky": eye, "star": eye}, 0.5, "full"),
    ]
    return Problem([Source("sky", (size,)), Source("star", (size,))], views)


def main(out: str) -> None:
    """All of it."""
    distributed.initialize()
    stated = problem()
    config = FitConfig.from_dict({"sampler": {"steps": 4}, "diffusion": {"width": 8, "depth": 1}})
    network = Mlp((D,), 8, 1, key=jax.random.key(3))
    corrected = {"line": prior(1), "ring": DiffusionPrior(prior(2), network)}
    observations = [v.prepare() for v in stated.views]
    found = {}
    for name, known in (("exact", {"line": prior(1), "ring": prior(2)}), ("walk", corrected)):
        args = shared_by_processes(observations), ["alone", "both"], jax.random.key(5), config, 2
        found |= {f"{name}/{k}": x for k, x in expectation(known, *args).items()}
    samples = found["exact/ring"].reshape(-1, D)
    trained, loss = train_denoiser(
        corrected["ring"],
        samples,
        jax.random.key(7),
        config=DiffusionConfig(steps=120, batch_size=64),
        sigma_min=SamplerConfig().sigma_min,
    )
    x = np.linspace(-1, 1, 4 * D).reshape(4, D)
    found["loss"] = np.asarray(loss)
    found["network"] = np.asarray(jax.vmap(lambda u: trained(u, 0.5))(x))
    settings = {
        "mixture": {
            "components": 2,
            "steps": 3,
            "iterations": 2,
            "final_iterations": 2,
            "gaussian_iterations": 2,
        },
        "diffusion": {"iterations": 0},
    }
    both = Problem(stated.sources, stated.views[1:])
    state, _ = fit(both, FitConfig.from_dict(settings))
    for name, mixture in state.best.items():
        found[f"mean/{name}"] = np.asarray(mixture.location)
        found[f"covariance/{name}"] = np.asarray(mixture.covariances())
    settings["mixture"] |= {"rank": 2, "stationary": ["sky"]}
    state, _ = fit(long_problem(), FitConfig.from_dict(settings))
    for name, mixture in state.best.items():
        found[f"mean/{name}"] = np.asarray(mixture.location)
        found[f"covariance/{name}"] = np.asarray(mixture.covariances())
    if distributed.is_primary():
        np.savez(out, layout=[distributed.processes(), len(jax.devices())], **found)


if __name__ == "__main__":
    main(sys.argv[1])
