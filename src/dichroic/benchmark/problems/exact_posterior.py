"""The exact posterior of sources on known curves: what no method of separation can beat.

With every source on a known curve `x_β(s_β)`, `s_β ~ U(0, 1)`, the posterior of the coordinates is

    p(s | y) ∝ ℓ(s) = exp(−‖y − Σ_β A_β x_β(s_β)‖² / 2σ²),   s ∈ [0, 1]^S.

It is drawn from by rejection from a piecewise constant envelope on dyadic boxes `c` of `[0, 1]^S`. On a
box entry m of the mean lies in `[lo_cm, hi_cm]`, the sum over β of the range of `(A_β x_β)_m` on an
interval, so

    log ℓ ≤ log u_c = −½ Σ_m max(0, lo_cm − y_m, y_m − hi_cm)² / σ².

Boxes are halved along the axis on which the mean moves most until it moves by less than `width · σ`, and
left out where `u_c |c|` is negligible beside the evidence `Σ_c ℓ(centre of c) |c|`. A draw is a box with
probability ∝ `u_c |c|`, a point uniform in it, accepted with probability `ℓ(s) / u_c`: it is exact but
for the boxes left out, whose share of the posterior is bounded.

An interval is a number, as in a heap: 1 is [0, 1], and the halves of k are 2k and 2k + 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dichroic.benchmark.problems.manifolds import Manifold
from dichroic.errors import DataError, ShapeError
from dichroic.operators import Dense
from dichroic.problem.view import View

_LOST = 1e-6  # the share of the evidence that one round of halving may leave out
_TRIALS = 4_000_000  # proposals for the draws of one observation before giving up

Fit = Callable[[np.ndarray], np.ndarray]  # `log ℓ` `(n,)` at coordinates `(n, S)`


@dataclass(frozen=True)
class Quadrature:
    """Exact posterior draws, and how well they were found.

    Args:
        draws: `(n_draws, n, S, D)`, points on the curves.
        log_evidence: `log p(y)`, `(n,)`, by the midpoints of the boxes. Its error falls with `width`; at
            1 it is about 0.01, and more where y has fewer entries than there are sources.
        acceptance: the probability that a proposal is accepted, `(n,)`. Where it is small (below 0.1,
            say) the boxes are large and `log_evidence` is not to be trusted; draws are exact still.
        lost: a bound on the share of the posterior in the boxes left out, `(n,)`.
    """

    draws: np.ndarray
    log_evidence: np.ndarray
    acceptance: np.ndarray
    lost: np.ndarray


class Images(NamedTuple):
    """What the intervals of every source add to one observation, in units of the noise.

    `lo`, `hi` and `mid` `(S, intervals, M)`: the range, and the value in the middle; `move`
    `(S, intervals)`: the largest `hi − lo` of an entry.
    """

    lo: np.ndarray
    hi: np.ndarray
    mid: np.ndarray
    move: np.ndarray


class Boxes(NamedTuple):
    """Boxes `(N, S)` of intervals, with `log u_c`, `log ℓ(centre)` and `log |c|`, `(N,)`."""

    nodes: np.ndarray
    upper: np.ndarray
    centre: np.ndarray
    volume: np.ndarray

    def where(self, keep: np.ndarray) -> "Boxes":
        """The boxes that `keep` `(N,)` names."""
        return Boxes(*(part[keep] for part in self))


def quadrature_draws(
    curves: Sequence[Manifold],
    y: np.ndarray,
    matrices: np.ndarray,
    noise: float,
    *,
    n_draws: int = 1,
    seed: int = 0,
    levels: int = 15,
    width: float = 1.0,
    max_boxes: int = 4_000_000,
) -> Quadrature:
    """Draws of `p(x | y)` for sources on `curves`, `y = Σ_β A_β x_β(s_β) + σ η`, `s_β ~ U(0, 1)`.

    An observation's draws depend on `seed` and its number only.

    Args:
        curves: one for each source.
        y: observations, `(n, M)`.
        matrices: `A_β`, with any weights in them, `(n, S, M, D)`.
        noise: σ.
        n_draws: draws of each observation.
        seed: of the draws.
        levels: intervals are halved at most so often; in the smallest a curve should move by less than σ.
        width: boxes on which the mean moves by less than `width · σ` are small enough.
        max_boxes: boxes are no more halved when there are so many.

    Raises a `DichroicError` for arrays that do not fit, or if nearly no proposal is accepted.
    """
    y, matrices = _checked(curves, np.asarray(y, float), np.asarray(matrices, float), noise)
    if n_draws < 1 or not 1 <= levels <= 24 or not width > 0:
        raise DataError(
            f"n_draws = {n_draws}, levels = {levels}, width = {width}: need n_draws ≥ 1, "
            "levels from 1 to 24, width > 0"
        )
    knots = np.linspace(0, 1, 2**levels + 1)
    points = np.stack([curve(knots) for curve in curves])
    bends = np.stack([curve.bend() for curve in curves]) / 4**levels / 8
    parts = []
    for i, (row, a) in enumerate(zip(y / noise, matrices / noise, strict=True)):
        boxes, lost = partition(row, images(points, bends, a), width=width, max_boxes=max_boxes)
        rng = np.random.default_rng([2, seed, i])
        s, *found = _draw(rng, boxes, lambda s, row=row, a=a: _fit(curves, row, a, s), n_draws)
        parts.append((_points(curves, s), *found, lost))
    draws, evidence, acceptance, lost = (np.stack(part) for part in zip(*parts, strict=True))
    constant = y.shape[1] * np.log(np.sqrt(2 * np.pi) * noise)
    return Quadrature(
        draws.swapaxes(0, 1),
        evidence - constant,
        acceptance,
        np.exp(np.minimum(lost - evidence, 0)),
    )


def limit_draws(
    view: View, curves: Sequence[Manifold], *, n_draws: int = 1, seed: int = 0
) -> dict[str, np.ndarray]:
    """Exact posterior draws `(n_draws, n, dim)` of the sources that `view` of a `manifold_problem` sees.

    `curves` are all of the problem, as `manifold_curves` gives them: the first is that of `source1`.
    """
    return limit_posterior(view, curves, n_draws=n_draws, seed=seed)[0]


def limit_posterior(
    view: View, curves: Sequence[Manifold], *, n_draws: int = 1, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`limit_draws`, and the log evidence of every observation, `(n,)`."""
    by_name = {f"source{s + 1}": curve for s, curve in enumerate(curves)}
    names = [name for name in by_name if name in view.operators]
    if set(names) != set(view.operators):
        raise DataError(f"{view.label}: sources {', '.join(view.operators)}, {len(curves)} curves")
    if view.mask is not None or not isinstance(view.noise, (int, float)):
        raise DataError(f"{view.label}: needs a number as noise, and no mask")
    a = np.stack([_matrices(view, name) for name in names], axis=1)
    of = [by_name[name] for name in names]
    found = quadrature_draws(of, view.observations, a, view.noise, n_draws=n_draws, seed=seed)
    return {name: found.draws[:, :, s] for s, name in enumerate(names)}, found.log_evidence


def images(points: np.ndarray, bends: np.ndarray, a: np.ndarray) -> Images:
    """The `Images` of curves through `points` `(S, 2^L + 1, D)` under `A / σ` `(S, M, D)`.

    Within the smallest intervals a curve is no further than `bends` `(S, D)` from its chord.
    """
    g = points @ a.swapaxes(1, 2)
    slack = np.einsum("smd,sd->sm", np.abs(a), bends)[:, None] + 1e-9
    ends = g[:, :-1], g[:, 1:]
    lo, hi = _ranges(np.minimum(*ends) - slack), -_ranges(-np.maximum(*ends) - slack)
    return Images(lo, hi, _middles(g), np.max(hi - lo, axis=2))


def _ranges(lowest: np.ndarray) -> np.ndarray:
    """The minima on all intervals, `(S, 2^{L+1}, M)`, from those on the `2^L` smallest."""
    parts = [lowest]
    while parts[0].shape[1] > 1:
        parts.insert(0, np.minimum(parts[0][:, ::2], parts[0][:, 1::2]))
    return np.concatenate([parts[0], *parts], axis=1)  # there is no interval 0


def _middles(g: np.ndarray) -> np.ndarray:
    """The values in the middle of all intervals, `(S, 2^{L+1}, M)`, from those at `2^L + 1` knots."""
    leaves, parts = g.shape[1] - 1, [(g[:, :-1] + g[:, 1:]) / 2]
    step = 2
    while step <= leaves:
        parts.insert(0, g[:, step // 2 :: step])
        step *= 2
    return np.concatenate([parts[0], *parts], axis=1)


def partition(y: np.ndarray, table: Images, *, width: float, max_boxes: int) -> tuple[Boxes, float]:
    """Boxes that hold the posterior of `y / σ` `(M,)`, and the log of a bound on the evidence left out."""
    active = np.ones((1, len(table.lo)), int)
    done: list[Boxes] = []
    evidence = lost = -np.inf
    while len(active):
        boxes, move = _bounded(y, table, active)
        guess = np.logaddexp(evidence, _log_sum(_guess(boxes, move)))
        total = sum(len(b.upper) for b in done) + len(active)
        kept = boxes.upper + boxes.volume + np.log(total) > guess + np.log(_LOST)
        lost = np.logaddexp(lost, _log_sum((boxes.upper + boxes.volume)[~kept]))
        halves = kept & _divisible(table, active) & (move.sum(axis=1) > width)
        if total > max_boxes:
            halves[:] = False
        done.append(boxes.where(kept & ~halves))
        evidence = np.logaddexp(evidence, _log_sum(done[-1].centre + done[-1].volume))
        active = _halved(table, active[halves], move[halves])
    return Boxes(*(np.concatenate(part) for part in zip(*done, strict=True))), float(lost)


def _bounded(y: np.ndarray, table: Images, nodes: np.ndarray) -> tuple[Boxes, np.ndarray]:
    """The boxes `nodes` `(N, S)` with their bounds, and how the mean moves along each axis, `(N, S)`."""
    lo, hi, mid = (sum(part[s, k] for s, k in enumerate(nodes.T)) for part in table[:3])
    outside = np.maximum(np.maximum(lo - y, y - hi), 0)
    depth = np.sum(np.frexp(nodes)[1] - 1, axis=1)
    fit = lambda r: -0.5 * np.einsum("nm,nm->n", r, r)
    boxes = Boxes(nodes, fit(outside), fit(y - mid), -np.log(2) * depth)
    return boxes, np.stack([table.move[s, k] for s, k in enumerate(nodes.T)], axis=1)


def _guess(boxes: Boxes, move: np.ndarray) -> np.ndarray:
    """The log evidence in each box, its likelihood one noise wide: rather too little while it is large."""
    return boxes.centre + boxes.volume - np.sum(np.log(np.maximum(move / 2, 1)), axis=1)


def _log_sum(terms: np.ndarray) -> float:
    """`log Σ exp(terms)`, −∞ of none."""
    top = np.max(terms, initial=-np.inf)
    return float(top + np.log(np.sum(np.exp(terms - top)))) if np.isfinite(top) else -np.inf


def _divisible(table: Images, nodes: np.ndarray) -> np.ndarray:
    return np.any(2 * nodes < table.move.shape[1], axis=1)


def _halved(table: Images, nodes: np.ndarray, move: np.ndarray) -> np.ndarray:
    """Both halves of every box, along the axis that moves the mean most and can be halved."""
    axis = np.argmax(np.where(2 * nodes < table.move.shape[1], move, -1), axis=1)[:, None]
    first = np.take_along_axis(nodes, axis, axis=1) * 2
    halves = [nodes.copy(), nodes.copy()]
    for k, half in enumerate(halves):
        np.put_along_axis(half, axis, first + k, axis=1)
    return np.concatenate(halves)


def _draw(
    rng: np.random.Generator, boxes: Boxes, fit: Fit, n_draws: int
) -> tuple[np.ndarray, float, float]:
    """Coordinates `(n_draws, S)` by rejection, the log evidence, and the share of proposals accepted."""
    weight = boxes.upper + boxes.volume
    envelope, evidence = _log_sum(weight), _log_sum(boxes.centre + boxes.volume)
    edges = np.cumsum(np.exp(weight - envelope))
    acceptance = float(np.exp(evidence - envelope))
    found, tried = [np.empty((0, boxes.nodes.shape[1]))], 0
    while (missing := n_draws - sum(map(len, found))) > 0:
        if tried > _TRIALS:
            raise DataError("the intervals are too wide for this noise; give more levels or boxes")
        trials = min(2 * missing / max(acceptance, 1e-9) + 32, 200_000)
        tried += int(trials)
        found.append(_accepted(rng, boxes, edges, fit, int(trials))[:missing])
    return np.concatenate(found), evidence, acceptance


def _accepted(
    rng: np.random.Generator, boxes: Boxes, edges: np.ndarray, fit: Fit, trials: int
) -> np.ndarray:
    """The coordinates that are accepted of `trials` proposals from the envelope."""
    at = np.searchsorted(edges, rng.uniform(size=trials) * edges[-1], side="right")
    at = np.minimum(at, len(edges) - 1)
    nodes = boxes.nodes[at]
    size = 2.0 ** (np.frexp(nodes)[1] - 1)
    s = (nodes + rng.uniform(size=nodes.shape)) / size - 1
    return s[np.log(rng.uniform(size=trials)) < fit(s) - boxes.upper[at]]


def _points(curves: Sequence[Manifold], s: np.ndarray) -> np.ndarray:
    """`x_β(s_β)` `(n, S, D)` at the coordinates `s` `(n, S)`."""
    return np.stack([curve(s[:, k]) for k, curve in enumerate(curves)], axis=1)


def _fit(curves: Sequence[Manifold], y: np.ndarray, a: np.ndarray, s: np.ndarray) -> np.ndarray:
    """`log ℓ` `(n,)` at the coordinates `s` `(n, S)`, for `y / σ` `(M,)` and `A / σ` `(S, M, D)`."""
    r = y - np.einsum("smd,nsd->nm", a, _points(curves, s))
    return -0.5 * np.sum(r**2, axis=1)


def _matrices(view: View, name: str) -> np.ndarray:
    """The matrices of a `Dense` operator, one per observation: `(n, M, D)`."""
    op = view.operators[name]
    if not isinstance(op, Dense):
        raise DataError(f"{view.label}, source {name!r}: needs a Dense operator")
    matrix = np.asarray(op.matrix, float)
    return np.broadcast_to(matrix, (view.count, *matrix.shape[-2:]))


def _checked(
    curves: Sequence[Manifold], y: np.ndarray, matrices: np.ndarray, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    dims = {len(curve.a) for curve in curves}
    if len(dims) != 1:
        raise ShapeError(f"need one curve or more, all of one dimension, got dimensions {dims}")
    want = (*y.shape[:1], len(curves), *y.shape[1:], *dims)
    if y.ndim != 2 or y.size == 0 or matrices.shape != want:
        raise ShapeError(
            f"y {y.shape} and matrices {matrices.shape} of {len(curves)} curves in {dims} dimensions: "
            "expected (n, M) and (n, S, M, D), none empty"
        )
    if not (np.all(np.isfinite(y)) and np.all(np.isfinite(matrices))):
        raise DataError("y and matrices must be finite")
    if not (np.isfinite(noise) and noise > 0):
        raise DataError(f"noise {noise}: need a standard deviation > 0")
    return y, matrices
