"""Observations that each have their own missing entries, under mixtures of probabilistic PCA, all at once.

Where operators are shared and diagonal, and noise is independent, `B_i` is diagonal for every observation. What
`dichroic.inference.low_rank` needs of observation `i` are sums over its entries `m`, with weights
`w_im = seen_im / B_im`:

    W_tᵀ B_i⁻¹ W_t = Σ_m w_im W_tm W_tmᵀ,   W_tᵀ B_i⁻¹ y_i = Σ_m w_im y_im W_tm.

For all observations these are one product of the weights `(n, M)` with the products of columns `(M, R²)`. The
small systems are solved as a batch.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dichroic.inference.low_rank import MAX_ASSIGNMENTS, moments
from dichroic.inference.matrix_free import diagonal_of, is_independent
from dichroic.numerics.batching import row_counts, split
from dichroic.operators.noise import Noise
from dichroic.priors import GaussianMixture
from dichroic.problem.observations import Observations

_ROWS = 4096  # observations at once


@dataclass(frozen=True)
class DiagonalObservations:
    """Observations `(n, M)`, 0 where missing, with independent noise, through the diagonals `gains` of operators.

    `seen` is 1 where an entry was observed, else 0; `variances` are those of the noise.
    """

    y: Float[np.ndarray, "n obs"]
    seen: Float[np.ndarray, "n obs"]
    variances: Float[np.ndarray, "n obs"]
    gains: Mapping[str, Float[np.ndarray, " obs"]]

    @classmethod
    def of(cls, obs: Observations) -> "DiagonalObservations | None":
        """`obs` as such; `None` where operators differ or are not diagonal, or noise is not independent.

        And where there are many observations, of which more share their missing entries.
        """
        if obs.count > _ROWS or not is_independent(obs.noise):
            return None
        if any(row_counts(op) for op in obs.operators.values()):
            return None
        gains = {k: diagonal_of(op) for k, op in obs.operators.items()}
        known = {k: g for k, g in gains.items() if g is not None}
        if len(known) < len(gains):
            return None
        seen, variances = (np.asarray(a, np.float64) for a in _noise_of_each(obs.noise, obs.size))
        every = lambda a: np.broadcast_to(a, (obs.count, obs.size))
        seen, variances = every(seen), every(variances)
        return cls(seen * np.asarray(obs.y, np.float64), seen, variances, known)


@eqx.filter_jit
def _noise_of_each(noise: Noise, size: int) -> tuple[Array, Array]:
    """Which entries are observed, and the variances, `(n, M)` or `(1, M)`."""
    rows, shared = split(noise)

    def one(row: Noise) -> tuple[Array, Array]:
        here = eqx.combine(row, shared)
        return here.observed(size), here.mv(jnp.ones(size))

    if jax.tree.leaves(rows):
        return jax.vmap(one)(rows)
    return jax.tree.map(lambda a: a[None], one(rows))


@dataclass(frozen=True)
class AssignmentPosterior:
    """What observations say of one assignment.

    Scores `(n,)`; and the mean `(n, R)` and covariance `(n, R, R)` of its latents `(1, z_β)_β`.
    """

    scores: Float[np.ndarray, " n"]
    latents: Float[np.ndarray, "n rank"]
    covariance: Float[np.ndarray, "n rank rank"]


class MaskedView:
    """The joint assignments of components of the sources of `DiagonalObservations`."""

    def __init__(self, mixtures: Mapping[str, GaussianMixture], data: DiagonalObservations):
        self.data, self.names = data, list(data.gains)
        found = {k: moments(mixtures[k]) for k in self.names}
        self.sources = {k: columns for k, (columns, _) in found.items()}  # (K, D, 1 + R)
        self.floors = {k: floor for k, (_, floor) in found.items()}
        squares = {k: (data.seen * g) ** 2 for k, g in data.gains.items()}
        b = data.variances + sum(self.floors[k] * s for k, s in squares.items())
        self.logdet = np.log(b).sum(axis=1)
        self.weights = data.seen / b
        self.weighted = self.weights * data.y
        self.square = np.sum(self.weighted * data.y, axis=1)
        counts = [len(c) for c in self.sources.values()]
        self.assignments = np.indices(counts).reshape(len(counts), math.prod(counts)).T
        logs = [np.asarray(mixtures[k].log_weights, np.float64) for k in self.names]
        pairs = zip(logs, self.assignments.T, strict=True)
        self.log_weights = sum((w[c] for w, c in pairs), np.zeros(len(self.assignments)))
        ends = np.cumsum([0, *(c.shape[2] for c in self.sources.values())])
        spans = itertools.pairwise(map(int, ends))
        self.spans = {k: slice(*span) for k, span in zip(self.names, spans, strict=True)}
        self.ones = np.isin(np.arange(ends[-1]), ends[:-1])

    @cached_property
    def columns(self) -> dict[str, Float[np.ndarray, "k obs rank"]]:
        """`A` times the columns of each component."""
        return {k: g[:, None] * self.sources[k] for k, g in self.data.gains.items()}

    def of_assignment(self, t: int) -> Float[np.ndarray, "obs rank"]:
        """The columns `W_t`, means among them."""
        index = zip(self.names, self.assignments[t], strict=True)
        return np.concatenate([self.columns[k][i] for k, i in index], axis=1)

    def posterior(self, t: int, rows: np.ndarray) -> AssignmentPosterior:
        """What the observations `rows` say of the assignment `t`."""
        columns, ones = self.of_assignment(t), self.ones
        gram = weighted_gram(self.weights[rows], columns)
        shift = gram[:, :, ones].sum(axis=2)
        along = self.weighted[rows] @ columns
        mean = along[:, ones].sum(axis=1)
        along = along - shift
        inside = gram[:, ~ones][:, :, ~ones] + np.eye(int((~ones).sum()))
        covariance = np.zeros(gram.shape)
        covariance[np.ix_(np.arange(len(gram)), ~ones, ~ones)] = np.linalg.inv(inside)
        latents = np.einsum("nc,ncd->nd", along, covariance)
        fit = np.sum(along * latents, axis=1)
        latents[:, ones] = 1
        volume = np.linalg.slogdet(inside)[1] + self.logdet[rows]
        square = self.square[rows] - 2 * mean + shift[:, ones].sum(axis=1) - fit
        constant = self.log_weights[t] - 0.5 * columns.shape[0] * np.log(2 * np.pi)
        return AssignmentPosterior(constant - 0.5 * (volume + square), latents, covariance)

    def scores(self, near: np.ndarray) -> Float[np.ndarray, "n T"]:
        """Log of weight × likelihood of assignments that each observation is `near` `(T, n)`; −∞ of others."""
        out = np.full((len(self.data.y), len(self.assignments)), -np.inf)
        for t in np.flatnonzero(near.any(axis=1)).tolist():
            out[near[t], t] = self.posterior(t, near[t]).scores
        return out


def weighted_gram(
    weights: Float[np.ndarray, "n obs"], columns: Float[np.ndarray, "obs rank"]
) -> Float[np.ndarray, "n rank rank"]:
    """`Σ_m w_im W_m W_mᵀ` of each observation."""
    size, rank = columns.shape
    pairs = (columns[:, :, None] * columns[:, None, :]).reshape(size, rank * rank)
    return (weights @ pairs).reshape(-1, rank, rank)


def has_masked_view(mixtures: Mapping[str, GaussianMixture], names: tuple[str, ...]) -> bool:
    """Whether `MaskedView` is for these mixtures: none is stationary, and joint assignments are few enough."""
    own = [mixtures[k] for k in names]
    few = math.prod(m.log_weights.size for m in own) <= MAX_ASSIGNMENTS
    return few and not any(m.stationary for m in own)
