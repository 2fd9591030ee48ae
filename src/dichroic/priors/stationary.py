"""Mixtures of stationary Gaussians, for sources such as sky, texture or background noise.

A component is a field on a torus of `2 m − 1` positions along each axis of `m`, of which the source is a window.
Its covariance depends on the difference of two positions alone, its mean on none,

    C_k[(c, a), (d, b)] = 1/N Σ_f s_f[c, d] exp(2π i f (a − b)),

with a spectrum `s_f`, Hermitian and positive semi-definite over the channels `c, d` at each of `N` frequencies:
about `4 D` parameters where a covariance has `D² / 2`. On so large a torus every covariance of lags is that of one
(possibly negative) spectrum, so none is kept beside `C_k`. With `g`, `S` and `W` of
`dichroic.learning.mixture.m_step`, and `G(Q)_f = 1/N Σ_ab Q[a, b] exp(−2π i f (a − b))` for a matrix `Q`, the
M-steps there become

    s ← s + s (G(S) − G(W)) s    and    s ← s^½ X^{-½} (s^½ G(S) s^½ + ε) X^{-½} s^½,   X = s^½ G(W) s^½ + ε:

standard EM with the field on the torus as missing data (Dembo, Mallows and Shepp, IEEE Transactions on Information
Theory 35, 1989, embed a Toeplitz covariance so), and the fixed-point iteration.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dichroic.priors import GaussianMixture

_UNSEEN = 1e-7  # ε: the information about a frequency that counts as none
_APART = 0.5  # by which part of its variance each half of a component that is split differs from it


@dataclass(frozen=True)
class Torus:
    """The positions `grid` of a window, and those of the torus that it is cut from; `channels` at each."""

    channels: int
    grid: tuple[int, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """The positions of the torus along each axis."""
        return tuple(2 * m - 1 for m in self.grid)

    @cached_property
    def lags(self) -> np.ndarray:
        """Which lag each pair of positions has, `(P, P)`."""
        at = np.indices(self.grid).reshape(len(self.grid), -1)
        apart = at[:, :, None] - at[:, None, :]
        return np.asarray(np.ravel_multi_index(tuple(apart), self.size, mode="wrap"))

    @cached_property
    def pairs(self) -> np.ndarray:
        """How many pairs of positions have each lag."""
        return np.bincount(self.lags.ravel(), minlength=math.prod(self.size))

    def sums(self, matrices: np.ndarray) -> np.ndarray:
        """The sums of `(K, D, D)` over all pairs of a lag, `(K, N, C, C)`."""
        c, p, n = self.channels, math.prod(self.grid), math.prod(self.size)
        of = matrices.reshape(-1, c, p, c, p).transpose(0, 1, 3, 2, 4).reshape(-1, p * p)
        found = np.stack([np.bincount(self.lags.ravel(), q, n) for q in of])
        return np.moveaxis(found.reshape(-1, c, c, n), 3, 1)

    def information(self, matrices: np.ndarray) -> np.ndarray:
        """`G(Q)` of matrices `(K, D, D)`, `(K, N, C, C)`."""
        return self._transformed(self.sums(matrices)) / math.prod(self.size)

    def spectrum(self, covariances: np.ndarray) -> np.ndarray:
        """`s` of covariances `(K, D, D)`, of which entries of one lag are averaged."""
        return self._transformed(self.sums(covariances) / self.pairs[:, None, None])

    def covariances(self, spectrum: np.ndarray) -> np.ndarray:
        """`C` `(K, D, D)` of spectra `(K, N, C, C)`."""
        k, n, c, _ = spectrum.shape
        axes = tuple(range(1, 1 + len(self.size)))
        lagged = np.fft.ifftn(spectrum.reshape(k, *self.size, c, c), axes=axes).real
        full = lagged.reshape(k, n, c, c)[:, self.lags]
        return full.transpose(0, 3, 1, 4, 2).reshape(k, c * len(self.lags), -1)

    def _transformed(self, lagged: np.ndarray) -> np.ndarray:
        k, n, c, _ = lagged.shape
        axes = tuple(range(1, 1 + len(self.size)))
        return np.fft.fftn(lagged.reshape(k, *self.size, c, c), axes=axes).reshape(k, n, c, c)


def symmetric_power(a: np.ndarray, exponent: float | int, floor: float = 1e-300) -> np.ndarray:
    """`a^exponent` of symmetric or Hermitian matrices, with eigenvalues lifted to `floor`."""
    adjoint = lambda b: b.conj().swapaxes(-1, -2)
    values, vectors = np.linalg.eigh(0.5 * (a + adjoint(a)))
    return (vectors * np.maximum(values, floor)[..., None, :] ** exponent) @ adjoint(vectors)


def torus_of(mixture: GaussianMixture) -> Torus:
    """The torus of a source, whose last `mixture.stationary` axes are positions."""
    split = len(mixture.shape) - mixture.stationary
    return Torus(math.prod(mixture.shape[:split]), mixture.shape[split:])


def stationary_step(
    mixture: GaussianMixture,
    g: np.ndarray,
    s: np.ndarray,
    w: np.ndarray,
    *,
    floor: float,
    damping: float = 1.0,
    standard: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The next means `(K, D)` and covariances `(K, D, D)`: see the formulas above; `standard` picks the first.

    `g` `(K, D)`, `s` and `w` `(K, D, D)` are those of each component, `damping` scales the step of the means.
    Spectra are kept above `floor`.
    """
    torus = torus_of(mixture)
    cov = np.asarray(mixture.covariances(), np.float64)
    shift = damping * _shift(torus, g, np.linalg.inv(cov) if standard else w)
    moved = (w @ shift[..., None])[..., 0]
    across = g[:, :, None] * moved[:, None, :]
    s = s - across - across.swapaxes(1, 2) + moved[:, :, None] * moved[:, None, :]
    old = torus.spectrum(cov)
    seen, expected = torus.information(s), torus.information(w)
    if standard:
        new = old + old @ (seen - expected) @ old
    else:
        unseen = _UNSEEN * np.eye(torus.channels)
        root = symmetric_power(old, 0.5, floor)
        left = root @ symmetric_power(root @ expected @ root + unseen, -0.5)
        new = left @ (root @ seen @ root + unseen) @ left.conj().swapaxes(-1, -2)
    new = symmetric_power(new, 1, floor)
    means = np.asarray(mixture.means, np.float64) + shift
    return means, torus.covariances(new)


def _shift(torus: Torus, g: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The step of means that are the same everywhere, `(BᵀWB)⁻¹ Bᵀ g` with the constants `B` of each channel."""
    c, p = torus.channels, math.prod(torus.grid)
    force = g.reshape(-1, c, p).sum(axis=2)
    matrix = w.reshape(-1, c, p, c, p).sum(axis=(2, 4))
    matrix = matrix + (_UNSEEN * np.trace(w, axis1=1, axis2=2) / c)[:, None, None] * np.eye(c)
    step = np.linalg.solve(matrix, force[..., None])
    return np.broadcast_to(step, (len(g), c, p)).reshape(len(g), -1)


def split_stationary(mixture: GaussianMixture, parents: np.ndarray) -> GaussianMixture:
    """The components `parents` in two, of more and of less variance than they have, with their mean."""
    log_weights, variances = (
        np.array(a, np.float64) for a in (mixture.log_weights, mixture.variances)
    )
    log_weights[parents] -= np.log(2)
    child = (1 + _APART) * variances[parents]
    variances[parents] *= 1 - _APART
    grown = lambda a: np.concatenate([a, a[parents]])
    means, basis, floor = (
        grown(np.asarray(a)) for a in (mixture.means, mixture.basis, mixture.floor)
    )
    return GaussianMixture(
        log_weights=grown(log_weights),
        means=means,
        basis=basis,
        variances=np.concatenate([variances, child]),
        floor=floor,
        shape=mixture.shape,
        stationary=mixture.stationary,
    )
