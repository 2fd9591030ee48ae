"""What a user states: sources, views of mixtures of them, and the problem they make.

    y_i = Σ_β A_i^{αβ} x_i^β + η_i,   η_i ~ N(0, Σ_i^α)        (view α, observation i, source β)

Everything is checked here, before any work starts; `Problem.joint_views` turns the statement into the
`Observations` that the rest of the package computes with.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import numpy as np

from dichroic.batching import row_counts, take
from dichroic.errors import DataError, ShapeError
from dichroic.noise import (
    DenseNoise,
    DiagonalNoise,
    Isotropic,
    JointNoise,
    LowRankNoise,
    Masked,
    Noise,
)
from dichroic.observations import Observations
from dichroic.operators import Operator, Shape, Stack, Zero
from dichroic.operators.base import as_shape


@dataclass(frozen=True)
class Source:
    """A kind of signal that is to be learned: its name, and the shape of one draw of it."""

    name: str
    shape: Shape | int

    def __post_init__(self):
        object.__setattr__(self, "shape", as_shape(self.shape))
        if not self.name or any(c in self.name for c in "/\\:. \t\n"):
            raise ShapeError(
                f"source name {self.name!r}: use letters, digits, '_' and '-' (it names files)"
            )


@dataclass(frozen=True, eq=False)
class View:
    """Observations of one kind of mixture.

    Args:
        observations: `(n, *shape)`, where `shape` is the output shape of the operators.
        operators: one operator per source that this view sees, by the source's name.
        noise: a noise model, or a number: the standard deviation of isotropic noise.
        name: how reports call the view (`view1`, `view2`, … by default).
        mask: 1 where an entry was observed and 0 where it is missing, `shape` or `(n, *shape)`;
            or `"nan"`: entries that are NaN are missing.
        group: views with the same group are *co-observed*: observation `i` of each is of the same
            draw of the sources.
        truth: true sources by name, `(n, *source shape)`; only ever used to score.
        held_out: `(n,)` booleans, true for the observations to be kept from training and used for
            stopping and scoring; a random fraction by default. Choose them where observations are
            not independent (the same object seen twice, neighbouring regions).
    """

    observations: Any
    operators: Mapping[str, Operator]
    noise: Noise | float
    name: str = ""
    mask: Any = None
    group: str | None = None
    truth: Mapping[str, Any] = field(default_factory=dict)
    held_out: Any = None

    @property
    def label(self) -> str:
        """How messages call the view."""
        return f"view {self.name!r}" if self.name else "a view"

    @property
    def count(self) -> int:
        """The number of observations."""
        return int(np.shape(self.observations)[0])

    @property
    def shape(self) -> Shape:
        """The shape of one observation."""
        return tuple(np.shape(self.observations)[1:])

    def select(self, index: Any) -> "View":
        """The view restricted to the observations `index` (a slice or an integer array)."""
        mask = self.mask
        if mask is not None and not isinstance(mask, str) and np.shape(mask) != self.shape:
            mask = np.asarray(mask)[index]
        noise = self.noise if isinstance(self.noise, (int, float)) else _flat_noise(self)
        return View(
            np.asarray(self.observations)[index],
            {k: take(op, index) for k, op in self.operators.items()},
            noise if isinstance(noise, (int, float)) else take(noise, index),
            self.name,
            mask,
            self.group,
            {k: np.asarray(x)[index] for k, x in self.truth.items()},
            None,
        )

    def prepare(self) -> Observations:
        """Check the view by itself and turn it into `Observations`; raises a `DichroicError`."""
        return _prepare(self)


@dataclass(frozen=True, eq=False)
class Problem:
    """Several views of mixtures of several sources. Checked on construction.

    `origin` is the file that states it, if there is one.
    """

    sources: Sequence[Source]
    views: Sequence[View]
    origin: str = ""

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        named = tuple(
            v if v.name else View(**{**_fields(v), "name": f"view{i + 1}"})
            for i, v in enumerate(self.views)
        )
        object.__setattr__(self, "views", named)
        _check_names(self)
        for view in self.views:
            check_view(view, self.shapes)
        for group in self.joint_views():
            _check_group(group)
        unseen = [s.name for s in self.sources if not self.seen_by(s.name)]
        if unseen:
            raise DataError(
                f"source {unseen[0]!r} is seen by no view: nothing can be learned of it; give a view "
                "an operator for it, or leave the source out"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(s.name for s in self.sources)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each source."""
        return {s.name: as_shape(s.shape) for s in self.sources}

    def view(self, name: str) -> View:
        """The view called `name`."""
        for view in self.views:
            if view.name == name:
                return view
        raise DataError(f"no view {name!r}; there are {', '.join(v.name for v in self.views)}")

    def seen_by(self, source: str) -> tuple[str, ...]:
        """The names of the views that see `source`."""
        return tuple(v.name for v in self.views if sees(v, source))

    def joint_views(self) -> list[list[View]]:
        """The views, those of one group together, in the order of their first member."""
        groups: dict[str, list[View]] = {}
        for view in self.views:
            key = f"group {view.group}" if view.group else f"view {view.name}"
            groups.setdefault(key, []).append(view)
        return list(groups.values())

    def fingerprint(self) -> str:
        """A hash of everything stated: names, shapes, observations, operators, noise, masks."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(repr((source.name, source.shape)).encode())
        for view in self.views:
            parts = (view.observations, dict(view.operators), view.noise, view.mask)
            leaves, structure = jax.tree.flatten(parts)
            layout = re.sub(r" at 0x[0-9a-f]+", "", str(structure))
            digest.update(repr((view.name, view.group, layout)).encode())
            for leaf in leaves:
                _update(digest, leaf)
        return digest.hexdigest()


def sees(view: View, source: str) -> bool:
    """Whether `view` has an operator other than zero for `source`."""
    return source in view.operators and not isinstance(view.operators[source], Zero)


def joint_observations(views: Sequence[View]) -> Observations:
    """The `Observations` of one view, or of the stack of several co-observed ones."""
    parts = [view.prepare() for view in views]
    if len(parts) == 1:
        return parts[0]
    _check_group(views)
    shapes = {k: op.in_shape for part in parts for k, op in part.operators.items()}
    operators = {
        name: Stack(
            tuple(p.operators.get(name, Zero(in_shape=shape, out_shape=(p.size,))) for p in parts)
        )
        for name, shape in shapes.items()
    }
    noise = JointNoise(tuple(p.noise for p in parts), tuple(p.size for p in parts))
    return Observations(np.concatenate([p.y for p in parts], axis=1), operators, noise)


def _check_group(views: Sequence[View]) -> None:
    counts = {view.name: view.count for view in views}
    if len(set(counts.values())) > 1:
        raise ShapeError(
            f"co-observed views (group {views[0].group!r}) need the same number of observations, "
            f"got {counts}"
        )
    chosen = [np.asarray(v.held_out, bool) for v in views if v.held_out is not None]
    if any(not np.array_equal(chosen[0], other) for other in chosen[1:]):
        raise DataError(f"co-observed views (group {views[0].group!r}) differ in held_out")


def check_view(view: View, shapes: Mapping[str, Shape]) -> None:
    """Raise a `DichroicError` unless `view` fits sources of the given `shapes`."""
    for name, op in view.operators.items():
        if name not in shapes:
            raise DataError(
                f"{view.label} has an operator for {name!r}, which is no source; "
                f"the sources are {', '.join(shapes)}"
            )
        _same_shape(
            op.in_shape,
            shapes[name],
            f"{view.label}, source {name!r}: the operator takes arrays of",
        )
    for name, x in view.truth.items():
        if name not in shapes:
            raise DataError(f"{view.label} has a truth for {name!r}, which is no source")
        want = (view.count, *shapes[name])
        _same_shape(np.shape(x), want, f"{view.label}, source {name!r}: the truth has")
    if view.held_out is not None:
        _same_shape(np.shape(view.held_out), (view.count,), f"{view.label}: held_out has")
        if np.all(view.held_out):
            raise DataError(f"{view.label}: held_out leaves no observation to learn from")
    view.prepare()


def _prepare(view: View) -> Observations:
    operators = {k: op for k, op in view.operators.items() if not isinstance(op, Zero)}
    if not operators:
        raise DataError(f"{view.label} sees no source; give it an operator for at least one")
    if np.ndim(view.observations) < 2 or view.count == 0:
        raise DataError(
            f"{view.label} has no observations (an array of shape {np.shape(view.observations)}); "
            "expected (n, …) with n ≥ 1 observations"
        )
    for name, op in operators.items():
        _same_shape(
            op.out_shape,
            view.shape,
            f"{view.label}, source {name!r}: the operator gives arrays of",
            "the observations have",
        )
        _check_rows(row_counts(op), view, f"the operator of source {name!r}")
        _check_finite(op, f"{view.label}, source {name!r}: the operator")
    noise = _flat_noise(view)
    _check_rows(row_counts(noise), view, "the noise")
    _check_noise(noise, view)
    y, mask = _values_and_mask(view)
    return Observations(y, operators, noise if mask is None else Masked(noise, mask))


def _same_shape(
    got: Sequence[int], want: Sequence[int], what: str, than: str = "it must have"
) -> None:
    got, want = tuple(got), tuple(want)
    if got == want:
        return
    if len(got) != len(want):
        detail = f"{len(got)} axes instead of {len(want)}"
    else:
        axis = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        detail = f"axis {axis} is {got[axis]} instead of {want[axis]}"
    raise ShapeError(f"{what} shape {got}, but {than} shape {want}: {detail}")


def _check_rows(counts: set[int], view: View, what: str) -> None:
    for count in counts - {view.count}:
        raise ShapeError(
            f"{view.label}: {what} has per-observation parameters for {count} observations, but "
            f"there are {view.count} observations (axis 0)"
        )


def _check_finite(tree: Any, what: str) -> None:
    for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)):
        if not np.all(np.isfinite(leaf)):
            raise DataError(f"{what} contains NaN or infinite values")


def _values_and_mask(view: View) -> tuple[np.ndarray, np.ndarray | None]:
    y = np.asarray(view.observations)
    if not np.issubdtype(y.dtype, np.number) or np.iscomplexobj(y):
        raise DataError(f"{view.label}: observations of type {y.dtype}; expected real numbers")
    y = y.astype(np.float32 if y.dtype != np.float64 else y.dtype).reshape(view.count, -1)
    if isinstance(view.mask, str):
        if view.mask != "nan":
            raise DataError(f"{view.label}: mask {view.mask!r}; expected an array or 'nan'")
        mask = ~np.isnan(y)
    elif view.mask is not None:
        shape = np.shape(view.mask)
        if shape not in (view.shape, (view.count, *view.shape)):
            raise ShapeError(
                f"{view.label}: a mask of shape {shape}; expected {view.shape} (shared) or "
                f"{(view.count, *view.shape)}"
            )
        mask = np.asarray(view.mask) > 0
        mask = mask.reshape(-1) if shape == view.shape else mask.reshape(view.count, -1)
    else:
        mask = None
    seen = np.ones_like(y, bool) if mask is None else np.broadcast_to(mask, y.shape)
    bad = seen & ~np.isfinite(y)
    if bad.any():
        i, j = np.argwhere(bad)[0]
        where = tuple(int(a) for a in np.unravel_index(j, view.shape))
        raise DataError(
            f"{view.label}: observation {i} is {y[i, j]} at entry {where} ({bad.sum()} such entries); "
            "if they are missing, give a mask, or mask='nan' for NaN"
        )
    if mask is not None and not seen.any():
        raise DataError(f"{view.label}: the mask leaves nothing observed")
    return np.where(seen, y, 0), None if mask is None else mask.astype(np.float32)


def _flat_noise(view: View) -> Noise:
    """The noise model with arrays over the flattened observation, whatever shape they came in."""
    noise, shape, n = view.noise, view.shape, view.count
    if isinstance(noise, (int, float, np.floating, np.integer)):
        return Isotropic(float(noise))
    if not isinstance(noise, Noise):
        raise DataError(
            f"{view.label}: noise of type {type(noise).__name__}; expected a number (the standard "
            "deviation) or a model such as DiagonalNoise(variance)"
        )
    size = math.prod(shape)
    if isinstance(noise, (DiagonalNoise, LowRankNoise)):
        got = noise.variance.shape
        if got in (shape, (n, *shape)):
            flat = (size,) if got == shape else (n, size)
            return eqx.tree_at(lambda m: m.variance, noise, noise.variance.reshape(flat))
        _same_shape(got[-1:], (size,), f"{view.label}: the noise variance has")
    if isinstance(noise, LowRankNoise):
        _same_shape(noise.factor.shape[-2:-1], (size,), f"{view.label}: the noise factor has")
    if isinstance(noise, DenseNoise):
        got = noise.covariance.shape[-2:]
        _same_shape(got, (size, size), f"{view.label}: the noise covariance has")
    return noise


def _check_noise(noise: Noise, view: View) -> None:
    _check_finite(noise, f"{view.label}: the noise")
    if isinstance(noise, Isotropic) and not np.all(np.asarray(noise.std) > 0):
        raise DataError(f"{view.label}: the noise standard deviation must be positive")
    if isinstance(noise, (DiagonalNoise, LowRankNoise)) and not np.all(
        np.asarray(noise.variance) > 0
    ):
        raise DataError(
            f"{view.label}: the noise variance must be positive everywhere; mark missing entries with a "
            "mask instead"
        )
    if isinstance(noise, DenseNoise):
        cov = np.asarray(noise.covariance, np.float64)
        skew = np.abs(cov - cov.swapaxes(-1, -2)).max()
        lowest = np.linalg.eigvalsh(0.5 * (cov + cov.swapaxes(-1, -2))).min()
        if lowest <= 0 or skew > 1e-4 * np.abs(cov).max():
            raise DataError(
                f"{view.label}: the noise covariance is not symmetric positive definite (smallest "
                f"eigenvalue {lowest:.3g}, asymmetry {skew:.3g})"
            )


def _check_names(problem: Problem) -> None:
    for kind, names in (("source", problem.names), ("view", [v.name for v in problem.views])):
        if not names:
            raise DataError(f"a problem needs at least one {kind}")
        twice = [n for n in names if list(names).count(n) > 1]
        if twice:
            raise DataError(f"two {kind}s are called {twice[0]!r}; names must differ")


def _fields(view: View) -> dict[str, Any]:
    return {k: getattr(view, k) for k in View.__dataclass_fields__}


def _update(digest: Any, leaf: Any) -> None:
    array = np.ascontiguousarray(leaf)
    digest.update(repr((array.shape, str(array.dtype))).encode())
    digest.update(array.tobytes())


def holdout(views: Sequence[View], fraction: float, seed: int) -> tuple[list[View], list[View]]:
    """Split the observations of (co-observed) `views`: `(training, held out)`, the same for each.

    By the `held_out` of a view that has one, else at random: `fraction` of them, at least one.
    """
    n = views[0].count
    chosen = [np.asarray(v.held_out, bool) for v in views if v.held_out is not None]
    if chosen:
        mask = chosen[0]
    else:
        order = np.random.default_rng(seed).permutation(n)
        mask = order < (max(1, round(fraction * n)) if n > 1 else 0)
    train, test = np.flatnonzero(~mask), np.flatnonzero(mask)
    return [v.select(train) for v in views], [v.select(test) for v in views]


def missing_fraction(view: View) -> float:
    """The fraction of entries of `view` that are missing."""
    noise = view.prepare().noise
    return 1 - float(np.mean(noise.mask)) if isinstance(noise, Masked) else 0.0
