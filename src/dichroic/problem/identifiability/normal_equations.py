"""The normal matrices of the maps of means and of covariances, block by block.

    mean:        Σ_i G_i,                       G_i = (A_iβ Q)ᵀ (A_iγ Q),
    covariance:  Σ_i tr(E G_i E' G_iᵀ),         E, E' symmetric basis matrices,

for every pair of sources `β`, `γ`: averaged over the observations of a view (a sample of them),
brought to a common scale, and summed over views.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from dichroic.numerics.batching import row_counts, split, take
from dichroic.operators.noise import observed_entries
from dichroic.problem.identifiability.probe import half
from dichroic.problem.lazy_view import AnyView, some_of
from dichroic.problem.observations import Observations
from dichroic.problem.problem import Source, joint_observations

_Blocks = dict[tuple[str, str], np.ndarray]


@dataclass
class Moments:
    """The normal matrices of the two maps, and per view the sources seen and its equations."""

    sizes: dict[str, int]
    mean: np.ndarray
    covariance: np.ndarray
    equations: list[tuple[frozenset[str], int]]

    @classmethod
    def zeros(cls, sizes: dict[str, int]) -> "Moments":
        """The equations of no view; `sizes` are the numbers of directions of the sources."""
        r, p = sum(sizes.values()), sum(map(half, sizes.values()))
        return cls(sizes, np.zeros((r, r)), np.zeros((p, p)), [])

    def add_view(
        self, views: Sequence[AnyView], bases: dict[str, np.ndarray], rng: np.random.Generator
    ) -> None:
        """Add the equations of co-observed `views`, in the directions `bases` of the sources."""
        self.add(joint_observations(some_of(views)), bases, rng, views[0].count)

    def add(
        self,
        obs: Observations,
        bases: dict[str, np.ndarray],
        rng: np.random.Generator,
        total: int,
    ) -> None:
        """Add the equations of one view, scaled by the size of its operators; `obs` are some of `total`."""
        seen_sizes = {n: r for n, r in self.sizes.items() if n in obs.operators}
        patterns = _patterns(obs, sum(map(half, seen_sizes.values())), rng)
        mean, covariance = _blocks(obs, {n: bases[n] for n in seen_sizes}, patterns)
        scale = max(np.trace(mean[n, n]) / r for n, r in seen_sizes.items()) or 1.0
        halves = {n: half(r) for n, r in self.sizes.items()}
        for a, b in mean:
            _add_block(self.mean, self.sizes, a, b, mean[a, b] / scale)
            _add_block(self.covariance, halves, a, b, covariance[a, b] / scale**2)
        varies = len(patterns.seen) > 1 or bool(row_counts(obs.operators))
        entries = int(patterns.seen.sum(axis=1).max())
        count = half(entries) * (total if varies else 1)
        self.equations.append((frozenset(seen_sizes), count))

    def lacking(self, sources: Sequence[Source]) -> dict[tuple[str, ...], tuple[int, int]]:
        """`(equations, unknowns)` of sources, alone or together, with fewer equations than unknowns.

        Together are those of one view, and all. Sets that hold a smaller such set are left out.
        """
        unknowns = {s.name: half(math.prod(s.shape)) for s in sources}
        together = {frozenset(unknowns), *(seen for seen, _ in self.equations)}
        groups = [frozenset([n]) for n in unknowns] + sorted(
            together, key=lambda g: (len(g), *sorted(g))
        )
        out: dict[tuple[str, ...], tuple[int, int]] = {}
        for group in groups:
            equations = sum(count for seen, count in self.equations if seen & group)
            total = sum(unknowns[n] for n in group)
            if equations < total and not any(group >= set(smaller) for smaller in out):
                out[tuple(n for n in unknowns if n in group)] = equations, total
        return out


@dataclass(frozen=True)
class _Patterns:
    """The observations to look at: numbers `(k,)`, observed entries `(k, M)`, weights `(k,)`."""

    index: np.ndarray
    seen: np.ndarray
    weights: np.ndarray


def _blocks(
    obs: Observations, bases: dict[str, np.ndarray], patterns: _Patterns
) -> tuple[_Blocks, _Blocks]:
    """The blocks of both normal matrices for pairs of sources, averaged over observations."""
    sizes = [(name, len(basis)) for name, basis in bases.items()]
    pairs = [(a, b) for i, a in enumerate(sizes) for b in sizes[i:]]
    mean = {(a, b): np.zeros((r, s)) for (a, r), (b, s) in pairs}
    covariance = {(a, b): np.zeros((half(r), half(s))) for (a, r), (b, s) in pairs}
    for weights, columns in _columns(obs, bases, patterns):
        for a, b in mean:
            gram = np.matmul(columns[a].swapaxes(1, 2), columns[b])
            mean[a, b] += np.tensordot(weights, gram, axes=1)
            covariance[a, b] += _symmetric_square(gram, weights)
    return mean, covariance


def _add_block(
    matrix: np.ndarray, sizes: dict[str, int], a: str, b: str, block: np.ndarray
) -> None:
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
    rows, columns = (slice(ends[n] - sizes[n], ends[n]) for n in (a, b))
    matrix[rows, columns] += block
    if a != b:
        matrix[columns, rows] += block.T


def _symmetric_square(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`Σ_i w_i tr(E G_i E' G_iᵀ)` for all pairs of basis matrices; `gram` is `(n, r, s)`.

    For entries `a ≤ b` and `c ≤ d` it is `Σ_i w_i (G_ac G_bd + G_ad G_bc)`, and with `a = b` or
    `c = d` the square root of a half of that each.
    """
    _, r, s = gram.shape
    c, d = np.triu_indices(s)
    rows = []
    for a in range(r):
        x = np.tensordot(weights[:, None] * gram[:, a], gram[:, a:], axes=(0, 0))
        rows.append((x[c, :, d] + x[d, :, c]).T)
    left, right = _diagonal_factor(r), _diagonal_factor(s)
    return left[:, None] * np.concatenate(rows) * right


def _diagonal_factor(size: int) -> np.ndarray:
    a, b = np.triu_indices(size)
    return np.where(a == b, math.sqrt(0.5), 1.0)


# Observations, and what the operators make of the directions.


def _patterns(obs: Observations, unknowns: int, rng: np.random.Generator) -> _Patterns:
    """The observations to look at.

    There are at least 256 (or all), and some multiple of the unknowns as equations. Where operators
    are shared, observations with the same observed entries are taken together.
    """
    order = rng.permutation(obs.count)
    entries = _observed(obs, order[:256]).sum(axis=1).mean()
    ratio = unknowns / max(entries * (entries + 1) / 2, 1)
    index = np.sort(order[: int(np.clip(16 * ratio, 256, max(4096, 2 * ratio)))])
    seen = _observed(obs, index)
    if row_counts(obs.operators):
        seen = np.broadcast_to(seen, (len(index), obs.size))
        return _Patterns(index, seen, np.full(len(index), 1 / len(index)))
    seen, counts = np.unique(seen, axis=0, return_counts=True)
    return _Patterns(index[: len(seen)], seen, counts / counts.sum())


def _observed(obs: Observations, index: np.ndarray) -> np.ndarray:
    """`(len(index), M)`, or `(1, M)` if the noise is shared: 1 where an entry was observed."""
    return np.asarray(observed_entries(take(obs.noise, index), obs.size))


def _columns(
    obs: Observations, bases: dict[str, np.ndarray], patterns: _Patterns
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """`(weights, {source: A_i Q})` in batches of observations; `A_i Q` is `(batch, M, r)`."""
    directions = {n: jnp.asarray(basis, jnp.zeros(()).dtype) for n, basis in bases.items()}
    operators = {n: obs.operators[n] for n in bases}
    widest = max(len(basis) for basis in bases.values())
    batch = int(np.clip(2**22 // (obs.size * widest), 1, 256))
    for start in range(0, len(patterns.seen), batch):
        part = slice(start, start + batch)
        rows = take(operators, patterns.index[part])
        with jax.default_matmul_precision("highest"):
            out = _apply(rows, jnp.asarray(patterns.seen[part]), directions)
        yield patterns.weights[part], {n: np.asarray(x, np.float64) for n, x in out.items()}


@eqx.filter_jit
def _apply(operators: dict[str, Any], seen: jax.Array, directions: dict[str, jax.Array]) -> Any:
    rows, shared = split(operators)

    def one(rows: Any, seen: jax.Array) -> dict[str, jax.Array]:
        ops = eqx.combine(rows, shared)
        column = lambda op: jax.vmap(lambda x: op.mv(x).ravel(), out_axes=1)
        return {n: seen[:, None] * column(op)(directions[n]) for n, op in ops.items()}

    return jax.vmap(one)(rows, seen)
