"""Small dense symmetric matrices by multiplications only.

Everything here is built from matrix products and elementwise operations on the last two axes, so it
is differentiable, batches over any leading axes, and never calls LAPACK: batched LAPACK calls inside
a jitted sampling loop can deadlock XLA's CPU runtime on few cores.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_UNROLLED = 4
_BLOCK = 16
_RECURSIVE = 32
_MOST_SCALING = 1.69770248526  # ½ α (3 − α²) = 0.1: without it, rounding errors grow as eps / l


def symmetrise(a: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """`½(a + aᵀ)`."""
    return 0.5 * (a + jnp.swapaxes(a, -1, -2))


def inverse_cholesky(
    a: Float[Array, "*batch n n"],
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch"]]:
    """`(L⁻¹, log det a)` of a symmetric positive definite `a = L Lᵀ`, so that `a⁻¹ = L⁻ᵀ L⁻¹`."""
    _, inverse, logdet = _cholesky(a)
    return inverse, logdet


def psd_factor(
    a: Float[Array, "*batch n n"], *, jitter: float = 1e-6
) -> Float[Array, "*batch n n"]:
    """Lower triangular `L` with `L Lᵀ = a + jitter · (mean of the diagonal) · I`, `a` PSD."""
    n = a.shape[-1]
    size = jnp.trace(a, axis1=-2, axis2=-1) / n + jnp.finfo(a.dtype).tiny
    low, _, _ = _cholesky(a + jitter * size[..., None, None] * jnp.eye(n, dtype=a.dtype))
    return low


def _cholesky(a: Array, least: Array | None = None) -> tuple[Array, Array, Array]:
    """`(L, L⁻¹, log det a)`; pivots are kept above rounding, `least`.

    Up to 32 rows by recursion on 2 × 2 blocks, which XLA compiles in a time that grows with the size; beyond,
    a loop over blocks of 16 calls that, which it compiles once.
    """
    n = a.shape[-1]
    least = _rounding(a) if least is None else least
    if n <= _UNROLLED:
        return _cholesky_scalar(a, least)
    if n > _RECURSIVE:
        return _cholesky_loop(a, least)
    h = _UNROLLED * (-(-n // (2 * _UNROLLED)))
    low1, inv1, logdet1 = _cholesky(a[..., :h, :h], least)
    side = a[..., h:, :h] @ jnp.swapaxes(inv1, -1, -2)
    rest = a[..., h:, h:] - side @ jnp.swapaxes(side, -1, -2)
    low2, inv2, logdet2 = _cholesky(rest, least)
    low = _lower_blocks(low1, side, low2)
    inverse = _lower_blocks(inv1, -(inv2 @ side) @ inv1, inv2)
    return low, inverse, logdet1 + logdet2


def _rounding(a: Array) -> Array:
    """The rounding of the largest entry of the diagonal of `a`."""
    largest = jnp.max(jnp.diagonal(a, axis1=-2, axis2=-1), axis=-1)
    finfo = jnp.finfo(a.dtype)
    return jax.lax.stop_gradient(finfo.eps * largest + finfo.tiny)


def _cholesky_loop(a: Array, least: Array) -> tuple[Array, Array, Array]:
    """Eliminates blocks of rows from `(a | I)` one by one; padded by an identity to whole blocks."""
    n, batch = a.shape[-1], a.shape[:-2]
    blocks = -(-n // _BLOCK)
    m = blocks * _BLOCK
    eye = jnp.eye(m, dtype=a.dtype)
    padding = [(0, 0)] * len(batch) + [(0, m - n)] * 2
    a = jnp.pad(a, padding) + jnp.where(jnp.arange(m) >= n, eye, 0)
    cut = lambda x, j, axis: jax.lax.dynamic_slice_in_dim(x, j * _BLOCK, _BLOCK, axis)
    put = lambda x, part, j, axis: jax.lax.dynamic_update_slice_in_dim(x, part, j * _BLOCK, axis)

    def body(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        rest, low, inverse, logdet = carry
        column = cut(rest, j, -1)
        low_j, inv_j, logdet_j = _cholesky(cut(column, j, -2), least)
        below = (jnp.arange(m) >= (j + 1) * _BLOCK)[:, None]
        panel = jnp.where(below, column @ jnp.swapaxes(inv_j, -1, -2), 0)
        rows = inv_j @ cut(inverse, j, -2)
        rest = rest - panel @ jnp.swapaxes(panel, -1, -2)
        low = put(low, put(panel, low_j, j, -2), j, -1)
        inverse = put(inverse - panel @ rows, rows, j, -2)
        return rest, low, inverse, logdet + logdet_j

    start = a, jnp.zeros_like(a), jnp.broadcast_to(eye, a.shape), jnp.zeros(batch, a.dtype)
    _, low, inverse, logdet = jax.lax.fori_loop(0, blocks, body, start)
    return low[..., :n, :n], inverse[..., :n, :n], logdet


def _lower_blocks(a: Array, b: Array, c: Array) -> Array:
    top = jnp.concatenate([a, jnp.zeros_like(jnp.swapaxes(b, -1, -2))], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([b, c], axis=-1)], axis=-2)


def _cholesky_scalar(a: Array, least: Array) -> tuple[Array, Array, Array]:
    n = a.shape[-1]
    low: dict[tuple[int, int], Array] = {}
    inv: dict[tuple[int, int], Array] = {}
    zero = jnp.zeros(a.shape[:-2], a.dtype)
    logdet = zero
    for i in range(n):
        for j in range(i):
            dot = sum((low[i, k] * low[j, k] for k in range(j)), zero)
            low[i, j] = (a[..., i, j] - dot) * inv[j, j]
        pivot = a[..., i, i] - sum((low[i, k] ** 2 for k in range(i)), zero)
        pivot = jnp.maximum(pivot, least)
        inv[i, i] = jax.lax.rsqrt(pivot)
        low[i, i] = pivot * inv[i, i]
        logdet = logdet + jnp.log(pivot)
        for j in range(i):
            dot = sum((low[i, k] * inv[k, j] for k in range(j, i)), zero)
            inv[i, j] = -inv[i, i] * dot
    return _assemble(low, n, zero), _assemble(inv, n, zero), logdet


def _assemble(entries: dict[tuple[int, int], Array], n: int, zero: Array) -> Array:
    rows = [jnp.stack([entries.get((i, j), zero) for j in range(n)], -1) for i in range(n)]
    return jnp.stack(rows, axis=-2)


def psd_projection(
    a: Float[Array, "*batch n n"], *, resolution: float = 1e-4
) -> Float[Array, "*batch n n"]:
    """The symmetric positive semi-definite matrix nearest to `a`: `½(S + |S|)`, `S = ½(a + aᵀ)`.

    `|S| = S sign(S)`, and the sign comes from the scaled Newton–Schulz iteration
    `X ← ½ α X (3I − α² X²)` with the optimal `α = √(3 / (1 + l + l²))` for a spectrum in `[l, 1]`,
    capped so that an eigenvalue 1 does not cancel (Chen and Chow, Argonne preprint 5059, 2014).

    Eigenvalues smaller than `resolution · ‖S‖` in magnitude are only partly resolved; a
    multiple of the identity of that order keeps the result positive semi-definite.
    """
    s = symmetrise(a)
    norm = jnp.minimum(
        jnp.max(jnp.sum(jnp.abs(s), axis=-1), axis=-1), jnp.sqrt(jnp.sum(s * s, axis=(-2, -1)))
    )[..., None, None]
    tiny = jnp.finfo(s.dtype).tiny
    x = s / jnp.maximum(norm, tiny)
    eye = jnp.eye(s.shape[-1], dtype=s.dtype)
    for alpha in _sign_scalings(resolution):
        x = 0.5 * alpha * (x @ (3.0 * eye - alpha**2 * (x @ x)))
    return symmetrise(0.5 * (s + s @ x)) + 0.25 * resolution * norm * eye


def _sign_scalings(lower: float) -> list[float]:
    scalings = []
    while lower < 1 - 1e-4:
        alpha = min((3 / (1 + lower + lower**2)) ** 0.5, _MOST_SCALING)
        lower = 0.5 * alpha * lower * (3 - (alpha * lower) ** 2)
        scalings.append(alpha)
    return scalings
