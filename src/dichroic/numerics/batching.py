"""Which arrays of a pytree are shared by all observations and which have one entry per observation.

Operators and noise models are written for *one* observation. A parameter whose array has one more
axis than that (`Dense.matrix` with shape `(n, M, D)` instead of `(M, D)`) is *per observation*: the
leading axis counts observations. `split` separates the two kinds, so that a function of one
observation is mapped over the first and closes over the second:

    rows, shared = split(tree)
    jax.vmap(lambda r: f(eqx.combine(r, shared)))(rows)

What is shared stays unbatched under `vmap`, so work that only depends on it is done once.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from dichroic.errors import DataError
from dichroic.numerics import precision as precision  # before anything is compiled
from dichroic.numerics.arrays import nan_where_masked, unmasked

Tree = TypeVar("Tree")


def as_jax(value: Any) -> jax.Array:
    """`value` as a JAX array, whatever its byte order.

    Raises `DataError` if it holds no numbers, if some are masked, or if it is a list of arrays of unequal shapes.
    """
    if not _is_jax(value):
        value = unmasked(value, "an array")
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "OSUMm":
            raise DataError(f"an array of type {value.dtype}; expected numbers")
        value = value.astype(value.dtype.newbyteorder("="), copy=False)
    return jnp.asarray(value)


def as_float(value: Any) -> jax.Array:
    """`value` as a JAX array of the default floating type (float32 unless x64 is enabled)."""
    array = as_jax(value)
    if jnp.iscomplexobj(array):
        raise DataError(f"an array of type {array.dtype}; expected real numbers")
    return array.astype(float)


def as_float_or_nan(value: Any) -> jax.Array:
    """As `as_float`, NaN where `value` is masked: for parameters that do not count where nothing was observed."""
    return as_float(value if _is_jax(value) else nan_where_masked(value))


def _is_jax(value: Any) -> bool:
    """Whether `value` is an array of JAX, or a list with some."""
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))


def observation_axes(ndim: int | Callable[[Any], int]) -> dict[str, object]:
    """Metadata of a field for an array that has `ndim` axes, or `ndim(module)`, for one observation.

    With one axis more the array is per observation.
    """
    return {"ndim": ndim}


def per_observation_if(flag: str) -> dict[str, object]:
    """Metadata of a field for a pytree that is per observation where the module's attribute `flag` is true."""
    return {"flag": flag}


def split(tree: Tree) -> tuple[Tree, Tree]:
    """`(rows, shared)`: the per-observation arrays of `tree`, and all the others.

    Both have the structure of `tree` with `None` where the other has an array;
    `equinox.combine(rows, shared)` restores `tree`.
    """
    mask = jax.tree.unflatten(jax.tree.structure(tree), list(_row_mask(tree)))
    return eqx.partition(tree, mask)


def take(tree: Tree, index: Any) -> Tree:
    """`tree` restricted to the observations `index` (a slice or an integer array)."""
    rows, shared = split(tree)
    return eqx.combine(jax.tree.map(lambda a: a[index], rows), shared)


def in_batches(function: Callable[..., Any], size: int, *rows: Any) -> np.ndarray:
    """`function` of arrays of rows, `size` rows at once and the last batch padded, in float64.

    In a loop of Python, where convolutions on a CPU take a fifth of the time that they take in one of XLA.
    """
    n, parts = len(rows[0]), []
    for start in range(0, n, size):
        index = np.minimum(np.arange(start, start + min(size, n)), n - 1)
        parts.append(np.asarray(function(*(a[index] for a in rows)), np.float64))
    return np.concatenate(parts)[:n]


def row_counts(tree: Any) -> set[int]:
    """The lengths of the per-observation axes found in `tree` (empty if all is shared)."""
    rows, _ = split(tree)
    return {int(np.shape(leaf)[0]) for leaf in jax.tree.leaves(rows)}


def _row_mask(tree: Any) -> Iterator[bool]:
    """Per leaf of `tree`, in flattening order: is it per observation?"""
    for node in jax.tree.leaves(tree, is_leaf=lambda n: isinstance(n, eqx.Module)):
        if isinstance(node, eqx.Module):
            for f in dataclasses.fields(node):
                if not f.metadata.get("static", False):
                    yield from _field_mask(node, f)
        else:
            yield False


def _field_mask(node: eqx.Module, f: dataclasses.Field[Any]) -> Iterator[bool]:
    value = getattr(node, f.name)
    if "ndim" in f.metadata:
        ndim = f.metadata["ndim"]
        ndim = ndim(node) if callable(ndim) else ndim
        yield from (np.ndim(leaf) > ndim for leaf in jax.tree.leaves(value))
    elif "flag" in f.metadata:
        yield from (bool(getattr(node, f.metadata["flag"])) for _ in jax.tree.leaves(value))
    else:
        yield from _row_mask(value)
