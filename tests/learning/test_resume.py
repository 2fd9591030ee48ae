"""Runs that are damaged, killed between two writes, shared or out of room: a clear error, or the same result."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from followers import KillAt, Killed

from dichroic.errors import FormatError, RunError, VersionError
from dichroic.io.model_files import load_model, pack, read_tensors, write_tensors
from dichroic.learning import fit as runs
from dichroic.learning.checkpoint import load_state, save_state
from dichroic.learning.state import State
from dichroic.operators import Dense, Identity
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View
from dichroic.runtime.files import locked
from dichroic.runtime.records import read_record, write_record
from dichroic.runtime.tracking import read_metrics
from dichroic.separation.separator import Separator

SMALL = {
    "joint_iterations": 2,
    "mixture": {"components": 1, "gaussian_iterations": 4},
    "diffusion": {"iterations": 0},
}
STATES = ("latest.safetensors", "previous.safetensors")


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 60, 3)) * [1, 0.5, 0.2]
    noise = lambda: 0.1 * rng.normal(size=(60, 3))
    mix = Dense(rng.normal(size=(3, 3)))
    views = [
        View(a[::-1] + noise(), {"a": Identity(3)}, 0.1, "one"),
        View(a + b @ np.asarray(mix.matrix).T + noise(), {"a": Identity(3), "b": mix}, 0.1, "two"),
    ]
    return Problem([Source("a", (3,)), Source("b", (3,))], views)


@pytest.fixture(autouse=True)
def every_iteration_is_kept(monkeypatch):
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def whole(problem):
    return said(Separator(problem, SMALL).fit(progress=False).denoisers)


def said(denoisers):
    return {k: {n: a.tobytes() for n, a in pack(d)[0].items()} for k, d in denoisers.items()}


def fit(problem, folder, **options):
    return Separator(problem, SMALL).fit(folder, progress=False, resume=True, **options)


def events(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def half(problem, tmp_path):
    """A run that was killed after six iterations."""
    with pytest.raises(Killed):
        Separator(problem, SMALL).fit(tmp_path, progress=KillAt(6))
    assert load_state(tmp_path / STATES[0]).total == 6
    assert load_state(tmp_path / STATES[1]).total == 5
    return tmp_path


def damage(path, where=-3):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(bytes(data))


def test_a_damaged_state_is_put_aside_for_the_one_before(problem, half, whole, capsys):
    damage(half / STATES[0])
    assert said(fit(problem, half).denoisers) == whole
    assert [r["iteration"] for r in read_metrics(half / "metrics.jsonl")] == list(range(1, 11))
    (note,) = [e for e in events(half) if e["level"] == "warning"]
    assert "latest.safetensors is damaged" in note["event"]
    assert note["event"].endswith("going on from the state before it, of iteration 5")
    assert (half / note["damaged"]).is_file()


def test_a_missing_last_state_is_that_of_a_kill_between_two_renames(problem, half, whole):
    (half / STATES[0]).unlink()
    assert said(fit(problem, half).denoisers) == whole


def test_where_no_state_is_good_the_error_says_what_to_do(problem, half):
    for name in STATES:
        damage(half / name)
    with pytest.raises(
        FormatError, match=r"latest\.safetensors is damaged.*or start anew in another"
    ):
        fit(problem, half)
    assert all((half / name).exists() for name in STATES)
    assert "FormatError" in events(half)[-1]["error"]


def test_a_state_of_a_newer_release_is_not_taken_for_damage(problem, half):
    from safetensors.numpy import save

    data = save({"x": np.zeros(1)}, metadata={"format_version": "7", "meta": "{}"})
    (half / STATES[0]).write_bytes(data)
    with pytest.raises(VersionError, match="format version 7"):
        fit(problem, half)
    assert (half / STATES[0]).read_bytes() == data


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "refinement"},
        {"group": 7},
        {"group": -1},
        {"iteration": 0.5},
        {"seconds": None},
        {"phase": "over"},
        {"score": "high"},
        {"unknown": 1},
        {"operators": {"f": [[float("nan")]]}},
    ],
)
def test_a_state_that_no_fit_is_ever_in_is_refused(problem, tmp_path, change):
    """Its hash is right, so a stranger made it: there is nothing to go back to."""
    with pytest.raises(Killed):
        Separator(problem, SMALL).fit(tmp_path, progress=KillAt(1))
    arrays, meta = read_tensors(tmp_path / STATES[0])
    write_tensors(
        tmp_path / STATES[0], arrays, {**meta, "counters": {**meta["counters"], **change}}
    )
    with pytest.raises(FormatError, match="is damaged"):
        fit(problem, tmp_path)


def test_a_kill_before_any_rename_leaves_a_run_that_goes_on(problem, tmp_path, monkeypatch):
    """Every write ends in a rename, and the process may end before each of them."""
    short = {
        "joint_iterations": 0,
        "mixture": {"components": 1, "gaussian_iterations": 2},
        "diffusion": {"iterations": 0},
    }
    go = lambda out: Separator(problem, short).fit(out, progress=False, resume=True).denoisers
    replace, left = os.replace, [-1]

    def counted(source, target):
        left[0] -= 1
        if not left[0]:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted)
    expected = said(go(tmp_path / "whole"))
    total = -1 - left[0]
    assert total >= 11  # run.json, four states, three that they replace, a model of two sources
    for stop in range(1, total + 1):
        folder, left[0] = tmp_path / str(stop), stop
        with pytest.raises(Killed):
            go(folder)
        left[0] = -1
        assert said(go(folder)) == expected, stop
        assert said(load_model(folder / "best")[0]) == expected, stop
        assert len(read_metrics(folder / "metrics.jsonl")) == 4, stop


def test_a_damaged_model_is_written_anew_on_resume(problem, whole, tmp_path):
    fit(problem, tmp_path)
    damage(next((tmp_path / "best").glob("a-*.safetensors")))
    (tmp_path / "best" / "model.json").write_text("{")
    fit(problem, tmp_path)
    assert said(load_model(tmp_path / "best")[0]) == whole


def test_what_killed_writes_leave_behind_is_swept_away(problem, half):
    for name in (".latest.safetensors.x1", ".run.json.x2", "best/.model.json.x3"):
        (half / name).parent.mkdir(exist_ok=True)
        (half / name).touch()
    fit(problem, half)
    assert not list(half.rglob(".*"))


def test_one_process_at_a_time_fits_in_a_folder(problem, tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(
            RunError, match=rf"another process is fitting in .* \(pid {os.getpid()}\); wait"
        ),
    ):
        fit(problem, tmp_path)
    fit(problem, tmp_path)


LIMITED = """
import resource, sys
import numpy as np
from dichroic.learning import fit
from dichroic.errors import RunError
from dichroic.operators import Identity
from dichroic import Problem, Separator, Source, View
fit.CHECKPOINT_SECONDS = 0.0
size = 200
y = np.random.default_rng(0).normal(size=(50, size))
problem = Problem([Source("a", (size,))], [View(y, {"a": Identity(size)}, 0.1, "v")])
class Limit:
    def iteration(self, metrics):
        if metrics["iteration"] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    def progress(self, *args): pass
settings = {"mixture": {"components": 1, "gaussian_iterations": 4, "rank": 4}, "diffusion": {"iterations": 0}}
try:
    Separator(problem, settings).fit(sys.argv[1], progress=Limit(), resume=True)
except RunError as error:
    print(error)
    sys.exit(9)
"""


def test_a_full_disk_is_an_error_that_keeps_the_last_state(tmp_path):
    """A file that may not grow beyond 4 KiB is what a full disk looks like, in the middle of a write."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 9, done.stderr
    assert "cannot write" in done.stdout
    assert "make room" in done.stdout
    assert load_state(tmp_path / STATES[0]).total == 2
    assert not list(tmp_path.rglob(".*"))
    again = LIMITED.replace('metrics["iteration"] == 2', "False")
    subprocess.run([sys.executable, "-c", again, str(tmp_path)], check=True, capture_output=True)
    assert load_state(tmp_path / STATES[0]).done


@pytest.mark.parametrize("where", ["/proc/run", "file/run"])
def test_a_folder_that_cannot_be_made_is_an_error(problem, tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write"):
        fit(problem, tmp_path / where)


READ_ONLY = """
import os, sys
from dichroic.errors import RunError
from dichroic.runtime.files import write_atomic
if os.getuid() == 0:
    os.setuid(65534)
try:
    write_atomic(sys.argv[1], b"data")
except RunError as error:
    print(error)
"""


def test_a_folder_that_is_read_only_is_an_error(tmp_path):
    """In a process without the rights of root, which may write anywhere."""
    folder = tmp_path / "out"
    folder.mkdir(mode=0o555)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    command = [sys.executable, "-c", READ_ONLY, str(folder / "x")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.startswith(f"cannot write {folder / 'x'}: Permission denied")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, sent):
    np.save(tmp_path / "y.npy", np.random.default_rng(0).normal(size=(400, 3)))
    (tmp_path / "p.yaml").write_text(
        "sources: {a: [3]}\nviews: {v: {observations: y.npy, operators: {a: identity}, noise: 0.1}}\n"
        "fit: {mixture: {components: 1, gaussian_iterations: 3000}, diffusion: {iterations: 0}}\n"
    )
    out = tmp_path / "a run"
    heeding = (  # what a shell starts in the background ignores Ctrl-C
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from dichroic.cli.main import main; sys.exit(main())"
    )
    words = ["fit", str(tmp_path / "p.yaml"), "--out", str(out), "--no-report"]
    process = subprocess.Popen(
        [sys.executable, "-c", heeding, *words], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (out / STATES[0]).exists():
            time.sleep(0.05)
        process.send_signal(sent)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    line = said.splitlines()[-1].strip()
    assert line == f"dichroic fit {tmp_path / 'p.yaml'} --out '{out}' --no-report --resume"
    kept = load_state(out / STATES[0]).total
    iterations = len(
        read_metrics(out / "metrics.jsonl")
    )  # of which a last one may have come after the state
    assert 0 < kept <= iterations <= kept + 1
    assert events(out)[-1]["error"].startswith("KeyboardInterrupt")


def test_a_state_without_denoisers_comes_back(tmp_path):
    save_state(tmp_path / "s", State(iteration=3))
    assert load_state(tmp_path / "s") == State(iteration=3)


def test_iterations_that_the_metrics_have_lost_are_said(problem, half, whole, caplog):
    lines = (half / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (half / "metrics.jsonl").write_bytes(b"".join(lines[:2]))
    assert said(fit(problem, half).denoisers) == whole
    assert "metrics.jsonl has lost iterations: it has 2 of 6" in caplog.text


@pytest.mark.parametrize(("begun", "how"), [(True, "with"), (False, "without")])
def test_a_run_begun_with_files_or_without_goes_on_so(problem, half, monkeypatch, begun, how):
    record = read_record(half / "run.json")
    assert record["in_files"] is False
    describe = runs.describe
    monkeypatch.setattr(runs, "describe", lambda *args: {**describe(*args), "in_files": not begun})
    write_record(half / "run.json", {**record, "in_files": begun})
    with pytest.raises(RunError, match=f"begun {how} --memory: go on {how} it"):
        fit(problem, half)
