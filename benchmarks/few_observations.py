"""How much intervals hold that were learned from few observations.

Two sources of `D` numbers, Gaussian along 4 random directions each; one view sees the first, one both, with noise.
Of 400 new observations of both, how many of the numbers of the sources are in the 90% intervals of 64 draws.

Run: python benchmarks/few_observations.py [--sizes 10 200] [--each 0.5 1.5 5 10 20 50] [--seeds 3]
"""

import argparse

import numpy as np

from dichroic import Problem, Separator, Source, View
from dichroic.metrics import coverage
from dichroic.operators import Identity
from dichroic.tables import text_table

DIRECTIONS, NOISE, HELD_OUT, DRAWS = 4, 0.3, 400, 64
FIT = {"mixture": {"components": 4, "rank": 32}, "diffusion": {"laps": 0}}


def views(rng: np.random.Generator, factors: dict[str, np.ndarray], count: int) -> list[View]:
    """`count` observations of the first source alone, and as many of both."""
    size = len(factors["a"])
    draws = lambda k: rng.normal(size=(count, DIRECTIONS)) @ factors[k].T
    seen = lambda x: x + NOISE * rng.normal(size=x.shape)
    both = {k: draws(k) for k in factors}
    one = View(seen(draws("a")), {"a": Identity((size,))}, NOISE, name="one")
    operators = {k: Identity((size,)) for k in factors}
    return [one, View(seen(both["a"] + both["b"]), operators, NOISE, name="two", truth=both)]


def held(size: int, count: int, seed: int) -> tuple[float, float]:
    """The share of the numbers of both sources that 90% intervals hold, and χ²/M."""
    rng = np.random.default_rng([seed, size])
    basis = lambda: np.linalg.qr(rng.normal(size=(size, DIRECTIONS)))[0]
    factors = {k: 0.5 * np.sqrt(size) * basis() for k in "ab"}
    new = views(rng, factors, HELD_OUT)[1]
    problem = Problem([Source(k, (size,)) for k in factors], views(rng, factors, count))
    result = Separator(problem, FIT).fit(progress=False).separate(new, n_draws=DRAWS)
    shares = [coverage(result.draws[k], new.truth[k], level=0.9).value for k in factors]
    return float(np.mean(shares)), float(result.chi2.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 200])
    parser.add_argument("--each", type=float, nargs="+", default=[0.5, 1.5, 5, 10, 20, 50])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for size in args.sizes:
        for each in args.each:
            found = [held(size, round(each * size), seed) for seed in range(args.seeds)]
            share, chi2 = np.mean(found, axis=0)
            spread = np.std([f[0] for f in found])
            rows.append([size, each, f"{100 * share:.0f} ± {100 * spread:.0f}%", f"{chi2:.2f}"])
            print(*rows[-1], flush=True)
    print("\n" + text_table(["numbers", "observations each", "90% hold", "χ²/M"], rows))


if __name__ == "__main__":
    main()
