"""What each command does; all that takes long to import is imported inside."""

import argparse
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from dichroic.config import FitConfig
from dichroic.errors import ConfigError


def _config(args: argparse.Namespace, section: dict[str, Any]) -> FitConfig:
    given = {
        name.removeprefix("set:"): value
        for name, value in vars(args).items()
        if name.startswith("set:") and value is not None
    }
    if args.order:
        given["order"] = [group.split(",") for group in args.order.split("/")]
    return FitConfig.from_dict(section, where=f"{args.problem}: fit").replace(given)


def check(args: argparse.Namespace) -> None:
    """Validate a problem file, and say what can be learned from what."""
    from dichroic.io import load_problem, summary_rows
    from dichroic.learning.data import stationary_axes
    from dichroic.problem.identifiability import advice, examined
    from dichroic.runtime.tables import text_table

    problem, section = load_problem(args.problem, probe=args.probe)
    config = FitConfig.from_dict(section, where=f"{args.problem}: fit")
    stationary = stationary_axes(problem, config)
    for header, *body in summary_rows(problem):
        print(text_table(header, body), end="\n\n")
    result = examined(problem)
    print(result.table(), end="\n\n")
    for warning in advice(problem, stationary, outliers=config.outliers, result=result):
        print(f"warning: {warning}")
    print(f"{args.problem} is a valid problem")


def fit(args: argparse.Namespace) -> None:
    """Learn the priors of a problem file."""
    from dichroic.diagnostics.report import write_report
    from dichroic.io import load_problem
    from dichroic.learning.data import check_memory
    from dichroic.problem.problem import check_values
    from dichroic.runtime import distributed
    from dichroic.runtime.tracking import Console, Silent, parse_tracker
    from dichroic.separation.separator import Separator

    distributed.initialize()
    trackers = [parse_tracker(text) for text in args.track if distributed.is_primary()]
    options = {"memory": args.memory, "start": args.start, "resume": args.resume}
    problem, section = load_problem(args.problem, stored=args.memory is not None, probe=args.probe)
    config = _config(args, section)
    if args.memory is not None:
        check_memory(problem, args.memory)
    if not (args.resume and (args.out / "run.json").exists()):  # which were checked when it began
        bar = Console() if distributed.is_primary() else Silent()
        check_values(problem, progress=partial(bar.progress, "observations checked"))
    separator = Separator(problem, config)
    if not distributed.is_primary():  # another process speaks, and keeps the files
        separator.fit(args.out, progress=False, **options)
        distributed.run_on_all(lambda: None)  # until its report is written
        return
    separator.fit(args.out, progress=[True, *trackers], **options)
    print(f"model: {args.out / 'best'}")
    print(separator.predictive_checks().table())
    if not args.no_report:
        page = write_report(
            args.out, separator=separator, metrics=separator.metrics, warnings=separator.advice
        )
        print(f"report: {page}")
    distributed.run_on_all(lambda: None)


def in_blocks(args: argparse.Namespace) -> bool:
    """Whether `separate` fills a folder block by block."""
    return args.out is not None and args.out.suffix.lower() == ".zarr"


def separate(args: argparse.Namespace) -> int:
    """Draw the sources of observations from their posterior; the exit status."""
    from dichroic.io import open_view, problem_of
    from dichroic.metrics import mean_chi2
    from dichroic.runtime.tracking import Console
    from dichroic.separation.separator import Separator

    blocks = in_blocks(args)
    if not blocks and (args.memory or args.chunk or args.shard or args.status):
        raise ConfigError("--memory, --chunk, --shard and --status are for --out FOLDER.zarr")
    if args.status:
        return _print_status(args.out)
    problem = problem_of(args.run_folder, args.problem, probe=args.probe)
    separator = Separator.load(args.run_folder, problem=problem)
    view: Any = args.view
    if Path(view).exists() or view not in [v.name for v in problem.views]:
        view = open_view(Path(view), problem, like=args.like, probe=args.probe)
        view = view if blocks else view.read()
    if blocks:
        _separate_blocks(args, separator, view)
        return 0
    result = separator.separate(
        view,
        n_draws=args.draws,
        seed=args.seed,
        progress=partial(Console().progress, "draws"),
    )
    out = args.out or Path("separated.npz")
    result.save(out)
    shapes = ", ".join(f"{k} {x.shape}" for k, x in result.draws.items())
    print(f"{out}: draws, mean and std of {shapes}; χ²/M {mean_chi2(result.chi2):.3f} (1 is ideal)")
    return 0


def _separate_blocks(args: argparse.Namespace, separator: Any, view: Any) -> None:
    from dichroic.runtime.tracking import Console
    from dichroic.separation.separator import MEMORY
    from dichroic.separation.streaming import separate_to_zarr

    separate_to_zarr(
        args.out,
        separator,
        view,
        n_draws=args.draws,
        seed=args.seed,
        memory=args.memory or MEMORY,
        chunk=args.chunk,
        shard=args.shard or (1, 1),
        progress=partial(Console().progress, "observations"),
    )
    _print_status(args.out)


def _print_status(out: Path) -> int:
    """Say which blocks are finished; 1 unless all are."""
    from dichroic.io.zarr_store import finished_blocks

    found = finished_blocks(out)
    print(f"{out}: {found}")
    return int(bool(found.missing))


def sample(args: argparse.Namespace) -> None:
    """Draw from the learned prior of a source."""
    from dichroic.io import check_saved
    from dichroic.separation.result import save_npy
    from dichroic.separation.separator import Separator

    check_saved(args.run_folder)
    x = Separator.load(args.run_folder).sample_prior(args.source, args.number, seed=args.seed)
    out = args.out or Path(f"{args.source}.npy")
    save_npy(out, x)
    print(f"{out}: {x.shape[0]} draws of {args.source}, each of shape {x.shape[1:]}")


def report(args: argparse.Namespace) -> None:
    """Write the report of a run."""
    from dichroic.diagnostics.report import write_report
    from dichroic.io import problem_of
    from dichroic.runtime.tracking import read_metrics
    from dichroic.separation.separator import Separator

    problem = problem_of(args.run_folder, args.problem, probe=args.probe)
    separator = Separator.load(args.run_folder, problem=problem)
    page = write_report(
        args.run_folder,
        separator=separator,
        metrics=read_metrics(args.run_folder / "metrics.jsonl"),
        n_draws=args.draws,
        warnings=separator.advice,
    )
    print(f"report: {page}")


def bench(args: argparse.Namespace) -> int:
    """Compare methods; the exit status."""
    import dataclasses

    from dichroic.benchmark.harness.runner import plan, run_bench
    from dichroic.benchmark.harness.spec import QUICK, BenchConfig
    from dichroic.benchmark.problems.remote import DATA_VARIABLE

    if args.data_dir:
        os.environ[DATA_VARIABLE] = str(Path(args.data_dir).absolute())  # for the jobs too
    config = QUICK if args.quick else BenchConfig()
    sizes = {name: getattr(args, name) for name in ("count", "held_out", "draws")}
    config = dataclasses.replace(config, **{k: n for k, n in sizes.items() if n})
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    jobs = plan(args.problem, args.methods, seeds, config)
    command = shlex.join(["dichroic", *sys.argv[1:]])
    failed = run_bench(jobs, args.out, command=command)
    print(f"\n{args.out / 'table.html'}")
    if failed:
        print(f"{failed} of {len(jobs)} jobs failed; run the same command to try again")
    return int(failed > 0)


def demo(args: argparse.Namespace) -> None:
    """Fit and separate two embedded problems."""
    from dichroic.benchmark.demo import run_demo

    run_demo(args.out, seed=args.seed, quick=args.quick)
