"""Rates of a U-Net on this machine's device: training steps and evaluations, and the seconds to compile each.

Run: python benchmarks/unets.py [--side 28] [--channels 32,64] [--precisions float32,bfloat16] [--batch 256]
     [--steps 100]   (on two cores without a GPU: --side 14 --channels 16 --steps 20, two minutes)
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from dichroic import FitConfig
from dichroic.learning.diffusion.score_matching import train_denoiser, with_network
from dichroic.learning.mixture.low_rank_em import from_columns
from dichroic.priors.diffusion import NETWORK_BATCH, corrections
from dichroic.runtime.tables import text_table

COUNT, RANK = 4096, 32  # of samples, and of the mixture that the network corrects


def seconds(work) -> float:
    """How long `work` takes, device included."""
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def measure(side: int, channels: int, precision: str, batch: int, steps: int) -> list[str]:
    """One line of the table."""
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(1, side**2, 1 + RANK)) / RANK
    base = from_columns(np.ones(1), columns, 0.1, (side, side))
    sizes = {"channels": channels, "precision": precision, "batch_size": batch, "steps": steps}
    config = FitConfig.from_dict({"diffusion": sizes | {"network": "unet"}})
    denoiser = with_network(base, jax.random.key(0), config)
    weights = sum(a.size for a in jax.tree.leaves(eqx.filter(denoiser.network, eqx.is_array)))
    samples = rng.normal(size=(COUNT, side, side)).astype(np.float32)
    options = {"config": config.diffusion, "sigma_min": 1e-3}
    train = lambda: train_denoiser(denoiser, samples, jax.random.key(1), **options)[0].network
    first, again = (seconds(lambda: eqx.filter(train(), eqx.is_array)) for _ in range(2))
    rows = jnp.zeros((NETWORK_BATCH, side, side)), jnp.full(NETWORK_BATCH, 0.1)
    compiled = seconds(lambda: corrections(denoiser, *rows))
    draws = seconds(lambda: [corrections(denoiser, *rows) for _ in range(steps)])
    return [
        str(channels),
        precision,
        f"{weights / 1e6:.2f}",
        f"{first - again:.0f}",
        f"{steps / again:.1f}",
        f"{compiled:.0f}",
        f"{NETWORK_BATCH * steps / draws:,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--channels", default="32,64")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    table = [
        measure(args.side, int(channels), precision, args.batch, args.steps)
        for channels in args.channels.split(",")
        for precision in args.precisions.split(",")
    ]
    device = jax.devices()[0].device_kind
    print(f"{args.side} × {args.side} numbers, batches of {args.batch}, {device}\n")
    header = ["channels", "precision", "10⁶ weights", "compile, s", "training steps/s"]
    print(text_table([*header, "compile, s", "evaluations/s"], table))


if __name__ == "__main__":
    main()
