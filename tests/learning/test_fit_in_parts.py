"""Fits of observations that stay in files: equal to those in memory, in bounded memory, after kills."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from processes import environment, peak

from dichroic.config import FitConfig
from dichroic.errors import FormatError, RunError
from dichroic.inference.sampling import draw
from dichroic.io import load_problem
from dichroic.io.zarr_store import Job, finished_blocks
from dichroic.learning.checkpoint import load_state
from dichroic.learning.data import prepare
from dichroic.learning.diffusion.draw_cache import StoredDraws, draw_to_disk, windows
from dichroic.learning.fit import fit
from dichroic.learning.phases.schedule import advance
from dichroic.priors import GaussianMixture
from dichroic.problem import batches
from dichroic.problem.batches import ObservationBatches, numbered
from dichroic.problem.splits import IndexSet
from dichroic.runtime import distributed

N, M, D, BLOCK = 150, 2, 3, 64
MEMORY = 2**36  # a test process may hold much
FIT = {
    "mixture": {
        "components": 2,
        "steps": 3,
        "iterations": 2,
        "final_iterations": 2,
        "gaussian_iterations": 2,
    },
    "joint_iterations": 2,
    "diffusion": {
        "iterations": 1,
        "steps": 60,
        "width": 8,
        "depth": 1,
        "evidence_observations": 16,
    },
    "sampler": {"steps": 4},
}


@pytest.fixture(scope="module")
def stated(tmp_path_factory):
    """A problem in files: operators, noise and masks of each observation, and held-out ones here and there."""
    folder, rng = tmp_path_factory.mktemp("stated"), np.random.default_rng(0)
    a, b = rng.normal(size=(2, N, M, D))
    variance, held_out = rng.uniform(0.01, 0.1, size=(N, M)), np.arange(N) % 7 == 3
    line, ring = np.outer(rng.normal(size=N), [1, 2, -1]), rng.normal(size=(N, D)) ** 2
    seen = lambda a, x: np.einsum("nij,nj->ni", a, x)
    noise = lambda: np.sqrt(variance) * rng.normal(size=(N, M))
    arrays = {
        "y1": seen(a, line) + noise(),
        "y2": seen(a, line) + seen(b, ring) + noise(),
        "a": a,
        "b": b,
        "variance": variance,
        "mask": rng.uniform(size=(N, M)) > 0.1,
        "held": held_out,
    }
    for name, x in arrays.items():
        np.save(folder / f"{name}.npy", x)
    common = {"noise": {"diagonal": "variance.npy"}, "held_out": "held.npy", "mask": "mask.npy"}
    views = {
        "alone": {"observations": "y1.npy", "operators": {"line": {"dense": "a.npy"}}, **common},
        "both": {
            "observations": "y2.npy",
            "operators": {"line": {"dense": "a.npy"}, "ring": {"dense": "b.npy"}},
            **common,
        },
    }
    table = {"sources": {"line": [D], "ring": [D]}, "views": views, "fit": FIT}
    (folder / "problem.yaml").write_text(yaml.safe_dump(table))
    return folder


@pytest.fixture
def in_blocks(monkeypatch):
    monkeypatch.setattr(batches, "rows_within", lambda memory, views: BLOCK)


def loaded(stated):
    return load_problem(stated / "problem.yaml", stored=True)[0]


def prior(seed):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(2, D, D))
    covariances = factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(D)
    return GaussianMixture.from_moments([0.4, 0.6], rng.normal(size=(2, D)), covariances)


def test_numbers_of_what_is_true(rng):
    mask = rng.uniform(size=200_000) < 0.3
    mask[65_000:140_000] = False
    numbers, want = IndexSet(np.packbits(mask), len(mask)), np.flatnonzero(mask)
    assert numbers.count == len(want)
    for start, stop in ((0, 1), (0, len(want)), (19_000, 21_000), (len(want) - 1, len(want))):
        np.testing.assert_array_equal(numbers.between(start, stop), want[start:stop])
    some = numbers.spread(50)
    assert (some[0], some[-1], len(some)) == (want[0], want[-1], 50)
    assert mask[some].all()
    few = mask[:100]
    for value in (True, False):
        numbers = IndexSet(np.packbits(few), len(few), value)
        np.testing.assert_array_equal(numbers.spread(1000), np.flatnonzero(few == value))
    assert IndexSet(np.packbits(~mask), len(mask)).count == len(mask) - len(want)


def test_blocks_are_the_observations_in_memory(stated, in_blocks):
    problem, config = loaded(stated), FitConfig()
    whole, parts = prepare(problem, config), prepare(problem, config, memory=MEMORY)
    for one, other in zip(whole.train, parts.train, strict=True):
        assert isinstance(other, ObservationBatches)
        assert (one.count, one.size, one.sources) == (other.count, other.size, other.sources)
        assert one.count % BLOCK
        starts = []
        for start, block in numbered(other):
            starts.append(start)
            rows = slice(start, start + block.count)
            want = jax.tree.leaves(jax.vmap(lambda o: o.system())(one))
            got = jax.tree.leaves(jax.vmap(lambda o: o.system())(block))
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b[rows])
        assert starts == list(range(0, one.count, BLOCK))
        np.testing.assert_array_equal(other.head(5).y, one.head(5).y)
        np.testing.assert_array_equal(other.some(9).y, one.some(9).y)
    for one, other in zip(whole.test, parts.test, strict=True):
        np.testing.assert_array_equal(one.y, other.y)


def test_a_fit_in_blocks_is_that_in_memory(stated, in_blocks, tmp_path):
    problem, config = loaded(stated), FitConfig.from_dict(FIT)
    whole, _ = fit(problem, config)
    parts, rows = fit(problem, config, out=tmp_path / "run", memory=MEMORY)
    assert parts.phase == "done"
    assert {r["phase"] for r in rows} == {"mixture", "refinement", "diffusion"}
    assert not (tmp_path / "run" / "draws").exists()
    for name, one in whole.best.items():
        want = np.asarray(one.covariances())
        got = np.asarray(parts.best[name].covariances())
        np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_draws_on_disk_are_those_in_memory_and_are_not_drawn_twice(stated, in_blocks, tmp_path):
    problem, config = loaded(stated), FitConfig()
    known = {"line": prior(1), "ring": prior(2)}
    whole = prepare(problem, config)
    views = prepare(problem, config, memory=MEMORY).train
    key, calls = jax.random.key(3), []

    def some(obs, first):
        calls.append(first)
        return draw(known, obs, key, config, first_index=first).x

    options = {"memory": 2**20, "seed": 0, "progress": lambda *a: None}
    args = tmp_path, views, ["alone", "both"], [some, some]
    found = draw_to_disk(*args, model="m", **options)
    alone, both = (draw(known, obs, key, config).x for obs in whole.train)
    want = {"line": np.concatenate([alone["line"][0], both["line"][0]]), "ring": both["ring"][0]}
    assert calls == [0, 64, 128] * 2
    for name, x in want.items():
        assert found[name].count == found[name].rows == len(x)
        np.testing.assert_array_equal(found[name].window(0), x)
    (tmp_path / "1.zarr" / "finished" / "c" / "1").unlink()  # as after a kill
    draw_to_disk(*args, model="m", **options)
    assert calls[6:] == [64]
    np.testing.assert_array_equal(found["ring"].window(0), want["ring"])
    chunks = tmp_path / "1.zarr" / "draws" / "ring" / "c" / "0"
    (chunks / "0/0").write_bytes(
        bytes((chunks / "0/0").stat().st_size)
    )  # as a system that crashed may leave it
    (chunks / "2/0").unlink()
    draw_to_disk(*args, model="m", **options)
    assert calls[7:] == [0, 128]
    np.testing.assert_array_equal(found["ring"].window(0), want["ring"])
    (tmp_path / "0.zarr" / "zarr.json").write_text("{")
    draw_to_disk(*args, model="m", **options)
    assert calls[9:] == [0, 64, 128]
    larger = [dataclasses.replace(obs, batch_size=128) for obs in views]  # with more memory
    none = lambda obs, first: {k: np.zeros((1, obs.count, n)) for k, n in obs.dims.items()}
    found = draw_to_disk(tmp_path, larger, ["alone", "both"], [none, none], model="m", **options)
    assert not found["ring"].window(0).any()
    draw_to_disk(*args, model="of another iteration", **options)
    assert len(calls) == 18


@pytest.fixture
def drawn(tmp_path):
    """Ten blocks of three draws, the last of two, which number their rows."""
    x = np.arange(29.0, dtype=np.float32)[:, None] + np.zeros(2, np.float32)
    job = Job("m", "v", 0, 1, 29, 3, {"a": (2,)}, summaries=False)

    def write(room):
        from dichroic.io.zarr_store import open_store, write_block

        open_store(tmp_path / "0.zarr", job)
        for b in range(job.blocks):
            write_block(tmp_path / "0.zarr", job, b, {"draws/a": x[None, slice(*job.span(b))]})
        return StoredDraws("a", ((tmp_path / "0.zarr", job),), room, 0)

    return write


def test_windows_are_blocks_picked_at_random(drawn):
    few = drawn(room=8 * 10)
    assert (few.count, few.rows) == (29, 10)
    found = list(windows(few, 200))
    assert all(w.shape == (10, 2) for w in found)
    assert all(len(set(w[:, 0])) == 10 for w in found)
    np.testing.assert_array_equal(found[7], few.window(7))
    often = np.bincount(np.concatenate([w[:, 0] for w in found]).astype(int), minlength=29)
    expected = 200 * 10 / 29  # 4 of 10 blocks, of the fourth a row: within 5 standard deviations
    assert np.abs(often[:27].mean() - expected) < 5
    assert often.min() > 30
    assert often.max() < 110
    whole = list(windows(drawn(room=10**6), 3))
    assert whole[0] is whole[1] is whole[2]
    np.testing.assert_array_equal(whole[0][:, 0], np.arange(29))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda data: data[:-4], "has 24 of 28 bytes"),
        (lambda data: b"", "has 0 of 28 bytes"),
        (lambda data: bytes(len(data)), "does not hold what was written"),
        (None, "is missing"),
    ],
)
def test_a_block_of_draws_that_is_damaged_is_named(drawn, tmp_path, harm, why):
    few = drawn(room=10**6)
    file = next((tmp_path / "0.zarr" / "draws" / "a" / "c" / "0").glob("4/*"))
    if harm is None:
        file.unlink()
    else:
        file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(FormatError, match=f"4/0 is damaged: it {why}"):
        few.window(0)


def test_a_network_learns_the_same_from_windows_that_hold_all(stated, in_blocks, tmp_path):
    problem, config = loaded(stated), FitConfig.from_dict(FIT)
    known = {"line": prior(1), "ring": prior(2)}
    whole = prepare(problem, config)
    parts = prepare(problem, config, memory=MEMORY, scratch=tmp_path)
    from dichroic.learning.state import State

    at = State(phase="diffusion", current=known, best=known)
    one, other = (advance(at, data, config)[1] for data in (whole, parts))
    for name in known:
        assert one[f"loss_{name}"] == other[f"loss_{name}"]
        assert one[f"evidence_gain_{name}"] == other[f"evidence_gain_{name}"]
    assert len(finished_blocks(tmp_path / "1.zarr").finished) == 3


def test_several_processes_need_a_folder_in_common(stated, monkeypatch):

    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_bytes", lambda content: [content] * 2)
    with pytest.raises(RunError, match="a run folder in common"):
        fit(loaded(stated), FitConfig(), memory=MEMORY)


def words(folder, out, *more):
    base = ["fit", folder / "problem.yaml", "--out", folder / out, "--no-report"]
    return list(map(str, [*base, "--memory", "2GiB", *more]))


def test_a_fit_in_blocks_goes_on_after_a_kill(stated):
    def start(out, *more):
        command = [sys.executable, "-m", "dichroic", *words(stated, out, *more)]
        return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)

    fit(loaded(stated), FitConfig.from_dict(FIT), out=stated / "whole", memory=MEMORY)
    killed = start("killed")
    finished = stated / "killed" / "draws" / "0.zarr" / "finished" / "c" / "0"
    until = time.monotonic() + 120
    while not finished.exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert finished.exists()
    again = start("killed", "--resume")
    assert again.wait(timeout=240) == 0, again.stderr.read()
    a, b = ((stated / run / "latest.safetensors") for run in ("whole", "killed"))
    one, other = load_state(a), load_state(b)
    for x, y in zip(jax.tree.leaves(one.best), jax.tree.leaves(other.best), strict=True):
        np.testing.assert_array_equal(x, y)
    again.stderr.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_of_a_fit_does_not_grow_with_the_observations(tmp_path):
    size, few, many = 128, 20_000, 160_000  # both more than a block
    settings = {
        "mixture": {
            "components": 2,
            "steps": 1,
            "iterations": 1,
            "final_iterations": 1,
            "gaussian_iterations": 1,
        },
        "diffusion": {
            "iterations": 1,
            "steps": 10,
            "width": 8,
            "depth": 1,
            "evidence_observations": 16,
        },
        "sampler": {"steps": 2},
        "holdout": 0.01,
    }
    view = {"observations": "y.npy", "noise": 0.1, "operators": {"x": {"dense": "A.npy"}}}
    table = {"sources": {"x": [D]}, "views": {"v": view}, "fit": settings}
    (tmp_path / "problem.yaml").write_text(yaml.safe_dump(table))
    rng = np.random.default_rng(0)
    a = rng.normal(size=(size, D))
    np.save(tmp_path / "A.npy", a)
    peaks = {}
    for n in (few, many):
        y = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float64, (n, size))
        for start in range(0, n, 4096):
            part = y[start : start + 4096]
            part[:] = rng.normal(size=(len(part), D)) @ a.T + 0.1 * rng.normal(size=part.shape)
        y.flush()
        del y, part
        peaks[n] = peak(["fit", *words(tmp_path, str(n))[1:-2], "--memory", "1GiB"])
    data = (tmp_path / "y.npy").stat().st_size / 2**20
    assert data > 150
    assert peaks[many] - peaks[few] < data / 2, peaks
