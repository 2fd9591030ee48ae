"""Separation in parts: equal to the whole bit for bit, in bounded memory, by several processes, after kills."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
import zarr
from processes import COMMAND, environment, peak

from dichroic.cli import commands
from dichroic.cli.main import main
from dichroic.errors import ConfigError, DataError, DichroicError, RunError, ShapeError
from dichroic.io import load_array, load_view, open_view
from dichroic.io.zarr_store import Job, finished_blocks, open_store
from dichroic.metrics import mean_chi2
from dichroic.operators import Dense, Identity, Scale
from dichroic.operators.noise import DiagonalNoise
from dichroic.priors import GaussianMixture
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View
from dichroic.runtime.blocks import block_size, bytes_each, parse_bytes, parse_shard, shard_blocks
from dichroic.runtime.files import writing
from dichroic.separation.separator import Separator
from dichroic.separation.streaming import separate_to_zarr

N, D, M = 200, 6, 4
FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # writing more to a file fails as on a full disk
from dichroic.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def prior(seed, rank):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(2, D, 3))
    covariances = factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(D)
    return GaussianMixture.from_moments([0.4, 0.6], rng.normal(size=(2, D)), covariances, rank=rank)


def separator_of(problem, rank, seed=0):
    """Known priors in place of learned ones: of low rank, or of full rank, which has another sampler."""
    separator = Separator(problem, {})
    separator.denoisers = {"a": prior(seed + 1, rank), "b": prior(seed + 2, rank)}
    return separator


def problem_of(rng):
    y = rng.normal(size=(3, M))
    a, b = rng.normal(size=(2, M, D))
    return Problem(
        [Source("a", (D,)), Source("b", (D,))], [View(y, {"a": Dense(a), "b": Dense(b)}, 0.1, "v")]
    )


def new_view(rng, n=N):
    """Operators, noise and masks of each observation, of six kinds; some observations are missing altogether."""
    kind = np.arange(n) % 6
    mask = (rng.uniform(size=(6, M)) > 0.2)[kind]
    mask[10:90] = False
    return {
        "y": rng.normal(size=(n, M)),
        "A": rng.normal(size=(6, M, D))[kind],
        "B": rng.normal(size=(M, D)),
        "variance": rng.uniform(0.01, 0.1, size=(6, M))[kind],
        "mask": mask,
    }


def as_view(p):
    operators = {"a": Dense(p["A"]), "b": Dense(p["B"])}
    return View(p["y"], operators, DiagonalNoise(jnp.asarray(p["variance"])), "new", p["mask"])


def assert_same(got, want, rows=slice(None)):
    assert list(got.draws) == list(want.draws)
    for name, x in got.draws.items():
        np.testing.assert_array_equal(x, want.draws[name][:, rows])
    for name in ("chi2", "residual", "converged", "steps"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name)[:, rows])


@pytest.mark.parametrize("rank", [2, D])
@pytest.mark.slow
def test_parts_are_the_whole_bit_for_bit(rng, rank):
    separator, view = separator_of(problem_of(rng), rank), as_view(new_view(rng))
    whole = separator.separate(view, n_draws=2, seed=4)
    for chunk in (7, 64, 150):
        stop = 0
        for first, part in separator.stream(view, n_draws=2, seed=4, chunk=chunk):
            assert first == stop
            stop = first + part.chi2.shape[1]
            assert stop - first <= chunk
            assert_same(part, whole, slice(first, stop))
        assert stop == N
    first, part = next(
        separator.stream(view.select(slice(64, 80)), n_draws=2, seed=4, first_index=64)
    )
    assert first == 64
    assert_same(part, whole, slice(64, 80))


@pytest.mark.parametrize("rank", [2, D])
def test_an_observation_that_is_missing_altogether_has_no_chi2(rng, rank):
    separator, view = separator_of(problem_of(rng), rank), as_view(new_view(rng))
    found = separator.separate(view, n_draws=2)
    seen = np.asarray(view.mask).any(axis=1)
    assert 0 < seen.sum() < N
    np.testing.assert_array_equal(np.isfinite(found.chi2), [seen] * 2)
    assert all(np.isfinite(x).all() for x in found.draws.values())
    assert mean_chi2(found.chi2) == pytest.approx(found.chi2[:, seen].mean(), rel=1e-6)


def test_many_numbers_in_parts_are_the_whole_bit_for_bit(rng):
    problem = Problem([Source("a", (D,)), Source("b", (D,))], problem_of(rng).views)
    separator = separator_of(problem, 2)
    operators = {"a": Identity((D,)), "b": Scale((D,), 0.5)}
    view = View(rng.normal(size=(N, D)), operators, 0.1)
    whole = separator.separate(view, n_draws=3)
    for chunk in (1, 21):
        for first, part in separator.stream(view.select(slice(0, 50)), n_draws=3, chunk=chunk):
            assert_same(part, whole, slice(first, first + part.chi2.shape[1]))


# What is read, and what is not.


def write_view(folder, p, kind):
    """The arrays of a view in files of a kind, and the YAML file that states it."""
    if kind in ("npy", "fortran"):
        for name, x in p.items():
            np.save(folder / f"{name}.npy", np.asfortranarray(x) if kind == "fortran" else x)
    elif kind == "npz":
        np.savez(folder / "p.npz", **p)
    elif kind == "packed":
        np.savez_compressed(folder / "p.npz", **p)
    elif kind == "h5":
        with h5py.File(folder / "p.h5", "w") as file:
            for name, x in p.items():
                file.create_dataset(
                    name, data=x, chunks=(5, *x.shape[1:])[: x.ndim] if len(x) > 5 else None
                )
    else:
        group = zarr.open_group(folder / "p.zarr", mode="w")
        for name, x in p.items():
            array = group.create_array(
                name, shape=x.shape, dtype=x.dtype, chunks=(min(5, len(x)), *x.shape[1:])
            )
            array[...] = x
    file = {"npy": "{}.npy", "fortran": "{}.npy", "h5": "p.h5:/{}", "zarr": "p.zarr:{}"}
    ref = file.get(kind, "p.npz:{}").format
    table = {
        "observations": ref("y"),
        "operators": {"a": {"dense": ref("A")}, "b": {"dense": ref("B")}},
        "noise": {"diagonal": ref("variance")},
        "mask": ref("mask"),
    }
    (folder / "new.yaml").write_text(yaml.safe_dump(table))
    return folder / "new.yaml"


@pytest.mark.parametrize("kind", ["npy", "fortran", "npz", "packed", "h5", "zarr"])
def test_rows_of_files_are_those_of_the_view(tmp_path, rng, kind):
    p = new_view(rng, 23)
    problem = problem_of(rng)
    file = open_view(write_view(tmp_path, p, kind), problem)
    whole = load_view(tmp_path / "new.yaml", problem)
    assert file.count == whole.count == 23
    for rows in (slice(0, 1), slice(3, 17), slice(20, None)):
        part, want = file.select(rows), whole.select(rows)
        np.testing.assert_array_equal(part.observations, want.observations)
        np.testing.assert_array_equal(part.mask, want.mask)
        np.testing.assert_array_equal(part.operators["a"].matrix, want.operators["a"].matrix)
        np.testing.assert_array_equal(part.operators["b"].matrix, p["B"].astype(np.float32))
        np.testing.assert_array_equal(part.noise_model.variance, want.noise_model.variance)
    with pytest.raises(DataError, match="no consecutive observations of 23"):
        file.select(slice(23, 30))


def test_rows_of_an_npz_view_and_of_stacked_files(tmp_path, rng):
    p, problem = new_view(rng, 9), problem_of(rng)
    np.savez(tmp_path / "new.npz", observations=p["y"], noise=np.arange(1.0, 10), mask="nan")
    part = open_view(tmp_path / "new.npz", problem).select(slice(2, 5))
    np.testing.assert_array_equal(part.observations, p["y"][2:5])
    np.testing.assert_array_equal(part.noise_model.std, [3, 4, 5])
    assert part.mask == "nan"
    for i, y in enumerate(p["y"]):
        np.save(tmp_path / f"frame{i}.npy", y)
    (tmp_path / "frame8.npy").write_bytes(b"damaged")
    file = open_view({"observations": str(tmp_path / "frame*.npy")}, problem)
    assert file.count == 9
    np.testing.assert_array_equal(file.select(slice(2, 8)).observations, p["y"][2:8])
    with pytest.raises(DataError, match="frame8"):
        file.select(slice(7, 9))


def test_what_is_shared_is_not_cut_though_it_has_as_many_rows(tmp_path, rng):
    """As many observations as numbers: the role of an array decides, not its length."""
    n, d = 5, 5
    shared = {
        "K": rng.normal(size=(n, d)),
        "var": np.arange(1.0, 6),
        "mask": np.array([1, 1, 0, 1, 1]),
    }
    for name, x in shared.items():
        np.save(tmp_path / f"{name}.npy", x)
    np.save(tmp_path / "y.npy", rng.normal(size=(n, d)))
    problem = Problem([Source("a", (d,))], [View(np.ones((2, d)), {"a": Identity((d,))}, 1.0, "v")])
    text = "observations: y.npy\noperators: {a: {compose: [{dense: K.npy}, {diagonal: var.npy}]}}\n"
    (tmp_path / "v.yaml").write_text(text + "noise: {diagonal: var.npy}\nmask: mask.npy\n")
    part = open_view(tmp_path / "v.yaml", problem).select(slice(1, 3))
    dense, diagonal = part.operators["a"].operators
    assert dense.matrix.shape == (5, 5)
    np.testing.assert_array_equal(diagonal.diagonal, shared["var"])
    np.testing.assert_array_equal(part.noise_model.variance, shared["var"])
    np.testing.assert_array_equal(part.mask, shared["mask"])


def test_parameters_of_another_number_of_observations_are_found_out(tmp_path, rng):
    p = new_view(rng, 23)
    file = open_view(
        write_view(tmp_path, {**p, "A": np.concatenate([p["A"]] * 2)}, "npy"), problem_of(rng)
    )
    with pytest.raises(ShapeError, match=r"operators.a.dense: .*46, 4, 6\), one row per .* 23 obs"):
        file.select(slice(0, 4))


def test_a_slice_of_a_large_array_is_bounded_by_what_is_read(tmp_path, monkeypatch):
    array = zarr.create_array(
        tmp_path / "y.zarr", shape=(100_000, 50), chunks=(100, 50), dtype="f8"
    )
    array[500:600] = 1.0
    monkeypatch.setenv("DICHROIC_MAX_GIB", "0.001")
    with pytest.raises(DataError, match="that one may have"):
        load_array("y.zarr", tmp_path)
    some = load_array("y.zarr", tmp_path, lambda shape: slice(500, 600))
    assert some.shape == (100, 50)
    assert some.min() == 1


def test_arrays_in_python_are_read_as_far_as_needed(tmp_path, rng):
    """A zarr array that is damaged further on is separated up to there."""
    y = rng.normal(size=(128, M)).astype(np.float32)
    stored = zarr.create_array(tmp_path / "y.zarr", shape=y.shape, chunks=(64, M), dtype="f4")
    stored[...] = y
    (tmp_path / "y.zarr/c/1/0").write_bytes(b"damaged")
    problem = problem_of(rng)
    separator, operators = separator_of(problem, 2), problem.views[0].operators
    parts = separator.stream(View(stored, operators, 0.1), chunk=64)
    _, part = next(parts)
    assert_same(part, separator.separate(View(y[:64], operators, 0.1)))
    with pytest.raises(Exception, match="damaged|decompress|blosc|Zstd|zstd"):
        next(parts)


def test_errors_name_the_observations(rng):
    p = new_view(rng)
    p["y"][150, 1], p["mask"][150, 1] = np.nan, True
    parts = separator_of(problem_of(rng), 2).stream(as_view(p), chunk=100)
    next(parts)
    with pytest.raises(DataError, match=r"observation 50 is nan .*; in observations 100 to 199"):
        next(parts)


# On disk.


@pytest.fixture(scope="module")
def stated(tmp_path_factory):
    """A folder with a problem file, a saved model, a view in files, and its separation in one go."""
    folder, rng = tmp_path_factory.mktemp("stated"), np.random.default_rng(5)
    np.savez(folder / "old.npz", y=rng.normal(size=(3, M)), A=rng.normal(size=(M, D)))
    view = {
        "observations": "old.npz:y",
        "noise": 0.1,
        "operators": dict.fromkeys("ab", {"dense": "old.npz:A"}),
    }
    table = {"sources": {"a": [D], "b": [D]}, "views": {"v": view}}
    (folder / "problem.yaml").write_text(yaml.safe_dump(table))
    separator_of(None, 2).save(folder / "model")
    separator_of(None, 2, seed=7).save(folder / "other")
    write_view(folder, new_view(rng), "npy")
    assert main(words(folder, "out.zarr", "--chunk", "64")) == 0
    return folder


def words(folder, out, *more, model="model"):
    base = ["separate", folder / model, folder / "new.yaml", "--problem", folder / "problem.yaml"]
    return list(map(str, [*base, "--out", folder / out, "--draws", 2, "--seed", 3, *more]))


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()
    }


def command(*args, program=COMMAND):
    return subprocess.run(
        [sys.executable, *program, *args],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )


def test_a_store_holds_what_separate_gives(stated):
    problem_view = load_view(stated / "new.yaml", problem_at(stated))
    want = Separator.load(stated / "model").separate(problem_view, n_draws=2, seed=3)
    group = zarr.open_group(stated / "out.zarr", mode="r")
    assert group["draws/a"].chunks == (2, 64, D)
    np.testing.assert_array_equal(group["chi2"][...], want.chi2)
    for name in "ab":
        np.testing.assert_array_equal(group[f"draws/{name}"][...], want.draws[name])
        np.testing.assert_array_equal(group[f"mean/{name}"][...], want.mean[name])
        np.testing.assert_array_equal(group[f"std/{name}"][...], want.std[name])
    np.testing.assert_array_equal(group["finished"][...], np.ones(4))
    np.testing.assert_array_equal(load_array("out.zarr:mean/a", stated), want.mean["a"])


def problem_at(folder):
    from dichroic.io import load_problem

    return load_problem(folder / "problem.yaml")[0]


@pytest.mark.slow
def test_shards_in_processes_of_their_own_make_the_same_files(stated, capsys):
    for i in (3, 1, 2):
        done = command(*words(stated, "shards.zarr", "--chunk", "64", "--shard", f"{i}/3"))
        assert done.returncode == 0, done.stderr
    assert "4 of 4 blocks of 64 observations are finished" in done.stdout
    assert files(stated / "shards.zarr") == files(stated / "out.zarr")
    assert main(words(stated, "shards.zarr", "--status")) == 0
    assert "4 of 4" in capsys.readouterr().out


def test_the_mean_chi2_that_is_printed_is_of_what_was_observed(stated, capsys):
    assert main(words(stated, "out.npz")) == 0
    with np.load(stated / "out.npz") as file:
        chi2 = file["chi2"]
    assert np.isnan(chi2[:, 10:90]).all()
    assert f"χ²/M {np.nanmean(chi2):.3f} (1 is ideal)" in capsys.readouterr().out


def test_a_kill_costs_a_block_at_most(stated):
    process = subprocess.Popen(
        [sys.executable, *COMMAND, *words(stated, "killed.zarr", "--chunk", "5")],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    out, folder = stated / "killed.zarr", stated / "killed.zarr/finished/c"
    until = time.monotonic() + 60
    while not len(list(folder.glob("[0-9]*"))) > 2 and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = finished_blocks(out)
    assert 2 < len(found.finished) < 40
    assert len(found.finished) + len(found.missing) == found.job.blocks == 40
    leftover = out / "mean/a/c" / str(found.missing[0]) / ".0.half"  # what a kill leaves of a file
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half")
    kept = out / f"draws/a/c/0/{found.finished[0]}/0"
    before = kept.stat().st_mtime_ns
    assert main(words(stated, "killed.zarr", "--chunk", "5")) == 0
    assert kept.stat().st_mtime_ns == before
    assert not [name for name in files(out) if Path(name).name.startswith(".")]
    got, want = (zarr.open_group(folder, mode="r") for folder in (out, stated / "out.zarr"))
    for name in ("chi2", "draws/a", "draws/b", "mean/a", "mean/b", "std/a", "std/b"):
        assert got[name][...].tobytes() == want[name][...].tobytes()


@pytest.mark.parametrize(
    ("more", "model", "match"),
    [
        (["--seed", "4"], "model", r"begun with another seed \(3, not 4\)"),
        (["--draws", "5"], "model", r"begun with another number of draws \(2, not 5\)"),
        ([], "other", "begun with another model"),
        (["--chunk", "32"], "model", "begun with blocks of 64 observations, not 32"),
    ],
)
def test_another_seed_draws_or_model_is_refused(stated, capsys, more, model, match):
    before = files(stated / "out.zarr")
    assert main(words(stated, "out.zarr", *more, model=model)) == 2
    assert re.search(match, capsys.readouterr().err)
    assert files(stated / "out.zarr") == before


def test_another_view_is_refused_and_so_is_a_folder_of_something_else(stated, tmp_path, capsys):
    shutil.copytree(stated, tmp_path / "s")
    y = np.load(tmp_path / "s/y.npy")
    y[-1] += 1
    np.save(tmp_path / "s/y.npy", y)
    assert main(words(tmp_path / "s", "out.zarr")) == 2
    assert "begun with another view" in capsys.readouterr().err
    zarr.open_group(tmp_path / "s/else.zarr", mode="w")
    (tmp_path / "s/folder.zarr").mkdir()
    for name, match in (("else", "something else"), ("folder", "no separated observations")):
        assert main(words(tmp_path / "s", f"{name}.zarr")) == 2
        assert match in capsys.readouterr().err


@pytest.fixture
def harmed(stated, tmp_path):
    """The folder `stated`, and a copy of its finished store."""
    shutil.copytree(stated / "out.zarr", tmp_path / "x.zarr")
    return stated, tmp_path / "x.zarr"


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


HARM = {
    "truncated": (lambda f: os.truncate(f, 100), r"has 100 of [\d,]+ bytes"),
    "empty": (lambda f: os.truncate(f, 0), r"has 0 of [\d,]+ bytes"),
    "removed": (Path.unlink, "is missing"),
    "flipped": (flip, "does not hold what was written"),
}


def test_damaged_blocks_are_noticed_and_separated_again(harmed, capsys):
    """A file of each block is damaged in another way; sizes are seen by `--status`, a flipped bit by who reads."""
    stated, out = harmed
    good = files(out)
    chunks = ("draws/a/c/0/0/0", "finished/c/1", "mean/b/c/2/0", "chi2/c/0/3")
    said = [f"{i} \\({re.escape(c)} {why}" for i, c, (_, why) in zip("1234", chunks, HARM.values())]
    for chunk, (harm, _) in zip(chunks, HARM.values(), strict=True):
        harm(out / chunk)
    assert main(words(stated, out, "--status")) == 1
    told = capsys.readouterr().out
    assert re.search("1 of 4 blocks of 64 .* damaged: " + ".*, ".join(said[:3]), told)
    assert "missing: " not in told
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(out, mode="r")["chi2"][...]
    with pytest.raises(DataError, match=r"x\.zarr"):
        load_array(f"{out}:chi2", stated)
    assert (
        main(words(stated, out, "--shard", "1/2")) == 0
    )  # of its own blocks, which are the first and third
    assert re.search("again: " + f"{said[0]}.*, {said[2]}.*\\)\n", capsys.readouterr().err)
    assert main(words(stated, out)) == 0
    assert re.search("again: " + f"{said[1]}.*, {said[3]}.*\\)\n", capsys.readouterr().err)
    assert files(out) == good
    assert main(words(stated, out, "--status")) == 0


def test_a_good_store_is_read_and_left_as_it_is(harmed, capsys):
    stated, out = harmed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert main(words(stated, out)) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert "damaged" not in "".join(capsys.readouterr())


def test_status_says_by_its_exit_whether_all_is_there(harmed, capsys):
    stated, out = harmed
    shutil.rmtree(out / "finished/c")
    assert main(words(stated, out, "--status")) == 1
    assert (
        "0 of 4 blocks of 64 observations are finished; missing: 1, 2, 3, 4\n"
        in capsys.readouterr().out
    )
    assert main(words(stated, stated / "none.zarr", "--status")) == 2


def of_an_earlier_release(out):
    """Make a store what earlier releases wrote: version 1, chunks without checksums."""
    for file in out.rglob("zarr.json"):
        about = json.loads(file.read_text())
        if "codecs" in about:
            about["codecs"] = [c for c in about["codecs"] if c["name"] != "crc32c"]
        elif file.parent == out:
            about["attributes"]["dichroic"]["format_version"] = 1
        file.write_text(json.dumps(about))
    for file in out.rglob("c/**/*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size - 4)


def test_a_store_of_an_earlier_release_is_read_and_gone_on_with(harmed, capsys):
    stated, out = harmed
    of_an_earlier_release(out)
    whole = files(out)
    assert main(words(stated, out, "--status")) == 0
    np.testing.assert_array_equal(
        load_array(f"{out}:std/b", stated), load_array("out.zarr:std/b", stated)
    )
    (out / "finished/c/1").unlink()
    os.truncate(out / "draws/b/c/0/3/0", 100)
    flip(out / "mean/a/c/0/0")  # which nothing can tell
    flipped = (out / "mean/a/c/0/0").read_bytes()
    assert main(words(stated, out, "--status")) == 1
    assert re.search(
        r"2 of 4 .*; missing: 2; damaged: 4 \(draws/b/c/0/3/0 has 100 of 3,072 bytes\)",
        capsys.readouterr().out,
    )
    assert main(words(stated, out)) == 0
    assert files(out) == {**whole, "mean/a/c/0/0": flipped}


def test_many_that_begin_at_once_share_one_store(tmp_path):
    found, job = [], Job("m", "v", 0, 2, 100, 10, {"a": (3,)})
    begin = lambda: found.append(open_store(tmp_path / "x.zarr", job))
    threads = [threading.Thread(target=begin) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [job] * 8
    assert [p.name for p in tmp_path.iterdir()] == ["x.zarr"]
    assert finished_blocks(tmp_path / "x.zarr").missing == tuple(range(10))


def test_a_full_disk_is_an_error_and_what_is_finished_stays(stated):
    assert main(words(stated, "full.zarr", "--chunk", "64", "--shard", "1/2")) == 0
    before = files(stated / "full.zarr")
    failed = command(*words(stated, "full.zarr", "--shard", "2/2"), program=["-c", FULL])
    assert failed.returncode == 2
    assert "cannot write" in failed.stderr
    assert "; finished blocks are kept; run it again to go on\n" in failed.stderr
    assert "--resume" not in failed.stderr
    assert "Traceback" not in failed.stderr
    now = files(stated / "full.zarr")
    assert {k: now[k] for k in before} == before
    assert finished_blocks(stated / "full.zarr").missing == (1, 3)
    assert main(words(stated, "full.zarr", "--shard", "2/2")) == 0
    assert files(stated / "full.zarr") == files(stated / "out.zarr")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            ["separate", "RUN", "v", "--out", "x.zarr"],
            "; finished blocks are kept; run it again to go on",
        ),
        (["separate", "RUN", "v", "--out", "x.npz"], ", and run it again"),
        (["separate", "RUN", "v"], ", and run it again"),
        (["fit", "p.yaml", "--out", "new"], ", and run it again"),
        (
            ["fit", "p.yaml", "--out", "."],
            "iterations are kept; go on with:\n  dichroic fit p.yaml --out . --resume",
        ),
    ],
)
def test_how_to_go_on_after_a_full_disk_fits_the_command(
    tmp_path, monkeypatch, capsys, words, hint
):
    def fails(args):
        with writing(args.out or "separated.npz"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").touch()
    monkeypatch.setattr(commands, words[0], fails)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.endswith(f"{hint}\n")
    assert ("--resume" in said) == ("--resume" in hint)


def test_a_folder_that_cannot_be_made_is_an_error(stated, capsys):
    (stated / "plain").write_text("a file")
    assert main(words(stated, "plain/out.zarr", "--chunk", "64")) == 2
    assert "cannot write" in capsys.readouterr().err


def test_zarr_that_is_missing_is_an_error(stated, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert main(words(stated, "without.zarr", "--chunk", "64")) == 2
    assert "pip install 'dichroic[data]'" in capsys.readouterr().err
    assert not (stated / "without.zarr").exists()


# Memory.


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_observations(stated, tmp_path):
    size, large = 256, 64_000
    shutil.copytree(stated / "model", tmp_path / "model")
    shutil.copy(stated / "problem.yaml", tmp_path)
    shutil.copy(stated / "old.npz", tmp_path)
    text = "observations: y.npy\noperators: {a: {dense: A.npy}, b: zero}\nnoise: 0.1\n"
    (tmp_path / "new.yaml").write_text(text)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "A.npy", rng.normal(size=(size, D)))
    peaks = {}
    for n in (4096, large):
        y = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float64, (n, size))
        for start in range(0, n, 2000):
            y[start : start + 2000] = np.random.default_rng(start).normal(
                size=(len(y[start : start + 2000]), size)
            )
        y.flush()
        del y
        peaks[n] = peak(words(tmp_path, f"{n}.zarr", "--chunk", "1024", "--draws", "1"))
    data = (tmp_path / "y.npy").stat().st_size / 2**20
    assert data > 120
    assert peaks[large] - peaks[4096] < 0.75 * data, peaks  # 40 to 60 MiB, whatever the data
    separator = Separator.load(tmp_path / "model", problem=problem_at(tmp_path))
    view = load_view(tmp_path / "new.yaml", separator.problem)
    want = separator.separate(view, n_draws=1, seed=3)
    got = zarr.open_group(tmp_path / f"{large}.zarr", mode="r")
    np.testing.assert_array_equal(got["draws/a"][...], want.draws["a"])
    np.testing.assert_array_equal(got["chi2"][...], want.chi2)


def test_blocks_by_memory():
    each = bytes_each(32, 10, 100)
    assert each == 4 * (6 * 34 * 10 + 6 * 100)
    memory = 2**30
    assert block_size(memory, 0, each, 10**6) == 16384
    assert block_size(memory, 500 * 2**20, each, 10**6) == 12 * 2**20 // each // 64 * 64
    assert block_size(2**40, 0, each, 10**6) == 16384
    assert block_size(2**40, 0, each, 1000, shards=4) == 256
    assert block_size(2**40, 0, each, 3) == 64
    with pytest.raises(ConfigError, match="64 observations at a time, .* need 60[0-9] MiB"):
        block_size(2**29, 90 * 2**20, each, 1000)
    assert [shard_blocks(5, (i, 3)) for i in (1, 2, 3)] == [[0, 3], [1, 4], [2]]


def test_amounts_and_shards_as_text():
    sizes = {
        "512MiB": 2**29,
        "4GiB": 2**32,
        "4GB": 4 * 10**9,
        "1.5 TB": 1500 * 10**9,
        "1000": 1000,
        "8kB": 8000,
    }
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for bad in ("", "GiB", "-1GiB", "4gib", "1e9", "4GiB/", "nan", "0GiB", "4 G", "٤GiB"):
        with pytest.raises(ConfigError, match="no amount of memory"):
            parse_bytes(bad)
    assert parse_shard("2/3") == (2, 3)
    for bad in ("", "0/3", "4/3", "1", "1/0", "1/3/3", "-1/3", "a/b", "1.0/3"):
        with pytest.raises(ConfigError, match="no shard"):
            parse_shard(bad)


@pytest.mark.parametrize("more", [["--memory", "lots"], ["--shard", "4/3"], ["--chunk", "0"]])
def test_options_that_make_no_sense_are_errors_before_any_work(stated, capsys, more):
    with pytest.raises(SystemExit) as stopped:
        main(words(stated, "bad.zarr", *more))
    assert stopped.value.code == 2
    assert more[0] in capsys.readouterr().err
    assert main(words(stated, "bad.npz", "--shard", "1/2")) == 2
    assert "are for --out FOLDER.zarr" in capsys.readouterr().err
    assert main(words(stated, "bad.zarr", "--memory", "20MiB")) == 2
    assert "MiB of memory are too few" in capsys.readouterr().err
    assert not list(stated.glob("bad*"))


def test_co_observed_views_and_views_by_name(tmp_path, rng):
    p, q = rng.normal(size=(2, 70, D))
    views = [
        View(p, {"a": Identity((D,)), "b": Identity((D,))}, 0.1, "p", group="g"),
        View(q, {"a": Identity((D,))}, 0.2, "q", group="g"),
    ]
    problem = Problem([Source("a", (D,)), Source("b", (D,))], views)
    separator = separator_of(problem, 2)
    whole = separator.separate("p", seed=1)
    for first, part in separator.stream("q", seed=1, chunk=64):
        assert_same(part, whole, slice(first, first + part.chi2.shape[1]))
    done = separate_to_zarr(tmp_path / "x.zarr", separator, views, n_draws=1, seed=1, chunk=32)
    assert done.missing == ()
    got = zarr.open_group(tmp_path / "x.zarr", mode="r")
    np.testing.assert_array_equal(got["draws/b"][...], whole.draws["b"])
    assert np.isnan(got["std/a"][...]).all()
    with pytest.raises(ShapeError, match=r"same number of observations, got \[60, 70\]"):
        next(separator.stream([views[0], views[1].select(slice(0, 60))]))
    with pytest.raises(DichroicError, match="at least one observation at a time"):
        next(separator.stream("p", chunk=0))


def test_a_damaged_description_is_an_error(stated, tmp_path):
    shutil.copytree(stated / "out.zarr", tmp_path / "x.zarr")
    file = tmp_path / "x.zarr/zarr.json"
    about = json.loads(file.read_text())
    del about["attributes"]["dichroic"]["seed"]
    file.write_text(json.dumps(about))
    with pytest.raises(DichroicError, match="damaged"):
        finished_blocks(tmp_path / "x.zarr")
    with pytest.raises(RunError, match="holds no separated observations"):
        finished_blocks(tmp_path)
