"""Recordings of several channels: sound, and EDF and BDF files of physiology."""

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.errors import DataError
from dichroic.io.recorded import Recorded, check_stated, no_key, reader_library, starts_with
from dichroic.io.values import available, listed

EDF, BDF = b"0       ", b"\xffBIOSEMI"  # how the files begin


def read_sound(path: Path, key: str | None) -> Recorded:
    """A recording, `(samples,)` or `(channels, samples)`, with full range 1."""
    no_key(path, key)
    with reader_library("soundfile", "audio", path).SoundFile(path) as file:
        shape = (file.frames, file.channels)
        check_stated(shape, 4, path, path.stat().st_size)
        samples = file.read(dtype="float32")
        common = {"sampling rate": f"{file.samplerate} Hz", "channels": str(file.channels)}
    if len(samples) != shape[0]:
        raise DataError(
            f"{path.name!r} is damaged: it states {shape[0]:,} samples, and has {len(samples):,}"
        )
    return Recorded(np.asarray(samples).T, common)


def read_edf(path: Path, key: str | None) -> Recorded:
    """The channels of an EDF or BDF file, `(channels, samples)`, each in the physical unit that the file states.

    With a key, those whose labels match it (`*` and `?` stand for others). Channels of several sampling rates
    and recordings with gaps (EDF+D) raise a `DataError`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of what the file states and does not hold
        try:
            signals = _chosen(_continuous(path), key, path)
            rates = {s.sampling_frequency for s in signals}
            if len(rates) > 1:
                raise DataError(
                    f"the channels of {path.name!r} differ in sampling rate: "
                    f"{listed([f'{s.label!r} at {_rate(s)}' for s in signals])}; choose those of one rate by "
                    f"their label, '{path.name}:label' (* stands for any characters)"
                )
            samples = len(signals[0].digital)
            held = 2 * path.stat().st_size  # 16 or 24 bits a sample
            check_stated((len(signals), samples), 4, path, held)
            array = np.empty((len(signals), samples), np.float32)
            for row, signal in zip(array, signals, strict=True):
                row[:] = signal.data
        except UserWarning as warning:
            raise DataError(
                f"{path.name!r} is damaged: {warning}; if what is left of it is right, write it anew "
                "(edfio's read_edf and write)"
            ) from warning
    return Recorded(
        array,
        {
            "sampling rate": _rate(signals[0]),
            "channels": ", ".join(s.label for s in signals),
            "units": ", ".join(s.physical_dimension for s in signals),
        },
    )


def _rate(signal: Any) -> str:
    return f"{signal.sampling_frequency:.8g} Hz"


def _continuous(path: Path) -> Any:
    """The recording in an EDF or BDF file, which must have no gaps."""
    edfio = reader_library("edfio", "neuroscience", path)
    if not starts_with(path, EDF, BDF):
        raise DataError(f"cannot read {path.name!r}: it is no EDF or BDF file")
    read = edfio.read_bdf if starts_with(path, BDF) else edfio.read_edf
    found = read(path, header_encoding="latin-1")  # units such as µV
    if not found.is_continuous:
        raise DataError(
            f"{path.name!r} has gaps (EDF+D), which are not read: write its continuous parts to files of their own"
        )
    return found


def _chosen(recording: Any, key: str | None, path: Path) -> Sequence[Any]:
    """The channels of `recording` whose labels match `key`; in the order of the file."""
    signals = recording.signals
    labels = [s.label for s in signals]
    if not signals:
        raise DataError(f"{path.name!r} has no channels")
    if key is None:
        return signals
    found = [s for s in signals if s.label == key] or [
        s for s in signals if fnmatchcase(s.label.upper(), key.upper())
    ]
    if not found:
        raise DataError(f"no channel {key!r} in {path.name!r}; {available(key, labels)}")
    return found
