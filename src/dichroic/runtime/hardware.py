"""What this process runs on, and the memory that it has needed."""

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from threadpoolctl import ThreadpoolController


def machine() -> dict[str, Any]:
    """Processor, device and versions, as plain values."""
    import jax

    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "system": platform.system(),
        "device": str(jax.devices()[0].device_kind),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "dichroic": sys.modules["dichroic"].__version__,
    }


@contextlib.contextmanager
def in_threads() -> Generator[Callable[..., Iterable[Any]], None, None]:
    """A `map` with as many threads as NumPy's products of matrices would take, each of which then takes one.

    How many threads a product takes changes its last bits; how many products there are at once changes nothing.
    """
    count = max((lib["num_threads"] for lib in _blas().info()), default=os.cpu_count() or 1)
    with _blas().limit(limits=1):
        yield map if count == 1 else _threads(count).map


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)


@cache
def _blas() -> ThreadpoolController:
    found = ThreadpoolController()  # it looks through all loaded libraries, which takes its time
    return found.select(user_api="blas")


def peak_memory() -> float:
    """The largest resident memory of this process so far, MiB.

    On Linux from the kernel's mark of this program: `ru_maxrss` there starts from that of the parent.
    """
    told = _status("VmHWM")
    if told is not None:
        return told
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def resident_memory() -> float:
    """The resident memory of this process now, MiB; where the system does not tell, the largest so far."""
    told = _status("VmRSS")
    return peak_memory() if told is None else told


def _status(name: str) -> float | None:
    """What Linux says of this process, MiB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 2**10
    return None
