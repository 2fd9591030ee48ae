"""A whole fit: public interface, run folder, resuming, command line."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from followers import KillAt, Killed

from dichroic.benchmark.problems.manifolds import manifold_problem
from dichroic.cli.main import main
from dichroic.config import FitConfig
from dichroic.errors import ConfigError, FormatError, RunError, ShapeError
from dichroic.io.model_files import load_model
from dichroic.operators import Identity
from dichroic.priors import gaussian
from dichroic.problem.view import View
from dichroic.runtime.tracking import read_metrics
from dichroic.separation.separator import Separator

SMALL = {
    "joint_iterations": 2,
    "mixture": {"components": 4, "gaussian_iterations": 5, "iterations": 3, "final_iterations": 4},
    "diffusion": {
        "iterations": 2,
        "steps": 100,
        "keep": "all",
        "width": 16,
        "depth": 1,
        "evidence_draws": 2,
        "evidence_observations": 64,
    },
}


@pytest.fixture(scope="module")
def problem():
    return manifold_problem(seed=1, count=400)


@pytest.fixture(scope="module")
def whole(problem, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, Separator(problem, SMALL).fit(folder, progress=False)


def assert_same_model(a, b):
    for name, denoiser in a.items():
        for mine, theirs in zip(denoiser_arrays(denoiser), denoiser_arrays(b[name]), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def denoiser_arrays(denoiser):
    from dichroic.io.model_files import pack

    arrays, _ = pack(denoiser)
    return [arrays[k] for k in sorted(arrays)]


@pytest.mark.parametrize(
    "iteration", sorted(np.random.default_rng(5).choice(np.arange(1, 26), 3, False))
)
def test_a_run_killed_at_a_random_iteration_resumes_to_the_same_result(
    problem, whole, tmp_path, iteration
):
    with pytest.raises(Killed):
        Separator(problem, SMALL).fit(tmp_path, progress=KillAt(int(iteration)))
    resumed = Separator(problem, SMALL).fit(tmp_path, resume=True, progress=False)
    folder, uninterrupted = whole
    assert_same_model(resumed.denoisers, uninterrupted.denoisers)
    cost = ("seconds", "peak_memory")
    drop = lambda rows: [{k: v for k, v in r.items() if not k.startswith(cost)} for r in rows]
    ours, theirs = (read_metrics(f / "metrics.jsonl") for f in (tmp_path, folder))
    assert drop(ours) == drop(theirs)


def test_resume_starts_where_there_is_no_run_yet(problem, whole, tmp_path):
    fresh = Separator(problem, SMALL).fit(tmp_path / "new", resume=True, progress=False)
    assert_same_model(fresh.denoisers, whole[1].denoisers)


@pytest.fixture(scope="module")
def mixtures(problem, tmp_path_factory):
    """The folder of a fit of mixtures alone, with the settings of `whole`."""
    folder = tmp_path_factory.mktemp("runs") / "mixtures"
    Separator(problem, SMALL | {"diffusion": {"iterations": 0}}).fit(folder, progress=False)
    return folder


def test_a_fit_that_starts_from_mixtures_ends_as_one_that_learns_them(
    problem, whole, mixtures, tmp_path
):
    """A killed one needs no start to go on, but refuses another."""
    with pytest.raises(Killed):
        Separator(problem, SMALL).fit(tmp_path, start=mixtures, progress=KillAt(1))
    for options in ({"start": whole[0]}, {"start": Separator.load(whole[0])}):
        with pytest.raises(RunError, match="a run with another start"):
            Separator(problem, SMALL).fit(tmp_path, resume=True, progress=False, **options)
    resumed = Separator(problem, SMALL).fit(tmp_path, resume=True, progress=False)
    assert {m["phase"] for m in resumed.metrics} == {"diffusion"}
    assert_same_model(resumed.denoisers, whole[1].denoisers)


def test_what_a_start_left_that_was_killed_is_no_state_of_another_run(
    problem, whole, mixtures, tmp_path, monkeypatch
):
    """A kill between the state that a run starts from and its record; then one before a first iteration."""

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("dichroic.learning.fit.write_record", killed)
        Separator(problem, SMALL).fit(tmp_path, start=mixtures, progress=False)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("dichroic.learning.fit.advance", killed)
        Separator(problem, SMALL).fit(tmp_path, progress=False)
    resumed = Separator(problem, SMALL).fit(tmp_path, resume=True, progress=False)
    assert resumed.metrics[0]["phase"] == "mixture"
    assert_same_model(resumed.denoisers, whole[1].denoisers)


def test_a_run_that_has_lost_a_file_says_which(problem, mixtures, tmp_path):
    with pytest.raises(Killed):
        Separator(problem, SMALL).fit(tmp_path, start=mixtures, progress=KillAt(1))
    again = lambda: Separator(problem, SMALL).fit(tmp_path, resume=True, progress=False)
    (tmp_path / "run.json").rename(tmp_path / "kept.json")
    with pytest.raises(RunError, match=r"without its run\.json"):
        again()
    (tmp_path / "kept.json").rename(tmp_path / "run.json")
    for state in tmp_path.glob("*.safetensors"):
        state.unlink()
    with pytest.raises(RunError, match="no state of it"):
        again()


def test_a_run_that_did_not_start_from_a_model_refuses_one(problem, whole, mixtures):
    with pytest.raises(RunError, match="another start"):
        Separator(problem, SMALL).fit(whole[0], resume=True, start=mixtures, progress=False)


def test_a_start_that_does_not_fit_is_refused(problem, mixtures, tmp_path):
    few = Separator.load(mixtures)
    names = list(few.denoisers)
    short = gaussian(np.zeros(3), np.eye(3))
    for denoisers, error, message in (
        ({names[0]: few.denoisers[names[0]]}, RunError, f"no prior of '{names[1]}', only of"),
        (few.denoisers | {names[0]: short}, ShapeError, f"'{names[0]}': the prior of the start"),
    ):
        few.denoisers = denoisers
        with pytest.raises(error, match=message):
            Separator(problem, SMALL).fit(tmp_path / "new", start=few, progress=False)
    none = SMALL | {"diffusion": {"iterations": 0}}
    with pytest.raises(ConfigError, match="has diffusion iterations alone"):
        Separator(problem, none).fit(tmp_path / "new", start=mixtures, progress=False)
    assert not (tmp_path / "new").exists()


def test_the_saved_model_separates_as_the_fitted_one(problem, whole, tmp_path):
    folder, separator = whole
    separator.save(tmp_path / "model")
    expected = separator.separate("view2", n_draws=2)
    for path in (folder, tmp_path / "model"):
        got = Separator.load(path, problem=problem).separate("view2", n_draws=2)
        for k, x in expected.draws.items():
            np.testing.assert_array_equal(got.draws[k], x)
    assert expected.mean["source1"].shape == expected.std["source1"].shape == (400, 5)


def test_several_sources_may_be_of_one_learned_kind(whole):
    """Two draws of one source in an observation: the posterior of each is the same, and they add up."""
    _, separator = whole
    blend = separator.with_sources({"left": "source1", "right": "source1"})
    x = separator.sample_prior("source1", 2 * 64).reshape(2, 64, 5)
    view = View(x.sum(axis=0), {"left": Identity(5), "right": Identity(5)}, 0.01)
    draws = blend.separate(view, n_draws=64).draws
    total = draws["left"] + draws["right"] - x.sum(axis=0)
    assert np.sqrt(np.mean(total**2)) < 0.02
    gap = (draws["left"] - draws["right"]).mean(axis=0)  # nothing tells left from right
    assert np.all(np.abs(gap.mean(axis=0)) < 5 * gap.std(axis=0) / np.sqrt(len(gap)) + 1e-3)
    with pytest.raises(ConfigError, match="with_sources: unknown key 'source9'; did you mean"):
        separator.with_sources({"left": "source9"})


def test_prior_samples_follow_the_learned_prior(whole):
    _, separator = whole
    x = separator.sample_prior("source1", 2000)
    prior = separator.denoisers["source1"]
    scale = float(prior.scale)
    np.testing.assert_allclose(
        x.mean(axis=0), np.asarray(prior.location), atol=5 * scale / 2000**0.5
    )


def test_folders_of_another_run_are_refused(problem, whole):
    folder, _ = whole
    with pytest.raises(RunError, match="already holds a run"):
        Separator(problem, SMALL).fit(folder, progress=False)
    with pytest.raises(RunError, match="another problem"):
        Separator(manifold_problem(seed=2, count=400), SMALL).fit(
            folder, resume=True, progress=False
        )
    with pytest.raises(RunError, match="seed: 0 before, 3 now"):
        Separator(problem, {**SMALL, "seed": 3}).fit(folder, resume=True, progress=False)


def test_damaged_and_foreign_models_are_refused(whole, tmp_path):
    _, separator = whole
    separator.save(tmp_path)
    file = next(tmp_path.glob("source1-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(FormatError, match="does not match the hash"):
        load_model(tmp_path)
    info = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**info, "format_version": 99}))
    with pytest.raises(FormatError, match="format version 99"):
        load_model(tmp_path)


@pytest.fixture
def stated(tmp_path):
    """A problem file with its arrays."""
    problem = manifold_problem(seed=1, count=300)
    arrays, views = {}, {}
    for view in problem.views:
        arrays[f"{view.name}_y"] = view.observations
        arrays |= {f"{view.name}_{k}": np.asarray(op.matrix) for k, op in view.operators.items()}
        views[view.name] = {
            "observations": f"data.npz:{view.name}_y",
            "operators": {k: {"dense": f"data.npz:{view.name}_{k}"} for k in view.operators},
            "noise": 0.01,
        }
    np.savez(tmp_path / "data.npz", **arrays)
    fit = {**SMALL, "diffusion": {"iterations": 0}}
    content = {"sources": {"source1": [5], "source2": [5]}, "views": views, "fit": fit}
    (tmp_path / "problem.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_the_command_line_does_what_the_front_door_does(stated, capsys):
    file, run = str(stated / "problem.yaml"), str(stated / "run")
    assert main(["check", file]) == 0
    assert "valid problem" in capsys.readouterr().out
    assert main(["fit", file, "--out", run, "--seed", "4", "--no-report"]) == 0
    assert json.loads((stated / "run/run.json").read_text())["config"]["seed"] == 4
    out = stated / "out.npz"
    assert main(["separate", run, "view2", "--draws", "3", "--out", str(out)]) == 0
    with np.load(out) as data:
        assert data["draws/source2"].shape == (3, 300, 5)
        np.testing.assert_allclose(data["mean/source2"], data["draws/source2"].mean(axis=0))
    assert (
        main(["sample", run, "--source", "source1", "-n", "7", "--out", str(stated / "s.npy")]) == 0
    )
    assert np.load(stated / "s.npy").shape == (7, 5)
    assert main(["report", run, "--draws", "4"]) == 0
    assert (stated / "run/report.html").stat().st_size > 10_000


def test_errors_are_one_clear_line(stated, capsys):
    text = (stated / "problem.yaml").read_text().replace("joint_iterations", "joint_iteratons")
    (stated / "problem.yaml").write_text(text)
    assert main(["fit", str(stated / "problem.yaml"), "--out", str(stated / "run")]) == 2
    assert (
        "unknown key 'joint_iteratons'; did you mean 'joint_iterations'?" in capsys.readouterr().err
    )


def test_help_is_instant():
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dichroic", "--help"], check=True, capture_output=True)
    heavy = "import sys, dichroic.cli.main; sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", heavy], check=True)
    assert time.perf_counter() - began < 10  # the real guard is that nothing heavy is imported


def test_the_command_line_is_a_module_too(tmp_path):
    run = lambda *words: subprocess.run(
        [sys.executable, "-m", "dichroic", *words], capture_output=True, text=True
    )
    assert run("--help").stdout.startswith("usage: dichroic ")
    failed = run("check", str(tmp_path / "nothing.yaml"))
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")


def test_a_process_killed_with_sigkill_loses_nothing(stated):
    run = stated / "killed"
    command = [sys.executable, "-m", "dichroic", "fit", str(stated / "problem.yaml")]
    command += ["--out", str(run), "--resume", "--no-report"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "latest.safetensors").exists():
        time.sleep(0.05)
        if process.poll() is not None:
            break
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(
        [*command[:-4], "--out", str(stated / "plain"), "--no-report"],
        check=True,
        capture_output=True,
    )
    assert_same_model(load_model(run / "best")[0], load_model(stated / "plain/best")[0])


def test_config_errors_name_the_setting():
    from dichroic.errors import ConfigError

    with pytest.raises(ConfigError, match=r"fit.mixture: unknown key 'component'.*'components'"):
        FitConfig.from_dict({"mixture": {"component": 3}})
    with pytest.raises(ConfigError, match="expected int"):
        FitConfig.from_dict({"seed": 1.5})
