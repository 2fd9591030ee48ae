"""Baselines that are learned from a problem, with the interface of `Separator`.

What differs between them is how the priors are learned (`_learn`); separating, sampling, saving and
loading are those of `Separator`. With `out`, the finished model is kept in that folder; there is nothing
to go on with before it is finished.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from dichroic.config import FitConfig
from dichroic.errors import ConfigError, RunError
from dichroic.io.model_files import load_model, save_model
from dichroic.learning.data import Data, prepare
from dichroic.priors import Denoiser
from dichroic.problem.offsets import check_no_offset
from dichroic.problem.problem import Problem, check_known
from dichroic.runtime.records import understanding
from dichroic.runtime.tracking import Tracker, as_tracker, warn
from dichroic.separation.separator import Separator


class Fitted(Separator):
    """A learned baseline; subclasses set `name` and define `_learn`.

    `settings` are the options that the result depends on, `chosen` what the fit chose by itself.
    """

    name: ClassVar[str]

    def __init__(
        self,
        problem: Problem | None = None,
        *,
        seed: int = 0,
        holdout: float = 0.1,
        **settings: Any,
    ):
        super().__init__(problem, FitConfig(seed=seed, holdout=holdout))
        self.settings = settings
        self.chosen: dict[str, Any] = {}
        self._fingerprint = ""

    def _learn(self, data: Data, tracker: Tracker) -> dict[str, Denoiser]:
        """The learned priors; also fills `chosen` and `metrics`."""
        raise NotImplementedError

    def fit(
        self,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        progress: bool | Tracker | Sequence[bool | Tracker] = True,
        memory: int | None = None,
        start: Separator | str | Path | None = None,
    ) -> Self:
        """Learn the priors; with `out`, keep the model in that folder, with `resume`, load it if it is there.

        Raises `RunError` if the folder holds a model and `resume` is not given, or if its model is of
        another problem or other settings; also for a `memory` or a `start`, which baselines do not have.
        """
        if memory is not None or start is not None:
            raise RunError(
                f"{self.name} takes no memory and no start: all observations are in memory"
            )
        if self.problem is None:
            raise RunError("this baseline was loaded without a problem; give it one to fit")
        check_known(self.problem, self.name)
        check_no_offset(self.problem, self.name)
        tracker = as_tracker(progress)
        self._fingerprint = self.problem.fingerprint() if out is not None else ""
        if out is not None and self._found(Path(out), resume):
            return self
        self.metrics, self.chosen = [], {}
        warn(*self.advice)
        self.denoisers = self._learn(prepare(self.problem, self.config), tracker)
        if out is not None:
            self.save(out)
        return self

    def _found(self, folder: Path, resume: bool) -> bool:
        if not (folder / "model.json").exists():
            return False
        if not resume:
            raise RunError(f"{folder} already holds a model; resume it or choose another folder")
        denoisers, info = load_model(folder)
        with understanding(folder / "model.json"):
            if _own(info, self.name, folder)["fingerprint"] != self._fingerprint:
                raise RunError(f"{folder} holds a model of another problem; choose another folder")
            before = FitConfig.from_dict(info["config"]).to_dict()
            if (info["baseline"]["settings"], before) != (self.settings, _config(self)):
                raise RunError(f"{folder} holds a model with other settings; choose another folder")
            self._restore(denoisers, info)
        return True

    def _restore(self, denoisers: dict[str, Denoiser], info: Mapping[str, Any]) -> None:
        own = info["baseline"]
        self.denoisers, self._fingerprint = denoisers, own["fingerprint"]
        self.chosen, self.metrics = own["chosen"], own["metrics"]

    def save(self, path: str | Path) -> None:
        """Save the learned priors to a folder, with what was chosen."""
        shapes = {k: list(d.shape) for k, d in self._fitted().items()}
        own = {
            "name": self.name,
            "settings": self.settings,
            "chosen": self.chosen,
            "metrics": self.metrics,
            "fingerprint": self._fingerprint
            or (self.problem.fingerprint() if self.problem else ""),
        }
        save_model(
            path, self.denoisers, {"shapes": shapes, "config": _config(self), "baseline": own}
        )

    @classmethod
    def load(cls, path: str | Path, *, problem: Problem | None = None) -> Self:
        """Load what `save` wrote."""
        denoisers, info = load_model(path)
        with understanding(Path(path) / "model.json"):
            own = _own(info, cls.name, path)
            loaded = cls(problem, **own["settings"])
            loaded.config = FitConfig.from_dict(info["config"], where=f"{path}: config")
            loaded._restore(denoisers, info)
        return loaded


def _config(fitted: Fitted) -> dict[str, Any]:
    return fitted.config.to_dict()


def _own(info: Mapping[str, Any], name: str, folder: str | Path) -> dict[str, Any]:
    own = info.get("baseline", {})
    if own.get("name") != name:
        raise RunError(f"{folder} holds no model of {name}, but of {own.get('name', 'Separator')}")
    return own


def candidate_ranks(rank: int | None, dims: Mapping[str, int]) -> list[int]:
    """`[rank]`, or 1, 2, 3, 4, 6, 8, 12, … and the size of the largest source; raises `ConfigError`."""
    most = max(dims.values())
    if rank is None:
        steps = {a * 2**i for i in range(most.bit_length()) for a in (1, 3)}
        return sorted({r for r in steps if r < most} | {most})
    if not isinstance(rank, int) or not 1 <= rank <= most:
        raise ConfigError(
            f"rank: must be between 1 and {most}, the size of the largest source; got {rank!r}"
        )
    return [rank]
