"""Damaged and hostile files: what loads says what was saved; all else is a clear error, at no great cost."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dichroic.errors import DichroicError
from dichroic.runtime.hardware import peak_memory

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import targets as fuzz

SEALED = ("mixture", "mlp", "state", "model", "run", "view", "zipped")
OPEN = ("problem", "stored", "rows", "packed", "npy", "h5", "metrics")
OPEN += ("fits", "rice", "gzipped", "mseed", "sac", "flac", "edf")
MOST_MIB = 256
HOSTILE = [
    b"0",
    b"-1",
    b"99999999999999999999",
    b"1e999",
    b"NaN",
    b"[" * 3000,
    b'"',
    b"{",
    b"\0",
    b"\xff" * 8,
]
HOSTILE += [
    b"null",
    b"../../x",
    b"*v",
    b"&v ",
    b"!!python/object:os.system ",
    b"\n",
    b": ",
    b"PK\x01\x02",
]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    made = fuzz.targets(tmp_path_factory.mktemp("fuzz"))
    return lambda name: made[name]


@pytest.fixture(autouse=True)
def frugal():
    """A test may not touch much memory: its files have a few kilobytes."""
    before = peak_memory()
    yield
    assert peak_memory() - before < MOST_MIB


def outcome(target, data):
    """What `data` says, or `None` if it is refused; anything else fails."""
    try:
        return target.run(data)
    except DichroicError as error:
        assert str(error), "an error without words"
        return None


def assert_same_or_refused(target, data):
    found = outcome(target, data)
    if target.sealed and found is not None:
        assert found == target.run(target.good)


@st.composite
def edits(draw):
    """One to three edits of a file, at places given as fractions of its length."""
    place = st.integers(0, 10_000)
    edit = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(1, 255)),
        st.tuples(st.just("cut"), place, st.integers(1, 64)),
        st.tuples(st.just("end"), place, st.just(0)),
        st.tuples(st.just("copy"), place, place),
        st.tuples(st.sampled_from(["put", "over"]), place, st.integers(0, len(HOSTILE) - 1)),
    )
    return draw(st.lists(edit, min_size=1, max_size=3))


def edited(data, changes):
    for what, place, value in changes:
        i = place * len(data) // 10_001
        if what == "flip" and data:
            data = data[:i] + bytes([data[i] ^ value]) + data[i + 1 :]
        elif what == "cut":
            data = data[:i] + data[i + value :]
        elif what == "end":
            data = data[:i]
        elif what == "copy":
            j = value * len(data) // 10_001
            data = data[:i] + data[j : j + 40] + data[i:]
        elif what == "put":
            data = data[:i] + HOSTILE[value] + data[i:]
        elif what == "over":
            data = data[:i] + HOSTILE[value] + data[i + len(HOSTILE[value]) :]
    return data


fuzzed = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", SEALED + OPEN)
def test_good_files_load_twice_to_the_same(name, target):
    good = target(name).good
    assert target(name).run(good) == target(name).run(good)


@pytest.mark.parametrize("name", SEALED + OPEN)
def test_a_file_cut_anywhere_is_refused_or_says_the_same(name, target):
    t = target(name)
    for i in range(0, len(t.good), max(1, len(t.good) // 40)):
        assert_same_or_refused(t, t.good[:i])


@pytest.mark.parametrize("name", SEALED + OPEN)
@fuzzed
@given(changes=edits())
def test_an_edited_file_is_refused_or_says_the_same(name, target, changes):
    t = target(name)
    assert_same_or_refused(t, edited(t.good, changes))


@pytest.mark.parametrize("name", ["mixture", "mlp", "state"])
@fuzzed
@given(changes=edits())
def test_edited_tensors_with_a_hash_that_fits_are_refused_or_load(name, target, changes):
    """A stranger can make the hash fit: what it says is then checked by itself."""
    t = target(name)
    data = fuzz.resealed(edited(t.good, changes))
    if data is not None:
        outcome(t, data)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value, path=()):
    """The paths to all values within `value`."""
    yield path
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in parts:
        yield from places(part, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


where = st.integers(0, 10_000)


@pytest.mark.parametrize("name", ["mlp", "state"])
@fuzzed
@given(where=where, new=values)
def test_descriptions_that_were_changed_are_refused_or_load(name, target, where, new):
    t = target(name)
    size = int.from_bytes(t.good[:8], "little")
    header = json.loads(t.good[8 : 8 + size])
    meta = json.loads(header["__metadata__"]["meta"])
    all_places = list(places(meta))
    header["__metadata__"]["meta"] = json.dumps(
        replaced(meta, all_places[where % len(all_places)], new)
    )
    text = json.dumps(header).encode()
    bad = fuzz.resealed(len(text).to_bytes(8, "little") + text + t.good[8 + size :])
    assert bad is not None
    outcome(t, bad)


@pytest.mark.parametrize("name", ["model", "run"])
@fuzzed
@given(where=where, new=values)
def test_settings_of_a_record_that_were_changed_are_noticed(name, target, where, new):
    t = target(name)
    record = json.loads(t.good)
    all_places = list(places(record))[1:]
    bad = replaced(record, all_places[where % len(all_places)], new)
    assert_same_or_refused(t, json.dumps(bad).encode())
