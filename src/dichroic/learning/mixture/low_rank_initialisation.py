"""The first prior of a source of low rank, from the moments of what views show of it."""

import math
from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dichroic.inference.low_rank import moments
from dichroic.inference.matrix_free import Columns, diagonal_of, products
from dichroic.inference.posterior import EXACT_LIMIT
from dichroic.learning.mixture.low_rank_em import from_columns
from dichroic.numerics.batching import split
from dichroic.operators.noise import Noise
from dichroic.priors import GaussianMixture
from dichroic.problem.batches import AnyObservations
from dichroic.problem.observations import Observations, is_shared

_SAMPLE = 4000  # observations that a first basis is computed from
_OPERATORS = 16  # of different ones, that a first covariance is computed from
_PROBES = 16  # random vectors that a trace is estimated with
_PRODUCTS, _EXTRA = 6, 8  # blocks of a Krylov space, and vectors of each beyond those wanted


def initial_low_rank(
    name: str,
    views: Sequence[AnyObservations],
    rank: int,
    variance: float,
    known: Mapping[str, GaussianMixture],
    share: int,
) -> GaussianMixture:
    """One component, from the moments that the views leave to the source.

    With back-projections `Aᵀ y`, divided by what the observations see of each entry: their mean and covariance,
    less those of noise and of the sources `known`; a `share`-th of that where several sources are new. `variance`
    is that of an entry where nothing is left.
    """
    parts = [_Moments(name, obs, known) for obs in views if name in obs.sources]
    counts = np.array([p.count for p in parts], float)
    weights = counts / counts.sum()
    shape = parts[0].operator.in_shape
    d = math.prod(shape)

    def product(v: np.ndarray) -> np.ndarray:
        total = np.zeros_like(v)
        for w, p in zip(weights, parts, strict=True):
            total = total + w * p.product(v)
        return total / share

    values, vectors = largest_eigenpairs(product, d, min(rank, d - 1))
    values = np.maximum(values, 1e-6 * max(values.max(), 1e-3 * variance))
    probes = np.random.default_rng(1).normal(size=(d, _PROBES))
    trace = np.sum(probes * product(probes)) / _PROBES
    floor = max((trace - values.sum()) / (d - len(values)), 1e-3 * values.mean())
    columns = np.zeros((1, d, 1 + len(values)))
    columns[0, :, 0] = sum(w * p.mean for w, p in zip(weights, parts, strict=True)) / share
    columns[0, :, 1:] = vectors * np.sqrt(values)
    return from_columns(np.ones(1), columns, floor, shape)


def largest_eigenpairs(product: Columns, d: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The `rank` largest eigenvalues of a symmetric `d × d` matrix, which may be indefinite, and their vectors.

    By a block Krylov space of a few products (Musco and Musco, NeurIPS 2015); exact where that is the whole.
    """
    blocks = [np.random.default_rng(0).normal(size=(d, min(rank + _EXTRA, d)))]
    for _ in range(_PRODUCTS - 1):
        blocks.append(np.linalg.qr(product(blocks[-1]))[0])
    q, _ = np.linalg.qr(np.concatenate(blocks, axis=1))
    inside = q.T @ product(q)
    values, vectors = np.linalg.eigh(0.5 * (inside + inside.T))
    top = slice(-1, -rank - 1, -1)
    return values[top], q @ vectors[:, top]


class _Moments:
    """The mean of a source as seen in one view, and products with its covariance, less what is known of it.

    Where operators differ from one observation to another, what is known is a mean over some of them. An entry
    that is missing says nothing: sums are divided by what is seen of each entry, and the mean is taken off before.
    """

    def __init__(self, name: str, obs: AnyObservations, known: Mapping[str, GaussianMixture]):
        some = obs.some(_SAMPLE)
        self.count, self.operator = obs.count, some.one(0).operators[name]
        few = 1 if is_shared(some) else min(some.count, _OPERATORS)
        apart = -(-some.count // few)
        self.known = [_Known(name, some.one(i), known) for i in range(0, some.count, apart)]
        of_mean, self.gain = _gains(some, name)
        others = {k: jnp.asarray(known[k].location) for k in obs.sources if k in known}
        seen = np.asarray(_back_projected(some, name, others), np.float64)
        self.mean = seen.mean(axis=0) / of_mean
        others[name] = jnp.asarray(self.mean.reshape(self.operator.in_shape), some.y.dtype)
        self.sample = np.asarray(_back_projected(some, name, others), np.float64) / self.gain

    def product(self, v: np.ndarray) -> np.ndarray:
        """The covariance of the source, as far as it is left, times the columns `v` `(D, n)`."""
        scaled = v / self.gain[:, None]
        known = np.mean([k.product(scaled) for k in self.known], axis=0) / self.gain[:, None]
        return self.sample.T @ (self.sample @ v) / len(self.sample) - known


def _gains(obs: Observations, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What `Aᵀ y` is divided by, entry by entry `(D,)`, to have the mean and the variance of the source.

    For diagonal operators `E a²` and `√(E a⁴)` of their entries, 0 where missing; else the mean square gain.
    """
    rows, shared = split(obs)
    if diagonal_of(obs.one(0).operators[name]) is None:
        gain = np.full(obs.dims[name], mean_gain(obs, name) / obs.dims[name])
        return gain, gain

    def powers(row: Observations) -> tuple[Array, Array]:
        one = eqx.combine(row, shared)
        op = one.operators[name]
        square = (one.noise.observed(one.size) * op.mv(jnp.ones(op.in_shape)).ravel()) ** 2
        return square, square**2

    second, fourth = jax.tree.map(lambda a: np.asarray(a, np.float64), jax.vmap(powers)(rows))
    second, fourth = second.mean(axis=0), np.sqrt(fourth.mean(axis=0))
    never = second <= 0
    return np.where(never, 1, second), np.where(never, 1, fourth)


@eqx.filter_jit
def _back_projected(obs: Observations, name: str, others: dict[str, Array]) -> Array:
    """`Aᵀ (y − Σ A_β μ_β)` of each observation, `(n, D)`, for the means of `others`."""
    rows, shared = split(obs)

    def one(row: Observations) -> Array:
        o = eqx.combine(row, shared)
        rest = {k: others.get(k, jnp.zeros(op.in_shape)) for k, op in o.operators.items()}
        return o.adjoint(o.y - o.apply(rest))[name].ravel()

    return jax.vmap(one)(rows)


def mean_gain(obs: Observations, name: str) -> float:
    """`tr(A Aᵀ)`, the mean over observations; for large ones from random vectors."""
    rows, shared = split(obs)

    def norm(r: Observations) -> Array:
        one = eqx.combine(r, shared)
        if max(one.size, one.dims[name]) <= EXACT_LIMIT:
            return jnp.sum(one.system()[1][name] ** 2)
        probes = jax.random.normal(jax.random.key(0), (_PROBES, one.size))
        return jnp.sum(jax.vmap(lambda v: one.adjoint(v)[name])(probes) ** 2) / _PROBES

    return float(jnp.mean(jax.vmap(norm)(rows)))


class _Known:
    """What is known of `Aᵀ y` of one observation: the covariance of its noise and of known sources."""

    def __init__(self, name: str, one: Observations, known: Mapping[str, GaussianMixture]):
        self.noise, self.sources = one.noise, []
        seen = np.asarray(one.noise.observed(one.size), np.float64)
        of = lambda op: products(op, seen, diagonal_of(op))
        self.forward, self.back = of(one.operators[name])
        for other in set(one.sources) & set(known) - {name}:
            columns, floor = moments(known[other])
            weights = np.exp(np.asarray(known[other].log_weights))
            columns[:, :, 0] -= np.einsum("k,kd->d", weights, columns[:, :, 0])
            self.sources.append((*of(one.operators[other]), columns, floor, weights))

    def product(self, v: np.ndarray) -> np.ndarray:
        """The covariance of `Aᵀ y`, as far as it is known, times `A v`, for columns `v` `(D, n)`."""
        u = self.forward(v)
        other = np.asarray(_noise_columns(self.noise, jnp.asarray(u, jnp.float32)), np.float64)
        for forward, back, columns, floor, weights in self.sources:
            w = back(u)
            inside = np.einsum("kdr,dn,k->krn", columns, w, weights, optimize=True)
            spread = np.einsum("kdr,krn->dn", columns, inside, optimize=True) + floor * w
            other = other + forward(spread)
        return self.back(other)


@eqx.filter_jit
def _noise_columns(noise: Noise, columns: Array) -> Array:
    """`Σ` times columns `(M, n)`."""
    return jax.vmap(noise.mv, in_axes=1, out_axes=1)(columns)
