"""Throughput of the parts of a fit on any number of devices of one process, and in any number of processes.

    python benchmarks/layouts.py [--layouts 1x1,1x2,1x4,1x8,2x1,4x1] [--count 16384]

`PxD` is P processes with D devices each. Devices of a CPU are virtual and share its cores, as processes of one
machine do: such a table says what sharing work costs, and only with cores (or GPUs) for all of them what it gains.
Two sources of five entries seen through three, operators of each observation, 16 components, and a network.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from dichroic.config import DiffusionConfig, FitConfig, MixtureConfig
from dichroic.learning.diffusion.e_step import expectation
from dichroic.learning.diffusion.score_matching import train_denoiser
from dichroic.learning.mixture.em import em_iteration
from dichroic.operators import Dense
from dichroic.operators.noise import IsotropicNoise
from dichroic.priors import DiffusionPrior, GaussianMixture
from dichroic.priors.networks import Mlp
from dichroic.problem.batches import shared_by_processes
from dichroic.problem.observations import Observations
from dichroic.runtime import distributed
from dichroic.runtime.tables import text_table

D, M, K, STEPS, TRAINED = 5, 3, 16, 4, 400
REPEATS = 3


def prior(seed: int) -> GaussianMixture:
    rng = np.random.default_rng(seed)
    factor = 0.3 * rng.normal(size=(K, D, D))
    covariances = factor @ factor.swapaxes(1, 2) + 0.01 * np.eye(D)
    return GaussianMixture.from_moments(np.ones(K), rng.normal(size=(K, D)), covariances)


def best(work: Callable[[], object]) -> float:
    """The least seconds of a few, after compilation."""
    work()
    took = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def measure(count: int) -> dict[str, float]:
    """Observations, draws and training steps a second, of all processes."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(count, M, D))
    obs = Observations(
        rng.normal(size=(count, M)), {k: Dense(a) for k in "ab"}, IsotropicNoise(0.1)
    )
    views, config, key = shared_by_processes([obs]), FitConfig(), jax.random.key(1)
    mixtures = {"a": prior(1), "b": prior(2)}
    network = Mlp((D,), 64, 2, key=jax.random.key(2))
    corrected = {k: DiffusionPrior(m, network) for k, m in mixtures.items()}
    em = MixtureConfig(steps=STEPS)
    draws = lambda known: expectation(known, views, ["v"], key, config, 1)
    samples = draws(mixtures)["a"][0]
    training = {"config": DiffusionConfig(steps=TRAINED), "sigma_min": config.sampler.sigma_min}
    return {
        "EM": count * STEPS / best(lambda: em_iteration(mixtures, views, ["a", "b"], em)),
        "draws": count / best(lambda: draws(mixtures)),
        "network": count / best(lambda: draws(corrected)),
        "steps": TRAINED / best(lambda: train_denoiser(corrected["a"], samples, key, **training)),
    }


def run(processes: int, devices: int, count: int) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {distributed.ADDRESS: f"127.0.0.1:{port}", distributed.PROCESSES: str(processes)}
    told["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, "--worker", "--count", str(count)]
    workers = [
        subprocess.Popen(
            command,
            env={**os.environ, **told, distributed.NUMBER: str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for i in range(processes)
    ]
    said = [w.communicate()[0] for w in workers]
    if any(w.returncode for w in workers):
        raise SystemExit(f"{processes} × {devices} failed")
    return json.loads(said[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", default="1x1,1x2,1x4,1x8,2x1,4x1")
    parser.add_argument("--count", type=int, default=16384)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        distributed.initialize()
        found = measure(args.count)
        print(json.dumps(found))
        return
    rows = []
    for name in args.layouts.split(","):
        processes, devices = map(int, name.split("x"))
        found = run(processes, devices, args.count)
        rows.append([processes, devices, *(f"{found[k]:,.0f}" for k in found)])
    header = ["processes", "devices of each", "EM, observations/s", "exact draws/s"]
    print(text_table([*header, "draws with networks/s", "training steps/s"], rows))


if __name__ == "__main__":
    main()
