"""Mixed problems with the weight f known, and learned from a wrong guess (semi-blind), side by side.

    view 1: y = A (x₁ + f x₂) + η,   view 2: y = A (f x₁ + x₂) + η

Prints, for every seed and start, the f that was learned with its standard error, and the PSNR of a posterior
draw of every source in every view of held-out observations.

Run: python benchmarks/semi_blind.py [--count 4096] [--components 32] [--f 0.1] [--seeds 0,1,2]
     [--starts 0.3]   (twenty minutes on two cores)
"""

import argparse
import time

import numpy as np

from dichroic import Problem, Separator
from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.metrics import psnr
from dichroic.operators import Dense, Learnable, Scale
from dichroic.problem.view import View
from dichroic.runtime.tables import text_table

HELD_OUT = 1000  # added to the seed


def with_unknown(problem: Problem, f: float, start: float) -> Problem:
    """The problem with `f` to be learned in both views, from `start`."""

    def unknown(view: View) -> View:
        weak = "source2" if view.name == "view1" else "source1"
        a = np.asarray(view.operators[weak].matrix) / f
        operators = dict(view.operators) | {weak: Learnable(Scale(3, start), "f") @ Dense(a)}
        return View(view.observations, operators, view.noise, view.name, truth=view.truth)

    return Problem(problem.sources, [unknown(v) for v in problem.views])


def scores(separator: Separator, problem: Problem) -> list[float]:
    """PSNR of one draw: view 1 source 1, source 2, view 2 source 1, source 2."""
    found = []
    for view in problem.views:
        draws = separator.separate(view, seed=1).draws
        found += [psnr(x[0], view.truth[k], data_range=4.0) for k, x in sorted(draws.items())]
    return found


def main() -> None:
    """Parse the options, run everything, print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--components", type=int, default=32)
    parser.add_argument("--f", type=float, default=0.1)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--starts", default="0.3")
    args = parser.parse_args()
    rows = []
    for seed in map(int, args.seeds.split(",")):
        options = {"problem_seed": seed, "f_mix": args.f}
        problem = manifold_problem(seed=seed, count=args.count, **options)
        test = manifold_problem(seed=seed + HELD_OUT, count=1024, **options)
        for start in [None, *map(float, args.starts.split(","))]:
            learn = problem if start is None else with_unknown(problem, args.f, start)
            held = test if start is None else with_unknown(test, args.f, start)
            config = {"seed": seed, "mixture": {"components": args.components}}
            began = time.perf_counter()
            separator = Separator(learn, config | {"diffusion": {"iterations": 0}}).fit()
            seconds = time.perf_counter() - began
            last = [m for m in separator.metrics if "operator_f" in m][-1:]
            f = f"{separator.operators['f'][0]:.5f}" if last else "known"
            error = f"{last[0]['operator_error_f']:.5f}" if last else "–"
            found = scores(separator, held)
            psnrs = [f"{v:.2f}" for v in [*found, np.mean(found)]]
            rows.append([seed, start or "–", f, error, *psnrs, f"{seconds:.0f}"])
    head = ["seed", "start", "f", "error", "v1 s1", "v1 s2", "v2 s1", "v2 s2", "mean", "seconds"]
    print(text_table(head, rows))


if __name__ == "__main__":
    main()
