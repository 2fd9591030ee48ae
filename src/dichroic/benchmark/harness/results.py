"""What is finished, and its statistics over seeds."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.benchmark.harness.spec import FAILED, RESULT, JobSpec
from dichroic.errors import DichroicError
from dichroic.io.model_files import read_json

Found = dict[str, Any]


def collect(out: Path, jobs: Sequence[JobSpec]) -> list[Found]:
    """One entry per job: its result, the error of a failed one, or nothing yet."""
    entries = []
    for job in jobs:
        about = {"problem": job.problem.label, "method": job.method, "seed": job.seed}
        found = read_of(job, out, RESULT) or read_of(job, out, FAILED) or {}
        entries.append(about | found)
    return entries


def read_of(job: JobSpec, out: Path, name: str, *, fit_alone: bool = False) -> Found | None:
    """The file `name` of `job`, if it is there and was written with the settings of `job`.

    With `fit_alone`, with those that its fit depends on.
    """
    path = job.folder(out) / name
    wanted = job.fit_settings() if fit_alone else job.settings()
    with contextlib.suppress(DichroicError, KeyError, TypeError):
        if path.exists():
            found = read_json(path)
            said = found["settings"]
            if ({k: said[k] for k in wanted} if fit_alone else said) == wanted:
                return found
    return None


def of(entries: Sequence[Found], problem: str, method: str) -> list[Found]:
    """The finished entries of one method on one problem."""
    return [
        e for e in entries if (e["problem"], e["method"]) == (problem, method) and "scores" in e
    ]


def values(
    entries: Sequence[Found], pick: Callable[[Found], float | None], source: str | None = None
) -> np.ndarray:
    """`pick` of the rows of scores (of `source`, or all), the mean over rows for each seed."""
    found = []
    for entry in entries:
        rows = [r for r in entry["scores"] if source is None or r["source"] == source]
        known = [v for v in map(pick, rows) if v is not None]
        if known:
            found.append(float(np.mean(known)))
    return np.array(found)


def gap(entries: Sequence[Found], limit: Sequence[Found], sources: Sequence[str]) -> np.ndarray:
    """PSNR of the limit less that of `entries` on the same observations, by seed, the mean of `sources`."""
    best = {(e["seed"], r["view"], r["source"]): r["psnr"] for e in limit for r in e["scores"]}
    found = []
    for entry in entries:
        rows = {
            (entry["seed"], r["view"], r["source"]): r["psnr_first"]
            for r in entry["scores"]
            if r["source"] in sources
        }
        own = [best[key] - value for key, value in rows.items() if key in best]
        found += [float(np.mean(own))] if own else []
    return np.array(found)


def evidence_gap(entries: Sequence[Found], limit: Sequence[Found]) -> np.ndarray:
    """Log evidence of the limit less that of `entries` on the same observations, by seed, mean of views."""
    best = {e["seed"]: e["evidence"] for e in limit}
    found = []
    for entry in entries:
        own = entry["evidence"]
        if entry["seed"] in best and None not in own:
            found.append(float(np.mean(best[entry["seed"]]) - np.mean(own)))
    return np.array(found)


def cell(x: np.ndarray, form: str = "{:.2f}") -> str:
    """The mean, and the standard deviation over seeds where there are several; – for none."""
    if not len(x):
        return "–"
    spread = f" ± {form.format(x.std(ddof=1))}" if len(x) > 1 else ""
    return form.format(x.mean()) + spread
