"""Whether there are observations enough for intervals that hold as much as they say."""

import math
from collections.abc import Collection

from dichroic.problem import Problem
from dichroic.view import sees

ENOUGH = 10  # observations for each number of a source


def scarcity(problem: Problem, stationary: Collection[str] = ()) -> tuple[str, ...]:
    """A sentence about every source of which there are fewer than `ENOUGH` observations for each of its numbers.

    Of those that are `stationary`, fewer than `ENOUGH` in all (`benchmarks/stationary.py`).

    A prior is learned as if it were then known: what is not known of it is missing from intervals, and no χ² of
    observations tells (`benchmarks/few_observations.py`).
    """
    found = []
    for name, shape in problem.shapes.items():
        groups = [views for views in problem.joint_views() if any(sees(v, name) for v in views)]
        count, size = sum(views[0].count for views in groups), math.prod(shape)
        if name in stationary and count < ENOUGH:
            found.append(
                f"source {name!r}: {count:,} observations; with fewer than {ENOUGH} intervals of a stationary "
                "source are too narrow: give more observations"
            )
        elif name not in stationary and count < ENOUGH * size:
            found.append(
                f"source {name!r}: {count:,} observations for {size:,} numbers; with fewer than {ENOUGH} for each "
                "number intervals are too narrow (those of 90% held 83% of Gaussian sources with 5, 55% with 1.5, "
                "22% to 45% with 0.5): give more observations, or fewer numbers, or say that it looks the same "
                "everywhere, if it does (fit.mixture.stationary)"
            )
    return tuple(found)
