"""One piece of work, in any number of processes and on any number of devices."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from dichroic.errors import ConfigError, RunError
from dichroic.learning.checkpoint import load_state
from dichroic.runtime import distributed

WORKER = Path(__file__).parent / "distributed_worker.py"
LAYOUTS = {"one": (1, 1), "devices": (1, 8), "both": (2, 2)}
FIT = {
    "mixture": {
        "components": 2,
        "steps": 3,
        "iterations": 3,
        "final_iterations": 3,
        "gaussian_iterations": 3,
    },
    "joint_iterations": 2,
    "diffusion": {"iterations": 0},
}


def start(words, processes=1, devices=1, **more):
    """The processes that share the work of `words`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        distributed.ADDRESS: f"127.0.0.1:{port}",
        distributed.PROCESSES: str(processes),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**base, distributed.NUMBER: str(i)} | {k: v[i] for k, v in more.items()},
            **pipes,
        )
        for i in range(processes)
    ]


def ended(processes, timeout=240):
    """`(status, output, errors)` of each."""
    return [(*p.communicate(timeout=timeout)[::-1], p.returncode)[::-1] for p in processes]


def test_draws_are_the_same_bits_and_parameters_equal_to_rounding_in_every_layout(tmp_path):
    found = {}
    for name, (processes, devices) in LAYOUTS.items():
        out = tmp_path / f"{name}.npz"
        for status, _, errors in ended(start([WORKER, out], processes, devices)):
            assert status == 0, errors
        with np.load(out) as archive:
            found[name] = dict(archive)
        assert list(found[name].pop("layout")) == [processes, processes * devices]
    one = found.pop("one")
    keys = [k for k in one if k.startswith(("exact/", "walk/"))]
    assert len(keys) == 4
    for other in found.values():
        for key in keys:
            assert one[key].std() > 0.1
            np.testing.assert_array_equal(other[key], one[key])
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-4)
        np.testing.assert_allclose(other["network"], one["network"], atol=1e-3)
        for source in ("line", "ring", "sky", "star"):
            scale = np.abs(one[f"covariance/{source}"]).max()
            for key in (f"mean/{source}", f"covariance/{source}"):
                np.testing.assert_allclose(other[key], one[key], atol=1e-3 * scale)


@pytest.fixture(scope="module")
def stated(tmp_path_factory):
    """A problem file, and its fit by one process."""
    folder, rng = tmp_path_factory.mktemp("stated"), np.random.default_rng(1)
    a = rng.normal(size=(60, 2, 3))
    x = np.outer(rng.normal(size=60), [1, 2, -1]) + 0.5
    y = np.einsum("nij,nj->ni", a, x) + 0.1 * rng.normal(size=(60, 2))
    np.savez(folder / "data.npz", y=y, a=a)
    view = {"observations": "data.npz:y", "noise": 0.1, "operators": {"x": {"dense": "data.npz:a"}}}
    table = {"sources": {"x": [3]}, "views": {"v": view}, "fit": FIT}
    (folder / "problem.yaml").write_text(yaml.safe_dump(table))
    table["fit"] = {**FIT, "seed": 1}
    (folder / "other.yaml").write_text(yaml.safe_dump(table))
    assert [e[0] for e in ended(start(words(folder, "whole")))] == [0]
    return folder


def words(folder, out, *more, file="problem.yaml"):
    return [
        "-m",
        "dichroic",
        "fit",
        folder / file,
        "--out",
        folder / out,
        "--no-report",
        *more,
    ]


def iterations(run):
    try:
        return len((run / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def killed_after(processes, run, count, which):
    """Kill processes once `count` iterations are on the disk."""
    until = time.monotonic() + 120
    while iterations(run) < count and time.monotonic() < until:
        assert all(p.poll() is None for p in processes), ended(processes)
        time.sleep(0.005)
    for i in which:
        processes[i].send_signal(signal.SIGKILL)


def assert_same_fit(one, other):
    a, b = (load_state(run / "latest.safetensors") for run in (one, other))
    assert (a.total, a.phase, b.phase) == (b.total, "done", "done")
    got, want = (np.asarray(s.best["x"].covariances()) for s in (b, a))
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_a_fit_goes_on_in_another_layout(stated):
    two = start(words(stated, "moved"), processes=2)
    killed_after(two, stated / "moved", 1, which=(0, 1))
    ended(two)
    assert 1 <= iterations(stated / "moved") < iterations(stated / "whole")
    again = words(stated, "moved", "--resume")
    for status, _, errors in ended(start(again, devices=2)):
        assert status == 0, errors
    assert_same_fit(stated / "whole", stated / "moved")
    events = map(json.loads, (stated / "moved" / "log.jsonl").read_text().splitlines())
    assert [e["processes"] for e in events if e["event"] == "fitting"] == [2, 1]


def test_processes_share_the_blocks_of_observations_in_files(stated):
    for status, _, errors in ended(start(words(stated, "files", "--memory", "2GiB"), processes=2)):
        assert status == 0, errors
    assert_same_fit(stated / "whole", stated / "files")


def test_the_loss_of_a_process_ends_the_others_and_no_finished_iteration_is_lost(stated):
    two = start(words(stated, "lost"), processes=2)
    killed_after(two, stated / "lost", 1, which=[1])
    first, second = ended(two)
    assert first[0] == 2
    assert first[2].splitlines()[-1].startswith("error: another process is lost")
    assert "Traceback" not in first[2]
    assert second[0] == -signal.SIGKILL
    for status, _, errors in ended(start(words(stated, "lost", "--resume"), processes=2)):
        assert status == 0, errors
    assert_same_fit(stated / "whole", stated / "lost")


def test_what_the_first_process_cannot_do_is_said_by_all(stated):
    for status, _, errors in ended(start(words(stated, "whole"), processes=2)):
        assert status == 2
        assert "already holds a run" in errors


def test_processes_must_be_given_the_same(stated):
    separate = start(
        [
            "-c",
            f"""
import os, sys
from dichroic.cli.main import main
name = ["problem", "other"][int(os.environ["{distributed.NUMBER}"])] + ".yaml"
sys.exit(main(["fit", "{stated}/" + name, "--out", "{stated}/differ", "--no-report"]))
""",
        ],
        processes=2,
    )
    for status, _, errors in ended(separate):
        assert status == 2
        assert "different problems or settings" in errors
    assert not (stated / "differ").exists()


@pytest.mark.parametrize(
    "given",
    [
        {distributed.PROCESSES: "2"},
        {distributed.ADDRESS: "here:1", distributed.PROCESSES: "two", distributed.NUMBER: "0"},
        {distributed.ADDRESS: "here:1", distributed.PROCESSES: "2", distributed.NUMBER: "2"},
        {distributed.PROCESSES: "2", distributed.NUMBER: "0"},
    ],
)
def test_processes_that_make_no_sense_are_refused(monkeypatch, given):
    for name in (distributed.ADDRESS, distributed.PROCESSES, distributed.NUMBER):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=distributed.NUMBER):
        distributed.initialize()


def test_sums_and_rows_of_one_process_are_its_own():
    x = np.arange(6.0).reshape(2, 3)
    assert distributed.all_reduce_sum({"a": x, "b": 2})["b"] == 2
    assert distributed.all_gather(x, axis=1) is x
    assert distributed.local_span(7) == (0, 7)
    assert distributed.all_gather_bytes(b"x") == [b"x"]
    assert distributed.run_on_all(lambda: 3) == 3
    with pytest.raises(RunError, match="no"):
        distributed.broadcast_from_primary(lambda: (_ for _ in ()).throw(RunError("no")))
