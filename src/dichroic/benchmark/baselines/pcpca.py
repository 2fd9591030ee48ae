"""Probabilistic contrastive principal components (Li, Jones and Engelhardt, arXiv 2012.07977).

One source at a time has the target model `y_i ~ N(A_i μ, A_i W Wᵀ A_iᵀ + σ² I)`, where σ² takes up all that
is not the target; W and σ² maximise `log p(Y_fg) − γ log p(Y_bg)` over a foreground and a background: see
`pcpca_objective`. In a problem of several sources, with joint views:

- *Means* of all sources together by least squares over all views, weighted by the stated noise; both data
  sets are centred with them (the paper centres each with its own mean: the same where A = I).
- *Foreground* of a source: of the views that see it, one with the fewest sources; of those, the one where
  its share of the signal, `tr A_βᵀ Σ⁻¹ A_β` over that of all sources, is the largest.
- *Background*: of the views without it that see nothing but other sources of the foreground, the one with
  the most sources. If there is none, of the other views whose sources are all in the foreground, the one
  where its share is the smallest, if that is smaller than in the foreground. If there is none, γ = 0:
  probabilistic PCA of the foreground.
- *The background's operator* is that of its source with the largest share, other than the target, that has
  the target's shape; without such a source there is no background.
- *γ and r*, where they are not given, by the mean evidence of the held-out foreground with its stated noise,
  with `W Wᵀ` as the covariance of the target, and the like for the other sources: as chosen already, or, for
  those that come later in the order of learning, by probabilistic PCA of full rank. Candidates are
  r = 1, 2, 3, 4, 6, 8, …, D and γ = 0, 0.2, 0.4, 0.6, 0.8, 0.9 times n / m; above r = 64, a γ is given up
  when its evidence has fallen from rank to rank twice in succession. The search uses at most 2048 training
  observations of a view whose observations differ in operators, noise or missing entries.

A draw of a source is one from its own model given `y` less the means of the other sources.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from dichroic.benchmark.baselines import linear_gaussian as g
from dichroic.benchmark.baselines.fitted import Fitted, candidate_ranks
from dichroic.benchmark.baselines.pcpca_objective import Pair, Solution
from dichroic.errors import ConfigError
from dichroic.inference.samplers import Draws
from dichroic.inference.sampling import draw, predictive_chi2
from dichroic.learning.data import Data
from dichroic.numerics.batching import split, take
from dichroic.operators import Operator
from dichroic.operators.noise import IsotropicNoise, Masked, observed_entries
from dichroic.priors import Denoiser, gaussian
from dichroic.problem.batches import in_memory
from dichroic.problem.observations import Observations
from dichroic.problem.offsets import prepared
from dichroic.problem.problem import Problem, named_views
from dichroic.problem.view import View
from dichroic.problem.view_validation import check_view, with_operators
from dichroic.runtime.tracking import Tracker
from dichroic.separation.result import Separation

CONTRASTS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)  # candidates of γ m / n
_SEARCH: dict[str, Any] = {"iterations": 200, "tolerance": 1e-8}
_MANY = 64  # the largest rank at which all contrasts are tried


@dataclass(frozen=True)
class Role:
    """The views, by number, that a source is learned from, and the background's operator, by source."""

    foreground: int
    background: int | None = None
    operator: str = ""


def assign(name: str, views: Sequence[Observations], shares: Sequence[Mapping[str, float]]) -> Role:
    """Foreground and background of the source `name`: see above; `shares` per view and source."""
    seeing = [i for i, obs in enumerate(views) if name in obs.sources]
    first = min(seeing, key=lambda i: (len(shares[i]), -shares[i][name], i))
    within = lambda i: i != first and set(shares[i]) <= set(shares[first])
    without = [i for i in range(len(views)) if within(i) and name not in shares[i]]
    weaker = [i for i in seeing if within(i) and shares[i][name] < shares[first][name] - 1e-6]
    ranked = sorted(without, key=lambda i: -len(shares[i]))
    ranked += sorted(weaker, key=lambda i: shares[i][name])
    shape = views[first].operators[name].in_shape
    for i in ranked:
        alike = [k for k, op in views[i].operators.items() if k != name and op.in_shape == shape]
        if alike:
            return Role(first, i, max(alike, key=lambda k: shares[i][k]))
    return Role(first)


def signal_shares(data: g.Data) -> dict[str, float]:
    """`tr Σ_i A_βᵀ Σ_i⁻¹ A_β` of every source of a view, over the sum of all."""
    diagonal = np.diagonal(data.normal().matrix)
    parts = np.split(diagonal, np.cumsum(list(data.dims.values()))[:-1])
    return {k: float(p.sum() / diagonal.sum()) for k, p in zip(data.dims, parts, strict=True)}


def centred(obs: Observations, means: Mapping[str, np.ndarray]) -> np.ndarray:
    """`y − Σ_β A_β μ_β` over the sources of `means`, `(n, M)`, 0 where missing."""
    x = {
        k: jnp.asarray(means[k], obs.y.dtype).reshape(op.in_shape) if k in means else None
        for k, op in obs.operators.items()
    }
    return np.asarray(_centred(obs, {k: v for k, v in x.items() if v is not None}))


@eqx.filter_jit
def _centred(obs: Observations, x: dict[str, jax.Array]) -> jax.Array:
    rows, shared = split(obs)

    def one(row: Observations) -> jax.Array:
        o = eqx.combine(row, shared)
        part = Observations(o.y, {k: o.operators[k] for k in x}, o.noise)
        return o.noise.observed(o.size) * o.y - part.apply(x)

    return jax.vmap(one)(rows)


def alone(
    obs: Observations, y: np.ndarray, name: str, operator: Operator, std: float
) -> Observations:
    """Observations `y` of one source through white noise, with the missing entries of `obs`."""
    seen = np.asarray(observed_entries(obs.noise, obs.size))
    noise = IsotropicNoise(jnp.asarray(std))
    if not np.all(seen):
        noise = Masked(noise, jnp.asarray(seen[0] if len(seen) == 1 else seen))
    return Observations(jnp.asarray(y), {name: operator}, noise)


def noise_level(obs: Observations) -> float:
    """The mean variance of the stated noise over the observed entries."""
    some = take(obs, slice(0, 256))
    rows, shared = split(some)

    def one(row: Observations) -> tuple[jax.Array, jax.Array]:
        _, _, cov, seen = eqx.combine(row, shared).parts()
        return jnp.sum(seen * jnp.diagonal(cov)), jnp.sum(seen)

    power, count = jax.jit(jax.vmap(one))(rows)
    return float(jnp.sum(power) / jnp.sum(count))


class Pcpca(Fitted):
    """One contrastive principal component model per source; each is drawn from its own.

    >>> model = Pcpca(problem).fit()                               # doctest: +SKIP
    >>> model.separate("view2").draws["signal"]                    # doctest: +SKIP

    Args:
        problem: what to learn from.
        seed: of the held-out observations.
        gamma: weight γ of the background where there is one, `0 ≤ γ < n / m`.
        rank: of W, at most the size of the source.
        holdout: fraction of each view held out, where the view does not say which.

    `gamma` and `rank` are chosen by held-out evidence by default; `chosen` says which, and the views.
    """

    name = "PCPCA"

    def __init__(
        self,
        problem: Problem | None = None,
        *,
        seed: int = 0,
        gamma: float | None = None,
        rank: int | None = None,
        holdout: float = 0.1,
    ):
        if gamma is not None and not 0 <= gamma < np.inf:
            raise ConfigError(f"gamma: must be zero or positive and finite, got {gamma!r}")
        super().__init__(problem, seed=seed, holdout=holdout, gamma=gamma, rank=rank)

    def _learn(self, data: Data, tracker: Tracker) -> dict[str, Denoiser]:
        assert self.problem is not None
        began = time.perf_counter()
        search = _Search(data, self.settings["gamma"], self.settings["rank"])
        order = [name for group in data.order for name in group]
        for i, name in enumerate(order):
            self.chosen[name] = search.learn(name)
            row = {"iteration": i + 1, "phase": self.name, "sources": name}
            row |= {k: v for k, v in self.chosen[name].items() if isinstance(v, (int, float))}
            self.metrics.append({**row, "seconds": round(time.perf_counter() - began, 3)})
            tracker.iteration(self.metrics[-1])
            tracker.progress(self.name, i + 1, len(order))
        found, shapes = search.factors, self.problem.shapes
        return {
            k: gaussian(search.means[k].reshape(shapes[k]), found[k] @ found[k].T)
            for k in self.problem.names
        }

    def separate(
        self,
        view: View | str | Sequence[View],
        *,
        n_draws: int = 1,
        seed: int = 0,
        first_index: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Separation:
        """Posterior draws of every source of `view`, each by its own model; as `Separator.separate`."""
        views = named_views(view, self.problem)
        shapes = {k: d.shape for k, d in self._fitted().items()}
        views = [with_operators(v, shapes) for v in views]
        for v in views:
            check_view(v, shapes)
        obs, names = prepared(views, {}), list(self.denoisers)
        means = {k: np.asarray(d.location) for k, d in self.denoisers.items()}
        parts = []
        for i, name in enumerate(obs.sources):
            others = {k: m for k, m in means.items() if k != name}
            std = float(np.sqrt(self.chosen[name]["noise"]))
            own = alone(obs, centred(obs, others), name, obs.operators[name], std)
            key = jax.random.fold_in(jax.random.key(seed), names.index(name))
            report = _within(progress, i, len(obs.sources))
            options = {"n_draws": n_draws, "first_index": first_index, "progress": report}
            parts.append(draw({name: self.denoisers[name]}, own, key, self.config, **options))
        x = {k: v for part in parts for k, v in part.x.items()}
        residual = np.max([part.residual for part in parts], axis=0)
        converged = np.min([part.converged for part in parts], axis=0)
        steps = np.sum([part.steps for part in parts], axis=0)
        draws = Draws(x, parts[0].evidence, residual, converged, steps)
        return Separation(x, predictive_chi2(obs, draws, first_index), residual, converged, steps)


def _within(
    progress: Callable[[int, int], None] | None, part: int, parts: int
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None

    def say(done: int, total: int) -> None:
        progress(part * total + done, parts * total)

    return say


def _falling(scores: Sequence[float]) -> bool:
    """Have the last two fallen, each from the one before?"""
    return len(scores) > 2 and scores[-1] < scores[-2] < scores[-3]


class _Search:
    """The choice of γ and r of one source after another."""

    def __init__(self, data: Data, gamma: float | None, rank: int | None):
        self.data, self.gamma, self.rank = data, gamma, rank
        self.train = [in_memory(obs) for obs in data.train]
        views = [g.gather(obs) for obs in self.train]
        self.dims = {k: d for v in views for k, d in v.dims.items()}
        candidate_ranks(rank, self.dims)
        self.means = g.least_squares_means(views)
        self.shares = [signal_shares(v) for v in views]
        self.factors: g.Arrays = {}
        self._plain: g.Arrays = {}

    def learn(self, name: str) -> dict[str, Any]:
        """Fit the source `name`; returns what was chosen."""
        role = assign(name, self.train, self.shares)
        used = role.foreground, role.foreground if role.background is None else role.background
        counts = [self.train[i].count for i in used]
        contrasts = self._contrasts(name, role, counts)
        size = self.dims[name]
        ranks = candidate_ranks(self.rank and min(self.rank, size), {name: size})
        tried = self._try(name, role, contrasts, ranks)
        pair = self._pair(name, role)
        for score, contrast, (factor, noise, *_) in sorted(tried, key=lambda t: -t[0]):
            best = pair.best(contrast, factor.shape[1], (factor, noise))
            if best.bounded:
                self.factors[name] = best.factor
                found = {"gamma": contrast * counts[0] / counts[1], "rank": factor.shape[1]}
                found |= {"noise": best.noise, "heldout_log_evidence": score}
                return {**self._views(role), **found}
        raise ConfigError(
            f"gamma: with {self.gamma} the objective of {name!r} has no maximum (some entries are missing "
            "from more of the foreground than of the background); choose a smaller one"
        )

    def _views(self, role: Role) -> dict[str, str | None]:
        names = self.data.names
        background = None if role.background is None else names[role.background]
        return {"foreground": names[role.foreground], "background": background}

    def _contrasts(self, name: str, role: Role, counts: Sequence[int]) -> tuple[float, ...]:
        if role.background is None:
            return (0.0,)
        if self.gamma is None:
            return CONTRASTS
        most = counts[0] / counts[1]
        if self.gamma >= most:
            raise ConfigError(
                f"gamma: {self.gamma} leaves the objective of {name!r} without bound; it must be below "
                f"n / m = {most:.4g}, the foreground's observations over the background's"
            )
        return (self.gamma / most,)

    def _try(
        self, name: str, role: Role, contrasts: Sequence[float], ranks: Sequence[int]
    ) -> list[tuple[float, float, Solution]]:
        """`(held-out evidence, contrast, solution)` of the candidates that have a maximum."""
        pair = self._pair(name, role, search=True)
        held = g.gather(in_memory(self.data.test[role.foreground]))
        others = {k: self._stand_in(k) for k in held.dims if k != name}
        out, scores = [], {contrast: [] for contrast in contrasts}
        for rank in ranks:
            for contrast in contrasts:
                if rank > _MANY and _falling(scores[contrast]):
                    continue
                found = pair.best(contrast, rank, **_SEARCH)
                if found.bounded:
                    factors = {**others, name: found.factor}
                    score = g.mean_evidence([held], self.means, factors)
                    scores[contrast].append(score)
                    out.append((score, contrast, found))
        return out

    def _stand_in(self, name: str) -> np.ndarray:
        """The factor of another source: as learned, or by probabilistic PCA."""
        if name in self.factors:
            return self.factors[name]
        if name not in self._plain:
            role = Role(assign(name, self.train, self.shares).foreground)
            rank = min(self.rank or self.dims[name], self.dims[name])
            self._plain[name] = self._pair(name, role, search=True).best(0.0, rank).factor
        return self._plain[name]

    def _pair(self, name: str, role: Role, *, search: bool = False) -> Pair:
        def part(i: int, operator: str) -> g.Data:
            obs = g.few(self.train[i]) if search else self.train[i]
            y = centred(obs, self.means)
            return g.gather(alone(obs, y, name, obs.operators[operator], 1.0))

        background = None if role.background is None else part(role.background, role.operator)
        floor = noise_level(self.train[role.foreground])
        return Pair(name, part(role.foreground, name), background, floor)
