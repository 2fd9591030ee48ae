"""Operators as products with columns of numbers, in float64; what observations that share them have in common."""

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dichroic.numerics.batching import row_counts
from dichroic.operators import Diagonal, Identity, Operator, Scale
from dichroic.operators.noise import DiagonalNoise, IsotropicNoise, Masked, Noise
from dichroic.operators.structure import factors
from dichroic.priors import GaussianMixture
from dichroic.problem.observations import Observations, groups

Columns = Callable[[np.ndarray], np.ndarray]
_LEAST_SCALE = 1e-6  # of an entry, relative to the largest


class Seen:
    """The operator of one source, `A`, and products with it that do not depend on what is missing."""

    def __init__(self, op: Operator):
        self.op, self.gain = op, diagonal_of(op)
        self._columns: tuple[Any, np.ndarray] | None = None

    def forget(self) -> None:
        """Let go of the columns that are kept."""
        self._columns = None

    def columns(self, mixture: GaussianMixture, flat: np.ndarray) -> np.ndarray:
        """`A` times the columns `flat` of the prior `mixture`; of the first one, they are kept."""
        if self._columns is not None and self._columns[0] is mixture:
            return self._columns[1]
        found = products(self.op, np.ones(math.prod(self.op.out_shape)), self.gain)[0](flat)
        self._columns = self._columns or (mixture, found)
        return found

    @cached_property
    def scale(self) -> np.ndarray:
        """What `A` multiplies each entry of the source by before anything else, `(D,)`: 1 for most operators."""
        scale = np.ones(math.prod(self.op.in_shape))
        for factor in reversed(factors(self.op)):
            if not isinstance(factor, Diagonal):
                break
            scale = scale * np.abs(np.asarray(factor.diagonal, np.float64)).ravel()
        return np.maximum(scale, _LEAST_SCALE * scale.max(initial=0) or 1.0)

    @cached_property
    def square(self) -> np.ndarray:
        """`A Aᵀ`, `(M, M)`."""
        size = math.prod(self.op.out_shape)
        forward, back = products(self.op, np.ones(size), self.gain)
        return forward(back(np.eye(size)))


class OperatorCache:
    """Operators that all observations share, whatever is missing of each of them."""

    def __init__(self) -> None:
        self._found: dict[str, Seen] = {}

    def operator(self, name: str, of_all: Operator, of_one: Operator) -> Seen:
        """The operator of the source `name`, given as it is for all of some observations and for one."""
        if row_counts(of_all):
            return Seen(of_one)
        if name not in self._found:
            self._found[name] = Seen(of_one)
        return self._found[name]

    def forget(self) -> None:
        """Let go of products with the columns of priors: there are new ones."""
        for operator in self._found.values():
            operator.forget()


class SharedObservations:
    """Observations with the same operators, noise and missing entries, and what follows from these.

    That is worked out once: of few observations each, it costs more than what depends on the priors.
    """

    def __init__(self, obs: Observations, operators: OperatorCache | None = None):
        """`operators` are those that other observations share with these."""
        self.obs, self._cache = obs, operators or OperatorCache()
        self.count, self.size, self.sources = obs.count, obs.size, obs.sources
        self._operators: dict[str, Seen] = {}

    @cached_property
    def one(self) -> Observations:
        """The first of them."""
        return self.obs.one(0)

    @cached_property
    def seen(self) -> Float[np.ndarray, " obs"]:
        """1 for the entries that are not missing, else 0."""
        return np.asarray(self.one.noise.observed(self.size), np.float64)

    @cached_property
    def noise_variances(self) -> Float[np.ndarray, " obs"] | None:
        """The variances of the noise, if its kind says that it is independent."""
        return _diagonal_of_noise(self.one.noise, self.size)

    @cached_property
    def noise_covariance(self) -> Float[np.ndarray, "obs obs"]:
        """The covariance of the noise."""
        if self.noise_variances is not None:
            return np.diag(self.noise_variances)
        return np.asarray(self.one.noise.as_matrix(self.size), np.float64)

    def operator(self, name: str) -> Seen:
        """The operator of the source `name`."""
        if name not in self._operators:
            of_all, of_one = self.obs.operators[name], self.one.operators[name]
            self._operators[name] = self._cache.operator(name, of_all, of_one)
        return self._operators[name]

    def rows(self, index: slice) -> Float[np.ndarray, "n obs"]:
        """Some of the observations, 0 where missing."""
        return self.seen * np.asarray(self.obs.y[index], np.float64)


def shared_groups(
    obs: Observations, operators: OperatorCache | None = None
) -> Iterator[tuple[np.ndarray, SharedObservations]]:
    """The observations that share everything, and their numbers among all of `obs`."""
    operators = operators or OperatorCache()
    for index, some in groups(obs):
        yield index, SharedObservations(some, operators)


def products(op: Operator, seen: np.ndarray, gain: np.ndarray | None) -> tuple[Columns, Columns]:
    """Products with `A` and with `Aᵀ` of columns, `(D, n)` to `(M, n)` and back; rows not `seen` are 0.

    `gain` is `diagonal_of(op)`.
    """
    if gain is not None:
        both = lambda columns: (seen * gain)[:, None] * columns
        return both, both
    dtype = jnp.zeros(()).dtype

    def forward(columns: np.ndarray) -> np.ndarray:
        v = jnp.asarray(columns.T, dtype).reshape(-1, *op.in_shape)
        return seen[:, None] * np.asarray(_apply_rows(op, v), np.float64).T

    def back(columns: np.ndarray) -> np.ndarray:
        v = jnp.asarray((seen[:, None] * columns).T, dtype).reshape(-1, *op.out_shape)
        return np.asarray(_adjoint_rows(op, v), np.float64).T

    return forward, back


@eqx.filter_jit
def _apply_rows(op: Operator, x: jax.Array) -> jax.Array:
    """`A x` of the rows `(n, *in_shape)`, `(n, M)`."""
    return jax.vmap(lambda u: op.mv(u).ravel())(x)


@eqx.filter_jit
def _adjoint_rows(op: Operator, y: jax.Array) -> jax.Array:
    """`Aᵀ y` of the rows `(n, *out_shape)`, `(n, D)`."""
    return jax.vmap(lambda u: op.rmv(u).ravel())(y)


def diagonal_of(op: Operator) -> np.ndarray | None:
    """The diagonal of `op`, flattened, if its kind says that it has no other entries."""
    if not all(isinstance(p, (Identity, Scale, Diagonal)) for p in factors(op)):
        return None
    return np.asarray(op.mv(jnp.ones(op.in_shape)), np.float64).ravel()


def is_independent(noise: Noise) -> bool:
    """Whether the kind of `noise` says that it is independent from entry to entry."""
    while isinstance(noise, Masked):
        noise = noise.noise
    return isinstance(noise, (IsotropicNoise, DiagonalNoise))


def _diagonal_of_noise(noise: Noise, size: int) -> np.ndarray | None:
    """The variances of `noise`, if its kind says that it is independent."""
    if not is_independent(noise):
        return None
    return np.asarray(noise.mv(jnp.ones(size)), np.float64)
