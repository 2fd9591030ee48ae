"""A fit that is killed again and again ends in the same model; what a kill costs.

Fits examples/kill/problem.yaml once as it is and once with `--kills` SIGKILLs at random moments, each followed by
`--resume`, and compares the models byte by byte.

Run: python benchmarks/kills.py --kills 20   (six minutes on two cores)
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PROBLEM = Path(__file__).parents[1] / "examples/kill/problem.yaml"


def command(out: Path) -> list[str]:
    """The fit, new or resumed."""
    words = ["fit", str(PROBLEM), "--out", str(out), "--resume", "--no-report"]
    return [sys.executable, "-m", "dichroic.cli.main", *words]


def run(out: Path, seconds: float | None = None) -> bool:
    """Let a fit go on, and kill it after `seconds`; whether it finished."""
    process = subprocess.Popen(command(out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        return process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def model(out: Path) -> dict[str, bytes]:
    """The files of the model by name."""
    return {p.name: p.read_bytes() for p in sorted((out / "best").iterdir())}


def main() -> None:
    """One line of what it took, and whether the models are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        began = time.perf_counter()
        if not run(whole):
            raise SystemExit("the fit failed")
        alone = time.perf_counter() - began
        began, kills = time.perf_counter(), 0
        while kills < args.kills and not run(killed, rng.uniform(0.1, 0.4) * alone):
            kills += 1
        finished = run(killed)
        took = time.perf_counter() - began
        same = finished and model(whole) == model(killed)
    print(
        f"alone {alone:.0f} s; with {kills} kills {took:.0f} s, {(took - alone) / max(kills, 1):.1f} s a kill"
    )
    print("the models are the same, byte by byte" if same else "THE MODELS DIFFER")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
