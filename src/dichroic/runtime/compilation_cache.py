"""Compiled programs that are kept from one command to the next.

JAX compiles every program of a fit anew in each process, which is most of a small one; with the programs of an
earlier command at hand it does not. They are kept in `~/.cache/dichroic/programs` (or below `XDG_CACHE_HOME`),
apart for each kind of processor: on a cluster several may share a home. What has not been used for three months is
removed; all of it may be at any time. Users' own settings come first: `JAX_COMPILATION_CACHE_DIR` keeps programs
elsewhere, `JAX_ENABLE_COMPILATION_CACHE=0` nowhere.
"""

import contextlib
import hashlib
import os
import platform
import sys
import time
import warnings
from pathlib import Path

from dichroic.runtime.files import user_cache

LEAST_SECONDS = "0.1"  # to compile, from which on a program is kept
_UNUSED = 90 * 24 * 3600.0


def keep_programs(folder: Path | None = None) -> None:
    """Have JAX keep programs in `folder` or where they are by default, here and in processes started here."""
    for what in ("reading", "writing"):  # after a kill, or on a full disk; the program is compiled
        warnings.filterwarnings("ignore", f"Error {what} persistent compilation cache entry")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        here = (folder or user_cache() / "programs") / _processor()
        here.mkdir(parents=True, exist_ok=True)
        _sweep(here)
    except (OSError, RuntimeError):  # no home, or none to write to: programs are compiled then
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(here)
    seconds = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", LEAST_SECONDS)
    if jax := sys.modules.get("jax"):  # which reads them when it is imported
        jax.config.update("jax_compilation_cache_dir", str(here))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))


def _processor() -> str:
    """What stands for a processor and all that it can do: a program for one may not run on another."""
    told = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told += sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def _sweep(folder: Path) -> None:
    """Remove what has not been used for long."""
    oldest = time.time() - _UNUSED
    for entry in os.scandir(folder):
        found = entry.stat()
        if max(found.st_atime, found.st_mtime) < oldest:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
