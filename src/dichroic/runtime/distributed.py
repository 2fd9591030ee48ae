"""The processes and the devices that share one piece of work.

Processes find each other through `jax.distributed`; on one machine, with one process, there is nothing to find.
Observations are shared out among processes, each of which computes with all of its own devices; networks are
trained on one mesh of all devices of all processes. What processes tell each other are sums, draws and states,
as bytes: every number arrives as it was, and everybody adds in the same order, so all come to the same sums.
"""

import os
import re
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dichroic.errors import ConfigError, DataError, LostError, RunError

Tree = TypeVar("Tree")
ADDRESS, PROCESSES, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_CLUSTERS = {  # how a launcher tells a process the number of all: as `jax.distributed` finds them
    "slurm": ("SLURM_STEP_NODELIST", "SLURM_NTASKS"),
    "ompi": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
}
AXIS = "data"
_PATIENCE = (
    30  # seconds after which a process that says nothing is given up, and with it all others
)
_LOST = re.compile("^(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): |Gloo|NCCL")


def initialize() -> None:
    """Find the other processes, if the environment says that there are any; before anything else asks for devices.

    They are told by `JAX_COORDINATOR_ADDRESS` (`host:port`, the same for all), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` (from 0), or by `srun` or `mpirun`. Raises `ConfigError` where the variables make no sense.
    """
    if jax.distributed.is_initialized():
        return
    given = [os.environ.get(name) for name in (ADDRESS, PROCESSES, NUMBER)]
    if given[1] is None and given[2] is None:
        for cluster, (present, count) in _CLUSTERS.items():
            if present in os.environ and os.environ.get(count, "1") != "1":
                _initialize(cluster_detection_method=cluster)
        return
    address, count, number = given
    if not address or not (count or "").isdecimal() or not (number or "").isdecimal():
        raise ConfigError(
            f"{ADDRESS}={address}, {PROCESSES}={count}, {NUMBER}={number}: expected host:port, the number of "
            "processes, and that of this one, from 0"
        )
    if int(number or 0) >= int(count or 0):
        raise ConfigError(f"{NUMBER}={number}: there are {count} processes, numbered from 0")
    if int(count or 0) > 1:
        _initialize(
            coordinator_address=address,
            num_processes=int(count or 0),
            process_id=int(number or 0),
            cluster_detection_method="deactivate",
        )


def _initialize(**how: Any) -> None:
    jax.distributed.initialize(heartbeat_timeout_seconds=_PATIENCE, **how)


@contextmanager
def detect_lost_process() -> Generator[None, None, None]:
    """Say where other processes are lost inside: `LostError`, after which `abort` does not wait for them."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if processes() == 1 or not _LOST.search(str(error)):
            raise
        raise LostError(
            "another process is lost or cannot be reached; finished iterations are kept: start all again, with "
            "--resume"
        ) from error


def abort(status: int) -> None:
    """End this process at once: JAX would wait for those that are lost, and then abort."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def processes() -> int:
    """How many processes there are."""
    return jax.process_count()


def is_primary() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return jax.process_index() == 0


def local_span(count: int) -> tuple[int, int]:
    """`(first, stop)`: which of `count` observations are those of this process."""
    i, n = jax.process_index(), jax.process_count()
    return i * count // n, (i + 1) * count // n


def all_reduce_sum(tree: Tree) -> Tree:
    """The sum of the numbers and arrays of all processes, in the order of the processes."""
    if processes() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    found = []
    for content in all_gather_bytes(b"".join(a.tobytes() for a in arrays)):
        found.append(_unpacked(content, arrays))
    sums = [sum(parts[1:], parts[0]) for parts in zip(*found, strict=True)]
    kinds = zip(sums, leaves, strict=True)
    return jax.tree.unflatten(structure, [_as(kind, np.asarray(value)) for value, kind in kinds])


def _unpacked(content: bytes, like: list[np.ndarray]) -> list[np.ndarray]:
    ends = np.cumsum([a.nbytes for a in like])
    parts = [content[end - a.nbytes : end] for a, end in zip(like, ends, strict=True)]
    return [np.frombuffer(p, a.dtype).reshape(a.shape) for p, a in zip(parts, like, strict=True)]


def _as(kind: Any, value: np.ndarray) -> Any:
    """`value` as a plain number where `kind` is one."""
    return type(kind)(value) if isinstance(kind, (int, float)) else value


def all_gather(array: np.ndarray, axis: int = 0) -> np.ndarray:
    """The parts that the processes have of an array, one after the other along `axis`."""
    if processes() == 1:
        return array
    first = np.ascontiguousarray(np.moveaxis(array, axis, 0))
    parts = [
        np.frombuffer(content, first.dtype).reshape(-1, *first.shape[1:])
        for content in all_gather_bytes(first.tobytes())
    ]
    return np.moveaxis(np.concatenate(parts), 0, axis)


def broadcast_from_primary(make: Callable[[], bytes]) -> bytes:
    """What `make` gives in the first process, in all of them; where it fails there, all fail."""
    content = run_on_all(lambda: make() if is_primary() else b"")
    return all_gather_bytes(content)[0]


def run_on_all(work: Callable[[], Tree]) -> Tree:
    """`work` in every process; where it fails in one, it fails in all.

    Where numbers or data are at fault with `DataError`, else with `RunError`.
    """
    if processes() == 1:
        return work()
    failure: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:
        failure = error
    kind = b"n" if isinstance(failure, (np.linalg.LinAlgError, DataError)) else b"r"
    said = all_gather_bytes(b"" if failure is None else kind + str(failure).encode())
    if failure is not None:
        raise failure
    for number, words in enumerate(said):
        if words:
            raised = DataError if words[:1] == b"n" else RunError
            raise raised(f"process {number} failed: {words[1:].decode()}")
    return result


def all_gather_bytes(content: bytes) -> list[bytes]:
    """The `content` of every process, in their order."""
    if processes() == 1:
        return [content]
    sizes = _all_of(np.array([len(content)], np.uint64).view(np.uint8)).view(np.uint64).ravel()
    room = int(sizes.max())  # few sizes: each compiles
    room = -(-room // 2**20) * 2**20 if room > 2**20 else 1 << max(room - 1, 255).bit_length()
    padded = np.zeros(room, np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    found = _all_of(padded)
    return [row[: int(size)].tobytes() for row, size in zip(found, sizes, strict=True)]


def _all_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(multihost_utils.process_allgather(array))


# Devices


@cache
def own_mesh() -> Mesh:
    """The devices of this process."""
    return Mesh(np.array(jax.local_devices()), (AXIS,))


def by_device(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """`function` of rows for rows, each device of this process with its own; inside of `jax.jit`."""
    if own_mesh().size == 1:
        return function
    rows = PartitionSpec(AXIS)
    return jax.shard_map(function, mesh=own_mesh(), in_specs=rows, out_specs=rows, check_vma=False)


def map_over_devices(
    function: Callable[..., Tree], shared: Any, rows: Any, *, compiled: bool = False
) -> Tree:
    """`function(shared, rows)`, jitted, of rows that go evenly among the devices of this process.

    Each runs the program of a single device: XLA rounds otherwise in one that is partitioned. Processors are one
    device, whatever they are counted as, with one program, which several threads run once it is `compiled`.
    """
    devices = jax.local_devices()
    if len(devices) == 1:
        return function(shared, rows)
    each = _count(rows) // len(devices)
    parts = [
        jax.tree.map(lambda a, i=i: a[i * each : (i + 1) * each], rows) for i in range(len(devices))
    ]
    if devices[0].platform == "cpu":
        run = lambda part, _: jax.block_until_ready(function(shared, part))
        threads = len(devices) if compiled else 1
    else:
        run = lambda part, device: function(*_put((shared, part), device))
        threads = len(devices)  # every device compiles
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(run, parts, devices))
    return jax.tree.map(lambda *a: np.concatenate([np.asarray(part) for part in a]), *found)


def _put(tree: Tree, device: Any) -> Tree:
    put = lambda a: jax.device_put(a, device) if isinstance(a, (np.ndarray, jax.Array)) else a
    return jax.tree.map(put, tree)


def map_by_device(function: Callable[..., Tree], rows: Any) -> Tree:
    """`function` of any number of rows."""
    devices = own_mesh().size
    if devices == 1:
        return function(rows)
    found = by_device(function)(_filled(rows, devices)[0])
    return jax.tree.map(lambda a: a[: _count(rows)], found)


def sum_by_device(function: Callable[..., Tree], rows: Any) -> Tree:
    """`function(rows, weights)`, a sum over rows, each device of this process with its own; inside of `jax.jit`.

    `weights` are 1, and 0 for the rows that fill up the last device.
    """
    devices = own_mesh().size
    if devices == 1:
        return function(rows, jnp.ones(_count(rows)))
    alone = lambda *args: jax.tree.map(lambda a: a[None], function(*args))
    parts = by_device(alone)(*_filled(rows, devices))
    return jax.tree.map(lambda a: a.sum(axis=0), parts)


def _count(rows: Any) -> int:
    return jax.tree.leaves(rows)[0].shape[0]


def _filled(rows: Tree, devices: int) -> tuple[Tree, jax.Array]:
    """As many rows as go evenly, the last ones again, and the weights 1 and 0 of both kinds."""
    count = _count(rows)
    index = jnp.arange(-(-count // devices) * devices)
    at = jnp.minimum(index, count - 1)
    return jax.tree.map(lambda a: a[at], rows), (index < count).astype(float)


@cache
def whole_mesh() -> Mesh:
    """The devices of all processes."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def replicated(tree: Tree) -> Tree:
    """Arrays as they are, on every device of every process; all processes have the same."""
    if len(jax.devices()) == 1:
        return tree
    where = NamedSharding(whole_mesh(), PartitionSpec())

    def put(leaf: Any) -> Any:
        if not isinstance(leaf, (np.ndarray, jax.Array)) or _is_key(leaf):
            return leaf
        if isinstance(leaf, jax.Array) and leaf.sharding == where:
            return leaf
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    return jax.tree.map(put, tree)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def local_copy(tree: Tree) -> Tree:
    """What `replicated` has put on all devices, on the first device of this process alone."""
    if len(jax.devices()) == 1:
        return tree
    return jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a)) if isinstance(a, jax.Array) else a, tree
    )


def shard_rows(rows: jax.Array) -> jax.Array:
    """Inside of a jitted function: the rows of an array, shared out among all devices if that goes evenly."""
    if len(jax.devices()) == 1 or len(rows) % len(jax.devices()):
        return rows
    where = NamedSharding(whole_mesh(), PartitionSpec(AXIS))
    return jax.lax.with_sharding_constraint(rows, where)
