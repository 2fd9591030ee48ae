"""Draws are the same bits however many are made at once, and on however many devices, where priors have networks."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import determinism_worker
import jax
import numpy as np
import pytest

from dichroic.priors.networks import Mlp

PARTS = [(slice(40, 140), 100), (slice(60, 67), 7), (slice(63, 65), 1)]


@cache
def whole():
    separator, view = determinism_worker.few()
    return determinism_worker.drawn(separator.separate(view, n_draws=2))


def assert_same(part, all_of, rows):
    for name, x in determinism_worker.drawn(part).items():
        np.testing.assert_array_equal(x, all_of[name][:, rows], err_msg=name)


def assert_parts_are(all_of, separator, view):
    assert all(x.std() > 0.1 for x in all_of.values())
    for rows, chunk in PARTS:
        options = {"n_draws": 2, "chunk": chunk, "first_index": rows.start}
        for first, part in separator.stream(view.select(rows), **options):
            assert_same(part, all_of, slice(first, first + part.chi2.shape[1]))


def test_few_numbers_in_parts_are_the_whole():
    assert_parts_are(whole(), *determinism_worker.few())


@pytest.mark.parametrize("batch_size", [1, 129])
def test_few_numbers_in_batches_are_the_whole(batch_size):
    separator, view = determinism_worker.few(batch_size)
    assert_same(separator.separate(view, n_draws=2), whole(), slice(None))


def test_few_numbers_on_eight_devices_are_those_on_one(tmp_path):
    out = tmp_path / "found.npz"
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    words = [sys.executable, determinism_worker.__file__, str(out)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(out) as found:
        assert found["devices"] == 8
        for name, x in whole().items():
            np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_many_numbers_in_parts_are_the_whole():
    separator, view = determinism_worker.many(Mlp((16,), 32, 2, key=jax.random.key(0)))
    assert_parts_are(determinism_worker.drawn(separator.separate(view, n_draws=2)), separator, view)
