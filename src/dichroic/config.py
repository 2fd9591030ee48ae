"""Every setting of a fit, with its default, as plain data (nothing here imports JAX).

A problem file's `fit:` section and the command line's `--mixture.components 32` set the same fields.
"""

import contextlib
import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dichroic.errors import ConfigError

Ends = tuple[float | None, ...]  # the least and the most
Bounds = Mapping[str, Ends]
NetworkName = Literal["auto", "mlp", "unet"]
SamplerName = Literal["auto", "ancestral", "ddpm", "ddim", "heun", "predictor-corrector"]


def _count(default: int, *, most: int = 10**6) -> Any:
    """A number that is at least 1 (others are at least 0), and at most `most`."""
    return field(default=default, metadata={"least": 1, "most": most})


def _fraction(default: float) -> Any:
    return field(default=default, metadata={"below": 1})


class _Ranged:
    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            least, below = f.metadata.get("least", 0), f.metadata.get("below", math.inf)
            if isinstance(value, (int, float)) and not least <= value < below:
                most = f" and below {below}" if math.isfinite(below) else ""
                raise ConfigError(f"{f.name}: must be at least {least}{most}, got {value!r}")
            if isinstance(value, int) and value > f.metadata.get("most", math.inf):
                raise ConfigError(f"{f.name}: must be at most {f.metadata['most']}, got {value!r}")


@dataclass(frozen=True)
class MixtureConfig(_Ranged):
    """The closed-form start: expectation-maximisation of mixtures of Gaussians."""

    components: int = _count(64)  # per source, reached by doubling from one
    rank: int = _count(64)  # of the covariances of sources of more than 128 entries, at most
    gaussian_iterations: int = _count(
        20
    )  # iterations of the single Gaussian that everything starts from
    iterations: int = _count(3)  # iterations at each size
    final_iterations: int = _count(10)  # iterations at the last size
    steps: int = _count(
        5
    )  # EM steps of an iteration, on the assignments of components chosen at its start
    active_assignments: int = _count(
        16
    )  # assignments of components kept per observation and pair of sources
    beam_width: int = _count(1024)  # assignments looked at, at once, in the search for them
    shrinkage: float | None = None  # pseudo-observations of a prior on components; None: found
    stationary: tuple[str, ...] = ()  # sources such as texture, sky, noise
    scaling: Literal["auto", "common", "per-entry"] = (
        "auto"  # of entries of a source: docs/concepts.md
    )
    floor: float = 1e-8  # smallest eigenvalue of a covariance, relative to the source's variance
    patience: int = 2  # sizes without a better held-out likelihood before growth stops


@dataclass(frozen=True)
class DiffusionConfig(_Ranged):
    """Diffusion iterations: posterior draws of the training data, then score matching on them.

    `covariance` is that of a source given its noised value: `"base"`, the mixture's, which costs no product with a
    network's Jacobian and keeps several modes apart, or `"jacobian"`, the network's own. With the base, draws are
    too wide (χ²/d of 1.02 to 1.16) where the network has much to correct; the Jacobian makes them some twenty
    times as expensive (`benchmarks/high_dimensional.py`).
    """

    iterations: int = 4
    steps: int = _count(2000, most=10**8)  # training steps per source and iteration
    batch_size: int = _count(512)
    learning_rate: float = 1e-3
    ema: float = _fraction(0.999)
    network: NetworkName = "auto"  # mlp up to 128 entries, unet for series and images beyond
    width: int = _count(128)  # of a layer of an mlp
    depth: int = _count(3)  # blocks of an mlp
    channels: int = _count(32)  # of the top level of a unet, twice, three times … below
    levels: int = _count(3)  # of a unet
    level_depth: int = _count(2)  # blocks of each level
    spatial_axes: int = (
        0  # the last axes that are positions; 0: all of (L,), (H, W), 2 of (C, H, W)
    )
    attention: Literal["none", "lowest"] = "none"  # the level of a unet that attends to itself
    precision: Literal["float32", "bfloat16"] = "float32"  # of a unet
    covariance: Literal["jacobian", "base"] = "base"
    keep: Literal["gains", "all"] = (
        "gains"  # networks that gain held-out evidence, or every iteration's
    )
    patience: int = 1  # iterations without a gain in held-out evidence before stopping
    evidence_draws: int = _count(
        4
    )  # posterior draws of held-out observations that judge an iteration
    evidence_observations: int = _count(1024)  # held-out observations it uses, at most per view


@dataclass(frozen=True)
class SamplerConfig(_Ranged):
    """How draws are made with learned priors (mixture priors are drawn from exactly).

    `solver` is `"exact"` with dense matrices or `"cg"`, conjugate gradients without any; `"auto"` is exact up to
    128 entries. `name` `"auto"` is the ancestral chain with either: with 784 entries it is calibrated after 8 to
    16 steps, where Heun's sampler needs 64 of two evaluations each and twice the products with Jacobians in all
    (`benchmarks/high_dimensional.py`).
    """

    name: SamplerName = "auto"
    steps: int = _count(32)
    schedule: Literal["geometric", "karras"] = "geometric"
    sigma_min: float = 1e-3  # in units of each source's standard deviation
    sigma_max: float = 30.0
    solver: Literal["auto", "exact", "cg"] = "auto"
    beam_width: int = _count(256)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < 1 < self.sigma_max:
            raise ConfigError(
                "sigma_min: must be positive and below 1, and sigma_max above 1 (the scale of a "
                f"source), got {self.sigma_min!r} and {self.sigma_max!r}"
            )


@dataclass(frozen=True)
class FitConfig(_Ranged):
    """All settings of a fit."""

    seed: int = field(default=0, metadata={"most": 2**62})
    holdout: float = _fraction(0.1)  # fraction of each view kept for stopping and scoring
    order: tuple[tuple[str, ...], ...] | None = None  # groups of sources, learned in turn
    checks: Literal["predictive", "none"] = "predictive"  # at the end of a fit
    outliers: Literal["exclude", "keep"] = "exclude"  # observations that are far from all others
    joint_iterations: int = (
        4  # mixture iterations over all sources and views together after the last group
    )
    batch_size: int = _count(1024)  # observations sampled at once
    bounds: Bounds = field(default_factory=dict)  # lower and upper bound on the entries of a source
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, ends in self.bounds.items():
            known = [end for end in ends if end is not None]
            if len(ends) != 2 or not known or (len(known) == 2 and known[0] >= known[1]):
                raise ConfigError(
                    f"bounds.{name}: expected a lower and an upper bound on its entries, [low, high], one of "
                    f"them null where there is none, got {list(ends)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries of plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, *, where: str = "fit") -> "FitConfig":
        """From nested dictionaries; raises `ConfigError` at `None`, unknown keys or values of a wrong type."""
        return _build(cls, values, where)

    def replace(self, flat: Mapping[str, Any]) -> "FitConfig":
        """With the settings of `flat`, by dotted name (`mixture.components`), replaced."""
        check_keys(flat, settings(), "settings")
        values = self.to_dict()
        for name, value in flat.items():
            *path, last = name.split(".")
            section = values
            for part in path:
                section = section[part]
            section[last] = value
        return type(self).from_dict(values, where="settings")


def check_keys(got: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `ConfigError` at the first key of `got` that is not `known`, naming the nearest."""
    known = list(known)
    for key in got:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def settings(cls: type = FitConfig, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Every setting by dotted name: its type and its default."""
    out: dict[str, tuple[Any, Any]] = {}
    hints, defaults = typing.get_type_hints(cls), cls()
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            out.update(settings(hints[f.name], f"{prefix}{f.name}."))
        else:
            out[prefix + f.name] = (hints[f.name], getattr(defaults, f.name))
    return out


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a table of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    check_keys(values, hints, where)
    converted = {k: _convert(hints[k], v, f"{where}.{k}") for k, v in values.items()}
    try:
        return cls(**converted)
    except ConfigError as error:  # out of its range
        raise ConfigError(f"{where}.{error}") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)  # type: ignore[arg-type]
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value in options:
            return value
        raise ConfigError(f"{where}: {value!r} is none of {', '.join(map(repr, options))}")
    if isinstance(kind, types.UnionType):
        return None if value is None else _convert(options[0], value, where)
    if typing.get_origin(kind) is Mapping:
        if isinstance(value, Mapping):
            return {str(k): _convert(options[1], v, f"{where}.{k}") for k, v in value.items()}
        raise ConfigError(f"{where}: expected a table by name of a source, got {value!r}")
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_convert(options[0], v, where) for v in value)
        raise ConfigError(f"{where}: expected a list, got {value!r}")
    return _plain(kind, value, where)


def _plain(kind: type, value: Any, where: str) -> Any:
    if kind is str:
        if isinstance(value, str):
            return value
        raise ConfigError(f"{where}: expected text, got {value!r}")
    number = value
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            number = float(value)
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}")
    if not abs(number) <= sys.float_info.max:  # true for NaN too
        raise ConfigError(f"{where}: must be finite, got {value!r}")
    if kind is int and number != int(number):
        raise ConfigError(f"{where}: expected int, got {value!r}")
    return kind(number)
