"""One self-contained HTML page that says what a fit learned, and how far to believe it.

Held-out observations, those that `dichroic.em.prepare` keeps from training, are separated anew;
every number and figure but the learning curves, priors and timings comes from these draws. Figures
are embedded, so that the page can be sent as one file, and also written to `figures/`.
"""

import base64
import html
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dichroic import plot
from dichroic.config import FitConfig, settings
from dichroic.denoise import Denoiser, Mixture, Preconditioned
from dichroic.errors import RunError
from dichroic.io import write_atomic
from dichroic.metrics import coverage, psnr, rank_histogram
from dichroic.problem import Problem, View, holdout, joint_observations, sees
from dichroic.separator import Separation, Separator
from dichroic.statement import summary_rows

CHI2_RANGE = (0.8, 1.25)  # beyond it, a warning
COVERAGE_SLACK = 0.05
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PRIOR_DRAWS = {"image": 24, "lines": 8, "points": 1000}

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --dim: #5c5c5c; --page: #fff; --card: #f5f5f3;
  --rule: #d5d5d0; --note: #9a4a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --dim: #a8a8a4; --page: #161616;
  --card: #222; --rule: #444; --note: #ffb366; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.4rem;
  border-bottom: 1px solid var(--rule); } h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0.8rem; }
.card { background: var(--card); border-top: 4px solid var(--rule); border-radius: 4px;
  padding: 0.6rem 0.9rem; break-inside: avoid; } .card h3 { margin-top: 0; }
.card p { margin: 0.2rem 0; } .big { font-size: 1.35rem; font-weight: 650; }
.scroll { overflow-x: auto; } small, figcaption { color: var(--dim); font-size: 0.85rem; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0; }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; } td.n { font-variant-numeric: tabular-nums; text-align: right; }
tr.ours { font-weight: 650; } figure { margin: 0.8rem 0; break-inside: avoid; }
.row { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: flex-start; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.warning { border-left: 4px solid var(--note); padding-left: 0.8rem; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } }
"""


@dataclass(frozen=True)
class Held:
    """Held-out observations of one view, or of co-observed ones, and their separation."""

    name: str
    views: list[View]
    result: Separation
    truth: dict[str, np.ndarray]
    fresh: bool  # not used in training


@dataclass(frozen=True)
class Score:
    """How well one source is recovered from one (joint) view whose truth is known."""

    source: str
    view: str
    psnr: float
    psnr_draw: float
    coverage: float
    error: float


@dataclass
class Page:
    """What is being reported, and the figures written so far."""

    folder: Path
    problem: Problem
    separator: Separator
    metrics: list[dict[str, Any]]
    held: list[Held]
    seconds: float
    scores: list[Score] = field(default_factory=list)
    files: set[str] = field(default_factory=set)

    def figure(self, name: str, figure: Any, caption: str) -> str:
        """Write a figure to `figures/`, and the HTML that embeds it; `caption` is plain text."""
        stem = re.sub(r"[^\w-]+", "_", name)
        while stem in self.files:
            stem += "-2"
        self.files.add(stem)
        data = plot.png(figure)
        write_atomic(self.folder / "figures" / f"{stem}.png", data)
        source = "data:image/png;base64," + base64.b64encode(data).decode()
        width = round(figure.get_figwidth() * 96)
        text = _esc(caption)
        image = f'<img src="{source}" alt="{text}" width="{width}">'
        return f"<figure>{image}<figcaption>{text}</figcaption></figure>\n"

    def number(self, source: str) -> int:
        """The position of a source, which chooses its colour."""
        return self.problem.names.index(source)


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
        metrics: one mapping per lap, as in `metrics.jsonl`.
        n_draws: posterior draws of each held-out observation.
        max_observations: held-out observations separated, at most, of each view.
        warnings: sentences to show among the page's own warnings.
        baselines: PSNR in dB by answer and source, to be compared in a table; ours first.
    """
    if separator.problem is None:
        raise RunError(
            "a report needs the problem that was fitted: Separator.load(…, problem=problem)"
        )
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    held = _separate_held_out(separator, separator.problem, n_draws, max_observations)
    seconds = time.perf_counter() - began
    rows = [dict(row) for row in metrics]
    page = Page(folder, separator.problem, separator, rows, held, seconds)
    page.scores = [_score(h, k) for k in page.problem.names for h in held if k in h.truth]
    notes = [*warnings, *_own_warnings(page)]
    title = title or f"Separation of {', '.join(page.problem.names)}"
    sections = [
        (
            "Result",
            _cards(page) + _count_warnings(notes) + _baselines(page, baselines or {}),
        ),
        ("What was observed", _observed(page)),
        ("Separated sources", "".join(_separated(page, k) for k in page.problem.names)),
        ("Learned priors", _priors(page)),
        ("Learning", _learning(page)),
        ("Data fit", _data_fit(page)),
        ("Calibration", _calibration(page)),
        ("Timings", _timings(page)),
        ("Which prior was kept", _kept(page)),
        ("Warnings", "".join(f'<p class="warning">{_esc(n)}</p>' for n in notes) or "<p>None.</p>"),
        ("Configuration", _configuration(separator.config)),
    ]
    body = "".join(_section(name, content) for name, content in sections)
    write_atomic(folder / "report.html", _document(title, body).encode())
    return folder / "report.html"


def _document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_esc(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_esc(title)}</h1>\n{body}</body>\n</html>\n"
    )


def _section(name: str, content: str) -> str:
    anchor = name.lower().replace(" ", "-")
    return f'<section id="{anchor}">\n<h2>{_esc(name)}</h2>\n{content}</section>\n'


def _esc(text: Any) -> str:
    return html.escape(str(text))


def _table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], *, first_ours: bool = False
) -> str:
    """An HTML table of plain cells; numbers, and text that starts with a digit, to the right."""
    head = "".join(f"<th>{_esc(h)}</th>" for h in header)
    lines = []
    for i, row in enumerate(rows):
        cells = [
            f'<td class="n">{_esc(c)}</td>'
            if re.match(r"^[-−+]?\d[\d.,]*(e[-+]\d+)?%?( |$)", str(c))
            else f"<td>{_esc(c)}</td>"
            for c in row
        ]
        ours = ' class="ours"' if first_ours and i == 0 else ""
        lines.append(f"<tr{ours}>{''.join(cells)}</tr>\n")
    return f'<div class="scroll"><table><tr>{head}</tr>\n{"".join(lines)}</table></div>\n'


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else f"{minutes} min {rest} s"


# Held-out draws and scores


def _separate_held_out(
    separator: Separator, problem: Problem, n_draws: int, most: int
) -> list[Held]:
    out = []
    for i, views in enumerate(problem.joint_views()):
        train, test = holdout(views, separator.config.holdout, separator.config.seed + i)
        chosen = test if test[0].count else train
        some = [v.select(slice(0, most)) for v in chosen]
        truth = {
            k: np.asarray(x)
            for v in some
            for k, x in v.truth.items()
            if k in problem.names and np.all(np.isfinite(x))
        }
        result = separator.separate(some, n_draws=n_draws, seed=separator.config.seed + i)
        truth = {k: x for k, x in truth.items() if k in result.draws}
        name = "+".join(v.name for v in views)
        out.append(Held(name, some, result, truth, chosen is test))
    return out


def _score(held: Held, source: str) -> Score:
    draws, truth = held.result.draws[source], held.truth[source]
    span = float(np.ptp(truth)) or 1.0
    mean, one = (psnr(x, truth, data_range=span) for x in (draws.mean(axis=0), draws[0]))
    inside = coverage(draws, truth, level=0.9)
    return Score(source, held.name, mean, one, inside.value, inside.standard_error)


def _own_warnings(page: Page) -> list[str]:
    out = []
    for h in page.held:
        chi2, low, high = float(np.mean(h.result.chi2)), *CHI2_RANGE
        if not h.fresh:
            out.append(
                f"{h.name}: too few observations to hold any out; scores are of training data."
            )
        if not low <= chi2 <= high:
            out.append(f"{h.name}: χ² per entry is {chi2:.2f}, not 1. " + _chi2_meaning(chi2))
        solved = float(np.mean(h.result.converged))
        if solved < 1:
            worst = float(np.max(h.result.residual))
            out.append(
                f"{h.name}: {100 * (1 - solved):.2g}% of the linear solves did not converge (worst "
                f"relative residual {worst:.2g}); draws may be inexact."
            )
    for s in page.scores:
        if abs(s.coverage - 0.9) > COVERAGE_SLACK:
            narrow = s.coverage < 0.9
            out.append(
                f"{s.source} in {s.view}: 90% intervals hold {100 * s.coverage:.1f}% of the truth "
                f"(standard error {100 * s.error:.1f}); draws are "
                + ("too narrow or biased." if narrow else "too wide.")
            )
    return out


def _chi2_meaning(chi2: float) -> str:
    if chi2 > 1:
        return (
            "Draws miss the data by more than the stated noise: the noise is understated, an "
            "operator is wrong, the prior is too narrow, or the sampler takes too few steps."
        )
    if chi2 < 1:
        return (
            "Draws follow the data more closely than the stated noise allows: the noise is "
            "overstated, or the learned prior is too wide."
        )
    return "It is not a number."


# Sections


def _cards(page: Page) -> str:
    cards = [_source_card(page, name) for name in page.problem.names]
    chi2 = "".join(
        f'<p><span class="big" data-number="{_esc(f"chi2 {h.name}")}">'
        f"{np.mean(h.result.chi2):.3f}</span> "
        f"{_esc(h.name)}</p>"
        for h in page.held
    )
    cards.append(f'<div class="card"><h3>χ² per entry (1 is ideal)</h3>{chi2}</div>')
    last = page.metrics[-1].get("seconds") if page.metrics else None
    took = "not recorded" if last is None else _duration(last)
    laps = f"<p>{len(page.metrics)} laps</p>"
    time_card = f'<p class="big" data-number="seconds">{took}</p>{laps}'
    cards.append(f'<div class="card"><h3>Time of the fit</h3>{time_card}</div>')
    return f'<div class="cards">{"".join(cards)}</div>\n<p><small>{_cards_note(page)}</small></p>\n'


def _source_card(page: Page, name: str) -> str:
    lines = []
    for s in page.scores:
        if s.source == name:
            where = _esc(f"{name} {s.view}")
            lines.append(
                f'<p class="big"><span data-number="psnr {where}">{s.psnr:.2f}</span> dB '
                f"<small>in {_esc(s.view)}</small></p><p>90% intervals hold "
                f'<b data-number="coverage {where}">{100 * s.coverage:.1f}%</b> of the truth; '
                f"one draw {s.psnr_draw:.2f} dB</p>"
            )
    text = "".join(lines) or "<p>No truth is known: it cannot be scored.</p>"
    tint = plot.colour(page.number(name))
    return f'<div class="card" style="border-color: {tint}"><h3>{_esc(name)}</h3>{text}</div>'


def _cards_note(page: Page) -> str:
    counts = ", ".join(f"{_esc(h.name)} {h.result.chi2.shape[1]}" for h in page.held)
    draws = len(page.held[0].result.chi2)
    text = f"From {draws} posterior draws of each held-out observation ({counts})."
    if page.scores:
        text += (
            " PSNR is of the posterior mean, relative to the range of the true values shown here."
        )
    return text


def _count_warnings(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    count = "1 warning" if len(notes) == 1 else f"{len(notes)} warnings"
    return f'<p class="warning"><a href="#warnings">{count}</a></p>\n'


def _baselines(page: Page, scores: Mapping[str, Mapping[str, float]]) -> str:
    if not scores:
        return ""
    number = lambda x: "–" if x is None else f"{x:.2f}"
    rows = [[name, *(number(by.get(k)) for k in page.problem.names)] for name, by in scores.items()]
    note = (
        "<p><small>PSNR in dB, as given to the report; perhaps of other observations.</small></p>\n"
    )
    return _table(["PSNR in dB", *page.problem.names], rows, first_ours=True) + note


def _observed(page: Page) -> str:
    header, *rows = summary_rows(page.problem)[1]
    parts = [_table([str(h) for h in header], rows)]
    for h in page.held:
        for view in h.views:
            caption = (
                f"{view.name}: held-out observations, {_what_shown(view.shape, 'observation')}."
            )
            figure = plot.observed(_visible(view))
            parts.append(page.figure(f"observed-{view.name}", figure, caption))
    return "".join(parts)


def _what_shown(shape: Sequence[int], what: str) -> str:
    form = plot.kind(shape)
    if form == "image":
        sliced = " (first slice along the shortest axis)" if len(shape) == 3 else ""
        return f"each an image{sliced}"
    return "each a line" if form == "lines" else f"each {what} a point"


def _visible(view: View) -> np.ndarray:
    """The observations, NaN where they are missing."""
    seen = np.asarray(joint_observations([view]).noise.observed(int(np.prod(view.shape))))
    seen = seen.reshape(-1, *view.shape) > 0
    return np.where(seen, np.asarray(view.observations, float), np.nan)


def _separated(page: Page, source: str) -> str:
    parts = [f"<h3>{_esc(source)}</h3>\n"]
    for h in page.held:
        if source not in h.result.draws:
            continue
        seen = [v for v in h.views if sees(v, source) and plot.kind(v.shape) == "image"]
        figures = plot.separated(
            h.result.draws[source],
            h.truth.get(source),
            _visible(seen[0]) if seen else None,
            plot.colour(page.number(source)),
        )
        drawn = [
            page.figure(
                f"separated-{source}-{h.name}-{what}",
                figure,
                f"{source} in {h.name}: {SHOWN[what]}",
            )
            for what, figure in figures.items()
        ]
        parts.append(f'<div class="row">{"".join(drawn)}</div>\n')
    return "".join(parts)


SHOWN = {
    "images": "a held-out observation per row; truth, mean and draws share a scale; grey: missing.",
    "lines": "posterior mean and 5% to 95% band of held-out observations.",
    "pairs": "one posterior draw of each held-out observation, by pairs of entries.",
    "truth-vs-draw": "one draw of each held-out observation; perfect recovery lies on the line.",
}


def _priors(page: Page) -> str:
    parts = []
    for name, shape in page.problem.shapes.items():
        x = page.separator.sample_prior(name, PRIOR_DRAWS[plot.kind(shape)])
        known = [h.truth[name] for h in page.held if name in h.truth]
        truth = np.concatenate(known) if known else None
        figure = plot.several(x, truth, plot.colour(page.number(name)), what="prior samples")
        behind = " Grey: true values." if known and plot.kind(shape) == "points" else ""
        caption = f"{name}: samples of the learned prior, {_what_shown(shape, 'sample')}.{behind}"
        parts.append(f"<h3>{_esc(name)}</h3>\n" + page.figure(f"prior-{name}", figure, caption))
    return "".join(parts)


def _learning(page: Page) -> str:
    figure = plot.learning(page.metrics, page.problem.names, [h.name for h in page.held])
    if figure is None:
        return "<p>No metrics of the laps were given.</p>"
    return page.figure("learning", figure, LEARNING)


LEARNING = (
    "Higher is better, but for the loss. The bound of the diffusion laps is lower than the "
    "log evidence and is comparable among these laps only. PSNR is never used in the fit."
)


def _data_fit(page: Page) -> str:
    text = (
        "<p>χ² is the squared residual of a posterior draw in units of the stated noise, per "
        "observed entry: its mean is 1 for a correct model, above 1 if draws miss the data by more "
        "than the noise, and below 1 if they follow the noise.</p>\n"
    )
    rows = []
    for h in page.held:
        chi2, entries = h.result.chi2, _visible_entries(h)
        error = float(chi2.mean(axis=0).std()) / np.sqrt(chi2.shape[1])
        rows.append([h.name, f"{chi2.mean():.3f}", f"{error:.3f}", f"{np.median(chi2):.3f}"])
        ideal = " The curve is its distribution for a correct model." if entries else ""
        text += page.figure(f"chi2-{h.name}", plot.data_fit(chi2, entries), f"{h.name}.{ideal}")
    return text + _table(["view", "mean χ² per entry", "standard error", "median"], rows)


def _visible_entries(held: Held) -> int | None:
    """The number of observed entries, if it is the same for all observations."""
    counts = sum(np.isfinite(_visible(v)).reshape(v.count, -1).sum(axis=1) for v in held.views)
    values = np.unique(counts)
    return int(values[0]) if len(values) == 1 else None


def _calibration(page: Page) -> str:
    if not page.scores:
        return "<p>No truth is known, so calibration cannot be measured.</p>"
    curves, ranks, rows = {}, {}, []
    held = {h.name: (j, h) for j, h in enumerate(page.held)}
    for s in page.scores:
        j, h = held[s.view]
        draws, truth = h.result.draws[s.source], h.truth[s.source]
        key = (page.number(s.source), f"{s.source}, {s.view}", j)
        found = [coverage(draws, truth, level=level) for level in LEVELS]
        columns = ([c.value for c in found], [c.standard_error for c in found])
        curves[key] = tuple(np.array(x) for x in (LEVELS, *columns))
        ranked = rank_histogram(draws, truth, bins=min(10, len(draws) + 1))
        ranks[key] = ranked
        inside = (f"{100 * s.coverage:.1f}%", f"{100 * s.error:.1f}", f"{ranked.p_value:.2g}")
        rows.append([s.source, s.view, *inside])
    figure = page.figure("calibration", plot.calibration(curves, ranks), CALIBRATED)
    header = [
        "source",
        "view",
        "coverage of 90% intervals",
        "standard error",
        "flat ranks, p-value",
    ]
    return figure + _table(header, rows)


CALIBRATED = (
    "Calibrated draws follow the diagonal (error bars: two standard errors) and have flat rank "
    "histograms (grey band: two standard errors). Ranks piled up at both ends mean draws too "
    "narrow, in the middle too wide, at one end biased."
)


def _timings(page: Page) -> str:
    phases: dict[str, list[float]] = {}
    before = 0.0
    for row in page.metrics:
        now = row.get("seconds") or before
        phases.setdefault(str(row.get("phase", "")), []).append(now - before)
        before = now
    rows = [[name, len(laps), _duration(sum(laps))] for name, laps in phases.items()]
    rows.append(["total of the fit", len(page.metrics), _duration(before)])
    rows.append(["separation for this page", "", _duration(page.seconds)])
    return _table(["phase", "laps", "time"], rows) + "<p><small>Compilation included.</small></p>\n"


def _kept(page: Page) -> str:
    rows = [[name, _describe(d)] for name, d in page.separator.denoisers.items()]
    return _table(["source", "prior"], rows) + f"<p>{_esc(_verdict(page.metrics))}</p>\n"


def _describe(denoiser: Denoiser) -> str:
    if isinstance(denoiser, Mixture):
        size = denoiser.log_weights.size
        return f"mixture of {size} Gaussians" if size > 1 else "one Gaussian"
    if isinstance(denoiser, Preconditioned):
        return f"diffusion model: a network that corrects a {_describe(denoiser.base)}"
    return f"a denoiser of type {type(denoiser).__name__}"


def _verdict(metrics: Sequence[Mapping[str, Any]]) -> str:
    bounds = [m["evidence_bound"] for m in metrics if m.get("evidence_bound") is not None]
    if not bounds:
        return "No diffusion lap was run: the priors are those of the closed-form start."
    start, later = bounds[0], bounds[1:]
    if not later:
        return f"The mixtures have a held-out bound of {start:.4g}; no diffusion lap has ended yet."
    laps = "the diffusion lap" if len(later) == 1 else f"the best of {len(later)} diffusion laps"
    numbers = f"{start:.4f} nats per observation with the mixtures, {max(later):.4f} after {laps}"
    if max(later) > start:
        return f"Diffusion improved the held-out evidence bound: {numbers}. The networks are kept."
    return (
        f"Diffusion did not improve the held-out evidence bound: {numbers}. The mixtures are kept."
    )


def _configuration(config: FitConfig) -> str:
    rows = []
    for name, (_, default) in settings().items():
        value: Any = config.to_dict()
        for part in name.split("."):
            value = value[part]
        rows.append([name, json.dumps(value), "" if value == default else json.dumps(default)])
    table = _table(["setting", "value", "default, if different"], rows)
    return f"<details><summary>All settings of the fit</summary>\n{table}</details>\n"
