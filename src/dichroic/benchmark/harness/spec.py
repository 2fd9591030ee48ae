"""What a benchmark can be asked for: problems, methods and sizes, as plain data (no JAX)."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dichroic.errors import ConfigError

FORMAT_VERSION = 3
HELD_OUT, RESULT, FAILED = "heldout.npz", "result.json", "failed.json"  # files of a job
LIMIT = "limit"
METHODS = {
    "dichroic": "mixtures, then diffusion models where they do better",
    "mixture": "mixtures of Gaussians alone",
    "ddprism": "diffusion models from the start, after the paper",
    "ddprism-gibbs": "the same, one source at a time",
    "clvm-linear": "contrastive latent variable model, linear",
    "clvm-vae": "contrastive latent variable model, variational autoencoder",
    "pcpca": "probabilistic contrastive principal components",
    "wiener": "Wiener filter with means and covariances of the data",
    LIMIT: "the exact posterior, where it is known",
}
PROBLEMS = (
    *("contrastive-2", "contrastive-3", "mixed-0.1", "mixed-0.5", "mixed-0.9"),
    *("grassy-14", "grassy-14-down", "grassy-28", "grassy-28-down"),
)
_CONTRASTIVE = re.compile(r"contrastive-([23])")
_GRASSY = re.compile(r"grassy-(14|28)(-down)?")
_MIXED = re.compile(r"mixed-(\d*\.?\d+)(-per-source)?")


@dataclass(frozen=True)
class ProblemName:
    """A problem that was asked for: one of the built-in ones, or the user's in a file `path`.

    `label` names its folder. `f_mix` is `None` for contrastive problems. `pixels` is the width of the images of
    grassy MNIST, of which some are of lower resolution with `down`; 0 for other problems.
    """

    label: str
    sources: int = 2
    f_mix: float | None = None
    per_source: bool = False
    path: str = ""
    pixels: int = 0
    down: bool = False

    @property
    def has_limit(self) -> bool:
        """Whether the exact posterior is known."""
        return not self.path and not self.pixels


@dataclass(frozen=True)
class BenchConfig:
    """The sizes of a benchmark, which its results depend on."""

    count: int = 16384  # observations of each view to learn from (built-in problems)
    held_out: int = 2048  # held-out observations of each view, at most
    draws: int = 32  # posterior draws of each
    points: int = 4096  # true sources and prior samples, for distances between distributions
    limit_two: int = 256  # observations whose exact posterior is computed, with two sources
    limit_more: int = 256  # the same, with more
    quick: bool = False  # the methods' small presets

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = {"draws": 2, "count": 2, "quick": 0}.get(name, 1)
            if value < least:
                raise ConfigError(f"{name}: must be at least {least}, got {value}")

    def limit_observations(self, sources: int) -> int:
        """Observations of each view whose exact posterior is computed."""
        return self.limit_two if sources <= 2 else self.limit_more


QUICK = BenchConfig(count=4096, held_out=1024, draws=16, points=1024, quick=True)


@dataclass(frozen=True)
class JobSpec:
    """One job: a problem, a method and a seed, and all that its result depends on."""

    problem: ProblemName
    method: str
    seed: int
    config: BenchConfig
    fingerprint: str = ""  # of the user's problem

    def settings(self) -> dict[str, Any]:
        """What a result has to agree in with this job to be its result."""
        sizes = dataclasses.asdict(self.config)
        return {**self.fit_settings(), **sizes, "format_version": FORMAT_VERSION}

    def fit_settings(self) -> dict[str, Any]:
        """What a fit has to agree in: the sizes that only scores depend on are left out."""
        return {
            "problem": self.problem.label,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "seed": self.seed,
            "count": self.config.count,
            "quick": self.config.quick,
        }

    def folder(self, out: Path) -> Path:
        """Where the files of the job are, below `out`."""
        return out / self.problem.label / self.method / f"seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries of plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "JobSpec":
        """What `to_dict` wrote."""
        parts: dict[str, Any] = {
            "problem": ProblemName(**values["problem"]),
            "config": BenchConfig(**values["config"]),
        }
        return cls(**{**values, **parts})


def parse_problem(name: str) -> ProblemName:
    """The problem called `name`, or stated in the file `name`; raises `ConfigError` if there is none."""
    if found := _CONTRASTIVE.fullmatch(name):
        return ProblemName(name, sources=int(found[1]))
    if found := _GRASSY.fullmatch(name):
        return ProblemName(name, pixels=int(found[1]), down=bool(found[2]))
    if found := _MIXED.fullmatch(name):
        f_mix, per_source = float(found[1]), bool(found[2])
        if f_mix > 1:
            raise ConfigError(f"{name}: the fraction mixed must be between 0 and 1, got {f_mix:g}")
        label = f"mixed-{f_mix:g}{'-per-source' if per_source else ''}"
        return ProblemName(label, f_mix=f_mix, per_source=per_source)
    path = Path(name)
    if path.is_file():
        label = re.sub(r"[^\w.-]+", "_", path.stem).lstrip(".")
        return ProblemName(label or "problem", path=str(path.resolve()))
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"{name} does not exist")
    known = f"{', '.join(PROBLEMS)}, mixed-F and mixed-F-per-source with 0 ≤ F ≤ 1"
    raise ConfigError(
        f"no problem {name!r}; {_nearest(name, PROBLEMS)}there are {known}, or a file"
    )


def parse_problems(names: Iterable[str]) -> list[ProblemName]:
    """The problems, each once; raises `ConfigError` if two of them have the same label."""
    found: dict[str, ProblemName] = {}
    for name in names:
        problem = parse_problem(name)
        other = found.setdefault(problem.label, problem)
        if other != problem:
            raise ConfigError(
                f"two problems are called {problem.label!r} (their results would share a folder): "
                "rename a file, or choose two folders"
            )
    for label in found:
        if found[label].path and _is_builtin(label):
            raise ConfigError(f"{found[label].path} is called like a built-in problem; rename it")
    return list(found.values())


def parse_methods(names: Sequence[str] | None) -> list[str]:
    """The methods, each once, all by default; raises `ConfigError` at an unknown one."""
    if names is None:
        return list(METHODS)
    for name in names:
        if name not in METHODS:
            raise ConfigError(
                f"no method {name!r}; {_nearest(name, METHODS)}there are {', '.join(METHODS)}"
            )
    return list(dict.fromkeys(names))


def _is_builtin(label: str) -> bool:
    return any(form.fullmatch(label) for form in (_CONTRASTIVE, _GRASSY, _MIXED))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
