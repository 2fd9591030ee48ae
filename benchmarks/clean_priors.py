"""What the same priors reach when they are learned from clean samples: a ceiling for learning from mixtures.

The sources of the training observations of a benchmark's problem, which a fit never sees, are observed one by one
with next to no noise, and learned with the settings of `dichroic bench`; held-out observations are then separated
with these priors: with mixtures, with networks that take their covariance from the mixtures, and with networks
that take it from their own Jacobian.

Run: python benchmarks/clean_priors.py [grassy-14] [--count 8192] [--held-out 512] [--seed 0] [--steps 4000]
     [--start MODEL] [--save MODEL] [--ways 3]
"""

import argparse
import dataclasses
import time

import numpy as np
import yaml

from dichroic import FitConfig, Problem, Separator, View
from dichroic.benchmark.harness.cases import Case, build_case
from dichroic.benchmark.harness.scores import posterior_scores
from dichroic.benchmark.harness.spec import BenchConfig, parse_problem
from dichroic.metrics import mean_chi2
from dichroic.operators import Identity
from dichroic.priors import DiffusionPrior
from dichroic.runtime.tables import text_table

NOISE = 0.01  # of the clean samples, relative to the spread of their numbers


def clean_problem(case: Case) -> Problem:
    """Each source of the training observations in a view of its own."""
    views = []
    for source in case.problem.sources:
        seen = [v for v in case.problem.views if source.name in v.truth]
        x = np.concatenate([v.truth[source.name] for v in seen])
        noise = NOISE * float(x.std())
        rng = np.random.default_rng([4, case.seed])
        y = (x + noise * rng.normal(size=x.shape)).astype(np.float32)
        marks = [np.asarray(v.held_out) for v in seen if v.held_out is not None]
        mark = np.concatenate(marks) if len(marks) == len(seen) else None
        operators = {source.name: Identity(source.shape)}
        views.append(View(y, operators, noise, name=source.name, held_out=mark))
    return Problem(case.problem.sources, views)


def taking(separator: Separator, covariance: str, steps: int) -> Separator:
    """The separator with networks whose covariance is `covariance`, and so many steps of its sampler."""
    config = separator.config.replace({"sampler.steps": steps})
    other = Separator(None, config)
    other.operators = separator.operators
    change = lambda d: dataclasses.replace(d, covariance=covariance)
    other.denoisers = {
        k: change(d) if isinstance(d, DiffusionPrior) else d for k, d in separator.denoisers.items()
    }
    return other


def rows(case: Case, label: str, separator: Separator, draws: int) -> list[list[str]]:
    """Scores of the separations of all held-out observations."""
    found = []
    for held in case.held:
        began = time.perf_counter()
        result = separator.separate(held.argument, n_draws=draws, seed=case.seed)
        seconds = time.perf_counter() - began
        for source, s in posterior_scores(result.draws, held.truth, case.data_range, 1).items():
            scores = [f"{s['psnr']:.2f}", f"{s['psnr_mean']:.2f}", f"{100 * s['coverage']:.1f}%"]
            chi2 = f"{mean_chi2(result.chi2):.3f}"
            found.append([label, held.name, source, *scores, chi2, f"{seconds:.0f}"])
            print(*found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", nargs="?", default="grassy-14")
    parser.add_argument("--count", type=int, default=8192)
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000, help="training steps of each network")
    parser.add_argument("--start", help="a model of mixtures that --save wrote")
    parser.add_argument("--save", help="where to keep the mixtures")
    parser.add_argument("--ways", type=int, default=3, help="of networks; with 0 mixtures alone")
    parser.add_argument("--set", action="append", default=[], metavar="diffusion.channels=64")
    args = parser.parse_args()
    sizes = BenchConfig(count=args.count, held_out=args.held_out)
    case = build_case(parse_problem(args.problem), args.seed, sizes)
    given = {name: yaml.safe_load(value) for name, value in (x.split("=") for x in args.set)}
    config = FitConfig.from_dict(case.section).replace({"seed": args.seed})
    problem = clean_problem(case)
    if args.start:
        mixtures = Separator.load(args.start)
    else:
        mixtures = Separator(
            problem, config.replace({"diffusion.iterations": 0, "joint_iterations": 0})
        ).fit()
    if args.save:
        mixtures.save(args.save)
    table = rows(case, "mixtures", taking(mixtures, "base", 32), args.draws)
    if args.ways:
        few = {"diffusion.iterations": 1, "diffusion.steps": args.steps, "sampler.steps": 2}
        networks = Separator(problem, config.replace({**few, **given})).fit(start=mixtures)
        for iteration in networks.metrics:
            print({k: v for k, v in iteration.items() if isinstance(v, float)}, flush=True)
        for covariance, steps in [("base", 32), ("base", 64), ("jacobian", 32)][: args.ways]:
            with_it = taking(networks, covariance, steps)
            table += rows(case, f"networks, {covariance}, {steps} steps", with_it, args.draws)
    header = ["priors", "view", "source", "PSNR", "of mean", "90% hold", "χ²/M", "s"]
    print("\n" + text_table(header, table))


if __name__ == "__main__":
    main()
