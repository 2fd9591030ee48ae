"""Problems to compare methods on: what to learn from, held-out observations, and the truth.

The built-in ones are those of the paper (arXiv 2510.05205): its random manifolds, with new observations of the
same manifolds held out, and digits over grass, with other digits and parts of the photographs held out. A user's
own problem is split by `problem.holdout`; what needs a truth is left out where there is none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dichroic.benchmark.harness.spec import BenchConfig, ProblemName
from dichroic.benchmark.problems import grassy
from dichroic.benchmark.problems.digit_features import train_classifier
from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.config import Bounds, FitConfig
from dichroic.io import load_problem
from dichroic.problem.problem import Problem
from dichroic.problem.splits import holdout
from dichroic.problem.view import View
from dichroic.runtime.fingerprint import fingerprint

Arrays = dict[str, np.ndarray]
Features = Callable[[np.ndarray], np.ndarray]
HELD_OUT_SEED, FRESH_SEED = 1000, 2000  # added to the seed of what is learned from


@dataclass(frozen=True)
class Held:
    """Held-out observations of one view, or of co-observed ones, and the truth where it is known."""

    name: str
    views: tuple[View, ...]

    @property
    def count(self) -> int:
        """The number of observations."""
        return self.views[0].count

    @property
    def argument(self) -> Any:
        """What `separate` takes: the view, or the list of co-observed views."""
        return self.views[0] if len(self.views) == 1 else list(self.views)

    @property
    def truth(self) -> Arrays:
        """The sources whose true values are known for every observation, `(n, *shape)`."""
        known = {k: np.asarray(x, np.float32) for v in self.views for k, x in v.truth.items()}
        return {k: x for k, x in known.items() if np.all(np.isfinite(x)) and np.ptp(x) > 0}

    def first(self, n: int) -> "Held":
        """The first `n` observations alone."""
        return Held(self.name, tuple(v.select(slice(0, n)) for v in self.views))


@dataclass(frozen=True)
class Case:
    """A problem to learn from, and what its answers are held against.

    `bounds` are what entries of a source are known to be; a fit keeps to those that its settings state alone.
    `fresh` has true sources that are independent of the held-out ones, `(n, *shape)`; it is empty for a
    user's problem. `section` are the settings of a fit that the problem states, and `features` what a Fréchet
    distance is of, by source.
    """

    name: ProblemName
    seed: int
    problem: Problem
    held: tuple[Held, ...]
    data_range: Mapping[str, float]
    fresh: Arrays = field(default_factory=dict)
    section: Mapping[str, Any] = field(default_factory=dict)
    bounds: Bounds = field(default_factory=dict)
    features: Mapping[str, Features] = field(default_factory=dict)


def build_case(name: ProblemName, seed: int, config: BenchConfig) -> Case:
    """The problem called `name` with the random numbers of `seed`."""
    if name.path:
        return _users(name, seed, config)
    return _grassy(name, seed, config) if name.pixels else _manifolds(name, seed, config)


def manifolds(name: ProblemName, seed: int, *, count: int, observe: int = 0) -> Problem:
    """A built-in problem; `observe` chooses other observations of the same manifolds."""
    options = {"per_source": True} if name.per_source else {}
    return manifold_problem(
        seed=seed + observe,
        problem_seed=seed,
        sources=name.sources,
        f_mix=name.f_mix,
        count=count,
        **options,
    )


def fresh_sources(name: ProblemName, seed: int, n: int, *, observe: int) -> Arrays:
    """`n` new points of every manifold of a built-in problem, `(n, dim)`."""
    contrastive = ProblemName(name.label, sources=name.sources)
    return dict(manifolds(contrastive, seed, count=n, observe=observe).views[-1].head.truth)


def _manifolds(name: ProblemName, seed: int, config: BenchConfig) -> Case:
    test = manifolds(name, seed, count=config.held_out, observe=HELD_OUT_SEED)
    views = test.views[-1:] if name.f_mix is None else test.views
    return Case(
        name,
        seed,
        manifolds(name, seed, count=config.count),
        tuple(Held(v.name, (v.head,)) for v in views),
        dict.fromkeys(test.names, 4.0),  # each dimension is scaled to [−2, 2]
        fresh_sources(name, seed, config.points, observe=FRESH_SEED),
    )


_MIXTURE: Mapping[str, Any] = {
    "components": 16,
    "rank": 48,
    "gaussian_iterations": 3,
    "iterations": 2,
    "final_iterations": 2,
    "stationary": ["grass"],
}
SMALL: Mapping[str, Any] = {  # for minutes on two cores
    "mixture": {**_MIXTURE, "components": 32, "rank": 32},
    "diffusion": {
        "iterations": 1,
        "steps": 500,
        "batch_size": 64,
        "channels": 16,
        "levels": 2,
        "level_depth": 1,
        "evidence_observations": 256,
        "evidence_draws": 2,
    },
}
FULL: Mapping[str, Any] = {  # for minutes on a data-centre GPU
    "mixture": _MIXTURE,
    "sampler": {"steps": 16},
    "diffusion": {
        "iterations": 6,
        "steps": 500,
        "keep": "all",
        "batch_size": 256,
        "channels": 64,
        "precision": "bfloat16",
        "evidence_observations": 512,
        "evidence_draws": 2,
    },
}


def _grassy(name: ProblemName, seed: int, config: BenchConfig) -> Case:
    factors = {14: (1, 2), 28: (1, 2, 4)}[name.pixels] if name.down else (1,)
    sizes: dict[str, Any] = {"size": name.pixels, "factors": factors}
    problem = grassy.grassy_problem(count=config.count, seed=seed, **sizes)
    views = grassy.grassy_views(
        count=config.held_out, seed=seed + HELD_OUT_SEED, held_out=True, **sizes
    )
    classifier, _ = train_classifier(name.pixels)
    return Case(
        name,
        seed,
        problem,
        tuple(Held(v.name, (v,)) for v in views if "digit" in v.operators),
        dict.fromkeys(problem.names, 1.0),
        grassy.fresh_sources(config.points, seed=seed + FRESH_SEED, size=name.pixels),
        SMALL if name.pixels <= 14 else FULL,
        bounds={"digit": (0.0, 1.0)},
        features={"digit": classifier.of},
    )


def _users(name: ProblemName, seed: int, config: BenchConfig) -> Case:
    problem, section = load_problem(name.path)
    fit = FitConfig.from_dict(section, where=f"{name.path}: fit")
    train: dict[str, View] = {}
    held = []
    for i, views in enumerate(problem.joint_views()):
        kept, test = holdout(views, fit.holdout, seed + i)
        train |= {v.name: v for v in kept}
        n = test[0].count
        if n:
            some = np.linspace(0, n - 1, min(n, config.held_out)).round().astype(int)
            names = "+".join(v.name for v in views)
            held.append(Held(names, tuple(v.select(some) for v in test)))
    split = Problem(problem.sources, [train[v.name] for v in problem.views], problem.origin)
    known = {k: [h.truth[k].ravel() for h in held if k in h.truth] for k in problem.names}
    spans = {k: float(np.ptp(np.concatenate(x))) for k, x in known.items() if x}
    return Case(name, seed, split, tuple(held), spans, section=section, bounds=fit.bounds)


def check_problem(name: ProblemName) -> str:
    """Raise a `DichroicError` if the files of a problem cannot be used; else their fingerprint."""
    if name.pixels:
        return fingerprint((grassy.zeros_and_ones(held_out=True), grassy.load_photographs()))
    if not name.path:
        return ""
    problem, section = load_problem(name.path)
    FitConfig.from_dict(section, where=f"{name.path}: fit")
    return fingerprint(
        (problem.fingerprint(), section, [dict(v.head.truth) for v in problem.views])
    )
