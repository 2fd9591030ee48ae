"""The kernel of a linear map from its normal matrix: what it hides, and what it confuses.

The projector `Π = Z Zᵀ` on the kernel has blocks `Π_βγ = Z_β Z_γᵀ`, one for each pair of sources: the
eigenvalues of `Π_ββ` are 1 on what is unseen of source `β` and 0 on what is determined, and
`Π_βγ ≠ 0` where two sources are confused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

NULL = 1e-6  # singular values below this, relative to the largest, count as zero


@dataclass
class Part:
    """One source's share of the kernel of a map."""

    size: int
    undetermined: int = 0  # dimensions that some vector of the kernel has a part in
    unseen: int = 0  # of these, those that are in the kernel by themselves
    condition: float = 0.0  # of the determined ones


@dataclass
class Kernel:
    """The kernel of a map, per source, and which sources are confused, and how."""

    parts: list[Part]
    coupled: np.ndarray  # (S, S): do vectors of the kernel have parts in both?
    same: np.ndarray  # (S, S): is the map, up to a factor, the same function of both?
    scales: np.ndarray  # (S,): the mean square gain of the map

    def groups(self) -> list[list[int]]:
        """The sources that are confused with each other, by index."""
        _, labels = connected_components(csr_matrix(self.coupled), directed=False)
        groups = [np.flatnonzero(labels == k).tolist() for k in range(labels.max() + 1)]
        return [g for g in groups if len(g) > 1]


def resolve(normal: np.ndarray, sizes: Sequence[int]) -> Kernel:
    """The kernel of the map whose normal matrix (with blocks of `sizes`) is `normal`."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    scales = np.bincount(owner, np.diag(normal)) / np.asarray(sizes)
    unit = 1 / np.sqrt(np.where(scales > 0, scales, 1.0))[owner]
    normal = unit[:, None] * normal * unit
    pieces = [(p, *np.linalg.eigh(normal[np.ix_(p, p)])) for p in _components(normal)]
    top = max(values[-1] for _, values, _ in pieces)
    parts, coupled = [Part(size) for size in sizes], np.zeros((len(sizes),) * 2, bool)
    for piece, values, vectors in pieces:
        _add_piece(parts, coupled, owner[piece], values / (top or 1.0), vectors)
    for part in parts:
        if part.undetermined == part.size:
            part.condition = math.inf
    return Kernel(parts, coupled, _same_blocks(normal, sizes), scales)


def _components(normal: np.ndarray) -> list[np.ndarray]:
    """The index sets of the blocks that `normal` falls into (one, unless it is sparse)."""
    if np.count_nonzero(normal) > 0.1 * normal.size:
        return [np.arange(len(normal))]
    _, labels = connected_components(csr_matrix(normal), directed=False)
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _add_piece(
    parts: list[Part],
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
