"""The tables of a benchmark: on the terminal, as Markdown, as one HTML page, and as a figure."""

import base64
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from dichroic.benchmark.harness.published import PUBLISHED
from dichroic.benchmark.harness.results import Found, cell, collect, evidence_gap, gap, of, values
from dichroic.benchmark.harness.spec import LIMIT, JobSpec
from dichroic.diagnostics.plots.canvas import colour, new_figure, png, tidy
from dichroic.diagnostics.report.html import document, duration, esc, section, table
from dichroic.io.model_files import write_json
from dichroic.runtime.files import write_atomic
from dichroic.runtime.tables import text_table

Table = tuple[str, list[str], list[list[str]]]


def write_tables(out: Path, jobs: Sequence[JobSpec], *, command: str = "") -> str:
    """Write `results.json`, `table.md`, `table.html` and `table.png` in `out`; the tables as text."""
    entries = collect(out, jobs)
    write_json(out / "results.json", {"command": command, "jobs": entries})
    problems = list(dict.fromkeys(e["problem"] for e in entries if "scores" in e or "error" in e))
    tables = [t for p in problems for t in _tables(p, entries)]
    foot = footer(entries, command)
    write_atomic(out / "table.md", (_markdown(tables) + f"\n{foot}\n").encode())
    picture = figure(problems, entries)
    write_atomic(out / "table.png", picture)
    write_atomic(out / "table.html", _page(tables, foot, picture).encode())
    texts = [f"{title}\n\n{text_table(head, rows)}" for title, head, rows in tables]
    return "\n\n".join([*texts, foot])


def _tables(problem: str, entries: Sequence[Found]) -> list[Table]:
    methods = list(dict.fromkeys(e["method"] for e in entries if e["problem"] == problem))
    sources = sorted(
        {r["source"] for m in methods for e in of(entries, problem, m) for r in e["scores"]}
    )
    rows_within = lambda s: any(len(values(of(entries, problem, m), _within, s)) for m in methods)
    bounded = list(filter(rows_within, sources))
    whole = ["mean"] if problem.startswith("mixed") else []  # what the paper gives for these
    psnr = [f"PSNR {s}" for s in [*sources, *whole]] + [f"{s} within bounds" for s in bounded]
    distances = ["Sinkhorn post.", "published", "prior", "published", "PQMass post.", "prior"]
    distances += ["Fréchet post.", "prior"] if _has_features(problem, entries) else []
    costs = ["nats to limit", "90% holds", "ranks p", "χ²/M", "fit", "µs per draw", "MiB", "failed"]
    heads = {
        "accuracy": ["method", *psnr, "published", *(f"to limit {s}" for s in sources)],
        "distributions": ["method", *distances],
        "calibration and cost": ["method", *costs],
    }
    rows = {
        "accuracy": lambda m: _accuracy(problem, m, sources, bounded, bool(whole), entries),
        "distributions": lambda m: _distributions(problem, m, entries),
        "calibration and cost": lambda m: _cost(problem, m, entries),
    }
    return [(f"{problem}: {k}", heads[k], [rows[k](m) for m in methods]) for k in heads]


def _within(row: Found) -> float | None:
    """PSNR of a draw that was moved within the bounds of its source."""
    return row.get("within", {}).get("psnr")


def _accuracy(
    problem: str,
    method: str,
    sources: Sequence[str],
    bounded: Sequence[str],
    whole: bool,
    entries: Sequence[Found],
) -> list[str]:
    mine, limit = of(entries, problem, method), of(entries, problem, LIMIT)
    psnr = lambda r: r["psnr"]
    return [
        method,
        *(cell(values(mine, psnr, s)) for s in sources),
        *([cell(values(mine, psnr))] if whole else []),
        *(cell(values(mine, _within, s)) for s in bounded),
        _published(problem, method, 0),
        *(cell(gap(mine, limit, [s]), "{:.1f}") for s in sources),
    ]


def _published(problem: str, method: str, which: int) -> str:
    same = (
        "ddprism" if method in ("dichroic", "mixture") else method
    )  # what it is to be held against
    numbers = PUBLISHED.get(problem, {}).get(same)
    return "–" if numbers is None or numbers[which] is None else f"{numbers[which]:g}"


def _distributions(problem: str, method: str, entries: Sequence[Found]) -> list[str]:
    mine = of(entries, problem, method)
    near = lambda which, what: values(mine, lambda r: r.get(which, {}).get(what))
    frechet = [cell(near(which, "frechet")) for which in ("posterior", "prior")]
    return [
        method,
        cell(near("posterior", "sinkhorn"), "{:.3f}"),
        _published(problem, method, 1),
        cell(near("prior", "sinkhorn"), "{:.3f}"),
        _published(problem, method, 2),
        cell(near("posterior", "pqmass")),
        cell(near("prior", "pqmass")),
        *(frechet if _has_features(problem, entries) else []),
    ]


def _has_features(problem: str, entries: Sequence[Found]) -> bool:
    """Whether there is a Fréchet distance of features, see `datasets.digit_features`."""
    rows = [r for e in entries if e["problem"] == problem for r in e.get("scores", [])]
    return any("frechet" in r.get("posterior", {}) for r in rows)


def _cost(problem: str, method: str, entries: Sequence[Found]) -> list[str]:
    mine = of(entries, problem, method)
    each = lambda name: np.array([e[name] for e in mine if e.get(name) is not None])
    fit, per_draw = each("fit_seconds"), each("seconds_per_draw")
    limit = of(entries, problem, LIMIT)
    p = [v for e in mine for r in e["scores"] if (v := r.get("ranks_p")) is not None]
    return [
        method,
        cell(evidence_gap(mine, limit), "{:.3f}"),
        cell(100 * values(mine, lambda r: r.get("coverage")), "{:.1f}"),
        f"{np.median(p):.2g}" if p else "–",
        cell(each("chi2"), "{:.3f}"),
        duration(float(fit.mean())) if len(fit) else "–",
        f"{1e6 * per_draw.mean():.0f}" if len(per_draw) else "–",
        f"{each('peak_memory_mib').mean():.0f}" if mine else "–",
        _failures(problem, method, entries) or "–",
    ]


def _failures(problem: str, method: str, entries: Sequence[Found]) -> str:
    """The seeds that failed; the reasons stand below the tables."""
    same = [e for e in entries if (e["problem"], e["method"]) == (problem, method)]
    return ", ".join(f"seed {e['seed']}" for e in same if "error" in e)


def footer(entries: Sequence[Found], command: str) -> str:
    """What the numbers are of, and what they were measured on."""
    done = [e for e in entries if "scores" in e]
    failed = [
        f"{e['problem']}, {e['method']}, seed {e['seed']} failed: {shorten(e['error'], 400)}"
        for e in entries
        if "error" in e
    ]
    if not done:
        return "\n".join([*failed, "Nothing is finished yet."])
    first, last = done[0]["settings"], done[-1]
    m = last["machine"]
    seeds = ", ".join(str(s) for s in dict.fromkeys(e["seed"] for e in done))
    lines = [
        *failed,
        f"{first['count']:,} observations of each view to learn from; {first['held_out']:,} held-out ones "
        f"scored, {first['draws']} draws of each; seeds {seeds}. PSNR in dB of one draw; to limit: by how "
        "much a draw from the exact posterior is better on the same observations (the first ones), and by "
        "how many nats their log evidence is higher with the true priors (–: no closed form). Published: of "
        "the same method in the paper, for dichroic and mixture that of ddprism. Within bounds: draws of all "
        "methods moved to the nearest values that the source can have. "
        f"Distances of {first['points']:,} points; of two samples of one distribution PQMass is 1.",
        f"{m['cores']} cores ({m['device']}), jax {m['jax']}, dichroic {m['dichroic']}, {last['date']}. "
        "Times contain compilation; µs per draw: separation, per held-out observation and draw, after it.",
    ]
    return "\n".join(lines + ([f"Command: {command}"] if command else []))


def _markdown(tables: Sequence[Table]) -> str:
    parts = []
    for title, head, rows in tables:
        line = lambda cells: "| " + " | ".join(cells) + " |"
        body = [line(head), line(["---"] * len(head)), *map(line, rows)]
        parts.append(f"## {title}\n\n" + "\n".join(body) + "\n")
    return "\n".join(parts)


def _page(tables: Sequence[Table], foot: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    body = f'<figure><img alt="PSNR by method" src="data:image/png;base64,{data}"></figure>\n'
    body += "".join(section(title, table(head, rows)) for title, head, rows in tables)
    return document("Methods compared", body + f"<p><small>{esc(foot)}</small></p>\n")


def figure(problems: Sequence[str], entries: Sequence[Found]) -> bytes:
    """PSNR of every method: a point per seed and source; the limit and the published number as lines."""
    fig = new_figure(7.5, 1.0 + 1.9 * len(problems))
    axes = fig.subplots(len(problems), 1, squeeze=False)[:, 0]
    for axis, problem in zip(axes, problems, strict=True):
        _panel(axis, problem, entries)
    return png(fig)


def _panel(axis: Any, problem: str, entries: Sequence[Found]) -> None:
    methods = [m for m in dict.fromkeys(e["method"] for e in entries) if of(entries, problem, m)]
    sources = sorted(
        {r["source"] for m in methods for e in of(entries, problem, m) for r in e["scores"]}
    )
    for i, source in enumerate(sources):
        for row, method in enumerate(methods):
            x = values(of(entries, problem, method), lambda r: r["psnr"], source)
            at = row + 0.12 * (i - (len(sources) - 1) / 2)
            first = source if row == 0 else None
            axis.plot(x, np.full(len(x), at), "o", ms=5, color=colour(i), alpha=0.8, label=first)
    best = PUBLISHED.get(problem, {}).get("ddprism")
    if best:
        axis.axvline(best.psnr, color="grey", ls=":", lw=1, label="published")
    axis.set_yticks(range(len(methods)), methods)
    axis.invert_yaxis()
    tidy(axis, "PSNR in dB, one posterior draw", title=problem)
    if methods:
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
