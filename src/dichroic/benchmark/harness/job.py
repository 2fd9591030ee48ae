"""One job: a problem, a method and a seed.

`python -m dichroic.benchmark.harness.job FOLDER` runs it alone in its process, so that times (with compilation)
and peak memory are those of the method. `FOLDER/job.json` says what to do; the run of the fit is kept in
`FOLDER/fit`, so that a job that was killed goes on.
"""

import datetime
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.benchmark.harness.cases import Case, build_case
from dichroic.benchmark.harness.methods import evidence_of, limit_of, make_method
from dichroic.benchmark.harness.results import read_of
from dichroic.benchmark.harness.scores import distances, posterior_scores
from dichroic.benchmark.harness.spec import FAILED, HELD_OUT, LIMIT, RESULT, JobSpec
from dichroic.io.model_files import read_json, write_json
from dichroic.metrics import mean_chi2
from dichroic.runtime.hardware import machine, peak_memory
from dichroic.separation.result import save_npz


def run_job(folder: Path) -> dict[str, Any]:
    """Do what `folder/job.json` says; the result, which is also written."""
    spec = JobSpec.from_dict(read_json(folder / "job.json"))
    case = build_case(spec.problem, spec.seed, spec.config)
    do = _limit if spec.method == LIMIT else _fit_and_separate
    draws, measured, method = do(spec, case, folder)
    truth = _joined([h.first(x_count(d)).truth for h, d in zip(case.held, draws, strict=True)])
    first = _joined([{k: x[0] for k, x in d.items()} for d in draws])
    arrays = {f"truth/{k}": x for k, x in truth.items() if k in first}
    arrays |= {f"draw/{k}": x for k, x in first.items()}
    save_npz(folder / HELD_OUT, {k: np.asarray(x, np.float32) for k, x in arrays.items()})
    result = {
        "settings": spec.settings(),
        "scores": _scores(spec, case, draws, method),
        **measured,
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(folder / RESULT, result)
    return result


def x_count(draws: dict[str, np.ndarray]) -> int:
    """The number of observations that draws `(S, n, …)` are of."""
    return next(iter(draws.values())).shape[1]


def _fit_and_separate(
    spec: JobSpec, case: Case, folder: Path
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any], Any]:
    method = make_method(spec.method, case, spec.config)
    spent, peak = _read_spent(folder)
    options, before = _start(spec, folder)
    spent += before
    began = time.perf_counter()
    try:
        method.fit(folder / "fit", resume=True, progress=True, **options)
    finally:
        spent += time.perf_counter() - began
        peak = max(peak, peak_memory())
        write_json(folder / "seconds.json", {"fit": spent, "peak_memory_mib": peak})
    draws, chi2, seconds, first = [], [], 0.0, 0.0
    for held in case.held:
        began = time.perf_counter()
        method.separate(held.argument, n_draws=1, seed=spec.seed)
        first += time.perf_counter() - began
        began = time.perf_counter()
        found = method.separate(held.argument, n_draws=spec.config.draws, seed=spec.seed + 1)
        seconds += time.perf_counter() - began
        draws.append(found.draws)
        chi2.append(found.chi2)
    number = spec.config.draws * sum(h.count for h in case.held)
    n = spec.config.limit_observations(spec.problem.sources)
    measured = {
        "fit_seconds": spent,
        "first_separation_seconds": first,
        "seconds_per_draw": seconds / number,
        "chi2": mean_chi2(np.concatenate(chi2, axis=1)),
        "peak_memory_mib": max(peak, peak_memory()),
        "evidence": [evidence_of(method, held.first(n)) for held in case.held],
        "iterations": len(getattr(method, "metrics", [])),
        "gains": _gains(getattr(method, "metrics", [])),
    }
    return draws, measured, method


def _start(spec: JobSpec, folder: Path) -> tuple[dict[str, Any], float]:
    """For networks, the mixtures of the same benchmark if they are there, and the seconds that they took."""
    if spec.method != "dichroic" or (folder / "fit").exists():
        return {}, 0.0
    out, mixture = folder.parents[2], replace(spec, method="mixture")
    found = read_of(mixture, out, RESULT, fit_alone=True)
    return ({"start": mixture.folder(out) / "fit"}, found["fit_seconds"]) if found else ({}, 0.0)


def _gains(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the diffusion iterations measured, if there were any."""
    return [m for m in metrics if m.get("phase") == "diffusion" and "sources" in m]


def _limit(spec: JobSpec, case: Case, folder: Path):
    n = spec.config.limit_observations(spec.problem.sources)
    began = time.perf_counter()
    found = [limit_of(case, h.first(n), spec.config.draws) for h in case.held]
    draws, evidence = [f[0] for f in found], [f[1] for f in found]
    number = spec.config.draws * sum(x_count(d) for d in draws)
    seconds = (time.perf_counter() - began) / number
    measured = {"seconds_per_draw": seconds, "peak_memory_mib": peak_memory()}
    return draws, {**measured, "evidence": evidence}, None


def _scores(
    spec: JobSpec, case: Case, draws: list[dict[str, np.ndarray]], method: Any
) -> list[dict[str, Any]]:
    """Rows of scores: one per held-out view and source; distances once per source."""
    rows = []
    for held, d in zip(case.held, draws, strict=True):
        some = held.first(x_count(d))
        limit = spec.config.limit_observations(spec.problem.sources)
        about = some.truth, case.data_range, limit, case.bounds
        for source, found in posterior_scores(d, *about).items():
            rows.append({"view": held.name, "source": source, **found})
    points, seed = spec.config.points, spec.seed
    for source, fresh in case.fresh.items():
        features, transport = case.features.get(source), not spec.problem.pixels
        options = {"points": points, "seed": seed, "features": features, "transport": transport}
        near = partial(distances, **options)
        for row in [r for r in rows if r["source"] == source][:1]:
            x = np.concatenate([d[source][0] for d in draws if source in d])
            if method is not None:  # of the limit there are too few observations
                row["posterior"] = near(x, fresh)
                prior = method.sample_prior(source, min(points, len(fresh)), seed=seed + 7)
                row["prior"] = near(prior, fresh)
    return rows


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Views concatenated along observations, by source."""
    names = dict.fromkeys(k for part in parts for k in part)
    return {k: np.concatenate([part[k] for part in parts if k in part]) for k in names}


def _read_spent(folder: Path) -> tuple[float, float]:
    """Seconds and peak memory of the fit by earlier processes, if it goes on."""
    path = folder / "seconds.json"
    found = read_json(path) if path.exists() else {}
    return float(found.get("fit", 0)), float(found.get("peak_memory_mib", 0))


def main(folder: Path) -> int:
    """Run the job in `folder`; where it fails, `failed.json` says why."""
    (folder / FAILED).unlink(missing_ok=True)
    try:
        run_job(folder)
    except Exception as error:
        traceback.print_exc()
        settings = JobSpec.from_dict(read_json(folder / "job.json")).settings()
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        write_json(folder / FAILED, {"settings": settings, "error": why})
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
