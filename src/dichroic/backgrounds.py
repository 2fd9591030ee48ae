"""Sources of stationary components behind sources of low rank: one dense covariance for each component.

Latents that span a whole source are worth no more than the source itself. So a component `j` of such a source (or
one of each, where there are several) joins the noise,

    B_j = Σ + Σ_β τ_β A_β A_βᵀ + A C_j Aᵀ,

and a view is a mixture over `j` of views of the other sources (`dichroic.lowrank`). With their residual
`e = y − A μ_j − X z̄` and `H = Aᵀ B_j⁻¹`, the sums of the M-step of `dichroic.stationary` are

    Σ r g = H Σ r E[e],   Σ r S = H (Σ r E[e] E[e]ᵀ) Hᵀ,   Σ r W = n_j H A − H X (Σ r V[z̄]) Xᵀ Hᵀ.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dichroic.columns import Common
from dichroic.denoise import Mixture
from dichroic.lowrank import Given, LowRankView, Part, part_of
from dichroic.mixture_sums import Sums
from dichroic.observations import Observations, groups

_NEGLIGIBLE = 1e-12  # probability of a tuple


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


class Backgrounds:
    """A view as a mixture of views before each background: one alone where no source is stationary.

    `slots` are where the latents of each source are among those of all.
    """

    def __init__(
        self,
        mixtures: Mapping[str, Mixture],
        obs: Observations,
        common: Common | None = None,
        sigmas: Mapping[str, float] | None = None,
    ):
        """`sigmas` are noise levels of the sources, where components are to be those given noised values."""
        own = {k: mixtures[k] for k in obs.sources}
        wide = {k: m for k, m in own.items() if m.stationary}
        rest = {k: m for k, m in own.items() if not m.stationary}
        common = common or Common()
        level = lambda k: None if sigmas is None else sigmas[k]
        parts = {k: part_of(m, obs, common, k, level(k)) for k, m in wide.items()}
        self.each: list[Background] = []
        ends = np.cumsum([0, *(1 + m.variances.shape[1] for m in own.values())])
        spans = itertools.pairwise(map(int, ends))
        self.slots = {k: slice(*span) for k, span in zip(own, spans, strict=True)}
        for which in itertools.product(*(range(p.log_weights.size) for p in parts.values())):
            index = dict(zip(parts, which, strict=True))
            seen = [parts[k].columns[:, j] for k, j in index.items()]
            spread = sum((a[:, 1:] @ a[:, 1:].T for a in seen), np.zeros(())) if seen else None
            mean = sum((a[:, 0] for a in seen), np.zeros(obs.size))
            weight = float(sum(parts[k].log_weights[j] for k, j in index.items()))
            view = LowRankView(rest, obs, sigmas, common, spread)
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

    def chunks(self, obs: Observations) -> Iterator[np.ndarray]:
        """The observations, 0 where missing, as many at once as memory allows."""
        return self.each[0].view.chunks(obs, len(self.each))

    def given(self, y: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, Given]]]:
        """`log p(y)` `(n,)`, and before each background the residual of its mean and what that says."""
        found = []
        for b in self.each:
            given = b.view.given(y - b.mean)
            found.append((y - b.mean, replace(given, scores=given.scores + b.log_weight)))
        levels = np.stack([given.log_evidence for _, given in found])
        top = levels.max(axis=0)
        return top + np.log(np.exp(levels - top).sum(axis=0)), found

    def likely(self, obs: Observations) -> dict[str, np.ndarray]:
        """The components of every source that the first observations may be of."""
        log_evidence, found = self.given(next(self.chunks(obs)))
        kept: dict[str, set[int]] = {}
        for b, (_, given) in zip(self.each, found, strict=True):
            most = np.exp(given.scores - log_evidence[:, None]).max(axis=0)
            for which in b.view.tuples[most > _NEGLIGIBLE]:
                index = dict(zip(b.view.parts, map(int, which), strict=True)) | b.index
                for name, k in index.items():
                    kept.setdefault(name, set()).add(k)
        return {k: np.array(sorted(i)) for k, i in kept.items()}


class Totals:
    """Sums over observations of what they say before one background."""

    def __init__(self, background: Background, names: Collection[str]):
        """Of what the M-steps of the sources `names` need."""
        view = self.view = background.view
        self.background, self.names = background, names
        self.squares = {k: 0.0 for k in view.parts if k in names}
        self.count = np.zeros(len(view.tuples))
        self.tuples = np.zeros((*view.where.shape, view.where.shape[1]))
        self.outer = np.zeros(view.columns.shape)
        self.y, self.latents = np.zeros(view.size), np.zeros(view.columns.shape[1])
        behind = any(k in names for k in background.parts)
        self.square = np.zeros((view.size, view.size)) if behind else None

    def head(self, name: str, columns: np.ndarray) -> np.ndarray:
        """`Aᵀ B⁻¹` times columns."""
        part = self.view.parts.get(name) or self.background.parts[name]
        return part.back(self.view.base.solve(columns))

    def add(self, y: np.ndarray, given: Given, log_evidence: np.ndarray) -> None:
        """Observations `(n, M)` whose evidence before all backgrounds is `log_evidence` `(n,)`."""
        r = np.exp(given.scores - log_evidence[:, None]).T
        some = r.max(axis=0) > _NEGLIGIBLE
        if not some.all():
            y, given, r = y[some], given.rows(some), r[:, some]
        weighted = r[:, :, None] * given.latents
        for t, rows in enumerate(r > _NEGLIGIBLE):
            self.tuples[t] += given.latents[t, rows].T @ weighted[t, rows]
        by_component = self.view.by_component(weighted)
        self.count += r.sum(axis=1)
        self.outer += y.T @ by_component
        share = r.sum(axis=0)
        for name in self.squares:
            back = self.view.parts[name].back(given.solved.T)
            self.squares[name] += float(np.sum(share * np.sum(back**2, axis=0)))
        if self.square is not None:
            self.square += (share * y.T) @ y
            self.y += share @ y
            self.latents += by_component.sum(axis=0)

    @cached_property
    def uncertain(self) -> np.ndarray:
        """`Σ r V[z̄]`."""
        return self.view.pairs(self.count[:, None, None] * self.view.covariance)


def sums_behind(name: str, mixture: Mixture, totals: Totals) -> Sums:
    """Those of the component of a source that is in the background of `totals`; others have none."""
    part, columns = totals.background.parts[name], totals.view.columns
    assert totals.square is not None
    k, d = mixture.means.shape
    j = totals.background.index[name]
    along = totals.outer @ columns.T
    outer = totals.square - along - along.T
    outer += columns @ totals.view.pairs(totals.tuples) @ columns.T
    both = lambda m: totals.head(name, totals.head(name, m).T)
    found = Sums(np.zeros(k), np.zeros((k, d)), np.zeros((k, d, d)), np.zeros((k, d, d)))
    n = found.count[j] = totals.count.sum()
    residual = totals.y - columns @ totals.latents
    found.force[j] = totals.head(name, residual[:, None])[:, 0]
    found.scatter[j] = both(outer)
    found.information[j] = n * totals.head(name, part.forward(np.eye(d)))
    found.information[j] -= both(columns @ totals.uncertain @ columns.T)
    return found


def low_rank_log_evidence(mixtures: Mapping[str, Mixture], obs: Observations) -> float:
    """`Σ_i log p(y_i)`."""
    total, common = 0.0, Common()
    for _, some in groups(obs):
        behind = Backgrounds(mixtures, some, common)
        total += sum(float(behind.given(y)[0].sum()) for y in behind.chunks(some))
    return total
