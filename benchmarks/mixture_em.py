"""The M-step of `dichroic.learning.mixture.em` against standard EM, side by side in one run.

One curve in five dimensions through a fresh 3 × 5 projection per observation, 8,192 observations; components
double from 1 to 64, with the same number of EM steps at each size for both. Held-out evidence, PSNR
of one posterior draw, and the median thickness of a component (noise: 0.01).
Run: python benchmarks/mixture_em.py [seed …]
"""

import sys
import time

import jax
import numpy as np

from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.config import MixtureConfig
from dichroic.inference.samplers import sample_posterior
from dichroic.learning.mixture.em import choose, mean_log_evidence, statistics
from dichroic.learning.mixture.initialisation import initial_gaussian, split_components
from dichroic.learning.mixture.m_step import maximise
from dichroic.metrics import psnr
from dichroic.problem.problem import joint_observations
from dichroic.runtime.tables import text_table

NAME, SIZES, STEPS = "source1", (1, 2, 4, 8, 16, 32, 64), 20


def learn(obs, *, standard: bool):
    config = MixtureConfig()
    mixture = initial_gaussian(NAME, [obs], [NAME])
    for size in SIZES:
        mixture = mixture if size == 1 else split_components(mixture, size)
        for step in range(STEPS * (3 if size == SIZES[-1] else 1)):
            if step % config.steps == 0:
                chosen = [choose({NAME: mixture}, obs, config)]
            sums = statistics({NAME: mixture}, [obs], chosen).sums[NAME]
            floor = config.floor * float(mixture.scale) ** 2
            mixture = maximise(mixture, sums, floor=floor, standard=standard)
    return mixture


def main() -> None:
    seeds = [int(s) for s in sys.argv[1:]] or [0, 1, 2]
    rows = []
    for seed in seeds:
        train = joint_observations([manifold_problem(seed=seed, sources=1).views[0]])
        view = manifold_problem(seed=seed + 1000, problem_seed=seed, sources=1, count=2048).views[0]
        test = joint_observations([view])
        for standard in (True, False):
            began = time.perf_counter()
            mixture = learn(train, standard=standard)
            seconds = time.perf_counter() - began
            x = sample_posterior({NAME: mixture}, test, jax.random.key(seed)).x[NAME][0]
            evidence = mean_log_evidence({NAME: mixture}, [test])
            values = np.linalg.eigvalsh(np.asarray(mixture.covariances(), np.float64))
            thickness = np.median(np.sqrt(values[:, :-1].mean(axis=1)))
            score = psnr(x, view.truth[NAME], data_range=4.0)
            name = "standard" if standard else "ours"
            numbers = f"{evidence:.3f}", f"{score:.2f}", f"{thickness:.4f}", f"{seconds:.1f}"
            rows.append([seed, name, *numbers])
    print(text_table(["seed", "M-step", "held-out log p", "PSNR", "thickness", "seconds"], rows))


if __name__ == "__main__":
    main()
