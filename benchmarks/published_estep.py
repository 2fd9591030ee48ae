"""The published E-step (one conjugate-gradient step, thousands of sampler steps) and ours, side by side.

On the Gaussian problem of `estep.py`: χ²/d of the draws about the analytic posterior (1 is ideal), seconds
per 4,096 observations after compilation, and what each costs next to ours where both are as well
calibrated. Then what the published settings of contrastive-2 would take here, from the measured seconds of
a sampler step and of a training step with its network.
Run: python benchmarks/published_estep.py   (under four minutes on two cores)
"""

import dataclasses
import time

import jax
import numpy as np
from estep import D, N, problem

from dichroic.baselines.ddprism_laps import DdprismConfig, fresh_network, make_sampler
from dichroic.baselines.ddprism_sampling import Absolute
from dichroic.baselines.ddprism_training import train
from dichroic.batching import take
from dichroic.observations import Observations
from dichroic.sample import Ancestral, Exact, draw_posterior
from dichroic.tables import text_table

SEED = 0
BATCH = 512  # observations at once, so that compiling needs a few of them only
WITHIN = 0.02  # χ²/d that counts as equal
OBSERVATIONS = 65536  # of each view of contrastive-2
CONFIG = DdprismConfig.published()


def seconds_of(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(sampler, denoisers, obs, mean, cov) -> tuple[float, float, float]:
    """`(χ²/d, its median over observations, seconds)` of one draw per observation."""
    draws = lambda obs: draw_posterior(
        denoisers, obs, jax.random.key(SEED + 9), sampler=sampler, batch_size=BATCH
    )
    draws(take(obs, slice(0, BATCH)))
    began = time.perf_counter()
    found = draws(obs).x
    seconds = time.perf_counter() - began
    r = np.concatenate([found["a"][0], found["b"][0]], axis=-1) - mean
    chi2 = np.einsum("ni,nij,nj->n", r, np.linalg.inv(cov), r) / (2 * D)
    return float(chi2.mean()), float(np.median(chi2)), seconds


def measure_samplers() -> list[tuple[str, int, float, float, float]]:
    denoisers, obs, mean, cov = problem(SEED)
    absolute = {k: Absolute(d, CONFIG.unit) for k, d in denoisers.items()}
    ours = [("Exact", 0, Exact()), *(("Ancestral", n, Ancestral(n)) for n in (8, 32))]
    theirs = [("published", n, make_sampler(CONFIG, n)) for n in (64, 256, 1024, 4096)]
    rows = [(k, n, *measure(s, denoisers, obs, mean, cov)) for k, n, s in ours]
    return rows + [(k, n, *measure(s, absolute, obs, mean, cov)) for k, n, s in theirs]


def samplers_table(found) -> str:
    ours = {f"{k} {n}".removesuffix(" 0"): s for k, n, *_, s in found if k != "published"}
    rows = [
        [k, n or "–", f"{chi2:.3f}", f"{median:.3f}", f"{s:.2f}"]
        + [f"{s / own:,.1f}" for own in ours.values()]
        for k, n, chi2, median, s in found
    ]
    head = ["sampler", "steps", "chi2/d", "median", "seconds"]
    return text_table([*head, *(f"× {k}" for k in ours)], rows)


def at_equal_chi2(found) -> str:
    """The ratio of times between the fewest published steps within `WITHIN` of our χ²/d and ours."""
    lines = []
    theirs = [row for row in found if row[0] == "published"]
    for name, steps, chi2, _, seconds in (row for row in found if row[0] != "published"):
        label = f"{name}({steps})" if steps else name
        equal = [row for row in theirs if abs(row[2] / chi2 - 1) <= WITHIN]
        if equal:
            _, n, other, _, s = equal[0]
            text = (
                f"published({n}) is as good (chi2/d {other:.3f}) in {s / seconds:,.0f} × the time"
            )
        else:
            _, n, other, _, s = min(theirs, key=lambda row: abs(row[2] / chi2 - 1))
            text = f"none as good; nearest published({n}): chi2/d {other:.3f}, {s / seconds:,.0f} ×"
        lines.append(f"{label}, chi2/d {chi2:.3f}: {text}")
    return "\n".join(lines)


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
        work = lambda seen=seen: draw_posterior(
            known, seen, keys[0], sampler=make_sampler(CONFIG, steps), batch_size=BATCH
        )
        work()
        per_step.append(seconds_of(work) / steps / seen.count)
    x = np.random.default_rng(SEED).normal(size=(OBSERVATIONS, D)).astype(np.float32)
    n = 200  # training steps; two blocks
    training = dataclasses.replace(CONFIG.training, steps=n)
    work = lambda: train(networks["a"], x, keys[1], config=training)
    work()
    return per_step[0], per_step[1], seconds_of(work) / n


def published_cost(found) -> str:
    """Hours of the published settings on contrastive-2, whose views see one source and two."""
    one, two, training = network_costs()
    gaussian = found[-1][-1] / found[-1][1] / N
    laps = [CONFIG.diffusion_laps(g) for g in (0, 1)]
    per_lap = OBSERVATIONS * CONFIG.steps / 3600
    hours = lambda seconds, laps: f"{seconds * per_lap * laps:,.0f}"
    trained = lambda laps: f"{training * CONFIG.training_steps * laps / 3600:,.1f}"
    cost = lambda what, laps, seconds: [what, laps, f"{seconds * 1e6:.2f}", hours(seconds, laps)]
    rows = [
        cost("E-step, Gaussian, 1 source (as 2, halved)", CONFIG.gaussian_laps, gaussian / 2),
        cost("E-step, Gaussian, 2 sources", CONFIG.gaussian_laps, gaussian),
        cost("E-step, networks, 1 source", laps[0], one),
        cost("E-step, networks, 2 sources", laps[1], two),
        ["M-step, per training step", sum(laps), f"{training * 1e6:.0f}", trained(sum(laps))],
    ]
    total = sum(float(row[-1].replace(",", "")) for row in rows)
    table = text_table(["published, contrastive-2", "laps", "microseconds", "hours"], rows)
    return (
        f"{table}\nTotal on this machine, extrapolated: {total:,.0f} hours ({total / 24:,.0f} days)"
    )


def main() -> None:
    found = measure_samplers()
    print(samplers_table(found), end="\n\n")
    print(at_equal_chi2(found), end="\n\n", flush=True)
    print(published_cost(found))


if __name__ == "__main__":
    main()
