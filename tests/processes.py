"""Commands in processes of their own, and the memory that they take."""

import os
import subprocess
import sys
import time
from pathlib import Path

COMMAND = ["-m", "dichroic"]


def environment():
    source = str(Path(__file__).parents[1] / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


def peak(args):
    """The largest resident memory in MiB of a command, watched from outside."""
    process = subprocess.Popen(
        [sys.executable, *COMMAND, *args],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    found = 0
    while process.poll() is None:
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    found = max(found, int(line.split()[1]) // 1024)
        except OSError:
            pass
        time.sleep(0.005)
    assert process.returncode == 0, process.stderr.read()
    process.stderr.close()
    return found
