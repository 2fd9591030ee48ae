"""What is several times larger than a limit that the system enforces is separated as it is in memory."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
import zarr

from dichroic.operators import Dense
from dichroic.operators.noise import DiagonalNoise
from dichroic.priors import GaussianMixture
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View
from dichroic.separation.separator import Separator

LIMIT = 832 * 2**20  # of which programs, threads and compiled code take 500
CHUNK, BLOCKS, M, D = 4096, 106, 256, 4
N = CHUNK * BLOCKS
VARIANCE = 0.1  # where nothing else is written
LIMITED = """
import os, resource, sys
limit, chunk, *words = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_DATA, (int(limit),) * 2)
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # as many threads on every machine
import numpy as np
from dichroic.cli.main import main
try:
    np.load("y.npy")
except MemoryError:
    pass
else:
    sys.exit("the limit is not enforced")
print("as a whole:", main([*words, "--out", "whole.npz"]))
sys.exit(main([*words, "--out", "out.zarr", "--chunk", chunk]))
"""


def separator_of(rng):
    """A known prior of four entries, which are seen through `M`."""
    factor = rng.normal(size=(2, D, D))
    covariances = factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(D)
    prior = GaussianMixture.from_moments([0.4, 0.6], rng.normal(size=(2, D)), covariances, rank=2)
    view = View(rng.normal(size=(2, M)), {"a": Dense(rng.normal(size=(M, D)))}, 0.1, "v")
    separator = Separator(Problem([Source("a", (D,))], [view]), {})
    separator.denoisers = {"a": prior}
    return separator


def some_rows(rng):
    """`{first: (y, variance, mask)}` at both ends, about an edge of two blocks, and amid what is not written."""
    variances, masks = rng.uniform(0.05, 0.5, size=(3, M)), rng.uniform(size=(3, M)) > 0.2
    kind = np.arange(192) % 3
    rows = lambda: (rng.normal(size=(192, M)), variances[kind], masks[kind])
    written = {first: rows() for first in (0, N // 2 - 96, N - 192)}
    blank = np.zeros((192, M)), np.full((192, M), VARIANCE), np.ones((192, M), bool)
    return written, {int(first): blank for first in rng.integers(CHUNK, N // 2 - CHUNK, size=3)}


def write_view(folder, written):
    """`N` observations, their variances and masks, in files with holes; returns their bytes."""
    header = {"descr": "<f8", "fortran_order": False, "shape": (N, M)}
    with (folder / "y.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 8 * N * M)
    group = zarr.open_group(folder / "p.zarr", mode="w")
    declare = lambda name, fill: group.create_array(
        name, shape=(N, M), chunks=(CHUNK, M), dtype="f8", fill_value=fill
    )
    y = np.load(folder / "y.npy", mmap_mode="r+")
    arrays = y, declare("variance", VARIANCE), declare("mask", 1)
    for first, values in written.items():
        for array, x in zip(arrays, values, strict=True):
            array[first : first + len(x)] = x
    table = {"observations": "y.npy", "mask": "p.zarr:mask"}
    table["noise"] = {"diagonal": "p.zarr:variance"}
    (folder / "new.yaml").write_text(yaml.safe_dump(table))
    return sum(array.nbytes for array in arrays)


def write_problem(folder, separator):
    """The model, and the problem that it is of."""
    separator.save(folder / "model")
    view = separator.problem.views[0]
    np.save(folder / "A.npy", view.operators["a"].matrix)
    np.save(folder / "old.npy", view.observations)
    stated = {"observations": "old.npy", "operators": {"a": {"dense": "A.npy"}}, "noise": 0.1}
    table = {"sources": {"a": [D]}, "views": {"v": stated}}
    (folder / "problem.yaml").write_text(yaml.safe_dump(table))


def limited(folder, *words):
    """`dichroic` with `words` in a process that may have `LIMIT` bytes of its own."""
    source = str(Path(__file__).parents[2] / "src")
    told = {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(LIMIT), str(CHUNK), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **told},
        timeout=600,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit that is enforced: RLIMIT_DATA")
def test_three_times_a_limit_of_memory_is_separated_as_in_memory(tmp_path, rng):
    separator = separator_of(rng)
    written, blank = some_rows(rng)
    write_problem(tmp_path, separator)
    assert write_view(tmp_path, written) > 3 * LIMIT
    words = ["--problem", "problem.yaml", "--draws", "1", "--seed", "3"]
    done = limited(tmp_path, "separate", "model", "new.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert "as a whole: 2\n" in done.stdout
    assert "cannot read 'y.npy': Unable to allocate" in done.stderr
    assert f"{BLOCKS} of {BLOCKS} blocks" in done.stdout
    got = zarr.open_group(tmp_path / "out.zarr", mode="r")
    operators = separator.problem.views[0].operators
    for first, (y, variance, mask) in (written | blank).items():
        rows = slice(first, first + len(y))
        view = View(y, operators, DiagonalNoise(jnp.asarray(variance)), mask=mask)
        want = separator.separate(view, seed=3, first_index=first)
        np.testing.assert_array_equal(got["draws/a"][:, rows], want.draws["a"])
        np.testing.assert_array_equal(got["mean/a"][rows], want.mean["a"])
        np.testing.assert_array_equal(got["chi2"][:, rows], want.chi2)
    assert np.isfinite(got["draws/a"][...]).all()
    assert np.isfinite(got["chi2"][...]).all()
