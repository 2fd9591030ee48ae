"""Sources of stationary components behind sources of low rank: one dense covariance for each component.

Latents that span a whole source are worth no more than the source itself. So a component `j` of such a source (or
one of each, where there are several) joins the noise,

    B_j = Σ + Σ_β τ_β A_β A_βᵀ + A C_j Aᵀ,

and a view is a mixture over `j` of views of the other sources (`dichroic.inference.low_rank`). With their residual
`e = y − A μ_j − X z̄` and `H = Aᵀ B_j⁻¹`, the sums of the M-step of `dichroic.priors.stationary` are

    Σ r g = H Σ r E[e],   Σ r S = H (Σ r E[e] E[e]ᵀ) Hᵀ,   Σ r W = n_j H A − H X (Σ r V[z̄]) Xᵀ Hᵀ.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import logsumexp

from dichroic.inference.low_rank import Given, LowRankView, Part, part_of
from dichroic.inference.low_rank_masked import (
    DiagonalObservations,
    MaskedView,
    has_masked_view,
)
from dichroic.inference.matrix_free import SharedObservations, shared_groups
from dichroic.priors import GaussianMixture
from dichroic.problem.batches import AnyObservations
from dichroic.problem.observations import Observations, is_shared

NEGLIGIBLE = 1e-12  # probability of an assignment


@dataclass(frozen=True)
class Background:
    """The components `index` of the stationary sources, by name, and the view of all others behind which they are.

    `mean` `(M,)` is theirs, seen in the observations; `parts` are those sources.
    """

    index: dict[str, int]
    log_weight: float
    mean: np.ndarray
    parts: Mapping[str, Part]
    view: LowRankView

    def source(self, name: str) -> np.ndarray:
        """`(μ, F)` of the component of a source, `(D, 1 + R)`."""
        width = self.parts[name].columns.shape[2]
        first = self.index[name] * width
        return self.parts[name].source[:, first : first + width]

    def columns(self, name: str) -> np.ndarray:
        """`A` times that."""
        return self.parts[name].columns[:, self.index[name]]


@dataclass(frozen=True)
class BackgroundPosteriors:
    """What `n` observations say before each background.

    Their `log_evidence` before all; the `rows` `(J, n)` that may be before each, the residuals that its mean
    leaves of those, and what these say.
    """

    log_evidence: np.ndarray
    rows: np.ndarray
    residuals: list[np.ndarray]
    given: list[Given]

    def likely(self, background: int) -> np.ndarray:
        """The assignments that are not negligible for each observation before one background, `(T, n)`."""
        some, scores = self.rows[background], self.given[background].scores
        found = np.zeros((scores.shape[1], len(some)), bool)
        found[:, some] = ~(scores.T - self.log_evidence[some] <= math.log(NEGLIGIBLE))  # NaN is
        return found


def every_assignment(
    mixtures: Mapping[str, GaussianMixture], obs: AnyObservations, most: int
) -> np.ndarray | None:
    """That observations may be of each assignment before each background, `(J, T, n)`; None beyond `most`."""
    own = [mixtures[k] for k in obs.sources]
    size = lambda behind: math.prod(m.log_weights.size for m in own if bool(m.stationary) == behind)
    shape = size(True), size(False), obs.count
    return np.ones(shape, bool) if math.prod(shape) <= most else None


class Backgrounds:
    """A view as a mixture of views before each background: one alone where no source is stationary.

    `slots` are where the latents of each source are among those of all.
    """

    def __init__(
        self,
        mixtures: Mapping[str, GaussianMixture],
        shared: SharedObservations,
        sigmas: Mapping[str, float] | None = None,
    ):
        """`sigmas` are noise levels of the sources, where components are to be those given noised values."""
        own = {k: mixtures[k] for k in shared.sources}
        wide = {k: m for k, m in own.items() if m.stationary}
        rest = {k: m for k, m in own.items() if not m.stationary}
        level = lambda k: None if sigmas is None else sigmas[k]
        parts = {k: part_of(m, shared, k, level(k)) for k, m in wide.items()}
        self.each: list[Background] = []
        ends = np.cumsum([0, *(1 + m.variances.shape[1] for m in own.values())])
        spans = itertools.pairwise(map(int, ends))
        self.slots = {k: slice(*span) for k, span in zip(own, spans, strict=True)}
        for which in itertools.product(*(range(p.log_weights.size) for p in parts.values())):
            index = dict(zip(parts, which, strict=True))
            seen = [parts[k].columns[:, j] for k, j in index.items()]
            spread = sum((a[:, 1:] @ a[:, 1:].T for a in seen), np.zeros(())) if seen else None
            mean = sum((a[:, 0] for a in seen), np.zeros(shared.size))
            weight = float(sum(parts[k].log_weights[j] for k, j in index.items()))
            view = LowRankView(rest, shared, sigmas, spread)
            self.each.append(Background(index, weight, mean, parts, view))

    @property
    def seen(self) -> np.ndarray:
        """1 for the entries of an observation that are not missing, else 0, `(M,)`."""
        return self.each[0].view.seen

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        own = sum(p.columns.nbytes + p.source.nbytes for p in self.each[0].parts.values())
        return own + sum(b.view.nbytes + b.view.size**2 * bool(b.parts) * 8 for b in self.each)

    def chunks(self, near: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """The observations, 0 where missing, as many at once as memory allows, and where they are among all.

        Each before all backgrounds, or those that it is `near` `(J, T, n)`.
        """
        most = len(self.each) if near is None else int(near.any(axis=1).sum(axis=0).max())
        return self.each[0].view.chunks(most)

    def given(self, y: np.ndarray, near: np.ndarray | None = None) -> "BackgroundPosteriors":
        """What observations `(n, M)` say before each background, or those that they are `near` `(J, T, n)`."""
        everywhere = np.ones((len(self.each), len(y)), bool)
        rows = everywhere if near is None else np.any(near, axis=1)
        levels, residuals, given = np.full(rows.shape, -np.inf), [], []
        for j, (b, some) in enumerate(zip(self.each, rows, strict=True)):
            residuals.append(y[some] - b.mean)
            if near is None or near[j].all():
                found = b.view.given(residuals[-1])
            else:
                found = b.view.given_near(residuals[-1], near[j][:, some])
            given.append(replace(found, scores=found.scores + b.log_weight))
            levels[j, some] = given[-1].log_evidence
        top = levels.max(axis=0)
        log_evidence = top + np.log(np.exp(levels - top).sum(axis=0))
        return BackgroundPosteriors(log_evidence, rows, residuals, given)

    def likely(self) -> dict[str, np.ndarray]:
        """The components of every source that the first observations may be of."""
        found = self.given(next(self.chunks())[1])
        kept: dict[str, set[int]] = {}
        for j, b in enumerate(self.each):
            for which in b.view.assignments[found.likely(j).any(axis=1)]:
                index = dict(zip(b.view.parts, map(int, which), strict=True)) | b.index
                for name, k in index.items():
                    kept.setdefault(name, set()).add(k)
        return {k: np.array(sorted(i)) for k, i in kept.items()}


def low_rank_log_evidence(mixtures: Mapping[str, GaussianMixture], obs: Observations) -> np.ndarray:
    """`log p(y)` of each observation, `(n,)`."""
    if not is_shared(obs) and has_masked_view(mixtures, obs.sources):
        data = DiagonalObservations.of(obs)
        if data is not None:
            view = MaskedView(mixtures, data)
            near = np.ones((len(view.assignments), obs.count), bool)
            return np.asarray(logsumexp(view.scores(near), axis=1))
    found = np.zeros(obs.count)
    for index, some in shared_groups(obs):
        behind = Backgrounds(mixtures, some)
        for rows, y in behind.chunks():
            found[index[rows]] = behind.given(y).log_evidence
    return found
