"""Trackers of others, each against its own library, offline; and what a fit tells any tracker."""

import importlib.util
import json
import logging

import numpy as np
import pytest

from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.cli.main import main
from dichroic.errors import ConfigError
from dichroic.runtime.tracking import Several, as_tracker, event, logged, parse_tracker
from dichroic.runtime.tracking.adapters import MLflow, TensorBoard, WandB, flat, numbers
from dichroic.separation.separator import Separator

TINY = {
    "joint_iterations": 0,
    "mixture": {"components": 1, "gaussian_iterations": 3},
    "diffusion": {"iterations": 0},
}
ROWS = [
    {"iteration": i, "phase": "mixture", "sources": "a", "log_evidence": i / 4, "psnr_a_v": None}
    for i in (1, 2, 3)
]
ABOUT = {"config": {"seed": 1, "mixture": {"components": 4}}, "views": [{"name": "v"}]}


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def followed(tracker):
    tracker.start(ABOUT)
    for row in ROWS:
        tracker.progress("a", 1, 2)
        tracker.iteration(row)
    tracker.close()


@needs("tensorboard")
def test_tensorboard_reads_back_what_was_measured(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    followed(TensorBoard(str(tmp_path / "tb")))
    found = EventAccumulator(str(tmp_path / "tb"))
    found.Reload()
    assert found.Tags()["tensors"] == ["mixture/log_evidence"]
    events = found.Tensors("mixture/log_evidence")
    assert [e.step for e in events] == [1, 2, 3]
    assert [e.tensor_proto.float_val[0] for e in events] == [0.25, 0.5, 0.75]


@needs("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_an_offline_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    followed(WandB("separation"))
    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    kept = run.read_bytes()
    for text in (b"separation", b"config.mixture.components", b"mixture/log_evidence", b"0.75"):
        assert text in kept


@needs("mlflow")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file:{}/mlruns"])
def test_mlflow_reads_back_what_was_measured(tmp_path, monkeypatch, store):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = store.format(tmp_path)
    if uri.startswith("sqlite"):
        pytest.importorskip("sqlalchemy", reason="the package mlflow-skinny has no databases")
    followed(MLflow(uri))
    followed(MLflow(uri))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("dichroic").experiment_id
    runs = client.search_runs([experiment])
    assert len(runs) == 2
    history = client.get_metric_history(runs[0].info.run_id, "mixture/log_evidence")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert runs[0].data.params["config.mixture.components"] == "4"
    assert runs[0].info.status == "FINISHED"


@needs("mlflow")
def test_a_store_that_mlflow_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"MLflow cannot keep runs at 'nosuch://x'"):
        MLflow("nosuch://x")


@needs("tensorboard")
def test_the_command_line_tracks(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    np.save(tmp_path / "y.npy", np.random.default_rng(0).normal(size=(40, 3)))
    (tmp_path / "p.yaml").write_text(
        "sources: {a: [3]}\nviews: {v: {observations: y.npy, operators: {a: identity}, noise: 0.1}}\n"
        f"fit: {json.dumps(TINY)}\n"
    )
    command = ["fit", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "run"), "--no-report"]
    assert main([*command, "--track", f"tensorboard:{tmp_path / 'tb'}"]) == 0
    found = EventAccumulator(str(tmp_path / "tb"))
    found.Reload()
    assert len(found.Tensors("mixture/log_evidence")) == 3
    assert main([*command, "--track", "tensorbord:x"]) == 2
    assert (
        "--track: unknown key 'tensorbord'; did you mean 'tensorboard'?" in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_names_the_extra(kind):
    if importlib.util.find_spec(kind) is not None:
        pytest.skip(f"{kind} is installed")
    with pytest.raises(ConfigError, match=rf"needs the package {kind}: pip install 'dichroic"):
        parse_tracker(f"{kind}:x")


@pytest.mark.parametrize("text", ["", "wandbx:y", "file.json", ":x"])
def test_unknown_trackers_are_refused(text):
    with pytest.raises(ConfigError, match="--track"):
        parse_tracker(text)


class Follower:
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def start(self, about):
        self.told.append(("start", about["config"]["seed"]))

    def iteration(self, metrics):
        self.told.append(("iteration", metrics["iteration"]))

    def progress(self, what, done, total):
        self.told.append(("progress", done, total))

    def close(self):
        self.told.append(("close",))


class Least:
    """Has what a tracker must have, and no more."""

    iterations = 0

    def iteration(self, metrics):
        self.iterations += 1

    def progress(self, what, done, total):
        pass


def test_several_trackers_follow_one_fit():
    follower, least = Follower(), Least()
    problem = manifold_problem(seed=1, count=60)
    separator = Separator(problem, {"seed": 3, **TINY}).fit(progress=[False, follower, least])
    iterations = [("iteration", i + 1) for i in range(len(separator.metrics))]
    assert [t for t in follower.told if t[0] == "iteration"] == iterations
    assert follower.told[0] == ("start", 3)
    assert follower.told[-1] == ("close",)
    assert least.iterations == len(iterations)
    assert isinstance(as_tracker([True, least]), Several)


def test_a_tracker_is_closed_when_the_fit_fails():
    class Failing(Follower):
        def iteration(self, metrics):
            raise RuntimeError("no more")

    failing = Failing()
    with pytest.raises(RuntimeError, match="no more"):
        Separator(manifold_problem(seed=1, count=60), TINY).fit(progress=failing)
    assert failing.told[-1] == ("close",)


def test_numbers_and_settings_are_flat():
    row = {
        "iteration": 3,
        "phase": "refinement",
        "sources": "a+b",
        "x": 2,
        "nan": np.nan,
        "flag": True,
    }
    assert numbers(row) == {"refinement/x": 2.0}
    assert dict(flat({"a": {"b": {"c": 1}}, "d": [2]})) == {"a.b.c": 1, "d": [2]}


def test_iterations_say_where_their_time_went():
    problem = manifold_problem(seed=1, count=60)
    rows = Separator(problem, TINY).fit(progress=False).metrics
    for row, before in zip(rows, [0, *(r["seconds"] for r in rows)], strict=False):
        parts = [row[f"seconds_{p}"] for p in ("e_step", "m_step")] + [
            row.get("seconds_scoring", 0)
        ]
        assert all(p >= 0 for p in parts)
        assert 0 < sum(parts) <= row["seconds"] - before + 0.01
        assert row["peak_memory_mib"] > 50
    assert sum("seconds_scoring" in row for row in rows) == 2  # the last iteration of each source


def test_events_are_json_lines(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    with pytest.raises(KeyError), logged(path):
        event("begun", iterations=3)
        logging.getLogger("dichroic.elsewhere").warning("mind %s", "this")
        raise KeyError("x")
    event("not recorded any more")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["level"], r["event"]) for r in rows] == [
        ("info", "begun"),
        ("warning", "mind this"),
        ("info", "ended early"),
    ]
    assert rows[0]["iterations"] == 3
    assert rows[2]["error"] == "KeyError: 'x'"
    assert all(r["time"].endswith("+00:00") for r in rows)
