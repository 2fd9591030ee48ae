"""What can be learned of which source, judged from the operators alone.

The moments of an observation are linear in those of the sources, its mean in the means `μ_β` and
its covariance in the covariances `C_β`:

    E y_i = Σ_β A_iβ μ_β,      Cov y_i − Σ_i = Σ_β A_iβ C_β A_iβᵀ.

Each observation is seen with its own operators, so the map `L: (C_β)_β ↦ (Σ_β A_iβ C_β A_iβᵀ)_i`
is stacked over observations as well as views. A direction of `C_β` is *determined* iff no vector of
the kernel of `L` has a part along it. In coordinates of symmetric matrices that keep inner products
(the entries of a triangle, those off the diagonal times √2), `LᵀL` has the blocks

    ⟨E, (LᵀL)_βγ E'⟩ = Σ_i tr(E G_i E' G_iᵀ),      G_i = A_iβᵀ A_iγ,

and the normal matrix of the map of the means has the blocks `Σ_i G_i`. Views and sources are
brought to a common scale first, which changes no kernel. The projector `Π` on the kernel says the
rest: the eigenvalues of `Π_ββ` are 1 on what no view sees of a source, between 0 and 1 on what is
confused with other sources, those with `Π_βγ ≠ 0`, and 0 on what is determined.

Where there are too many unknowns, all covariances are restricted to `C_β = Q c_β Qᵀ` with a few
columns `Q`, the same for sources of equal size: a patch of neighbouring entries and random
directions. The kernel of the restricted map is part of the whole one, so that *not identified* is
certain, while *identified* says that a probe found nothing wrong. Counting needs no probe: sources
with more covariance entries together than the views that see any of them have, cannot all be
identified (`short`).
"""

from collections.abc import Collection

import numpy as np

from dichroic.problem.identifiability.kernel import Part, resolve
from dichroic.problem.identifiability.normal_equations import Moments
from dichroic.problem.identifiability.probe import directions_of, half
from dichroic.problem.identifiability.result import Identifiability as Identifiability
from dichroic.problem.identifiability.result import SourceIdentifiability as SourceIdentifiability
from dichroic.problem.identifiability.result import Verdict as Verdict
from dichroic.problem.identifiability.sample_size import scarcity as scarcity
from dichroic.problem.identifiability.warnings import warnings_of
from dichroic.problem.identifiability.zero_operators import zero_operators as zero_operators
from dichroic.problem.offsets import offsets
from dichroic.problem.problem import Problem
from dichroic.problem.screening import suspicions
from dichroic.runtime.tracking import warn

WEAK = 1e4  # condition number above which a source is weakly identified


def identifiability(problem: Problem, *, seed: int = 0) -> Identifiability:
    """Say which moments of each source the views of `problem` determine, and warn of what they do not.

    What is outside the kernels of `(C_β)_β ↦ (Σ_β A_iβ C_β A_iβᵀ)_i` and
    `(μ_β)_β ↦ (Σ_β A_iβ μ_β)_i`, where `i` runs over the observations of all views (a sample of
    them where there are many, of at most 4,096 where they stay in files; one for all that share operators
    and mask), co-observed views being one.

    Args:
        problem: sources and views; the values of the observations are not used.
        seed: chooses the sample and the directions of the probe.

    Raises:
        DichroicError: if co-observed views do not fit together.

    Warns:
        DichroicWarning: of each of the `warnings` of the result.
    """
    result = examined(problem, seed=seed)
    warn(*result.warnings)
    return result


def examined(problem: Problem, *, seed: int = 0) -> Identifiability:
    """What `identifiability` gives, without a word."""
    rng = np.random.default_rng(seed)
    bases, exact = directions_of(problem.sources, rng)
    sizes = {name: len(basis) for name, basis in bases.items()}
    moments = Moments.zeros(sizes)
    for views in problem.joint_views():
        moments.add_view(views, bases, rng)
    means = resolve(moments.mean, list(sizes.values()))
    covariances = resolve(moments.covariance, [half(r) for r in sizes.values()])
    lacking = {} if exact else moments.lacking(problem.sources)
    parts = zip(sizes, means.parts, covariances.parts, strict=True)
    results = tuple(_result(name, m, c, (name,) in lacking) for name, m, c in parts)
    known = {s.name for s in results if s.verdict == "not identified"}
    short = {g: pair for g, pair in lacking.items() if len(g) > 1 and not known & set(g)}
    warnings = warnings_of(results, means, covariances, lacking, short, exact)
    return Identifiability(results, exact, warnings, tuple(short))


def _result(name: str, mean: Part, covariance: Part, lacking: bool) -> SourceIdentifiability:
    verdict: Verdict = "weakly identified" if covariance.condition > WEAK else "identified"
    if mean.undetermined or covariance.undetermined or lacking:
        verdict = "not identified"
    return SourceIdentifiability(
        name,
        verdict,
        covariance.size,
        covariance.size - covariance.undetermined,
        mean.size,
        mean.size - mean.undetermined,
        1 / covariance.condition,
        covariance.condition,
    )


def advice(
    problem: Problem,
    stationary: Collection[str] = (),
    *,
    outliers: str = "exclude",
    result: Identifiability | None = None,
) -> tuple[str, ...]:
    """All that there is to warn of before a fit, in which the sources `stationary` are.

    `outliers` is what the fit does with them, `result` that of `identifiability`, where it is known already.
    """
    return (
        *(result or examined(problem)).warnings,
        *scarcity(problem, stationary),
        *zero_operators(problem.views),
        *offsets(problem).notes,
        *suspicions(problem, outliers),
    )
