"""Earthquakes in the noise of their stations: real three-component records aligned on the P arrival.

Before the arrival a trace is noise alone, after it noise and signal, so its two parts are two views of the same
two sources. Amplitudes span 50 dB and every station has noise of its own, so both are divided out: the local
cosine coefficients `Y(t, f)` of a window are in units of the trace's own noise, and

    before   Y / d(f) = noise + η,      after   Y / d(f) = noise + a g(t, f) / d(f) · signal + η,

with `d²` the trace's noise spectrum in the first half of what precedes the arrival, `g²` the average over training
traces of the signal's power (a spectrum times an envelope), and `a` the trace's amplitude. Then `noise` and
`signal` are both of order one, and what is left to learn is how their power is spread over neighbouring frames and
bins: each observation is a tile of 4 frames (2.6 s) × 4 bins (3.1 Hz). `η` is white, of a tenth of the noise.

The amplitude solves moment equations with the weights of Fisher scoring for independent coefficients of variance
`d² + a² g²`, but for one term: `a² ← Σ w (Y² − d²) / Σ w g²`, `w = g² / (d² + a² (g² + 1))²`. The 1, which is the
mean of `g²`, keeps the many quiet coefficients of a strong trace from setting its amplitude, which those of a weak
trace cannot: then `a` means the same at all signal-to-noise ratios. With `u` the mean of `max(Y² − d², 0) / a²`
over traces, `g²(t, f) = Σ_f u Σ_t u / Σ u`, scaled to a mean of one; `a` is taken anew with it.

The file is `signals/seismic.npz` in the data folder: `waveforms` `(n, samples, 3)` at 100 Hz and `p_index`, the
sample of the arrival; 100 Californian records that are published with DeepDenoiser (Zhu, Mousavi and Beroza, IEEE
TGRS 57, 2019) under the MIT licence. Traces are filtered above 1 Hz, where the noise of oceans ends, by a filter
that looks back only, and reduced to 50 Hz. Training and held-out observations are of different records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import signal as filters

from dichroic.benchmark.problems.local_cosine import (
    inverse_local_cosine,
    local_cosine,
    tiles,
    untile,
)
from dichroic.benchmark.problems.remote import DATA_VARIABLE, find_file
from dichroic.errors import DataError

FILE = "signals/seismic.npz"
RATE, LOWEST = 50, 1.0  # of the traces as they are used: samples a second; Hz
WINDOW, BLOCK = 640, 32  # samples: 12.8 s, of frames of 0.64 s and bins of 0.78 Hz
FRAMES, BINS = WINDOW // BLOCK, BLOCK
TILE = (4, 4)  # frames × bins
KNOWN = (30, 798)  # samples of a trace before the arrival, from which its noise spectrum is taken
QUIET = 800  # first sample of the window of noise that is an observation
STRETCHES = 5  # of the known noise, of 2.8 s, whose power is compared
QUIETEST = 1e-3  # power of a bin of noise, at least, relative to the mean of all bins
CLEAN = 20.0  # dB, from which on a trace after its arrival is taken for the truth
_STEPS = 20  # for an amplitude
_LEAST_POWER = 0.02  # of the signal, at least, as a part of what is observed


@dataclass(frozen=True)
class Traces:
    """Filtered traces `(n, samples)` at 50 Hz, the sample of the arrival, and the `record` of each `(n,)`."""

    values: np.ndarray
    arrival: int
    record: np.ndarray

    @property
    def before(self) -> np.ndarray:
        """The window of noise, `(n, WINDOW)`."""
        return self.values[:, QUIET : QUIET + WINDOW]

    @property
    def after(self) -> np.ndarray:
        """The window from the arrival on, `(n, WINDOW)`."""
        return self.values[:, self.arrival : self.arrival + WINDOW]

    @property
    def known(self) -> np.ndarray:
        """The noise that precedes both."""
        return self.values[:, slice(*KNOWN)]

    @property
    def snr(self) -> np.ndarray:
        """Signal-to-noise ratio after the arrival in dB, `(n,)`: of powers, that of the noise subtracted."""
        noise = np.mean(self.before**2, axis=1)
        power = np.maximum(np.mean(self.after**2, axis=1) - noise, 1e-12 * noise)
        return 10 * np.log10(power / noise)

    def select(self, chosen: np.ndarray) -> "Traces":
        """The traces `chosen`."""
        return Traces(self.values[chosen], self.arrival, self.record[chosen])


@dataclass(frozen=True)
class Tiles:
    """Observations of windows: tiles of `y` and `gain` `(n, *TILE)`, and the noise `d` `(windows, BINS)`.

    `gain` is the diagonal operator of the signal; times the noise `d` it takes `signal` to coefficients.
    """

    y: np.ndarray
    gain: np.ndarray
    noise: np.ndarray

    def waveforms(self, signal: np.ndarray) -> np.ndarray:
        """The waveforms `(…, windows, WINDOW)` of the source `signal` `(…, n, *TILE)`."""
        return inverse_local_cosine(self.noise[:, None] * untile(self.gain * signal, FRAMES, BINS))


def load_traces(data_dir: str | Path | None = None) -> Traces:
    """The usable traces of the file; raises `DataError` where it is missing or not what it should be."""
    path = find_file(FILE, data_dir)
    if path is None:
        raise DataError(
            f"no {FILE} in the data folder: give the folder as --data-dir or as the variable {DATA_VARIABLE}"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            waveforms, arrival = arrays["waveforms"], np.unique(arrays["p_index"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not an npz file with waveforms and p_index") from error
    if waveforms.ndim != 3 or arrival.size != 1:
        raise DataError(
            f"{path}: expected waveforms (n, samples, channels) with one p_index for all, got "
            f"{waveforms.shape} and {arrival.size} different ones"
        )
    return usable_traces(waveforms, int(arrival[0]))


def usable_traces(waveforms: np.ndarray, arrival: int) -> Traces:
    """Filtered traces of the channels of `waveforms` `(records, samples, channels)` at 100 Hz that are alive.

    Raises `DataError` where windows before or after the `arrival` would not fit.
    """
    if arrival < 2 * (QUIET + WINDOW) or waveforms.shape[1] < arrival + 2 * WINDOW:
        raise DataError(
            f"an arrival at sample {arrival} of {waveforms.shape[1]}; needs {2 * (QUIET + WINDOW)} samples "
            f"at 100 Hz before it and {2 * WINDOW} after it"
        )
    raw = np.asarray(waveforms, float).swapaxes(1, 2).reshape(-1, waveforms.shape[1])
    high = filters.butter(4, LOWEST, "highpass", fs=2 * RATE, output="sos")
    start = filters.sosfilt_zi(high)[:, None] * raw[None, :, :1]
    moved, _ = filters.sosfilt(high, raw, zi=start)  # causal: no signal before its arrival
    values = filters.decimate(moved, 2, ftype="fir")
    record = np.repeat(np.arange(len(waveforms)), waveforms.shape[2])
    traces = Traces(values, arrival // 2, record)
    power = lambda x: np.mean(x**2, axis=1)
    least = 1e-6 * power(traces.after)  # digitisers have more noise than that; zeros do not
    return traces.select((power(traces.before) > least) & (power(traces.known) > least))


def split_records(traces: Traces, seed: int, held_out: float = 0.3) -> tuple[Traces, Traces]:
    """Training and held-out traces, of different records."""
    records = np.random.default_rng([4, seed]).permutation(np.unique(traces.record))
    chosen = np.isin(traces.record, records[: round(held_out * len(records))])
    return traces.select(~chosen), traces.select(chosen)


def noise_level(known: np.ndarray) -> np.ndarray:
    """`d` `(n, BINS)` of traces of noise `(n, samples)`.

    The median over `STRETCHES` of the mean power, which a burst in one of them does not change, then averaged
    over three bins. The median of a mean of `k` squares is taken to be `(1 − 2 / 9k)³` of what it estimates
    (Wilson and Hilferty, PNAS 17, 1931).
    """
    power = local_cosine(known, BLOCK)[:, 1:-1] ** 2
    parts = [part.mean(axis=1) for part in np.array_split(power, STRETCHES, axis=1)]
    middle = np.median(parts, axis=0) / (1 - 2 * STRETCHES / (9 * power.shape[1])) ** 3
    padded = np.pad(middle, ((0, 0), (1, 1)), mode="edge")
    smooth = 0.25 * padded[:, :-2] + 0.5 * middle + 0.25 * padded[:, 2:]
    return np.sqrt(np.maximum(smooth, QUIETEST * smooth.mean(axis=1, keepdims=True)))


def amplitudes(
    coefficients: np.ndarray, noise: np.ndarray, signal: np.ndarray, *, steady: float = 1.0
) -> np.ndarray:
    """`a` `(n,)` of windows with `coefficients` `(n, FRAMES, BINS)`, their `noise` `d`, and the `signal` `g`.

    `steady` is what the weights add to `g²`; with 0 it is the amplitude of largest likelihood.
    """
    power, d2, g2 = coefficients**2, noise[:, None] ** 2, signal**2
    least = _LEAST_POWER * power.mean(axis=(1, 2))
    a2 = np.maximum(np.mean(power - d2, axis=(1, 2)), least)
    for _ in range(_STEPS):
        w = g2 / (d2 + a2[:, None, None] * (g2 + steady)) ** 2
        a2 = np.maximum(np.sum(w * (power - d2), (1, 2)) / np.sum(w * g2, (1, 2)), least)
    return np.sqrt(a2)


def signal_level(traces: Traces) -> np.ndarray:
    """`g` `(FRAMES, BINS)` of the signals in the windows after the arrival, with a mean square of one."""
    c, d = local_cosine(traces.after, BLOCK), noise_level(traces.known)
    level = np.ones((FRAMES, BINS))
    for _ in range(2):
        a = amplitudes(c, d, level)[:, None, None]
        power = np.maximum(c**2 - d[:, None] ** 2, 0) / a**2
        mean = np.mean(power, axis=0)
        separable = mean.mean(axis=1, keepdims=True) * mean.mean(axis=0) / mean.mean() ** 2
        level = np.sqrt(separable)
    return level


def observed_tiles(windows: np.ndarray, known: np.ndarray, signal: np.ndarray) -> Tiles:
    """Observations of `windows` `(n, WINDOW)` of traces whose noise is `known`; `signal` is `g`."""
    c, d = local_cosine(windows, BLOCK), noise_level(known)
    a = amplitudes(c, d, signal)
    gain = a[:, None, None] * signal / d[:, None]
    cut = lambda x: tiles(x, *TILE).astype(np.float32)
    return Tiles(cut(c / d[:, None]), cut(gain), d)


def training_arrays(traces: Traces, seed: int, stop: float = 0.1) -> dict[str, np.ndarray]:
    """All that the problem file refers to: tiles of both views, the gain, and those kept for stopping.

    These are of a tenth of the records, which the others are not of.
    """
    signal = signal_level(traces)
    d = noise_level(traces.known)
    quiet = local_cosine(traces.before, BLOCK) / d[:, None]
    after = observed_tiles(traces.after, traces.known, signal)
    last = split_records(traces, seed, stop)[1].record
    kept = np.repeat(np.isin(traces.record, last), FRAMES * BINS // np.prod(TILE))
    before = tiles(quiet, *TILE).astype(np.float32)
    return {"before": before, "after": after.y, "gain": after.gain, "kept": kept, "level": signal}


def injected(
    traces: Traces, snr: Sequence[float], seed: int, *, per_signal: int = 3
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Clean signals in the noise of other records, for each `snr` in dB: `(mixture, signal, known)`.

    A signal is a trace after its arrival with `CLEAN` dB or more, scaled to that ratio of powers over the window,
    in the quiet window of `per_signal` traces of other records. The pairs are the same for each ratio.
    """
    rng = np.random.default_rng([5, seed])
    clean = np.flatnonzero(traces.snr >= CLEAN)
    if not clean.size or np.unique(traces.record).size < 2:
        raise DataError(
            f"no trace with {CLEAN:g} dB or more, or no other record to take noise from"
        )
    others = [np.flatnonzero(traces.record != traces.record[i]) for i in clean]
    behind = np.concatenate([rng.choice(o, per_signal) for o in others])
    signal, noise = traces.after[np.repeat(clean, per_signal)], traces.before[behind]
    size = np.sqrt(np.mean(noise**2, 1) / np.mean(signal**2, 1))[:, None]
    scaled = [10 ** (dB / 20) * size * signal for dB in snr]
    return [(x + noise, x, traces.known[behind]) for x in scaled]
