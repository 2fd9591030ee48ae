"""What seismic traces are denoised with where nothing is learned but spectra.

    band-pass   a Butterworth filter of order 4, forwards and back, of the band that does best on training traces
    Wiener      x̂(t, f) = a² g² / (a² g² + d²) · Y(t, f)

The second is in the basis of `dichroic.benchmark.problems.seismic`, with the amplitude of largest likelihood. The
signal's `g` is the average over training traces: a spectrum, or a spectrum times an envelope. The noise's `d` is
the average spectrum of training traces at the power of the trace's own noise, or the trace's own spectrum.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from scipy import signal as filters

from dichroic.benchmark.problems.local_cosine import inverse_local_cosine, local_cosine
from dichroic.benchmark.problems.seismic import (
    BLOCK,
    RATE,
    Traces,
    amplitudes,
    injected,
    noise_level,
)
from dichroic.metrics import output_snr

LOW, HIGH = (1.0, 1.5, 2.0, 3.0, 4.0), (6.0, 8.0, 10.0, 12.0, 15.0, 20.0, 24.0)  # Hz


def band_passed(traces: np.ndarray, band: tuple[float, float]) -> np.ndarray:
    """The `traces` `(n, samples)` in a band of frequencies in Hz."""
    sections = filters.butter(4, band, "bandpass", fs=RATE, output="sos")
    return np.asarray(filters.sosfiltfilt(sections, traces))


def best_band(traces: Traces, snr: Sequence[float], seed: int) -> tuple[float, float]:
    """The pair of `LOW` and `HIGH` of largest output for training signals injected at all `snr`."""
    made = injected(traces, snr, seed, per_signal=1)
    score = lambda band: sum(np.mean(output_snr(band_passed(y, band), x)) for y, x, _ in made)
    return max(itertools.product(LOW, HIGH), key=score)


def wiener(mixture: np.ndarray, noise: np.ndarray, signal: np.ndarray) -> np.ndarray:
    """The Wiener filter of windows `(n, WINDOW)` for `noise` `d` `(n, BINS)` and `signal` `g` `(FRAMES, BINS)`."""
    c = local_cosine(mixture, BLOCK)
    power = (amplitudes(c, noise, signal, steady=0)[:, None, None] * signal) ** 2
    return inverse_local_cosine(power / (power + noise[:, None] ** 2) * c)


def average_noise(training: Traces, known: np.ndarray) -> np.ndarray:
    """`d` `(n, BINS)`: the average spectrum of the `training` traces at the power of the `known` noise."""
    d2 = noise_level(training.known) ** 2
    shape = np.mean(d2 / d2.mean(axis=1, keepdims=True), axis=0)
    power = np.mean(noise_level(known) ** 2, axis=1, keepdims=True)
    return np.sqrt(shape * power)
