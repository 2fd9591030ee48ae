"""Whether there are observations enough for intervals that hold as much as they say.

A source needs `ENOUGH` observations for each of its entries, in two ways: in all views that see it together, and
in those that tell it from others. To find these, views with few observations are left out one after the other, the
smallest first; what is then no longer identified depends on those that are left out.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from dichroic.problem.identifiability.kernel import Kernel, resolve
from dichroic.problem.identifiability.normal_equations import Moments
from dichroic.problem.identifiability.probe import directions_of, half
from dichroic.problem.lazy_view import AnyView
from dichroic.problem.problem import Problem
from dichroic.problem.view_validation import sees

ENOUGH = 10  # observations for each entry of a source
UNKNOWNS = 1000  # covariance entries that are looked at, to find what depends on a view


def scarcity(problem: Problem, stationary: Collection[str] = ()) -> tuple[str, ...]:
    """A sentence about every source that is seen, or told from others, by too few observations.

    Fewer than `ENOUGH` for each of its entries; of those that are `stationary`, fewer than `ENOUGH` in all
    (`benchmarks/stationary.py`).

    A prior is learned as if it were then known: what is not known of it is missing from intervals, and no χ² of
    observations tells (`benchmarks/few_observations.py`).
    """
    sizes = {k: 1 if k in stationary else math.prod(s) for k, s in problem.shapes.items()}
    seen = {name: _count(problem.joint_views(), [name]) for name in sizes}
    scarce = {name: n for name, n in seen.items() if n < ENOUGH * sizes[name]}
    alone = (_seen_little(name, n, sizes[name], name in stationary) for name, n in scarce.items())
    return (*alone, *_told_by_few(problem, sizes, scarce))


def _seen_little(name: str, count: int, size: int, stationary: bool) -> str:
    if stationary:
        return (
            f"source {name!r}: {count:,} observations; with fewer than {ENOUGH} intervals of a stationary "
            "source are too narrow: give more observations"
        )
    return (
        f"source {name!r}: {count:,} observations for {size:,} entries; with fewer than {ENOUGH} for each "
        "entry intervals are too narrow (those of 90% held 83% of Gaussian sources with 5, 55% with 1.5, "
        "22% to 45% with 0.5): give more observations, or fewer entries, or say that it is stationary, "
        "if it is (fit.mixture.stationary)"
    )


def _told_by_few(
    problem: Problem, sizes: Mapping[str, int], scarce: Collection[str]
) -> Iterator[str]:
    """Sentences about sources that only views with few observations tell from others, or see in full."""
    joint = sorted(problem.joint_views(), key=lambda views: views[0].count)
    most = lambda views: max(n for k, n in sizes.items() if any(sees(v, k) for v in views))
    few = [views for views in joint if views[0].count < ENOUGH * most(views)]
    few = few[: len(joint) - 1]  # one has to remain
    kernels = _kernels_without(problem, few, joint[len(few) :])
    for k, (before, after) in enumerate(pairwise(kernels), 1):
        for group in _newly_confused(before, after):
            yield from _told(few[:k], [problem.names[i] for i in group], sizes)
        for name, old, new in zip(problem.names, before.parts, after.parts, strict=True):
            if new.unseen > old.unseen and name not in scarce:
                yield from _seen_in_part(few[:k], name, new.unseen - old.unseen, sizes[name])


def _kernels_without(
    problem: Problem, few: Sequence[Sequence[AnyView]], others: Sequence[Sequence[AnyView]]
) -> list[Kernel]:
    """The kernels of the map of covariances of all views, and without the first, the first two … of `few`."""
    if not few:
        return []
    rng = np.random.default_rng(0)
    bases, _ = directions_of(problem.sources, rng, UNKNOWNS)
    moments = Moments.zeros({name: len(basis) for name, basis in bases.items()})
    for views in others:
        moments.add_view(views, bases, rng)
    halves = [half(len(basis)) for basis in bases.values()]
    found = [resolve(moments.covariance, halves)]
    for views in reversed(few):
        moments.add_view(views, bases, rng)
        found.append(resolve(moments.covariance, halves))
    return found[::-1]


def _newly_confused(before: Kernel, after: Kernel) -> list[list[int]]:
    """The groups of sources that are confused `after`, and were not all so `before`."""
    old = [set(group) for group in before.groups()]
    return [group for group in after.groups() if not any(set(group) <= o for o in old)]


def _told(
    few: Sequence[Sequence[AnyView]], group: Sequence[str], sizes: Mapping[str, int]
) -> Iterator[str]:
    told = [k for k in group if any(sees(v, k) for views in few for v in views)]
    rest = [k for k in group if k not in told]
    count, size = _count(few, told), max(sizes[k] for k in told)
    if count < ENOUGH * size:
        verb = "is" if len(told) == 1 else "are"
        apart = f"{verb} distinguished from {_listed(rest)}" if rest else "are distinguished"
        yield f"{_listed(told)} {apart} by {_by(few, told)}{_too_few(size)}"


def _seen_in_part(
    few: Sequence[Sequence[AnyView]], name: str, unseen: int, size: int
) -> Iterator[str]:
    if (count := _count(few, [name])) and count < ENOUGH * size:
        yield (
            f"source {name!r}: {unseen} dimensions of its covariance are seen by {_by(few, [name])}"
            f"{_too_few(size)}"
        )


def _too_few(size: int) -> str:
    """What follows from few observations for `size` entries, or for a stationary source (1)."""
    each = f" for {size:,} entries; with fewer than {ENOUGH} for each entry"
    return f"{each if size > 1 else f'; with fewer than {ENOUGH}'} intervals are too narrow: give it more"


def _count(joint: Sequence[Sequence[AnyView]], names: Collection[str]) -> int:
    """How many observations see one of `names`; co-observed views count once."""
    return sum(views[0].count for views in joint if any(sees(v, k) for v in views for k in names))


def _by(few: Sequence[Sequence[AnyView]], names: Collection[str]) -> str:
    """The views that see one of `names`, and how many observations they have."""
    those = [views for views in few if any(sees(v, k) for v in views for k in names)]
    words = _listed(["+".join(v.name for v in views) for views in those])
    view, have = ("view", "has") if len(those) == 1 else ("views", "have")
    return f"{view} {words} only, which {have} {_count(those, names):,} observations"


def _listed(names: Sequence[str]) -> str:
    *first, last = [repr(n) for n in names]
    return f"{', '.join(first)} and {last}" if first else last
