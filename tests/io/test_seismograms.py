"""Seismograms: what a file says of times, rates, stations and gaps is read, or contradicted by an error."""

import warnings

import numpy as np
import pytest

from dichroic.errors import DataError
from dichroic.io import load_array, load_problem, load_view
from dichroic.runtime.limits import VARIABLE

with warnings.catch_warnings():  # of obspy, about its own dependencies
    warnings.simplefilter("ignore")
    import obspy

START = obspy.UTCDateTime(2020, 1, 1)
COUNTS = np.random.default_rng(0).normal(0, 1000, 500).astype(np.int32)


def trace(start=0.0, rate=100.0, channel="BHZ", station="AAA", data=COUNTS, **more):
    about = {"network": "XX", "station": station, "channel": channel, "sampling_rate": rate}
    return obspy.Trace(data.copy(), {**about, "starttime": START + start, **more})


def write(path, *traces, kind="MSEED"):
    with warnings.catch_warnings():  # that text and numbers are encoded differently
        warnings.simplefilter("ignore")
        obspy.Stream(list(traces)).write(str(path), kind)
    return path.name


def test_a_gap_is_missing_entries(tmp_path):
    name = write(tmp_path / "x.mseed", trace(), trace(7.0, data=COUNTS[::-1]))
    want = np.concatenate([COUNTS, np.full(200, np.nan), COUNTS[::-1]])
    np.testing.assert_array_equal(load_array(f"{name}:BHZ", tmp_path), want[None])


def test_parts_in_any_order_without_a_gap_stay_integers(tmp_path):
    name = write(tmp_path / "x.mseed", trace(5.0), trace())
    found = load_array(name, tmp_path)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.concatenate([COUNTS, COUNTS])[None])


def test_a_view_with_a_gap_needs_a_mask(tmp_path):
    write(tmp_path / "a.mseed", trace(data=COUNTS[:200]), trace(3.0, data=COUNTS[300:]))
    (tmp_path / "p.yaml").write_text(
        "sources: {s: [1, 500]}\n"
        "views:\n  v: {observations: 'a*.mseed', operators: {s: identity}, noise: 1}\n"
    )
    with pytest.raises(
        DataError, match=r"observation 0 is nan .*entry \(0, 200\) \(100 .*mask='nan'"
    ):
        load_problem(tmp_path / "p.yaml")
    masked = (tmp_path / "p.yaml").read_text().replace("noise: 1", "noise: 1, mask: nan")
    (tmp_path / "p.yaml").write_text(masked)
    problem, _ = load_problem(tmp_path / "p.yaml")
    mask = np.asarray(problem.views[0].prepare().noise.mask)
    assert not mask[0, 200:300].any() and mask.sum() == 400
    view = {"observations": "a*.mseed", "mask": "nan"}
    assert load_view({**view, "observations": problem.views[0].observations}, problem).count == 1


def test_overlaps_that_agree_are_merged_and_others_are_refused(tmp_path):
    name = write(tmp_path / "x.mseed", trace(data=COUNTS[:300]), trace(2.0, data=COUNTS[200:]))
    np.testing.assert_array_equal(load_array(name, tmp_path), COUNTS[None])
    changed = COUNTS[200:].copy()
    changed[50] += 1
    write(tmp_path / name, trace(data=COUNTS[:300]), trace(2.0, data=changed))
    said = (
        r"XX.AAA..BHZ in 'x.mseed' overlap and differ, first at 2020-01-01T00:00:02.5.*\(1 of 100"
    )
    with pytest.raises(DataError, match=said):
        load_array(name, tmp_path)


def test_numbers_that_are_nan_in_both_of_two_parts_agree(tmp_path):
    data = COUNTS.astype(np.float32)
    data[250] = np.nan
    name = write(tmp_path / "x.mseed", trace(data=data[:300]), trace(2.0, data=data[200:]))
    np.testing.assert_array_equal(load_array(name, tmp_path), data[None])


@pytest.mark.parametrize(
    ("others", "match"),
    [
        ([trace(7.004)], r"XX.AAA..BHZ of 'x.mseed' goes on 0.4 samples off its grid in time"),
        ([trace(7.0, rate=50)], r"differ in sampling rate: .* 100 Hz, 500 .*; .* 50 Hz, 500"),
        ([trace(3600)], r"gaps of 359,500 of 360,500 samples: if these are events of their own"),
        (
            [trace(channel="BHN", rate=50)],
            r"sampling rate: XX.AAA..BHN from .* 50 Hz, 500 samples; XX.AAA..BHZ .* 100 Hz.*resample",
        ),
        (
            [trace(3600, channel="BHN")],
            r"span of time that they cover: XX.AAA..BHN from 2020-01-01T01:00.*; XX.AAA..BHZ from "
            r"2020-01-01T00:00.*trim",
        ),
        ([trace(0.01, channel="BHN")], "span of time"),
        ([trace(channel="BHN", data=COUNTS[1:])], "499 samples.*500 samples"),
        ([trace(channel="BHN"), trace(7.0, channel="BHN")], "1,200 samples.*500 samples"),
    ],
)
def test_traces_that_do_not_belong_together_are_named(tmp_path, others, match):
    name = write(tmp_path / "x.mseed", trace(), *others)
    with pytest.raises(DataError, match=match):
        load_array(name, tmp_path)


def test_small_differences_in_time_and_rate_are_none(tmp_path):
    late = trace(0.003, channel="BHN", rate=100.0 + 1e-5)
    found = load_array(write(tmp_path / "x.mseed", trace(), late), tmp_path)
    assert found.shape == (2, 500)
    again = trace(7.0005, data=COUNTS[::-1])
    assert load_array(write(tmp_path / "y.mseed", trace(), again), tmp_path).shape == (1, 1200)


@pytest.fixture
def stations(tmp_path):
    rows = {
        (s, c): COUNTS + i
        for i, (s, c) in enumerate(
            [("BBB", "BHZ"), ("AAA", "BHZ"), ("AAA", "BHN"), ("BBB", "BHN"), ("BBB", "LHZ")]
        )
    }
    traces = [trace(station=s, channel=c, data=x, location="00") for (s, c), x in rows.items()]
    write(tmp_path / "x.mseed", *traces)
    return rows


@pytest.mark.parametrize(
    ("key", "rows"),
    [
        ("AAA.BHZ", [("AAA", "BHZ")]),
        ("BBB.bhz", [("BBB", "BHZ")]),
        ("XX.BBB.00.BHZ", [("BBB", "BHZ")]),
        ("*.*.*.BHZ", [("AAA", "BHZ"), ("BBB", "BHZ")]),
        ("*.BBB.*.BH?", [("BBB", "BHN"), ("BBB", "BHZ")]),
        ("AAA.*", [("AAA", "BHN"), ("AAA", "BHZ")]),
        ("LHZ", [("BBB", "LHZ")]),
    ],
)
def test_a_key_selects_channels_in_the_order_of_their_ids(tmp_path, stations, key, rows):
    found = load_array(f"x.mseed:{key}", tmp_path)
    np.testing.assert_array_equal(found, np.stack([stations[r] for r in rows]))


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("BHZ", r"several channels of 'x.mseed': XX.AAA.00.BHZ, XX.BBB.00.BHZ; choose one"),
        ("BHZ", r"or all, 'x.mseed:\*.\*.\*.BHZ'"),
        ("BH*", "XX.AAA.00.BHN, XX.AAA.00.BHZ, XX.BBB.00.BHN"),
        ("AAA.LHZ", "no channel 'AAA.LHZ' in 'x.mseed'; .*XX.AAA.00.BHN"),
        ("XX.AAA.BHZ", "expected a channel, such as 'BHZ', 'STATION.BHZ' or 'NET.STA.LOC.CHA'"),
        ("BHX", "did you mean 'BHZ'"),
    ],
)
def test_a_key_that_leaves_a_choice_lists_the_ids(tmp_path, stations, key, match):
    with pytest.raises(DataError, match=match):
        load_array(f"x.mseed:{key}", tmp_path)


def test_an_empty_location_is_written_in_either_way(tmp_path):
    name = write(tmp_path / "x.mseed", trace())
    for key in ("XX.AAA..BHZ", "XX.AAA.--.BHZ"):
        np.testing.assert_array_equal(load_array(f"{name}:{key}", tmp_path), COUNTS[None])


def test_files_of_events_have_one_rate_and_the_same_components(tmp_path):
    three = lambda start, station, rate=100.0, kinds="BHE BHN BHZ": [
        trace(start, rate, c, station) for c in kinds.split()
    ]
    write(tmp_path / "e2.mseed", *three(0, "AAA"))
    write(tmp_path / "e10.mseed", *three(9e5, "BBB"))
    assert load_array("e*.mseed", tmp_path).shape == (2, 3, 500)
    write(tmp_path / "e11.mseed", *three(0, "AAA", rate=200))
    said = "'e11.mseed' has sampling rate 200 Hz and 'e2.mseed' 100 Hz: files that are stacked"
    with pytest.raises(DataError, match=said):
        load_array("e*.mseed", tmp_path)
    write(tmp_path / "e11.mseed", *three(0, "AAA", kinds="BH1 BH2 BHZ"))
    with pytest.raises(DataError, match="'e11.mseed' has channels 1, 2, Z and 'e2.mseed' E, N, Z"):
        load_array("e*.mseed", tmp_path)
    assert load_array("e*.mseed:BHZ", tmp_path).shape == (3, 1, 500)


def test_files_of_several_stations_have_the_same_stations(tmp_path):
    write(tmp_path / "e1.mseed", trace(), trace(station="BBB"))
    write(tmp_path / "e2.mseed", trace(), trace(station="CCC"))
    with pytest.raises(DataError, match="'e2.mseed' has channels XX.AAA..BHZ, XX.CCC..BHZ"):
        load_array("e*.mseed", tmp_path)


@pytest.mark.parametrize("name", ["x.ms", "x.msd", "x.MINISEED", "XX.AAA.00.BHZ.D.2020.001", "x"])
def test_miniseed_may_have_any_name(tmp_path, name):
    write(tmp_path / name, trace())
    for reference in (name, f"{name}:BHZ", {"file": name, "key": "XX.AAA..BHZ"}):
        np.testing.assert_array_equal(load_array(reference, tmp_path), COUNTS[None])
    if name.startswith("XX"):
        write(tmp_path / name.replace("001", "002"), trace(86400))
        assert load_array("XX.AAA.00.BHZ.D.2020.*:BHZ", tmp_path).shape == (2, 1, 500)


@pytest.mark.parametrize("name", ["x.sac", "x.BHZ"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sac_is_read(tmp_path, name, order):
    data = COUNTS.astype(np.float32)
    trace(data=data).write(str(tmp_path / name), "SAC", byteorder=order)
    np.testing.assert_array_equal(load_array(name, tmp_path), data[None])
    np.testing.assert_array_equal(load_array(f"{name}:AAA.BHZ", tmp_path), data[None])


@pytest.mark.parametrize(("at", "value"), [(340, 2), (420, 0)])  # spectra; samples at uneven times
def test_sac_files_of_other_things_are_refused(tmp_path, at, value):
    trace(data=COUNTS.astype(np.float32)).write(str(tmp_path / "x.sac"), "SAC", byteorder="<")
    held = bytearray((tmp_path / "x.sac").read_bytes())
    held[at : at + 4] = value.to_bytes(4, "little")
    (tmp_path / "x.sac").write_bytes(held)
    with pytest.raises(
        DataError, match="XX.AAA..BHZ of 'x.sac' is no series of samples at regular"
    ):
        load_array("x.sac", tmp_path)


def test_what_is_no_seismogram_is_said(tmp_path):
    (tmp_path / "x.mseed").write_bytes(b"\x80\x04 a pickle that obspy would load")
    with pytest.raises(DataError, match="cannot read 'x.mseed': it is no MiniSEED or SAC file"):
        load_array("x.mseed", tmp_path)
    text = np.frombuffer(b"state of health", "S1")
    write(tmp_path / "log.mseed", trace(data=text, channel="LOG"), trace())
    with pytest.raises(DataError, match="XX.AAA..LOG of 'log.mseed' holds text"):
        load_array("log.mseed", tmp_path)


def test_a_channel_beside_one_of_text_is_read(tmp_path):
    text = np.frombuffer(b"state of health", "S1")
    name = write(tmp_path / "log.mseed", trace(data=text, channel="LOG"), trace())
    np.testing.assert_array_equal(load_array(f"{name}:BHZ", tmp_path), COUNTS[None])


def test_damaged_records_are_no_gap(tmp_path):
    data = np.arange(5000, dtype=np.int32) ** 2
    obspy.Stream([trace(data=data)]).write(str(tmp_path / "x.mseed"), "MSEED", reclen=512)
    held = bytearray((tmp_path / "x.mseed").read_bytes())
    held[1024:1536] = b"\xff" * 512
    (tmp_path / "x.mseed").write_bytes(held)
    with pytest.raises(DataError, match="'x.mseed'"):
        load_array("x.mseed", tmp_path)


def test_a_file_that_states_too_many_samples_is_refused(tmp_path, monkeypatch):
    name = write(tmp_path / "x.mseed", trace(data=np.zeros(50_000, np.int32)))
    monkeypatch.setenv(VARIABLE, "0.0001")
    with pytest.raises(DataError, match=rf"x.mseed states an array of .*set {VARIABLE}=1"):
        load_array(name, tmp_path)
