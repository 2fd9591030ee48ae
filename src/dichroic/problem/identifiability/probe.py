"""The directions `Q` of the sources that are looked at: all of them, or a probe."""

import math
from collections.abc import Sequence

import numpy as np

from dichroic.problem.problem import Source

UNKNOWNS = 4200  # covariance entries of all sources together up to which the map is formed in full
PROBE = 24  # directions per source beyond that, at most


def half(size: int) -> int:
    """The number of entries of a symmetric matrix: half of it, with the diagonal."""
    return size * (size + 1) // 2


def directions_of(
    sources: Sequence[Source], rng: np.random.Generator, unknowns: int = 0
) -> tuple[dict[str, np.ndarray], bool]:
    """`({source: (r, *shape) orthonormal directions}, whether they are all)`, of at most so many `unknowns`."""
    unknowns = unknowns or UNKNOWNS  # by default
    sizes = [math.prod(s.shape) for s in sources]
    exact = sum(map(half, sizes)) <= unknowns
    most = min(PROBE, math.isqrt(2 * unknowns // len(sizes)) - 1)
    by_size: dict[int, np.ndarray] = {}
    for source, size in zip(sources, sizes, strict=True):
        if size not in by_size:
            whole = exact or size <= most
            by_size[size] = np.eye(size) if whole else _probe(source.shape, max(most, 1), rng)
    named = zip(sources, sizes, strict=True)
    return {s.name: by_size[d].reshape(-1, *s.shape) for s, d in named}, exact


def _probe(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> np.ndarray:
    """`(count, D)` orthonormal directions: the entries of a patch, and random ones."""
    size = math.prod(shape)
    patch = _patch(shape, 2 * count // 3, rng)
    directions = rng.normal(size=(count, size))
    directions[: len(patch)] = 0
    directions[np.arange(len(patch)), patch] = 1
    return np.linalg.qr(directions.T)[0].T


def _patch(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> np.ndarray:
    """The flat indices of a box of at most `count` entries, as cubic as can be, somewhere."""
    sides = [1] * len(shape)
    while True:
        free = [a for a in range(len(shape)) if sides[a] < shape[a]]
        axis = min(free, key=lambda a: (sides[a], -shape[a]), default=None)
        if axis is None or math.prod(sides) // sides[axis] * (sides[axis] + 1) > max(count, 1):
            break
        sides[axis] += 1
    starts = [int(rng.integers(d - k + 1)) for d, k in zip(shape, sides, strict=True)]
    ranges = [np.arange(a, a + k) for a, k in zip(starts, sides, strict=True)]
    return np.ravel_multi_index(np.meshgrid(*ranges, indexing="ij"), shape).ravel()
