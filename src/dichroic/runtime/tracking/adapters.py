"""Trackers of others: TensorBoard, Weights & Biases, MLflow. Each needs its library, and only when it is made.

Every number that an iteration measured goes to `<phase>/<name>`, at the number of the iteration.
"""

import importlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from dichroic.errors import ConfigError


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an iteration by `<phase>/<name>`; those that are not known (null, NaN) are left out."""
    phase = metrics.get("phase", "fit")
    real = {
        k: float(v)
        for k, v in metrics.items()
        if isinstance(v, (int, float)) and not isinstance(v, bool) and k != "iteration"
    }
    return {f"{phase}/{k}": v for k, v in real.items() if abs(v) < float("inf")}


def flat(about: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values in nested mappings, by dotted name."""
    for key, value in about.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class _Adapter:
    """What all have in common: steps within an iteration are not tracked."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Nothing."""


class TensorBoard(_Adapter):
    """Writes event files to `folder`: `tensorboard --logdir folder` shows them."""

    def __init__(self, folder: str) -> None:
        self._summary = _library("tensorboard.summary", "TensorBoard")
        self._folder, self._writer = folder, None

    def start(self, about: Mapping[str, Any]) -> None:
        """Open an event file."""
        self._writer = self._summary.Writer(self._folder)

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Write the numbers of an iteration."""
        if self._writer is None:
            self.start({})
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics.get("iteration", 0))  # type: ignore[union-attr]
        self._writer.flush()  # type: ignore[union-attr]

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class WandB(_Adapter):
    """A run of the project `project` of Weights & Biases; on this machine only, unless `WANDB_MODE` says more."""

    def __init__(self, project: str) -> None:
        self._wandb = _library("wandb", "Weights & Biases")
        self._project, self._run = project, None

    def start(self, about: Mapping[str, Any]) -> None:
        """Begin a run with the settings in `about`."""
        mode = os.environ.get("WANDB_MODE", "offline")
        settings = dict(flat(about))
        self._run = self._wandb.init(project=self._project, config=settings, mode=mode)

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of an iteration."""
        if self._run is None:
            self.start({})
        self._run.log(numbers(metrics), step=metrics.get("iteration"))  # type: ignore[union-attr]

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
        self._run = None


class MLflow(_Adapter):
    """A run of the experiment `experiment` in the store at `uri`, such as `sqlite:///mlflow.db`."""

    def __init__(self, uri: str, experiment: str = "dichroic") -> None:
        client = _library("mlflow.tracking", "MLflow").MlflowClient
        self._entities = _library("mlflow.entities", "MLflow")
        try:
            self._client = client(tracking_uri=uri)
        except Exception as error:  # of whatever kind of store `uri` names
            raise ConfigError(f"MLflow cannot keep runs at {uri!r}: {error}") from error
        self._experiment, self._run = experiment, None

    def start(self, about: Mapping[str, Any]) -> None:
        """Begin a run with the settings in `about` as its parameters."""
        found = self._client.get_experiment_by_name(self._experiment)
        number = found.experiment_id if found else self._client.create_experiment(self._experiment)
        self._run = self._client.create_run(number).info.run_id
        params = [self._entities.Param(k, str(v)[:500]) for k, v in flat(about)]
        self._client.log_batch(self._run, params=params[:100])

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of an iteration."""
        if self._run is None:
            self.start({})
        now, step = int(1000 * time.time()), metrics.get("iteration", 0)
        rows = [self._entities.Metric(k, v, now, step) for k, v in numbers(metrics).items()]
        self._client.log_batch(self._run, metrics=rows)

    def close(self) -> None:
        """End the run."""
        if self._run is not None:
            self._client.set_terminated(self._run)
        self._run = None


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(
            f"tracking with {what} needs the package {package}: pip install 'dichroic[tracking]'"
        ) from error
