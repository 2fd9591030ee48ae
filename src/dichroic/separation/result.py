"""What a separation gives, and how arrays are saved."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dichroic.runtime.files import write_atomic


@dataclass(frozen=True)
class Separation:
    """Posterior draws of every source of some observations.

    `draws[name]` is `(n_draws, n, *shape)`, in float64 where float32 does not hold the offset of the source;
    `chi2` `(n_draws, n)` is `rᵀ Σ⁻¹ r / M` of each draw's residual, 1 on average for a calibrated posterior, NaN
    of an observation of which nothing was observed (`metrics.mean_chi2` leaves those out). Of each draw too,
    `(n_draws, n)`: the worst relative `residual` of its linear solves, the fraction of them that `converged`, and
    the `steps` of conjugate gradients that they took together (0 where solves are exact).
    """

    draws: dict[str, np.ndarray]
    chi2: np.ndarray
    residual: np.ndarray
    converged: np.ndarray
    steps: np.ndarray

    @property
    def mean(self) -> dict[str, np.ndarray]:
        """The posterior mean of each source, `(n, *shape)`."""
        return {k: x.mean(axis=0) for k, x in self.draws.items()}

    @property
    def std(self) -> dict[str, np.ndarray]:
        """The posterior standard deviation of each source, `(n, *shape)`; NaN with one draw."""
        if len(self.chi2) < 2:
            return {k: np.full(x.shape[1:], np.nan) for k, x in self.draws.items()}
        return {k: x.std(axis=0, ddof=1) for k, x in self.draws.items()}

    def save(self, path: str | Path) -> None:
        """Write draws, means and standard deviations to a `.npz` file."""
        arrays = {f"draws/{k}": x for k, x in self.draws.items()}
        arrays |= {f"mean/{k}": x for k, x in self.mean.items()}
        arrays |= {f"std/{k}": x for k, x in self.std.items()}
        save_npz(path, {"chi2": self.chi2, **arrays})


def save_npz(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a `.npz` file, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def save_npy(path: str | Path, array: np.ndarray) -> None:
    """Write an array to a `.npy` file, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomic(path, buffer.getvalue())
