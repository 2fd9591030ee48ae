"""Warnings reach everybody: as Python warnings at the user's line, in the log, once each, and as lines of commands."""

import json
import logging
import warnings

import numpy as np
import pytest
import yaml

from dichroic import DichroicWarning, Identity, Problem, Separator, Source, View, identifiability
from dichroic.benchmark.baselines import ClvmLinear
from dichroic.cli.main import main
from dichroic.runtime.tracking import quiet, warn

SHORT = {
    "mixture": {"components": 1, "gaussian_iterations": 1, "iterations": 1, "final_iterations": 1},
    "joint_iterations": 0,
    "diffusion": {"iterations": 0},
}


def observations(n=30):
    return np.random.default_rng(0).normal(size=(n, 2))


def confused():
    """Two sources that enter the only view alike, seen 30 times."""
    both = {"a": Identity((2,)), "b": Identity((2,))}
    view = View(observations(), both, 0.1, name="only")
    return Problem([Source("a", (2,)), Source("b", (2,))], [view])


def texts(caught):
    return [str(w.message) for w in caught if w.category is DichroicWarning]


def test_identifiability_warns_at_the_line_of_the_user():
    with pytest.warns(DichroicWarning, match="only their sum can be learned") as caught:
        result = identifiability(confused())
    assert texts(caught) == list(result.warnings)
    assert {w.filename for w in caught} == {__file__}


def test_a_fit_warns_once_of_each_in_python_and_in_the_log(tmp_path):
    separator = Separator(confused(), SHORT)
    with pytest.warns(DichroicWarning) as caught:
        separator.fit(tmp_path / "run", progress=False)
    assert {w.filename for w in caught} == {__file__}
    assert texts(caught) == list(separator.advice)
    assert any("only their sum" in text for text in texts(caught))
    events = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    logged = [e["event"] for e in events if e["level"] == "warning"]
    assert logged == list(separator.advice)


def test_a_fit_that_goes_on_does_not_warn_again(tmp_path):
    Separator(confused(), SHORT).fit(tmp_path / "run", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Separator(confused(), SHORT).fit(tmp_path / "run", progress=False, resume=True)


def test_a_baseline_warns_too():
    with pytest.warns(DichroicWarning, match="only their sum") as caught:
        ClvmLinear(confused(), rank=1).fit(progress=False)
    assert {w.filename for w in caught} == {__file__}


def test_a_warning_is_a_record_for_those_who_listen(caplog):
    with pytest.warns(DichroicWarning, match="mind the gap"):
        warn("mind the gap", where=3)
    (record,) = caplog.records
    assert (record.name, record.levelno, record.fields) == (
        "dichroic",
        logging.WARNING,
        {"where": 3},
    )


def test_other_processes_than_the_first_are_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            warn("mind the gap")
        with pytest.raises(DichroicWarning), quiet(when=False):
            warn("mind the gap")


def test_a_command_prints_each_warning_once_as_a_line(tmp_path, capsys):
    np.save(tmp_path / "y.npy", observations())
    both = {"a": "identity", "b": "identity"}
    view = {"observations": "y.npy", "operators": both, "noise": 0.1}
    stated = {"sources": {"a": {"shape": [2]}, "b": {"shape": [2]}}, "views": {"only": view}}
    stated["fit"] = SHORT
    (tmp_path / "problem.yaml").write_text(yaml.safe_dump(stated))
    words = ["fit", str(tmp_path / "problem.yaml"), "--out", str(tmp_path / "run"), "--no-report"]
    assert main(words) == 0
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
    assert sum("only their sum can be learned" in x for x in lines) == 1
    assert len(set(lines)) == len(lines)
    assert main([*words, "--resume"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["check", str(tmp_path / "problem.yaml")]) == 0
    assert capsys.readouterr().out.count("only their sum can be learned") == 1
