"""What can be learned of which source, judged from the operators alone.

The moments of an observation are linear in those of the sources, its mean in the means `μ_β` and
its covariance in the covariances `C_β`:

    E y_i = Σ_β A_iβ μ_β,      Cov y_i − Σ_i = Σ_β A_iβ C_β A_iβᵀ.

Each observation is seen with its own operators, so the map `L: (C_β)_β ↦ (Σ_β A_iβ C_β A_iβᵀ)_i`
is stacked over observations as well as views. A direction of `C_β` is *determined* iff no vector of
the kernel of `L` has a part along it. In coordinates of symmetric matrices that keep inner products
(the entries of a triangle, those off the diagonal times √2), `LᵀL` has the blocks

    ⟨E, (LᵀL)_βγ E'⟩ = Σ_i tr(E G_i E' G_iᵀ),      G_i = A_iβᵀ A_iγ,

and the normal matrix of the map of the means has the blocks `Σ_i G_i`. Views and sources are
brought to a common scale first, which changes no kernel. The projector `Π` on the kernel says the
rest: the eigenvalues of `Π_ββ` are 1 on what no view sees of a source, between 0 and 1 on what is
confused with other sources, those with `Π_βγ ≠ 0`, and 0 on what is determined.

Where there are too many unknowns, all covariances are restricted to `C_β = Q c_β Qᵀ` with a few
columns `Q`, the same for sources of equal size: a patch of neighbouring entries and random
directions. The kernel of the restricted map is part of the whole one, so that *not identified* is
certain, while *identified* says that a probe found nothing wrong. Counting needs no probe: sources
with more covariance entries together than the views that see any of them have, cannot all be
identified (`short`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from dichroic.batching import row_counts, split, take
from dichroic.observations import Observations
from dichroic.problem import Problem, Source, joint_observations
from dichroic.tables import text_table

Verdict = Literal["identified", "weakly identified", "not identified"]

UNKNOWNS = 4200  # covariance entries of all sources together up to which the map is formed in full
PROBE = 24  # directions per source beyond that, at most
NULL = 1e-6  # singular values below this, relative to the largest, count as zero
WEAK = 1e4  # condition number above which a source is weakly identified


@dataclass(frozen=True)
class SourceIdentifiability:
    """What the views determine of one source.

    Attributes:
        name: the source.
        verdict: `identified`, `weakly identified` (condition number above 1e4) or `not identified`.
        dimensions: of its covariance, `D (D + 1) / 2` (or fewer, of a probe).
        determined: how many of them the views determine.
        mean_dimensions: of its mean, `D` (or fewer, of a probe).
        mean_determined: how many of them the views determine.
        smallest: the gain of its worst determined direction, relative to the best of all.
        condition: `1 / smallest`: how much more an error counts in the worst than in the best.
    """

    name: str
    verdict: Verdict
    dimensions: int
    determined: int
    mean_dimensions: int
    mean_determined: int
    smallest: float
    condition: float


@dataclass(frozen=True)
class Identifiability:
    """What the views determine of every source, and what is wrong.

    Attributes:
        sources: one result per source.
        exact: whether the whole map was looked at, or only a probe of it.
        warnings: sentences that say what is wrong and what to do.
        short: sources that a probe found nothing wrong with, though the views have too few
            equations for all of them: some are not identified, whatever their verdicts.
    """

    sources: tuple[SourceIdentifiability, ...]
    exact: bool
    warnings: tuple[str, ...]
    short: tuple[tuple[str, ...], ...] = ()

    @property
    def identified(self) -> bool:
        """Whether every source is identified, weakly at least."""
        return not self.short and all(s.verdict != "not identified" for s in self.sources)

    def __getitem__(self, name: str) -> SourceIdentifiability:
        return next(s for s in self.sources if s.name == name)

    def table(self) -> str:
        """The results as a plain-text table."""
        probe = "" if self.exact else " (probe)"
        header = ["source", "verdict", f"covariance{probe}", f"mean{probe}", "condition"]
        rows = [
            [
                s.name,
                s.verdict,
                f"{s.determined} of {s.dimensions}",
                f"{s.mean_determined} of {s.mean_dimensions}",
                f"{s.condition:.3g}",
            ]
            for s in self.sources
        ]
        return text_table(header, rows)


def identifiability(problem: Problem, *, seed: int = 0) -> Identifiability:
    """Say which moments of each source the views of `problem` determine.

    What is outside the kernels of `(C_β)_β ↦ (Σ_β A_iβ C_β A_iβᵀ)_i` and
    `(μ_β)_β ↦ (Σ_β A_iβ μ_β)_i`, where `i` runs over the observations of all views (a sample of
    them where there are many; one for all that share operators and mask), co-observed views being
    one.

    Args:
        problem: sources and views; the values of the observations are not used.
        seed: chooses the sample and the directions of the probe.

    Raises:
        DichroicError: if co-observed views do not fit together.
    """
    rng = np.random.default_rng(seed)
    bases, exact = _bases(problem.sources, rng)
    sizes = {name: len(basis) for name, basis in bases.items()}
    moments = _Moments.zeros(sizes)
    for views in problem.joint_views():
        moments.add(joint_observations(views), bases, rng)
    means = _resolve(moments.mean, list(sizes.values()))
    covariances = _resolve(moments.covariance, [_half(r) for r in sizes.values()])
    lacking = {} if exact else moments.lacking(problem.sources)
    parts = zip(sizes, means.parts, covariances.parts, strict=True)
    results = tuple(_result(name, m, c, (name,) in lacking) for name, m, c in parts)
    known = {s.name for s in results if s.verdict == "not identified"}
    short = {g: pair for g, pair in lacking.items() if len(g) > 1 and not known & set(g)}
    kind = "" if exact else "probed "
    warnings = [
        *_lacking_warnings(lacking),
        *_short_warnings(short),
        *_unseen_warnings(results, covariances, kind),
        *_confusion_warnings(list(sizes), means, covariances, kind),
        *_weak_warnings(results),
    ]
    return Identifiability(results, exact, tuple(warnings), tuple(short))


def _half(size: int) -> int:
    return size * (size + 1) // 2


def _result(name: str, mean: "_Part", covariance: "_Part", lacking: bool) -> SourceIdentifiability:
    verdict: Verdict = "weakly identified" if covariance.condition > WEAK else "identified"
    if mean.undetermined or covariance.undetermined or lacking:
        verdict = "not identified"
    return SourceIdentifiability(
        name,
        verdict,
        covariance.size,
        covariance.size - covariance.undetermined,
        mean.size,
        mean.size - mean.undetermined,
        1 / covariance.condition,
        covariance.condition,
    )


# Directions that are looked at.


def _bases(
    sources: Sequence[Source], rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], bool]:
    """`({source: (r, *shape) orthonormal directions}, whether they are all)`."""
    sizes = [math.prod(s.shape) for s in sources]
    exact = sum(map(_half, sizes)) <= UNKNOWNS
    most = min(PROBE, math.isqrt(2 * UNKNOWNS // len(sizes)) - 1)
    by_size: dict[int, np.ndarray] = {}
    for source, size in zip(sources, sizes, strict=True):
        if size not in by_size:
            whole = exact or size <= most
            by_size[size] = np.eye(size) if whole else _probe(source.shape, max(most, 1), rng)
    named = zip(sources, sizes, strict=True)
    return {s.name: by_size[d].reshape(-1, *s.shape) for s, d in named}, exact


def _probe(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> np.ndarray:
    """`(count, D)` orthonormal directions: the entries of a patch, and random ones."""
    size = math.prod(shape)
    patch = _patch(shape, 2 * count // 3, rng)
    directions = rng.normal(size=(count, size))
    directions[: len(patch)] = 0
    directions[np.arange(len(patch)), patch] = 1
    return np.linalg.qr(directions.T)[0].T


def _patch(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> np.ndarray:
    """The flat indices of a box of at most `count` entries, as cubic as can be, somewhere."""
    sides = [1] * len(shape)
    while True:
        free = [a for a in range(len(shape)) if sides[a] < shape[a]]
        axis = min(free, key=lambda a: (sides[a], -shape[a]), default=None)
        if axis is None or math.prod(sides) // sides[axis] * (sides[axis] + 1) > max(count, 1):
            break
        sides[axis] += 1
    starts = [int(rng.integers(d - k + 1)) for d, k in zip(shape, sides, strict=True)]
    ranges = [np.arange(a, a + k) for a, k in zip(starts, sides, strict=True)]
    return np.ravel_multi_index(np.meshgrid(*ranges, indexing="ij"), shape).ravel()


# The normal matrices of both maps.


@dataclass
class _Moments:
    """The normal matrices of the two maps, and per view the sources seen and its equations."""

    sizes: dict[str, int]
    mean: np.ndarray
    covariance: np.ndarray
    equations: list[tuple[frozenset[str], int]]

    @classmethod
    def zeros(cls, sizes: dict[str, int]) -> "_Moments":
        r, p = sum(sizes.values()), sum(map(_half, sizes.values()))
        return cls(sizes, np.zeros((r, r)), np.zeros((p, p)), [])

    def add(
        self, obs: Observations, bases: dict[str, np.ndarray], rng: np.random.Generator
    ) -> None:
        """Add the equations of one view, scaled by the size of its operators."""
        seen_sizes = {n: r for n, r in self.sizes.items() if n in obs.operators}
        patterns = _patterns(obs, sum(map(_half, seen_sizes.values())), rng)
        mean, covariance = _blocks(obs, {n: bases[n] for n in seen_sizes}, patterns)
        scale = max(np.trace(mean[n, n]) / r for n, r in seen_sizes.items()) or 1.0
        halves = {n: _half(r) for n, r in self.sizes.items()}
        for a, b in mean:
            _add_block(self.mean, self.sizes, a, b, mean[a, b] / scale)
            _add_block(self.covariance, halves, a, b, covariance[a, b] / scale**2)
        varies = len(patterns.seen) > 1 or bool(row_counts(obs.operators))
        entries = int(patterns.seen.sum(axis=1).max())
        count = _half(entries) * (obs.count if varies else 1)
        self.equations.append((frozenset(seen_sizes), count))

    def lacking(self, sources: Sequence[Source]) -> dict[tuple[str, ...], tuple[int, int]]:
        """`(equations, unknowns)` of sources, alone or together, with fewer equations than unknowns.

        Together are those of one view, and all. Sets that hold a smaller such set are left out.
        """
        unknowns = {s.name: _half(math.prod(s.shape)) for s in sources}
        together = {frozenset(unknowns), *(seen for seen, _ in self.equations)}
        groups = [frozenset([n]) for n in unknowns] + sorted(
            together, key=lambda g: (len(g), *sorted(g))
        )
        out: dict[tuple[str, ...], tuple[int, int]] = {}
        for group in groups:
            equations = sum(count for seen, count in self.equations if seen & group)
            total = sum(unknowns[n] for n in group)
            if equations < total and not any(group >= set(smaller) for smaller in out):
                out[tuple(n for n in unknowns if n in group)] = equations, total
        return out


@dataclass(frozen=True)
class _Patterns:
    """The observations to look at: numbers `(k,)`, observed entries `(k, M)`, weights `(k,)`."""

    index: np.ndarray
    seen: np.ndarray
    weights: np.ndarray


_Blocks = dict[tuple[str, str], np.ndarray]


def _blocks(
    obs: Observations, bases: dict[str, np.ndarray], patterns: _Patterns
) -> tuple[_Blocks, _Blocks]:
    """The blocks of both normal matrices for pairs of sources, averaged over observations."""
    sizes = [(name, len(basis)) for name, basis in bases.items()]
    pairs = [(a, b) for i, a in enumerate(sizes) for b in sizes[i:]]
    mean = {(a, b): np.zeros((r, s)) for (a, r), (b, s) in pairs}
    covariance = {(a, b): np.zeros((_half(r), _half(s))) for (a, r), (b, s) in pairs}
    for weights, columns in _columns(obs, bases, patterns):
        for a, b in mean:
            gram = np.matmul(columns[a].swapaxes(1, 2), columns[b])
            mean[a, b] += np.tensordot(weights, gram, axes=1)
            covariance[a, b] += _symmetric_square(gram, weights)
    return mean, covariance


def _add_block(
    matrix: np.ndarray, sizes: dict[str, int], a: str, b: str, block: np.ndarray
) -> None:
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
    rows, columns = (slice(ends[n] - sizes[n], ends[n]) for n in (a, b))
    matrix[rows, columns] += block
    if a != b:
        matrix[columns, rows] += block.T


def _symmetric_square(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`Σ_i w_i tr(E G_i E' G_iᵀ)` for all pairs of basis matrices; `gram` is `(n, r, s)`.

    For entries `a ≤ b` and `c ≤ d` it is `Σ_i w_i (G_ac G_bd + G_ad G_bc)`, and with `a = b` or
    `c = d` the square root of a half of that each.
    """
    _, r, s = gram.shape
    c, d = np.triu_indices(s)
    rows = []
    for a in range(r):
        x = np.tensordot(weights[:, None] * gram[:, a], gram[:, a:], axes=(0, 0))
        rows.append((x[c, :, d] + x[d, :, c]).T)
    left, right = _diagonal_factor(r), _diagonal_factor(s)
    return left[:, None] * np.concatenate(rows) * right


def _diagonal_factor(size: int) -> np.ndarray:
    a, b = np.triu_indices(size)
    return np.where(a == b, math.sqrt(0.5), 1.0)


def _patterns(obs: Observations, unknowns: int, rng: np.random.Generator) -> _Patterns:
    """The observations to look at.

    There are at least 256 (or all), and some multiple of the unknowns as equations. Where operators
    are shared, observations with the same observed entries are taken together.
    """
    order = rng.permutation(obs.count)
    entries = _observed(obs, order[:256]).sum(axis=1).mean()
    ratio = unknowns / max(entries * (entries + 1) / 2, 1)
    index = np.sort(order[: int(np.clip(16 * ratio, 256, max(4096, 2 * ratio)))])
    seen = _observed(obs, index)
    if row_counts(obs.operators):
        seen = np.broadcast_to(seen, (len(index), obs.size))
        return _Patterns(index, seen, np.full(len(index), 1 / len(index)))
    seen, counts = np.unique(seen, axis=0, return_counts=True)
    return _Patterns(index[: len(seen)], seen, counts / counts.sum())


def _observed(obs: Observations, index: np.ndarray) -> np.ndarray:
    """`(len(index), M)`, or `(1, M)` if it is the same for all: 1 where an entry was observed."""
    noise = take(obs.noise, index)
    rows, shared = split(noise)
    if not jax.tree.leaves(rows):
        return np.asarray(noise.observed(obs.size))[None]
    return np.asarray(jax.vmap(lambda r: eqx.combine(r, shared).observed(obs.size))(rows))


def _columns(
    obs: Observations, bases: dict[str, np.ndarray], patterns: _Patterns
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """`(weights, {source: A_i Q})` in batches of observations; `A_i Q` is `(batch, M, r)`."""
    directions = {n: jnp.asarray(basis, jnp.zeros(()).dtype) for n, basis in bases.items()}
    operators = {n: obs.operators[n] for n in bases}
    widest = max(len(basis) for basis in bases.values())
    batch = int(np.clip(2**22 // (obs.size * widest), 1, 256))
    for start in range(0, len(patterns.seen), batch):
        part = slice(start, start + batch)
        rows = take(operators, patterns.index[part])
        with jax.default_matmul_precision("highest"):
            out = _apply(rows, jnp.asarray(patterns.seen[part]), directions)
        yield patterns.weights[part], {n: np.asarray(x, np.float64) for n, x in out.items()}


@eqx.filter_jit
def _apply(operators: dict[str, Any], seen: jax.Array, directions: dict[str, jax.Array]) -> Any:
    rows, shared = split(operators)

    def one(rows: Any, seen: jax.Array) -> dict[str, jax.Array]:
        ops = eqx.combine(rows, shared)
        column = lambda op: jax.vmap(lambda x: op.mv(x).ravel(), out_axes=1)
        return {n: seen[:, None] * column(op)(directions[n]) for n, op in ops.items()}

    return jax.vmap(one)(rows, seen)


# Kernels.


@dataclass
class _Part:
    """One source's share of the kernel of a map."""

    size: int
    undetermined: int = 0  # dimensions that some vector of the kernel has a part in
    unseen: int = 0  # of these, those that are in the kernel by themselves
    condition: float = 0.0  # of the determined ones


@dataclass
class _Kernel:
    """The kernel of a map, per source, and which sources are confused, and how."""

    parts: list[_Part]
    coupled: np.ndarray  # (S, S): do vectors of the kernel have parts in both?
    same: np.ndarray  # (S, S): is the map, up to a factor, the same function of both?
    scales: np.ndarray  # (S,): the mean square gain of the map

    def groups(self) -> list[list[int]]:
        """The sources that are confused with each other, by index."""
        _, labels = connected_components(csr_matrix(self.coupled), directed=False)
        groups = [np.flatnonzero(labels == k).tolist() for k in range(labels.max() + 1)]
        return [g for g in groups if len(g) > 1]


def _resolve(normal: np.ndarray, sizes: Sequence[int]) -> _Kernel:
    """The kernel of the map whose normal matrix (with blocks of `sizes`) is `normal`."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    scales = np.bincount(owner, np.diag(normal)) / np.asarray(sizes)
    unit = 1 / np.sqrt(np.where(scales > 0, scales, 1.0))[owner]
    normal = unit[:, None] * normal * unit
    pieces = [(p, *np.linalg.eigh(normal[np.ix_(p, p)])) for p in _components(normal)]
    top = max(values[-1] for _, values, _ in pieces)
    parts, coupled = [_Part(size) for size in sizes], np.zeros((len(sizes),) * 2, bool)
    for piece, values, vectors in pieces:
        _add_piece(parts, coupled, owner[piece], values / (top or 1.0), vectors)
    for part in parts:
        if part.undetermined == part.size:
            part.condition = math.inf
    return _Kernel(parts, coupled, _same_blocks(normal, sizes), scales)


def _components(normal: np.ndarray) -> list[np.ndarray]:
    """The index sets of the blocks that `normal` falls into (one, unless it is sparse)."""
    if np.count_nonzero(normal) > 0.1 * normal.size:
        return [np.arange(len(normal))]
    _, labels = connected_components(csr_matrix(normal), directed=False)
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _add_piece(
    parts: list[_Part],
    coupled: np.ndarray,
    owner: np.ndarray,
    values: np.ndarray,
    vectors: np.ndarray,
) -> None:
    """Add to `parts` and `coupled` what one piece of the normal matrix, diagonalised, says."""
    null = values <= NULL**2
    gains = vectors[:, ~null] / np.sqrt(values[~null])
    noise = np.clip(1e-13 / values[~null].min(initial=1.0), 1e-6, 1e-3)  # in the kernel's vectors
    kernel = {k: vectors[owner == k][:, null] for k in np.unique(owner)}
    for k, z in kernel.items():
        gain = gains[owner == k]
        if z.size:
            overlap, directions = np.linalg.eigh(z @ z.T)
            hidden = directions[:, overlap > noise**2]
            parts[k].undetermined += hidden.shape[1]
            parts[k].unseen += int(np.sum(overlap > 1 - noise**2))
            gain = gain - hidden @ (hidden.T @ gain)
        parts[k].condition = max(parts[k].condition, _norm(gain))
        for j, other in kernel.items():
            coupled[j, k] |= bool(j != k and z.size and np.abs(other @ z.T).max() > noise)


def _norm(matrix: np.ndarray) -> float:
    """The largest singular value."""
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0)) if gram.size else 0.0


def _same_blocks(normal: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """`same[β, γ]`: `L_β = L_γ` as functions, of the map with the normal matrix `normal`."""
    ends = np.cumsum(sizes)
    slices = [slice(e - s, e) for e, s in zip(ends, sizes, strict=True)]
    same = np.eye(len(sizes), dtype=bool)
    for j, a in enumerate(slices):
        for k, b in enumerate(slices[:j]):
            if sizes[j] == sizes[k]:
                gap = normal[a, a] + normal[b, b] - normal[a, b] - normal[b, a]
                same[j, k] = same[k, j] = np.abs(gap).max() < 1e-5 * np.abs(normal[a, a]).max()
    return same


# What is wrong, in words.

_SEE_ALONE = "add a view that sees one of them alone or with another weight"
_SEE_MORE = "add a view that sees more of it, or observations with other operators"


def _lacking_warnings(lacking: dict[tuple[str, ...], tuple[int, int]]) -> Iterator[str]:
    for (name, *others), (equations, unknowns) in lacking.items():
        if not others:
            yield (
                f"source {name!r}: its covariance has {unknowns} entries, but those of the views "
                f"that see it only {equations}; {_SEE_MORE}"
            )


def _short_warnings(short: dict[tuple[str, ...], tuple[int, int]]) -> Iterator[str]:
    for group, (equations, unknowns) in short.items():
        yield (
            f"sources {_listed(group)}: their covariances have {unknowns} entries together, but "
            f"those of the views that see them only {equations}: not all can be identified, though "
            f"a probe found nothing wrong; {_SEE_ALONE}"
        )


def _unseen_warnings(
    results: Sequence[SourceIdentifiability], covariances: _Kernel, kind: str
) -> Iterator[str]:
    for s, part in zip(results, covariances.parts, strict=True):
        if part.unseen:
            yield (
                f"source {s.name!r}: the views see only {part.size - part.unseen} of the "
                f"{part.size} {kind}dimensions of its covariance; {_SEE_MORE}"
            )


def _confusion_warnings(
    names: list[str], means: _Kernel, covariances: _Kernel, kind: str
) -> Iterator[str]:
    groups = covariances.groups()
    for group in groups:
        yield _confusion([names[k] for k in group], group, covariances, kind)
    for group in means.groups():
        if not any(set(group) <= set(told) for told in groups):
            yield (
                f"sources {_listed([names[k] for k in group])}: their means cannot be told apart, "
                "though their covariances can; add a view that sees one of them alone"
            )


def _confusion(names: list[str], group: list[int], kernel: _Kernel, kind: str) -> str:
    if kernel.same[np.ix_(group, group)].all():
        scales = kernel.scales[group]
        total = "their sum" if np.ptp(scales) < 1e-3 * scales.max() else "one weighted sum of them"
        return (
            f"sources {_listed(names)} enter every view through the same operator: only {total} "
            f"can be learned; {_SEE_ALONE}"
        )
    parts = zip(names, (kernel.parts[k] for k in group), strict=True)
    shares = [f"{p.undetermined - p.unseen} of {p.size} for {n!r}" for n, p in parts]
    return (
        f"sources {_listed(names)} cannot be told apart in some {kind}dimensions of their "
        f"covariances ({', '.join(shares)}); {_SEE_ALONE}"
    )


def _weak_warnings(results: Sequence[SourceIdentifiability]) -> Iterator[str]:
    for s in results:
        if s.verdict == "weakly identified":
            yield (
                f"source {s.name!r} is weakly identified (condition number {s.condition:.1e}): it "
                "takes very many observations to learn; add a view that sees it alone or with more "
                "weight"
            )


def _listed(names: Sequence[str]) -> str:
    quoted = [repr(n) for n in names]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}"
