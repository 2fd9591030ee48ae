"""The command line. JAX is imported by the commands, not here, so that `--help` is instant."""

import argparse
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dichroic import __version__
from dichroic.blocks import parse_bytes, parse_shard
from dichroic.config import FitConfig
from dichroic.errors import ConfigError, DichroicError, DichroicWarning, LostError, WriteError
from dichroic.limits import within
from dichroic.options import add_probe, add_settings, ending, listed, numbers, parsed, positive
from dichroic.programs import keep_programs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 2 for an error, 130 after Ctrl-C or SIGTERM.

    It is 1 if jobs of a benchmark failed, and if blocks that `separate --status` asks for are missing or damaged.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    keep_programs()
    _heed_termination()
    try:
        with _warnings_as_lines(), within(getattr(args, "memory", None)):
            status = args.run(args)
    except DichroicError as error:
        unwritten = isinstance(error, WriteError)
        again = (_going_on(args, words) or ", and run it again") if unwritten else ""
        print(f"error: {error}{again}", file=sys.stderr)
        if isinstance(error, LostError):
            from dichroic import layout

            layout.leave(2)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted{_going_on(args, words)}", file=sys.stderr)
        return 130
    return status or 0


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print every `DichroicWarning` inside as a line on standard error, other warnings as ever."""

    def show(message: Any, category: type, *rest: Any) -> None:
        if not issubclass(category, DichroicWarning):
            return others(message, category, *rest)
        from tqdm import tqdm  # which keeps progress bars whole

        return tqdm.write(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", DichroicWarning)
        others, warnings.showwarning = warnings.showwarning, show
        yield


def _heed_termination() -> None:
    """Have SIGTERM, by which schedulers say that time is up, do what Ctrl-C does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _going_on(args: argparse.Namespace, words: Sequence[str]) -> str:
    """How to go on with what was interrupted, or found no room; empty where nothing was kept."""
    if args.command == "fit" and (args.out / "run.json").exists():
        again = [*(w for w in words if w != "--resume"), "--resume"]
        return f"; finished laps are kept; go on with:\n  {shlex.join(['dichroic', *again])}"
    if args.command == "separate" and _in_blocks(args):
        return "; finished blocks are kept; run it again to go on"
    return "; finished laps are kept; run it again to go on" if args.command == "bench" else ""


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="dichroic", description="Multi-view source separation with learned priors."
    )
    top.add_argument("--version", action="version", version=f"dichroic {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    check = add("check", _check, "validate a problem file and say what can be learned from what")
    check.add_argument("problem", type=Path, help="a problem file (YAML)")

    fit = add("fit", _fit, "learn every source's prior from the mixtures of a problem file")
    fit.add_argument("problem", type=Path, help="a problem file (YAML)")
    fit.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder")
    fit.add_argument("--resume", action="store_true", help="go on with the run in RUN, if any")
    fit.add_argument(
        "--start",
        type=Path,
        metavar="MODEL",
        help="a run folder or saved model whose priors the diffusion laps start from",
    )
    fit.add_argument("--no-report", action="store_true", help="do not write RUN/report.html")
    fit.add_argument(
        "--memory",
        type=parsed(parse_bytes),
        metavar="4GiB",
        help="leave the observations in their files, and get by with so much memory",
    )
    fit.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="KIND:WHERE",
        help="also send metrics to tensorboard:DIR, wandb:PROJECT or mlflow:URI; may be repeated",
    )
    add_settings(fit)
    add_probe(check)
    add_probe(fit)

    moved = "the problem file that RUN was fitted to, if it has moved"
    separate = add("separate", _separate, "draw the sources of observations from their posterior")
    separate.add_argument(
        "run_folder", type=Path, metavar="RUN", help="a run folder or saved model"
    )
    separate.add_argument(
        "view", help="observations: an .npz or YAML file, or a view of the problem"
    )
    separate.add_argument("--draws", type=positive, default=32, help="draws per observation (32)")
    _add_scaling(separate)
    add_probe(separate)
    separate.add_argument(
        "--like", help="the view whose operators and noise a file without them has"
    )
    separate.add_argument("--problem", type=Path, metavar="FILE", help=moved)
    separate.add_argument("--seed", type=int, default=0)
    separate.add_argument(
        "--out",
        type=ending(".npz", ".zarr"),
        help="an .npz file (separated.npz), or a .zarr folder that is filled block by block",
    )

    sample = add("sample", _sample, "draw from the learned prior of a source")
    sample.add_argument("run_folder", type=Path, metavar="RUN")
    sample.add_argument("--source", required=True, metavar="NAME")
    sample.add_argument("-n", "--number", type=positive, default=64, help="number of draws (64)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", type=ending(".npy"), help="an .npy file (NAME.npy)")

    report = add("report", _report, "write RUN/report.html: what was learned, and how well")
    report.add_argument("run_folder", type=Path, metavar="RUN")
    report.add_argument("--draws", type=positive, default=32)
    report.add_argument("--problem", type=Path, metavar="FILE", help=moved)
    add_probe(report)

    bench = add("bench", _bench, "compare methods on problems whose answers are known")
    bench.add_argument(
        "problem", nargs="+", help="contrastive-2, mixed-0.1, grassy-14, … or a problem file"
    )
    bench.add_argument("--methods", type=listed, metavar="A,B", help="all by default")
    bench.add_argument("--seeds", type=numbers, metavar="N,N", help="0,1,2; with --quick 0")
    bench.add_argument("--out", type=Path, default=Path("bench-out"))
    bench.add_argument("--data-dir", metavar="DIR", help="of mnist.npz and textures/grass.png")
    bench.add_argument("--quick", action="store_true", help="small presets, fewer observations")
    sizes = {
        "--count": "observations of each view to learn from (16384)",
        "--held-out": "held-out observations of each view (2048)",
        "--draws": "posterior draws of each (32)",
    }
    for name, text in sizes.items():
        bench.add_argument(name, type=positive, metavar="N", help=text)

    demo = add("demo", _demo, "fit and separate two embedded problems, with a table and reports")
    demo.add_argument("--out", type=Path, default=Path("demo-out"))
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="a small version, in about a minute")
    return top


def _add_scaling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("more than fits in memory (--out FOLDER.zarr)")
    group.add_argument(
        "--memory", type=parsed(parse_bytes), metavar="4GiB", help="what to get by with (4GiB)"
    )
    group.add_argument("--chunk", type=positive, metavar="N", help="observations at a time instead")
    group.add_argument(
        "--shard",
        type=parsed(parse_shard),
        metavar="I/N",
        help="do the blocks I, I + N, …: as one of N processes that share FOLDER.zarr",
    )
    group.add_argument(
        "--status",
        action="store_true",
        help="only say which blocks are missing or damaged (by the sizes of files); exit with 1 if any are",
    )


def _config(args: argparse.Namespace, section: dict[str, Any]) -> FitConfig:
    given = {
        name.removeprefix("set:"): value
        for name, value in vars(args).items()
        if name.startswith("set:") and value is not None
    }
    if args.order:
        given["order"] = [group.split(",") for group in args.order.split("/")]
    return FitConfig.from_dict(section, where=f"{args.problem}: fit").replace(given)


def _check(args: argparse.Namespace) -> None:
    from dichroic.data import stationary_axes
    from dichroic.identify import advice, examined
    from dichroic.statement import load_problem, summary_rows
    from dichroic.tables import text_table

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


def _fit(args: argparse.Namespace) -> None:
    from dichroic import layout
    from dichroic.data import check_memory
    from dichroic.problem import check_values
    from dichroic.report import write_report
    from dichroic.separator import Separator
    from dichroic.statement import load_problem
    from dichroic.tracking import Console, Silent, parse_tracker

    layout.join()
    trackers = [parse_tracker(text) for text in args.track if layout.is_first()]
    options = {"memory": args.memory, "start": args.start, "resume": args.resume}
    problem, section = load_problem(args.problem, stored=args.memory is not None, probe=args.probe)
    config = _config(args, section)
    if args.memory is not None:
        check_memory(problem, args.memory)
    if not (args.resume and (args.out / "run.json").exists()):  # which were checked when it began
        bar = Console() if layout.is_first() else Silent()
        check_values(problem, progress=partial(bar.progress, "observations checked"))
    separator = Separator(problem, config)
    if not layout.is_first():  # another process speaks, and keeps the files
        separator.fit(args.out, progress=False, **options)
        layout.each(lambda: None)  # until its report is written
        return
    separator.fit(args.out, progress=[True, *trackers], **options)
    print(f"model: {args.out / 'best'}")
    print(separator.predictive_checks().table())
    if not args.no_report:
        page = write_report(
            args.out, separator=separator, metrics=separator.metrics, warnings=separator.advice
        )
        print(f"report: {page}")
    layout.each(lambda: None)


def _in_blocks(args: argparse.Namespace) -> bool:
    """Whether `separate` fills a folder block by block."""
    return args.out is not None and args.out.suffix.lower() == ".zarr"


def _separate(args: argparse.Namespace) -> int:
    from dichroic.metrics import mean_chi2
    from dichroic.separator import Separator
    from dichroic.statement import open_view, problem_of
    from dichroic.tracking import Console

    blocks = _in_blocks(args)
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
    from dichroic.separator import MEMORY
    from dichroic.stream import separate_to
    from dichroic.tracking import Console

    separate_to(
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
    from dichroic.store import finished_blocks

    found = finished_blocks(out)
    print(f"{out}: {found}")
    return int(bool(found.missing))


def _sample(args: argparse.Namespace) -> None:
    from dichroic.separator import Separator, save_npy
    from dichroic.statement import check_saved

    check_saved(args.run_folder)
    x = Separator.load(args.run_folder).sample_prior(args.source, args.number, seed=args.seed)
    out = args.out or Path(f"{args.source}.npy")
    save_npy(out, x)
    print(f"{out}: {x.shape[0]} draws of {args.source}, each of shape {x.shape[1:]}")


def _report(args: argparse.Namespace) -> None:
    from dichroic.report import write_report
    from dichroic.separator import Separator
    from dichroic.statement import problem_of
    from dichroic.tracking import read_metrics

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


def _bench(args: argparse.Namespace) -> int:
    import dataclasses

    from dichroic.bench.names import QUICK, BenchConfig
    from dichroic.bench.runner import plan, run_bench
    from dichroic.datasets.remote import DATA_VARIABLE

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


def _demo(args: argparse.Namespace) -> None:
    from dichroic.demo import run_demo

    run_demo(args.out, seed=args.seed, quick=args.quick)


if __name__ == "__main__":
    raise SystemExit(main())
