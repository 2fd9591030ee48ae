"""Compiled programs that are kept from one command to the next."""

import os
import subprocess
import sys
import time

import pytest

from dichroic.runtime.compilation_cache import _processor, keep_programs

COMMAND = """
import sys
from dichroic.runtime.compilation_cache import keep_programs
from pathlib import Path
keep_programs(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.split("/")[-1]))
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(5.0))), seen.count("cache_hits"))
"""


def run(*words, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    out = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", COMMAND, *map(str, words)],
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    value, hits = out.stdout.split()
    return float(value), int(hits)


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert first[0] == second[0]
    assert first[1] == 0
    assert second[1] > 0
    for entry in (tmp_path / _processor()).iterdir():  # as a kill may leave them
        entry.write_bytes(entry.read_bytes()[:50])
    assert run(tmp_path) == first


def test_programs_are_below_the_cache_of_the_user_unless_there_is_none(tmp_path):
    run(XDG_CACHE_HOME=str(tmp_path))
    assert [p.name for p in (tmp_path / "dichroic/programs").iterdir()] == [_processor()]
    (tmp_path / "file").touch()
    assert run(XDG_CACHE_HOME=str(tmp_path / "file"))[1] == 0


def test_what_a_user_has_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    keep_programs(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("age", "left"), [(80, True), (100, False)])
def test_programs_unused_for_three_months_are_removed(tmp_path, age, left):
    folder = tmp_path / _processor()
    folder.mkdir()
    (folder / "program").touch()
    os.utime(folder / "program", (time.time() - 24 * 3600 * age,) * 2)
    run(tmp_path)
    assert (folder / "program").exists() is left
