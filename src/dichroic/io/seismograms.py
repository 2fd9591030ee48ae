"""Seismograms: the traces of a MiniSEED or SAC file, on one grid in time.

A trace has an id, `network.station.location.channel`, a start, a sampling rate and samples. The parts of one
channel become one row, NaN where there are gaps; rows need the same rate, start and number of samples.

Other formats that obspy reads are left out: a damaged file can crash it (GSE2), or run code (pickles).
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.errors import DataError
from dichroic.io.recorded import Recorded, check_stated, reader_library
from dichroic.io.values import available, listed

_SAC_BYTES, _SAC_VERSION = 632, 304  # of the header; where it states its version, 6 or 7
_MSEED = re.compile(
    rb"[0-9 \0]{6}[DRQM][ \0]|[0-9]{6}V "
)  # a record of data, or a volume (full SEED)
_ID = ("network", "station", "location", "channel")
_KEYS = {1: _ID[3:], 2: (_ID[1], _ID[3]), 4: _ID}  # what a key of so many parts names
SHIFT = 0.1  # samples by which a part may be off the grid of its channel
OFFSET = 0.5  # samples by which channels may start apart
LISTED = 6  # traces in a message


@dataclass(frozen=True)
class _Row:
    """The samples of one channel; `start` is obspy's time, `rate` in Hz."""

    id: str
    start: Any
    rate: float
    samples: np.ndarray

    def __str__(self):
        return f"{self.id} from {self.start}, {_hertz(self.rate)}, {len(self.samples):,} samples"


def seismic_format(path: Path) -> str | None:
    """obspy's name of the format of the file `path`, by its first bytes, if it is one of seismograms."""
    with path.open("rb") as file:
        begin = file.read(_SAC_BYTES)
    version = begin[_SAC_VERSION : _SAC_VERSION + 4]
    if _MSEED.match(begin):
        return "MSEED"
    either = (int.from_bytes(version, order) in (6, 7) for order in ("little", "big"))
    return "SAC" if len(begin) == _SAC_BYTES and any(either) else None


def read_seismogram(path: Path, key: str | None) -> Recorded:
    """The channels of a MiniSEED or SAC file, `(channels, samples)`, in the order of their ids.

    Samples are as recorded, without calibration; gaps are NaN. A key selects channels: `BHZ`, `STATION.BHZ` or
    `NET.STA.LOC.CHA`, where `*` and `?` stand for others; what it leaves out must be the same for all that it
    selects.

    Raises `DataError` where channels differ in sampling rate, start or length, or parts of one contradict another.
    """
    traces = _traces(path)
    if key is not None:
        traces = _chosen(traces, key, path)
    for trace in traces:
        _check_series(trace, path)
    by_id = groupby(sorted(traces, key=lambda t: t.id), key=lambda t: t.id)
    rows = [_merged(name, list(parts), path) for name, parts in by_id]
    _check_together(rows, path)
    samples = np.stack([r.samples for r in rows])
    return Recorded(samples, {"sampling rate": _hertz(rows[0].rate), "channels": _kinds(rows)})


def _kinds(rows: Sequence[_Row]) -> str:
    """What files that are stacked have in common: the components of a station, or stations and channels."""
    if len(rows) == 1:
        return "one"
    stations = {r.id.rpartition(".")[0] for r in rows}
    return ", ".join(r.id[-1] if len(stations) == 1 else r.id for r in rows)


def _hertz(rate: float) -> str:
    return f"{rate:.8g} Hz"


# What the file holds.


def _traces(path: Path) -> list[Any]:
    """The traces of the file, of which none is empty.

    The file is opened here, as obspy would take a name for a pattern or an address, and unpack archives.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of obspy, about its own dependencies
        obspy = reader_library("obspy", "seismology", path)
    kind = seismic_format(path)
    if kind is None:
        raise DataError(
            f"cannot read {path.name!r}: it is no MiniSEED or SAC file; convert others (obspy's read and write)"
        )
    with warnings.catch_warnings(record=True) as said, path.open("rb") as file:
        warnings.simplefilter("always")
        _check_size(obspy.read(file, format=kind, headonly=True), path)
        file.seek(0)
        traces = obspy.read(file, format=kind)
    for warning in said:
        if warning.category.__name__ == "InternalMSEEDWarning":
            raise DataError(
                f"{path.name!r} is damaged: {str(warning.message).strip()}; if what is left of it is right, "
                "write it anew (obspy's read and write)"
            )
    found = [t for t in traces if len(t.data)]
    if not found:
        raise DataError(f"{path.name!r} holds no samples")
    return found


def _check_size(heads: Any, path: Path) -> None:
    """Raise a `DataError` if the traces state more samples than one array may have."""
    size = path.stat().st_size
    check_stated((sum(int(t.stats.npts) for t in heads),), 4, path, size)


def _check_series(trace: Any, path: Path) -> None:
    """Raise a `DataError` unless `trace` is numbers at regular times."""
    if trace.data.dtype.kind not in "iuf":
        raise DataError(
            f"{trace.id} of {path.name!r} holds text, no samples: choose other channels, '{path.name}:channel'"
        )
    sac = trace.stats.get("sac", {})
    even = sac.get("leven", 1) == 1 and sac.get("iftype", 1) == 1
    if not even or not 0 < trace.stats.sampling_rate < np.inf:
        raise DataError(f"{trace.id} of {path.name!r} is no series of samples at regular times")


def _chosen(traces: Sequence[Any], key: str, path: Path) -> list[Any]:
    """The traces that `key` selects."""
    patterns = key.upper().split(".")
    if len(patterns) not in _KEYS:
        raise DataError(
            f"{path.name}:{key}: expected a channel, such as 'BHZ', 'STATION.BHZ' or 'NET.STA.LOC.CHA'"
        )
    named = _KEYS[len(patterns)]
    wanted = dict(zip(named, (p.replace("--", "") for p in patterns), strict=True))
    found = [
        t for t in traces if all(fnmatchcase(t.stats[k].upper(), p) for k, p in wanted.items())
    ]
    if not found:
        shown = sorted({t.stats.channel if len(patterns) == 1 else t.id for t in traces})
        raise DataError(f"no channel {key!r} in {path.name!r}; {available(key, shown)}")
    left_out = [k for k in _ID if k not in named]
    if len({tuple(t.stats[k] for k in left_out) for t in found}) > 1:
        ids = sorted({t.id for t in found})
        every = ".".join(wanted.get(k, "*") for k in _ID)
        raise DataError(
            f"{key!r} stands for several channels of {path.name!r}: {listed(ids)}; choose one, "
            f"'{path.name}:{ids[0]}', or all, '{path.name}:{every}'"
        )
    return found


# The parts of one channel.


def _merged(name: str, parts: list[Any], path: Path) -> _Row:
    """The parts of one channel in one row, NaN where there are gaps."""
    if len(parts) == 1:
        return _row(parts[0])
    parts = sorted(parts, key=lambda t: t.stats.starttime)
    first = _row(parts[0])
    _check_rates([_row(t) for t in parts], path)
    if len({t.stats.calib for t in parts}) > 1:
        raise DataError(f"the parts of {name} in {path.name!r} differ in calibration")
    apart = np.array([(t.stats.starttime - first.start) * first.rate for t in parts])
    places = np.rint(apart).astype(int)
    off = np.abs(apart - places)
    if off.max() > SHIFT:
        raise DataError(
            f"{name} of {path.name!r} goes on {off.max():.2g} samples off its grid in time, at "
            f"{parts[int(off.argmax())].stats.starttime}: interpolate it to one grid (obspy's interpolate), or "
            "keep one part"
        )
    ends = places + [len(t.data) for t in parts]
    observed, size = sum(len(t.data) for t in parts), int(ends.max())
    if size > 2 * observed:
        raise DataError(
            f"{name} of {path.name!r} is in {len(parts)} parts, with gaps of {size - observed:,} of {size:,} "
            "samples: if these are events of their own, write one file for each and give them as "
            "'folder/*.mseed'; if not, cut it to a span with fewer gaps (obspy's trim)"
        )
    return _Row(name, first.start, first.rate, _filled(parts, places, size, path))


def _row(trace: Any) -> _Row:
    return _Row(trace.id, trace.stats.starttime, trace.stats.sampling_rate, trace.data)


def _filled(parts: Sequence[Any], places: np.ndarray, size: int, path: Path) -> np.ndarray:
    """The samples of all parts at their places, NaN where there is none; parts that overlap must agree."""
    samples = np.zeros(size, np.result_type(*(t.data for t in parts)))
    known = np.zeros(size, bool)
    for trace, place in zip(parts, places, strict=True):
        where = slice(place, place + len(trace.data))
        both = known[where]
        other = both & ~_same(samples[where], trace.data)
        if other.any():
            time = trace.stats.starttime + int(other.argmax()) / trace.stats.sampling_rate
            raise DataError(
                f"two parts of {trace.id} in {path.name!r} overlap and differ, first at {time}: keep one of them "
                f"({other.sum():,} of {both.sum():,} samples differ)"
            )
        samples[where], known[where] = trace.data, True
    return samples if known.all() else np.where(known, samples, np.nan)


def _same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one == other) | ((one != one) & (other != other))  # NaN is NaN


# What makes rows of one array.


def _check_rates(rows: Sequence[_Row], path: Path) -> None:
    """Raise a `DataError` if the sampling rates of rows differ by more than a part of a sample in all."""
    rate, longest = rows[0].rate, max(len(r.samples) for r in rows)
    if any(abs(r.rate - rate) / rate * longest > SHIFT for r in rows):
        raise DataError(
            f"traces of {path.name!r} differ in sampling rate: {_shown(rows)}; choose those of one rate, "
            f"'{path.name}:{rows[0].id}', or resample them (obspy's resample)"
        )


def _check_together(rows: Sequence[_Row], path: Path) -> None:
    """Raise a `DataError` unless the rows are of the same span, at the same rate."""
    _check_rates(rows, path)
    first = rows[0]
    if any(
        len(r.samples) != len(first.samples) or abs(r.start - first.start) * first.rate >= OFFSET
        for r in rows
    ):
        raise DataError(
            f"traces of {path.name!r} differ in the span of time that they cover: {_shown(rows)}; cut them to "
            f"one span (obspy's trim), or choose one, '{path.name}:{first.id}'"
        )


def _shown(rows: Sequence[_Row]) -> str:
    return listed([str(r) for r in rows], "; ", LISTED)
