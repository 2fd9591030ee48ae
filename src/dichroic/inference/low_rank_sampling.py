"""Joint posterior draws of high-dimensional sources, whose priors are of low rank or corrections of such.

*Exact* draws where all priors are mixtures. Where networks correct them, the reverse chain of
`sample.AncestralSampler`: given its noised value a source is the mixture's posterior, whose components have
covariances of low rank plus a floor, with means moved by the network; given the observation too, a draw of `x` is
then the same algebra as an exact one, at every noise level. One evaluation of each network a step, no Jacobian and
no iterative solve; for a network of zero the chain is exact at any number of steps.

The last bits of a product of matrices depend on how many rows it has, so rows are taken in batches of one size,
the last filled up: a draw does not depend on how many others there are. They depend on the number of threads of a
product too, so it is one; there are as many batches at once as cores instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from dichroic.inference.low_rank import Given, gains
from dichroic.inference.low_rank_background import Background, Backgrounds
from dichroic.inference.matrix_free import SharedObservations, shared_groups
from dichroic.inference.posterior import EXACT_LIMIT
from dichroic.inference.samplers import Draws, Progress, Sampler, observation_keys
from dichroic.numerics.batching import in_batches, split, take
from dichroic.numerics.deterministic_map import BATCH_WIDTH
from dichroic.operators.noise import Noise
from dichroic.priors import Denoiser, DiffusionPrior, GaussianMixture
from dichroic.priors.diffusion import NETWORK_BATCH, corrections
from dichroic.problem.observations import Observations, is_shared
from dichroic.runtime.blocks import spans
from dichroic.runtime.hardware import in_threads

_CHUNK_BYTES = 256 * 2**20
_KEPT_BYTES = 2 * 2**30  # of views, prepared once for all chunks
Priors = Mapping[str, GaussianMixture | DiffusionPrior]
Alike = list[tuple[np.ndarray, SharedObservations]]  # with their numbers
Map = Callable[..., Iterable[Any]]  # of a function over batches


@dataclass(frozen=True)
class Normals:
    """Random numbers of one draw of `n` observations: what picks an assignment, latents, sources, and noise."""

    uniform: np.ndarray
    latents: np.ndarray
    sources: dict[str, np.ndarray]
    noise: np.ndarray

    def rows(self, index: np.ndarray) -> "Normals":
        """The entries of the rows `index`."""
        x = {k: v[index] for k, v in self.sources.items()}
        return Normals(self.uniform[index], self.latents[index], x, self.noise[index])


@dataclass(frozen=True)
class Noised:
    """A source given noised values: `m_k = offset + (μ, F)_k · coefficients`, with log weights `(n, K)`."""

    log_weights: np.ndarray
    coefficients: np.ndarray
    offset: np.ndarray

    def rows(self, index: np.ndarray) -> "Noised":
        """The entries of the rows `index`."""
        return Noised(self.log_weights[index], self.coefficients[index], self.offset[index])


def is_low_rank_prior(denoiser: Denoiser) -> bool:
    """Whether a denoiser is a mixture of low rank or of many entries, or one whose means a network moves."""
    if isinstance(denoiser, DiffusionPrior):
        return denoiser.covariance == "base" and is_low_rank_prior(denoiser.base)
    low = lambda mixture: not mixture.full_rank or mixture.dim > EXACT_LIMIT
    return isinstance(denoiser, GaussianMixture) and low(denoiser)


def low_rank_draws(
    priors: Priors,
    obs: Observations,
    key: PRNGKeyArray,
    *,
    sampler: Sampler | None = None,
    n_draws: int = 1,
    first_index: int = 0,
    progress: Progress | None = None,
) -> Draws:
    """Draws of all sources of every observation; with a `sampler`, by its steps and schedule, else exact.

    An observation's draws depend on `key`, its number and that of the draw.
    """
    priors, n = {k: priors[k] for k in obs.sources}, obs.count
    walk = _Walk(priors, obs, sampler)
    found: dict[str, list[np.ndarray]] = {k: [] for k in priors}
    for start, stop in walk.chunks(n_draws):
        index = jnp.asarray(first_index + np.arange(start, stop))
        keys = jax.vmap(lambda d, index=index: observation_keys(key, d, index))(jnp.arange(n_draws))
        with in_threads() as each:
            x = walk.draw(np.arange(start, stop), keys.reshape(-1), each)
        for name, values in x.items():
            shaped = values.reshape(n_draws, stop - start, *priors[name].shape)
            found[name].append(shaped.astype(np.float32))
        if progress:
            progress(stop * n_draws, n * n_draws)
    zero = np.zeros((n_draws, n), np.float32)
    x = {k: np.concatenate(x, axis=1) for k, x in found.items()}
    return Draws(x, zero, zero, zero + 1, zero.astype(int))


class _Walk:
    """Noise levels, from the highest to the lowest, at each of which every source is drawn; one without levels."""

    def __init__(self, priors: Priors, obs: Observations, sampler: Sampler | None):
        self.priors, self.obs = priors, obs
        self.bases = {k: p.base if isinstance(p, DiffusionPrior) else p for k, p in priors.items()}
        self.sigmas: list[dict[str, float]] = []
        self._shared: dict[int, Backgrounds] = {}
        if sampler is not None:
            levels = np.asarray(sampler.schedule.grid(sampler.steps), float)
            scales = {k: float(p.scale) for k, p in priors.items()}
            self.sigmas = [{k: s * level for k, s in scales.items()} for level in levels]
            self.start = {k: s * np.sqrt(1 + levels[0] ** 2) for k, s in scales.items()}

    def chunks(self, n_draws: int) -> list[tuple[int, int]]:
        """First and last of as many observations as can be drawn at once."""
        width = sum(1 + b.variances.shape[1] for b in self.bases.values())
        columns = sum(b.means.shape[0] * (1 + b.variances.shape[1]) for b in self.bases.values())
        numbers = sum(b.means.shape[1] for b in self.bases.values())
        each = 2 * columns + width + 3 * self.obs.size + 6 * numbers
        step = max(1, _CHUNK_BYTES // (8 * n_draws * each))
        return spans(self.obs.count, step)

    def draw(self, index: np.ndarray, keys: Array, each: Map) -> dict[str, np.ndarray]:
        """Draws of all sources `(S n, D)` of the observations `index` `(n,)`, one for each key."""
        some = take(self.obs, index)
        alike = list(shared_groups(some))
        normals = self._normals(some, keys, 0)
        if not self.sigmas:
            return self._draw(some, alike, 0, normals, None, each)
        x = {
            k: np.asarray(p.location, float).ravel() + self.start[k] * normals.sources[k]
            for k, p in self.priors.items()
        }
        for i, here in enumerate(self.sigmas):
            given = {k: noised(p, x[k], here[k], each) for k, p in self.priors.items()}
            drawn = self._draw(some, alike, i, self._normals(some, keys, 2 * i + 1), given, each)
            if i + 1 == len(self.sigmas):
                return drawn
            z = self._normals(some, keys, 2 * i + 2).sources
            x = {k: _bridge(x[k], drawn[k], z[k], here[k], self.sigmas[i + 1][k]) for k in x}
        raise AssertionError("there is at least one level")

    def _draw(
        self,
        some: Observations,
        alike: Alike,
        level: int,
        normals: Normals,
        given: dict[str, Noised] | None,
        each: Map,
    ) -> dict[str, np.ndarray]:
        """One draw at a level of every row, those that are `alike` (`groups`) together."""
        out = {k: np.empty((len(normals.uniform), p.means.shape[1])) for k, p in self.bases.items()}
        observed = np.asarray(some.y, np.float64)
        for part, same in alike:
            view = self._view(same, level)
            rows = np.arange(len(normals.uniform)).reshape(-1, some.count)[:, part].ravel()

            def own(batch: np.ndarray, view: Backgrounds = view) -> dict[str, np.ndarray]:
                y = view.seen * observed[batch % some.count]
                mine = None if given is None else {k: g.rows(batch) for k, g in given.items()}
                return _draw(view, y, normals.rows(batch), mine)

            batches, counts = zip(*_batches(rows), strict=True)
            for found, at, count in zip(each(own, batches), batches, counts, strict=True):
                for k, x in found.items():
                    out[k][at[:count]] = x[:count]
        return out

    def _view(self, alike: SharedObservations, level: int) -> Backgrounds:
        """The view of observations that share all; kept where all do and those of all levels are small."""
        if level in self._shared:
            return self._shared[level]
        sigmas = self.sigmas[level] if self.sigmas else None
        view = Backgrounds(self.bases, alike, sigmas=sigmas)
        if is_shared(self.obs) and view.nbytes * max(len(self.sigmas), 1) <= _KEPT_BYTES:
            self._shared[level] = view
        return view

    def _normals(self, some: Observations, keys: Array, number: int) -> Normals:
        sizes = tuple((k, b.means.shape[1]) for k, b in self.bases.items())
        width = sum(1 + b.variances.shape[1] for b in self.bases.values())
        n = len(keys)
        filled = np.minimum(np.arange(-(-n // BATCH_WIDTH) * BATCH_WIDTH), n - 1)
        often = take(some.noise, filled % some.count)
        u, z, x, eta = _random(keys[filled], jnp.asarray(number), often, sizes, width, some.size)
        to64 = lambda a: np.asarray(a[:n], np.float64)
        return Normals(to64(u), to64(z), {k: to64(v) for k, v in x.items()}, to64(eta))


def _batches(rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """`BATCH_WIDTH` of the rows at a time, the last ones filled up, and how many they are without that."""
    for start in range(0, len(rows), BATCH_WIDTH):
        count = min(BATCH_WIDTH, len(rows) - start)
        yield rows[np.minimum(np.arange(start, start + BATCH_WIDTH), len(rows) - 1)], count


def _draw(
    behind: Backgrounds, y: np.ndarray, normals: Normals, noised: dict[str, Noised] | None
) -> dict[str, np.ndarray]:
    """An assignment by its probability, a prior draw of it, moved to the posterior."""
    before = [_Before(b, y, noised) for b in behind.each]
    scores = np.concatenate([b.scores for b in before], axis=1)
    given = Given(scores, np.zeros(0), np.zeros(0))
    edges = np.cumsum(given.responsibilities, axis=1)
    t = np.sum(edges < normals.uniform[:, None] * edges[:, -1:], axis=1)
    which, t = np.divmod(np.minimum(t, edges.shape[1] - 1), before[0].scores.shape[1])
    found: dict[str, np.ndarray] = {}
    for j in np.unique(which):  # with all rows each time, by whose number products are rounded
        drawn = before[j].draw(t, normals, behind.slots)
        here = (which == j)[:, None]
        found = {k: np.asarray(np.where(here, x, found.get(k, x))) for k, x in drawn.items()}
    return found


class _Before:
    """Observations `y` `(n, M)` before one background: scores `(n, T)`, and draws given an assignment."""

    def __init__(self, background: Background, y: np.ndarray, noised: dict[str, Noised] | None):
        self.background, self.y, view = background, y, background.view
        parts, n = {**view.parts, **background.parts}, len(y)
        self.offsets: dict[str, Any] = dict.fromkeys(parts, 0.0)
        self.coefficients, weights = np.tile(view.spread_ones, (n, 1)), None
        first = {k: np.eye(1, background.source(k).shape[1]) for k in background.parts}
        self.wide = {k: np.repeat(one, n, axis=0) for k, one in first.items()}
        outside = np.zeros(y.shape)
        if noised is not None:
            self.offsets = {k: noised[k].offset for k in parts}
            flat = [noised[k].coefficients.reshape(n, -1) for k in view.parts]
            self.coefficients = np.concatenate([np.zeros((n, 0)), *flat], axis=1)
            self.wide = {k: noised[k].coefficients[:, j] for k, j in background.index.items()}
            pairs = zip(view.parts, view.assignments.T, strict=True)
            weights = sum((noised[k].log_weights[:, c] for k, c in pairs), np.zeros((n, 1)))
            own = (noised[k].log_weights[:, [j]] for k, j in background.index.items())
            weights = sum(own, weights)
            outside = sum((p.forward(self.offsets[k].T).T for k, p in parts.items()), outside)
        outside = sum((w @ background.columns(k).T for k, w in self.wide.items()), outside)
        given = view.given(y - outside, weights, self.coefficients if weights is not None else None)
        self.scores = given.scores + (background.log_weight if weights is None else 0.0)

    def draw(
        self, t: np.ndarray, normals: Normals, slots: Mapping[str, slice]
    ) -> dict[str, np.ndarray]:
        """A draw of all sources, given the assignments `t` `(n,)` of the view."""
        background, view = self.background, self.background.view
        latents = {k: normals.latents[:, at] for k, at in slots.items()}
        z = np.concatenate([np.zeros((len(t), 0)), *(latents[k] for k in view.parts)], axis=1)
        own = np.take_along_axis(self.coefficients, view.where[t], axis=1)
        spread = view.spread(t, own + np.where(view.ones, 0, z))
        x = {
            k: self.offsets[k]
            + spread[:, view.blocks[k]] @ p.source.T
            + np.sqrt(p.floor) * normals.sources[k]
            for k, p in view.parts.items()
        }
        wide, left = {}, self.y
        for k, mean in self.wide.items():
            w = np.concatenate([mean[:, :1], mean[:, 1:] + latents[k][:, 1:]], axis=1)
            wide[k] = self.offsets[k] + w @ background.source(k).T
            left = left - background.parts[k].forward(wide[k].T).T
        moved, v = view.moved(left, t, x, normals.noise)
        for k, prior in wide.items():
            along = v @ background.columns(k)[:, 1:]
            moved[k] = prior + along @ background.source(k)[:, 1:].T
        return moved


def noised(
    prior: GaussianMixture | DiffusionPrior, x_t: np.ndarray, sigma: float, each: Map = map
) -> Noised:
    """What the noised values `x_t` `(n, D)` say of a source."""
    base = prior.base if isinstance(prior, DiffusionPrior) else prior
    own = lambda some: [a[: some[1]] for a in _noised_batches(base, x_t[some[0]], sigma)]
    parts = each(own, _batches(np.arange(len(x_t))))
    log_weights, coefficients, offset = map(np.concatenate, zip(*parts, strict=True))
    if isinstance(prior, DiffusionPrior):
        offset = offset + _corrections(prior, x_t, sigma)
    return Noised(log_weights, coefficients, offset)


def _noised_batches(
    base: GaussianMixture, x_t: np.ndarray, sigma: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parts of `Noised`, of the mixture alone."""
    to64 = lambda a: np.asarray(a, np.float64)
    basis, means, variances = to64(base.basis), to64(base.means), to64(base.variances)
    extra, gain = gains(base, sigma)
    k, d, r = basis.shape
    rest = float(to64(base.floor).mean()) + sigma**2
    flat = basis.swapaxes(0, 1).reshape(d, k * r)
    z = (x_t @ flat).reshape(-1, k, r) - np.einsum("kd,kdr->kr", means, basis)
    distance = np.sum(x_t**2, axis=1)[:, None] - 2 * x_t @ means.T + np.sum(means**2, axis=1)
    inside = variances + rest
    outside = np.maximum(distance - np.sum(z**2, axis=2), 0) / rest + (d - r) * np.log(rest)
    log_weights = to64(base.log_weights) - 0.5 * (
        np.sum(z**2 / inside + np.log(inside), axis=2) + outside
    )
    top = log_weights.max(axis=1, keepdims=True)
    log_weights -= top + np.log(np.sum(np.exp(log_weights - top), axis=1, keepdims=True))
    ones = np.full((len(x_t), k, 1), 1 - gain)
    coefficients = np.concatenate([ones, np.sqrt(extra) * z / sigma], axis=2)
    return log_weights, coefficients, gain * x_t


def _corrections(prior: DiffusionPrior, x_t: np.ndarray, sigma: float) -> np.ndarray:
    """What the network adds to the mean, `(n, D)`; always of as many rows at once, by whose number XLA rounds.

    On a processor of few: more at once are no faster.
    """
    x = np.asarray(x_t, np.float32).reshape(-1, *prior.shape)
    width = BATCH_WIDTH if jax.default_backend() == "cpu" else NETWORK_BATCH
    filled = np.minimum(np.arange(max(len(x), width)), len(x) - 1)
    levels = np.full(len(filled), sigma, np.float32)
    correct = lambda *rows: corrections(prior, *map(jnp.asarray, rows))
    found = in_batches(correct, width, x[filled], levels)
    return found[: len(x)].reshape(x_t.shape)


@eqx.filter_jit
def _random(
    keys: Array,
    number: Array,
    noise: Noise,
    sizes: tuple[tuple[str, int], ...],
    width: int,
    size: int,
):
    """`(uniform, latents, {source: normal}, noise)` of each key."""
    own, shared = split(noise)

    def one(key: PRNGKeyArray, own: Noise):
        noise = eqx.combine(own, shared)
        key = jax.random.fold_in(key, number)
        u, z, e, *rest = jax.random.split(key, 3 + len(sizes))
        x = {k: jax.random.normal(kk, (d,)) for (k, d), kk in zip(sizes, rest, strict=True)}
        eta = noise.observed(size) * noise.sample(e, size)
        return jax.random.uniform(u), jax.random.normal(z, (width,)), x, eta

    return jax.vmap(one)(keys, own)


def _bridge(x: np.ndarray, drawn: np.ndarray, z: np.ndarray, here: float, there: float):
    r = (there / here) ** 2
    return drawn + r * (x - drawn) + there * np.sqrt(1 - r) * z
