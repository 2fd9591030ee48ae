"""Calibration and time of the posterior samplers against the analytic answer, side by side in one run.

Two Gaussian sources in five dimensions through a fresh 3 × 5 projection per observation: χ²/d of the
draws about the exact posterior (1 is ideal) and seconds per 4,096 observations after compilation.
Run: python benchmarks/estep.py
"""

import time

import jax
import numpy as np

from dichroic.inference.samplers import (
    DDIM,
    DDPM,
    AncestralSampler,
    ExactSampler,
    Heun,
    PredictorCorrector,
    sample_posterior,
)
from dichroic.operators import Dense
from dichroic.operators.noise import IsotropicNoise
from dichroic.priors import gaussian
from dichroic.problem.observations import Observations
from dichroic.runtime.tables import text_table

N, D, M, NOISE = 4096, 5, 3, 0.01


def problem(seed: int):
    rng = np.random.default_rng(seed)
    q = [np.linalg.qr(rng.normal(size=(D, D)))[0] for _ in "ab"]
    covs = [u @ np.diag([2, 1, 0.3, 1e-2, 1e-3]) @ u.T for u in q]
    a = rng.normal(size=(N, M, D))
    x = sum(rng.multivariate_normal(np.zeros(D), c, size=N) for c in covs)
    y = np.einsum("nmd,nd->nm", a, x) + NOISE * rng.normal(size=(N, M))
    denoisers = {k: gaussian(np.zeros(D), c) for k, c in zip("ab", covs, strict=True)}
    obs = Observations(y, {"a": Dense(a), "b": Dense(a)}, IsotropicNoise(NOISE))
    prior = np.block([[covs[0], np.zeros((D, D))], [np.zeros((D, D)), covs[1]]])
    both = np.concatenate([a, a], axis=-1)
    gain = prior @ both.swapaxes(1, 2)
    gain = gain @ np.linalg.inv(both @ prior @ both.swapaxes(1, 2) + NOISE**2 * np.eye(M))
    return denoisers, obs, np.einsum("nij,nj->ni", gain, y), prior - gain @ both @ prior


def main() -> None:
    rows = []
    for sampler in [
        ExactSampler(),
        *(s(n) for s in (AncestralSampler, Heun, DDPM, DDIM, PredictorCorrector) for n in (8, 64)),
    ]:
        chi2 = []
        for seed in range(3):
            denoisers, obs, mean, cov = problem(seed)
            sample_posterior(denoisers, obs, jax.random.key(seed), sampler=sampler, batch_size=N)
            began = time.perf_counter()
            x = sample_posterior(
                denoisers, obs, jax.random.key(seed + 9), sampler=sampler, batch_size=N
            ).x
            seconds = time.perf_counter() - began
            r = np.concatenate([x["a"][0], x["b"][0]], axis=-1) - mean
            chi2.append(np.mean(np.einsum("ni,nij,nj->n", r, np.linalg.inv(cov), r)) / (2 * D))
        steps = getattr(sampler, "steps", "–")
        spread = f"{np.mean(chi2):.3f} ± {np.std(chi2):.3f}"
        rows.append([type(sampler).__name__, steps, spread, f"{seconds:.2f}"])
    print(text_table(["sampler", "steps", "chi2/d, 3 seeds", "seconds"], rows))


if __name__ == "__main__":
    main()
