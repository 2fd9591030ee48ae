"""What gaps in the observations cost in error and time, beside a fit of the same observations without gaps.

Spectra of a bright sky of four kinds of lines, alone and over an object (a continuum and one line). Of each
observation some 15% of the channels are missing: in one of two patterns (`two`), a block anywhere (`blocks`),
at one of the ends (`borders`), or channel by channel (`entries`). Errors are root mean squares of the
object's posterior mean, of 500 new observations with gaps of the same kind: where it was observed, for the
fit with gaps and for the one without; and in the gaps, beside those of the prior mean (`nothing`). Seconds
are of the fit alone, with what it compiles. Means over seeds.

Run: python benchmarks/gaps.py [--size 400] [--count 150] [--kinds two blocks borders entries] [--seeds 3]
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from dichroic import Problem, Separator, Source, View
from dichroic.operators import Identity
from dichroic.runtime.tables import text_table

MISSING, NEW, LEVEL = 0.15, 500, 100.0
KINDS = ("none", "two", "blocks", "borders", "entries")
Masks = Callable[[int], np.ndarray]


def spectra(seed: int, size: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """A function that draws `n` spectra of the sky and of the object, `(n, size)` each."""
    rng, x = np.random.default_rng(seed), np.arange(size)
    at, height = rng.integers(0, size, 40), rng.exponential(20, 40)
    lines = height[:, None] * np.exp(-0.5 * ((x - at[:, None]) / 2) ** 2)
    templates = np.stack([lines[i::4].sum(axis=0) for i in range(4)])

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        sky = LEVEL + rng.normal(1, 0.1, (n, 4)) @ templates
        continuum = rng.lognormal(0, 0.5, (n, 1)) * 3 * (1 + 0.5 * np.sin(x * 4 / size))
        centre, peak = rng.integers(size // 10, size * 9 // 10, n), rng.exponential(20, n)
        return sky, continuum + peak[:, None] * np.exp(-0.5 * ((x - centre[:, None]) / 6) ** 2)

    return draw


def masks_of(kind: str, seed: int, size: int) -> Masks:
    """A function that draws the masks of `n` observations, `(n, size)`, true where an entry is observed."""
    rng, width = np.random.default_rng([seed, 1]), round(MISSING * size)

    def draw(n: int) -> np.ndarray:
        x = np.arange(size)
        if kind == "none":
            return np.ones((n, size), bool)
        if kind == "entries":
            return rng.uniform(size=(n, size)) > MISSING
        starts = {
            "two": np.where(rng.uniform(size=n) < 0.5, size // 4, size // 2),
            "blocks": rng.integers(0, size - width, n),
            "borders": np.where(rng.uniform(size=n) < 0.5, 0, size - width),
        }[kind]
        return (x < starts[:, None]) | (x >= starts[:, None] + width)

    return draw


def run(kind: str, seed: int, size: int, count: int) -> list[float]:
    """Errors where observed, of the fit with gaps and of that without, in the gaps, of nothing; times of both."""
    draw, masks, noise = (
        spectra(seed, size),
        masks_of(kind, seed, size),
        np.random.default_rng(seed),
    )
    noisy = lambda x: x + noise.normal(size=x.shape)
    (blank, _), (behind, before), (sky, new) = draw(count), draw(count), draw(NEW)
    alone, both, mixed = noisy(blank), noisy(behind + before), noisy(sky + new)
    one, two, unseen = masks(count), masks(count), masks(NEW)
    operators = {"sky": Identity(size), "object": Identity(size)}
    seconds, answers = [], []
    for given in ((one, two), (np.ones_like(one), np.ones_like(two))):
        views = [
            View(alone, {"sky": operators["sky"]}, 1.0, mask=given[0]),
            View(both, operators, 1.0, mask=given[1]),
        ]
        problem = Problem([Source("sky", size), Source("object", size)], views)
        separator = Separator(problem, {"seed": seed, "diffusion": {"iterations": 0}})
        began = time.perf_counter()
        separator.fit(progress=False)
        seconds.append(time.perf_counter() - began)
        test = View(mixed, operators, 1.0, mask=unseen)
        answers.append(separator.separate(test, n_draws=16, seed=seed).mean["object"])
    rms = lambda x, where: float(np.sqrt(np.mean((x - new)[where] ** 2))) if where.any() else np.nan
    nothing = np.broadcast_to(before.mean(axis=0), new.shape)
    errors = [rms(answers[0], unseen), rms(answers[1], unseen), rms(answers[0], ~unseen)]
    return [*errors, rms(nothing, ~unseen), *seconds]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=400)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS[1:])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    head = ["gaps", "observed", "fit without", "in gaps", "nothing", "seconds", "without"]
    rows: list[list[str]] = []
    for kind in args.kinds:
        found = np.array([run(kind, seed, args.size, args.count) for seed in range(args.seeds)])
        cells = [f"{m:.2f} ± {s:.2f}" for m, s in zip(found.mean(0), found.std(0), strict=True)]
        rows.append([kind, *cells])
        print(" ".join(rows[-1]), flush=True)
    print(text_table(head, rows))


if __name__ == "__main__":
    main()
