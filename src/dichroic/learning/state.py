"""What a fit remembers from one iteration to the next."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dichroic.inference.sampling import Denoisers
from dichroic.operators.learnable import Parameters

Metrics = dict[str, Any]


@dataclass(frozen=True)
class State:
    """All that a fit remembers between iterations: a fit that was killed goes on from it to the same result."""

    phase: str = "mixture"  # the name of a phase, or "done"
    group: int = 0
    iteration: int = 0  # within the phase (mixture: within the size)
    stale: int = 0  # sizes or iterations without a better score
    total: int = 0  # iterations done since the start
    score: float = -math.inf  # of `best`
    seconds: float = 0.0
    metrics_length: int = 0
    current: Denoisers = dataclasses.field(default_factory=dict)
    best: Denoisers = dataclasses.field(default_factory=dict)
    operators: Parameters = dataclasses.field(default_factory=dict)  # learned, with `current`
    best_operators: Parameters = dataclasses.field(default_factory=dict)
    shrinkage: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of each source

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.phase == "done"
