"""How well sources are distinguished that were learned from few observations.

`intervals`: two sources of `D` entries, Gaussian along 4 random directions each; one view sees the first,
one both, with noise. Of 400 new observations of both, how many entries of the sources the 90% intervals of
64 draws hold.

`pulses`: a sine wave of any phase and a short pulse at 8 times, with noise of 0.05; one view sees the wave
alone, one both. Of 1,000 new observations of both, the signal-to-noise ratio of the pulse's posterior mean,
`10 log₁₀ (Σ x² / Σ (x̂ − x)²)`, and how many of its entries are in the 90% intervals of 64 draws: of the
Wiener filter with the covariances of the same data, and of mixtures with default settings, or with so many
`--components` at most. `--counts` are observations of each view, or MIXED/ALONE. Means and standard
deviations over seeds.

Run: python benchmarks/few_observations.py intervals [--sizes 10 200] [--each 0.5 1.5 5 10 20 50] [--seeds 3]
     python benchmarks/few_observations.py pulses [--counts 300 1500 12000 1500/40] [--methods wiener dichroic]
         [--components 1 4] [--set mixture.shrinkage=10] [--seeds 5]
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import yaml

from dichroic import Problem, Separator, Source, View
from dichroic.benchmark.baselines import WienerFilter
from dichroic.config import FitConfig
from dichroic.metrics import coverage, output_snr
from dichroic.operators import Identity
from dichroic.runtime.tables import text_table

DIRECTIONS, NOISE, HELD_OUT, DRAWS = 4, 0.3, 400, 64
FIT = {"mixture": {"components": 4, "rank": 32}, "diffusion": {"iterations": 0}}
TIMES, PULSE_NOISE, NEW = np.linspace(0, 1, 8), 0.05, 1000
Maker = Callable[[Problem, int], Separator]


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
    """The share of the entries of both sources that 90% intervals hold, and χ²/M."""
    rng = np.random.default_rng([seed, size])
    basis = lambda: np.linalg.qr(rng.normal(size=(size, DIRECTIONS)))[0]
    factors = {k: 0.5 * np.sqrt(size) * basis() for k in "ab"}
    new = views(rng, factors, HELD_OUT)[1]
    problem = Problem([Source(k, (size,)) for k in factors], views(rng, factors, count))
    result = Separator(problem, FIT).fit(progress=False).separate(new, n_draws=DRAWS)
    shares = [coverage(result.draws[k], new.truth[k], level=0.9).value for k in factors]
    return float(np.mean(shares)), float(result.chi2.mean())


def waves_and_pulses(rng: np.random.Generator, mixed: int, alone: int) -> list[View]:
    """`alone` observations of a wave, and `mixed` of a wave and a pulse."""
    within = lambda n, low, high: rng.uniform(low, high, (n, 1))
    wave = lambda n: np.sin(2 * np.pi * (TIMES + within(n, 0, 1))) * within(n, 0.5, 1.5)
    pulse = np.exp(-(((TIMES - within(mixed, 0.3, 0.7)) / 0.1) ** 2)) * within(mixed, 1, 2)
    seen = lambda x: x + PULSE_NOISE * rng.normal(size=x.shape)
    eye, both = Identity((8,)), {"wave": wave(mixed), "pulse": pulse}
    first = View(seen(wave(alone)), {"wave": eye}, PULSE_NOISE, name="alone")
    operators = {"wave": eye, "pulse": eye}
    second = View(seen(sum(both.values())), operators, PULSE_NOISE, name="mixed", truth=both)
    return [first, second]


def makers(args: argparse.Namespace) -> dict[str, Maker]:
    """The methods that were asked for, by how the table calls them."""
    pairs = (text.split("=", 1) for text in args.set)
    given = {"diffusion.iterations": 0, **{name: yaml.safe_load(value) for name, value in pairs}}

    def mixtures(changes: Mapping[str, Any]) -> Maker:
        config = FitConfig().replace({**given, **changes})
        return lambda problem, seed: Separator(problem, config.replace({"seed": seed}))

    known: dict[str, Maker] = {
        "wiener": lambda problem, seed: WienerFilter(problem, seed=seed),
        "dichroic": mixtures({}),
    }
    fixed = {
        f"dichroic, {k} components": mixtures({"mixture.components": k}) for k in args.components
    }
    return {name: known[name] for name in args.methods} | fixed


def scored(make: Maker, mixed: int, alone: int, seed: int) -> tuple[float, float]:
    """The signal-to-noise ratio of the pulse in dB, and the share of its entries that 90% intervals hold."""
    views = waves_and_pulses(np.random.default_rng([seed, mixed, alone]), mixed, alone)
    new = waves_and_pulses(np.random.default_rng([seed]), NEW, 1)[1]
    problem = Problem([Source("wave", (8,)), Source("pulse", (8,))], views)
    result = make(problem, seed).fit(progress=False).separate(new, n_draws=DRAWS)
    truth = np.asarray(new.truth["pulse"])
    ratio = output_snr(result.mean["pulse"].reshape(1, -1), truth.reshape(1, -1))[0]
    return float(ratio), coverage(result.draws["pulse"], truth, level=0.9).value


def pulses(args: argparse.Namespace) -> None:
    """The table of `pulses`."""
    rows = []
    for count in args.counts:
        mixed, _, alone = count.partition("/")
        for name, make in makers(args).items():
            sizes = int(mixed), int(alone or mixed)
            found = np.array([scored(make, *sizes, seed) for seed in range(args.seeds)])
            (ratio, share), (spread, wide) = found.mean(axis=0), found.std(axis=0)
            held = f"{100 * share:.0f} ± {100 * wide:.0f}%"
            rows.append([*sizes, name, f"{ratio:.1f} ± {spread:.1f}", held])
            print(*rows[-1], flush=True)
    print("\n" + text_table(["mixed", "alone", "method", "pulse, dB", "90% hold"], rows))


def intervals(args: argparse.Namespace) -> None:
    """The table of `intervals`."""
    rows = []
    for size in args.sizes:
        for each in args.each:
            found = [held(size, round(each * size), seed) for seed in range(args.seeds)]
            share, chi2 = np.mean(found, axis=0)
            spread = np.std([f[0] for f in found])
            rows.append([size, each, f"{100 * share:.0f} ± {100 * spread:.0f}%", f"{chi2:.2f}"])
            print(*rows[-1], flush=True)
    print("\n" + text_table(["entries", "observations each", "90% hold", "χ²/M"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = parser.add_subparsers(required=True)
    first = tables.add_parser("intervals")
    first.set_defaults(table=intervals)
    first.add_argument("--sizes", type=int, nargs="+", default=[10, 200])
    first.add_argument("--each", type=float, nargs="+", default=[0.5, 1.5, 5, 10, 20, 50])
    first.add_argument("--seeds", type=int, default=3)
    second = tables.add_parser("pulses")
    second.set_defaults(table=pulses)
    second.add_argument("--counts", nargs="+", default=["300", "1500", "12000", "1500/40"])
    second.add_argument(
        "--methods", nargs="*", choices=["wiener", "dichroic"], default=["wiener", "dichroic"]
    )
    second.add_argument("--components", type=int, nargs="+", default=[])
    second.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    second.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    args.table(args)


if __name__ == "__main__":
    main()
