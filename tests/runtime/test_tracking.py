"""The metrics file through kills and resumes, and what the console shows."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.runtime.tracking import Console, MetricsFile, Silent, Tracker, read_metrics

LAP = {"iteration": 3, "phase": "mixture", "sources": "a+b", "components": 4, "seconds": 1.25}


def test_iterations_come_back_in_order(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    rows = [{"iteration": i, "score": i / 7, "what": "ü"} for i in range(5)]
    for row in rows:
        file.append(row)
    assert read_metrics(tmp_path / "m.jsonl") == rows
    assert file.length == (tmp_path / "m.jsonl").stat().st_size


def test_a_resumed_run_forgets_the_iterations_after_its_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path)
    file.append({"iteration": 1})
    known = file.length
    file.append({"iteration": 2})
    file.append({"iteration": 3})
    resumed = MetricsFile(path, length=known)
    assert read_metrics(path) == [{"iteration": 1}]
    resumed.append({"iteration": 2, "again": True})
    assert read_metrics(path) == [{"iteration": 1}, {"iteration": 2, "again": True}]
    assert resumed.length == path.stat().st_size
    MetricsFile(path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "found", [None, "", '{"iteration": 1}\n', '{"iteration": 1}\n{"iteration"']
)
def test_a_file_shorter_than_its_checkpoint_goes_on_after_its_last_line(found, tmp_path):
    path = tmp_path / "m.jsonl"
    if found is not None:
        path.write_text(found)
    file = MetricsFile(path, length=1000)
    file.append({"iteration": 9})
    assert read_metrics(path) == [{"iteration": 1}] * bool(found) + [{"iteration": 9}]
    assert file.length == path.stat().st_size


@pytest.mark.parametrize(
    "torn", ['{"iteration": 3, "sco', '{"iteration": 3, "a": "', "{", '{"iteration": 3}x']
)
def test_a_torn_last_line_is_left_out(torn, tmp_path):
    path = tmp_path / "m.jsonl"
    MetricsFile(path).append({"iteration": 1})
    with open(path, "a") as f:
        f.write('{"iteration": 2}\n' + torn)
    assert read_metrics(path) == [{"iteration": 1}, {"iteration": 2}]


def test_numbers_of_any_kind_become_plain_json(tmp_path):
    """NaN and infinities are no JSON; they become null."""
    path = tmp_path / "m.jsonl"
    MetricsFile(path).append(
        {
            "nan": float("nan"),
            "inf": -np.inf,
            "numpy": np.float32(0.5),
            "int": np.int64(7),
            "jax": jnp.asarray(2.5),
            "jax nan": jnp.asarray(np.nan),
            "array": np.array(1.5),
            "bool": np.True_,
            "none": None,
        }
    )
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {
        "nan": None,
        "inf": None,
        "numpy": 0.5,
        "int": 7,
        "jax": 2.5,
        "jax nan": None,
        "array": 1.5,
        "bool": True,
        "none": None,
    }


@pytest.mark.parametrize("tracker", [Silent(), Console()])
def test_trackers_follow_the_protocol(tracker):
    assert isinstance(tracker, Tracker)
    assert not isinstance(object(), Tracker)


def test_the_console_prints_one_line_per_scored_iteration(capsys):
    console = Console()
    console.progress("a: 4 components", 1, 12)
    console.iteration({**LAP, "log_evidence": -3.0})
    console.progress("a: 4 components", 12, 12)
    console.iteration({**LAP, "log_evidence": -2.5, "heldout_log_evidence": -2.71828})
    console.iteration(
        {
            "phase": "diffusion",
            "sources": "a",
            "evidence_gain_a": -1.5,
            "loss_a": 0.25,
            "seconds": 9.0,
        }
    )
    console.iteration({"phase": "diffusion", "sources": "a", "loss_a": 0.5, "seconds": 10.0})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "[   1.2 s] mixture a+b × 4: log_evidence -2.5  heldout_log_evidence -2.718",
        "[   9.0 s] diffusion a: evidence_gain_a -1.5  loss_a 0.25",
    ]


def test_the_console_says_the_rank_of_large_sources(capsys):
    Console().iteration({**LAP, "rank": 16, "heldout_log_evidence": 1.5})
    assert "mixture a+b × 4, rank 16: heldout_log_evidence 1.5" in capsys.readouterr().err


def test_silence_is_silent(capsys):
    silent = Silent()
    silent.progress("a", 1, 2)
    silent.iteration({**LAP, "heldout_log_evidence": -1.0})
    assert capsys.readouterr() == ("", "")
