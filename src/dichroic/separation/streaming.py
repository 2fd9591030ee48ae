"""Separate more observations than fit in memory, into a zarr store, by any number of processes, resumably.

    path = separate_to_zarr("out.zarr", separator, open_view("new.yaml", problem), n_draws=32, memory=4 * 2**30)

Blocks of observations are separated one by one and written whole (see `store`). An observation's draws depend on
its number alone, so it does not matter which process does which block, nor in how many goes.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from dichroic.errors import RunError
from dichroic.io.zarr_store import (
    Blocks,
    Job,
    damage,
    finished_blocks,
    named,
    open_store,
    read_job,
    remove_leftovers,
    write_block,
)
from dichroic.operators.scaling import offsets_of
from dichroic.problem.batches import observations_within
from dichroic.problem.lazy_view import AnyView
from dichroic.problem.problem import joint_observations
from dichroic.runtime.blocks import shard_blocks
from dichroic.runtime.fingerprint import fingerprint
from dichroic.runtime.limits import within
from dichroic.runtime.tracking import warn
from dichroic.separation.result import Separation
from dichroic.separation.separator import MEMORY, Separator, common_count, selectable

_SAMPLED = 16  # observations that tell one view from another
Progress = Callable[[int, int], None]


def separate_to_zarr(
    path: str | Path,
    separator: Separator,
    view: AnyView | str | Sequence[AnyView],
    *,
    n_draws: int = 32,
    seed: int = 0,
    memory: int = MEMORY,
    chunk: int | None = None,
    shard: tuple[int, int] = (1, 1),
    progress: Progress | None = None,
) -> Blocks:
    """Separate the observations of `view` into the zarr store `path`; what is finished there is left as it is.

    Finished blocks of this shard are read, and those that are damaged separated again; a `DichroicWarning` says
    which and how. (In stores that earlier releases began, chunks have no checksums, and only sizes are compared.)

    Args:
        path: a folder, made where it is not there.
        separator: fitted, or loaded.
        view: as for `Separator.stream`.
        n_draws: draws of each observation.
        seed: that of the draws.
        memory: the bytes that this process may take; it decides how many observations a block has.
        chunk: observations of a block instead. Who makes the store decides; the others follow.
        shard: `(i, n)`: of `n` processes that share the work, this is number `i` (from 1), which does the blocks
            `i`, `i + n`, …
        progress: called with the observations that are done, or found to be, and those of this shard.

    Returns:
        The blocks of all shards that are finished now, and those that are missing.

    Raises:
        RunError: if `path` is of another model, view, seed, draws or `chunk`, or cannot be written.
        ConfigError: if `memory` is too little, for the chunks of the files too.
        DichroicError: what `Separator.separate` raises.
    """
    with within(memory) if chunk is None else nullcontext():
        views = selectable(view, separator)
        begun = read_job(path).block if Path(path).exists() else None
        job = job_of(
            separator,
            views,
            n_draws=n_draws,
            seed=seed,
            memory=memory,
            chunk=chunk or begun,
            shard=shard,
        )
        found = open_store(path, job)
        if chunk is not None and found.block != chunk:
            raise RunError(
                f"{path} was begun with blocks of {found.block} observations, not {chunk}"
            )
        job, mine = found, shard_blocks(found.blocks, shard)
        total = _size(job, mine)
        say = lambda done: progress(done, total) if progress else None
        todo, damaged = _unfinished(path, job, mine, say)
        if damaged:
            warn(f"{path}: damaged, so separated again: {named(damaged)}")
        remove_leftovers(path, job, todo)
        done = total - _size(job, todo)
        for block in todo:
            start, stop = job.span(block)
            part = separator.separate_part(views, start, stop, n_draws=n_draws, seed=seed)
            write_block(path, job, block, arrays_of(part))
            done += stop - start
            say(done)
        return finished_blocks(path)


def _unfinished(
    path: str | Path, job: Job, blocks: Sequence[int], progress: Callable[[int], None]
) -> tuple[list[int], dict[int, str]]:
    """The `blocks` that are missing or damaged, and what is wrong with the latter: all others are read."""
    found = finished_blocks(path)
    finished, damaged = set(found.finished), dict(found.damaged)
    todo, done = [], 0
    for block in blocks:
        if block in finished and (why := damage(path, job, block, read=True)):
            damaged[block] = why
        if block in damaged or block not in finished:
            todo.append(block)
            continue
        done += _size(job, [block])
        progress(done)
    return todo, {b: damaged[b] for b in todo if b in damaged}


def _size(job: Job, blocks: Iterable[int]) -> int:
    """The number of observations in `blocks`."""
    return sum(stop - start for start, stop in map(job.span, blocks))


def arrays_of(part: Separation) -> dict[str, np.ndarray]:
    """Draws, means, standard deviations and χ² by the names that they have in files."""
    arrays = {"chi2": part.chi2}
    for kind, values in (("draws", part.draws), ("mean", part.mean), ("std", part.std)):
        arrays |= {f"{kind}/{name}": x for name, x in values.items()}
    return arrays


def job_of(
    separator: Separator,
    views: Sequence[AnyView],
    *,
    n_draws: int,
    seed: int,
    memory: int = MEMORY,
    chunk: int | None = None,
    shard: tuple[int, int] = (1, 1),
) -> Job:
    """What a store of these draws says of itself; the view is known by 16 of its observations, evenly spread."""
    count = common_count(views)
    at = sorted({int(i) for i in np.linspace(0, count - 1, _SAMPLED)})
    some = [[v.select(slice(i, i + 1)) for v in views] for i in at]
    stated = [[(v.observations, v.operators, v.noise, v.mask) for v in each] for each in some]
    obs = joint_observations(some[0], separator.operators)
    shapes = {k: separator.denoisers[k].shape for k in obs.sources}
    if chunk is None:
        chunk = observations_within(memory, obs, count, n_draws=n_draws, shards=shard[1])
    model = fingerprint((separator.denoisers, separator.operators, separator.config.to_dict()))
    wide = tuple(k for k in shapes if k in offsets_of(separator.operators))
    view = fingerprint((count, stated))
    return Job(model, view, seed, n_draws, count, chunk, shapes, wide=wide)
