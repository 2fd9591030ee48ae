"""How many observations are separated at a time, and which process does which.

    bytes of one observation = 4 · COPIES · (draws + 2) · Σ_β D_β + 4 · COPIES_OF_VIEW · M'

with `D_β` numbers of source β, a mean and a standard deviation beside the draws, and `M'` numbers that the view
has of its own for each observation (values, mask, operators, noise). What is left of `--memory` after what the
process already holds and the workspace of the samplers is divided by that.
"""

import re

from dichroic.errors import ConfigError

COPIES = 6  # of the draws, at the most: as they are gathered, and as they are written
COPIES_OF_VIEW = 6  # as they are read (up to 8 bytes a number), checked and computed with
WORKSPACE = (
    512 * 2**20
)  # of the samplers and compiled programs, whatever the number of observations
GRAIN = 64  # observations are computed in batches of as many
MOST = 16384  # so that a kill costs little

_SCALE = {
    "": 1,
    "B": 1,
    "kB": 1000,
    **{f"{c}iB": 2 ** (10 * i) for i, c in enumerate("KMGT", 1)},
    **{f"{c}B": 10 ** (3 * i) for i, c in enumerate("KMGT", 1)},
}


def parse_bytes(text: str) -> int:
    """The bytes of `512MiB`, `4GiB`, `4GB`, `1.5 TB`; raises `ConfigError` for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _SCALE or float(match[1]) * _SCALE[match[2]] < 1:
        raise ConfigError(f"{text!r} is no amount of memory; expected one such as 512MiB or 4GB")
    return int(float(match[1]) * _SCALE[match[2]])


def parse_shard(text: str) -> tuple[int, int]:
    """`(i, n)` of `i/n` with `1 ≤ i ≤ n`; raises `ConfigError` for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"{text!r} is no shard; expected one such as 1/8, the first of eight")
    return int(match[1]), int(match[2])


def shard_blocks(blocks: int, shard: tuple[int, int]) -> list[int]:
    """The numbers of the blocks of shard `(i, n)`: every `n`-th from the `i`-th on."""
    return list(range(shard[0] - 1, blocks, shard[1]))


def spans(count: int, chunk: int) -> list[tuple[int, int]]:
    """`(start, stop)` of `count` observations, `chunk` at a time."""
    return [(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def bytes_each(n_draws: int, source_numbers: int, view_numbers: int) -> int:
    """The bytes that one observation needs while it is separated (see above)."""
    return 4 * (COPIES * (n_draws + 2) * source_numbers + COPIES_OF_VIEW * view_numbers)


def block_size(memory: int, held: int, each: int, count: int, shards: int = 1) -> int:
    """How many observations to separate at a time within `memory` bytes.

    `held` bytes are in use already, `each` is what an observation needs; no more than a shard's part of the
    `count` observations, so that all shards have work. Raises `ConfigError` where not even `GRAIN` fit.
    """
    room = memory - held - WORKSPACE
    fit = room // each // GRAIN * GRAIN
    if fit < GRAIN:
        need = -(-(held + WORKSPACE + GRAIN * each) // 2**20)
        raise ConfigError(
            f"{memory / 2**20:,.0f} MiB of memory are too few: {GRAIN} observations at a time, the model and the "
            f"problem need {need:,} MiB"
        )
    share = -(-count // shards)
    return min(fit, MOST, -(-share // GRAIN) * GRAIN)
