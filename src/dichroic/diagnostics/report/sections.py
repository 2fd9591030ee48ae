"""The sections of the page below its head, each a function of the page to HTML."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import sem

from dichroic.config import FitConfig, settings
from dichroic.diagnostics import plots
from dichroic.diagnostics.report.html import esc, table
from dichroic.diagnostics.report.page import Page
from dichroic.diagnostics.report.predictive import predictive
from dichroic.diagnostics.report.scores import Held
from dichroic.diagnostics.report.timings import timings
from dichroic.io import summary_rows
from dichroic.learning.diffusion.score_matching import is_gain
from dichroic.metrics import coverage, informed_chi2, mean_chi2, rank_histogram
from dichroic.operators.learnable import parameters
from dichroic.operators.scaling import without_scaling
from dichroic.priors import Denoiser, DiffusionPrior, GaussianMixture
from dichroic.problem.view import View
from dichroic.problem.view_validation import sees

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PRIOR_DRAWS = {"image": 24, "lines": 8, "points": 1000}

SHOWN = {
    "images": "a held-out observation per row; truth, mean and draws share a scale; grey: missing.",
    "lines": "posterior mean and 5% to 95% band of held-out observations.",
    "pairs": "one posterior draw of each held-out observation, by pairs of entries.",
    "truth-vs-draw": "one draw of each held-out observation; perfect recovery lies on the line.",
}

LEARNING = (
    "Higher is better, but for the loss. The bound of the diffusion iterations is lower than the "
    "log evidence and is comparable among these iterations only. PSNR is never used in the fit."
)

CALIBRATED = (
    "Calibrated draws follow the diagonal (error bars: two standard errors) and have flat rank "
    "histograms (grey band: two standard errors). Ranks piled up at both ends mean draws too "
    "narrow, in the middle too wide, at one end biased."
)


def all_sections(page: Page, notes: Sequence[str]) -> list[tuple[str, str]]:
    """`(name, HTML)` of every section; `notes` are the warnings, as plain text."""
    warnings = "".join(f'<p class="warning">{esc(n)}</p>' for n in notes)
    learned = (
        [("Learned operators", _operators(page))]
        if without_scaling(page.separator.operators)
        else []
    )
    return [
        ("What was observed", _observed(page)),
        ("Separated sources", "".join(_separated(page, k) for k in page.problem.names)),
        ("Learned priors", _priors(page)),
        *learned,
        ("Learning", _learning(page)),
        ("Data fit", _data_fit(page)),
        ("Predictive checks", predictive(page)),
        ("Calibration", _calibration(page)),
        ("Timings", timings(page.metrics, page.seconds)),
        ("Which prior was kept", _kept(page)),
        ("Warnings", warnings or "<p>None.</p>"),
        ("Configuration", _configuration(page.separator.config)),
    ]


def _observed(page: Page) -> str:
    header, *rows = summary_rows(page.problem)[1]
    parts = [table([str(h) for h in header], rows)]
    for h in page.held:
        for view in h.views:
            caption = (
                f"{view.name}: held-out observations, {_what_shown(view.shape, 'observation')}."
            )
            figure = plots.observed(_visible(view))
            parts.append(page.figure(f"observed-{view.name}", figure, caption))
    return "".join(parts)


def _what_shown(shape: Sequence[int], what: str) -> str:
    form = plots.kind(shape)
    if form == "image":
        part = plots.shown(shape)
        return f"each an image ({part})" if part else "each an image"
    return "each a line" if form == "lines" else f"each {what} a point"


def _visible(view: View) -> np.ndarray:
    """The observations, NaN where they are missing."""
    return np.where(view.observed(), np.asarray(view.observations, float), np.nan)


def _separated(page: Page, source: str) -> str:
    parts = [f"<h3>{esc(source)}</h3>\n"]
    for h in page.held:
        if source not in h.result.draws:
            continue
        seen = [v for v in h.views if sees(v, source) and plots.kind(v.shape) == "image"]
        figures = plots.separated(
            h.result.draws[source],
            h.truth.get(source),
            _visible(seen[0]) if seen else None,
            plots.colour(page.number(source)),
        )
        shown = _parts_shown(h.result.draws[source].shape[2:], seen[0].shape if seen else ())
        drawn = [
            page.figure(
                f"separated-{source}-{h.name}-{what}",
                figure,
                f"{source} in {h.name}: {SHOWN[what]}{shown if what == 'images' else ''}",
            )
            for what, figure in figures.items()
        ]
        parts.append(f'<div class="row">{"".join(drawn)}</div>\n')
    return "".join(parts)


def _parts_shown(source: Sequence[int], view: Sequence[int]) -> str:
    """Sentences on what is shown of images of a source and of the view beside it, where that is not all."""
    own, seen = plots.shown(source), plots.shown(view)
    spread = " with a scale per row (std. dev.: mean over 3 channels)" if own == "RGB" else ""
    said = (
        [("Source", own + spread), ("Observation", seen)]
        if own != seen
        else [("Shown", own + spread)]
    )
    return "".join(f" {what}: {part}." for what, part in said if part)


def _operators(page: Page) -> str:
    """What was learned of operators; of arrays, the root mean square of the change."""
    start = parameters([v.operators for v in page.problem.views])
    rows = []
    for name, arrays in without_scaling(page.separator.operators).items():
        old, new = (np.concatenate([np.ravel(a) for a in x]) for x in (start[name], arrays))
        errors = [e for m in page.metrics if (e := m.get(f"operator_error_{name}")) is not None]
        if len(new) == 1:
            error = f"{errors[-1]:.2g}" if errors else "–"
            rows.append([name, f"{old[0]:.5g}", f"{new[0]:.5g}", error])
        else:
            size = " + ".join(" × ".join(map(str, np.shape(a))) for a in arrays)
            moved = f"{np.sqrt(np.mean((new - old) ** 2)):.3g} (rms change)"
            rows.append([name, size, moved, "–"])
    note = "<p>The error is that of the priors as they are learned: their uncertainty is not in it.</p>"
    return table(["name", "start", "learned", "standard error"], rows) + note


def _priors(page: Page) -> str:
    parts = []
    for name, shape in page.problem.shapes.items():
        x = page.separator.sample_prior(name, PRIOR_DRAWS[plots.kind(shape)])
        known = [h.truth[name] for h in page.held if name in h.truth]
        truth = np.concatenate(known) if known else None
        figure = plots.several(x, truth, plots.colour(page.number(name)), what="prior samples")
        behind = " Grey: true values." if known and plots.kind(shape) == "points" else ""
        caption = f"{name}: samples of the learned prior, {_what_shown(shape, 'sample')}.{behind}"
        parts.append(f"<h3>{esc(name)}</h3>\n" + page.figure(f"prior-{name}", figure, caption))
    return "".join(parts)


def _learning(page: Page) -> str:
    figure = plots.learning(page.metrics, page.problem.names, [h.name for h in page.held])
    if figure is None:
        return "<p>No metrics of the iterations were given.</p>"
    return page.figure("learning", figure, LEARNING)


def _data_fit(page: Page) -> str:
    text = (
        "<p>χ² is the squared residual of a posterior draw in units of the stated noise, per "
        "observed entry: its mean is 1 for a correct model, above 1 if draws miss the data by more "
        "than the noise, and below 1 if they follow the noise.</p>\n"
    )
    rows = []
    for h in page.held:
        chi2, entries = informed_chi2(h.result.chi2), _visible_entries(h)
        error = f"{sem(chi2.mean(axis=0)):.3f}" if chi2.shape[1] > 1 else "–"
        median = np.median(chi2) if chi2.size else np.nan
        rows.append([h.name, f"{mean_chi2(chi2):.3f}", error, f"{median:.3f}"])
        ideal = " The curve is its distribution for a correct model." if entries else ""
        text += page.figure(f"chi2-{h.name}", plots.data_fit(chi2, entries), f"{h.name}.{ideal}")
    return text + table(["view", "mean χ² per entry", "standard error", "median"], rows)


def _visible_entries(held: Held) -> int | None:
    """The number of observed entries, if it is the same for all observations of which there are any."""
    counts = np.sum(
        [np.isfinite(_visible(v)).reshape(v.count, -1).sum(axis=1) for v in held.views], axis=0
    )
    values = np.unique(counts[counts > 0])
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
    figure = page.figure("calibration", plots.calibration(curves, ranks), CALIBRATED)
    header = [
        "source",
        "view",
        "coverage of 90% intervals",
        "standard error",
        "flat ranks, p-value",
    ]
    return figure + table(header, rows)


def _kept(page: Page) -> str:
    rows = [[name, _describe(d)] for name, d in page.separator.denoisers.items()]
    return table(["source", "prior"], rows) + f"<p>{esc(_verdict(page.metrics))}</p>\n"


def _describe(denoiser: Denoiser) -> str:
    if isinstance(denoiser, GaussianMixture):
        size = denoiser.log_weights.size
        return f"mixture of {size} Gaussians" if size > 1 else "one Gaussian"
    if isinstance(denoiser, DiffusionPrior):
        return f"diffusion model: a network that corrects a {_describe(denoiser.base)}"
    return f"a denoiser of type {type(denoiser).__name__}"


def _verdict(metrics: Sequence[Mapping[str, Any]]) -> str:
    iterations = [m for m in metrics if m.get("phase") == "diffusion"]
    sources = sorted({name for m in iterations for name in str(m.get("sources", "")).split("+")})
    said = [line for name in sources if (line := _gains(name, iterations))]
    if not said:
        return "No diffusion iteration was run: the priors are those of the closed-form start."
    return (
        "A diffusion iteration is kept where it raises the evidence of held-out observations by more than "
        "two standard errors. " + " ".join(said)
    )


def _gains(name: str, iterations: Sequence[Mapping[str, Any]]) -> str:
    """What the iterations gained for one source."""
    pair = lambda m: (m.get(f"evidence_gain_{name}"), m.get(f"evidence_gain_error_{name}"))
    found = [
        (gain, error)
        for gain, error in map(pair, iterations)
        if gain is not None and error is not None
    ]
    kept = [gain for gain, error in found if is_gain(gain, error)]
    if kept:
        count = f"{len(kept)} of {len(found)} iterations" if len(found) > 1 else "the iteration"
        return f"{name}: improved by at least {sum(kept):.3f} nats per draw in {count}; the network is kept."
    if not found:
        return ""
    best, error = max(found)
    return (
        f"{name}: not improved ({best:.3f} ± {error:.3f} nats at best); the mixture is kept: a network "
        "trained on its own posterior draws finds nothing that it cannot express."
    )


def _configuration(config: FitConfig) -> str:
    rows = []
    for name, (_, default) in settings().items():
        value: Any = config.to_dict()
        for part in name.split("."):
            value = value[part]
        rows.append([name, json.dumps(value), "" if value == default else json.dumps(default)])
    listed = table(["setting", "value", "default, if different"], rows)
    return f"<details><summary>All settings of the fit</summary>\n{listed}</details>\n"
