"""Maps over observations whose results do not depend, in any bit, on how many observations there are.

Observations are computed in batches of a fixed width, observation `i` always in slot `i mod BATCH_WIDTH`: a
compiled program may round differently from slot to slot, but never within one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dichroic.numerics.batching import split

BATCH_WIDTH = 64
_MAP_SIZE = 1024  # observations at once in `map_observations`


def chunk_size(n: int, batch_size: int, devices: int = 1) -> int:
    """`batch_size` rounded up to whole batches for each device, at least two: XLA unrolls a loop over one.

    The loop's body is then the same program for any batch size.
    """
    return devices * BATCH_WIDTH * max(2, -(-min(batch_size, n) // (devices * BATCH_WIDTH)))


def own_slots(n: int, first_index: int) -> slice:
    """Where `n` observations from number `first_index` on lie among the slots of their batches."""
    return slice(first_index % BATCH_WIDTH, first_index % BATCH_WIDTH + n)


def fixed_width_batches(
    rows: Any, batch_size: int, first_index: int = 0, devices: int = 1
) -> Iterator[tuple[int, Any, np.ndarray]]:
    """Cut arrays of rows into chunks of whole batches: `(start, rows, number of each)`.

    The first batch is filled up in front with the first row (so `start` may be negative), the last with the last.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    own = own_slots(n, first_index)
    size = chunk_size(own.stop, batch_size, devices)
    for start in range(-own.start, n, size):
        at = np.arange(start, start + size)
        take = np.clip(at, 0, n - 1)
        cut = lambda a, take=take: a[take].reshape(-1, BATCH_WIDTH, *a.shape[1:])
        yield start, jax.tree.map(cut, rows), (first_index + at).reshape(-1, BATCH_WIDTH)


def chunks(
    tree: Any, batch_size: int, first_index: int = 0
) -> Iterator[tuple[int, tuple[Any, Any], Int[Array, "batches slots"]]]:
    """Per-observation arrays in `fixed_width_batches` for all devices: `(start, (rows, shared), numbers)`."""
    rows, shared = split(tree)
    devices = len(jax.local_devices())
    for start, cut, index in fixed_width_batches(rows, batch_size, first_index, devices):
        yield start, (cut, shared), jnp.asarray(index)


def map_observations(
    one: Callable[[Any, Any], Array], tree: Any, x: dict[str, np.ndarray], first_index: int = 0
) -> np.ndarray:
    """`one(row, x)` of every observation of `tree`, each with its own row of the arrays `x`."""
    rows, shared = split(tree)
    cuts = fixed_width_batches((rows, x), _MAP_SIZE, first_index)
    parts = [np.asarray(_map_batches(one, row, own, shared)) for _, (row, own), _ in cuts]
    flat = np.concatenate([a.reshape(-1, *a.shape[2:]) for a in parts])
    n = len(next(iter(x.values())))
    return flat[own_slots(n, first_index)]


@eqx.filter_jit
def _map_batches(
    one: Callable[[Any, Any], Array], rows: Any, x: dict[str, Any], shared: Any
) -> Array:
    each = jax.vmap(lambda row, x: one(eqx.combine(row, shared), x))
    return jax.lax.map(lambda batch: each(*batch), (rows, x))
