"""Mixtures of probabilistic PCA in many dimensions: their evidence and posterior without a matrix of that size.

For observations that share their operators and noise, or one with its own. A source is
`x = μ_k + U_k z + √τ ε`: a component `k`, `z ~ N(0, I)` of `R` numbers, and one floor `τ` for all. For an
assignment `t`

    y = m_t + W_t z + e,   W_t = (A_β U_kβ)_β,   e ~ N(0, B),   B = Σ + Σ_β τ_β A_β A_βᵀ,

with the same `B` for all assignments. With `K_t = I + W_tᵀ B⁻¹ W_t` (of `S R` rows, Woodbury),

    E[z | y, t] = w = K_t⁻¹ W_tᵀ B⁻¹ (y − m_t),   V[z | y, t] = K_t⁻¹,
    log det C_t = log det B + log det K_t,   (y − m_t)ᵀ C_t⁻¹ (y − m_t) = ‖y − m_t‖²_B⁻¹ − wᵀ K_t w,
    E[√τ ε | y, t] = τ Aᵀ B⁻¹ (y − m_t − W_t w).

Observations enter by products with the columns of all components, `n × M × K R`, and assignments only in the small
space. In float64: quadratic forms are differences of numbers as large as the signal-to-noise ratio.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg.lapack import dpotri  # pyright: ignore[reportAttributeAccessIssue]

from dichroic.errors import DataError
from dichroic.inference.matrix_free import Columns, SharedObservations, products
from dichroic.priors import GaussianMixture

MAX_ASSIGNMENTS = 4096
MOST_DENSE = 4096  # entries of an observation, where B is not diagonal
_CHUNK_BYTES = 256 * 2**20
_POWER_STEPS = 6  # for the largest eigenvalue of an information, which they find from below:
_MARGIN = 1.2  # by so much


@dataclass(frozen=True)
class Part:
    """One source in a view: `(μ_k, F_k)` `(D, K (1 + R))`, `A` times that `(M, K, 1 + R)`, `τ`, `A` and `Aᵀ`.

    And the diagonal of `A`, if it has no other entries, and the scale `(D,)` that `A` gives each entry first.
    """

    log_weights: np.ndarray
    source: np.ndarray
    columns: np.ndarray
    floor: float
    forward: Columns
    back: Columns
    gain: np.ndarray | None
    scale: np.ndarray


@dataclass(frozen=True)
class Base:
    """`B`: products with its inverse on columns `(M, n)`, `log det B`, and `tr(Aᵀ B⁻¹ A)` by source.

    And the diagonal of `Aᵀ B⁻¹ A`, where that has no other entries.
    """

    solve: Columns
    logdet: float
    traces: dict[str, float]
    diagonals: dict[str, np.ndarray]


@dataclass(frozen=True)
class Given:
    """What observations `y` `(n, M)` say of assignments: scores `(n, T)`, and `(1, w_β)_β` `(T, n, S (1 + R))`.

    And `solved`, `B⁻¹ y` `(n, M)`. Of assignments that were left out scores are −∞, latents 0.
    """

    scores: np.ndarray
    latents: np.ndarray
    solved: np.ndarray

    @cached_property
    def log_evidence(self) -> np.ndarray:
        """`log p(y)`, `(n,)`."""
        top = self.scores.max(axis=1)
        return top + np.log(np.exp(self.scores - top[:, None]).sum(axis=1))

    @property
    def responsibilities(self) -> np.ndarray:
        """The posterior probability of each assignment, `(n, T)`."""
        return np.exp(self.scores - self.log_evidence[:, None])


class LowRankView:
    """A view as a mixture in observation space, with a component per assignment of the sources' components.

    `columns` `(M, C)` are `(A μ_k, A U_k)` of all components of all sources; `where` `(T, S (1 + R))` those of
    each assignment; `covariance` `(T, …, …)` that of `(1, z_β)_β` given an observation and the assignment.
    """

    def __init__(
        self,
        mixtures: Mapping[str, GaussianMixture],
        shared: SharedObservations,
        sigmas: Mapping[str, float] | None = None,
        behind: np.ndarray | None = None,
    ):
        """`sigmas` are noise levels of the sources, where components are to be those given noised values.

        `behind` `(M, M)` is added to `B`: the covariance of what sources that are not among the `mixtures` give
        (`dichroic.inference.low_rank_background`).
        """
        self.shared, self.seen, self.size = shared, shared.seen, shared.size
        names = [k for k in shared.sources if k in mixtures]
        level = lambda k: None if sigmas is None else sigmas[k]
        self.parts = {k: part_of(mixtures[k], shared, k, level(k)) for k in names}
        counts = [p.log_weights.size for p in self.parts.values()]
        if math.prod(counts) > MAX_ASSIGNMENTS:
            raise DataError(
                f"{' × '.join(map(str, counts))} components of {', '.join(names)} are "
                f"{math.prod(counts):,} joint assignments; at most {MAX_ASSIGNMENTS:,} are supported for "
                "high-dimensional sources: choose fewer with mixture.components"
            )
        self.assignments = np.indices(counts).reshape(len(counts), math.prod(counts)).T
        self.base = _base(shared, self.parts, behind)
        widths = [p.columns.shape[2] for p in self.parts.values()]
        sizes = [p.columns[0].size for p in self.parts.values()]
        self._spans = _slices(widths)  # of each source in the latents of an assignment
        self.blocks = dict(zip(names, _slices(sizes), strict=True))  # and in the columns
        each = [w for p, w in zip(self.parts.values(), widths, strict=True) for _ in p.log_weights]
        self.components = _slices(each)  # in the columns
        flat = [p.columns.reshape(self.size, -1) for p in self.parts.values()]
        self.columns = np.concatenate([np.zeros((self.size, 0)), *flat], axis=1)
        starts = np.array([b.start for b in self.blocks.values()], int) + widths * self.assignments
        wide = [s[:, None] + np.arange(w) for s, w in zip(starts.T, widths, strict=True)]
        self.where = np.concatenate([np.zeros((len(self.assignments), 0), int), *wide], axis=1)
        self._prepare()

    def _prepare(self) -> None:
        self.solved = self.base.solve(self.columns)
        gram = self._gram()
        ones = np.zeros(self.where.shape[1], bool)
        ones[[s.start for s in self._spans]] = True
        self.ones = ones
        k = gram[:, ~ones][:, :, ~ones] + np.eye(int((~ones).sum()))
        inverse = np.linalg.inv(k)
        self.covariance = np.zeros(gram.shape)
        self.covariance[np.ix_(np.arange(len(k)), ~ones, ~ones)] = inverse
        self.gram = gram
        self.shift = gram[:, ones].sum(
            axis=1
        )  # what the mean of the assignment gives along its columns
        square = self.shift[:, ones].sum(axis=1)
        self.volume = np.linalg.slogdet(k)[1] + self.base.logdet + self.size * np.log(2 * np.pi)
        parts = zip(self.parts.values(), self.assignments.T, strict=True)
        self.constant = sum(p.log_weights[c] for p, c in parts) - 0.5 * (self.volume + square)

    def _gram(self) -> np.ndarray:
        """`Wᵀ B⁻¹ W` of each assignment, with the means among the columns."""
        if len(self.parts) == 1:  # no product of two components is needed
            return self._of_assignments(self.columns).swapaxes(1, 2) @ self._of_assignments(
                self.solved
            )
        return (self.columns.T @ self.solved)[self.where[:, :, None], self.where[:, None, :]]

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        held = (self.columns, self.solved, self.gram, self.covariance)
        return sum(a.nbytes for a in held)

    def given(
        self,
        y: np.ndarray,
        log_weights: np.ndarray | None = None,
        coefficients: np.ndarray | None = None,
    ) -> Given:
        """What the observations `y` `(n, M)` say.

        Where components are given noised values, their `log_weights` `(n, T)`, and the `coefficients` `(n, C)` of
        their means in the columns; `y` is then less what the means have outside of them.
        """
        along = self._of_assignments(y @ self.solved)
        if coefficients is None:
            mean = along[:, :, self.ones].sum(axis=2).T
            shift, constant = self.shift[:, None], self.constant
        else:
            c = self._of_assignments(coefficients)
            mean, shift = np.einsum("tnc,tnc->nt", along, c), c @ self.gram
            constant = log_weights - 0.5 * (self.volume + np.einsum("tnc,tnc->nt", shift, c))
        along -= shift
        latents = along @ self.covariance
        fit = np.einsum("tnc,tnc->nt", along, latents)
        solved = self.base.solve(y.T).T
        square = np.sum(y * solved, axis=1)[:, None] - 2 * mean
        latents[:, :, self.ones] = 1
        return Given(constant - 0.5 * (square - fit), latents, solved)

    def given_near(self, y: np.ndarray, near: np.ndarray) -> Given:
        """What observations say of those assignments alone that each is `near` `(T, n)`."""
        solved = self.base.solve(y.T).T
        square = np.sum(y * solved, axis=1)
        scores = np.full(near.T.shape, -np.inf)
        latents = np.zeros((*near.shape, self.where.shape[1]))  # takes memory where it is written
        every = y @ self.solved if len(self.parts) > 1 else None
        for t in np.flatnonzero(near.any(axis=1)):
            rows, at = near[t], self.where[t]
            along = y[rows] @ self.solved[:, at] if every is None else every[np.ix_(rows, at)]
            mean = along[:, self.ones].sum(axis=1)
            along = along - self.shift[t]
            found = along @ self.covariance[t]
            fit = np.einsum("nc,nc->n", along, found)
            found[:, self.ones] = 1
            latents[t, rows] = found
            scores[rows, t] = self.constant[t] - 0.5 * (square[rows] - 2 * mean - fit)
        return Given(scores, latents, solved)

    def _of_assignments(self, columns: np.ndarray) -> np.ndarray:
        """The columns of each assignment among all columns `(n, C)`: `(T, n, S (1 + R))`."""
        out = np.empty((len(self.assignments), len(columns), self.where.shape[1]))
        for t, span, at in self._places():
            out[t, :, span] = columns[:, at]
        return out

    def times(self, columns: np.ndarray, of_assignments: np.ndarray) -> np.ndarray:
        """Numbers `(n, C)` by column times the `(C, C)` that matrices of assignments add up to, `(n, C)`."""
        if len(self.parts) != 1:
            return columns @ self._pairs(of_assignments)
        return (
            (self._of_assignments(columns) @ of_assignments).swapaxes(0, 1).reshape(columns.shape)
        )

    def information_bound(self, name: str) -> np.ndarray:
        """A diagonal matrix `(D,)` that bounds `Aᵀ B⁻¹ A` of one source; that itself, where it is diagonal.

        Otherwise `λ s²`, with the scale `s` of each entry and the largest eigenvalue `λ` in these units, by a few
        power iterations.
        """
        if name in self.base.diagonals:
            return self.base.diagonals[name]
        part, largest = self.parts[name], 0.0
        scale = part.scale[:, None]
        v = np.random.default_rng(0).normal(size=scale.shape)
        for _ in range(_POWER_STEPS):
            v = v / max(np.linalg.norm(v), np.finfo(float).tiny)
            v = part.back(self.base.solve(part.forward(v / scale))) / scale
            largest = max(largest, float(np.linalg.norm(v)))
        return _MARGIN * largest * part.scale**2

    def own(self, name: str, of_assignments: np.ndarray) -> np.ndarray:
        """Matrices of assignments summed for each component of one source, `(K, 1 + R, 1 + R)`."""
        source = list(self.parts).index(name)
        span, part = self._spans[source], self.parts[name]
        out = np.zeros((part.columns.shape[1], *(part.columns.shape[2],) * 2))
        np.add.at(out, self.assignments[:, source], of_assignments[:, span, span])
        return out

    def _pairs(self, of_assignments: np.ndarray) -> np.ndarray:
        """Matrices `(T, S (1 + R), S (1 + R))` summed over assignments of each pair of components, `(C, C)`."""
        out = np.zeros((self.columns.shape[1],) * 2)
        for t, places in itertools.groupby(self._places(), key=lambda place: place[0]):
            for (_, row, at), (_, column, to) in itertools.product(list(places), repeat=2):
                out[at, to] += of_assignments[t, row, column]
        return out

    def _places(self) -> Iterator[tuple[int, slice, slice]]:
        """Each tuple, and where the numbers of each of its components are in latents and in columns."""
        for t, where in enumerate(self.where):
            for span in self._spans:
                yield t, span, slice(int(where[span.start]), int(where[span.stop - 1]) + 1)

    def moved(
        self, y: np.ndarray, t: np.ndarray, x: Mapping[str, np.ndarray], eta: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Prior draws `x` `(n, D)` of the assignments `t` and noise `eta`, moved to the posterior.

        By `C Aᵀ C_t⁻¹ (y − Σ A x − η)` (pathwise conditioning, Wilson et al., JMLR 22, 2021). Returns what `C Aᵀ`
        is of, too.
        """
        given = sum((p.forward(x[k].T) for k, p in self.parts.items()), np.zeros(y.T.shape))
        v = self.base.solve((y - eta).T - given).T
        along = np.take_along_axis(v @ self.columns, self.where[t], axis=1)
        # K⁻¹ Wᵀ B⁻¹ ρ = Wᵀ C⁻¹ ρ, row by row, so that no bit depends on which other rows there are
        w = np.stack([a @ self.covariance[k] for a, k in zip(along, t, strict=True)])
        back = self.spread(t, w)
        v = v - back @ self.solved.T
        moved = {
            k: x[k] + back[:, self.blocks[k]] @ p.source.T + p.floor * p.back(v.T).T
            for k, p in self.parts.items()
        }
        return moved, v

    @property
    def spread_ones(self) -> np.ndarray:
        """The coefficients of the means of all components themselves, `(C,)`."""
        parts = (np.eye(1, p.columns.shape[2])[0] for p in self.parts.values())
        counts = (p.log_weights.size for p in self.parts.values())
        rows = [np.tile(row, k) for row, k in zip(parts, counts, strict=True)]
        return np.concatenate([np.zeros(0), *rows])

    def spread(self, t: np.ndarray, latents: np.ndarray) -> np.ndarray:
        """Latents `(n, S (1 + R))` of the assignments `t` as coefficients of all columns, `(n, C)`."""
        out = np.zeros((len(t), self.columns.shape[1]))
        np.put_along_axis(out, self.where[t], latents, axis=1)
        return out

    def chunks(self, views: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
        """The observations, 0 where missing, as many at once as memory allows for so many `views` of them.

        And where they are among all.
        """
        each = 8 * views * (4 * self.where.size + 3 * self.size + self.columns.shape[1])
        step = int(np.clip(_CHUNK_BYTES // each, 1, self.shared.count))
        for start in range(0, self.shared.count, step):
            rows = slice(start, start + step)
            yield rows, self.shared.rows(rows)


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(int(e - n), int(e)) for e, n in zip(ends, sizes, strict=True)]


def part_of(
    mixture: GaussianMixture, shared: SharedObservations, name: str, sigma: float | None = None
) -> Part:
    """The source `name` in a view, given a value with noise of the level `sigma` if there is one."""
    operator, seen = shared.operator(name), shared.seen
    forward, back = products(operator.op, seen, operator.gain)
    columns, floor = moments(mixture, sigma)
    k, d, r = columns.shape
    flat = columns.swapaxes(0, 1).reshape(d, k * r)
    log_weights = np.asarray(mixture.log_weights, np.float64)
    observed = seen[:, None] * (operator.columns(mixture, flat) if sigma is None else forward(flat))
    shape = -1, k, r
    columns = observed.reshape(shape)
    return Part(log_weights, flat, columns, floor, forward, back, operator.gain, operator.scale)


def moments(mixture: GaussianMixture, sigma: float | None = None) -> tuple[np.ndarray, float]:
    """`(μ_k, F_k)` `(K, D, 1 + R)` and `τ` with covariances `F_k F_kᵀ + τ I`, in float64.

    Of the prior, or, with `sigma`, of a component given a value with noise of that level.
    """
    to64 = lambda a: np.asarray(a, np.float64)
    floor, variances = float(to64(mixture.floor).mean()), to64(mixture.variances)
    if sigma is not None:
        extra, gain = gains(mixture, sigma)
        variances, floor = sigma**2 * extra, sigma**2 * gain
    factors = to64(mixture.basis) * np.sqrt(variances)[:, None, :]
    return np.concatenate([to64(mixture.means)[:, :, None], factors], axis=2), floor


def gains(mixture: GaussianMixture, sigma: float) -> tuple[np.ndarray, float]:
    """`(r, g)` with `C_k (C_k + σ² I)⁻¹ = U_k diag(r) U_kᵀ + g I`."""
    floor = float(np.asarray(mixture.floor, np.float64).mean())
    variances, rest = np.asarray(mixture.variances, np.float64), floor + sigma**2
    return variances / (variances + rest) * (sigma**2 / rest), floor / rest


def _base(shared: SharedObservations, parts: Mapping[str, Part], behind: np.ndarray | None) -> Base:
    """`B`, diagonal where all that is in it is."""
    noise, seen, size = shared.noise_variances, shared.seen, shared.size
    gains = {k: p.gain for k, p in parts.items()}
    if noise is not None and behind is None and all(g is not None for g in gains.values()):
        squares = {k: (seen * g) ** 2 for k, g in gains.items() if g is not None}
        b = sum((parts[k].floor * s for k, s in squares.items()), noise)
        diagonals = {k: s / b for k, s in squares.items()}
        traces = {k: float(d.sum()) for k, d in diagonals.items()}
        return Base(lambda v: v / b[:, None], float(np.log(b).sum()), traces, diagonals)
    if size > MOST_DENSE:
        raise DataError(
            f"observations of {size:,} entries whose operators or noise are not diagonal; at most "
            f"{MOST_DENSE:,} are supported"
        )
    rows = np.flatnonzero(seen)  # of missing entries, `y` and all columns are 0
    among = np.ix_(rows, rows)
    squares = {k: shared.operator(k).square[among] for k in parts}
    known = shared.noise_covariance
    known = known if behind is None else known + behind
    b = sum((parts[k].floor * s for k, s in squares.items()), known[among])
    low = np.linalg.cholesky(0.5 * (b + b.T))
    half = dpotri(low, lower=1)[0] if rows.size else low  # its lower triangle
    inverse = np.zeros((size,) * 2)
    inverse[among] = np.tril(half) + np.tril(half, -1).T
    traces = {k: float(np.sum(inverse[among] * s)) for k, s in squares.items()}
    return Base(lambda v: inverse @ v, 2 * float(np.log(np.diagonal(low)).sum()), traces, {})
