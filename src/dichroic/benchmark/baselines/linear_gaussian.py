"""Gaussian sources seen by linear views: the exact evidence and its gradient, in float64.

With `x_β = μ_β + W_β z_β`, `z_β ~ N(0, I)`, a view says of them

    y_i ~ N(Σ_β A_β μ_β, C_i),   C_i = s Σ_i + Σ_β A_β W_β W_βᵀ A_βᵀ   (s = 1, or the noise is fitted too).

All is whitened first (`y ← Σ^{-½} y`, `A ← Σ^{-½} A`), so that `C = s I + B Bᵀ`, `B = (A_1 W_1 … A_S W_S)`.
With `P = C⁻¹` and `v = P (y − Σ_β A_β μ_β)`, the gradient of `log p` is

    ∂/∂μ_β = Σ_i A_βᵀ v,   ∂/∂W_β = Σ_i A_βᵀ (v vᵀ − P) A_β W_β,   ∂/∂s = ½ Σ_i (vᵀ v − tr P).

`P` is applied through the smaller of `C` and `s I + Bᵀ B`. A missing entry is a row of zeros, whose share of
`log det C` and `tr P` is taken out. Where operators, noise and missing entries are shared, observations
enter by their number, mean and covariance alone, so the cost does not depend on how many there are.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np

from dichroic.numerics.batching import split, take
from dichroic.problem.observations import Observations, is_shared

Arrays = dict[str, np.ndarray]
_CACHE_BYTES = 2**28
_CHUNK_BYTES = 2**26
_SEARCH_COUNT = 2048


@dataclass(frozen=True)
class Slopes:
    """`log p` of all observations, and its gradient in means `(D,)`, factors `(D, r)` and `s`."""

    value: float
    means: Arrays
    factors: Arrays
    noise: float

    def plus(self, other: "Slopes", weight: float = 1.0) -> "Slopes":
        """`self + weight · other`; a source that one of them lacks counts as zero there."""
        merge = lambda a, b: {k: a.get(k, 0) + weight * b.get(k, 0) for k in {**a, **b}}
        return Slopes(
            self.value + weight * other.value,
            merge(self.means, other.means),
            merge(self.factors, other.factors),
            self.noise + weight * other.noise,
        )


class Curvature(NamedTuple):
    """`S = Σ_i u uᵀ`, `u = A_βᵀ v`, and `J = Σ_i A_βᵀ P A_β` of one source, both `(D, D)`."""

    scatter: np.ndarray
    information: np.ndarray


class Normal(NamedTuple):
    """Least squares for the means: `Σ AᵀA` and `Σ Aᵀy` over the sources side by side, `Σ ‖y‖²`."""

    matrix: np.ndarray
    vector: np.ndarray
    power: float


class White(NamedTuple):
    """Whitened observations: `y (n, M)`, `{β: A (n, M, D)}`, entries seen and `log det Σ`, both `(n,)`."""

    y: np.ndarray
    matrices: Arrays
    seen: np.ndarray
    logdet: np.ndarray

    def residual(self, means: Mapping[str, np.ndarray]) -> np.ndarray:
        """`y − Σ_β A_β μ_β`, `(n, M)`."""
        return self.y - sum(_times(a, means[k][:, None])[..., 0] for k, a in self.matrices.items())

    def project(self, factors: Mapping[str, np.ndarray]) -> Arrays:
        """`{β: A_β W_β}`, `(n, M, r)`."""
        return {k: _times(a, factors[k]) for k, a in self.matrices.items()}


class Inverse:
    """`P = (s I + B Bᵀ)⁻¹` for every `(M, R)` matrix of `B` `(n, M, R)`."""

    def __init__(self, projected: Mapping[str, np.ndarray], s: float):
        b = np.concatenate(list(projected.values()), axis=2)
        m, r = b.shape[1:]
        self._b, self._s, self._small, rest = b, s, r < m, max(m - r, 0)
        gram = (_t(b) @ b if r < m else b @ _t(b)) + s * np.eye(min(m, r))
        self._inverse = np.linalg.inv(gram)
        self.logdet = _logdet(np.linalg.cholesky(gram)) + rest * math.log(s)
        self.trace = np.trace(self._inverse, axis1=1, axis2=2) + rest / s

    def apply(self, x: np.ndarray) -> np.ndarray:
        """`P x`, `(n, M, k)`."""
        if not self._small:
            return self._inverse @ x
        return (x - self._b @ (self._inverse @ (_t(self._b) @ x))) / self._s

    def pull(self, covariance: np.ndarray) -> tuple[float, float, np.ndarray]:
        """`tr P S`, `tr P S P` and `(P S P − P) B`, where there is one `B`, of `S = covariance`.

        With `P B = B (s I + BᵀB)⁻¹`, the costs of a narrow `B` are those of `S B`.
        """
        b, inner = self._b[0], self._inverse[0]
        if not self._small:
            inside = inner @ covariance
            both = inside @ inner
            return float(np.trace(inside)), float(np.trace(both)), (both - inner) @ b
        sb, pb = covariance @ b, b @ inner
        first = (np.trace(covariance) - np.sum(sb * pb)) / self._s
        second = (first - np.sum(sb * (pb @ inner))) / self._s
        return float(first), float(second), self.apply((sb @ inner)[None])[0] - pb


class Rows:
    """Observations with their own operators, noise or missing entries."""

    def __init__(self, obs: Observations):
        self.count, self.dims = obs.count, obs.dims
        numbers = obs.size * (1 + sum(obs.dims.values()))
        size = max(1, _CHUNK_BYTES // (8 * (numbers + 2 * obs.size**2)))
        self._parts = [take(obs, slice(i, i + size)) for i in range(0, obs.count, size)]
        small = 8 * obs.count * numbers <= _CACHE_BYTES
        self._kept = [_whiten(part) for part in self._parts] if small else None

    def chunks(self) -> Iterator[White]:
        """The observations, whitened; kept if they are few enough."""
        yield from map(_whiten, self._parts) if self._kept is None else self._kept

    def slopes(self, means: Arrays, factors: Arrays, s: float = 1.0) -> Slopes:
        """`log p` and its gradient."""
        return total([_slopes(white, means, factors, s) for white in self.chunks()])

    def curvature(self, means: Arrays, factors: Arrays, s: float = 1.0) -> dict[str, Curvature]:
        """`S` and `J` of every source."""
        return add_curvatures([_curvature(white, means, factors, s) for white in self.chunks()])

    def response(self, factors: Arrays, changes: Arrays) -> Arrays:
        """What symmetric `changes` of the sources' covariances add to the expectation of every `S`."""
        parts = [_response(white.matrices, factors, changes) for white in self.chunks()]
        return {k: np.sum([part[k] for part in parts], axis=0) for k in self.dims}

    def normal(self) -> Normal:
        """The least-squares problem of the means."""
        h, g, power = 0.0, 0.0, 0.0
        for white in self.chunks():
            a = np.concatenate(list(white.matrices.values()), axis=2)
            h, g = h + _gram(a, a), g + _gram(a, white.y[..., None])[:, 0]
            power += float(np.sum(white.y**2))
        return Normal(np.asarray(h), np.asarray(g), power)


class Moments:
    """Observations with the same operators, noise and missing entries, by mean and covariance."""

    def __init__(self, obs: Observations):
        self.count, self.dims = obs.count, obs.dims
        _, _, cov, seen = _dense(take(obs, slice(0, 1)))
        y = _root(np.asarray(cov, float))[0](
            np.asarray(obs.y, float).T * np.asarray(seen[0])[:, None]
        )
        self._mean = y[0].mean(axis=1)
        self._covariance = np.cov(y[0], bias=True).reshape(2 * self._mean.shape)
        white = _whiten(take(obs, slice(0, 1)))
        self._seen, self._logdet = float(white.seen[0]), float(white.logdet[0])
        self.operators = {k: _multiple(a[0]) for k, a in white.matrices.items()}

    @property
    def second_moment(self) -> np.ndarray:
        """`Σ_i y_i y_iᵀ / n` of the whitened observations, `(M, M)`."""
        return self._covariance + np.outer(self._mean, self._mean)

    def _state(
        self, means: Arrays, factors: Arrays, s: float
    ) -> tuple[np.ndarray, np.ndarray, Inverse]:
        r = self._mean - sum(_product(a, means[k]) for k, a in self.operators.items())
        projected = {k: _product(a, factors[k])[None] for k, a in self.operators.items()}
        return r, self._covariance + np.outer(r, r), Inverse(projected, s)

    def slopes(self, means: Arrays, factors: Arrays, s: float = 1.0) -> Slopes:
        """`log p` and its gradient."""
        r, covariance, inverse = self._state(means, factors, s)
        n, missing = self.count, self._mean.size - self._seen
        first, second, slope = inverse.pull(covariance)
        logdet = inverse.logdet[0] - missing * math.log(s) + self._logdet
        force = inverse.apply(r[None, :, None])[0, :, 0]
        ends = np.cumsum([factors[k].shape[1] for k in self.operators])[:-1]
        parts = zip(self.operators.items(), np.split(slope, ends, axis=1), strict=True)
        return Slopes(
            -0.5 * n * float(first + logdet + self._seen * math.log(2 * math.pi)),
            {k: n * _product(a.T, force) for k, a in self.operators.items()},
            {k: n * _product(a.T, part) for (k, a), part in parts},
            0.5 * n * float(second - inverse.trace[0] + missing / s),
        )

    def curvature(self, means: Arrays, factors: Arrays, s: float = 1.0) -> dict[str, Curvature]:
        """`S` and `J` of every source."""
        _, covariance, inverse = self._state(means, factors, s)
        p, n = inverse.apply(np.eye(self._mean.size)[None])[0], self.count
        out = {}
        for k, a in self.operators.items():
            pa = p * a if a.ndim == 0 else p @ a
            out[k] = Curvature(n * pa.T @ covariance @ pa, n * _product(a.T, pa))
        return out

    def response(self, factors: Arrays, changes: Arrays) -> Arrays:
        """What symmetric `changes` of the sources' covariances add to the expectation of every `S`."""
        whole = {k: a[None] for k, a in self._whole().items()}
        return {k: self.count * x for k, x in _response(whole, factors, changes).items()}

    def _whole(self) -> Arrays:
        """The operators as matrices, multiples of the identity too."""
        eye = np.eye(self._mean.size)
        return {k: a * eye if a.ndim == 0 else a for k, a in self.operators.items()}

    def normal(self) -> Normal:
        """The least-squares problem of the means."""
        a = np.concatenate(list(self._whole().values()), axis=1)
        power = float(np.trace(self._covariance) + self._mean @ self._mean)
        return Normal(self.count * a.T @ a, self.count * a.T @ self._mean, self.count * power)


Data = Rows | Moments


def gather(obs: Observations) -> Data:
    """The observations of a view as the fits use them."""
    return Moments(obs) if is_shared(obs) else Rows(obs)


def few(obs: Observations) -> Observations:
    """The first 2048 observations, or all where their number costs nothing."""
    return obs if is_shared(obs) else take(obs, slice(0, _SEARCH_COUNT))


def total(parts: Sequence[Slopes]) -> Slopes:
    """The sum over parts of the data."""
    result = parts[0]
    for part in parts[1:]:
        result = result.plus(part)
    return result


def add_curvatures(parts: Sequence[dict[str, Curvature]]) -> dict[str, Curvature]:
    """The sum over parts of the data, per source."""
    names = {k for part in parts for k in part}
    pick = lambda k, i: sum(part[k][i] for part in parts if k in part)
    return {k: Curvature(np.asarray(pick(k, 0)), np.asarray(pick(k, 1))) for k in names}


def _slopes(white: White, means: Arrays, factors: Arrays, s: float) -> Slopes:
    r, projected = white.residual(means), white.project(factors)
    inverse = Inverse(projected, s)
    v = inverse.apply(r[..., None])
    missing = r.shape[1] - white.seen
    logdet = inverse.logdet - missing * math.log(s) + white.logdet
    value = np.sum(r * v[..., 0]) + np.sum(logdet + white.seen * math.log(2 * math.pi))
    slope = {k: v @ (_t(v) @ b) - inverse.apply(b) for k, b in projected.items()}
    return Slopes(
        -0.5 * float(value),
        {k: _gram(a, v)[:, 0] for k, a in white.matrices.items()},
        {k: _gram(a, slope[k]) for k, a in white.matrices.items()},
        0.5 * float(np.sum(v * v) - np.sum(inverse.trace - missing / s)),
    )


def _curvature(white: White, means: Arrays, factors: Arrays, s: float) -> dict[str, Curvature]:
    inverse = Inverse(white.project(factors), s)
    v = inverse.apply(white.residual(means)[..., None])
    out = {}
    for k, a in white.matrices.items():
        u = (_t(a) @ v)[..., 0]
        out[k] = Curvature(u.T @ u, _gram(a, inverse.apply(a)))
    return out


def _response(matrices: Arrays, factors: Arrays, changes: Arrays) -> Arrays:
    """`{β: Σ_i A_βᵀ P (Σ_γ A_γ Δ_γ A_γᵀ) P A_β}` of whitened `A` `(n, M, D)` and `changes` `Δ`."""
    inverse = Inverse({k: _times(a, factors[k]) for k, a in matrices.items()}, 1.0)
    change = sum(_times(a, changes[k]) @ _t(a) for k, a in matrices.items())
    weighted = {k: inverse.apply(a) for k, a in matrices.items()}
    return {k: _gram(a, change @ a) for k, a in weighted.items()}


@eqx.filter_jit
def _dense(obs: Observations):
    """`(y, {β: A_β}, Σ, seen)` of every observation, with the rows of missing entries taken out."""
    rows, shared = split(obs)

    def one(row: Observations):
        o = eqx.combine(row, shared)
        return *o.system(), o.noise.observed(o.size)

    return jax.vmap(one)(rows)


def _whiten(obs: Observations) -> White:
    y, matrices, cov, seen = jax.tree.map(lambda a: np.asarray(a, float), _dense(obs))
    root, logdet = _root(cov)
    white = {k: root(a) for k, a in matrices.items()}
    return White(root(y[..., None])[..., 0], white, seen.sum(axis=1), logdet)


def _root(cov: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """`x ↦ Σ^{-½} x`, with `Σ^½` diagonal or else lower triangular, and `log det Σ`."""
    diagonal = np.diagonal(cov, axis1=1, axis2=2)
    if np.count_nonzero(cov) == np.count_nonzero(diagonal):
        return lambda x: x / np.sqrt(diagonal)[..., None], np.log(diagonal).sum(axis=1)
    low = np.linalg.cholesky(cov)
    return lambda x: np.linalg.solve(low, x), _logdet(low)


def _logdet(low: np.ndarray) -> np.ndarray:
    return 2 * np.log(np.diagonal(low, axis1=1, axis2=2)).sum(axis=1)


def _multiple(a: np.ndarray) -> np.ndarray:
    """`c`, without axes, if `A = c I`, else `A`."""
    c = np.asarray(a[0, 0])
    return c if a.shape[0] == a.shape[1] and np.array_equal(a, c * np.eye(len(a))) else a


def _product(a: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`A x`, also of a multiple of the identity as `_multiple` has it."""
    return a * x if a.ndim == 0 else a @ x


def _t(a: np.ndarray) -> np.ndarray:
    return a.swapaxes(-1, -2)


def _times(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`A_i W`, as one large product."""
    return (a.reshape(-1, a.shape[2]) @ w).reshape(*a.shape[:2], w.shape[1])


def _gram(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`Σ_i A_iᵀ B_i`, as one large product."""
    return a.reshape(-1, a.shape[2]).T @ b.reshape(-1, b.shape[2])


def mean_evidence(views: Sequence[Data], means: Arrays, factors: Arrays) -> float:
    """The mean of `log p(y)` over all observations of `views`, with the stated noise."""
    return total([v.slopes(means, factors) for v in views]).value / sum(v.count for v in views)


def least_squares_means(views: Sequence[Data]) -> Arrays:
    """The means of all sources: `argmin_μ Σ_i ‖y_i − Σ_β A_β μ_β‖² + ‖μ‖² / τ²`, whitened.

    `τ²` is the mean power of a source's entry, `Σ ‖y‖² / Σ ‖A‖²`; it only decides what the data do not.
    """
    dims = {k: d for v in views for k, d in v.dims.items()}
    ends = dict(zip(dims, np.cumsum(list(dims.values())), strict=True))
    at = {k: np.arange(ends[k] - d, ends[k]) for k, d in dims.items()}
    size = sum(dims.values())
    h, g, power = np.zeros((size, size)), np.zeros(size), 0.0
    for v in views:
        normal, index = v.normal(), np.concatenate([at[k] for k in v.dims])
        h[np.ix_(index, index)] += normal.matrix
        g[index] += normal.vector
        power += normal.power
    ridge = np.trace(h) / max(power, 1e-30)
    solution = np.linalg.solve(h + ridge * np.eye(size), g)
    return {k: solution[i] for k, i in at.items()}
