"""What `test_bits` draws, on one device and on eight: with networks whose last layer is not zero."""

import sys

import equinox as eqx
import jax
import numpy as np

from dichroic.config import FitConfig
from dichroic.operators import Dense, Identity
from dichroic.priors import DiffusionPrior, GaussianMixture
from dichroic.priors.networks import Mlp
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View
from dichroic.separation.separator import Separator

N = 140


def mixture(shape, rank, seed=0):
    """Two Gaussians."""
    size = int(np.prod(shape))
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(2, size, 3))
    covariances = factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(size)
    return GaussianMixture.from_moments(
        [0.4, 0.6], rng.normal(size=(2, *shape)), covariances, rank=rank
    )


def corrected(base, network):
    """`base`, corrected by all weights of `network` moved at random."""
    arrays, rest = eqx.partition(network, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        a + 0.1 * jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)
    ]
    network = eqx.combine(jax.tree.unflatten(structure, moved), rest)
    return DiffusionPrior(base, network, covariance="base")


def separator_of(view, priors, batch_size=1024):
    """Known priors in place of learned ones."""
    config = FitConfig.from_dict({"sampler": {"steps": 4}, "batch_size": batch_size})
    separator = Separator(Problem([Source(k, p.shape) for k, p in priors.items()], [view]), config)
    separator.denoisers = priors
    return separator


def few(batch_size=1024):
    """`(separator, view)` of sources of four entries, through operators of each observation.

    One has a narrow network, the other a wide one: both are one program, which takes some seconds to compile.
    """
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, N, 3, 4))
    view = View(rng.normal(size=(N, 3)), {"a": Dense(a), "b": Dense(b)}, 0.1)
    narrow, wide = Mlp((4,), 32, 2, key=jax.random.key(0)), Mlp((4,), 128, 1, key=jax.random.key(0))
    priors = {"a": corrected(mixture((4,), 4), narrow), "b": corrected(mixture((4,), 4, 1), wide)}
    return separator_of(view, priors, batch_size), view


def many(network):
    """`(separator, view)` of a source of the shape of `network`, of low rank."""
    y = np.random.default_rng(3).normal(size=(N, *network.shape))
    view = View(y, {"a": Identity(network.shape)}, 0.1)
    return separator_of(view, {"a": corrected(mixture(network.shape, 3), network)}), view


def drawn(separation):
    """All that is drawn, by name."""
    return {"chi2": separation.chi2, **separation.draws}


def main(out: str) -> None:
    """Draws of low-dimensional sources, into a file."""
    separator, view = few()
    found = drawn(separator.separate(view, n_draws=2))
    np.savez(out, devices=jax.device_count(), **found)


if __name__ == "__main__":
    main(sys.argv[1])
