"""Sums over observations for the M-step of sources of low rank, and of stationary ones behind them.

See `dichroic.inference.low_rank_background` for the formulas.
"""

from collections.abc import Collection
from functools import cached_property

import numpy as np

from dichroic.inference.low_rank import Given
from dichroic.inference.low_rank_background import NEGLIGIBLE, Background
from dichroic.learning.mixture.statistics import SufficientStatistics
from dichroic.priors import GaussianMixture


class Totals:
    """Sums over observations of what they say before one background."""

    def __init__(self, background: Background, names: Collection[str]):
        """Zero sums of what the M-steps of the sources `names` need."""
        view = self.view = background.view
        self.background, self.names = background, names
        self.squares = {k: 0.0 for k in view.parts if k in names}
        self.count = np.zeros(len(view.assignments))
        self.assignments = np.zeros((*view.where.shape, view.where.shape[1]))
        self.outer = np.zeros(view.columns.shape)
        self.y, self.latents = np.zeros(view.size), np.zeros(view.columns.shape[1])
        behind = any(k in names for k in background.parts)
        self.square = np.zeros((view.size, view.size)) if behind else None

    def add(self, y: np.ndarray, given: Given, log_evidence: np.ndarray) -> None:
        """Observations `(n, M)` whose evidence before all backgrounds is `log_evidence` `(n,)`."""
        r = np.exp(given.scores - log_evidence[:, None])
        r[r <= NEGLIGIBLE] = 0
        columns = np.zeros((len(y), self.view.columns.shape[1]))  # Σ_t r z̄, by component
        for t in np.flatnonzero(r.any(axis=0)):
            rows = r[:, t] > 0
            latents = given.latents[t, rows]
            weighted = r[rows, t, None] * latents
            self.assignments[t] += latents.T @ weighted
            columns[np.ix_(rows, self.view.where[t])] += weighted
        self.count += r.sum(axis=0)
        self.latents += columns.sum(axis=0)
        for at in self.view.components:
            rows = columns[:, at].any(axis=1)
            self.outer[:, at] += y[rows].T @ columns[rows, at]
        share = r.sum(axis=1)
        some = share > 0
        for name in self.squares:
            back = self.view.parts[name].back(given.solved[some].T)
            self.squares[name] += float(np.sum(share[some] * np.sum(back**2, axis=0)))
        if self.square is not None:
            self.square += (share[some] * y[some].T) @ y[some]
            self.y += share @ y

    @cached_property
    def solved(self) -> np.ndarray:
        """`B⁻¹ Y`."""
        return self.view.base.solve(self.outer)

    @cached_property
    def uncertain(self) -> np.ndarray:
        """`Σ r V[z̄]` of each assignment."""
        return self.count[:, None, None] * self.view.covariance


def background_statistics(
    name: str, mixture: GaussianMixture, totals: Totals
) -> SufficientStatistics:
    """Statistics of the component of a source that is in the background of `totals`; others have none."""
    part, view = totals.background.parts[name], totals.view
    assert totals.square is not None
    k, d = mixture.means.shape
    j, n = totals.background.index[name], float(totals.count.sum())
    head = lambda columns: part.back(view.base.solve(columns))
    x, xy = part.back(view.solved), part.back(totals.solved)  # H X, H Σ r y z̄ᵀ
    along = (xy - 0.5 * view.times(x, totals.assignments)) @ x.T
    found = SufficientStatistics(
        np.zeros(k), np.zeros((k, d)), np.zeros((k, d, d)), np.zeros((k, d, d))
    )
    found.count[j] = n
    found.force[j] = head(totals.y[:, None])[:, 0] - x @ totals.latents
    found.scatter[j] = head(head(totals.square).T) - along - along.T
    found.information[j] = n * head(part.forward(np.eye(d))) - view.times(x, totals.uncertain) @ x.T
    return found
