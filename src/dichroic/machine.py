"""What this process runs on, and the memory that it has needed."""

import contextlib
import os
import platform
import sys
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


def one_blas_thread() -> contextlib.AbstractContextManager[Any]:
    """While it lasts, NumPy's products of matrices use one thread: how many there are changes their last bits."""
    return _controller().limit(limits=1, user_api="blas")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # it looks through all loaded libraries, which takes its time


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
