"""`dichroic bench`: jobs, resuming, scores against the saved draws, tables, errors."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dichroic.benchmark.harness import cases, methods
from dichroic.benchmark.harness import job as jobs
from dichroic.benchmark.harness.published import PUBLISHED
from dichroic.benchmark.harness.results import cell, collect, evidence_gap, gap, of
from dichroic.benchmark.harness.runner import plan, run_bench
from dichroic.benchmark.harness.spec import (
    BenchConfig,
    JobSpec,
    parse_methods,
    parse_problem,
    parse_problems,
)
from dichroic.benchmark.problems import grassy
from dichroic.cli.main import main
from dichroic.errors import ConfigError, DataError, DichroicError
from dichroic.metrics import psnr

TINY = BenchConfig(count=300, held_out=60, draws=8, points=60, limit_two=5, quick=True)
SMALL_FIT = {
    "mixture.components": 2,
    "mixture.gaussian_iterations": 2,
    "mixture.iterations": 1,
    "mixture.final_iterations": 1,
    "joint_iterations": 1,
    "diffusion.iterations": 0,
}
FIT = "{mixture: {components: 2, gaussian_iterations: 2, final_iterations: 1}, diffusion: {iterations: 0}}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder, the jobs and the terminal's text of a small benchmark; one method of it fails."""
    out, said = tmp_path_factory.mktemp("bench"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "QUICK_FIT", SMALL_FIT)
        patch.setitem(methods._FACTORIES, "pcpca", lambda case, config: 1 / 0)
        todo = plan(["mixed-0.5"], ["mixture", "limit", "pcpca"], [3], TINY)
        failed = run_bench(todo, out, command="a command", run=jobs.main, say=said.append)
    assert failed == 1
    return out, todo, "\n".join(said)


def test_networks_start_from_the_mixtures_of_the_same_benchmark(finished, monkeypatch, tmp_path):
    """Not from those of other sizes."""
    out, todo, _ = finished
    out, given = shutil.copytree(out, tmp_path / "copy"), []

    class Started:
        def fit(self, folder, start=None, **options):
            given.append(start)
            raise RuntimeError("seen")

    monkeypatch.setitem(methods._FACTORIES, "dichroic", lambda case, config: Started())
    for config in (TINY, dataclasses.replace(TINY, count=TINY.count + 1)):
        jobs_of = plan(["mixed-0.5"], ["dichroic"], [3], config)
        run_bench(jobs_of, out, run=jobs.main, say=lambda text: None)
    assert given == [todo[0].folder(out) / "fit", None]
    spent = json.loads((jobs_of[0].folder(out) / "seconds.json").read_text())["fit"]
    before = json.loads((todo[0].folder(out) / "result.json").read_text())["fit_seconds"]
    assert spent < before


def test_scores_are_those_of_the_saved_draws(finished):
    """For the mixed problem both views are in one array, one after the other."""
    out, todo, _ = finished
    folder = todo[0].folder(out)
    with np.load(folder / "heldout.npz") as arrays:
        saved = {k: arrays[k] for k in arrays}
    assert set(saved) == {f"{a}/source{i}" for a in ("truth", "draw") for i in (1, 2)}
    rows = json.loads((folder / "result.json").read_text())["scores"]
    for i, view in enumerate(["view1", "view2"]):
        part = slice(60 * i, 60 * (i + 1))
        for source in ("source1", "source2"):
            row = next(r for r in rows if (r["view"], r["source"]) == (view, source))
            draw, truth = saved[f"draw/{source}"], saved[f"truth/{source}"]
            assert draw.shape == truth.shape == (120, 5)
            expect = psnr(draw[part], truth[part], data_range=4.0)
            assert row["psnr"] == pytest.approx(expect, abs=1e-4)
            assert 0 <= row["coverage"] <= 1


def test_the_limit_is_better_and_calibrated(finished):
    out, todo, _ = finished
    mean = lambda job: np.mean(
        [r["psnr"] for r in json.loads((job.folder(out) / "result.json").read_text())["scores"]]
    )
    assert mean(todo[1]) > mean(todo[0]) + 5


def test_tables_hold_the_numbers_of_the_results(finished):
    out, todo, said = finished
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == "a command"
    mixture = next(e for e in results["jobs"] if e["method"] == "mixture")
    score = np.mean([r["psnr"] for r in mixture["scores"] if r["source"] == "source1"])
    for text in (said, (out / "table.md").read_text(), (out / "table.html").read_text()):
        assert f"{score:.2f}" in text
        assert "failed: ZeroDivisionError" in text
        assert "300 observations of each view" in text
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, said.split("PSNR in dB")[0].splitlines())) <= 120


def test_finished_jobs_are_not_run_again(finished):
    out, todo, _ = finished
    stamp = (todo[0].folder(out) / "result.json").stat().st_mtime_ns
    ran = []
    run_bench(todo[:2], out, run=lambda folder: ran.append(folder) or 0, say=lambda text: None)
    assert not ran
    assert (todo[0].folder(out) / "result.json").stat().st_mtime_ns == stamp


def test_results_of_other_sizes_are_not_shown(finished):
    out, todo, _ = finished
    others = plan(["mixed-0.5"], ["mixture", "pcpca"], [3], BenchConfig(count=301, quick=True))
    about = [{"problem": "mixed-0.5", "method": m, "seed": 3} for m in ("mixture", "pcpca")]
    assert collect(out, others) == about
    assert [("scores" in e, "error" in e) for e in collect(out, todo)] == [
        (True, False),
        (True, False),
        (False, True),
    ]


def test_the_gap_to_the_limit_is_of_the_same_observations(finished):
    out, todo, _ = finished
    entries = collect(out, todo)
    mine, limit = of(entries, "mixed-0.5", "mixture"), of(entries, "mixed-0.5", "limit")
    saved = [np.load(job.folder(out) / "heldout.npz") for job in todo[:2]]
    expect = []
    for at, i in ((0, 0), (5, 60)):  # five observations of each view; the method's are 60 of each
        exact, own = saved[1]["draw/source1"][at : at + 5], saved[0]["draw/source1"][i : i + 5]
        truth = saved[1]["truth/source1"][at : at + 5]
        np.testing.assert_array_equal(truth, saved[0]["truth/source1"][i : i + 5])
        score = [psnr(x, truth, data_range=4.0) for x in (exact, own)]
        expect.append(score[0] - score[1])
    assert gap(mine, limit, ["source1"]) == pytest.approx([np.mean(expect)], abs=1e-3)
    assert gap([mine[0] | {"seed": 4}], limit, ["source1"]).size == 0


def test_no_prior_has_more_evidence_than_the_true_one(finished):
    out, todo, _ = finished
    entries = collect(out, todo)
    mine, limit = of(entries, "mixed-0.5", "mixture"), of(entries, "mixed-0.5", "limit")
    nats = evidence_gap(mine, limit)
    expect = np.mean(limit[0]["evidence"]) - np.mean(mine[0]["evidence"])
    assert nats == pytest.approx([expect])
    assert nats[0] > 0.5
    assert evidence_gap([mine[0] | {"evidence": [None, None]}], limit).size == 0


def test_digits_over_grass_have_distances_of_features_and_no_limit(
    grassy_files, tmp_path, monkeypatch
):
    monkeypatch.setenv("DICHROIC_DATA", str(grassy_files))
    monkeypatch.setattr(cases, "SMALL", {})
    monkeypatch.setattr(methods, "QUICK_FIT", SMALL_FIT | {"mixture.rank": 8})
    monkeypatch.setattr("dichroic.benchmark.problems.digit_features._STEPS", 50)
    todo = plan(["grassy-14-down"], ["mixture", "limit"], [0], TINY)
    assert [job.method for job in todo] == ["mixture"]
    said = []
    assert run_bench(todo, tmp_path, run=jobs.main, say=said.append) == 0
    rows = collect(tmp_path, todo)[0]["scores"]
    views = ("mixture-1", "mixture-2")
    found = {(r["view"], r["source"]): r for r in rows}
    assert set(found) == {(v, s) for v in views for s in ("digit", "grass")}
    digit, grass = found["mixture-1", "digit"], found["mixture-1", "grass"]
    assert digit["posterior"]["frechet"] > 0
    assert digit["prior"]["frechet"] > 0
    assert "frechet" not in grass["posterior"]
    assert "Fréchet post." in said[-1]


def test_missing_files_are_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("DICHROIC_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nowhere = dataclasses.replace(grassy.MNIST, url=(tmp_path / "nothing").as_uri())
    monkeypatch.setattr(grassy, "MNIST", nowhere)
    with pytest.raises(DataError, match=r"mnist\.npz is not in"):
        plan(["grassy-28"], ["mixture"], [0], TINY)


def test_peak_memory_is_of_the_process_alone():
    """A large parent does not count: what `ru_maxrss` of Linux gets wrong."""
    ballast = np.ones(300 * 2**17)  # 300 MiB
    script = "from dichroic.runtime.hardware import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    empty = float(done.stdout)
    script = "import numpy as np; x = np.ones(200 * 2**17); " + script
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 0 < empty < jobs.peak_memory() - ballast.nbytes / 2**20 + 100
    assert 180 < float(done.stdout) - empty < 220


def test_quick_settings_do_not_override_those_of_the_file(users):
    case = jobs.build_case(parse_problem(str(users)), 0, TINY)
    found = methods.make_method("dichroic", case, TINY).config
    assert (found.mixture.components, found.diffusion.iterations) == (2, 0)
    assert found.diffusion.steps == methods.QUICK_FIT["diffusion.steps"]


@pytest.fixture
def users(tmp_path):
    """A user's problem without truth: a background alone, and with a signal."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 200, 3)) * [2, 1, 0.1]
    y = x[0] + rng.normal(size=(200, 3)) * [0.1, 0.1, 1]
    noise = lambda: 0.1 * rng.normal(size=(200, 3))
    np.savez(tmp_path / "data.npz", alone=x[1] + noise(), both=y + noise())
    file = tmp_path / "mine.yaml"
    file.write_text(
        "sources: {a: {shape: [3]}, b: {shape: [3]}}\nviews:\n"
        "  alone: {observations: 'data.npz:alone', operators: {a: identity}, noise: 0.1}\n"
        "  both: {observations: 'data.npz:both', operators: {a: identity, b: identity}, noise: 0.1}\n"
        f"fit: {FIT}\n"
    )
    return file


def test_a_users_problem_from_the_command_line(users, tmp_path):
    """A real run: every job in a process of its own; no truth, so no PSNR, but χ² and times."""
    args = ["bench", str(users), "--methods", "mixture", "--seeds", "4", "--quick", "--out"]
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "dichroic", *args, str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "mine: calibration and cost" in done.stdout
    result = json.loads((out / "mine/mixture/seed4/result.json").read_text())
    assert result["scores"] == []
    assert abs(result["chi2"] - 1) < 0.3
    assert result["peak_memory_mib"] > 50
    assert result["machine"]["cores"] >= 1


def test_errors_come_before_any_work(users, tmp_path, capsys):
    for args, text in [
        (["contrastive-9"], "no problem 'contrastive-9'; did you mean"),
        (["mixed-1.5"], "between 0 and 1"),
        (["nowhere.yaml"], "does not exist"),
        (["contrastive-2", "--methods", "clvm-liner"], "did you mean 'clvm-linear'"),
    ]:
        assert main(["bench", *args, "--out", str(tmp_path / "none")]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_names():
    assert parse_problem("mixed-0.10").label == "mixed-0.1"
    found = parse_problem("mixed-0.3-per-source")
    assert (found.f_mix, found.per_source) == (0.3, True)
    assert [p.label for p in parse_problems(["contrastive-2", "contrastive-2"])] == [
        "contrastive-2"
    ]
    assert parse_methods(["limit", "limit"]) == ["limit"]
    assert set(parse_methods(None)) >= set(PUBLISHED["contrastive-2"])
    with pytest.raises(ConfigError, match="at least"):
        BenchConfig(draws=1)


def test_a_job_survives_as_json():
    spec = JobSpec(parse_problem("mixed-0.5"), "mixture", 3, TINY)
    assert JobSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_cells():
    assert cell(np.array([])) == "–"
    assert cell(np.array([1.234])) == "1.23"
    assert cell(np.array([1.0, 3.0])) == "2.00 ± 1.41"


def test_the_problem_file_is_checked_first(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("sources: {}\n")
    with pytest.raises(DichroicError):
        plan([str(file)], ["mixture"], [0], TINY)


def test_coverage_of_the_limit(finished):
    """Exact draws: 5 observations × 2 views × 2 sources, so a wide tolerance."""
    out, todo, _ = finished
    rows = json.loads((todo[1].folder(out) / "result.json").read_text())["scores"]
    for row in rows:
        assert abs(row["coverage"] - 0.9) < 4 * max(row["coverage_error"], 0.08)
