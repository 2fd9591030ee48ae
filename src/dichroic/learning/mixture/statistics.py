"""The E-step of mixtures: what observations say of the components of every source, in sums.

With the probability `r` of each assignment of components, `P = C_y⁻¹` and `v = P (y − m)`, learning needs the sums
over assignments and observations of `r`, `r Aᵀv`, `r Aᵀv vᵀA` and `r AᵀPA` for every component; and, where several
sources are learned at once, of `r A_aᵀ P A_b` for every pair of components of two sources.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dichroic.inference.evidence import assignment_posterior, project
from dichroic.numerics.batching import row_counts, split
from dichroic.priors.components import Components
from dichroic.problem.observations import Observations
from dichroic.runtime import distributed

Pair = tuple[str, str]
Key = TypeVar("Key")
_CHUNK_BYTES = 64 * 2**20
_CHUNK_MOST = 512
_FUSED = 8  # entries of an observation, up to which small products are written out


class SufficientStatistics(eqx.Module):
    """What observations say of the components of one source: `Σ r`, `Σ r u`, `Σ r u uᵀ` and `Σ r J`.

    `u = Aᵀ C_y⁻¹ (y − m)` and `J = Aᵀ C_y⁻¹ A`. At a maximum of the evidence `force` is 0 and `scatter` equals
    `information`.
    """

    count: Float[Array | np.ndarray, " K"]
    force: Float[Array | np.ndarray, "K dim"]
    scatter: Float[Array | np.ndarray, "K dim dim"]
    information: Float[Array | np.ndarray, "K dim dim"]

    def pull_back(self, matrix: Float[Array | np.ndarray, "obs dim"]) -> "SufficientStatistics":
        """The sums of a source from those of its projection by `matrix`."""
        squares = (pull_back_pair(x, matrix, matrix) for x in (self.scatter, self.information))
        return SufficientStatistics(self.count, self.force @ matrix, *squares)


class Statistics(eqx.Module):
    """The log evidence of all observations, the sums of every source, and those that couple two sources."""

    log_evidence: Float[Array | np.ndarray, ""] | float
    sums: dict[str, SufficientStatistics]
    cross: dict[Pair, Float[Array | np.ndarray, "... _ _"]] = eqx.field(default_factory=dict)

    def __add__(self, other: "Statistics") -> "Statistics":
        value = self.log_evidence + other.log_evidence
        return Statistics(value, merged(self.sums, other.sums), merged(self.cross, other.cross))


def merged(a: Mapping[Key, Any], b: Mapping[Key, Any]) -> dict[Key, Any]:
    """The sums of all keys, added up where both have one."""
    both = {k: jax.tree.map(np.add, a[k], b[k]) for k in a.keys() & b.keys()}
    return {**a, **b, **both}


def pairs(names: Sequence[str], seen: Sequence[str]) -> tuple[Pair, ...]:
    """The pairs of those sources in `names` that a view has `seen`."""
    return tuple(itertools.combinations(sorted(set(names) & set(seen)), 2))


@eqx.filter_jit
def view_statistics(
    priors: dict[str, Components],
    obs: Observations,
    chosen: Int[Array, "n T sources"],
    coupled: tuple[Pair, ...] = (),
) -> Statistics:
    """The sums of `obs` over the assignments `chosen`, and of the pairs of sources `coupled`.

    Where operators are shared, sums are taken back to the sources once, not per observation.
    """
    rows, rest = split(obs)
    names, shared = list(obs.operators), not row_counts(obs.operators)
    counts = {k: priors[k].log_weights.size for k in names}
    dims = {k: obs.size if shared else obs.dims[k] for k in names}

    def one(row: Observations, index: Array) -> Statistics:
        y, matrices, cov_noise, seen = eqx.combine(row, rest).parts()
        views = [project(priors[k], a, seen) for k, a in matrices.items()]
        value, r, z, root = assignment_posterior(y, views, cov_noise, index)
        root = root * seen
        heads = {k: root if shared else jnp.tensordot(root, a, 1) for k, a in matrices.items()}
        forces = {k: _contract(h, z[..., None])[..., 0] for k, h in heads.items()}
        sums = {k: _terms(r, forces[k], h) for k, h in heads.items()}
        between = lambda a, b: r[:, None, None] * _contract(heads[a], heads[b])
        return Statistics(value, sums, {(a, b): between(a, b) for a, b in coupled})

    zero = Statistics(
        jnp.zeros(()),
        {k: _zeros(counts[k], dims[k]) for k in names},
        {(a, b): jnp.zeros((counts[a], counts[b], dims[a], dims[b])) for a, b in coupled},
    )

    entries = obs.size**2 + 2 * sum(d**2 for d in dims.values())
    entries += sum(dims[a] * dims[b] for a, b in coupled)

    def summed(rows: tuple[Observations, Array], weights: Array) -> Statistics:
        def body(total: Statistics, chunk: tuple[Array, Array]) -> tuple[Statistics, None]:
            which, w = chunk
            some, index = jax.tree.map(lambda a: a[which], rows)
            w = w * weights[which]
            terms = jax.vmap(one)(some, index)
            at = dict(zip(names, jnp.moveaxis(index, 2, 0), strict=True))
            weigh = lambda a: a * w.reshape(-1, *(1,) * (a.ndim - 1))
            place = lambda where: lambda zero, a: jnp.zeros_like(zero).at[where].add(weigh(a))
            here = Statistics(
                w @ terms.log_evidence,
                {k: jax.tree.map(place(at[k]), zero.sums[k], s) for k, s in terms.sums.items()},
                {
                    (a, b): place((at[a], at[b]))(zero.cross[a, b], x)
                    for (a, b), x in terms.cross.items()
                },
            )
            return jax.tree.map(jnp.add, total, here), None

        every = chunks(len(weights), chosen.shape[1] * entries)
        return jax.lax.scan(body, zero, every)[0]

    found = distributed.sum_by_device(summed, (rows, chosen))
    if not shared:
        return found
    matrix = {k: op.as_matrix() for k, op in obs.operators.items()}
    return Statistics(
        found.log_evidence,
        {k: s.pull_back(matrix[k]) for k, s in found.sums.items()},
        {(a, b): pull_back_pair(x, matrix[a], matrix[b]) for (a, b), x in found.cross.items()},
    )


def pull_back_pair(cross: Any, a: Any, b: Any) -> Any:
    """`Aᵀ X B` of the information `X` `(K, L, M, M)` between the projections of two sources."""
    return a.T @ cross @ b


def _zeros(count: int, dim: int) -> SufficientStatistics:
    square = jnp.zeros((count, dim, dim))
    return SufficientStatistics(jnp.zeros(count), jnp.zeros((count, dim)), square, square)


def _terms(r: Array, u: Array, head: Array) -> SufficientStatistics:
    scale = r[:, None, None]
    scatter = scale * u[:, :, None] * u[:, None, :]
    return SufficientStatistics(r, r[:, None] * u, scatter, scale * _contract(head, head))


def _contract(a: Float[Array, "T obs d"], b: Float[Array, "T obs e"]) -> Float[Array, "T d e"]:
    """`aᵀ b` of every assignment, as a sum that XLA fuses: it is slow at many small products."""
    if a.shape[1] > _FUSED:
        return jnp.swapaxes(a, 1, 2) @ b
    return sum((a[:, m, :, None] * b[:, m, None, :] for m in range(a.shape[1])), jnp.zeros(()))


def chunks(count: int, numbers: int) -> tuple[Int[Array, "c size"], Float[Array, "c size"]]:
    """Indices of `count` observations in chunks that fit in memory, and their weights: 0 for padding."""
    size = int(np.clip(_CHUNK_BYTES // (16 * numbers), 1, min(count, _CHUNK_MOST)))
    index = jnp.arange(-(-count // size) * size).reshape(-1, size)
    return jnp.minimum(index, count - 1), (index < count).astype(float)
