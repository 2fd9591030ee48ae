"""What it is worth to know that a source is stationary: a background beside a signal, from few observations.

The background is a series with correlations that fall with distance, at one of two levels; the signal is Gaussian
along 4 directions. One view sees the background, one both, with noise. Of 400 new observations of both: the root
mean square error of posterior means, relative to the source's own, and how much 90% intervals of 64 draws hold.

Run: python benchmarks/stationary.py [--size 200] [--counts 10 200 1000] [--seeds 3]
"""

import argparse

import numpy as np

from dichroic import Problem, Separator, Source, View
from dichroic.metrics import coverage
from dichroic.operators import Identity
from dichroic.runtime.tables import text_table

DIRECTIONS, NOISE, HELD_OUT, DRAWS, LENGTH = 4, 0.1, 400, 64, 10
FIT = {"mixture": {"components": 4, "rank": 199}, "diffusion": {"iterations": 0}, "holdout": 0.2}
SOURCES = ("background", "signal")


def views(rng: np.random.Generator, factors: dict[str, np.ndarray], count: int) -> list[View]:
    """`count` observations of the background alone, and as many of both."""
    size = len(factors["signal"])

    def draw(name: str) -> np.ndarray:
        x = rng.normal(size=(count, factors[name].shape[1])) @ factors[name].T
        return x * rng.choice([0.5, 1.5], size=(count, 1)) if name == "background" else x

    seen = lambda x: x + NOISE * rng.normal(size=x.shape)
    operators = {k: Identity((size,)) for k in SOURCES}
    both = {k: draw(k) for k in SOURCES}
    first = {"background": operators["background"]}
    one = View(seen(draw("background")), first, NOISE, name="alone")
    return [one, View(seen(sum(both.values())), operators, NOISE, name="both", truth=both)]


def scores(size: int, count: int, seed: int, stationary: bool) -> list[float]:
    """Relative error and coverage of the background, then of the signal."""
    rng = np.random.default_rng([seed, size, count])
    lags = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    basis = np.linalg.qr(rng.normal(size=(size, DIRECTIONS)))[0]
    factors = {
        "background": np.linalg.cholesky(np.exp(-lags / LENGTH) + 1e-9 * np.eye(size)),
        "signal": 0.5 * np.sqrt(size) * basis,
    }
    new = views(rng, factors, HELD_OUT)[1]
    problem = Problem([Source(k, (size,)) for k in SOURCES], views(rng, factors, count))
    known = {"stationary": ["background"]} if stationary else {}
    fit = {**FIT, "mixture": {**FIT["mixture"], **known}}
    result = Separator(problem, fit).fit(progress=False).separate(new, n_draws=DRAWS)
    found = []
    for name in SOURCES:
        error = np.sqrt(np.mean((result.mean[name] - new.truth[name]) ** 2))
        found.append(error / np.sqrt(np.mean(np.square(new.truth[name]))))
        found.append(coverage(result.draws[name], new.truth[name], level=0.9).value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 200, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for count in args.counts:
        for stationary in (False, True):
            found = [scores(args.size, count, s, stationary) for s in range(args.seeds)]
            pairs = zip(100 * np.mean(found, axis=0), 100 * np.std(found, axis=0), strict=True)
            cells = [f"{mean:.0f} ± {spread:.0f}%" for mean, spread in pairs]
            rows.append([count, "stationary" if stationary else "free", *cells])
            print(*rows[-1], flush=True)
    header = ["observations", "background", "error", "90% hold", "error of signal", "90% hold"]
    print("\n" + text_table(header, rows))


if __name__ == "__main__":
    main()
