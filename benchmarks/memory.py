"""Peak memory of separating, or learning from, more and more observations, as a whole and in parts.

    python benchmarks/memory.py [--fit] [--counts 20000,40000,80000] [--size 256] [--draws 2]

Every row is two processes of `dichroic separate`, of which one writes an .npz and the other a .zarr by blocks of
4096 observations; or, with `--fit`, two of `dichroic fit`, of which one is given `--memory 1GiB`. Peaks are the
kernel's (`VmHWM`), read from outside; Linux only.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from dichroic import Problem, Separator, Source, View
from dichroic.operators import Identity
from dichroic.priors import GaussianMixture
from dichroic.runtime.tables import text_table

CHUNK = 4096


def prepare(folder: Path, size: int) -> None:
    """A model of two sources of `size` numbers, its problem file, and the statement of a view."""
    rng = np.random.default_rng(0)
    priors = {}
    for name in ("a", "b"):
        factor = rng.normal(size=(2, size, 4))
        covariances = factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(size)
        means = rng.normal(size=(2, size))
        priors[name] = GaussianMixture.from_moments([0.5, 0.5], means, covariances, rank=4)
    operators = {k: Identity((size,)) for k in priors}
    view = View(rng.normal(size=(2, size)), operators, 0.1)
    separator = Separator(Problem([Source(k, (size,)) for k in priors], [view]), {})
    separator.denoisers = priors
    separator.save(folder / "model")
    np.save(folder / "old.npy", rng.normal(size=(2, size)))
    stated = {
        "observations": "old.npy",
        "noise": 0.1,
        "operators": dict.fromkeys(priors, "identity"),
    }
    table = {"sources": {k: [size] for k in priors}, "views": {"v": stated}}
    (folder / "problem.yaml").write_text(yaml.safe_dump(table))
    (folder / "new.yaml").write_text("observations: y.npy\n")


def write_observations(path: Path, count: int, size: int) -> None:
    y = np.lib.format.open_memmap(path, "w+", np.float32, (count, size))
    for start in range(0, count, CHUNK):
        rows = y[start : start + CHUNK]
        rows[...] = np.random.default_rng(start).normal(size=rows.shape)


def peak(command: list[str]) -> tuple[int, float]:
    """`(MiB, seconds)` of a command."""
    began, found = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        found = max([found, *(int(s.split()[1]) // 1024 for s in status if s.startswith("VmHWM"))])
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return found, time.perf_counter() - began


def measure(folder: Path, count: int, size: int, draws: int) -> list[str]:
    write_observations(folder / "y.npy", count, size)
    base = [sys.executable, "-m", "dichroic.cli.main", "separate", "model", "new.yaml"]
    base += ["--problem", "problem.yaml", "--draws", str(draws)]
    base = [str(folder / w) if (folder / w).exists() else w for w in base]
    whole, slow = peak([*base, "--out", str(folder / "out.npz")])
    out = ["--out", str(folder / f"{count}.zarr"), "--chunk", str(CHUNK)]
    parts, fast = peak([*base, *out])
    (folder / "out.npz").unlink()
    data = count * size * 4 * (1 + 2 * (draws + 2)) / 2**20
    return [f"{count:,}", f"{data:,.0f}", f"{whole:,}", f"{slow:.0f}", f"{parts:,}", f"{fast:.0f}"]


def measure_fit(folder: Path, count: int, size: int, draws: int) -> list[str]:
    """A short fit of a source of few entries, with a network: it reads all observations some ten times."""
    y = np.lib.format.open_memmap(folder / "y.npy", "w+", np.float32, (count, size))
    rng = np.random.default_rng(1)
    a = rng.normal(size=(size, 4)).astype(np.float32)
    np.save(folder / "A.npy", a)
    for start in range(0, count, CHUNK):
        rows = y[start : start + CHUNK]
        rows[...] = rng.normal(size=(len(rows), 4)) @ a.T + 0.1 * rng.normal(size=rows.shape)
    del y
    mixture = {
        "components": 2,
        "steps": 2,
        "iterations": 1,
        "final_iterations": 1,
        "gaussian_iterations": 2,
    }
    network = {"iterations": 1, "steps": 100, "width": 16, "depth": 1, "evidence_observations": 64}
    view = {"observations": "y.npy", "noise": 0.1, "operators": {"x": {"dense": "A.npy"}}}
    table = {"sources": {"x": [4]}, "views": {"v": view}, "fit": {"holdout": 0.01}}
    table["fit"] |= {"mixture": mixture, "diffusion": network, "sampler": {"steps": 4}}
    (folder / "fit.yaml").write_text(yaml.safe_dump(table))
    base = [
        sys.executable,
        "-m",
        "dichroic.cli.main",
        "fit",
        str(folder / "fit.yaml"),
        "--no-report",
    ]
    whole, slow = peak([*base, "--out", str(folder / f"whole{count}")])
    parts, fast = peak([*base, "--out", str(folder / f"parts{count}"), "--memory", "1GiB"])
    data = count * size * 4 / 2**20
    return [f"{count:,}", f"{data:,.0f}", f"{whole:,}", f"{slow:.0f}", f"{parts:,}", f"{fast:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", default="20000,40000,80000")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--fit", action="store_true", help="learn, in place of separating")
    args = parser.parse_args()
    data = "data, MiB" if args.fit else "in and out, MiB"
    header = ["observations", data, "whole, MiB", "s", "in parts, MiB", "s"]
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args.size)
        counts, row = map(int, args.counts.split(",")), measure_fit if args.fit else measure
        print(text_table(header, [row(Path(name), n, args.size, args.draws) for n in counts]))


if __name__ == "__main__":
    main()
