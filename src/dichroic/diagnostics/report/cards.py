"""The head of the page: scores on cards, the number of warnings, other answers to compare with."""

from collections.abc import Mapping, Sequence

from dichroic.diagnostics import plots
from dichroic.diagnostics.report.html import duration, esc, table
from dichroic.diagnostics.report.page import Page
from dichroic.metrics import mean_chi2


def head(page: Page, notes: Sequence[str], baselines: Mapping[str, Mapping[str, float]]) -> str:
    """Cards, a link to the warnings `notes`, and a table of `baselines`, if there are any."""
    return _cards(page) + _count_warnings(notes) + _baselines(page, baselines)


def _cards(page: Page) -> str:
    cards = [_source_card(page, name) for name in page.problem.names]
    chi2 = "".join(
        f'<p><span class="big" data-number="{esc(f"chi2 {h.name}")}">'
        f"{mean_chi2(h.result.chi2):.3f}</span> "
        f"{esc(h.name)}</p>"
        for h in page.held
    )
    cards.append(f'<div class="card"><h3>χ² per entry (1 is ideal)</h3>{chi2}</div>')
    last = page.metrics[-1].get("seconds") if page.metrics else None
    took = "not recorded" if last is None else duration(last)
    iterations = f"<p>{len(page.metrics)} iterations</p>"
    time_card = f'<p class="big" data-number="seconds">{took}</p>{iterations}'
    cards.append(f'<div class="card"><h3>Time of the fit</h3>{time_card}</div>')
    return f'<div class="cards">{"".join(cards)}</div>\n<p><small>{_cards_note(page)}</small></p>\n'


def _source_card(page: Page, name: str) -> str:
    lines = []
    for s in page.scores:
        if s.source == name:
            where = esc(f"{name} {s.view}")
            lines.append(
                f'<p class="big"><span data-number="psnr {where}">{s.psnr:.2f}</span> dB '
                f"<small>in {esc(s.view)}</small></p><p>90% intervals hold "
                f'<b data-number="coverage {where}">{100 * s.coverage:.1f}%</b> of the truth; '
                f"one draw {s.psnr_draw:.2f} dB</p>"
            )
    text = "".join(lines) or "<p>No truth is known: it cannot be scored.</p>"
    tint = plots.colour(page.number(name))
    return f'<div class="card" style="border-color: {tint}"><h3>{esc(name)}</h3>{text}</div>'


def _cards_note(page: Page) -> str:
    counts = ", ".join(f"{esc(h.name)} {h.result.chi2.shape[1]}" for h in page.held)
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
    return table(["PSNR in dB", *page.problem.names], rows, first_ours=True) + note
