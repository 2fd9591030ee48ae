"""Box constraints: sources with known bounds, such as fluxes, intensities, counts.

Priors are mixtures of Gaussians, or networks over them, that know no bounds. A draw beyond them is moved to the
nearest value within, as the published code of DDPRISM does with images; where a source is exactly at a bound in
most places, as images of one object are, that halves the squared error there. The other sources are then drawn
again given it (`dichroic.inference.sampling`), so that all still add up to what was observed.
"""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Array
from scipy.special import ndtr

from dichroic.config import Bounds, Ends
from dichroic.errors import ConfigError
from dichroic.numerics.deterministic_map import map_observations
from dichroic.operators import Operator
from dichroic.operators.scaling import entry_scales
from dichroic.priors import GaussianMixture
from dichroic.problem.observations import Observations

_MOVED = 0.75  # of the squares of a source; half of them are below 0 where its mean is 0


def within_bounds(x: Mapping[str, np.ndarray], bounds: Bounds) -> dict[str, np.ndarray]:
    """Sources, each number moved to the nearest within its bounds."""
    return {k: np.clip(a, *_ends(bounds[k])) if k in bounds else a for k, a in x.items()}


def bounded(x: np.ndarray, op: Operator, bounds: Ends) -> np.ndarray:
    """A source moved within its bounds, in the units that its operator has it in."""
    low, high = _ends(bounds)
    units = entry_scales(op)
    return np.clip(x, np.float32(low / units), np.float32(high / units))


def _ends(bounds: Ends) -> tuple[float, float]:
    """The least and the most, infinite where there is none."""
    low, high = bounds
    return -math.inf if low is None else low, math.inf if high is None else high


def of_others(obs: Observations, x: Mapping[str, np.ndarray], first_index: int = 0) -> Observations:
    """`y − Σ_β A_β x_β` as observations of the other sources, given the sources `x` `(n, *shape)`.

    `first_index` is the number of the first observation: what is subtracted depends on no other.
    """
    known = {k: obs.operators[k] for k in x}
    y = map_observations(_residual, Observations(obs.y, known, obs.noise), dict(x), first_index)
    rest = {k: op for k, op in obs.operators.items() if k not in x}
    return Observations(y, rest, obs.noise)


def _residual(obs: Observations, x: dict[str, Array]) -> Array:
    return obs.y - obs.apply(x)


def check_learned(priors: Mapping[str, GaussianMixture], bounds: Bounds) -> None:
    """Raise `ConfigError` where what was learned of a source contradicts its bounds.

    That is where most of it, by the squares of its numbers, would have to be moved: bounds in other units.
    """
    for name in set(bounds) & set(priors):
        low, high = _ends(bounds[name])
        mean, std = np.asarray(priors[name].location, float), float(priors[name].scale)
        moved = _excess((low - mean) / std) + _excess((mean - high) / std)
        share = float(np.sum(moved) / np.sum(1 + (mean / std) ** 2))
        if share > _MOVED:
            raise ConfigError(
                f"fit.bounds.{name}: [{low:g}, {high:g}], but what the observations say of {name!r} has a mean of "
                f"{mean.mean():.3g} and a standard deviation of {std:.3g}: bounds are in the units of the source"
            )


def _excess(z: np.ndarray) -> np.ndarray:
    """`E[max(z − u, 0)²]` of a standard normal number `u`."""
    z = np.clip(z, -40, 1e6)
    return (1 + z**2) * ndtr(z) + z * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
