"""Random one-dimensional manifolds in D dimensions, seen through random projections.

The synthetic problem of the paper (arXiv 2510.05205, section 5.1): source β is the curve

    x_d(s) = Σ_{k=1..K} a_dk k^{-α_β} sin(2π (k b_dk s + c_dk)),   s, a, b, c ~ U(0, 1),

with `α_β` = 3, 4, 5, `K = ⌈(10⁻³)^{-1/α}⌉` terms, each dimension scaled to [−2, 2]. An observation is
`y = A Σ_β f_αβ x_β + η` with a fresh `A` of normalised Gaussian rows, or `y = Σ_β f_αβ A_β x_β + η` with
one for each source. `quadrature` has the exact posterior.
"""

import equinox as eqx
import numpy as np

from dichroic.errors import DataError
from dichroic.operators import Dense
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View

SMOOTHNESS = (3.0, 4.0, 5.0)


class Manifold(eqx.Module):
    """One curve in `dim` dimensions, as a function of `s` in [0, 1]."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    alpha: float
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, alpha: float, dim: int = 5) -> "Manifold":
        """A curve with coefficients drawn by `rng`."""
        terms = int(np.ceil(1e-3 ** (-1 / alpha)))
        a, b, c = rng.uniform(size=(3, dim, terms))
        raw = cls(a, b, c, alpha, np.full(dim, -2.0), np.full(dim, 2.0))
        grid = raw(np.linspace(0, 1, 20001))
        return cls(a, b, c, alpha, grid.min(axis=0), grid.max(axis=0))

    def __call__(self, s: np.ndarray) -> np.ndarray:
        """Points `(n, dim)` at the coordinates `s` `(n,)`."""
        k = np.arange(1, self.a.shape[1] + 1)
        raw = 0
        for j, order in enumerate(k):
            phase = order * self.b[:, j] * np.asarray(s)[:, None] + self.c[:, j]
            raw = raw + self.a[:, j] * order**-self.alpha * np.sin(2 * np.pi * phase)
        return 4 * (raw - self.low) / (self.high - self.low) - 2

    def bend(self) -> np.ndarray:
        """A bound on `|x_d''(s)|` for every `s`, `(dim,)`: `4 Σ_k |a_dk| k^{-α} (2π k b_dk)² / range`."""
        k = np.arange(1, self.a.shape[1] + 1)
        raw = np.sum(np.abs(self.a) * k**-self.alpha * (2 * np.pi * k * self.b) ** 2, axis=1)
        return 4 * raw / (self.high - self.low)


def manifold_curves(problem_seed: int, sources: int, *, dim: int = 5) -> list[Manifold]:
    """The curves of the sources of `manifold_problem`, the first of `source1`."""
    if not 1 <= sources <= len(SMOOTHNESS):
        raise DataError(f"{sources} sources: curves are defined for 1 to {len(SMOOTHNESS)}")
    rng = np.random.default_rng([0, problem_seed])
    return [Manifold.random(rng, alpha, dim) for alpha in SMOOTHNESS[:sources]]


def weights(sources: int, f_mix: float | None) -> np.ndarray:
    """`f_αβ`, views × sources: contrastive (view k sees sources 1…k), or mixed with `f_mix`."""
    if f_mix is None:
        return np.tril(np.ones((sources, sources)))
    return f_mix + (1 - f_mix) * np.eye(sources)


def observe(
    rng: np.random.Generator,
    x: np.ndarray,
    f: np.ndarray,
    *,
    obs: int = 3,
    noise: float = 0.01,
    per_source: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """`(y, A)` for draws `x` `(n, sources, dim)` with weights `f` `(sources,)`.

    `y` is `(n, obs)`; `A` is `(n, obs, dim)`, or `(n, sources, obs, dim)` if drawn `per_source`.
    """
    n, sources, dim = x.shape
    a = rng.normal(size=(n, sources, obs, dim) if per_source else (n, obs, dim))
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    mean = np.einsum("nsod,nsd,s->no" if per_source else "nod,nsd,s->no", a, x, f)
    return mean + noise * rng.normal(size=mean.shape), a


def manifold_problem(
    *,
    seed: int = 0,
    sources: int = 2,
    f_mix: float | None = None,
    count: int = 8192,
    dim: int = 5,
    obs: int = 3,
    noise: float = 0.01,
    problem_seed: int | None = None,
    per_source: bool = False,
) -> Problem:
    """The contrastive (`f_mix=None`) or mixed problem, `count` observations per view, with its truth.

    `problem_seed` draws the manifolds (default `seed`) and `seed` the observations, so that another
    `seed` with the same `problem_seed` gives new observations of the same sources. `per_source` draws
    an `A` for each source of an observation instead of one for all.
    """
    curves = manifold_curves(seed if problem_seed is None else problem_seed, sources, dim=dim)
    rng = np.random.default_rng([1, seed])
    views = []
    for v, f in enumerate(weights(sources, f_mix)):
        x = np.stack([curve(rng.uniform(size=count)) for curve in curves], axis=1)
        y, a = observe(rng, x, f, obs=obs, noise=noise, per_source=per_source)
        operator = lambda s, f=f, a=a: Dense(f[s] * (a[:, s] if per_source else a))
        seen = [s for s in range(sources) if f[s] != 0]
        views.append(
            View(
                y.astype(np.float32),
                {f"source{s + 1}": operator(s) for s in seen},
                noise,
                name=f"view{v + 1}",
                truth={f"source{s + 1}": x[:, s].astype(np.float32) for s in seen},
            )
        )
    return Problem([Source(f"source{s + 1}", (dim,)) for s in range(sources)], views)
