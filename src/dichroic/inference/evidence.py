"""The evidence of an observation under mixtures of Gaussians, and all that follows from it.

Every source β is, here, a mixture `Σ_k w_k N(m_k, V_k)`: exactly for a mixture prior (and for one given
its noised value x_t), by moment matching for a learned denoiser, with one component. An observation
`y = Σ_β A_β x_β + η` then has the evidence

    p(y) = Σ_{k₁…k_S} Π_β w_{kβ} · N(y; Σ_β A_β m_{kβ}, Σ + Σ_β A_β V_{kβ} A_βᵀ),

a sum over assignments of components. Its gradient holds the posterior: with r_k the posterior
probability of component k of one source,

    ∂ log p / ∂ log w_k = r_k,   E[x | y] = Σ_k (r_k m_k + V_k ∂ log p / ∂ m_k),

and sums over assignments and observations are all that learning needs: see `dichroic.learning.mixture.statistics`.

Where assignments are too many to enumerate, they are searched from coarse groups of components to fine.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dichroic.inference.evidence_grid import SMALL, grid_log_evidence, grid_scores
from dichroic.numerics.cholesky import inverse_cholesky, psd_factor
from dichroic.priors.components import Components

DEFAULT_BEAM_WIDTH = 4096


def project(
    components: Components,
    matrix: Float[Array, "obs dim"],
    seen: Float[Array, " obs"] | None = None,
) -> Components:
    """The mixture of `A x` when `x` follows `components`, 0 where `seen` is."""
    means, covs = components.means @ matrix.T, _sandwich(matrix, components.covariances)
    if seen is not None:
        means, covs = seen * means, seen[:, None] * seen * covs
    return Components(components.log_weights, means, covs)


def _sandwich(a: Float[Array, "m d"], v: Float[Array, "K d d"]) -> Float[Array, "K m m"]:
    """`A V_k Aᵀ`, by products as large as can be: XLA is slow at many small ones."""
    left = jnp.tensordot(a, v, [[1], [1]])
    return jnp.swapaxes(jnp.tensordot(left, a, [[2], [1]]), 0, 1)


def gaussian_log_density(
    residual: Float[Array, "*batch obs"], covariance: Float[Array, "*batch obs obs"]
) -> Float[Array, "*batch"]:
    """`log N(residual; 0, covariance)`."""
    root, logdet = inverse_cholesky(covariance)
    z = jnp.einsum("...ij,...j->...i", root, residual)
    return -0.5 * (jnp.sum(z * z, -1) + logdet + residual.shape[-1] * np.log(2 * np.pi))


def assignments(
    y: Float[Array, " obs"],
    views: Sequence[Components],
    cov_noise: Float[Array, "obs obs"],
    *,
    beam_width: int = DEFAULT_BEAM_WIDTH,
) -> tuple[Int[Array, "T sources"], Float[Array, " T"]]:
    """The assignments of components of the projected mixtures `views` that matter for `y`.

    Returns their indices, and the log of weight × likelihood of each: of all of them if their number is
    at most `beam_width`, else of as many found from coarse to fine. Then neighbours are merged in pairs,
    and those in pairs again, until all assignments of groups can be looked at; the best are opened into
    their halves, and so on down. It finds what matters if components that lie together stand together
    (see `GaussianMixture.ordered`). An index past the last component stands for none, with a score of −∞.
    """
    levels = [list(views)]
    while math.prod(v.log_weights.size for v in levels[-1]) > beam_width:
        levels.append([v.merge_pairs() for v in levels[-1]])
    index = jnp.stack(
        [i.ravel() for i in jnp.indices([v.log_weights.size for v in levels[-1]])], axis=-1
    )
    scores = _grid_or_scores(y, cov_noise, levels[-1], index)
    for coarse, fine in itertools.pairwise(reversed(levels)):
        split = [a.log_weights.size < b.log_weights.size for a, b in zip(coarse, fine, strict=True)]
        keep = min(max(beam_width // 2 ** sum(split), 1), scores.size)
        best = jax.lax.top_k(jax.lax.stop_gradient(scores), keep)[1]
        index = _open(index[best], split)
        scores = _scores(y, cov_noise, fine, index)
    return index, scores


def _grid_or_scores(
    y: Float[Array, " obs"],
    cov_noise: Float[Array, "obs obs"],
    views: Sequence[Components],
    index: Int[Array, "T sources"],
) -> Float[Array, " T"]:
    if y.size <= SMALL:
        return grid_scores(y, cov_noise, [_triple(v) for v in views]).ravel()
    return _scores(y, cov_noise, views, index)


def _open(index: Int[Array, "T sources"], split: Sequence[bool]) -> Int[Array, "_ sources"]:
    """Every assignment of groups as the assignments of their halves, for the sources to `split`."""
    halves = jnp.stack([i.ravel() for i in jnp.indices([2 if s else 1 for s in split])], axis=-1)
    factor = jnp.array([2 if s else 1 for s in split])
    return (factor * index[:, None] + halves).reshape(-1, len(split))


def best_assignments(
    y: Float[Array, " obs"],
    views: Sequence[Components],
    cov_noise: Float[Array, "obs obs"],
    *,
    count: int,
    beam_width: int = DEFAULT_BEAM_WIDTH,
) -> Int[Array, "T sources"]:
    """The `count` most probable of the assignments that `assignments` looks at (all if there are fewer)."""
    sizes = [v.log_weights.size for v in views]
    if y.size > SMALL or np.prod(sizes) > beam_width:
        index, scores = assignments(y, views, cov_noise, beam_width=beam_width)
        return index[jax.lax.top_k(scores, min(count, scores.size))[1]]
    scores = grid_scores(y, cov_noise, [_triple(v) for v in views])
    kept = []
    for axis, size in enumerate(
        sizes
    ):  # the best assignments lie in the slices with the largest maxima
        others = tuple(a for a in range(len(sizes)) if a != axis)
        kept.append(jax.lax.top_k(jnp.max(scores, others), min(count, size))[1])
        scores = jnp.take(scores, kept[-1], axis=axis)
    best = jax.lax.top_k(scores.ravel(), min(count, scores.size))[1]
    where = jnp.unravel_index(best, scores.shape)
    return jnp.stack([k[i] for k, i in zip(kept, where, strict=True)], axis=-1)


def _scores(
    y: Float[Array, " obs"],
    cov_noise: Float[Array, "obs obs"],
    views: Sequence[Components],
    index: Int[Array, "T sources"],
) -> Float[Array, " T"]:
    """The log of weight × likelihood of the assignments `index`."""
    picked = [v.pick(k) for v, k in zip(views, index.T, strict=True)]
    mean = sum((v.means for v in picked[1:]), picked[0].means)
    cov = sum((v.covariances for v in picked), cov_noise)
    return sum((v.log_weights for v in picked), gaussian_log_density(y - mean, cov))


def assignment_log_evidence(
    y: Float[Array, " obs"],
    views: Sequence[Components],
    cov_noise: Float[Array, "obs obs"],
    index: Int[Array, "T sources"],
) -> Float[Array, ""]:
    """`log p(y)` over the assignments `index` of components of the projected mixtures `views`."""
    return jax.nn.logsumexp(_scores(y, cov_noise, views, index))


def simulate(
    y: Float[Array, " obs"],
    views: Sequence[Components],
    cov_noise: Float[Array, "obs obs"],
    index: Int[Array, "T sources"],
    key: PRNGKeyArray,
) -> Float[Array, " obs"]:
    """An observation from the model: of one of the assignments `index`, drawn by its probability given `y`."""
    key_assignment, key_noise = jax.random.split(key)
    chosen = index[jax.random.categorical(key_assignment, _scores(y, cov_noise, views, index))]
    mean = sum((v.means[k] for v, k in zip(views, chosen, strict=True)), jnp.zeros(y.shape))
    cov = sum((v.covariances[k] for v, k in zip(views, chosen, strict=True)), cov_noise)
    return mean + psd_factor(cov) @ jax.random.normal(key_noise, y.shape)


def _triple(view: Components) -> tuple[Array, Array, Array]:
    return view.log_weights, view.means, view.covariances


def log_evidence(
    y: Float[Array, " obs"],
    matrices: Sequence[Float[Array, "obs _"]],
    cov_noise: Float[Array, "obs obs"],
    sources: Sequence[Components],
    *,
    seen: Float[Array, " obs"] | None = None,
    beam_width: int = DEFAULT_BEAM_WIDTH,
) -> Float[Array, ""]:
    """`log p(y)`: exact up to `beam_width` assignments of components, a lower bound by a beam beyond.

    `seen` marks missing entries, where `y` is 0 and `cov_noise` that of independent unit noise.
    """
    views = [project(c, a, seen) for c, a in zip(sources, matrices, strict=True)]
    if y.size <= SMALL and np.prod([v.log_weights.size for v in views]) <= beam_width:
        return grid_log_evidence(y, cov_noise, [_triple(v) for v in views])
    return jax.nn.logsumexp(assignments(y, views, cov_noise, beam_width=beam_width)[1])


def assignment_posterior(
    y: Float[Array, " obs"],
    views: Sequence[Components],
    cov_noise: Float[Array, "obs obs"],
    index: Int[Array, "T sources"],
) -> tuple[Float[Array, ""], Float[Array, " T"], Float[Array, "T obs"], Float[Array, "T obs obs"]]:
    """`log p(y)` over assignments `index`; of each its probability, `L⁻¹ (y − m)` and `L⁻¹` of `L Lᵀ = C_y`."""
    picked = [v.pick(k) for v, k in zip(views, index.T, strict=True)]
    residual = y - sum((v.means for v in picked[1:]), picked[0].means)
    root, logdet = inverse_cholesky(sum((v.covariances for v in picked), cov_noise))
    z = jnp.einsum("tij,tj->ti", root, residual)
    scores = sum((v.log_weights for v in picked), -0.5 * (jnp.sum(z * z, -1) + logdet))
    value = jax.nn.logsumexp(scores)
    return value - 0.5 * y.size * np.log(2 * np.pi), jnp.exp(scores - value), z, root


def posterior_means(
    y: Float[Array, " obs"],
    matrices: Sequence[Float[Array, "obs _"]],
    cov_noise: Float[Array, "obs obs"],
    sources: Sequence[Components],
    *,
    seen: Float[Array, " obs"] | None = None,
    beam_width: int = DEFAULT_BEAM_WIDTH,
) -> tuple[list[Float[Array, " _"]], Float[Array, ""]]:
    """`E[x_β | y]` of every source, and `log p(y)`; `seen` as for `log_evidence`."""

    def objective(wm: list[tuple[Array, Array]]):
        swapped = [Components(w, m, c.covariances) for (w, m), c in zip(wm, sources, strict=True)]
        return log_evidence(y, matrices, cov_noise, swapped, seen=seen, beam_width=beam_width)

    value, grads = jax.value_and_grad(objective)([(c.log_weights, c.means) for c in sources])
    means = [
        r @ c.means + jnp.einsum("kij,kj->i", c.covariances, g)
        for (r, g), c in zip(grads, sources, strict=True)
    ]
    return means, value


def posterior_draw(
    y: Float[Array, " obs"],
    matrices: Sequence[Float[Array, "obs _"]],
    cov_noise: Float[Array, "obs obs"],
    sources: Sequence[Components],
    key: PRNGKeyArray,
    *,
    noise_root: Float[Array, "obs obs"],
    seen: Float[Array, " obs"] | None = None,
    beam_width: int = DEFAULT_BEAM_WIDTH,
) -> tuple[list[Float[Array, " _"]], Float[Array, ""]]:
    """One exact joint draw of `x_β | y` of every source, and `log p(y)`; `noise_root` is `Σ^½`.

    An assignment of components from its posterior, then `x + V Aᵀ C_y⁻¹ (y − Σ A x − η)` with `x` and `η`
    drawn from that assignment's prior (pathwise conditioning, Wilson et al., JMLR 22, 2021).
    """
    key_assignment, key_noise, *keys = jax.random.split(key, 2 + len(sources))
    views = [project(c, a, seen) for c, a in zip(sources, matrices, strict=True)]
    index, scores = assignments(y, views, cov_noise, beam_width=beam_width)
    chosen = index[jax.random.categorical(key_assignment, scores)]
    covs = [c.covariances[k] for c, k in zip(sources, chosen, strict=True)]
    cov_y = sum((v.covariances[k] for v, k in zip(views, chosen, strict=True)), cov_noise)
    x = [c.draw_component(k, b) for c, k, b in zip(sources, chosen, keys, strict=True)]
    eta = noise_root @ jax.random.normal(key_noise, y.shape)
    residual = y - sum((a @ u for a, u in zip(matrices, x, strict=True)), eta)
    residual = residual if seen is None else seen * residual
    root, _ = inverse_cholesky(cov_y)
    v = root.T @ (root @ residual)
    draws = [u + c @ (a.T @ v) for u, c, a in zip(x, covs, matrices, strict=True)]
    return draws, jax.nn.logsumexp(scores)
