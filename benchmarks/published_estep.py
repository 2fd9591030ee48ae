"""The published E-step (one conjugate-gradient step, thousands of sampler steps) and ours, side by side.

1. On the Gaussian problem of `estep.py`: χ²/d of the draws about the analytic posterior (1 is ideal), seconds
   per 4,096 observations after compilation, and the seconds until χ²/d is within a tolerance of 1.
2. The cost of one evaluation of the posterior with mixtures and with networks as priors.
3. What the published settings of contrastive-2 would take here, from the measured seconds of a sampler step
   and of a training step with its network; and our fit's time to the published accuracy.

Run: python benchmarks/published_estep.py [--full]   (five minutes on two cores; `--full`: 16,384 steps, too)
"""

import dataclasses
import sys
import time

import jax
import numpy as np
from estep import D, N, problem

from dichroic.benchmark.baselines.ddprism_iterations import (
    DdprismConfig,
    fresh_network,
    make_sampler,
)
from dichroic.benchmark.baselines.ddprism_sampling import Absolute
from dichroic.benchmark.baselines.ddprism_training import train
from dichroic.benchmark.harness.published import PUBLISHED
from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.inference.samplers import DDPM, AncestralSampler, ExactSampler, Heun, sample_posterior
from dichroic.metrics import psnr
from dichroic.numerics.batching import take
from dichroic.priors import DiffusionPrior, GaussianMixture
from dichroic.problem.observations import Observations
from dichroic.runtime.tables import text_table
from dichroic.separation.separator import Separator

SEED = 0
BATCH = 512  # observations at once, so that compiling needs a few of them only
TOLERANCES = (0.1, 0.03)  # of χ²/d about 1; one draw of each observation tells 0.02 apart
OBSERVATIONS = 65536  # of each view of contrastive-2
COMPONENTS = 64
OUR_STEPS = 32  # the default of a fit
OUR_OBSERVATIONS, OUR_COMPONENTS = 4096, (4, 8, 16, 32)
CONFIG = DdprismConfig.published()


def timed(work, warm_up):
    warm_up()
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


# Gaussian priors, where the answer is known


def evaluations(name: str, steps: int) -> int:
    """Of the posterior, by one draw."""
    return {"ExactSampler": 1, "Heun": 2 * steps + 1, "published": 2 * steps + 1}.get(
        name, steps + 1
    )


def measure(sampler, denoisers, obs, mean, cov, **options) -> tuple[float, float, float]:
    """`(χ²/d, its median over observations, seconds)` of one draw per observation."""
    draws = lambda obs: sample_posterior(
        denoisers, obs, jax.random.key(SEED + 9), sampler=sampler, batch_size=BATCH, **options
    )
    found, seconds = timed(lambda: draws(obs), lambda: draws(take(obs, slice(0, BATCH))))
    r = np.concatenate([found.x["a"][0], found.x["b"][0]], axis=-1) - mean
    chi2 = np.einsum("ni,nij,nj->n", r, np.linalg.inv(cov), r) / (2 * D)
    return float(chi2.mean()), float(np.median(chi2)), seconds


def measure_samplers(full: bool) -> list[tuple[str, int, float, float, float]]:
    denoisers, *rest = problem(SEED)
    absolute = {k: Absolute(d, CONFIG.unit) for k, d in denoisers.items()}
    one = {"solver": "cg", "max_steps": 1, "precondition": False, "warm_start": False}
    published = (64, 256, 1024, 4096, *([16384] if full else []))
    runs = [
        ("ExactSampler", 0, ExactSampler(), denoisers, {}),
        *(("AncestralSampler", n, AncestralSampler(n), denoisers, {}) for n in (8, 32)),
        *(("Heun", n, Heun(n), denoisers, {}) for n in (16, 64)),
        *(("DDPM, one CG step", n, DDPM(n), denoisers, one) for n in (64, 1024)),
        *(("published", n, make_sampler(CONFIG, n), absolute, {}) for n in published),
    ]
    return [(name, n, *measure(s, d, *rest, **o)) for name, n, s, d, o in runs]


def samplers_table(found) -> str:
    exact = found[0][-1]
    rows = [
        [
            *(name, steps or "–", evaluations(name, steps), f"{chi2:.3f}", f"{median:.3f}"),
            *(f"{s:.2f}", f"{N * steps / s / 1e3:,.0f}" if steps else "–", f"{s / exact:,.1f}"),
        ]
        for name, steps, chi2, median, s in found
    ]
    head = ["sampler", "steps", "evaluations", "chi2/d", "median"]
    return text_table([*head, "seconds", "1000 draws × steps / s", "× Exact"], rows)


def to_reach(found) -> str:
    """The seconds of the cheapest run of each sampler whose χ²/d is within each tolerance of 1."""
    rows = []
    for name in dict.fromkeys(row[0] for row in found):
        runs = [row for row in found if row[0] == name]
        cells = []
        for tolerance in TOLERANCES:
            good = [(s, n) for _, n, chi2, _, s in runs if abs(chi2 - 1) <= tolerance]
            best = min(good, default=None)
            cells.append(f"{best[0]:.2f} ({best[1] or '–'})" if best else "not reached")
        rows.append([name, *cells])
    head = [f"seconds (steps) to 1 ± {tolerance}" for tolerance in TOLERANCES]
    return text_table(["sampler", *head], rows)


# Mixtures and networks


def mixture(seed: int) -> GaussianMixture:
    """A mixture of `COMPONENTS` thin Gaussians."""
    rng = np.random.default_rng(seed)
    root = 0.1 * rng.normal(size=(COMPONENTS, D, D))
    means, weights = rng.normal(size=(COMPONENTS, D)), np.ones(COMPONENTS)
    return GaussianMixture.from_moments(weights, means, root @ root.swapaxes(1, 2))


def evaluation_costs() -> str:
    """Seconds of one evaluation of the posterior of two sources, and of a draw, for 4,096 observations.

    A draw takes the published 16,384 steps, or `OUR_STEPS` of `AncestralSampler`.
    """
    _, obs, _, _ = problem(SEED)
    obs, steps = take(obs, slice(0, BATCH)), 16
    mixtures = {k: mixture(i) for i, k in enumerate("ab")}
    keys = jax.random.split(jax.random.key(SEED))
    plain = {k: fresh_network((D,), key, CONFIG) for k, key in zip("ab", keys, strict=True)}
    ours = {k: DiffusionPrior(mixtures[k], d.network, "base") for k, d in plain.items()}
    theirs = lambda d: {k: Absolute(v, CONFIG.unit) for k, v in d.items()}
    sampler = make_sampler(CONFIG, steps)
    assignments = {"beam_width": 256}
    runs = [
        ("mixtures", "published: one CG step", "published", sampler, theirs(mixtures), {}),
        (
            "mixtures",
            "ours: 256 pairs",
            "AncestralSampler",
            AncestralSampler(steps),
            mixtures,
            assignments,
        ),
        ("networks", "published: one CG step", "published", sampler, theirs(plain), {}),
        (
            "networks",
            "ours: whole Jacobian, PSD",
            "AncestralSampler",
            AncestralSampler(steps),
            plain,
            {},
        ),
        (
            "mixtures + networks",
            "ours: 256 pairs",
            "AncestralSampler",
            AncestralSampler(steps),
            ours,
            assignments,
        ),
    ]
    rows = []
    for priors, what, name, s, denoisers, options in runs:
        work = lambda s=s, d=denoisers, o=options: sample_posterior(
            d, obs, keys[0], sampler=s, batch_size=BATCH, **o
        )
        seconds = timed(work, work)[1] / evaluations(name, steps) * N / obs.count
        needed = evaluations(name, CONFIG.steps if name == "published" else OUR_STEPS)
        rows.append([priors, what, f"{seconds:.4f}", needed, f"{seconds * needed:,.0f}"])
    head = ["priors", "posterior", "seconds per evaluation", "evaluations of a draw", "seconds"]
    return text_table(head, rows)


# The published settings


def network_costs() -> tuple[float, float, float]:
    """Seconds per sampler step and observation of one and of two sources, and per training step."""
    _, obs, _, _ = problem(SEED)
    obs = take(obs, slice(0, 1024))
    keys = jax.random.split(jax.random.key(SEED))
    networks = {k: fresh_network((D,), key, CONFIG) for k, key in zip("ab", keys, strict=True)}
    known = {k: Absolute(d, CONFIG.unit) for k, d in networks.items()}
    per_step, steps = [], 32
    for names in ("a", "ab"):
        seen = Observations(obs.y, {k: obs.operators[k] for k in names}, obs.noise)
        work = lambda seen=seen: sample_posterior(
            known, seen, keys[0], sampler=make_sampler(CONFIG, steps), batch_size=BATCH
        )
        per_step.append(timed(work, work)[1] / steps / seen.count)
    x = np.random.default_rng(SEED).normal(size=(OBSERVATIONS, D)).astype(np.float32)
    n = 200  # training steps; two blocks
    training = dataclasses.replace(CONFIG.training, steps=n)
    work = lambda: train(networks["a"], x, keys[1], config=training)
    return per_step[0], per_step[1], timed(work, work)[1] / n


def published_cost(found) -> tuple[str, float]:
    """Hours of the published settings on contrastive-2, whose views see one source and two."""
    one, two, training = network_costs()
    gaussian = found[-1][-1] / found[-1][1] / N
    iterations = [CONFIG.diffusion_iterations(g) for g in (0, 1)]
    sampled = lambda seconds, iterations: seconds * OBSERVATIONS * CONFIG.steps * iterations / 3600
    trained = training * CONFIG.training_steps * sum(iterations) / 3600
    parts = [
        ("E-step, Gaussian, 1 source (as 2, halved)", CONFIG.gaussian_iterations, gaussian / 2),
        ("E-step, Gaussian, 2 sources", CONFIG.gaussian_iterations, gaussian),
        ("E-step, networks, 1 source", iterations[0], one),
        ("E-step, networks, 2 sources", iterations[1], two),
    ]
    rows = [[k, n, f"{s * 1e6:.2f}", f"{sampled(s, n):,.1f}"] for k, n, s in parts]
    rows.append(
        ["M-step, per training step", sum(iterations), f"{training * 1e6:.0f}", f"{trained:,.1f}"]
    )
    total = sum(sampled(s, n) for _, n, s in parts) + trained
    table = text_table(["published, contrastive-2", "iterations", "microseconds", "hours"], rows)
    text = (
        f"{table}\nTotal on this machine, extrapolated: {total:,.0f} hours ({total / 24:,.0f} days)"
    )
    return text, total


def our_cost(published_hours: float) -> str:
    """Seconds of our fit of contrastive-2 by its size, and the accuracy of source 2, held-out.

    A fit of each size from the start, as `dichroic bench --methods mixture` does, with all that it compiles.
    """
    test = manifold_problem(seed=SEED + 1000, problem_seed=SEED, count=1024).views[1]
    problem = manifold_problem(seed=SEED, problem_seed=SEED, count=OUR_OBSERVATIONS)
    goal, rows = PUBLISHED["contrastive-2"]["ddprism"].psnr, []
    for components in OUR_COMPONENTS:
        settings = {
            "seed": SEED,
            "mixture": {"components": components},
            "diffusion": {"iterations": 0},
        }
        began = time.perf_counter()
        ours = Separator(problem, settings).fit(progress=False)
        seconds = time.perf_counter() - began
        x = ours.separate(test, seed=SEED).draws["source2"][0]
        score = psnr(x, test.truth["source2"], data_range=4.0)
        times = f"{published_hours * 3600 / seconds:,.0f}" if score >= goal else "–"
        rows.append([components, f"{seconds:.1f}", f"{score:.2f}", times])
    head = ["components", "seconds", "PSNR source 2", f"times cheaper, where at {goal}"]
    return text_table(head, rows)


def main() -> None:
    found = measure_samplers("--full" in sys.argv[1:])
    print(samplers_table(found), end="\n\n")
    print(to_reach(found), end="\n\n", flush=True)
    print(evaluation_costs(), end="\n\n", flush=True)
    text, hours = published_cost(found)
    print(text, end="\n\n", flush=True)
    print(our_cost(hours))


if __name__ == "__main__":
    main()
