"""Sound, and recordings of physiology (EDF, BDF), as their own libraries write them."""

import edfio
import numpy as np
import pytest
import soundfile

from dichroic.errors import DataError, ShapeError
from dichroic.io import load_array
from dichroic.runtime.limits import VARIABLE


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Sound.


@pytest.mark.parametrize("channels", [1, 2])
def test_sounds_that_are_stacked_have_one_rate(tmp_path, rng, channels):
    sound = 0.1 * rng.normal(size=(800, channels))
    soundfile.write(tmp_path / "a2.wav", sound, 8000)
    soundfile.write(tmp_path / "a10.wav", sound, 8000)
    assert load_array("*.wav", tmp_path).shape[0] == 2
    soundfile.write(tmp_path / "a11.wav", sound, 16000)
    with pytest.raises(DataError, match="'a11.wav' has sampling rate 16000 Hz and 'a2.wav' 8000"):
        load_array("*.wav", tmp_path)
    with pytest.raises(DataError, match="sampling rate"):  # where a part of them is read
        load_array("*.wav", tmp_path, lambda shape: slice(2, 3))


def test_sounds_that_are_stacked_have_as_many_channels(tmp_path, rng):
    soundfile.write(tmp_path / "a.wav", 0.1 * rng.normal(size=(800, 2)), 8000)
    soundfile.write(tmp_path / "b.wav", 0.1 * rng.normal(size=(800, 1)), 8000)
    with pytest.raises(DataError, match="'b.wav' has channels 1 and 'a.wav' 2"):
        load_array("*.wav", tmp_path)
    soundfile.write(tmp_path / "b.wav", 0.1 * rng.normal(size=(700, 2)), 8000)
    with pytest.raises(ShapeError, match=r"'b.wav' has shape \(2, 700\) and 'a.wav' \(2, 800\)"):
        load_array("*.wav", tmp_path)


@pytest.mark.parametrize("name", ["x.aiff", "x.AIF", "x.ogg", "x.flac", "x.wav"])
def test_sound_may_end_otherwise(tmp_path, name):
    sound = 0.5 * np.sin(np.arange(4000) / 9)
    kind = {"x.AIF": "aiff"}.get(name, name[2:])
    soundfile.write(tmp_path / name, sound, 8000, format=kind)
    found = load_array(name, tmp_path)
    np.testing.assert_allclose(found, sound, atol=0.05 if kind == "ogg" else 2**-15)
    (tmp_path / name).rename(tmp_path / "sound.dat")
    np.testing.assert_array_equal(load_array("sound.dat", tmp_path), found)


def test_sound_is_bounded_by_what_it_states(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "x.flac", np.zeros(100_000), 8000)
    monkeypatch.setenv(VARIABLE, "0.0001")
    with pytest.raises(DataError, match=rf"x.flac states an array of .*set {VARIABLE}=1"):
        load_array("x.flac", tmp_path)


# EDF and BDF.


def signal(rng, label, rate=100, unit="uV"):
    return edfio.EdfSignal(
        rng.uniform(-90, 90, size=10 * rate),
        rate,
        label=label,
        physical_dimension=unit,
        physical_range=(-100, 100),
    )


@pytest.fixture
def sleep(tmp_path, rng):
    signals = [signal(rng, "EEG Fpz-Cz"), signal(rng, "EEG Pz-Oz"), signal(rng, "Resp", 10)]
    notes = [edfio.EdfAnnotation(2, 1, "stage 2")]
    edfio.Edf(signals, annotations=notes).write(tmp_path / "x.edf")
    return {s.label: s.data for s in signals}


@pytest.mark.parametrize(
    ("key", "labels"),
    [
        ("EEG Pz-Oz", ["EEG Pz-Oz"]),
        ("eeg*", ["EEG Fpz-Cz", "EEG Pz-Oz"]),
        ("Resp", ["Resp"]),
    ],
)
def test_channels_of_edf_are_in_physical_units(tmp_path, sleep, key, labels):
    for reference in (f"x.edf:{key}", {"file": "x.edf", "key": key}):
        found = load_array(reference, tmp_path)
        np.testing.assert_allclose(found, [sleep[k] for k in labels], atol=1e-4)


def test_a_mistake_in_edf_is_said(tmp_path, sleep):
    said = (
        "differ in sampling rate: 'EEG Fpz-Cz' at 100 Hz, .* 'Resp' at 10 Hz; choose those of one"
    )
    with pytest.raises(DataError, match=said):
        load_array("x.edf", tmp_path)
    with pytest.raises(DataError, match="no channel 'EEG Fz' in 'x.edf'; .*EEG Fpz-Cz, EEG Pz-Oz"):
        load_array("x.edf:EEG Fz", tmp_path)
    (tmp_path / "y.edf").write_bytes(b"1       no EDF")
    with pytest.raises(DataError, match="cannot read 'y.edf': it is no EDF or BDF file"):
        load_array("y.edf", tmp_path)


@pytest.mark.parametrize("name", ["x.bdf", "x.edf", "x"])
def test_bdf_is_read_by_any_name(tmp_path, rng, name):
    data = rng.uniform(-90, 90, size=(2, 1000))
    rows = [
        edfio.BdfSignal(x, 100, label=f"A{i}", physical_range=(-100, 100))
        for i, x in enumerate(data)
    ]
    edfio.Bdf(rows).write(tmp_path / "made.bdf")
    (tmp_path / "made.bdf").rename(tmp_path / name)
    np.testing.assert_allclose(load_array(name, tmp_path), data, atol=1e-4)


def test_recordings_that_are_stacked_have_one_rate_and_the_same_channels(tmp_path, rng):
    for i, (rate, label, unit) in enumerate([(100, "C3", "uV"), (100, "C3", "uV")]):
        edfio.Edf([signal(rng, label, rate, unit)]).write(tmp_path / f"x{i}.edf")
    assert load_array("x*.edf", tmp_path).shape == (2, 1, 1000)
    for made, said in [
        ((200, "C3", "uV"), "sampling rate 200 Hz and 'x0.edf' 100 Hz"),
        ((100, "C4", "uV"), "channels C4 and 'x0.edf' C3"),
        ((100, "C3", "mV"), "units mV and 'x0.edf' uV"),
    ]:
        rate, label, unit = made
        edfio.Edf([signal(rng, label, rate, unit)]).write(tmp_path / "x2.edf")
        with pytest.raises(DataError, match=f"'x2.edf' has {said}"):
            load_array("x*.edf", tmp_path)


def test_units_need_not_be_ascii(tmp_path, sleep):
    held = (tmp_path / "x.edf").read_bytes().replace(b"uV ", "µV ".encode("latin-1"))
    (tmp_path / "y.edf").write_bytes(held)
    np.testing.assert_array_equal(
        load_array("y.edf:Resp", tmp_path), load_array("x.edf:Resp", tmp_path)
    )


def test_a_recording_that_was_cut_or_has_gaps_is_refused(tmp_path, sleep):
    held = (tmp_path / "x.edf").read_bytes()
    (tmp_path / "cut.edf").write_bytes(held[:-3000])
    with pytest.raises(DataError, match="'cut.edf' is damaged: .*write it anew"):
        load_array("cut.edf:Resp", tmp_path)
    late = held.replace(b"EDF+C", b"EDF+D").replace(b"+5\x14\x14", b"+7\x14\x14")
    assert late != held
    (tmp_path / "gap.edf").write_bytes(late)
    with pytest.raises(DataError, match=r"'gap.edf' has gaps \(EDF\+D\)"):
        load_array("gap.edf:Resp", tmp_path)


def test_a_recording_is_bounded(tmp_path, rng, monkeypatch):
    edfio.Edf([signal(rng, "C3", 1000)]).write(tmp_path / "x.edf")
    monkeypatch.setenv(VARIABLE, "0.000001")
    assert load_array("x.edf", tmp_path).shape == (1, 10_000)  # no larger than the file holds
