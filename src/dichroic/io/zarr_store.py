"""Separated observations as a zarr group on disk that several processes fill, block by block.

    draws/<source>  (n_draws, n, *shape)      chi2      (n_draws, n)  NaN where nothing was observed
    mean/<source>   (n, *shape)               finished  (blocks,)  1 where a block is written
    std/<source>    (n, *shape)

A block is a run of observations, and one chunk of every array: a file of its own, with a checksum (see `chunks`),
written to a temporary one, flushed and renamed. Its entry of `finished`, a file too, is written after all of
these, so processes share a store without locks. A block counts as finished if that entry and all its files are
there and have the sizes that they should have; `damage` also tells whether their bytes are those that were
written. What the store is of (model, view, seed, draws) is an attribute of the group; the group appears whole, by
renaming a folder.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.errors import FormatError, RunError
from dichroic.io.zarr_chunks import fault, read_chunk, write_chunk
from dichroic.runtime.files import writing
from dichroic.runtime.optional_imports import library
from dichroic.runtime.records import read_json, understanding

_VERSION = 2
_UNSUMMED = 1  # the version whose chunks have no checksums
_KEY = "dichroic"
FINISHED = "finished"
MOST_NAMED = 20


@dataclass(frozen=True)
class Job:
    """What a store holds: hashes of the model and of the view, and what decides the draws and their shapes.

    Without `summaries` that is the draws alone. Sources that are `wide` are in float64. Chunks that are not
    `summed` have no checksums: an earlier release began the store.
    """

    model: str
    view: str
    seed: int
    n_draws: int
    count: int
    block: int
    shapes: Mapping[str, tuple[int, ...]]
    summaries: bool = True
    summed: bool = True
    wide: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.count // self.block)

    def span(self, block: int) -> tuple[int, int]:
        """First observation of block number `block`, and the one after its last."""
        return block * self.block, min((block + 1) * self.block, self.count)


@dataclass(frozen=True)
class Blocks:
    """Which of a store's blocks are `finished`, and which are `missing`, by number.

    Of the missing ones, `damaged` were finished once; it says what is wrong with each.
    """

    job: Job
    finished: tuple[int, ...]
    missing: tuple[int, ...]
    damaged: Mapping[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        job, absent = self.job, [b for b in self.missing if b not in self.damaged]
        said = (
            f"{len(self.finished)} of {job.blocks} blocks of {job.block} observations are finished"
        )
        if absent:
            said += f"; missing: {_listed([str(b + 1) for b in absent])}"
        return said + (f"; damaged: {named(self.damaged)}" if self.damaged else "")


def named(damaged: Mapping[int, str]) -> str:
    """Blocks, counted from 1, and what is wrong with them, in words."""
    return _listed([f"{b + 1} ({why})" for b, why in damaged.items()])


def _listed(parts: list[str]) -> str:
    more = len(parts) - MOST_NAMED
    return ", ".join(parts[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class _Array:
    """An array of a store: its shape, the axis along which observations lie, and how many a chunk has of them."""

    shape: tuple[int, ...]
    axis: int
    rows: int
    dtype: str = "float32"

    @property
    def chunk(self) -> tuple[int, ...]:
        """The shape of a chunk."""
        return tuple(self.rows if i == self.axis else n for i, n in enumerate(self.shape))


def open_store(path: str | Path, job: Job) -> Job:
    """Create the store `path` for `job`, or find it there; returns its job, whose block size counts.

    Raises:
        RunError: if what is at `path` is of another model, view, seed or number of draws, or no store.
        DataError: if zarr, which writes the description of the arrays, is not installed.
    """
    path = Path(path)
    if not path.exists():
        _create(path, job)
    found = read_job(path)
    names = {"model": "model", "view": "view", "seed": "seed", "n_draws": "number of draws"}
    for key, name in {**names, "count": "number of observations", "shapes": "sources"}.items():
        mine, theirs = getattr(job, key), getattr(found, key)
        if mine != theirs:
            told = "" if key in ("model", "view", "shapes") else f" ({theirs}, not {mine})"
            raise RunError(
                f"{path} was begun with another {name}{told}; choose another folder, or remove this one"
            )
    return found


def read_job(path: str | Path) -> Job:
    """What the store `path` is of; raises `RunError` if there is none, `FormatError` if it is damaged."""
    file = Path(path) / "zarr.json"
    if not file.is_file():
        raise RunError(f"{path} holds no separated observations")
    about = read_json(file)
    with understanding(file):
        found = about["attributes"].get(_KEY)
        if found is None:
            raise RunError(f"{path} is a zarr group of something else; choose another folder")
        version = found.pop("format_version")
        if version not in (_UNSUMMED, _VERSION):
            raise FormatError(f"{file} is of a version that this release does not read")
        shapes = {k: tuple(s) for k, s in found.pop("shapes").items()}
        wide = tuple(found.pop("wide", ()))
        return Job(**found, shapes=shapes, summed=version != _UNSUMMED, wide=wide)


def finished_blocks(path: str | Path) -> Blocks:
    """Which blocks of the store `path` are there, by the sizes of their files; raises as `read_job` does."""
    path = Path(path)
    job = read_job(path)
    folder = path / FINISHED / "c"
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    written = [b for b in range(job.blocks) if str(b) in names]
    damaged = {b: why for b in written if (why := damage(path, job, b))}
    done = tuple(b for b in written if b not in damaged)
    return Blocks(job, done, tuple(sorted(set(range(job.blocks)) - set(done))), damaged)


def damage(path: str | Path, job: Job, block: int, *, read: bool = False) -> str | None:
    """What is wrong with a file of the finished block number `block`, if anything.

    That is one which is not there or of another size; with `read`, also one that does not have its checksum.
    """
    for name, about in {**_arrays(job), FINISHED: _finished(job)}.items():
        file = _chunk(Path(path) / name, about, block)
        if wrong := fault(file, about.chunk, about.dtype, summed=job.summed, read=read):
            return f"{file.relative_to(path).as_posix()} {wrong}"
    return None


def write_block(path: str | Path, job: Job, block: int, values: Mapping[str, np.ndarray]) -> None:
    """Write block number `block`: `values` by the names of the arrays, and then that it is finished.

    Raises `RunError` where it cannot be written; other blocks are not touched.
    """
    path, finished = Path(path), _finished(job)
    marker = _chunk(path / FINISHED, finished, block)
    with writing(marker):
        marker.unlink(missing_ok=True)  # of a block that is damaged
    for name, about in _arrays(job).items():
        write_chunk(
            _chunk(path / name, about, block), _filled(about, values[name]), summed=job.summed
        )
    write_chunk(marker, np.ones(1, np.uint8), summed=job.summed)


def read_draws(path: str | Path, job: Job, block: int, source: str) -> np.ndarray:
    """The draws of one source in block number `block`, `(n_draws, n, *shape)`.

    Raises `FormatError` where the block is not there as it was written.
    """
    name = f"draws/{source}"
    about, (start, stop) = _arrays(job)[name], job.span(block)
    file = _chunk(Path(path) / name, about, block)
    return read_chunk(file, about.chunk, about.dtype, summed=job.summed)[:, : stop - start]


def remove_leftovers(path: str | Path, job: Job, blocks: list[int]) -> None:
    """Remove what a kill left half written of `blocks`, which nobody else may be writing."""
    arrays = {**_arrays(job), FINISHED: _finished(job)}
    files = {_chunk(Path(path) / n, a, b) for n, a in arrays.items() for b in blocks}
    for leftover in Path(path).rglob(".*"):
        if leftover.with_name(leftover.name[1:].rpartition(".")[0]) in files:
            with writing(leftover):
                leftover.unlink(missing_ok=True)


def _arrays(job: Job) -> dict[str, _Array]:
    of_draws = lambda *shape: _Array((job.n_draws, job.count, *shape), 1, job.block)
    found = {"chi2": of_draws()} if job.summaries else {}
    for name, shape in job.shapes.items():
        dtype = "float64" if name in job.wide else "float32"
        found[f"draws/{name}"] = replace(of_draws(*shape), dtype=dtype)
        if job.summaries:
            summary = _Array((job.count, *shape), 0, job.block, dtype)
            found |= {f"{kind}/{name}": summary for kind in ("mean", "std")}
    return found


def _finished(job: Job) -> _Array:
    return _Array((job.blocks,), 0, 1, "uint8")


def _chunk(folder: Path, about: _Array, block: int) -> Path:
    """The file of chunk number `block` along the observations."""
    index = [block if i == about.axis else 0 for i in range(len(about.shape))]
    return folder.joinpath("c", *map(str, index))


def _filled(about: _Array, values: np.ndarray) -> np.ndarray:
    """`values` as a whole chunk; a last one that has fewer rows is filled up, as zarr does."""
    values = np.asarray(values, about.dtype)
    missing = about.rows - values.shape[about.axis]
    if not missing:
        return values
    return np.pad(values, [(0, missing if i == about.axis else 0) for i in range(values.ndim)])


def _create(path: Path, job: Job) -> None:
    """Make the whole group beside `path`, and rename it; another process may have been first."""
    zarr = library("zarr", "data", f"writing {path.name}")
    sums = [zarr.codecs.Crc32cCodec()] if job.summed else None
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with writing(path):
            draft.chmod(0o755)
            group = zarr.open_group(draft, mode="w", zarr_format=3, attributes={_KEY: _stated(job)})
            for name, about in _arrays(job).items():
                _declare(group, name, about, float("nan"), sums)
            _declare(group, FINISHED, _finished(job), 0, sums)
            for file in draft.rglob("zarr.json"):
                _flush(file)
        try:
            os.rename(draft, path)
        except OSError:
            if not path.is_dir():
                raise
    except OSError as error:
        raise RunError(f"cannot make {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _declare(group: Any, name: str, about: _Array, fill: float, sums: list[Any] | None) -> None:
    group.create_array(
        name,
        shape=about.shape,
        chunks=about.chunk,
        dtype=about.dtype,
        compressors=sums,
        filters=None,
        fill_value=fill,
    )


def _stated(job: Job) -> dict[str, Any]:
    about = asdict(job)
    version = _VERSION if about.pop("summed") else _UNSUMMED
    return {
        "format_version": version,
        **about,
        "shapes": {k: list(s) for k, s in job.shapes.items()},
    }


def _flush(file: Path) -> None:
    with file.open("rb") as f:
        os.fsync(f.fileno())
