"""How well entries left out of held-out observations are predicted: a table, and residuals by entry."""

from dichroic.diagnostics import plots
from dichroic.diagnostics.report.html import esc, table
from dichroic.diagnostics.report.page import Page
from dichroic.learning.predictive.result import HEADER, Prediction

ABOUT = (
    "Entries left out of held-out observations, predicted from the entries that remain, by the fitted priors and "
    "by a linear filter of the same training observations. Scores are in units of the noise: log scores in nats "
    "per entry, −1.42 where all but white noise is predicted, and root mean square errors, 1 there. The gain "
    "is in nats per entry, or without a log score (of networks) a part of the filter's mean square error; below "
    "0 the linear filter is better. Correlations are those of residuals beyond what the model knows: 0 within "
    "their errors for a right model."
)
BY_ENTRY = (
    "{}: normal scores of left-out entries over observations. For a right model their mean is 0 and their root "
    "mean square 1; red: beyond chance."
)
NUMBERS = 12  # of observations that are named


def predictive(page: Page) -> str:
    """The section, of the checks of the page."""
    views = page.checks.views
    rows = [v.row for v in views if not v.skipped]
    text = f"<p>{esc(ABOUT)}</p>\n" + (table(HEADER, rows) if rows else "")
    return text + "".join(_view(page, v) for v in views)


def _view(page: Page, prediction: Prediction) -> str:
    found, name = prediction.residuals, prediction.view
    if found is None:
        return f"<p>{esc(name)}: not checked: {esc(prediction.skipped)}.</p>\n"
    caption = BY_ENTRY.format(name)
    text = page.figure(f"residuals-{name}", plots.residuals(found), caption)
    if len(found.far):
        more = " …" if len(found.far) > NUMBERS else ""
        numbers = ", ".join(str(i) for i in found.far[:NUMBERS]) + more
        what = f"{name}: held-out observations far from all predictions (counted from 0): {numbers}"
        text += f"<p>{esc(what)}.</p>\n"
    return text
