"""The report is one well-formed, self-contained page whose numbers are those of the draws."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.diagnostics import plots
from dichroic.diagnostics.report import write_report
from dichroic.diagnostics.report.html import duration
from dichroic.diagnostics.report.page import Page
from dichroic.diagnostics.report.scores import Held, own_warnings
from dichroic.diagnostics.report.sections import (
    _data_fit,
    _parts_shown,
    _visible_entries,
    _what_shown,
)
from dichroic.diagnostics.report.timings import timings
from dichroic.errors import RunError
from dichroic.learning.predictive.result import PredictiveChecks
from dichroic.metrics import coverage, psnr
from dichroic.operators import Identity
from dichroic.problem.problem import Problem, Source
from dichroic.problem.splits import holdout
from dichroic.problem.view import View
from dichroic.separation.result import Separation
from dichroic.separation.separator import Separator

SETTINGS = {
    "joint_iterations": 0,
    "mixture": {"components": 2, "gaussian_iterations": 3, "iterations": 2, "final_iterations": 2},
    "diffusion": {"iterations": 0},
}
SECTIONS = [
    "Result",
    "What was observed",
    "Separated sources",
    "Learned priors",
    "Learning",
    "Data fit",
    "Predictive checks",
    "Calibration",
    "Timings",
    "Which prior was kept",
    "Warnings",
    "Configuration",
]
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects headings, numbers, links and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.numbers, self.links, self.text = [], [], {}, [], []
        self.key = None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.key = attrs.get("data-number")
        self.links += [attrs[k] for k in ("href", "src") if k in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.key:
            self.numbers[self.key] = data
            self.key = None
        self.text.append(data)


def image_problem(rng, count=120):
    a = rng.normal(size=(count, 1, 1)) * np.ones((4, 4)) + 0.1 * rng.normal(size=(count, 4, 4))
    b = rng.normal(size=(count, 1, 1)) * np.eye(4) + 0.1 * rng.normal(size=(count, 4, 4))
    eye, noise = Identity((4, 4)), lambda: 0.1 * rng.normal(size=(count, 4, 4))
    seen = rng.uniform(size=(count, 4, 4)) > 0.1
    views = [
        View(a[::-1] + noise(), {"flat<sky>": eye}, 0.1, "sky & dome", mask=seen),
        View(a + b + noise(), {"flat<sky>": eye, "_b$": eye}, 0.1, "both/all", truth={"_b$": b}),
    ]
    return Problem([Source("flat<sky>", (4, 4)), Source("_b$", (4, 4))], views)


@pytest.fixture(scope="module", params=["points", "images"])
def reported(request, tmp_path_factory):
    rng = np.random.default_rng(0)
    make = {
        "points": lambda: manifold_problem(seed=0, count=120, dim=3, obs=2),
        "images": lambda: image_problem(rng),
    }
    separator = Separator(make[request.param](), SETTINGS).fit(progress=False)
    folder = tmp_path_factory.mktemp("run")
    names = separator.problem.names
    page = write_report(
        folder,
        separator=separator,
        metrics=separator.metrics,
        n_draws=8,
        max_observations=10,
        title="A <title> & more",
        warnings=["mind the <gap>"],
        baselines={"ours": dict.fromkeys(names, 31.234), "least <squares>": {names[0]: 12.3}},
    )
    return separator, page, Reader(page.read_text())


def test_the_page_is_well_formed_and_has_every_section(reported):
    _, _, reader = reported
    assert reader.headings == SECTIONS
    text = "".join(reader.text)
    for words in (
        "A <title> & more",
        "mind the <gap>",
        "least <squares>",
        "31.23",
        "No diffusion iteration",
    ):
        assert words in text


def test_the_page_is_self_contained(reported):
    _, page, reader = reported
    text = page.read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    anchors = [link for link in reader.links if link.startswith("#")]
    assert all(f'id="{link[1:]}"' in text for link in anchors)
    images = [link for link in reader.links if not link.startswith("#")]
    assert all(link.startswith("data:image/png;base64,") for link in images)
    assert len(images) == len(list((page.parent / "figures").glob("*.png")))


def test_the_numbers_of_the_cards_are_those_of_the_draws(reported):
    separator, _, reader = reported
    expected = {}
    for i, views in enumerate(separator.problem.joint_views()):
        held = [v.select(slice(0, 10)) for v in holdout(views, 0.1, i)[1]]
        result = separator.separate(held, n_draws=8, seed=i)
        name = held[0].name
        expected[f"chi2 {name}"] = f"{result.chi2.mean():.3f}"
        for source, truth in held[0].truth.items():
            score = psnr(result.mean[source], truth, data_range=float(np.ptp(truth)))
            expected[f"psnr {source} {name}"] = f"{score:.2f}"
            inside = coverage(result.draws[source], truth, level=0.9).value
            expected[f"coverage {source} {name}"] = f"{100 * inside:.1f}%"
    assert {k: v for k, v in reader.numbers.items() if k != "seconds"} == expected
    assert reader.numbers["seconds"] == duration(separator.metrics[-1]["seconds"])


def test_predictive_checks_are_in_the_page_with_their_warnings(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(600, 1)) + 0.5 * rng.normal(size=(600, 6))
    view = View(y, {"x": Identity((6,))}, 3.0, "<v>")
    separator = Separator(Problem([Source("x", (6,))], [view]), SETTINGS).fit(progress=False)
    page = write_report(tmp_path, separator=separator, metrics=separator.metrics, n_draws=2)
    text, checks = "".join(Reader(page.read_text()).text), separator.predictive_checks()
    (prediction,) = checks.views
    for cell in prediction.row:
        assert cell in text
    (sentence,) = checks.warnings
    assert text.count(sentence) == 1
    assert (tmp_path / "figures" / "residuals-_v_.png").exists()


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([], "No diffusion iteration was run"),
        ([(0.5, 0.1)], "x: improved by at least 0.500 nats per draw in the iteration; the network"),
        (
            [(0.5, 0.1), (0.25, 0.1), (0.1, 0.1)],
            "x: improved by at least 0.750 nats per draw in 2 of 3",
        ),
        ([(-0.2, 0.1), (0.1, 0.08)], "x: not improved (0.100 ± 0.080 nats at best)"),
    ],
)
def test_the_verdict_says_what_diffusion_gained(gains, words):
    from dichroic.diagnostics.report.sections import _verdict

    iteration = lambda g, e: {
        "phase": "diffusion",
        "sources": "x",
        "evidence_gain_x": g,
        "evidence_gain_error_x": e,
    }
    assert words in _verdict([{"phase": "mixture"}, *(iteration(*pair) for pair in gains)])


def held(chi2):
    """A view of which `chi2` `(n_draws, n)` is known, and little else."""
    views = [View(np.ones((chi2.shape[1], 2)), {"x": Identity(2)}, 0.1, "v")]
    result = Separation({}, chi2, np.zeros_like(chi2), np.ones_like(chi2), np.zeros_like(chi2))
    return Held("v", views, result, {}, True)


@pytest.mark.parametrize(
    ("chi2", "row"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], ["v", "2.500", "0.500", "2.500"]),
        ([[1.0], [3.0]], ["v", "2.000", "–", "2.000"]),
        ([[np.nan, np.inf], [1.0, np.inf]], ["v", "nan", "nan", "nan"]),
        ([[1.0, np.nan, 2.0], [3.0, np.nan, 4.0]], ["v", "2.500", "0.500", "2.500"]),
        ([[np.nan, np.nan]], ["v", "nan", "–", "nan"]),
    ],
)
def test_the_standard_error_of_the_data_fit_is_that_of_a_sample(tmp_path, chi2, row):
    (tmp_path / "figures").mkdir()
    page = Page(tmp_path, None, None, [], [held(np.array(chi2))], 0.0, [], PredictiveChecks(()))
    cells = [text for text in Reader(_data_fit(page)).text if text.strip()]
    assert cells[-4:] == row


def test_observations_that_are_missing_altogether_are_no_reason_to_warn():
    ideal, empty = np.ones((2, 3)), np.full((2, 3), np.nan)
    assert own_warnings([held(np.hstack([ideal, empty]))], []) == []
    (warning,) = own_warnings([held(empty)], [])
    assert "nothing was observed" in warning


def test_the_entries_of_an_observation_are_of_those_that_have_some():
    seen = np.array([[True, False], [False, False], [False, True]])
    view = View(np.ones((3, 2)), {"x": Identity(2)}, 0.1, "v", mask=seen)
    assert _visible_entries(replace(held(np.ones((1, 3))), views=[view])) == 1


def pictures(figure):
    """What each axis of a figure shows, but its colour bars."""
    return [np.ma.filled(a.images[0].get_array(), np.nan) for a in figure.axes if a.images]


def test_three_channels_are_shown_as_rgb_with_one_scale_for_a_row(rng):
    red = np.array([1.0, 0.5, 0.0])[:, None, None] * np.ones((3, 8, 9))
    truth = np.stack([red, 100 * red])  # a faint image and a bright one: two rows
    seen = truth.copy()
    seen[0, :2, 0, 0] = np.nan  # missing in some channels: dark there
    seen[1, :, 0, 0] = np.nan  # in all: grey
    draws = truth + 1e-3 * rng.normal(size=(4, 2, 3, 8, 9))
    (figure,) = plots.separated(draws, truth, seen, plots.colour(0)).values()
    found = pictures(figure)
    assert len(found) == 2 * 7  # observation, truth, mean, three draws, standard deviation
    shown = found[:7], found[7:]
    for row in shown:
        assert {x.shape for x in row[:6]} == {(8, 9, 3)}
        for x in row[:6]:
            assert 0 <= x.min() <= x.max() <= 1
            np.testing.assert_allclose(x[4, 4], [1, 0.5, 0], atol=0.01)
        assert row[6].shape == (8, 9)
    np.testing.assert_array_equal(shown[0][0][0, 0], [0, 0, 0])
    assert len(set(shown[1][0][0, 0])) == 1
    assert 0.8 < shown[1][0][0, 0, 0] < 1


@pytest.mark.parametrize("scale", [0.003, 0.05, 0.5, 7.0, 1e5])
def test_numbers_at_colour_bars_do_not_touch(rng, scale):
    x = scale * rng.uniform(-0.9, 1.0, size=(4, 2, 9, 9))
    (figure,) = plots.separated(x, x[0], x[0], plots.colour(0)).values()
    FigureCanvasAgg(figure).draw()
    bars = [a for a in figure.axes if not a.images]
    assert len(bars) == 3
    for bar in bars:
        low, high = bar.get_xlim()
        ticks = [t for t in bar.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
        spans = sorted(tuple(t.label1.get_window_extent().intervalx) for t in ticks)
        assert len(spans) > 1
        gaps = [right[0] - left[1] for left, right in zip(spans, spans[1:])]
        assert min(gaps) > 4


@pytest.mark.parametrize("channels", [2, 5])
def test_other_channels_are_shown_as_their_mean(rng, channels):
    x = rng.normal(size=(3, channels, 8, 9))
    x[0, 0, 1, 1], x[0, :, 2, 2] = np.nan, np.nan
    first, *_ = pictures(plots.several(x, None, plots.colour(0), what="samples"))
    expected = x[0].mean(axis=0)
    expected[1, 1] = x[0, 1:, 1, 1].mean()
    np.testing.assert_allclose(first, expected)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 9), "each an image"),
        ((1, 8, 9), "each an image"),
        ((3, 8, 9), "each an image (RGB)"),
        ((5, 8, 9), "each an image (mean over 5 channels)"),
        ((8, 3, 9), "each an image (first slice along the shortest axis)"),
        ((4, 4, 4), "each an image (first slice along the shortest axis)"),
    ],
)
def test_captions_say_what_is_shown_of_an_image(shape, words):
    assert _what_shown(shape, "sample") == words
    assert all(
        x.ndim == 2 + (shape[0] == 3) for x in pictures(plots.observed(np.ones((2, *shape))))
    )


def test_captions_of_separated_images_say_so_too():
    spread = "std. dev.: mean over 3 channels"
    assert _parts_shown((8, 9), (8, 9)) == ""
    assert _parts_shown((3, 8, 9), (3, 8, 9)) == f" Shown: RGB with a scale per row ({spread})."
    assert _parts_shown((3, 8, 9), ()) == f" Source: RGB with a scale per row ({spread})."
    both = _parts_shown((5, 8, 9), (3, 8, 9))
    assert both == " Source: mean over 5 channels. Observation: RGB."


def test_a_report_needs_the_problem(tmp_path):
    with pytest.raises(RunError, match="needs the problem"):
        write_report(tmp_path, separator=Separator(), metrics=[])


def test_timings_say_where_the_time_went_and_the_memory():
    rows = [
        {"phase": "mixture", "seconds": 2.0, "seconds_e_step": 1.25, "peak_memory_mib": 512.0},
        {"phase": "mixture", "seconds": 5.0, "seconds_e_step": 1.5, "seconds_m_step": 0.5},
        {
            "phase": "diffusion<",
            "seconds": 205.0,
            "seconds_scoring": 150.0,
            "peak_memory_mib": 1536.0,
        },
    ]
    cells = [t for t in Reader(timings(rows, 3.0)).text if t.strip()]
    assert cells[7:14] == ["mixture", "2", "5.0 s", "2.8 s", "0.5 s", "–", "0.50 GiB"]
    assert cells[14:21] == ["diffusion<", "1", "3 min 20 s", "–", "–", "2 min 30 s", "1.50 GiB"]
    assert cells[21:28] == [
        *("total of the fit", "3", "3 min 25 s", "2.8 s", "0.5 s", "2 min 30 s", "1.50 GiB"),
    ]
    assert cells[28:30] == ["separation for this page", "3.0 s"]
