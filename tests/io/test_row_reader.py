"""Rows of arrays in files, in memory for these rows and little more, however far apart they are."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
import zarr
from processes import environment

from dichroic.cli.main import main
from dichroic.config import FitConfig
from dichroic.errors import ConfigError
from dichroic.io import load_array, load_problem, row_reader
from dichroic.io.row_reader import chunked_rows, runs
from dichroic.learning.data import prepare
from dichroic.problem import batches
from dichroic.runtime.limits import within

KINDS = ["npy", "fortran", "npz", "packed", "flat", "h5", "columns", "zarr"]
CHUNKS = {"flat": None, "h5": (7, 2, 3), "columns": (40, 1, 2)}
INDEX = {
    "slice": slice(3, 71),
    "none": slice(0, 0),
    "near": np.array([0, 1, 2, 5, 6, 7, 8, 30, 31]),
    "far": np.arange(2, 97, 13),
    "all": np.arange(97),
}


def write(folder, kind, y):
    """`y` in a file of a kind, and the reference to it."""
    if kind in ("npy", "fortran"):
        np.save(folder / "y.npy", np.asfortranarray(y) if kind == "fortran" else y)
        return "y.npy"
    if kind in ("npz", "packed"):
        (np.savez if kind == "npz" else np.savez_compressed)(folder / "y.npz", y=y)
        return "y.npz:y"
    if kind == "zarr":
        zarr.create_array(folder / "y.zarr", data=y, chunks=(10, 1, 3))
        return "y.zarr"
    with h5py.File(folder / "y.h5", "w") as file:
        packed = {} if kind == "flat" else {"chunks": CHUNKS[kind], "compression": "gzip"}
        file.create_dataset("y", data=y, **packed)
    return "y.h5:/y"


@pytest.mark.parametrize("window", [1, 100, 2**24])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_array(tmp_path, monkeypatch, kind, window):
    monkeypatch.setattr(row_reader, "WINDOW", window)
    for near in ("AHEAD", "NEAR"):
        monkeypatch.setattr(row_reader, near, 60)
    y = np.random.default_rng(0).normal(size=(97, 2, 3)).astype(np.float32)
    reference = write(tmp_path, kind, y)
    for index in INDEX.values():
        got = load_array(reference, tmp_path, lambda shape, index=index: index)
        np.testing.assert_array_equal(got, y[index])
        assert got.dtype == y.dtype


def test_runs_are_cut_at_windows_and_where_rows_are_far_apart():
    at = np.array([0, 1, 2, 9, 10, 50, 51, 53])
    read = [(r.start, r.stop) for _, r, _ in runs(at, 60, window=10, near=5)]
    assert read == [(0, 3), (9, 10), (10, 11), (50, 54)]
    read = [(r.start, r.stop) for _, r, _ in runs(slice(3, 25), 60, window=10, near=5)]
    assert read == [(3, 10), (10, 20), (20, 25)]


class Counted:
    """An array in chunks that counts how often each is needed."""

    def __init__(self, y, chunks):
        self.y, self.chunks, self.shape, self.dtype = y, chunks, y.shape, y.dtype
        self.needed = np.zeros([-(-n // c) for n, c in zip(y.shape, chunks, strict=True)], int)

    def __getitem__(self, at):
        place = (slice(s.start // c, -(-s.stop // c)) for s, c in zip(at, self.chunks, strict=True))
        self.needed[tuple(place)] += 1
        return self.y[at]


@pytest.mark.parametrize("chunks", [(50, 64), (50, 8), (1000, 64), (1, 64), (300, 1)])
def test_a_chunk_is_decoded_once_at_most(monkeypatch, chunks):
    monkeypatch.setattr(row_reader, "WINDOW", 2**14)
    monkeypatch.setattr(row_reader, "NEAR", 2**12)
    y = np.random.default_rng(0).normal(size=(1000, 64))
    index = np.unique(np.r_[np.arange(0, 1000, 90), 500:520])
    array = Counted(y, chunks)
    np.testing.assert_array_equal(chunked_rows(array, index, "y"), y[index])
    assert array.needed.max() == 1


def hollow(folder, kind, shape, chunks):
    """An array of single precision that takes no room on the disk, and the reference to it."""
    if kind in ("npy", "fortran"):
        order = kind == "fortran"
        np.lib.format.open_memmap(folder / "y.npy", "w+", np.float32, shape, order)
        return "y.npy"
    if kind == "zarr":
        zarr.create_array(folder / "y.zarr", shape=shape, chunks=chunks, dtype="f4")
        return "y.zarr"
    with h5py.File(folder / "y.h5", "w") as file:
        file.create_dataset("y", shape, "f4", chunks=chunks, compression="gzip")
    return "y.h5:/y"


@pytest.mark.parametrize(
    ("kind", "chunks"),
    [
        ("npy", None),
        ("fortran", None),
        ("h5", (2**16, 32)),
        ("h5", (2**21, 1)),
        ("zarr", (2**16, 32)),
    ],
)
def test_memory_is_that_of_the_rows_and_a_window(tmp_path, kind, chunks):
    count = 2**21
    reference = hollow(tmp_path, kind, (count, 32), chunks)
    index = np.linspace(0, count - 1, 2000).astype(int)
    tracemalloc.start()
    try:
        got = load_array(reference, tmp_path, lambda shape: index)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert got.shape == (2000, 32)
    assert not got.any()
    assert peak < 48, peak  # MiB, of 256


def problem_of(folder, reference, size, **more):
    view = {"observations": reference, "operators": {"a": "identity"}, "noise": 1, **more}
    table = {"sources": {"a": [size]}, "views": {"v": view}}
    (folder / "problem.yaml").write_text(yaml.safe_dump(table))
    return folder / "problem.yaml"


def fit_words(path):
    return ["fit", str(path), "--out", str(path.parent / "run"), "--memory"]


@pytest.mark.parametrize("kind", ["h5", "zarr"])
def test_chunks_too_large_for_the_memory_are_refused_before_one_is_read(tmp_path, capsys, kind):
    reference = hollow(tmp_path, kind, (10**9, 3), (3 * 10**7, 3))
    path = problem_of(tmp_path, reference, 3)
    tracemalloc.start()
    try:
        assert main([*fit_words(path), "1GiB"]) == 2
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    said = capsys.readouterr().err
    assert f"{reference} is in chunks of 344 MiB, more than an eighth of the 1,024 MiB" in said
    assert "or give 2,747 MiB" in said
    assert peak < 50
    with pytest.raises(ConfigError, match="in chunks of 344 MiB"), within(2**30):
        load_problem(path, stored=True)


def test_what_is_read_as_a_whole_fits_in_the_memory(tmp_path):
    y = np.zeros((100, 2, 3))
    for kind in ("npy", "npz", "packed", "h5", "zarr"):
        reference = write(tmp_path, kind, y)
        with pytest.raises(ConfigError, match="read as a whole and takes 1 MiB"), within(1000):
            load_array(reference, tmp_path)
        with within(4800):
            assert load_array(reference, tmp_path).size == 600


def test_too_little_memory_is_said_before_values_are_read(tmp_path, capsys):
    y = np.zeros((5000, 3))
    y[-1] = np.nan
    np.save(tmp_path / "y.npy", y)
    path = problem_of(tmp_path, "y.npy", 3)
    assert main([*fit_words(path), "100MiB"]) == 2
    assert "100 MiB of memory are too few" in capsys.readouterr().err
    assert main([*fit_words(path), "60GiB"]) == 2
    assert "is nan" in capsys.readouterr().err


def test_held_out_observations_take_an_eighth_of_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "rows_within", lambda memory, views: 64)
    monkeypatch.setattr("dichroic.learning.data.rows_within", lambda memory, views: 64)
    np.save(tmp_path / "y.npy", np.zeros((2000, 100), np.float32))
    problem = load_problem(problem_of(tmp_path, "y.npy", 100), stored=True)[0]
    config = FitConfig(holdout=0.5)
    found = [prepare(problem, config, m).test[0].count for m in (2**20, 8 * 400 * 300, 2**30)]
    assert found == [327, 300, 1000]
    assert prepare(problem, config, 400 * 64).test[0].count == 64


PREPARE = """
import sys
from dichroic.config import FitConfig
from dichroic.learning.data import prepare
from dichroic.io import load_problem

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024

small, large = (load_problem(path, stored=True)[0] for path in sys.argv[1:])
prepare(small, FitConfig(), 2**33)
before = peak()
data = prepare(large, FitConfig(), 2**33)
assert data.test[0].count == 16384
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_fit_begins_in_memory_that_hardly_grows_with_the_observations(tmp_path):
    """A bit for each, of which 40 million take 5 MiB; to draw them takes 80 MiB, whatever their number."""
    paths = []
    for count in (20_000, 40_000_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        hollow(folder, "npy", (count, 4), None)
        paths.append(str(problem_of(folder, "y.npy", 4)))
    command = [sys.executable, "-c", PREPARE, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200, done.stdout  # MiB more, of 610 in the file
