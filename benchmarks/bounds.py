"""What knowing the range of a source is worth, with the priors that `dichroic bench` learned of digits over grass.

Held-out observations are separated as they are, and with draws of the digit within [0, 1] and grass drawn again
given these: side by side, with the same random numbers.

Run: dichroic bench grassy-14 --methods mixture --seeds 0 --count 8192 --data-dir DATA
     python benchmarks/bounds.py bench-out/grassy-14/mixture/seed0/fit [--held-out 2048] [--draws 32]
"""

import argparse

import numpy as np

from dichroic import Separator
from dichroic.benchmark.harness.cases import build_case
from dichroic.benchmark.harness.scores import distances, posterior_scores
from dichroic.benchmark.harness.spec import BenchConfig, parse_problem
from dichroic.metrics import mean_chi2
from dichroic.runtime.tables import text_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the folder of a fit, or a model")
    parser.add_argument("--problem", default="grassy-14")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=2048)
    parser.add_argument("--draws", type=int, default=32)
    args = parser.parse_args()
    sizes = BenchConfig(count=1024, held_out=args.held_out)  # nothing is learned here
    case = build_case(parse_problem(args.problem), args.seed, sizes)
    separator, rows = Separator.load(args.run), []
    for label, bounds in (("none", {}), ("digit in [0, 1]", {"digit": [0, 1]})):
        separator.config = separator.config.replace({"bounds": bounds})
        for held in case.held:
            found = separator.separate(held.argument, n_draws=args.draws, seed=args.seed)
            for source, s in posterior_scores(found.draws, held.truth, case.data_range, 1).items():
                x, truth = found.draws[source], held.truth[source]
                low, high = np.quantile(x, [0.05, 0.95], axis=0)
                features = case.features.get(source)
                near = distances(x[0], case.fresh[source], sizes.points, 0, features, False)
                held_with_ends = np.mean((low <= truth) & (truth <= high))
                scores = [f"{s[k]:.2f}" for k in ("psnr", "psnr_mean")]
                scores += [f"{100 * share:.1f}%" for share in (s["coverage"], held_with_ends)]
                scores += [f"{near[k]:.2f}" if k in near else "" for k in ("pqmass", "frechet")]
                rows.append([label, held.name, source, *scores, f"{mean_chi2(found.chi2):.3f}"])
    head = "bounds, view, source, PSNR, of mean, 90% hold, with ends, PQMass, Fréchet, χ²/M"
    print(text_table(head.split(", "), rows))


if __name__ == "__main__":
    main()
