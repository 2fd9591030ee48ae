"""Where mixtures start: the first Gaussian of a source, scales of its entries, components split in two."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import numpy as np

from dichroic.learning.mixture.low_rank_initialisation import initial_low_rank, mean_gain
from dichroic.learning.mixture.m_step import Mixtures
from dichroic.priors import Denoiser, GaussianMixture, gaussian
from dichroic.priors.stationary import split_stationary
from dichroic.problem.batches import AnyObservations

MIN_SCALE = 1e-3  # of an entry of a source, relative to the root mean square of all


_EVEN = 0.5  # geometric mean of variances over their mean; digits have 0.26, grass and sky 0.9 to 1


def initial_gaussians(
    names: Sequence[str],
    views: Sequence[AnyObservations],
    known: Mapping[str, Denoiser],
    rank: int | None,
    stationary: Mapping[str, int] = MappingProxyType({}),
) -> Mixtures:
    """One Gaussian for each of the sources `names`, which are new; `stationary` along so many of their axes."""
    mixtures = {k: m for k, m in known.items() if k not in names and isinstance(m, GaussianMixture)}
    start = partial(initial_gaussian, views=views, group=names, known=mixtures, rank=rank)
    return {n: start(n, stationary=stationary.get(n, 0)) for n in names}


def initial_gaussian(
    name: str,
    views: Sequence[AnyObservations],
    group: Sequence[str],
    *,
    known: Mixtures | None = None,
    rank: int | None = None,
    stationary: int = 0,
) -> GaussianMixture:
    """A Gaussian with the variance that explains the power of the views, shared equally by the `group`.

    Isotropic; or, with a `rank`, from the moments that the sources `known` leave (`initial_low_rank`), but for one
    that is to be `stationary` along so many axes. At least one of `views` sees it: see
    `dichroic.learning.data.prepare`.
    """
    seeing, powers = [obs for obs in views if name in obs.sources], []
    for obs in seeing:
        some = obs.head(64)
        gain = sum(mean_gain(some, n) for n in obs.sources if n in group)
        power = float(np.mean(np.sum(np.asarray(some.y) ** 2, axis=-1)))
        powers.append(power / max(gain, 1e-30))
    variance, shape = max(min(powers), 1e-30), seeing[0].operators[name].in_shape
    if rank is not None and not stationary:
        return initial_low_rank(name, seeing, rank, variance, known or {}, len(group))
    white = gaussian(np.zeros(shape), variance * np.eye(math.prod(shape)))
    return replace(white, stationary=stationary)


def chosen_scales(gaussians: Mapping[str, GaussianMixture], choice: str) -> dict[str, np.ndarray]:
    """The units, `(*shape)`, of those sources that are to have some, of which each is one Gaussian yet.

    By `"auto"` these are the ones of whose entries some vary much less than others.
    """
    found = {n: deviations(g) for n, g in gaussians.items()} if choice != "common" else {}
    evenness = lambda s: math.exp(np.mean(np.log(s**2))) / np.mean(s**2)
    return {n: s for n, s in found.items() if choice == "per-entry" or evenness(s) < _EVEN}


def deviations(mixture: GaussianMixture) -> np.ndarray:
    """The standard deviation of each number of one Gaussian, `(*shape)`, relative to their root mean square."""
    basis, variances = np.asarray(mixture.basis[0], np.float64), np.asarray(mixture.variances[0])
    square = basis**2 @ variances + float(mixture.floor[0])
    relative = np.sqrt(square / square.mean())
    return np.maximum(relative, MIN_SCALE).reshape(mixture.shape)


def split_components(mixture: GaussianMixture, components: int) -> GaussianMixture:
    """Up to twice as many components, at most `components`: the heaviest are split in two.

    A component `N(μ, C)` with principal axis `λ u uᵀ` becomes `N(μ ± √(λ/2) u, C − ½ λ u uᵀ)`, which
    keeps its mean and covariance; of a stationary one see `split_stationary`.
    """
    log_weights, means, variances = (
        np.array(a, np.float64) for a in (mixture.log_weights, mixture.means, mixture.variances)
    )
    basis, floor = np.asarray(mixture.basis, np.float64), np.asarray(mixture.floor, np.float64)
    parents = np.argsort(-log_weights)[: max(0, components - log_weights.size)]
    if mixture.stationary:
        return split_stationary(mixture, parents)
    which = np.argmax(variances[parents], axis=1)
    along = floor[parents] if mixture.full_rank else np.zeros(len(parents))
    value = variances[parents, which] + along
    axis = np.sqrt(value / 2)[:, None] * basis[parents, :, which]
    log_weights[parents] -= np.log(2)
    child_means = means[parents] + axis
    means[parents] -= axis
    variances[parents, which] = np.maximum(value / 2 - along, 0)
    grown = lambda a: np.concatenate([a, a[parents]])
    return GaussianMixture(
        log_weights=grown(log_weights),
        means=np.concatenate([means, child_means]),
        basis=grown(basis),
        variances=grown(variances),
        floor=grown(floor),
        shape=mixture.shape,
    )
