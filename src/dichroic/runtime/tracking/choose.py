"""Which trackers follow a fit: as `fit(progress=…)` and `--track` say it."""

from collections.abc import Callable, Sequence

from dichroic.config import check_keys
from dichroic.errors import ConfigError
from dichroic.runtime.tracking.adapters import MLflow, TensorBoard, WandB
from dichroic.runtime.tracking.base import Several, Silent, Tracker
from dichroic.runtime.tracking.console import Console

KINDS: dict[str, tuple[Callable[[str], Tracker], str]] = {
    "tensorboard": (TensorBoard, "DIR"),
    "wandb": (WandB, "PROJECT"),
    "mlflow": (MLflow, "URI"),
}


def as_tracker(progress: bool | Tracker | Sequence[bool | Tracker]) -> Tracker:
    """`progress` itself; `True` is a `Console`, `False` silence, and a list all of what it lists."""
    if isinstance(progress, bool):
        return Console() if progress else Silent()
    if isinstance(progress, Sequence):
        return Several([as_tracker(p) for p in progress])
    return progress


def parse_tracker(text: str) -> Tracker:
    """The tracker that `tensorboard:DIR`, `wandb:PROJECT` or `mlflow:URI` says.

    Raises `ConfigError` at anything else, and where the library is not installed.
    """
    kind, _, where = text.partition(":")
    check_keys([kind], KINDS, "--track")
    make, what = KINDS[kind]
    if not where:
        raise ConfigError(f"--track {text}: expected {kind}:{what}")
    return make(where)
