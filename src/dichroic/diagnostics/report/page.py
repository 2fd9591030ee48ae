"""The page that is being written: what it reports, and its figures so far."""

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dichroic.diagnostics import plots
from dichroic.diagnostics.report.html import esc
from dichroic.diagnostics.report.scores import Held, Score
from dichroic.learning.predictive.result import PredictiveChecks
from dichroic.problem.problem import Problem
from dichroic.runtime.files import write_atomic
from dichroic.separation.separator import Separator


@dataclass
class Page:
    """What is being reported, and the figures written so far."""

    folder: Path
    problem: Problem
    separator: Separator
    metrics: list[dict[str, Any]]
    held: list[Held]
    seconds: float
    scores: list[Score]
    checks: PredictiveChecks
    files: set[str] = field(default_factory=set)

    def figure(self, name: str, figure: Any, caption: str) -> str:
        """Write a figure to `figures/`, and the HTML that embeds it; `caption` is plain text."""
        stem = re.sub(r"[^\w-]+", "_", name)
        while stem in self.files:
            stem += "-2"
        self.files.add(stem)
        data = plots.png(figure)
        write_atomic(self.folder / "figures" / f"{stem}.png", data)
        source = "data:image/png;base64," + base64.b64encode(data).decode()
        width = round(figure.get_figwidth() * 96)
        text = esc(caption)
        image = f'<img src="{source}" alt="{text}" width="{width}">'
        return f"<figure>{image}<figcaption>{text}</figcaption></figure>\n"

    def number(self, source: str) -> int:
        """The position of a source, which chooses its colour."""
        return self.problem.names.index(source)
