"""A U-Net conditioned on the noise level, for series and images of any number of channels.

After Ronneberger et al. (arXiv 1505.04597), with the residual blocks and adaptive group normalisation of
Dhariwal and Nichol (arXiv 2105.05233).
"""

import math
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dichroic.errors import ConfigError
from dichroic.operators import Shape
from dichroic.priors.networks.embedding import noise_features

Layer = TypeVar("Layer", bound=eqx.Module)

Precision = Literal["float32", "bfloat16"]
_HEAD = 32  # channels of an attention head
_FREQUENCIES = 8


class Block(eqx.Module):
    """`h ← skip(h) + C₂ silu((1 + a) ∘ norm(C₁ silu(norm(h))) + b)`, `a, b` linear in the features of σ."""

    norms: tuple[eqx.nn.GroupNorm, eqx.nn.GroupNorm]
    convolutions: tuple[eqx.nn.Conv, eqx.nn.Conv]
    modulation: eqx.nn.Linear
    skip: eqx.nn.Conv | None

    def __init__(self, ndim: int, inner: int, outer: int, features: int, *, key: PRNGKeyArray):
        a, b, c, d = jax.random.split(key, 4)
        self.norms = (_norm(inner), _norm(outer))
        second = _conv(ndim, outer, outer, key=b)
        self.convolutions = (_conv(ndim, inner, outer, key=a), _zero(second))
        self.modulation = eqx.nn.Linear(features, 2 * outer, key=c)
        self.skip = None if inner == outer else _conv(ndim, inner, outer, 1, key=d)

    def __call__(self, h: Array, features: Array) -> Array:
        """`h` of one sample, channels first."""
        u = self.convolutions[0](jax.nn.silu(self.norms[0](h)))
        gain, shift = jnp.split(_beside(self.modulation(features), u), 2)
        u = self.convolutions[1](jax.nn.silu((1 + gain) * self.norms[1](u) + shift))
        return (h if self.skip is None else self.skip(h)) + u


class Attention(eqx.Module):
    """Self-attention over all positions: `h ← h + W softmax(q kᵀ / √d) v`."""

    norm: eqx.nn.GroupNorm
    inner: eqx.nn.Linear
    outer: eqx.nn.Linear

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        a, b = jax.random.split(key)
        self.norm = _norm(channels)
        self.inner = eqx.nn.Linear(channels, 3 * channels, key=a)
        self.outer = _zero(eqx.nn.Linear(channels, channels, key=b))

    def __call__(self, h: Array) -> Array:
        """`h` of one sample, channels first."""
        channels = h.shape[0]
        x = jax.vmap(self.inner)(self.norm(h).reshape(channels, -1).T)
        heads = next(n for n in (channels // _HEAD, 1) if n and channels % n == 0)
        q, k, v = (u.reshape(len(x), heads, -1) for u in jnp.split(x, 3, axis=1))
        y = jax.nn.dot_product_attention(q, k, v).reshape(len(x), channels)
        return h + jax.vmap(self.outer)(y).T.reshape(h.shape)


class UNet(eqx.Module):
    """`F(x, c_noise)` of arrays of `shape`, whose last `ndim` axes are positions and one before, channels.

    `ndim` defaults to that without channels for series and images, `(L,)` and `(H, W)`, and to images with
    channels, `(C, H, W)`; a series with channels, `(C, L)`, needs `ndim=1`. The widths of the levels are
    `channels` times 1, 2, 3, …; each has `depth` blocks, and half the positions of the one above. Sizes that
    do not halve evenly are padded at the edges. With `attention` the lowest level attends to itself.
    `precision` is that of the network; what it returns is float32. The last layer starts at zero.
    """

    first: eqx.nn.Conv
    down: list[list[Block]]
    middle: list[Block | Attention]
    up: list[list[Block]]
    last: tuple[eqx.nn.GroupNorm, eqx.nn.Conv]
    shape: Shape = eqx.field(static=True)
    ndim: int = eqx.field(static=True)
    channels: int = eqx.field(static=True)
    levels: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)
    attention: bool = eqx.field(static=True)
    precision: Precision = eqx.field(static=True)

    def __init__(
        self,
        shape: Shape,
        channels: int = 32,
        levels: int = 3,
        depth: int = 2,
        attention: bool = False,
        precision: str = "float32",
        ndim: int | None = None,
        *,
        key: PRNGKeyArray,
    ):
        if precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision: expected float32 or bfloat16, got {precision!r}")
        self.shape, self.channels, self.levels, self.depth = tuple(shape), channels, levels, depth
        self.attention, self.precision = attention, precision
        self.ndim = spatial_axes(self.shape, ndim)
        keys = iter(jax.random.split(key, 4 + 4 * levels * (depth + 1)))
        width = [channels * (i + 1) for i in range(levels)]
        features = 2 * _FREQUENCIES
        block = lambda i, o: Block(self.ndim, i, o, features, key=next(keys))
        size = math.prod(self.shape[: -self.ndim])
        self.first = _conv(self.ndim, size, channels, key=next(keys))
        here, skips, self.down = channels, [channels], []
        for w in width:
            self.down.append([block(here if i == 0 else w, w) for i in range(depth)])
            here = w
            skips += [w] * depth
        attend = [Attention(here, key=next(keys))] if attention else []
        self.middle = [block(here, here), *attend, block(here, here)]
        self.up = []
        for level in reversed(range(levels)):
            blocks = []
            for _ in range(depth + (level == 0)):
                blocks.append(block(here + skips.pop(), width[level]))
                here = width[level]
            self.up.append(blocks)
        self.last = (_norm(here), _zero(_conv(self.ndim, here, size, key=next(keys))))

    @property
    def settings(self) -> dict[str, int | bool | str]:
        """What builds a network of the same structure."""
        names = ("channels", "levels", "depth", "attention", "precision", "ndim")
        return {name: getattr(self, name) for name in names}

    def __call__(
        self, x: Float[Array, "*shape"], c_noise: Float[Array, ""]
    ) -> Float[Array, "*shape"]:
        """`F(x, c_noise)` for one sample."""
        net = self
        if self.precision == "bfloat16":
            cast = lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a
            net = jax.tree.map(cast, self)
        features = noise_features(c_noise, _FREQUENCIES).astype(net.first.weight.dtype)
        padded = self._padded(x).astype(net.first.weight.dtype)
        y = net._body(padded, features).astype(x.dtype)
        inner = tuple(slice(0, n) for n in self.shape[-self.ndim :])
        return y[(slice(None), *inner)].reshape(self.shape)

    def _padded(self, x: Array) -> Array:
        """Channels first, and positions a multiple of what the levels divide them by."""
        dims, unit = self.shape[-self.ndim :], 2 ** (self.levels - 1)
        more = [(0, -n % unit) for n in dims]
        return jnp.pad(x.reshape(-1, *dims), [(0, 0), *more], mode="edge")

    def _body(self, x: Array, features: Array) -> Array:
        h = self.first(x)
        skips = [h]
        for level, blocks in enumerate(self.down):
            h = h if level == 0 else _halve(h)
            for block in blocks:
                h = block(h, features)
                skips.append(h)
        for part in self.middle:
            h = part(h, features) if isinstance(part, Block) else part(h)
        for i, blocks in enumerate(self.up):
            h = h if i == 0 else _double(h)
            for block in blocks:
                h = block(jnp.concatenate([h, skips.pop()]), features)
        norm, convolution = self.last
        return convolution(jax.nn.silu(norm(h)))


def spatial_axes(shape: Shape, ndim: int | None = None) -> int:
    """`ndim`, or the number of axes that are positions; raises `ConfigError` where there is no such number."""
    found = min(len(shape), 2) if ndim is None else ndim
    if found not in (1, 2) or len(shape) - found not in (0, 1):
        raise ConfigError(
            f"a U-Net is for series and images with or without channels, (L,), (H, W), (C, H, W), or, with "
            f"one spatial axis, (C, L); not for a source of shape {shape} with {found} spatial axes"
        )
    return found


def _conv(ndim: int, inner: int, outer: int, size: int = 3, *, key: PRNGKeyArray) -> eqx.nn.Conv:
    return eqx.nn.Conv(ndim, inner, outer, size, padding=size // 2, key=key)


def _norm(channels: int) -> eqx.nn.GroupNorm:
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
    return eqx.nn.GroupNorm(groups, channels, channelwise_affine=False)


def _zero(layer: Layer) -> Layer:
    """`layer` with weights and bias of zero."""
    return jax.tree.map(lambda a: jnp.zeros_like(a) if eqx.is_inexact_array(a) else a, layer)


def _beside(v: Array, h: Array) -> Array:
    """`v` with as many axes as `h`."""
    return v.reshape(-1, *[1] * (h.ndim - 1))


def _halve(h: Array) -> Array:
    """The mean of each block of two along every axis of positions."""
    blocks = [n for d in h.shape[1:] for n in (d // 2, 2)]
    return h.reshape(h.shape[0], *blocks).mean(axis=tuple(range(2, 2 * h.ndim - 1, 2)))


def _double(h: Array) -> Array:
    """Every position twice along every axis."""
    for axis in range(1, h.ndim):
        h = jnp.repeat(h, 2, axis=axis)
    return h
