"""The command line. JAX is imported by the commands, not here, so that `--help` is instant."""

import argparse
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dichroic import __version__
from dichroic.cli import commands
from dichroic.cli.options import add_probe, add_settings, ending, listed, numbers, parsed, positive
from dichroic.errors import DichroicError, DichroicWarning, LostError, WriteError
from dichroic.runtime.blocks import parse_bytes, parse_shard
from dichroic.runtime.compilation_cache import keep_programs
from dichroic.runtime.limits import within


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
            from dichroic.runtime import distributed

            distributed.abort(2)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted{_going_on(args, words)}", file=sys.stderr)
        return 130
    return status or 0


@contextmanager
def _warnings_as_lines() -> Generator[None, None, None]:
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
        return f"; finished iterations are kept; go on with:\n  {shlex.join(['dichroic', *again])}"
    if args.command == "separate" and commands.in_blocks(args):
        return "; finished blocks are kept; run it again to go on"
    return (
        "; finished iterations are kept; run it again to go on" if args.command == "bench" else ""
    )


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="dichroic", description="Multi-view source separation with learned priors."
    )
    top.add_argument("--version", action="version", version=f"dichroic {__version__}")
    group = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = group.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    check = add(
        "check", commands.check, "validate a problem file and say what can be learned from what"
    )
    check.add_argument("problem", type=Path, help="a problem file (YAML)")

    fit = add("fit", commands.fit, "learn every source's prior from the mixtures of a problem file")
    fit.add_argument("problem", type=Path, help="a problem file (YAML)")
    fit.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder")
    fit.add_argument("--resume", action="store_true", help="go on with the run in RUN, if any")
    fit.add_argument(
        "--start",
        type=Path,
        metavar="MODEL",
        help="a run folder or saved model whose priors the diffusion iterations start from",
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
    separate = add(
        "separate", commands.separate, "draw the sources of observations from their posterior"
    )
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

    sample = add("sample", commands.sample, "draw from the learned prior of a source")
    sample.add_argument("run_folder", type=Path, metavar="RUN")
    sample.add_argument("--source", required=True, metavar="NAME")
    sample.add_argument("-n", "--number", type=positive, default=64, help="number of draws (64)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", type=ending(".npy"), help="an .npy file (NAME.npy)")

    report = add("report", commands.report, "write RUN/report.html: what was learned, and how well")
    report.add_argument("run_folder", type=Path, metavar="RUN")
    report.add_argument("--draws", type=positive, default=32)
    report.add_argument("--problem", type=Path, metavar="FILE", help=moved)
    add_probe(report)

    bench = add("bench", commands.bench, "compare methods on problems whose answers are known")
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

    demo = add(
        "demo", commands.demo, "fit and separate two embedded problems, with a table and reports"
    )
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


if __name__ == "__main__":
    raise SystemExit(main())
