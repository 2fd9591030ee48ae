"""Expectation-maximisation of mixtures of probabilistic PCA, of which only noisy mixtures are observed.

The likelihood is that of `dichroic.inference.low_rank`.

The missing data are the components, the latents `z` and, in the standard step, the sources. With `z̄ = (1, z)` its
M-step regresses one source on its latents, over all observations and assignments in which component `k` takes
part,

    (μ_k, B_k) = (Σ r E[x z̄ᵀ]) (Σ r E[z̄ z̄ᵀ])⁻¹,   τ = Σ r E‖x − μ_k − B_k z‖² / (n D),

(Tipping and Bishop, Neural Computation 11, 1999; Ghahramani and Hinton, CRG-TR-96-1), and lets the latents have
the mean and covariance `Ψ_k` that they have, which is absorbed: `U_k = B_k Ψ_k^½` (parameter-expanded EM, Liu,
Rubin and Wu, Biometrika 85, 1998: fewer steps, and the evidence does not fall either). With the columns
`X = (A μ_k, A U_k)` of all components, all that observations say is

    E = Σ r E[z̄ z̄ᵀ],   Y = Σ r y z̄ᵀ,   Σ r E[e z̄ᵀ] = Y − X E,   Σ r E‖Aᵀ B⁻¹ e‖²,

over pairs of components that are in an assignment together. No matrix of D × D entries is formed.

In terms of these sums the standard step is `(μ_k, B_k) ← (μ_k, U_k) + τ G_k (Σ r E[z̄ z̄ᵀ])⁻¹` with the force
`G_k = Σ r Aᵀ B⁻¹ E[e z̄ᵀ]`: it stands still where `τ` is far below the noise. The step taken first has the
observations in place of the source as what the latents explain, `1 / h` in place of `τ`, with the mean `h` over
observations of a diagonal bound of `Aᵀ B⁻¹ A` (itself for diagonal operators, 0 where an entry is missing).
"""

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import equinox as eqx
import jax
import numpy as np
from scipy.special import logsumexp

from dichroic.config import MixtureConfig
from dichroic.inference.low_rank import LowRankView, moments
from dichroic.inference.low_rank_background import NEGLIGIBLE, Backgrounds, every_assignment
from dichroic.inference.low_rank_masked import DiagonalObservations, MaskedView, has_masked_view
from dichroic.inference.matrix_free import OperatorCache, SharedObservations, shared_groups
from dichroic.learning.mixture.low_rank_statistics import Totals, background_statistics
from dichroic.learning.mixture.m_step import Mixtures, maximise, monotone_em
from dichroic.learning.mixture.statistics import SufficientStatistics, merged
from dichroic.operators import Shape
from dichroic.priors import GaussianMixture
from dichroic.problem.batches import AnyObservations, every_block
from dichroic.problem.observations import Observations, is_shared
from dichroic.runtime.tracking import Clock

_FEW = 4  # assignments, or observations: for them components are picked only beyond, or only up to, as many
_NOTED = 2**27  # assignments of all observations, of which it is noted whether they are likely
_KEPT_BYTES = 128 * 2**20
_RENEWED = 5  # steps after which all assignments are looked at again
_ALIVE = 1e-2  # observations, below which a component stays as it is


class LatentSums(eqx.Module):
    """Sufficient statistics of one source.

    Per component `Σ r E[z̄ z̄ᵀ]` and `Σ r E[Aᵀ B⁻¹ e z̄ᵀ]`; in all `Σ r E‖x‖²` and `n`.

    And `scatter`, `Σ r ‖Aᵀ C_y⁻¹ (y − m)‖²`, with its expectation `information`, `Σ r tr(Aᵀ C_y⁻¹ A)`; and the
    `bound` `(D,)`, the sum of diagonal matrices that bound the `Aᵀ B⁻¹ A`.
    """

    inner: np.ndarray
    force: np.ndarray
    bound: np.ndarray
    square: float
    scatter: float
    information: float
    count: float


AnySums = LatentSums | SufficientStatistics


def low_rank_iteration(
    mixtures: Mixtures,
    views: Sequence[AnyObservations],
    names: Sequence[str],
    config: MixtureConfig,
    clock: Clock | None = None,
) -> tuple[Mixtures, float]:
    """`config.steps` EM steps of the sources `names`; all mixtures, and the mean log evidence before the last.

    Assignments of components that a step finds negligible for an observation are left out for it in the few after.
    """

    share = max(len(set(names) & set(obs.sources)) for obs in views)

    def update(mixtures: Mixtures, found: dict[str, AnySums], standard: bool) -> Mixtures:
        def new(name: str) -> GaussianMixture:
            mixture, sums = mixtures[name], found[name]
            if isinstance(sums, LatentSums):
                return maximise_low_rank(
                    mixture, sums, least=config.floor, damping=1 / share, standard=standard
                )
            floor = config.floor * float(mixture.scale) ** 2
            return maximise(mixture, sums, floor=floor, standard=standard)

        return {**mixtures, **{n: new(n) for n in names}}

    counter = itertools.count()
    near: dict[int, np.ndarray | None] = {}
    alike: dict[int, Groups] = {}  # of each block, where they take little memory

    def of_block(mixtures: Mixtures, i: int, obs: Observations) -> tuple[float, dict[str, AnySums]]:
        if i not in near:
            room = _NOTED - sum(a.size for a in near.values() if a is not None)
            near[i] = every_assignment(mixtures, obs, room)
        if i not in alike and sum(g.nbytes for g in alike.values()) <= _KEPT_BYTES:
            alike[i] = Groups(obs)
        return low_rank_statistics(mixtures, obs, names, near[i], alike.get(i))

    def own(mixtures: Mixtures) -> tuple[float, dict[str, AnySums]]:
        return _added(of_block(mixtures, i, obs) for i, obs in enumerate(every_block(views)))

    def evaluate(mixtures: Mixtures) -> tuple[float, dict[str, AnySums]]:
        if next(counter) % _RENEWED == 0:
            near.clear()
        return views[0].total(partial(own, mixtures))

    mixtures, value = monotone_em(
        mixtures, evaluate, update, steps=config.steps, tolerance=1e-9, clock=clock
    )
    return mixtures, value / sum(obs.count for obs in views)


class Groups:
    """Observations grouped by what they share; worked out once, where that takes little memory."""

    def __init__(self, obs: Observations):
        self.obs, self.operators = obs, OperatorCache()
        self.one = SharedObservations(obs, self.operators) if is_shared(obs) else None
        self._kept: list[SharedObservations] | None = None

    @cached_property
    def diagonal(self) -> DiagonalObservations | None:
        """Observations that differ in missing entries and noise alone, where operators are diagonal."""
        return DiagonalObservations.of(self.obs)

    @property
    def nbytes(self) -> int:
        """The memory that several groups take: copies of the observations, masks and variances of noise."""
        return 0 if self.one else 24 * self.obs.count * self.obs.size

    def several(self) -> Iterable[SharedObservations]:
        """The groups."""
        if self._kept is None:
            found = (some for _, some in shared_groups(self.obs, self.operators))
            if self.nbytes > _KEPT_BYTES:
                return found
            self._kept = list(found)
        return self._kept


def low_rank_statistics(
    mixtures: Mixtures,
    obs: Observations,
    names: Collection[str] | None = None,
    near: np.ndarray | None = None,
    alike: Groups | None = None,
) -> tuple[float, dict[str, AnySums]]:
    """`Σ_i log p(y_i)`, and the sums of every source that the view sees, or of those among `names`.

    `near` `(J, T, n)` says which assignments observations that share everything may be of, before which
    backgrounds; it is narrowed to those that are not negligible. `alike` is `Groups(obs)`, where that is known.
    """
    names = obs.sources if names is None else names
    alike = alike or Groups(obs)
    alike.operators.forget()
    if alike.one:
        return _shared_statistics(mixtures, alike.one, names, near)
    mixtures = jax.tree.map(np.asarray, dict(mixtures))  # components are picked many times
    if alike.diagonal is not None and has_masked_view(mixtures, obs.sources):
        view = MaskedView(mixtures, alike.diagonal)
        return _masked_statistics(view, mixtures, names, None if near is None else near[0])
    return _added(_statistics_of_few(mixtures, some, names) for some in alike.several())


def _statistics_of_few(
    mixtures: Mixtures,
    obs: SharedObservations,
    names: Collection[str],
) -> tuple[float, dict[str, AnySums]]:
    """Statistics of observations that share everything; of few, by the components alone that they may be of."""
    assignments = math.prod(mixtures[k].log_weights.size for k in obs.sources)
    if obs.count > _FEW or assignments < _FEW:
        return _shared_statistics(mixtures, obs, names)
    kept = Backgrounds(mixtures, obs).likely()
    picked = {k: mixtures[k].pick(i) for k, i in kept.items()}
    value, sums = _shared_statistics(picked, obs, names)
    return value, {k: _among(s, kept[k], mixtures[k]) for k, s in sums.items()}


def _masked_statistics(
    view: MaskedView, mixtures: Mixtures, names: Collection[str], near: np.ndarray | None
) -> tuple[float, dict[str, AnySums]]:
    """Statistics of observations that differ in missing entries and noise, all at once.

    `near` `(T, n)` is narrowed to the assignments that are not negligible.
    """
    data, learned = view.data, [k for k in view.names if k in names]
    if near is None:
        near = np.ones((len(view.assignments), len(data.y)), bool)
    scores = view.scores(near)
    log_evidence = np.asarray(logsumexp(scores, axis=1))
    shares = np.exp(scores - log_evidence[:, None])
    likely = ~(shares <= NEGLIGIBLE).T  # NaN is
    near &= likely
    inner = {k: np.zeros((len(c), *(c.shape[2],) * 2)) for k, c in view.sources.items()}
    force = {k: np.zeros(view.sources[k].shape) for k in learned}
    squares = {k: (view.weights * data.gains[k]) ** 2 for k in learned}
    norm = {k: float(np.sum(squares[k] * data.y**2)) for k in learned}
    lost = dict.fromkeys(learned, 0.0)
    for t in np.flatnonzero(likely.any(axis=1)).tolist():
        rows = likely[t]
        share, found, columns = shares[rows, t], view.posterior(t, rows), view.of_assignment(t)
        means = share[:, None] * found.latents
        spread = share[:, None, None] * found.covariance
        second = means[:, :, None] * found.latents[:, None, :] + spread
        for name, k in zip(view.names, view.assignments[t], strict=True):
            if name not in learned:
                continue
            span, gain = view.spans[name], data.gains[name]
            inner[name][k] += second[:, span, span].sum(axis=0)
            own = np.tensordot(view.weights[rows], second[:, :, span], (0, 0))  # (M, R, 1 + R)
            left = view.weighted[rows].T @ means[:, span] - np.einsum("mr,mrs->ms", columns, own)
            force[name][k] += gain[:, None] * left
            weights = squares[name][rows]
            pairs = lambda a, w=weights: np.tensordot(w, a, (0, 0))
            along = np.einsum("mr,ms,mrs->", columns, columns, pairs(second), optimize=True)
            norm[name] += float(along) - 2 * float(
                np.sum(means * ((weights * data.y[rows]) @ columns))
            )
            lost[name] += float(
                np.einsum("mr,ms,mrs->", columns, columns, pairs(spread), optimize=True)
            )
    count = float(len(data.y))
    found_sums: dict[str, AnySums] = {}
    for name in learned:
        bound = np.sum(data.gains[name] ** 2 * view.weights, axis=0)
        found_sums[name] = _latent_sums(
            mixtures[name],
            inner[name],
            force[name],
            bound,
            float(bound.sum()),
            norm[name],
            lost[name],
            count,
        )
    return float(log_evidence.sum()), found_sums


def _among(sums: AnySums, index: np.ndarray, mixture: GaussianMixture) -> AnySums:
    """Sums of the components `index`, as those of all components of `mixture`."""

    def spread(a: np.ndarray) -> np.ndarray:
        out = np.zeros((mixture.log_weights.size, *a.shape[1:]))
        out[index] = a
        return out

    if isinstance(sums, LatentSums):
        return replace(sums, inner=spread(sums.inner), force=spread(sums.force))
    return jax.tree.map(spread, sums)


def _added(parts: Iterable[tuple[float, dict[str, AnySums]]]) -> tuple[float, dict[str, AnySums]]:
    value, sums = 0.0, {}
    for here, found in parts:
        value += here
        sums = merged(sums, found)
    return value, sums


def _shared_statistics(
    mixtures: Mixtures,
    obs: SharedObservations,
    names: Collection[str],
    near: np.ndarray | None = None,
) -> tuple[float, dict[str, AnySums]]:
    """Statistics of observations that share their operators, noise and missing entries."""
    behind, value = Backgrounds(mixtures, obs), 0.0
    totals = [Totals(b, names) for b in behind.each]
    for rows, y in behind.chunks(near):
        found = behind.given(y, None if near is None else near[:, :, rows])
        value += float(found.log_evidence.sum())
        each = zip(totals, found.rows, found.residuals, found.given, strict=True)
        for j, (total, some, residual, given) in enumerate(each):
            total.add(residual, given, found.log_evidence[some])
            if near is not None:
                near[j, :, rows] = found.likely(j)
    _, sums = _added((0.0, _sums_of(mixtures, total)) for total in totals)
    return value, sums


def _sums_of(mixtures: Mixtures, totals: Totals) -> dict[str, AnySums]:
    """The sums of every source before one background."""
    view, inner = totals.view, totals.assignments + totals.uncertain
    found: dict[str, AnySums] = {}
    for name, square in totals.squares.items():
        back = view.parts[name].back
        x, xy = back(view.solved), back(totals.solved)  # Aᵀ B⁻¹ X, and Aᵀ B⁻¹ Y
        xe = view.times(x, inner)
        norm = square - 2 * np.sum(x * xy) + np.sum(x * xe)
        lost = float(np.sum(x * view.times(x, totals.uncertain)))
        left, own = (xy - xe)[:, view.blocks[name]], view.own(name, inner)
        count = float(totals.count.sum())
        found[name] = _sums(view, name, mixtures[name], own, left, norm, lost, count)
    behind = [k for k in totals.background.parts if k in totals.names]
    return found | {k: background_statistics(k, mixtures[k], totals) for k in behind}


def _sums(
    view: LowRankView,
    name: str,
    mixture: GaussianMixture,
    own: np.ndarray,
    left: np.ndarray,
    norm: float,
    lost: float,
    count: float,
) -> LatentSums:
    """The sums of one source: `x = (μ, U) z̄ + √τ ε`, `E[√τ ε | y, z] = τ Aᵀ B⁻¹ e`."""
    k, width, _ = own.shape
    force = left.reshape(-1, k, width).swapaxes(0, 1)
    information = count * view.base.traces[name]
    bound = count * view.information_bound(name)
    return _latent_sums(mixture, own, force, bound, information, norm, lost, count)


def _latent_sums(
    mixture: GaussianMixture,
    inner: np.ndarray,
    force: np.ndarray,
    bound: np.ndarray,
    information: float,
    norm: float,
    lost: float,
    count: float,
) -> LatentSums:
    """The sums of one source, of which `lost` is the part of `norm` that comes from `V[z]`.

    `norm` is `Σ r E‖Aᵀ B⁻¹ e‖²`, and `information` `Σ tr(Aᵀ B⁻¹ A)`.
    """
    columns, floor = moments(mixture)
    spread = floor**2 * (norm - information) + count * floor * mixture.dim
    along = np.sum((columns.swapaxes(1, 2) @ columns) * inner)
    square = along + 2 * floor * np.sum(columns * force) + spread
    return LatentSums(
        inner, force, bound, float(square), float(norm - lost), float(information - lost), count
    )


def maximise_low_rank(
    mixture: GaussianMixture,
    sums: LatentSums,
    *,
    least: float,
    damping: float = 1.0,
    standard: bool = False,
) -> GaussianMixture:
    """The M-step of one source; `least` is the smallest floor, relative to the source's variance.

    The floor is by the fixed point of `dichroic.learning.mixture.em`, `τ ← τ scatter / information`, which does
    not stall where it should be 0, or by the formula above (`standard`), with which no step lowers the evidence.
    Components with next to no observations left stay as they are, with their small weight.
    """
    n = sums.inner[:, 0, 0]
    alive = n > _ALIVE
    columns, floor = moments(mixture)
    new, spread = columns.copy(), sums.square
    bound = np.where(sums.bound > 0, sums.bound, np.inf) / sums.count
    gain = floor if standard else (damping / bound)[:, None]
    for k in np.flatnonzero(alive):
        inner = sums.inner[k] + 1e-9 * np.trace(sums.inner[k]) * np.eye(len(sums.inner[k]))
        cross = columns[k] @ sums.inner[k] + floor * sums.force[k]
        fit = columns[k] + gain * np.linalg.solve(inner, sums.force[k].T).T
        spread += np.sum((fit.T @ fit) * sums.inner[k]) - 2 * np.sum(fit * cross)
        mean = sums.inner[k, 1:, 0] / n[k]
        psi = sums.inner[k, 1:, 1:] / n[k] - np.outer(mean, mean)
        values, vectors = np.linalg.eigh(0.5 * (psi + psi.T))
        new[k, :, 0] = fit[:, 0] + fit[:, 1:] @ mean
        new[k, :, 1:] = fit[:, 1:] @ (vectors * np.sqrt(np.maximum(values, 0)))
    ratio = sums.scatter / sums.information
    floor = spread / (sums.count * mixture.dim) if standard else floor * ratio
    floor = max(floor, least * float(mixture.scale) ** 2)
    return from_columns(np.maximum(n, 1e-6 * n.sum()), new, floor, mixture.shape)


def from_columns(
    weights: np.ndarray, columns: np.ndarray, floor: float, shape: Shape
) -> GaussianMixture:
    """The mixture with `(μ_k, U_k)` `(K, D, 1 + R)` and the floor `τ`."""
    basis, values, _ = np.linalg.svd(columns[:, :, 1:], full_matrices=False)
    return GaussianMixture(
        log_weights=np.log(weights / weights.sum()),
        means=columns[:, :, 0],
        basis=basis,
        variances=values**2,
        floor=np.full(len(weights), floor),
        shape=tuple(shape),
    )
