"""EM steps behind stationary sources, over all assignments of components and over those that are likely.

Images of a field whose contrast varies tenfold, as a mixture of stationary Gaussians, and of one of several kinds
of low rank, in one view with noise of 0.05: `--backgrounds` × `--components` assignments. Seconds of a step, how
many assignments it looks at for each observation, and the largest difference of a sum, relative to the largest
such sum.

Run: python benchmarks/likely_assignments.py [--side 28] [--backgrounds 8] [--components 8]
         [--rank 64] [--count 8000]
"""

import argparse
import time

import jax
import numpy as np

from dichroic import View
from dichroic.inference.low_rank_background import every_assignment
from dichroic.inference.samplers import sample_prior
from dichroic.learning.mixture.low_rank_em import from_columns, low_rank_statistics
from dichroic.operators import Identity
from dichroic.priors import GaussianMixture
from dichroic.runtime.tables import text_table

NOISE, LENGTH, CONTRASTS = 0.05, 4.0, (0.2, 2.0)


def sources(rng: np.random.Generator, args: argparse.Namespace) -> dict[str, GaussianMixture]:
    """A field of correlation `exp(−(|Δ₁| + |Δ₂|) / ℓ)` with several contrasts, and kinds of low rank."""
    shape = (args.side, args.side)
    lags = np.abs(np.subtract.outer(np.arange(args.side), np.arange(args.side)))
    one = np.exp(-lags / LENGTH)
    contrasts = np.geomspace(*CONTRASTS, args.backgrounds)
    covs = contrasts[:, None, None] ** 2 * np.kron(one, one)
    means = np.zeros((args.backgrounds, *shape))
    field = GaussianMixture.from_moments(
        np.ones(args.backgrounds), means, covs, shape=shape, stationary=len(shape)
    )
    columns = rng.normal(size=(args.components, args.side**2, 1 + args.rank)) / np.sqrt(args.rank)
    kinds = from_columns(np.ones(args.components), columns, 1e-3, shape)
    return {"field": field, "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("side", 28), ("backgrounds", 8), ("components", 8), ("rank", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--count", type=int, default=8000)
    args = parser.parse_args()
    mixtures = sources(np.random.default_rng(0), args)
    draw = lambda m, i: sample_prior(m, args.count, jax.random.key(i), batch_size=128)
    x = {k: draw(m, i) for i, (k, m) in enumerate(mixtures.items())}
    y = sum(x.values()) + NOISE * np.random.default_rng(1).normal(size=x["field"].shape)
    obs = View(y, {k: Identity(m.shape) for k, m in mixtures.items()}, NOISE).prepare()
    near = every_assignment(mixtures, obs, 2**30)
    assert near is not None
    low_rank_statistics(mixtures, obs, near=near)  # which also compiles
    rows, found = [], {}
    for name, which in (("all assignments", None), ("likely assignments", near)):
        began = time.perf_counter()
        _, found[name] = low_rank_statistics(mixtures, obs, near=which)
        seconds = time.perf_counter() - began
        number = near.sum() / args.count if which is near else near[:, :, 0].size
        rows.append([name, f"{seconds:.2f}", f"{number:.1f}"])
    pairs = zip(*map(jax.tree.leaves, found.values()), strict=True)
    most = max(np.max(np.abs(a - b)) / np.max(np.abs(a)) for a, b in pairs)
    print(text_table(["a step over", "seconds", "assignments"], rows))
    print(f"\nlargest difference: {most:.1e}")


if __name__ == "__main__":
    main()
