"""Scores of posterior draws and of priors, as plain data. What needs a truth is left out where there is none."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from dichroic.config import Bounds
from dichroic.inference.constraints import within_bounds
from dichroic.metrics import (
    coverage,
    frechet_distance,
    pqmass,
    psnr,
    rank_histogram,
    sinkhorn_divergence,
)

Draws = Mapping[str, np.ndarray]
LEVEL = 0.9


def posterior_scores(
    draws: Draws,
    truth: Draws,
    data_range: Mapping[str, float],
    first: int,
    bounds: Bounds = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Scores of draws `(S, n, *shape)` against the truth `(n, *shape)`, by source.

    PSNR in dB of one draw (of the `first` observations too, those that the limit is known for) and of the
    mean of all draws, coverage of 90% intervals and its standard error, and the p-value of flat ranks
    (simulation-based calibration). Of a source with `bounds`, PSNR of draws moved within these too, whether a
    method knows of them or not.
    """
    known = {k: x for k, x in draws.items() if k in truth}
    found = {k: _posterior(x, truth[k], data_range[k], first) for k, x in known.items()}
    inside = within_bounds({k: x for k, x in known.items() if k in bounds}, bounds)
    for k, x in inside.items():
        found[k]["within"] = _psnr(x, truth[k], data_range[k])
    return found


def _posterior(x: np.ndarray, truth: np.ndarray, span: float, first: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        **_psnr(x, truth, span),
        "psnr_first": psnr(x[0, :first], truth[:first], data_range=span),
        "observations": len(truth),
    }
    if len(x) > 1:
        inside = coverage(x, truth, level=LEVEL)
        ranks = rank_histogram(x, truth, bins=min(10, len(x) + 1))
        found |= {"coverage": inside.value, "coverage_error": inside.standard_error}
        found |= {"ranks": ranks.frequencies.tolist(), "ranks_p": ranks.p_value}
    return found


def _psnr(x: np.ndarray, truth: np.ndarray, span: float) -> dict[str, float]:
    """The PSNR of one draw and of the mean of all draws."""
    of = partial(psnr, truth=truth, data_range=span)
    return {"psnr": of(x[0]), "psnr_mean": of(x.mean(axis=0))}


def distances(
    x: np.ndarray,
    y: np.ndarray,
    points: int,
    seed: int,
    features: Callable[[np.ndarray], np.ndarray] | None = None,
    transport: bool = True,
) -> dict[str, Any]:
    """PQMass (χ² per degree of freedom) of two samples, and, with `transport`, Sinkhorn's divergence.

    The latter with squared cost and ε = 10⁻³. With `features` of a sample, the Fréchet distance of these too.
    """
    a, b = (np.asarray(u, float)[:points].reshape(min(len(u), points), -1) for u in (x, y))
    n = min(len(a), len(b))
    found: dict[str, Any] = {"points": n}
    if transport:
        cost = sinkhorn_divergence(a[:n], b[:n])
        found |= {"sinkhorn": cost.value, "sinkhorn_converged": cost.converged}
    regions = min(100, n // 5)
    if regions >= 2:
        found["pqmass"] = pqmass(a[:n], b[:n], regions=regions, seed=seed).chi2_per_dof
    if features is not None:
        found["frechet"] = frechet_distance(features(x[:n]), features(y[:n]))
    return found
