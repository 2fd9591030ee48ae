"""Results: what is determined of each source, and of all of them."""

from dataclasses import dataclass
from typing import Literal

from dichroic.runtime.tables import text_table

Verdict = Literal["identified", "weakly identified", "not identified"]


@dataclass(frozen=True)
class SourceIdentifiability:
    """What the views determine of one source.

    Attributes:
        name: the source.
        verdict: `identified`, `weakly identified` (condition number above 1e4) or `not identified`.
        dimensions: of its covariance, `D (D + 1) / 2` (or fewer, of a probe).
        determined: how many of them the views determine.
        mean_dimensions: of its mean, `D` (or fewer, of a probe).
        mean_determined: how many of them the views determine.
        smallest: the gain of its worst determined direction, relative to the best of all.
        condition: `1 / smallest`: how much more an error counts in the worst than in the best.
    """

    name: str
    verdict: Verdict
    dimensions: int
    determined: int
    mean_dimensions: int
    mean_determined: int
    smallest: float
    condition: float


@dataclass(frozen=True)
class Identifiability:
    """What the views determine of every source, and what is wrong.

    Attributes:
        sources: one result per source.
        exact: whether the whole map was looked at, or only a probe of it.
        warnings: sentences that say what is wrong and what to do.
        short: sources that a probe found nothing wrong with, though the views have too few
            equations for all of them: some are not identified, whatever their verdicts.
    """

    sources: tuple[SourceIdentifiability, ...]
    exact: bool
    warnings: tuple[str, ...]
    short: tuple[tuple[str, ...], ...] = ()

    @property
    def identified(self) -> bool:
        """Whether every source is identified, weakly at least."""
        return not self.short and all(s.verdict != "not identified" for s in self.sources)

    def __getitem__(self, name: str) -> SourceIdentifiability:
        return next(s for s in self.sources if s.name == name)

    def table(self) -> str:
        """The results as a plain-text table."""
        probe = "" if self.exact else " (probe)"
        header = ["source", "verdict", f"covariance{probe}", f"mean{probe}", "condition"]
        rows = [
            [
                s.name,
                s.verdict,
                f"{s.determined} of {s.dimensions}",
                f"{s.mean_determined} of {s.mean_dimensions}",
                f"{s.condition:.3g}",
            ]
            for s in self.sources
        ]
        return text_table(header, rows)
