"""Problems to compare methods on: what to learn from, held-out observations, and the truth.

The built-in ones are the random manifolds of the paper (arXiv 2510.05205, section 5.1), with new
observations of the same manifolds held out. A user's own problem is split by `problem.holdout`; what
needs a truth is left out where there is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dichroic.bench.names import BenchConfig, ProblemName
from dichroic.config import FitConfig
from dichroic.datasets.manifolds import manifold_problem
from dichroic.fingerprint import fingerprint
from dichroic.problem import Problem, View, holdout
from dichroic.statement import load_problem

Arrays = dict[str, np.ndarray]
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

    `fresh` has true sources that are independent of the held-out ones, `(n, *shape)`; it is empty for a
    user's problem, whose `section` are the settings of a fit that its file states.
    """

    name: ProblemName
    seed: int
    problem: Problem
    held: tuple[Held, ...]
    data_range: Mapping[str, float]
    fresh: Arrays = field(default_factory=dict)
    section: Mapping[str, Any] = field(default_factory=dict)


def build_case(name: ProblemName, seed: int, config: BenchConfig) -> Case:
    """The problem called `name` with the random numbers of `seed`."""
    return _users(name, seed, config) if name.path else _manifolds(name, seed, config)


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
    return dict(manifolds(contrastive, seed, count=n, observe=observe).views[-1].truth)


def _manifolds(name: ProblemName, seed: int, config: BenchConfig) -> Case:
    test = manifolds(name, seed, count=config.held_out, observe=HELD_OUT_SEED)
    views = test.views[-1:] if name.f_mix is None else test.views
    return Case(
        name,
        seed,
        manifolds(name, seed, count=config.count),
        tuple(Held(v.name, (v,)) for v in views),
        dict.fromkeys(test.names, 4.0),  # each dimension is scaled to [−2, 2]
        fresh_sources(name, seed, config.points, observe=FRESH_SEED),
    )


def _users(name: ProblemName, seed: int, config: BenchConfig) -> Case:
    problem, section = load_problem(name.path)
    fraction = FitConfig.from_dict(section, where=f"{name.path}: fit").holdout
    train: dict[str, View] = {}
    held = []
    for i, views in enumerate(problem.joint_views()):
        kept, test = holdout(views, fraction, seed + i)
        train |= {v.name: v for v in kept}
        n = test[0].count
        if n:
            some = np.linspace(0, n - 1, min(n, config.held_out)).round().astype(int)
            names = "+".join(v.name for v in views)
            held.append(Held(names, tuple(v.select(some) for v in test)))
    split = Problem(problem.sources, [train[v.name] for v in problem.views], problem.origin)
    known = {k: [h.truth[k].ravel() for h in held if k in h.truth] for k in problem.names}
    spans = {k: float(np.ptp(np.concatenate(x))) for k, x in known.items() if x}
    return Case(name, seed, split, tuple(held), spans, section=section)


def check_problem(name: ProblemName) -> str:
    """Raise a `DichroicError` if a user's problem cannot be used; else its fingerprint, truth and all."""
    if not name.path:
        return ""
    problem, section = load_problem(name.path)
    FitConfig.from_dict(section, where=f"{name.path}: fit")
    return fingerprint((problem.fingerprint(), section, [dict(v.truth) for v in problem.views]))
