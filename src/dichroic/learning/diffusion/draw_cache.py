"""Posterior draws of the training observations, from which networks learn: in memory, or block by block on disk.

Draws on disk are a store (`dichroic.io.zarr_store`) for each view, filled by all processes: what a kill left
finished is not drawn again, unless it is damaged since. A network then sees a *window* at a time: some blocks,
picked at random, that fit in memory.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from dichroic.errors import FormatError, RunError
from dichroic.io.zarr_store import Job, damage, finished_blocks, open_store, read_draws, write_block
from dichroic.problem.batches import ObservationBatches
from dichroic.problem.observations import Observations
from dichroic.runtime import distributed
from dichroic.runtime.files import writing

WINDOW = 8  # a window has this part of the memory at the most
Draw = Callable[[Observations, int], dict[str, np.ndarray]]  # `(1, n, *shape)` of each source


@dataclass(frozen=True)
class StoredDraws:
    """The draws of one source in several stores, of which a window has `room` bytes."""

    source: str
    stores: tuple[tuple[Path, Job], ...]
    room: int
    seed: int

    @cached_property
    def count(self) -> int:
        """The number of draws."""
        return sum(job.count for _, job in self.stores)

    @cached_property
    def rows(self) -> int:
        """The number of draws in a window."""
        each = 4 * int(np.prod(self.stores[0][1].shapes[self.source]))
        return min(max(self.room // each, 1), self.count)

    def window(self, number: int) -> np.ndarray:
        """Draws `(rows, *shape)`: those of blocks picked at random by `number`, or all of them, if they fit."""
        blocks = [(path, job, b) for path, job in self.stores for b in range(job.blocks)]
        order = np.arange(len(blocks))
        if self.rows < self.count:
            order = np.random.default_rng((self.seed, number)).permutation(len(blocks))
        parts, found = [], 0
        for i in order:
            path, job, block = blocks[i]
            parts.append(read_draws(path, job, block, self.source)[0])
            found += len(parts[-1])
            if found >= self.rows:
                break
        return np.concatenate(parts)[: self.rows]


def windows(samples: np.ndarray | StoredDraws, count: int) -> Iterator[np.ndarray]:
    """`count` windows of `samples`, the next one read while one is in use; all the same where one holds all."""
    if isinstance(samples, np.ndarray) or samples.rows == samples.count:
        every = samples if isinstance(samples, np.ndarray) else samples.window(0)
        yield from [every] * count
        return
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(samples.window, 0)
        for number in range(count):
            here = coming.result()
            if number + 1 < count:
                coming = reader.submit(samples.window, number + 1)
            yield here


def draw_to_disk(
    folder: Path,
    views: Sequence[ObservationBatches],
    names: Sequence[str],
    draw: Sequence[Draw],
    *,
    model: str,
    memory: int,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, StoredDraws]:
    """One draw of all sources of every observation of `views`, into stores in `folder`, and those of each source.

    `draw[i]` draws for some observations of view `i`, of which the first has the given number; `model` is a hash
    of what draws.
    """
    stores: dict[str, list[tuple[Path, Job]]] = {}
    for i, (obs, name) in enumerate(zip(views, names, strict=True)):
        shapes = {k: tuple(op.in_shape) for k, op in obs.operators.items()}
        job = Job(
            model, name, seed, 1, obs.count, obs.batch_size or obs.count, shapes, summaries=False
        )
        path = folder / f"{i}.zarr"
        distributed.broadcast_from_primary(partial(_begin, path, job))
        say = partial(progress, f"E-step {name}")
        distributed.run_on_all(
            partial(_fill, path, job, obs, draw[i], say)
        )  # until all have written
        for source in shapes:
            stores.setdefault(source, []).append((path, job))
    return {k: StoredDraws(k, tuple(v), memory // WINDOW, seed) for k, v in stores.items()}


def _fill(
    path: Path, job: Job, obs: ObservationBatches, draw: Draw, progress: Callable[[int, int], None]
) -> None:
    """Draw and write the blocks of this process that are missing or damaged."""
    done, first, last = set(finished_blocks(path).finished), obs.first, obs.own[-1][2]
    for block, start, stop in obs.own:
        if block not in done or damage(path, job, block, read=True):
            draws = draw(obs.between(start, stop), start)
            write_block(path, job, block, {f"draws/{k}": x for k, x in draws.items()})
        progress(stop - first, last - first)


def _begin(path: Path, job: Job) -> bytes:
    """Make the store `path`, unless it is there already; one of another model, or in other blocks, is removed."""
    try:
        same = not path.exists() or open_store(path, job) == job
    except (RunError, FormatError):
        same = False
    if not same:
        with writing(path):
            shutil.rmtree(path)
    open_store(path, job)
    return b""
