"""What keeps values that are not finite out of a fit: a clear error, or the last that were good.

An EM step looks after itself (`dichroic.learning.mixture.m_step`), and so does that of operators; here are the
training of a network, posterior draws, and what an iteration leaves behind.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dichroic.errors import DataError, RunError
from dichroic.inference.samplers import Draws
from dichroic.learning.data import Data
from dichroic.numerics.finite import finite
from dichroic.priors import Denoiser, DiffusionPrior
from dichroic.problem.observations import Observations
from dichroic.runtime.tracking import warn

ADVICE = (
    "Iterations run in single precision, numbers up to 3e38 and some seven digits: look for observations that "
    "are far from the others, noise far below what is seen, and views or operators of very unlike size"
)
_FAR = 1e4  # medians of a view, beyond which an observation is far from the others


def guarded(iteration: Callable[..., tuple[Any, Any]], state: Any, *rest: Any) -> tuple[Any, Any]:
    """What the `iteration` from `state` gives: the next state, and what was measured.

    Raises `RunError` where it cannot be computed, or leaves values of sources or operators that are not finite.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
            new, metrics = iteration(state, *rest)
    except (np.linalg.LinAlgError, DataError) as error:
        raise RunError(_failed(state, f"cannot be computed: {error}")) from error
    parts = {f.name: getattr(new, f.name) for f in dataclasses.fields(new)}
    tables = {which: part for which, part in parts.items() if isinstance(part, dict)}
    bad = [f"{which} {k}" for which, t in tables.items() for k, v in t.items() if not finite(v)]
    if bad:
        raise RunError(_failed(state, f"gave values that are not finite: {', '.join(bad)}"))
    return new, metrics


def _failed(state: Any, why: str) -> str:
    return f"iteration {state.total + 1} ({state.phase}) {why}; the iterations before it are kept. {ADVICE}"


def no_prior(names: Sequence[str], evidence: float, score: float, data: Data) -> RunError:
    """What to raise where the first prior of `names` explains nothing, so that there is none to go back to."""
    views = [
        v for v in zip(data.names, data.train, data.test, strict=True) if names[0] in v[1].sources
    ]
    parts = [(name, block) for name, *both in views for obs in both for block in obs.blocks()]
    far = [_far(name, block, slice(None)) for name, block in parts]
    return RunError(
        f"the first prior of {' and '.join(names)} has a log evidence of {evidence:.3g}, and {score:.3g} on "
        f"held-out observations; the iterations before this one are kept. {'; '.join(filter(None, far)) or ADVICE}"
    )


def _far(view: str, obs: Observations, among: Any) -> str | None:
    """What to say where one of the observations `among` those of a view is far from the others."""
    reach = np.nan_to_num(np.abs(np.asarray(obs.y))).max(axis=-1)
    most, usual = reach[among].max(), np.median(reach)
    if most <= _FAR * usual:
        return None
    return (
        f"An observation of {view!r} reaches {most:.3g}, where half of them stay below {usual:.3g}: leave it "
        "out, or mask it"
    )


def _draws_fault(
    view: str, obs: Observations, draws: Draws, denoisers: Mapping[str, Denoiser]
) -> str | None:
    """What to say where draws of the view `view` hold values that are not finite; `None` where none do."""
    flat = (x.reshape(*x.shape[:2], -1) for x in draws.x.values())
    bad = np.any([~np.isfinite(x).all(axis=-1) for x in flat], axis=0)
    if not bad.any():
        return None
    touched = bad.any(axis=0)
    return (
        f"view {view!r}: {bad.sum():,} of {bad.size:,} posterior draws are not finite, those of "
        f"{touched.sum():,} of {touched.size:,} observations. "
        f"{_far(view, obs, touched) or _unsteady(obs, denoisers) or ADVICE}"
    )


def _unsteady(obs: Observations, denoisers: Mapping[str, Denoiser]) -> str | None:
    networks = [k for k in obs.sources if isinstance(denoisers[k], DiffusionPrior)]
    if not networks:
        return None
    return (
        f"The likely cause is the network of {' and '.join(networks)}, far from what it has seen: a lower "
        "diffusion.learning_rate, more sampler.steps or diffusion.covariance 'base' are steadier"
    )


def check_draws(
    view: str, obs: Observations, draws: Draws, denoisers: Mapping[str, Denoiser]
) -> None:
    """Raise `RunError` where draws of the view `view` hold values that are not finite."""
    if fault := _draws_fault(view, obs, draws, denoisers):
        raise RunError(f"{fault}. The iterations before this one are kept")


def usable(view: str, obs: Observations, draws: Draws, denoisers: Mapping[str, Denoiser]) -> bool:
    """Whether the draws of the view `view` can be scored; says so where they cannot."""
    fault = _draws_fault(view, obs, draws, denoisers)
    if fault:
        warn(f"no scores of {fault}")
    return fault is None
