"""A problem whose views stay in their files is the problem in memory, and takes no more memory for more of them."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
import yaml
import zarr

from dichroic.cli.main import main
from dichroic.config import FitConfig
from dichroic.diagnostics.report import write_report
from dichroic.diagnostics.report.scores import separate_held_out
from dichroic.errors import DataError, DichroicError, ShapeError
from dichroic.io import LazyView, load_array, load_problem, open_view, summary_rows
from dichroic.learning.fit import describe
from dichroic.operators.noise import DenseNoise
from dichroic.priors import GaussianMixture
from dichroic.problem.identifiability import identifiability
from dichroic.problem.lazy_view import some_of, spread
from dichroic.problem.problem import check_values
from dichroic.problem.splits import held_out, holdout
from dichroic.separation.separator import Separator
from dichroic.separation.streaming import separate_to_zarr

N, D, M = 150, 3, 4
KINDS = ["npy", "fortran", "npz", "packed", "h5", "zarr"]
REFERENCES = {"npy": "{}.npy", "fortran": "{}.npy", "h5": "p.h5:/{}", "zarr": "p.zarr:{}"}


def numbers(n=N):
    """Arrays of two co-observed views and of one by itself; shared ones, and ones with a row per observation."""
    rng = np.random.default_rng(n)
    return {
        "p": rng.normal(size=(n, M)).astype(np.float32),
        "q": rng.normal(size=(n, 2, 2)),
        "single": rng.normal(size=(n + 7, M)),
        "A": rng.normal(size=(n, M, D)),
        "B": rng.normal(size=(M, 2)),
        "variance": rng.uniform(0.5, 1, size=(n, 2, 2)),
        "covariance": np.eye(M) + 0.1,
        "mask": rng.uniform(size=(n, 2, 2)) > 0.2,
        "x": rng.normal(size=(n, D)),
        "test": rng.uniform(size=n) > 0.8,
    }


def write(folder, arrays, kind="npy"):
    """The arrays in files of a kind, and the file of a problem."""
    if kind in ("npy", "fortran"):
        for name, x in arrays.items():
            np.save(folder / f"{name}.npy", np.asfortranarray(x) if kind == "fortran" else x)
    elif kind == "h5":
        with h5py.File(folder / "p.h5", "w") as file:
            for name, x in arrays.items():
                file.create_dataset(name, data=x, chunks=(7, *x.shape[1:]) if len(x) > 7 else None)
    elif kind == "zarr":
        group = zarr.open_group(folder / "p.zarr", mode="w")
        for name, x in arrays.items():
            chunks = (min(7, len(x)), *x.shape[1:])
            group.create_array(name, shape=x.shape, dtype=x.dtype, chunks=chunks)[...] = x
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(folder / "p.npz", **arrays)
    ref = REFERENCES.get(kind, "p.npz:{}").format
    shared = {"dense": ref("B")}
    views = {
        "p": {
            "observations": ref("p"),
            "operators": {"a": {"dense": ref("A")}, "b": shared},
            "noise": {"dense": ref("covariance")},
            "truth": {"a": ref("x")},
            "held_out": ref("test"),
            "group": 1,
        },
        "q": {
            "observations": ref("q"),
            "operators": {"b": shared},
            "noise": {"diagonal": ref("variance")},
            "mask": ref("mask"),
            "group": 1,
        },
        "single": {"observations": ref("single"), "operators": {"b": shared}, "noise": 0.5},
    }
    table = {"sources": {"a": [D], "b": [2]}, "views": views}
    (folder / "problem.yaml").write_text(yaml.safe_dump(table))
    return folder / "problem.yaml"


def both(path):
    """The problem in memory, and the one in files."""
    return load_problem(path)[0], load_problem(path, stored=True)[0]


def assert_same(got, want):
    """Equal views in memory."""
    assert (got.name, got.group, got.count, got.shape) == (
        *(want.name, want.group),
        *(want.count, want.shape),
    )
    np.testing.assert_array_equal(got.observations, want.observations)
    assert got.truth.keys() == want.truth.keys()
    for k, x in got.truth.items():
        np.testing.assert_array_equal(x, want.truth[k])
    same = jax.tree.map(np.array_equal, got.prepare(), want.prepare())
    assert len(jax.tree.leaves(same)) > 2
    assert all(jax.tree.leaves(same)), same


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_problem_is_the_problem_in_memory(tmp_path, kind):
    memory, stored = both(write(tmp_path, numbers(), kind))
    for name in ("sources", "names", "shapes", "origin"):
        assert getattr(stored, name) == getattr(memory, name)
    assert [stored.seen_by(k) for k in "ab"] == [memory.seen_by(k) for k in "ab"]
    groups = lambda problem: [[v.name for v in views] for views in problem.joint_views()]
    assert groups(stored) == groups(memory) == [["p", "q"], ["single"]]
    for view, want in zip(stored.views, memory.views, strict=True):
        assert isinstance(view, LazyView)
        for name in ("name", "label", "count", "shape", "group"):
            assert getattr(view, name) == getattr(want, name)
        np.testing.assert_array_equal(view.held_out_mask, want.held_out_mask)
        assert_same(view.head, want.select(slice(0, 64)))
        odd = np.array([0, 1, 63, 64, 65, 90, 91, N - 1])
        for rows in (slice(0, 1), slice(60, 130), slice(N - 3, None), odd, odd[-1:]):
            assert_same(view.select(rows), want.select(rows))
            assert view.select(rows).held_out is None
        assert_same(view.read(), want)
        assert type(view.noise_model) is type(want.noise_model)
        assert view.operators.keys() == want.operators.keys()
    steps = []
    check_values(stored, 40, lambda *at: steps.append(at))
    assert steps[-1] == (3 * N + 7,) * 2
    assert steps[0] == (40, 3 * N + 7)


@pytest.mark.parametrize("index", [[], [3, 3], [4, 3], [-1, 2], [2, N]])
def test_numbers_that_select_increase(tmp_path, index):
    view = both(write(tmp_path, numbers()))[1].view("p")
    with pytest.raises(DataError, match=f"views.p: no increasing indices of {N} observations"):
        view.select(np.array(index, int))


def test_rows_far_apart_are_read_by_themselves(tmp_path):
    """In one pass, so that what is compressed is unpacked once; files that are stacked are read once each."""
    y = np.random.default_rng(0).normal(size=(40, 2**17))
    np.savez_compressed(tmp_path / "y.npz", y=y)
    zarr.save_array(tmp_path / "y.zarr", y)
    index = np.array([0, 1, 2, 9, 12, 39])
    for reference in ("y.npz:y", "y.zarr"):
        got = load_array(reference, tmp_path, lambda shape: index)
        np.testing.assert_array_equal(got, y[index])
    for i in range(40):
        np.save(tmp_path / f"row{i:02}.npy", y[i])
    (tmp_path / "row20.npy").write_bytes(b"damaged")
    got = load_array("row*.npy", tmp_path, lambda shape: index)
    np.testing.assert_array_equal(got, y[index])


def test_what_all_observations_share_is_read_once(tmp_path):
    stored = load_problem(write(tmp_path, numbers()), stored=True)[0]
    for name in ("B", "covariance"):
        (tmp_path / f"{name}.npy").unlink()
    view = stored.view("p")
    part = view.select(slice(100, 110))
    assert part.operators["b"] is view.head.operators["b"]
    assert part.noise_model is view.noise_model
    assert isinstance(part.noise_model, DenseNoise)
    (tmp_path / "A.npy").unlink()
    with pytest.raises(DataError, match="no file 'A.npy'"):
        view.select(slice(100, 110))


def test_shared_parts_are_checked_once(tmp_path, monkeypatch):
    view = load_problem(write(tmp_path, numbers()), stored=True)[0].view("p")
    calls = []
    eigenvalues = np.linalg.eigvalsh
    monkeypatch.setattr("numpy.linalg.eigvalsh", lambda x: calls.append(1) or eigenvalues(x))
    for start in range(0, N, 10):
        view.select(slice(start, start + 10)).prepare()
    assert not calls
    np.save(tmp_path / "covariance.npy", -np.eye(M))
    with pytest.raises(DataError, match="not symmetric positive definite"):
        load_problem(tmp_path / "problem.yaml", stored=True)


# What is found in the values.


def spoiled(arrays, name, index, value):
    array = np.array(arrays[name])
    array[index] = value
    return {**arrays, name: array}


@pytest.mark.parametrize(
    ("name", "index", "value", "match"),
    [
        ("p", (-1, 2), np.nan, r"views.p: view 'p': observation 9 is nan .* entry \(2,\)"),
        ("p", (N - 5, 0), np.inf, "views.p: view 'p': observation 5 is inf"),
        ("q", (-1, 1, 0), 1e300, r"views.q: view 'q': observation 9 is 1e\+300 .*entry \(1, 0\)"),
        ("A", (-1, 0, 0), np.nan, "view 'p', source 'a': the operator contains NaN"),
        ("variance", (-1, 0, 0), 0, "view 'q': the noise variance is 0 at observation"),
        ("variance", (-1, 0, 0), np.nan, "view 'q': the noise variance is nan at observation"),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_a_bad_value_far_from_the_first_is_found(tmp_path, kind, name, index, value, match):
    arrays = spoiled({**numbers(), "mask": np.ones((N, 2, 2))}, name, index, value)
    path = write(tmp_path, arrays, kind)
    with pytest.raises(DichroicError):
        load_problem(path)
    stored = load_problem(path, stored=True)[0]
    at = f"in observations {N - 10} to {N - 1} "
    with pytest.raises(DataError, match=f"^problem.yaml: .*{match}.*; {at}"):
        check_values(stored, 20)
    check_values(load_problem(write(tmp_path, numbers(), kind), stored=True)[0], 20)


@pytest.mark.parametrize("name", ["A", "variance", "mask", "x"])
def test_another_number_of_rows_is_found_at_once(tmp_path, name):
    arrays = numbers()
    path = write(tmp_path, {**arrays, name: np.concatenate([arrays[name]] * 2)})
    with pytest.raises(ShapeError, match=r"one row per observation, but there are 150"):
        load_problem(path, stored=True)


def test_held_out_and_counts_of_a_group_are_compared(tmp_path):
    arrays = numbers()
    path = write(tmp_path, {**arrays, "test": arrays["test"][:-1]})
    with pytest.raises(ShapeError, match=r"views.p: view 'p': held_out has shape \(149,\)"):
        load_problem(path, stored=True)
    path = write(tmp_path, {**arrays, "test": np.ones(N)})
    with pytest.raises(DataError, match="leaves no observation to learn from"):
        load_problem(path, stored=True)
    path = write(tmp_path, arrays)
    text = path.read_text().replace("  single:", "  single:\n    group: 1")
    path.write_text(text)
    with pytest.raises(
        ShapeError, match="need the same number of observations, got .*'single': 157"
    ):
        load_problem(path, stored=True)
    np.save(tmp_path / "single.npy", arrays["single"][:N])
    path.write_text(text.replace("group: 1", "group: 1\n    held_out: p.npy:0", 1))
    path.write_text(text.replace("  single:", "  single:\n    held_out: other.npy"))
    np.save(tmp_path / "other.npy", ~arrays["test"])
    with pytest.raises(DataError, match="differ in held_out"):
        load_problem(path, stored=True)


def test_a_view_of_which_nothing_is_observed_is_found_by_reading_all(tmp_path):
    arrays = {**numbers(), "mask": np.zeros((N, 2, 2))}
    stored = load_problem(write(tmp_path, arrays), stored=True)[0]
    with pytest.raises(DataError, match="view 'q': the mask leaves nothing observed"):
        check_values(stored)
    arrays["mask"][-1, 0, 0] = 1
    check_values(load_problem(write(tmp_path, arrays), stored=True)[0], 1)
    few = {k: x[:20] if len(x) >= N else x for k, x in numbers().items()}
    few["mask"] = np.zeros((20, 2, 2))
    with pytest.raises(DataError, match="view 'q': the mask leaves nothing observed"):
        load_problem(write(tmp_path, few), stored=True)


def test_an_entry_that_is_larger_than_its_archive_is_damaged(tmp_path):
    """An uncompressed entry is read in place: what the archive says of its size is not believed."""
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 4)}
    with open(tmp_path / "y.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(6400))
    real = (tmp_path / "y.npy").stat().st_size
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.write(tmp_path / "y.npy", "y.npy")
    content = bytearray((tmp_path / "y.npz").read_bytes())
    at = content.rindex(b"PK\x01\x02")
    stated = (real - 6400 + 32 * 10**6).to_bytes(4, "little")
    content[at + 20 : at + 28] = stated * 2
    (tmp_path / "y.npz").write_bytes(content)
    with pytest.raises(DataError, match="ends after its file"):
        load_array("y.npz:y", tmp_path, lambda shape: slice(0, 10))


# Without holding an array.


def test_fingerprints(tmp_path):
    """The same whatever the files; another for another number of observations, value or setting."""
    big = {k: np.concatenate([x] * 4) if len(x) >= N else x for k, x in numbers().items()}
    big["single"] = big["single"][: 4 * N]
    prints = []
    for kind in ("npy", "h5"):
        (tmp_path / kind).mkdir()
        prints.append(load_problem(write(tmp_path / kind, big, kind), stored=True)[0].fingerprint())
    assert prints[0] == prints[1]
    found = set(prints)
    changed = [{**big, "x": 2 * big["x"]}]  # the truth does not count
    seen = spread(4 * N, 32, 8)
    unseen = np.setdiff1d(np.arange(4 * N), seen)
    changed += [spoiled(big, "p", (unseen, 0), 7)]
    for arrays in changed:
        found.add(load_problem(write(tmp_path, arrays), stored=True)[0].fingerprint())
    assert found == set(prints)
    changed = [spoiled(big, "p", (at, -1), 7) for at in (0, seen[100], 4 * N - 1)]
    changed += [spoiled(big, name, -1, 1.5) for name in ("A", "variance", "B", "single")]
    changed += [spoiled(big, "mask", -1, False), spoiled(big, "test", 300, not big["test"][300])]
    changed += [{**big, "single": big["single"][:-1]}]
    for arrays in changed:
        found.add(load_problem(write(tmp_path, arrays), stored=True)[0].fingerprint())
    assert len(found) == 1 + len(changed)


def test_spread():
    np.testing.assert_array_equal(spread(10, 5, 2), np.arange(10))
    np.testing.assert_array_equal(spread(11, 3, 2), [0, 1, 4, 5, 9, 10])
    index = spread(10**9, 64, 64)
    assert len(np.unique(index)) == 4096
    assert index[0] == 0
    assert index[-1] == 10**9 - 1
    assert np.all(np.diff(index) > 0)


def test_a_sample_is_of_the_same_observations_in_a_group(tmp_path, monkeypatch):
    stored = load_problem(write(tmp_path, numbers()), stored=True)[0]
    group = stored.joint_views()[0]
    assert [v.count for v in some_of(group)] == [N, N]
    monkeypatch.setattr("dichroic.problem.lazy_view.SOME_BYTES", 1)
    p, q = some_of(group)
    index = spread(N, 64, 1)
    np.testing.assert_array_equal(p.observations, numbers()["p"][index])
    np.testing.assert_array_equal(q.observations, numbers()["q"][index])
    write(tmp_path, spoiled(numbers(), "p", (-1, 0), np.nan))
    with pytest.raises(
        DataError, match=r"observation 63 is nan .*; in 64 of observations 0 to 149"
    ):
        some_of(group)


def test_identifiability_and_summary(tmp_path, monkeypatch):
    memory, stored = both(write(tmp_path, numbers()))
    assert summary_rows(stored) == summary_rows(memory)
    assert identifiability(stored) == identifiability(memory)
    monkeypatch.setattr("dichroic.problem.lazy_view.SOME", 64)
    sampled = identifiability(stored)
    assert [s.verdict for s in sampled.sources] == [
        s.verdict for s in identifiability(memory).sources
    ]
    rows = {row[0]: row for row in summary_rows(stored)[1]}
    missing = 100 * (1 - numbers()["mask"][spread(N, 64, 1)].mean())
    assert rows["q"][5] == f"≈ {missing:.1f}%"
    assert rows["p"][1] == N
    assert rows["p"][4:] == ["dense", "≈ 0.0%", "1", "yes"]


def test_equations_are_those_of_all_observations(tmp_path, monkeypatch):
    """Of a sample of one observation in two, the counts do not call for more."""
    rng = np.random.default_rng(0)
    arrays = {"y": rng.normal(size=(200, 1)), "A": rng.normal(size=(200, 1, 16))}
    for name, x in arrays.items():
        np.save(tmp_path / f"{name}.npy", x)
    view = {"observations": "y.npy", "operators": {"a": {"dense": "A.npy"}}, "noise": 0.1}
    table = {"sources": {"a": [16]}, "views": {"v": view}}
    (tmp_path / "problem.yaml").write_text(yaml.safe_dump(table))
    memory, stored = both(tmp_path / "problem.yaml")
    monkeypatch.setattr("dichroic.problem.identifiability.probe.UNKNOWNS", 100)
    want = identifiability(memory)
    monkeypatch.setattr("dichroic.problem.lazy_view.SOME", 128)  # fewer than the 136 unknowns
    got = identifiability(stored)
    assert not got.exact
    assert got.warnings == want.warnings
    assert [s.verdict for s in got.sources] == [s.verdict for s in want.sources]


# Working with it.


def prior(seed, dim):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(2, dim, dim))
    covariances = factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(dim)
    return GaussianMixture.from_moments([0.4, 0.6], rng.normal(size=(2, dim)), covariances)


def separator_of(problem):
    separator = Separator(problem, {"holdout": 0.2})
    separator.denoisers = {"a": prior(1, D), "b": prior(2, 2)}
    return separator


def assert_same_draws(got, want):
    for name, x in got.draws.items():
        np.testing.assert_array_equal(x, want.draws[name])
    np.testing.assert_array_equal(got.chi2, want.chi2)


@pytest.mark.slow
def test_views_by_name_are_separated_as_in_memory(tmp_path):
    memory, stored = map(separator_of, both(write(tmp_path, numbers())))
    for name in ("q", "single"):
        assert_same_draws(stored.separate(name, seed=3), memory.separate(name, seed=3))
    parts = list(stored.stream("q", seed=3, chunk=64))
    assert [first for first, _ in parts] == [0, 64, 128]
    whole = memory.separate("q", seed=3)
    joined = np.concatenate([part.draws["b"] for _, part in parts], axis=1)
    np.testing.assert_array_equal(joined, whole.draws["b"])
    separate_to_zarr(tmp_path / "out.zarr", stored, "single", n_draws=1, chunk=64)
    want = memory.separate("single").draws["b"]
    np.testing.assert_array_equal(load_array("out.zarr:draws/b", tmp_path), want)
    view = stored.problem.view("single")
    assert_same_draws(stored.separate(view), memory.separate("single"))


@pytest.mark.parametrize("most", [5, 256])
def test_the_report_separates_the_same_held_out_observations(tmp_path, most):
    memory, stored = both(write(tmp_path, numbers()))
    got, want = (
        separate_held_out(separator_of(problem), problem, 2, most) for problem in (stored, memory)
    )
    for g, w in zip(got, want, strict=True):
        assert (g.name, g.fresh) == (w.name, w.fresh)
        assert_same_draws(g.result, w.result)
        assert g.truth.keys() == w.truth.keys()
        for a, b in zip(g.views, w.views, strict=True):
            assert_same(a, b)
    np.testing.assert_array_equal(
        want[0].views[0].observations, numbers()["p"][numbers()["test"]][:most]
    )
    fresh = held_out([memory.view("single")], 0.2, 1)
    np.testing.assert_array_equal(
        want[1].views[0].observations, numbers()["single"][np.flatnonzero(fresh)[:most]]
    )


@pytest.mark.slow
def test_a_report(tmp_path):
    stored = load_problem(write(tmp_path, numbers()), stored=True)[0]
    page = write_report(tmp_path, separator=separator_of(stored), metrics=[], n_draws=2)
    assert "What was observed" in page.read_text()


def test_held_out_observations_are_split_as_in_memory(tmp_path):
    memory, stored = both(write(tmp_path, numbers()))
    for a, b in zip(memory.joint_views(), stored.joint_views(), strict=True):
        mask = held_out(b, 0.1, 5)
        np.testing.assert_array_equal(mask, held_out(a, 0.1, 5))
        for kept, held in zip(holdout(a, 0.1, 5), holdout(b, 0.1, 5), strict=True):
            for x, y in zip(kept, held, strict=True):
                assert_same(y, x)
    assert mask.sum() == round(0.1 * (N + 7))


@pytest.mark.slow
def test_a_fit_is_that_of_the_problem_in_memory(tmp_path):
    """Without an amount of memory to get by with, all observations are read."""
    iterations = {"components": 2, "gaussian_iterations": 2, "iterations": 1, "final_iterations": 1}
    settings = {"joint_iterations": 0, "mixture": iterations, "diffusion": {"iterations": 0}}
    found = []
    for problem in both(write(tmp_path, numbers())):
        separator = Separator(problem, settings).fit(progress=False)
        found.append([separator.sample_prior(k, 5) for k in "ab"])
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_what_a_run_says_of_it(tmp_path):
    memory, stored = both(write(tmp_path, numbers()))
    got, want = describe(stored, FitConfig()), describe(memory, FitConfig())
    assert got.pop("fingerprint") != want.pop("fingerprint")
    assert (got.pop("in_files"), want.pop("in_files")) == (True, False)
    assert got == want


def test_new_views_borrow_from_a_stored_problem(tmp_path, rng):
    stored = load_problem(write(tmp_path, numbers()), stored=True)[0]
    np.savez(tmp_path / "new.npz", observations=rng.normal(size=(9, M)))
    part = open_view(tmp_path / "new.npz", stored, like="single").select(slice(2, 4))
    assert part.operators["b"] is stored.view("single").head.operators["b"]
    assert part.noise == 0.5
    with pytest.raises(DataError, match="'a', and that of view 'p' differs from observation to"):
        open_view(tmp_path / "new.npz", stored).select(slice(2, 4))


# The command line.


@pytest.fixture
def fits(monkeypatch):
    """The problems and options of the fits that the command line asks for, which end at once."""
    calls = []

    def fit(self, out, **options):
        calls.append((self.problem, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("dichroic.separation.separator.Separator.fit", fit)
    return calls


def test_fit_within_an_amount_of_memory(tmp_path, fits, capsys):
    path = str(write(tmp_path, numbers()))
    out = ["--out", str(tmp_path / "run")]
    assert main(["fit", path, *out]) == 130
    assert main(["fit", path, *out, "--memory", "8GiB"]) == 130
    (memory, plain), (stored, bounded) = fits
    assert plain["memory"] is None
    assert bounded["memory"] == 2**33
    assert not any(isinstance(v, LazyView) for v in memory.views)
    assert all(isinstance(v, LazyView) for v in stored.views)
    with pytest.raises(SystemExit):
        main(["fit", path, *out, "--memory", "lots"])
    assert "--memory: 'lots' is no amount of memory" in capsys.readouterr().err


def test_a_bad_value_ends_a_fit_before_it_begins(tmp_path, fits, capsys, monkeypatch):
    path = str(write(tmp_path, spoiled(numbers(), "p", (-2, 0), np.nan)))
    run = tmp_path / "run"
    assert main(["fit", path, "--out", str(run), "--memory", "8GiB"]) == 2
    said = capsys.readouterr().err
    assert "observation 148 is nan" in said
    assert "in observations 0 to 149" in said
    assert not fits
    run.mkdir()
    (run / "run.json").touch()
    monkeypatch.setattr("dichroic.problem.lazy_view.SOME", 64)
    assert main(["fit", path, "--out", str(run), "--memory", "8GiB", "--resume"]) == 130
    assert len(fits) == 1  # what is gone on with has been checked when it began


# Memory.

CHECK = """
import sys
from dichroic import identifiability
from dichroic.problem.problem import check_values
from dichroic.io import load_problem, summary_rows

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024

small, large = (load_problem(path, stored=True)[0] for path in sys.argv[1:])
for problem in (small, large):
    if problem is large:
        before = peak()
    check_values(problem)
    identifiability(problem)
    summary_rows(problem)
    problem.fingerprint()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_memory_does_not_grow_with_the_observations(tmp_path, kind):
    size, paths = 256, []
    for n in (30_000, 400_000):
        folder = tmp_path / str(n)
        folder.mkdir()
        if kind == "npy":
            y = np.lib.format.open_memmap(folder / "y.npy", "w+", np.float32, (n, size))
        else:
            y = zarr.create_array(
                folder / "y.zarr", shape=(n, size), chunks=(2000, size), dtype="f4"
            )
        for start in range(0, n, 2000):
            y[start : start + 2000] = np.full((2000, 1), start) + np.arange(size)
        del y
        view = {"observations": f"y.{kind}", "operators": {"a": "identity"}, "noise": 1}
        table = {"sources": {"a": [size]}, "views": {"v": view}}
        (folder / "problem.yaml").write_text(yaml.safe_dump(table))
        paths.append(str(folder / "problem.yaml"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *paths],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 120, done.stdout  # MiB more, of 361 MiB more in the file


def test_a_thousand_million_observations_are_no_more_work(tmp_path):
    """In a file with a hole for most of them."""
    n = 10**9
    with open(tmp_path / "y.npy", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, 1)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + n)
    view = {"observations": "y.npy", "operators": {"a": "identity"}, "noise": 1}
    table = {"sources": {"a": [1]}, "views": {"v": view}}
    (tmp_path / "problem.yaml").write_text(yaml.safe_dump(table))
    problem = load_problem(tmp_path / "problem.yaml", stored=True)[0]
    before = problem.fingerprint()
    assert summary_rows(problem)[1][1][1] == n
    assert identifiability(problem).sources[0].verdict == "identified"
    with open(tmp_path / "y.npy", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"1")
    assert problem.fingerprint() != before
