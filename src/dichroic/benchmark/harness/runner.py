"""All jobs of a benchmark, those that are not done yet, each in a process of its own."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dichroic.benchmark.harness.cases import check_problem
from dichroic.benchmark.harness.results import read_of
from dichroic.benchmark.harness.spec import (
    FAILED,
    LIMIT,
    RESULT,
    BenchConfig,
    JobSpec,
    parse_methods,
    parse_problems,
)
from dichroic.benchmark.harness.tables import write_tables
from dichroic.errors import DichroicError
from dichroic.io.model_files import read_json, write_json


def plan(
    problems: Sequence[str],
    methods: Sequence[str] | None,
    seeds: Sequence[int],
    config: BenchConfig,
) -> list[JobSpec]:
    """Every job; raises a `DichroicError` at what cannot be run, before any work starts."""
    chosen = parse_methods(methods)
    jobs = []
    for problem in parse_problems(problems):
        mark = check_problem(problem)
        for seed in seeds:
            some = [m for m in chosen if m != LIMIT or problem.has_limit]
            jobs += [JobSpec(problem, method, seed, config, mark) for method in some]
    return jobs


def run_in_process(folder: Path) -> int:
    """Run the job in `folder` in a process of its own; its exit status."""
    return subprocess.run(
        [sys.executable, "-m", "dichroic.benchmark.harness.job", str(folder)]
    ).returncode


def run_bench(
    jobs: Sequence[JobSpec],
    out: Path,
    *,
    command: str = "",
    run: Callable[[Path], int] = run_in_process,
    say: Callable[[str], None] = print,
) -> int:
    """Run `jobs`, write the tables after each; the number of jobs that failed."""
    failed = 0
    for i, job in enumerate(jobs):
        folder = job.folder(out)
        label = f"[{i + 1}/{len(jobs)}] {job.problem.label}, {job.method}, seed {job.seed}"
        if read_of(job, out, RESULT):
            say(f"{label}: done before")
            continue
        say(label)
        _prepare(folder, job)
        if run(folder):
            failed += 1
            say(f"{label}: failed: {_why(folder)}")
        write_tables(out, jobs, command=command)
    say("\n" + write_tables(out, jobs, command=command))
    return failed


def _prepare(folder: Path, job: JobSpec) -> None:
    """State the job; a fit of another job that is there (other sizes) is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(DichroicError, KeyError, TypeError):
        if JobSpec.from_dict(read_json(folder / "job.json")).fit_settings() != job.fit_settings():
            shutil.rmtree(folder / "fit", ignore_errors=True)
            (folder / "seconds.json").unlink(missing_ok=True)
    for name in (RESULT, FAILED):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "job.json", job.to_dict())


def _why(folder: Path) -> str:
    path = folder / FAILED
    return str(read_json(path).get("error")) if path.exists() else "the process was ended"
