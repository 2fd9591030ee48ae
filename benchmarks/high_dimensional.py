"""Posterior draws of two images of 784 entries by conjugate gradients, against the analytic answer, in one run.

A power-law Gaussian field and patches of low rank (`high_dimensional_case`). Exact denoisers are used as networks
are: a call is an evaluation, a product with a Jacobian or its transpose is a product. The tables have those of
each source's network in one draw; `check` counts them in a run.

χ²/d is that of one draw of each of 64 observations about the posterior: over all directions, and over the 32 of
largest variance; 1 is ideal, and 64 draws know it to ± 0.005 and ± 0.03. Where patches are of four kinds it is
about the Gaussian of the kind that they are; draws with a χ²/d above 1.5, of another kind, are "elsewhere", and
left out. Seconds are of those 64 draws, compiled.
Run: python benchmarks/high_dimensional.py [choices] [mixture] [sizes]   (all three if none is named; 20 minutes
on two cores that are busy with other work, nearly all of it to compile)
"""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import numpy as np
from high_dimensional_case import COUNT, SEED, Case, case
from jax.custom_derivatives import linear_call

from dichroic.inference.low_rank_sampling import low_rank_draws
from dichroic.inference.samplers import DDPM, AncestralSampler, Heun, Sampler
from dichroic.numerics.batching import split
from dichroic.priors import CustomDenoiser
from dichroic.priors.covariance import ROOT_DEGREE
from dichroic.problem.observations import Observations
from dichroic.runtime.tables import text_table

SIDES = (7, 14, 28, 56)
JACOBIANS = ("jacobian", "no base", "spectrum preconditions")


@dataclass(frozen=True)
class Run:
    """A sampler with a model of the covariance, and options of the conjugate gradients (`None`: no solve)."""

    model: str
    sampler: Sampler
    options: dict[str, Any] | None = field(default_factory=dict)

    @property
    def levels(self) -> int:
        """The evaluations of a draw, each with a solve."""
        return (2 if isinstance(self.sampler, Heun) else 1) * self.sampler.steps + 1

    def products(self, steps: float) -> float:
        """With the Jacobian of a network, for `steps` of conjugate gradients.

        Two for each step, to apply `v` and to start from a guess; and those of the root of a draw.
        """
        if self.options is None or self.model not in JACOBIANS:
            return 0
        draws = isinstance(self.sampler, AncestralSampler)
        guessed = not draws and self.options.get("warm_start", True)
        return 2 * (steps + self.levels * (1 + guessed)) + draws * ROOT_DEGREE * self.levels

    def draw(self, priors, obs: Observations, key):
        """One draw of one observation."""
        return self.sampler.draw(priors, obs, key, solver="cg", **(self.options or {}))


def measure(case: Case, run: Run) -> list[str]:
    """What was run, accuracy, cost and seconds."""
    priors, key = case.found.priors(run.model), jax.random.key(SEED + 3)
    if run.options is None:
        work = lambda: low_rank_draws(priors, case.obs, key, sampler=run.sampler)  # type: ignore[arg-type]
        work()
    else:
        rows, shared = split(case.obs)
        one = lambda row, k, priors, shared: run.draw(priors, eqx.combine(row, shared), k)
        every = eqx.filter_jit(jax.vmap(one, in_axes=(0, 0, None, None)))
        inputs = rows, jax.random.split(key, COUNT), priors, shared
        compiled = every.lower(*inputs).compile()
        work = lambda: jax.block_until_ready(compiled(*inputs))
    began = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - began
    x = found.x if run.options is not None else {k: v[0] for k, v in found.x.items()}
    steps = float(np.mean(found.steps))
    told = ", ".join(f"{k} {v:g}" for k, v in (run.options or {}).items()) or "–"
    name = f"{type(run.sampler).__name__} {run.sampler.steps}"
    how = "no solve" if run.options is None else told
    cost = [str(run.levels), f"{run.products(steps):.0f}", f"{steps:.0f}", f"{seconds:.2f}"]
    return [run.model, name, how, *case.chi2(x), *cost]


# Counting


COUNTS = {"evaluations": 0, "products": 0}


def _count(what: str, x):
    def hit(value):
        COUNTS[what] += 1
        return np.asarray(value)

    return jax.pure_callback(hit, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@jax.custom_jvp
def counted(x):
    """`x`, counting its evaluations and the products with what comes after."""
    return _count("evaluations", x)


@counted.defjvp
def _(primals, tangents):
    product = lambda _, t: _count("products", t)
    return counted(*primals), linear_call(product, product, (), *tangents)


def check() -> None:
    """Raises unless one draw makes as many evaluations and products as the tables say."""
    small = case("identity", 7)
    fields = small.found.exact["field"]
    called = CustomDenoiser(lambda d, x, s: d(counted(x), s), fields.shape, fields)
    priors = {"field": called, "patches": small.found.bases["patches"]}
    for run in (Run("no base", AncestralSampler(4)), Run("no base", Heun(4))):
        COUNTS.update(evaluations=0, products=0)
        found = eqx.filter_jit(run.draw)(priors, small.obs.one(0), jax.random.key(SEED))
        told = {"evaluations": run.levels, "products": int(run.products(int(found.steps)))}
        if told != COUNTS:
            raise RuntimeError(f"told {told}, but counted {COUNTS}")


# The tables


OFF = {"precondition": False}
COLD = {"warm_start": False}
CHOICES = [
    *(Run("jacobian", AncestralSampler(n)) for n in (4, 8, 16, 32)),
    Run("jacobian", AncestralSampler(8), OFF),
    Run("jacobian", AncestralSampler(8), {"tolerance": 1e-4}),
    *(Run("jacobian", Heun(n)) for n in (16, 32, 64)),
    Run("jacobian", Heun(32), COLD),
    Run("jacobian", Heun(32), OFF),
    Run("jacobian", Heun(32), OFF | COLD),
    Run("jacobian", DDPM(64)),
    *(Run(m, AncestralSampler(8)) for m in ("no base", "spectrum preconditions")),
    *(Run("base", AncestralSampler(n), None) for n in (8, 32, 64)),
    *(Run(m, AncestralSampler(32)) for m in ("base", "spectrum")),
    *(Run("spectrum + base", AncestralSampler(n)) for n in (8, 32)),
]
OPERATORS = [
    Run("jacobian", AncestralSampler(8)),
    Run("jacobian", AncestralSampler(8), OFF),
    Run("base", AncestralSampler(32)),
    Run("spectrum + base", AncestralSampler(32)),
]
MIXTURE = [
    *(Run("jacobian", AncestralSampler(n)) for n in (8, 32, 64)),
    Run("jacobian", AncestralSampler(32), OFF),
    Run("jacobian", Heun(32)),
    *(Run("base", AncestralSampler(32), o) for o in (None, {})),
]
SIZES = [Run("jacobian", AncestralSampler(8)), Run("jacobian", AncestralSampler(8), OFF)]
HEAD = ["covariance", "sampler", "options", "chi2/d"]
COST = ["evaluations", "products", "CG steps", "seconds"]


def choices() -> None:
    rows = []
    runs = {"identity": CHOICES, **dict.fromkeys(("mask", "blur", "block"), OPERATORS)}
    for name, some in runs.items():
        made = case(name, directions=True)
        for run in some:
            rows.append([name, *measure(made, run)])
            print(*rows[-1], flush=True)
    print("\n" + text_table(["operator", *HEAD, "widest", *COST], rows))


def several_kinds() -> None:
    made = case("identity", kinds=4)
    print(text_table([*HEAD, "elsewhere", *COST], [measure(made, run) for run in MIXTURE]))
    print(f"elsewhere by the exact posterior: {100 * made.elsewhere:.0f}%")


def sizes() -> None:
    rows = []
    for side in SIDES:
        made = case("identity", side)
        rows += [[f"{side * side:,}", *measure(made, run)] for run in SIZES]
    print(text_table(["D", *HEAD, "elsewhere", *COST], rows))


def main() -> None:
    check()
    began = time.perf_counter()
    tables = {"choices": choices, "mixture": several_kinds, "sizes": sizes}
    for name in sys.argv[1:] or tables:
        tables[name]()
        print(flush=True)
    print(f"{time.perf_counter() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
