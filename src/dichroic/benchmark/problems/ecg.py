"""Two heartbeats in one electrocardiogram: a real one, and a simulated, weaker and faster one over it.

As in a recording of a mother and her unborn child, the views are the strong heartbeat alone, and both:

    alone   y = strong + η,      both   y = strong + ¼ weak + η,

windows of 0.6 s at 120 Hz around every R peak that a detector finds in what is observed. Heights are in units
of the strong R peak in the training part; `η` is white, of 0.01. The weak heartbeat has a rate of its own, so its
beats are anywhere in a window. It is a sum of bumps, after McSharry et al., IEEE TBME 50, 2003,

    w(t) = Σ_j a_j Σ_i h_i exp(−(t − t_j − τ_i)² / 2 s_i²),    i = P, Q, R, S, T,

at beats `t_j` whose distances are normal (2.3 a second, 4%), with heights and lengths that vary from beat to beat.

The strong one is the electrocardiogram of `scipy.datasets` (from PhysioNet's MIT-BIH record 208, ODC-By): five
minutes at 360 Hz with ectopic beats, wandering and noise of muscles; `signals/ecg.dat` in the data folder, an npz
file with the array `ecg`, or where pooch is installed what SciPy fetches. Both are filtered to 3 … 45 Hz.

Held-out observations are of the last three tenths of the time. The views are of the same seven tenths, as of two
electrodes of which one is too far away for the weak heartbeat: `both` several times, each with another simulated
heartbeat. (Were they of different beats, what is new in the strong ones of `both` would be learned as weak.)
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import datasets, signal

from dichroic.benchmark.problems.remote import DATA_VARIABLE, find_file
from dichroic.errors import DataError

FILE = "signals/ecg.dat"
RAW_RATE, RATE = 360, 120  # samples a second
BAND = (3.0, 45.0)  # Hz
BEFORE, AFTER = 30, 42  # samples of a window, from the R peak
WINDOW = BEFORE + AFTER
HEIGHT, NOISE = 0.25, 0.01  # of the weak R peak, and of η, in units of the strong one
TRAINING, STOP = 0.7, 0.1  # of the time; of that, for stopping
BEATS = 2.3  # a second, of the weak heartbeat
VARIATION = 0.04  # of the distance between two of its beats
WAVES = (  # of one of its beats: time and width in seconds, height
    (-0.10, 0.02, 0.12),
    (-0.018, 0.006, -0.12),
    (0.0, 0.008, 1.0),
    (0.018, 0.007, -0.2),
    (0.13, 0.03, 0.18),
)
HEIGHTS = 0.1  # by which heights of beats and of waves vary
STRETCH = 0.05  # by which a beat's length varies
_QRS = (5.0, 25.0)  # Hz, where the detector looks
_REFRACTORY = 0.3  # seconds from a beat in which there is no other
_THRESHOLD = 0.25  # of the median of the largest energies in two seconds


@dataclass(frozen=True)
class Windows:
    """Windows `(n, WINDOW)` around R peaks: what is observed, and the truth of both sources."""

    y: np.ndarray
    strong: np.ndarray
    weak: np.ndarray
    peaks: np.ndarray


def load_ecg(data_dir: str | Path | None = None) -> np.ndarray:
    """The electrocardiogram `(samples,)` at 360 Hz; raises `DataError` where it cannot be had."""
    path = find_file(FILE, data_dir)
    if path is None:
        try:
            return np.asarray(datasets.electrocardiogram(), float)
        except (ImportError, OSError) as error:
            raise DataError(
                f"no {FILE} in the data folder: give the folder as --data-dir or as the variable "
                f"{DATA_VARIABLE}, or pip install pooch to fetch it"
            ) from error
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ecg = np.asarray(arrays["ecg"], float)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not an npz file with the array ecg") from error
    if ecg.ndim != 1:
        raise DataError(f"{path}: an electrocardiogram of shape {ecg.shape}, expected (samples,)")
    return ecg


def filtered(ecg: np.ndarray) -> np.ndarray:
    """An electrocardiogram at 360 Hz in the `BAND`, at 120 Hz."""
    band = signal.butter(3, BAND, "bandpass", fs=RAW_RATE, output="sos")
    return signal.decimate(
        signal.sosfiltfilt(band, ecg - ecg.mean()), RAW_RATE // RATE, ftype="fir"
    )


def simulated(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A weak heartbeat `(samples,)` at 120 Hz, filtered, with R peaks of about one."""
    count = samples * RAW_RATE // RATE
    time, out = np.arange(count) / RAW_RATE, np.zeros(count)
    beat = rng.uniform(-1, 0) / BEATS
    while beat < time[-1] + 1:
        height, stretch = 1 + HEIGHTS * rng.normal(), 1 + STRETCH * rng.normal()
        for shift, width, wave in WAVES:
            centre, s = beat + shift * stretch, width * stretch
            near = slice(*np.searchsorted(time, [centre - 6 * s, centre + 6 * s]))
            bump = np.exp(-0.5 * ((time[near] - centre) / s) ** 2)
            out[near] += height * wave * (1 + HEIGHTS * rng.normal()) * bump
        beat += (1 + VARIATION * rng.normal()) / BEATS
    return filtered(out)


def r_peaks(ecg: np.ndarray) -> np.ndarray:
    """The samples of the R peaks of the strongest heartbeat in a filtered electrocardiogram at 120 Hz.

    Maxima of the smoothed energy between 5 and 25 Hz above a threshold, then the highest sample near each
    (Pan and Tompkins, IEEE TBME 32, 1985, simplified).
    """
    band = signal.butter(2, _QRS, "bandpass", fs=RATE, output="sos")
    energy = np.convolve(signal.sosfiltfilt(band, ecg) ** 2, np.hanning(13), "same")
    parts = energy[: energy.size // (2 * RATE) * 2 * RATE].reshape(-1, 2 * RATE)
    least = _THRESHOLD * np.median(parts.max(axis=1))
    found, _ = signal.find_peaks(energy, height=least, distance=round(_REFRACTORY * RATE))
    near = found[:, None] + np.arange(-8, 9)
    highest = np.argmax(ecg[np.clip(near, 0, ecg.size - 1)], axis=1)
    peaks = np.take_along_axis(near, highest[:, None], axis=1)[:, 0]
    return np.unique(np.clip(peaks, 0, ecg.size - 1))


def cut(ecg: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """The windows `(n, WINDOW)` around `peaks`, which must be that far from the ends."""
    return ecg[peaks[:, None] + np.arange(-BEFORE, AFTER)]


def strong_heartbeat(ecg: np.ndarray) -> np.ndarray:
    """The real heartbeat, filtered, in units of its median R peak in the training part.

    Raises `DataError` where it is shorter than a minute or has no beats.
    """
    if ecg.size < 60 * RAW_RATE:
        raise DataError(f"an electrocardiogram of {ecg.size} samples; needs a minute at 360 Hz")
    x = filtered(ecg)
    first = x[: int(TRAINING * x.size)]
    peaks = r_peaks(first)
    if not peaks.size or not np.median(first[peaks]) > 0:
        raise DataError("no R peak was found in the electrocardiogram")
    return x / np.median(first[peaks])


def observe(
    rng: np.random.Generator, strong: np.ndarray, *, held_out: bool, weak: bool = True
) -> Windows:
    """Windows of the training or held-out time, with a new weak heartbeat over the strong one (or none)."""
    other = simulated(rng, strong.size) if weak else np.zeros(strong.size)
    y = strong + HEIGHT * other + NOISE * rng.normal(size=strong.size)
    edge = int(TRAINING * strong.size)
    low, high = (edge, strong.size) if held_out else (0, edge)
    peaks = r_peaks(y)
    peaks = peaks[(peaks >= low + BEFORE) & (peaks <= high - AFTER)]
    return Windows(cut(y, peaks), cut(strong, peaks), cut(other, peaks), peaks)


def training_arrays(
    ecg: np.ndarray, seed: int, *, shifts: int = 1, repeats: int = 16
) -> dict[str, np.ndarray]:
    """All that the problem file refers to: windows of both views, and which are kept for stopping.

    Windows of the view `alone` are also taken up to `shifts` samples earlier and later, as a detector errs by
    that much; those of `both` with `repeats` simulated heartbeats.
    """
    rng = np.random.default_rng([6, seed])
    strong = strong_heartbeat(ecg)
    last = TRAINING * (1 - STOP) * strong.size
    alone = observe(rng, strong, held_out=False, weak=False).peaks
    moved = (alone[:, None] + np.arange(-shifts, shifts + 1)).ravel()
    moved = moved[(moved >= BEFORE) & (moved <= TRAINING * strong.size - AFTER)]
    quiet = cut(strong, moved)
    both = [observe(rng, strong, held_out=False) for _ in range(repeats)]
    peaks = np.concatenate([w.peaks for w in both])
    noisy = quiet + NOISE * rng.normal(size=quiet.shape)
    return {
        "alone": noisy.astype(np.float32),
        "both": np.concatenate([w.y for w in both]).astype(np.float32),
        "alone_kept": moved >= last,
        "both_kept": peaks >= last,
    }


def held_out_windows(ecg: np.ndarray, seed: int, *, repeats: int = 3) -> Windows:
    """Windows of the held-out time, with `repeats` simulated heartbeats."""
    rng = np.random.default_rng([7, seed])
    strong = strong_heartbeat(ecg)
    several = [observe(rng, strong, held_out=True) for _ in range(repeats)]
    join = lambda name: np.concatenate([getattr(w, name) for w in several])
    return Windows(join("y"), join("strong"), join("weak"), join("peaks"))


def simulated_windows(seed: int, count: int) -> np.ndarray:
    """`count` windows of weak heartbeats at random times, in units of their R peak."""
    rng = np.random.default_rng([8, seed])
    ecg = simulated(rng, 60 * RATE * (1 + count // 500))
    return cut(ecg, rng.integers(BEFORE, ecg.size - AFTER, count))
