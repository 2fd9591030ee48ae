"""Where the time of a fit went, phase by phase, and the memory it took."""

from collections.abc import Mapping, Sequence
from typing import Any

from dichroic.diagnostics.report.html import duration, table

PARTS = {"e_step": "E-step", "m_step": "M-step", "scoring": "scoring"}


def timings(metrics: Sequence[Mapping[str, Any]], separation: float) -> str:
    """A table of iterations, seconds, their parts, and peak memory; `separation` is what this page took."""
    phases: dict[str, list[Mapping[str, Any]]] = {}
    took, before = [], 0.0
    for row in metrics:
        phases.setdefault(str(row.get("phase", "")), []).append(row)
        now = row.get("seconds") or before
        took.append((str(row.get("phase", "")), now - before))
        before = now
    rows = [
        _row(name, iterations, sum(s for phase, s in took if phase == name))
        for name, iterations in phases.items()
    ]
    rows.append(_row("total of the fit", metrics, before))
    rows.append(["separation for this page", "", duration(separation), *[""] * (len(PARTS) + 1)])
    header = ["phase", "iterations", "time", *PARTS.values(), "peak memory so far"]
    note = "Compilation included. E-step: posterior of the sources; M-step: their new priors."
    return table(header, rows) + f"<p><small>{note}</small></p>\n"


def _row(name: str, iterations: Sequence[Mapping[str, Any]], seconds: float) -> list[Any]:
    parts = [
        [iteration[f"seconds_{p}"] for iteration in iterations if iteration.get(f"seconds_{p}")]
        for p in PARTS
    ]
    spent = [duration(sum(found)) if found else "–" for found in parts]
    peaks = [p for iteration in iterations if (p := iteration.get("peak_memory_mib"))]
    memory = f"{max(peaks) / 1024:.2f} GiB" if peaks else "–"
    return [name, len(iterations), duration(seconds), *spent, memory]
