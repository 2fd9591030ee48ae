"""One self-contained HTML page that says what a fit learned, and how far to believe it.

Held-out observations, those that `dichroic.learning.data.prepare` keeps from training, are separated anew;
every number and figure but the learning curves, priors, timings and predictive checks comes from these
draws. Figures are embedded, so that the page can be sent as one file, and also written to `figures/`.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dichroic.diagnostics.report.cards import head
from dichroic.diagnostics.report.html import document, section
from dichroic.diagnostics.report.page import Page
from dichroic.diagnostics.report.scores import own_warnings, score, separate_held_out
from dichroic.diagnostics.report.sections import all_sections
from dichroic.errors import RunError
from dichroic.runtime.files import write_atomic, writing
from dichroic.separation.separator import Separator


def write_report(
    folder: str | Path,
    *,
    separator: Separator,
    metrics: Sequence[Mapping[str, Any]],
    n_draws: int = 32,
    max_observations: int = 256,
    title: str = "",
    warnings: Sequence[str] = (),
    baselines: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write `folder/report.html` and its figures; returns the page's path.

    Args:
        metrics: one mapping per iteration, as in `metrics.jsonl`.
        n_draws: posterior draws of each held-out observation.
        max_observations: held-out observations separated, at most, of each view.
        warnings: sentences to show among the page's own warnings.
        baselines: PSNR in dB by answer and source, to be compared in a table; ours first.
    """
    problem = separator.problem
    if problem is None:
        raise RunError(
            "a report needs the problem that was fitted: Separator.load(…, problem=problem)"
        )
    folder = Path(folder)
    with writing(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    held = separate_held_out(separator, problem, n_draws, max_observations)
    seconds = time.perf_counter() - began
    scores = [score(h, k) for k in problem.names for h in held if k in h.truth]
    rows = [dict(row) for row in metrics]
    checks = separator.predictive_checks()
    page = Page(folder, problem, separator, rows, held, seconds, scores, checks)
    notes = [*warnings, *checks.warnings, *own_warnings(held, scores)]
    parts = [("Result", head(page, notes, baselines or {})), *all_sections(page, notes)]
    body = "".join(section(name, content) for name, content in parts)
    title = title or f"Separation of {', '.join(problem.names)}"
    write_atomic(folder / "report.html", document(title, body).encode())
    return folder / "report.html"
