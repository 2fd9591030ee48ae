"""Separated observations as a zarr group on disk that several processes fill, block by block.

    draws/<source>  (n_draws, n, *shape)      chi2      (n_draws, n)  NaN where nothing was observed
    mean/<source>   (n, *shape)               finished  (blocks,)  1 where a block is written
    std/<source>    (n, *shape)

A block is a run of observations, and one chunk of every array, uncompressed: a file of its own, written to a
temporary one, flushed and renamed. Its entry of `finished`, a file too, is written after all of these, so it
is never true of a block that is not there, and processes share a store without locks. What the store is of (model,
view, seed, draws) is an attribute of the group; the group appears whole, by renaming a folder.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dichroic.errors import FormatError, RunError
from dichroic.files import write_atomic, writing
from dichroic.optional import library
from dichroic.records import read_json, understanding

_VERSION = 1
_KEY = "dichroic"
FINISHED = "finished"


@dataclass(frozen=True)
class Job:
    """What a store holds: hashes of the model and of the view, and what decides the draws and their shapes.

    Without `summaries` that is the draws alone.
    """

    model: str
    view: str
    seed: int
    n_draws: int
    count: int
    block: int
    shapes: Mapping[str, tuple[int, ...]]
    summaries: bool = True

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.count // self.block)

    def span(self, block: int) -> tuple[int, int]:
        """First observation of block number `block`, and the one after its last."""
        return block * self.block, min((block + 1) * self.block, self.count)


@dataclass(frozen=True)
class Blocks:
    """Which of a store's blocks are `finished`, and which are `missing`, by number."""

    job: Job
    finished: tuple[int, ...]
    missing: tuple[int, ...]


@dataclass(frozen=True)
class _Array:
    """An array of a store: its shape, and the axis along which observations lie."""

    shape: tuple[int, ...]
    axis: int
    dtype: str = "float32"


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
        if found.pop("format_version") != _VERSION:
            raise FormatError(f"{file} is of a version that this release does not read")
        return Job(**{**found, "shapes": {k: tuple(s) for k, s in found["shapes"].items()}})


def finished_blocks(path: str | Path) -> Blocks:
    """Which blocks of the store `path` are written and which are not; raises as `read_job` does."""
    path = Path(path)
    job = read_job(path)
    folder = path / FINISHED / "c"
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    done = tuple(b for b in range(job.blocks) if str(b) in names)
    return Blocks(job, done, tuple(sorted(set(range(job.blocks)) - set(done))))


def write_block(path: str | Path, job: Job, block: int, values: Mapping[str, np.ndarray]) -> None:
    """Write block number `block`: `values` by the names of the arrays, and then that it is finished.

    Raises `RunError` where it cannot be written; blocks that were are not touched.
    """
    for name, about in _arrays(job).items():
        _write_chunk(Path(path) / name, about, block, job.block, values[name])
    _write_chunk(Path(path) / FINISHED, _finished(job), block, 1, np.ones(1, np.uint8))


def read_draws(path: str | Path, job: Job, block: int, source: str) -> np.ndarray:
    """The draws of one source in block number `block`, `(n_draws, n, *shape)`.

    Raises `FormatError` where the block is not there as it was written.
    """
    name = f"draws/{source}"
    about, (start, stop) = _arrays(job)[name], job.span(block)
    file = _chunk(Path(path) / name, about, block)
    shape = (job.n_draws, job.block, *job.shapes[source])
    try:
        values = np.fromfile(file, np.dtype(about.dtype).newbyteorder("<")).reshape(shape)
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} is damaged: {error}") from None
    return values[:, : stop - start]


def remove_leftovers(path: str | Path, job: Job, blocks: list[int]) -> None:
    """Remove what a kill left half written of `blocks`, which nobody else may be writing."""
    arrays = {**_arrays(job), FINISHED: _finished(job)}
    files = {_chunk(Path(path) / n, a, b) for n, a in arrays.items() for b in blocks}
    for leftover in Path(path).rglob(".*"):
        if leftover.with_name(leftover.name[1:].rpartition(".")[0]) in files:
            with writing(leftover):
                leftover.unlink(missing_ok=True)


def _arrays(job: Job) -> dict[str, _Array]:
    found = {"chi2": _Array((job.n_draws, job.count), 1)} if job.summaries else {}
    for name, shape in job.shapes.items():
        found[f"draws/{name}"] = _Array((job.n_draws, job.count, *shape), 1)
        if job.summaries:
            found |= {f"{k}/{name}": _Array((job.count, *shape), 0) for k in ("mean", "std")}
    return found


def _finished(job: Job) -> _Array:
    return _Array((job.blocks,), 0, "uint8")


def _chunk(folder: Path, about: _Array, block: int) -> Path:
    """The file of chunk number `block` along the observations."""
    index = [block if i == about.axis else 0 for i in range(len(about.shape))]
    return folder.joinpath("c", *map(str, index))


def _write_chunk(folder: Path, about: _Array, block: int, size: int, values: np.ndarray) -> None:
    """Write `values` as a chunk of `size` rows; a last one that has fewer is filled up, as zarr does."""
    values = np.ascontiguousarray(values, np.dtype(about.dtype).newbyteorder("<"))
    missing = size - values.shape[about.axis]
    if missing:
        fill = [(0, missing if i == about.axis else 0) for i in range(values.ndim)]
        values = np.pad(values, fill)
    file = _chunk(folder, about, block)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, values.data.cast("B"))


def _create(path: Path, job: Job) -> None:
    """Make the whole group beside `path`, and rename it; another process may have been first."""
    zarr = library("zarr", "data", f"writing {path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with writing(path):
            draft.chmod(0o755)
            group = zarr.open_group(draft, mode="w", zarr_format=3, attributes={_KEY: _stated(job)})
            for name, a in _arrays(job).items():
                chunks = tuple(job.block if i == a.axis else n for i, n in enumerate(a.shape))
                _declare(group, name, a, chunks, float("nan"))
            _declare(group, FINISHED, _finished(job), (1,), 0)
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


def _declare(group: Any, name: str, about: _Array, chunks: tuple[int, ...], fill: float) -> None:
    group.create_array(
        name,
        shape=about.shape,
        chunks=chunks,
        dtype=about.dtype,
        compressors=None,
        filters=None,
        fill_value=fill,
    )


def _stated(job: Job) -> dict[str, Any]:
    return {
        "format_version": _VERSION,
        **asdict(job),
        "shapes": {k: list(s) for k, s in job.shapes.items()},
    }


def _flush(file: Path) -> None:
    with file.open("rb") as f:
        os.fsync(f.fileno())
