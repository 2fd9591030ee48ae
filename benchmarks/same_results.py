"""Whether a change of the source leaves results as they were, bit for bit.

Small problems that together use every way through the library: operators that observations share and that each
has of its own, gaps, co-observed views, dense and structured noise, sources of many entries, stationary ones,
networks, learned operators, bounds, per-entry scales, offsets, problem files, observations that stay on disk,
several samplers, several processes. Of each, a hash of posterior draws, χ², prior draws, and held-out scores.

Run: python benchmarks/same_results.py --write before.json
     python benchmarks/same_results.py --compare before.json [--only shared learned]

Bits depend on the processor and on the version of JAX: compare on one machine.
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

import dichroic
from dichroic import Identity, Problem, Separator, Source, View
from dichroic.problem.problem import joint_observations

Results = dict[str, Any]
SHORT: dict[str, Any] = {
    "mixture": {"components": 4, "gaussian_iterations": 3, "iterations": 2, "final_iterations": 2},
    "joint_iterations": 1,
    "diffusion": {"iterations": 0},
}
LINE, RING = np.array([1.0, 2.0, -1.0]), np.array([0.5, -1.0, 1.0])


def results(separator: Separator, view: Any, n_draws: int = 2) -> Results:
    """Draws for `view` and of every prior, and the held-out scores of the fit."""
    separation = separator.separate(view, n_draws=n_draws)
    out: Results = {f"draws/{k}": x for k, x in separation.draws.items()}
    out |= {f"prior/{k}": separator.sample_prior(k, 5) for k in separation.draws}
    scores = [m.get("heldout_log_evidence", 0.0) for m in separator.metrics]
    return {**out, "chi2": separation.chi2, "scores": np.asarray(scores, float)}


def fitted(problem: Problem, changes: Mapping[str, Any] | None = None, **options: Any) -> Separator:
    """A short fit."""
    config = dichroic.FitConfig.from_dict(SHORT).replace(changes or {})
    return Separator(problem, config).fit(progress=False, **options)


def pair(
    rng: np.random.Generator, n: int = 120, noise: Any = 0.1, each: bool = False, gaps: bool = False
) -> Problem:
    """A line seen alone, and with a ring, through matrices of two rows."""
    shape = (n, 2, 3) if each else (2, 3)
    a, b, c = (rng.normal(size=shape) for _ in range(3))
    line = lambda: rng.normal(size=(n, 1)) * LINE + 0.05 * rng.normal(size=(n, 3))
    ring = rng.normal(size=(n, 1)) ** 2 * RING + 0.05 * rng.normal(size=(n, 3))
    at = lambda m, x: np.einsum("nij,nj->ni", m, x) if each else x @ m.T
    seen = lambda y: y + 0.1 * rng.normal(size=y.shape)
    mask = lambda: rng.uniform(size=(n, 2)) > 0.2 if gaps else None
    dense = dichroic.Dense
    alone = View(seen(at(a, line())), {"line": dense(a)}, noise, "alone", mask=mask())
    both = seen(at(b, line()) + at(c, ring))
    mixed = View(both, {"line": dense(b), "ring": dense(c)}, noise, "mixed", mask=mask())
    return Problem([Source("line", (3,)), Source("ring", (3,))], [alone, mixed])


def shared(rng: np.random.Generator) -> Results:
    """Operators and noise that all observations share."""
    return results(fitted(pair(rng)), "mixed")


def each(rng: np.random.Generator) -> Results:
    """Operators of each observation, and entries that are missing."""
    return results(fitted(pair(rng, each=True, gaps=True)), "mixed")


def dense_noise(rng: np.random.Generator) -> Results:
    """Correlated noise."""
    return results(
        fitted(pair(rng, noise=dichroic.DenseNoise(np.array([[0.02, 0.01], [0.01, 0.02]])))),
        "mixed",
    )


def joint(rng: np.random.Generator) -> Results:
    """Two views of the same observations."""
    n, eye = 100, Identity((3,))
    x = rng.normal(size=(n, 1)) * LINE
    seen = lambda: x + 0.2 * rng.normal(size=x.shape)
    views = [View(seen(), {"line": eye}, 0.2, k, group="pair") for k in ("left", "right")]
    return results(fitted(Problem([Source("line", (3,))], views)), views)


def bounded(rng: np.random.Generator) -> Results:
    """A source that cannot be negative."""
    changes = {"bounds": {"ring": [0.0, None]}}
    return results(fitted(pair(rng), changes), "mixed")


def offset(rng: np.random.Generator) -> Results:
    """Observations at an offset that float32 does not hold."""
    n, eye = 100, Identity((3,))
    y = 1e7 + rng.normal(size=(n, 1)) * LINE + 0.1 * rng.normal(size=(n, 3))
    problem = Problem([Source("line", (3,))], [View(y, {"line": eye}, 0.1, "v")])
    return results(fitted(problem), "v")


def learned(rng: np.random.Generator) -> Results:
    """A gain that is learned along with the source."""
    from dichroic.operators import Learnable

    n = 150
    x = lambda: rng.normal(size=(n, 1)) * LINE
    seen = lambda y: y + 0.1 * rng.normal(size=y.shape)
    gain = Learnable(dichroic.Scale((3,), 0.4), "gain")
    views = [
        View(seen(x()), {"line": Identity((3,))}, 0.1, "known"),
        View(seen(0.6 * x()), {"line": gain}, 0.1, "unknown"),
    ]
    return results(fitted(Problem([Source("line", (3,))], views)), "unknown")


def curves(rng: np.random.Generator, n: int = 80, size: int = 140) -> Problem:
    """A stationary background alone, and with a bump: sources of many entries."""
    smooth = np.exp(-(np.linspace(-3, 3, 15) ** 2))
    sky = lambda: np.array([np.convolve(a, smooth, "same") for a in rng.normal(size=(n, size))])
    bump = np.exp(-(((np.arange(size) - rng.uniform(60, 80, (n, 1))) / 6) ** 2))
    seen = lambda y: y + 0.3 * rng.normal(size=y.shape)
    eye = Identity((size,))
    gap = rng.uniform(size=(n, size)) > 0.1
    views = [
        View(seen(sky()), {"sky": eye}, 0.3, "alone"),
        View(seen(sky() + 3 * bump), {"sky": eye, "bump": eye}, 0.3, "mixed", mask=gap),
    ]
    return Problem([Source("sky", (size,)), Source("bump", (size,))], views)


def low_rank(rng: np.random.Generator) -> Results:
    """Mixtures of low rank, with gaps."""
    return results(fitted(curves(rng), {"mixture.rank": 8}), "mixed")


def stationary(rng: np.random.Generator) -> Results:
    """A stationary source before one of low rank."""
    changes = {"mixture.rank": 8, "mixture.stationary": ["sky"]}
    return results(fitted(curves(rng), changes), "mixed")


def scaled(rng: np.random.Generator) -> Results:
    """Sources whose entries have scales of their own."""
    return results(
        fitted(curves(rng), {"mixture.rank": 8, "mixture.scaling": "per-entry"}), "mixed"
    )


NETWORK = {
    "diffusion.iterations": 1,
    "diffusion.steps": 30,
    "diffusion.width": 32,
    "diffusion.keep": "all",
    "sampler.steps": 4,
    "diffusion.channels": 4,
    "diffusion.levels": 2,
    "diffusion.level_depth": 1,
    "mixture.rank": 4,
}


def network(rng: np.random.Generator) -> Results:
    """Diffusion with perceptrons."""
    return results(fitted(pair(rng), NETWORK), "mixed")


def large_network(rng: np.random.Generator) -> Results:
    """Diffusion with U-Nets, and posteriors by conjugate gradients."""
    return results(fitted(curves(rng, 40, 144), NETWORK), "mixed")


def samplers(rng: np.random.Generator) -> Results:
    """Every chain, with the priors of one fit."""
    separator = fitted(pair(rng), NETWORK)
    config, out = separator.config, {}
    for name in ("ancestral", "ddpm", "ddim", "heun", "predictor-corrector"):
        separator.config = config.replace({"sampler.name": name})
        out[name] = separator.separate("mixed").draws["ring"]
    observations = joint_observations([separator.problem.views[1]])
    sampler = dichroic.GibbsSampler(dichroic.AncestralSampler(4), sweeps=3)
    drawn = dichroic.sample_posterior(
        separator.denoisers, observations, jax.random.key(1), sampler=sampler
    )
    return {**out, "gibbs": drawn.x["ring"]}


def stated(folder: Path, rng: np.random.Generator) -> Path:
    """A problem file, with its arrays beside it."""
    n, size = 90, 12
    kernel = np.array([0.25, 0.5, 0.25])
    x = rng.normal(size=(n, 1)) * np.sin(np.arange(size))
    y = np.array([np.convolve(a, kernel, "same") for a in x]) + 0.1 * rng.normal(size=(n, size))
    np.savez(folder / "data.npz", y=y, k=kernel, flags=rng.integers(0, 10, size=(n, size)))
    view = {
        "observations": "data.npz:y",
        "noise": 0.1,
        "mask": {"flags": "data.npz:flags", "bad": [8]},
        "operators": {"wave": {"convolve": {"kernel": "data.npz:k"}}},
    }
    table = {"sources": {"wave": [size]}, "views": {"seen": view}, "fit": SHORT}
    (folder / "problem.yaml").write_text(yaml.safe_dump(table))
    return folder / "problem.yaml"


def files(rng: np.random.Generator) -> Results:
    """A problem file."""
    with tempfile.TemporaryDirectory() as name:
        problem, config = dichroic.load_problem(stated(Path(name), rng))
        return results(Separator(problem, config).fit(progress=False), "seen")


def on_disk(rng: np.random.Generator) -> Results:
    """Observations that stay in files, separated into a store."""
    import zarr

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = stated(folder, rng)
        problem, config = dichroic.load_problem(path, stored=True)
        separator = Separator(problem, config).fit(progress=False, memory=2**33)
        view = dichroic.load_problem(path)[0].views[0]
        dichroic.separate_to_zarr(folder / "out.zarr", separator, view, n_draws=2, chunk=32)
        store: Any = zarr.open(str(folder / "out.zarr"), mode="r")
        found = dict(store.arrays()) | {
            f"{k}/{m}": a for k, g in store.groups() for m, a in g.arrays()
        }
        stream = {k: np.asarray(a[...]) for k, a in found.items()}
        return {**stream, "prior": separator.sample_prior("wave", 5)}


def processes(rng: np.random.Generator) -> Results:
    """A fit by two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = stated(folder, rng)
        words = [sys.executable, "-m", "dichroic", "fit", str(path), "--out", str(folder / "run")]
        common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
        running = [
            subprocess.Popen(
                [*words, "--no-report"],
                env={**os.environ, **common, "JAX_PROCESS_ID": str(i)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        for process in running:
            _, errors = process.communicate(timeout=300)
            if process.returncode:
                raise RuntimeError(errors)
        problem, _ = dichroic.load_problem(path)
        return results(Separator.load(folder / "run", problem=problem), "seen")


CASES: dict[str, Callable[[np.random.Generator], Results]] = {
    case.__name__: case
    for case in (
        shared,
        each,
        dense_noise,
        joint,
        bounded,
        offset,
        learned,
        low_rank,
        stationary,
        scaled,
        network,
        large_network,
        samplers,
        files,
        on_disk,
        processes,
    )
}


def hashes(found: Results) -> dict[str, str]:
    """The first digits of the SHA-256 of every array."""
    digest = lambda a: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16]
    return {k: digest(np.asarray(a)) for k, a in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE")
    what.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    warnings.simplefilter("ignore", dichroic.DichroicWarning)
    found: dict[str, dict[str, str]] = {}
    known = json.loads(args.compare.read_text()) if args.compare else {}
    differ = 0
    for name in args.only:
        began = time.perf_counter()
        found[name] = hashes(CASES[name](np.random.default_rng(0)))
        took = f"{time.perf_counter() - began:.0f} s"
        if args.write:
            print(f"{name}: {len(found[name])} hashes, {took}", flush=True)
            args.write.write_text(json.dumps(found, indent=1) + "\n")
            continue
        other = known.get(name, {})
        changed = [k for k in {*other, *found[name]} if other.get(k) != found[name].get(k)]
        differ += bool(changed)
        said = f"DIFFERS in {', '.join(sorted(changed))}" if changed else "the same"
        print(f"{name}: {said}, {took}", flush=True)
    sys.exit(min(differ, 1))


if __name__ == "__main__":
    main()
