"""A method by its name: what learns from a problem, separates observations, and samples priors."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np

from dichroic.benchmark.baselines.clvm_linear import ClvmLinear
from dichroic.benchmark.baselines.clvm_vae import ClvmVae
from dichroic.benchmark.baselines.ddprism import Ddprism, DdprismConfig
from dichroic.benchmark.baselines.pcpca import Pcpca
from dichroic.benchmark.baselines.wiener_filter import WienerFilter
from dichroic.benchmark.harness.cases import Case, Held
from dichroic.benchmark.harness.spec import BenchConfig
from dichroic.benchmark.problems.exact_posterior import limit_posterior
from dichroic.benchmark.problems.manifolds import manifold_curves
from dichroic.config import FitConfig
from dichroic.learning.mixture.em import mean_log_evidence
from dichroic.priors import GaussianMixture
from dichroic.problem.problem import joint_observations
from dichroic.separation.separator import Separator


class Method(Protocol):
    """What a benchmark needs of a method; `Separator` and the fitted baselines have it."""

    def fit(self, out: Any = None, *, resume: bool = False, progress: Any = True) -> Any:
        """Learn from the problem; with `out`, keep the run there, with `resume`, go on with it."""
        ...

    def separate(self, view: Any, *, n_draws: int = 1, seed: int = 0) -> Any:
        """A `Separation` of the observations of `view`."""
        ...

    def sample_prior(self, source: str, n: int, *, seed: int = 0) -> np.ndarray:
        """`n` draws from the prior of `source`."""
        ...


Factory = Callable[[Case, BenchConfig], Method]


def make_method(name: str, case: Case, config: BenchConfig) -> Method:
    """The method called `name`, for the problem of `case`."""
    return _FACTORIES[name](case, config)


def _separator(case: Case, config: BenchConfig, **settings: Any) -> Separator:
    stated = FitConfig.from_dict(case.section, where=f"{case.name.label}: fit")
    quick = {k: v for k, v in QUICK_FIT.items() if config.quick and not _states(case.section, k)}
    fit = stated.replace({"seed": case.seed, **quick, **settings})
    return Separator(case.problem, fit)


def _states(section: Mapping[str, Any], setting: str) -> bool:
    """Whether `section` has a value for `setting`, such as `mixture.components`."""
    found: Any = section
    for part in setting.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return False
        found = found[part]
    return True


QUICK_FIT: Mapping[str, Any] = {  # where a problem's own file does not say otherwise
    "mixture.components": 32,
    "diffusion.iterations": 1,
    "diffusion.steps": 1000,
}


def _mixture(case: Case, config: BenchConfig) -> Separator:
    return _separator(case, config, **{"diffusion.iterations": 0})


def _ddprism(sampling: Literal["joint", "gibbs"]) -> Factory:
    config = DdprismConfig.small(sampling)
    return lambda case, _: Ddprism(case.problem, seed=case.seed, config=config)


def _baseline(kind: type[ClvmLinear | ClvmVae | Pcpca | WienerFilter]) -> Factory:
    return lambda case, _: kind(case.problem, seed=case.seed)


_FACTORIES: dict[str, Factory] = {
    "dichroic": _separator,
    "mixture": _mixture,
    "ddprism": _ddprism("joint"),
    "ddprism-gibbs": _ddprism("gibbs"),
    "clvm-linear": _baseline(ClvmLinear),
    "clvm-vae": _baseline(ClvmVae),
    "pcpca": _baseline(Pcpca),
    "wiener": _baseline(WienerFilter),
}


def limit_of(case: Case, held: Held, n_draws: int) -> tuple[dict[str, np.ndarray], float]:
    """Draws of the exact posterior of the built-in problem of `case`, `(n_draws, n, dim)` by source.

    And the mean log evidence of the observations.
    """
    curves = manifold_curves(case.seed, case.name.sources)
    draws, evidence = limit_posterior(held.views[0], curves, n_draws=n_draws, seed=case.seed)
    return draws, float(np.mean(evidence))


def evidence_of(method: Method, held: Held) -> float | None:
    """The mean log evidence of the observations `held`, where all priors of `method` are mixtures."""
    denoisers = getattr(method, "denoisers", {})
    if not denoisers or not all(isinstance(d, GaussianMixture) for d in denoisers.values()):
        return None
    obs = joint_observations(held.views, getattr(method, "operators", {}))
    return mean_log_evidence(denoisers, [obs])
