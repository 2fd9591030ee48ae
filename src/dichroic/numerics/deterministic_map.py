"""Groups of a fixed number of lanes, in which observations are computed, each in the lane that its number says."""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dichroic.numerics.batching import split

LANES = 64
_EACH = 1024  # observations at once, of which little is asked


def lanes_width(n: int, batch_size: int, devices: int = 1) -> int:
    """`batch_size` rounded up to whole groups of lanes for each device, at least two: XLA unrolls a loop over one.

    The loop's body is then the same program for any batch size.
    """
    return devices * LANES * max(2, -(-min(batch_size, n) // (devices * LANES)))


def own_lanes(n: int, first_index: int) -> slice:
    """Where `n` observations from number `first_index` on lie in their lanes: number `i` in lane `i % LANES`."""
    return slice(first_index % LANES, first_index % LANES + n)


def in_lanes(
    rows: Any, batch_size: int, first_index: int = 0, devices: int = 1
) -> Iterator[tuple[int, Any, np.ndarray]]:
    """Cut arrays of rows into chunks of whole groups of lanes: `(start, rows, number of each)`.

    The first group is filled up in front with the first row (so `start` may be negative), the last with the last.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    own = own_lanes(n, first_index)
    width = lanes_width(own.stop, batch_size, devices)
    for start in range(-own.start, n, width):
        at = np.arange(start, start + width)
        take = np.clip(at, 0, n - 1)
        cut = lambda a, take=take: a[take].reshape(-1, LANES, *a.shape[1:])
        yield start, jax.tree.map(cut, rows), (first_index + at).reshape(-1, LANES)


def chunks(
    tree: Any, batch_size: int, first_index: int = 0
) -> Iterator[tuple[int, tuple[Any, Any], Int[Array, "groups lanes"]]]:
    """`in_lanes` of per-observation arrays, for all devices of this process: `(start, (rows, shared), index)`."""
    rows, shared = split(tree)
    devices = len(jax.local_devices())
    for start, cut, index in in_lanes(rows, batch_size, first_index, devices):
        yield start, (cut, shared), jnp.asarray(index)


def of_each(
    one: Callable[[Any, Any], Array], tree: Any, x: dict[str, np.ndarray], first_index: int = 0
) -> np.ndarray:
    """`one(row, x)` of every observation of `tree`, its own of `x`: none depends on how many others there are."""
    rows, shared = split(tree)
    cuts = in_lanes((rows, x), _EACH, first_index)
    found = [np.asarray(_lanes_of_each(one, *cut, shared)) for _, cut, _ in cuts]
    flat = np.concatenate([a.reshape(-1, *a.shape[2:]) for a in found])
    n = len(next(iter(x.values())))
    return flat[own_lanes(n, first_index)]


@eqx.filter_jit
def _lanes_of_each(
    one: Callable[[Any, Any], Array], rows: Any, x: dict[str, Any], shared: Any
) -> Array:
    each = jax.vmap(lambda row, x: one(eqx.combine(row, shared), x))
    return jax.lax.map(lambda lanes: each(*lanes), (rows, x))
