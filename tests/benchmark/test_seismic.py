"""Seismic records: the local cosine transform, amplitudes and levels, injections, and a small separation."""

import numpy as np
import pytest

from dichroic.benchmark.problems import seismic
from dichroic.benchmark.problems.local_cosine import (
    inverse_local_cosine,
    local_cosine,
    tiles,
    untile,
)
from dichroic.benchmark.problems.remote import DATA_VARIABLE, find_file
from dichroic.benchmark.problems.seismic_baselines import average_noise, best_band, wiener
from dichroic.errors import DataError, ShapeError
from dichroic.io import load_problem, load_view
from dichroic.metrics import coverage, output_snr
from dichroic.separation.separator import Separator

ARRIVAL, SAMPLES, RATE = 3000, 4800, 100  # of the raw records
EXAMPLE = "examples/earthquakes/problem.yaml"


def records(rng, count, level=8.0, centres=(6, 6)):
    """White noise, and from the arrival on decaying noise of 4 Hz of bandwidth; every record of its own size."""
    time = np.arange(SAMPLES - ARRIVAL) / RATE
    centre = rng.uniform(*centres, size=(count, 1, 3, 1))
    frequencies = centre + rng.uniform(-2, 2, size=(count, 1, 3, 24))
    phases = rng.uniform(0, 2 * np.pi, size=frequencies.shape)
    waves = np.cos(2 * np.pi * frequencies * time[:, None, None] + phases).mean(axis=-1)
    quake = level * waves * np.exp(-time / 4)[:, None]
    size = 10 ** rng.uniform(-1, 1, size=(count, 1, 1))
    out = 0.05 * rng.normal(size=(count, SAMPLES, 3))
    out[:, ARRIVAL:] += quake
    return size * out


@pytest.fixture
def data(rng, tmp_path):
    (tmp_path / "signals").mkdir()
    np.savez(tmp_path / seismic.FILE, waveforms=records(rng, 12), p_index=np.full(12, ARRIVAL))
    return tmp_path


def test_the_transform_is_orthonormal_and_inverts(rng):
    basis = local_cosine(np.eye(96), 16).reshape(96, -1)
    np.testing.assert_allclose(basis @ basis.T, np.eye(96), atol=1e-12)
    x = rng.normal(size=(2, 3, 96))
    np.testing.assert_allclose(inverse_local_cosine(local_cosine(x, 16)), x, atol=1e-12)


def test_a_tone_is_in_the_bins_of_its_frequency():
    power = local_cosine(np.sin(2 * np.pi * 5 * np.arange(640) / 50), 32) ** 2
    bins = power.sum(axis=0) / power.sum()
    assert bins[5:8].sum() > 0.97  # 5 Hz is at bin 6.4 of 0.78 Hz each


def test_basis_functions_are_local():
    one = np.zeros((10, 16))
    one[4, 3] = 1
    wave = inverse_local_cosine(one)
    assert np.all(wave[: 4 * 16 - 8] == 0)
    assert np.all(wave[5 * 16 + 8 :] == 0)


def test_tiles_cover_the_coefficients_once(rng):
    c = rng.normal(size=(3, 20, 32))
    parts = tiles(c, 4, 8)
    np.testing.assert_array_equal(parts[1], c[0, :4, 8:16])
    np.testing.assert_array_equal(untile(parts, 20, 32), c)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="blocks of 32"):
        local_cosine(np.zeros(100), 32)
    with pytest.raises(ShapeError, match="not covered"):
        tiles(np.zeros((1, 20, 32)), 3, 8)


def test_amplitudes_are_found_where_noise_is_as_strong(rng):
    g = np.exp(-np.arange(seismic.FRAMES) / 6)[:, None] * np.linspace(0.2, 1.5, seismic.BINS)
    g /= np.sqrt(np.mean(g**2))
    d = rng.uniform(0.5, 2, size=(200, seismic.BINS))
    a = rng.uniform(1, 4, size=200)
    z = rng.normal(size=(2, 200, *g.shape))
    c = d[:, None] * z[0] + a[:, None, None] * g * z[1]
    error = np.log(seismic.amplitudes(c, d, g) / a)
    signal = (a[:, None, None] * g) ** 2
    information = np.sum(2 * (signal / (signal + d[:, None] ** 2)) ** 2, axis=(1, 2))
    z = error * np.sqrt(information)  # in units of the Cramér–Rao bound
    assert abs(z.mean()) < 0.4
    assert 0.8 < z.std() < 1.6


def test_the_noise_level_is_the_root_of_the_spectrum(rng):
    d = seismic.noise_level(3 * rng.normal(size=(50, 768)))
    np.testing.assert_allclose(d.mean(axis=0), 3, rtol=0.1)


def test_dead_channels_are_left_out_and_nothing_of_the_signal_comes_before(rng):
    raw = records(rng, 3, level=150.0)
    raw[1, :, 2] = 0
    traces = seismic.usable_traces(raw, ARRIVAL)
    assert traces.record.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    power = lambda x: np.mean(x**2, axis=1)
    np.testing.assert_allclose(power(traces.before) / power(traces.known), 1, atol=0.4)


def test_training_and_held_out_traces_share_no_record(data):
    train, test = seismic.split_records(seismic.load_traces(data), 0)
    assert not set(train.record) & set(test.record)
    assert len(train.record) + len(test.record) == 36


def test_injected_signals_have_the_ratio_asked_for_and_noise_of_other_records(data):
    traces = seismic.load_traces(data)
    for snr, (y, x, known) in zip((0, 10), seismic.injected(traces, (0, 10), 1), strict=True):
        np.testing.assert_allclose(output_snr(y, x), snr, atol=1e-6)
        noise, clean = y - x, np.repeat(np.flatnonzero(traces.snr >= seismic.CLEAN), 3)
        behind = [np.argmin(np.sum((traces.before - n) ** 2, axis=1)) for n in noise]
        assert np.all(traces.record[behind] != traces.record[clean])
        np.testing.assert_allclose(known, traces.known[behind])


def test_tiles_of_signals_are_waveforms_again(data):
    traces = seismic.load_traces(data)
    parts = seismic.observed_tiles(traces.after, traces.known, seismic.signal_level(traces))
    np.testing.assert_allclose(
        parts.waveforms(parts.y / parts.gain), traces.after, rtol=1e-3, atol=1e-4
    )


def test_the_wiener_filter_gains_where_spectra_differ(data):
    train, test = seismic.split_records(seismic.load_traces(data), 0)
    ((y, x, known),) = seismic.injected(test, (0,), 0)
    level = seismic.signal_level(train)
    own = output_snr(wiener(y, seismic.noise_level(known), level), x).mean()
    average = output_snr(wiener(y, average_noise(train, known), level), x).mean()
    assert own > 5
    assert average > 5
    low, high = best_band(train, (0,), 0)
    assert low <= 4
    assert 8 <= high <= 12


def test_the_problem_file_learns_from_the_arrays_and_beats_the_wiener_filter(
    rng, tmp_path, request
):
    """Every signal has its place in frequency, which their average spectrum does not say."""
    traces = seismic.usable_traces(records(rng, 6, centres=(4, 20)), ARRIVAL)
    train, test = seismic.split_records(traces, 0)
    arrays = seismic.training_arrays(train, 0)
    np.savez(tmp_path / "data.npz", **arrays)
    (tmp_path / "problem.yaml").write_text((request.config.rootpath / EXAMPLE).read_text())
    problem, settings = load_problem(tmp_path / "problem.yaml")
    settings["mixture"] |= {"components": 2, "gaussian_iterations": 1, "final_iterations": 3}
    separator = Separator(problem, settings).fit(progress=False)
    ((y, x, known),) = seismic.injected(test, (0,), 0, per_signal=1)
    parts = seismic.observed_tiles(y, known, arrays["level"])
    operators = {"noise": "identity", "signal": {"diagonal": parts.gain}}
    view = load_view({"observations": parts.y, "operators": operators}, problem, like="after")
    draws = parts.waveforms(separator.separate(view, n_draws=16).draws["signal"])
    own = wiener(y, seismic.noise_level(known), arrays["level"])
    ours = output_snr(draws.mean(axis=0), x).mean()
    assert ours > output_snr(own, x).mean() + 1
    assert coverage(draws, x).value == pytest.approx(0.9, abs=0.06)


@pytest.mark.parametrize(
    "arrays", [{"waveforms": np.zeros((2, 9000, 3))}, {"p_index": [1], "waveforms": np.zeros(3)}]
)
def test_other_files_are_refused(tmp_path, arrays):
    (tmp_path / "signals").mkdir()
    np.savez(tmp_path / seismic.FILE, **arrays)
    with pytest.raises(DataError, match="waveforms"):
        seismic.load_traces(tmp_path)


def test_a_missing_file_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(DataError, match="--data-dir"):
        seismic.load_traces(tmp_path)


def test_records_too_short_are_refused(rng):
    with pytest.raises(DataError, match="before it"):
        seismic.usable_traces(rng.normal(size=(1, 4000, 3)), 1000)


def test_real_records_have_clean_and_other_traces():
    if find_file(seismic.FILE) is None:
        pytest.skip(f"no {seismic.FILE} in the data folder ({DATA_VARIABLE})")
    traces = seismic.load_traces()
    assert np.unique(traces.record).size > 90
    assert 0.5 < np.mean(traces.snr >= seismic.CLEAN) < 0.99
