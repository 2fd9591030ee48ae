"""Two heartbeats: the simulated one, the detector, windows, and a small separation."""

import numpy as np
import pytest

from dichroic.benchmark.problems import ecg
from dichroic.benchmark.problems.remote import DATA_VARIABLE, find_file
from dichroic.errors import DataError
from dichroic.io import load_problem, load_view
from dichroic.metrics import coverage
from dichroic.separation.separator import Separator

EXAMPLE = "examples/heartbeats/problem.yaml"


def recording(rng, seconds=90):
    """A strong heartbeat at 360 Hz: beats of one shape, 1.2 a second, of varying height; and the R peaks' times."""
    time, out = np.arange(seconds * ecg.RAW_RATE) / ecg.RAW_RATE, 0
    beats = np.cumsum(rng.normal(1 / 1.2, 0.03, size=int(1.2 * seconds) - 4)) + 0.5
    for beat in beats:
        shape = np.exp(-0.5 * ((time - beat) / 0.014) ** 2)
        shape += 0.25 * np.exp(-0.5 * ((time - beat - 0.2) / 0.05) ** 2)
        out = out + rng.normal(1, 0.1) * shape
    return 1000 + 300 * out + 2 * rng.normal(size=time.size), beats


@pytest.fixture
def strong(rng):
    return recording(rng)[0]


def snr(estimate, truth):
    return np.mean(10 * np.log10(np.sum(truth**2, 1) / np.sum((estimate - truth) ** 2, 1)))


def test_the_detector_finds_every_beat_also_under_the_weak_heartbeat(rng):
    raw, beats = recording(rng)
    y = ecg.strong_heartbeat(raw)
    y = y + ecg.HEIGHT * ecg.simulated(rng, y.size)
    found = ecg.r_peaks(y) / ecg.RATE
    nearest = found[np.argmin(np.abs(found[:, None] - beats), axis=0)]
    assert found.size == beats.size
    assert np.max(np.abs(nearest - beats)) < 0.03


def test_the_simulated_heartbeat_has_its_rate_and_height(rng):
    x = ecg.simulated(rng, 100 * ecg.RATE)
    peaks = ecg.r_peaks(x)
    gaps = np.diff(peaks) / ecg.RATE
    assert np.mean(gaps) == pytest.approx(1 / ecg.BEATS, rel=0.03)
    assert np.std(gaps) == pytest.approx(ecg.VARIATION / ecg.BEATS, rel=0.3)
    assert 0.5 < np.median(x[peaks]) < 1.1  # the band takes some of the height
    other = ecg.simulated(rng, 100 * ecg.RATE)
    assert abs(np.corrcoef(x, other)[0, 1]) < 0.1


def test_heights_are_in_units_of_the_strong_peak(strong):
    x = ecg.strong_heartbeat(strong)
    assert np.median(x[ecg.r_peaks(x)]) == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(ecg.strong_heartbeat(7 * strong - 100), x, atol=1e-9)


def test_training_and_held_out_windows_are_of_different_times(rng, strong):
    x = ecg.strong_heartbeat(strong)
    early = ecg.observe(rng, x, held_out=False).peaks
    late = ecg.observe(rng, x, held_out=True).peaks
    assert early.max() + ecg.AFTER <= ecg.TRAINING * x.size <= late.min() - ecg.BEFORE + 1
    assert early.size > 2 * late.size - 5


def test_windows_are_the_sum_that_the_problem_states(strong):
    w = ecg.held_out_windows(strong, 0, repeats=2)
    assert w.y.shape == w.strong.shape == w.weak.shape == (w.peaks.size, ecg.WINDOW)
    noise = w.y - w.strong - ecg.HEIGHT * w.weak
    assert noise.std() == pytest.approx(ecg.NOISE, rel=0.05)
    assert np.median(w.strong[:, ecg.BEFORE]) == pytest.approx(1, abs=0.1)


def test_windows_for_stopping_are_the_last_of_the_training_time(strong):
    arrays = ecg.training_arrays(strong, 0, repeats=3)
    for view in ("alone", "both"):
        kept = arrays[f"{view}_kept"]
        assert arrays[view].shape == (kept.size, ecg.WINDOW)
        assert 0.03 < kept.mean() < 0.2


def test_the_problem_file_finds_the_weak_heartbeat(strong, tmp_path, request):
    arrays = ecg.training_arrays(strong, 0, repeats=6)
    np.savez(tmp_path / "data.npz", **arrays)
    (tmp_path / "problem.yaml").write_text((request.config.rootpath / EXAMPLE).read_text())
    problem, settings = load_problem(tmp_path / "problem.yaml")
    settings["mixture"] |= {
        "components": 4,
        "gaussian_iterations": 3,
        "iterations": 1,
        "final_iterations": 2,
    }
    separator = Separator(problem, settings).fit(progress=False)
    w = ecg.held_out_windows(strong, 0, repeats=1)
    view = load_view({"observations": w.y.astype(np.float32)}, problem, like="both")
    draws = separator.separate(view, n_draws=16).draws["weak"]
    subtracted = (w.y - arrays["alone"].mean(axis=0)) / ecg.HEIGHT
    assert snr(draws.mean(axis=0), w.weak) > snr(subtracted, w.weak) + 3
    assert coverage(draws, w.weak).value > 0.8


def test_other_files_are_refused(tmp_path):
    (tmp_path / "signals").mkdir()
    with (tmp_path / ecg.FILE).open("wb") as file:
        np.savez(file, heart=np.zeros(10))
    with pytest.raises(DataError, match="the array ecg"):
        ecg.load_ecg(tmp_path)
    with (tmp_path / ecg.FILE).open("wb") as file:
        np.savez(file, ecg=np.zeros((10, 2)))
    with pytest.raises(DataError, match="shape"):
        ecg.load_ecg(tmp_path)


def test_without_the_file_or_pooch_it_says_what_to_do(tmp_path, monkeypatch):
    def missing():
        raise ImportError("pooch")

    monkeypatch.setattr(ecg.datasets, "electrocardiogram", missing)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(DataError, match="--data-dir"):
        ecg.load_ecg(tmp_path)


@pytest.mark.parametrize("raw", [np.zeros(1000), np.zeros(90 * 360)])
def test_recordings_without_beats_are_refused(raw):
    with pytest.raises(DataError):
        ecg.strong_heartbeat(raw)


def test_the_real_recording_has_a_beat_about_every_six_tenths_of_a_second():
    if find_file(ecg.FILE) is None:
        pytest.skip(f"no {ecg.FILE} in the data folder ({DATA_VARIABLE})")
    peaks = ecg.r_peaks(ecg.strong_heartbeat(ecg.load_ecg()))
    assert 0.5 < np.median(np.diff(peaks)) / ecg.RATE < 0.7
