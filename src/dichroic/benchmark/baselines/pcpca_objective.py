"""The objective of probabilistic contrastive principal components (arXiv 2012.07977), and its maximum.

With n centred foreground and m background observations, and `y_i ~ N(0, A_i W Wᵀ A_iᵀ + σ² I)` for both,

    maximise   log p(Y_fg; W, σ²) − γ log p(Y_bg; W, σ²)   over W (D, r) and σ² ≥ σ₀².

With complete data (A = I) of covariances C_fg and C_bg, write g = γ m / n, the `contrast`, and
C = (C_fg − g C_bg) / (1 − g). For g < 1 the objective is then, up to constants,

    −½ (n − γm) (log det S + tr S⁻¹ C),   S = W Wᵀ + σ² I,

so that, as for probabilistic PCA, with the r largest eigenvalues λ_j of C and their eigenvectors U,

    σ² = max(σ₀², Σ_{j>r} λ_j / (D − r)),   W = U (Λ − σ² I)₊^½.

C need not be positive: without σ₀² the objective has no bound if the last D − r eigenvalues sum to less
than zero, and with g ≥ 1 it has none at all, since W can grow. The same holds of y where A = c I, with c W for W.
In general a maximum is found by L-BFGS from the closed form for the covariances of a Gaussian fitted to each
set; there can be several. Also where A = c I in both sets, but with two c, there is always one. Where an entry
is missing from more of the foreground than of the background, g can be too large even below 1: W then runs
off to the edge of a large box, which says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from dichroic.benchmark.baselines import linear_gaussian as g
from dichroic.benchmark.baselines.ascent import monotone_em, root

_BOX = 1e3  # the largest entry of W, in units of the foreground's root mean power


class Solution(NamedTuple):
    """`W` `(D, r)`, σ², the objective per foreground observation, and whether it is a maximum."""

    factor: np.ndarray
    noise: float
    value: float
    bounded: bool


class Spectrum(NamedTuple):
    """Ascending eigenvalues of `C` and its eigenvectors in columns."""

    values: np.ndarray
    vectors: np.ndarray


def spectrum(covariances: Sequence[np.ndarray], contrast: float) -> Spectrum:
    """The spectrum of `C = (C_fg − g C_bg) / (1 − g)` from the covariances `(D, D)` of foreground and background.

    `contrast` is `g = γ m / n`, which needs a background unless it is 0.
    """
    c = covariances[0] - (contrast * covariances[1] if contrast else 0.0)
    return Spectrum(*np.linalg.eigh(c / (1 - contrast)))


def components(c: Spectrum, rank: int, floor: float) -> tuple[np.ndarray, float]:
    """`(W, σ²)` of complete data, see above; `floor` is the least σ²."""
    kept, rest = c.values[::-1][:rank], c.values[: len(c.values) - rank]
    noise = max(floor, float(rest.mean())) if rest.size else floor
    return c.vectors[:, ::-1][:, :rank] * np.sqrt(np.maximum(kept - noise, 0)), noise


def closed_form(
    covariances: Sequence[np.ndarray], contrast: float, rank: int, *, floor: float
) -> tuple[np.ndarray, float]:
    """`components` of the `spectrum`."""
    return components(spectrum(covariances, contrast), rank, floor)


@dataclass(frozen=True)
class Pair:
    """Centred foreground and background of the source `name`; `floor` is the least σ²."""

    name: str
    foreground: g.Data
    background: g.Data | None
    floor: float

    def objective(self, factor: np.ndarray, noise: float, contrast: float) -> g.Slopes:
        """`(log p(Y_fg) − γ log p(Y_bg)) / n` and its gradient."""
        zero = {self.name: np.zeros(len(factor))}
        slopes = lambda data: data.slopes(zero, {self.name: factor}, noise)
        none = g.Slopes(0.0, {}, {}, 0.0)
        found = none.plus(slopes(self.foreground), 1 / self.foreground.count)
        if self.background is None or contrast == 0:
            return found
        return found.plus(slopes(self.background), -contrast / self.background.count)

    @cached_property
    def covariances(self) -> list[np.ndarray]:
        """Covariances of foreground and background (if there is one), each by the evidence of a full Gaussian."""
        found = []
        for data in self._sets(1.0):
            size, alone = data.dims[self.name], Pair(self.name, data, None, self.floor)
            fit = alone.exact(0.0, size)
            if fit is None:
                rough = _back_projected(data, self.name)
                begin = _moving(*closed_form([rough], 0.0, size, floor=self.floor))
                fit = alone.fit(0.0, size, begin)
            found.append(fit.factor @ fit.factor.T + fit.noise * np.eye(size))
        return found

    def best(
        self,
        contrast: float,
        rank: int,
        begin: tuple[np.ndarray, float] | None = None,
        **options: Any,
    ) -> Solution:
        """The maximum in closed form where there is one, or else that of `fit`."""
        found = self.exact(contrast, rank)
        return self.fit(contrast, rank, begin, **options) if found is None else found

    def exact(self, contrast: float, rank: int) -> Solution | None:
        """The maximum where `y = c x + η`, with white noise and one `c` for all observations."""
        sets = self._sets(contrast)
        multiples = [_multiple(data, self.name) for data in sets]
        if multiples[0] is None or len(set(multiples)) > 1:
            return None
        key = ("exact", contrast)
        if key not in self._spectra:
            moments = [data.second_moment for data in sets if isinstance(data, g.Moments)]
            self._spectra[key] = spectrum(moments, contrast)
        seen, noise = components(self._spectra[key], rank, self.floor)
        factor = seen / multiples[0]
        return Solution(factor, noise, self.objective(factor, noise, contrast).value, True)

    def fit(
        self,
        contrast: float,
        rank: int,
        begin: tuple[np.ndarray, float] | None = None,
        *,
        iterations: int = 1000,
        tolerance: float = 1e-10,
    ) -> Solution:
        """The maximum of the objective, from `begin` or the closed form of `covariances`."""
        if begin is None:
            key = ("begin", contrast)
            if key not in self._spectra:
                self._spectra[key] = spectrum(self.covariances, contrast)
            begin = _moving(*components(self._spectra[key], rank, self.floor))

        def value(arrays: list[np.ndarray]) -> tuple[float, list[np.ndarray]]:
            factor, log_noise = arrays
            s = float(np.exp(log_noise))
            found = self.objective(factor, s, contrast)
            return found.value, [found.factors[self.name], np.asarray(s * found.noise)]

        edge = _BOX * np.sqrt(max(_power(self.foreground, self.name), self.floor))
        box, levels = (-edge, edge), (np.log(self.floor), 2 * np.log(edge))
        start = [np.clip(begin[0], *box), np.clip(np.log(begin[1]), *levels)]
        options: dict[str, Any] = {"iterations": iterations, "tolerance": tolerance}
        if all(_multiple(data, self.name) is not None for data in self._sets(contrast)):
            box = (-np.inf, np.inf)
            options["roots"] = [self._root(start[0], float(np.exp(start[1]))), None]
        found = monotone_em(value, start, bounds=[box, levels], **options)
        factor, noise = found.arrays[0], float(np.exp(found.arrays[1]))
        return Solution(factor, noise, found.value, bool(np.max(np.abs(factor)) < 0.99 * edge))

    @cached_property
    def _spectra(self) -> dict[tuple[str, float], Spectrum]:
        return {}

    def _sets(self, contrast: float) -> list[g.Data]:
        """The sets that the objective of `contrast` is about."""
        if self.background is None or contrast == 0:
            return [self.foreground]
        return [self.foreground, self.background]

    def _root(self, factor: np.ndarray, noise: float) -> np.ndarray:
        """A root of the information of the foreground on its source."""
        zero = {self.name: np.zeros(len(factor))}
        curvature = self.foreground.curvature(zero, {self.name: factor}, noise)[self.name]
        return root(curvature.information / self.foreground.count)


def _multiple(data: g.Data, name: str) -> float | None:
    """`c` where `A = c I` for all observations, and the noise is white."""
    if not isinstance(data, g.Moments) or data.operators[name].ndim:
        return None
    return float(data.operators[name]) or None


def _back_projected(data: g.Data, name: str) -> np.ndarray:
    """`H⁻¹ (Σ_i Aᵀ y yᵀ A / n) H⁻¹` with `H = Σ_i AᵀA / n`: the covariance where A is the identity."""
    size = data.dims[name]
    scatter, gram = data.curvature({name: np.zeros(size)}, {name: np.zeros((size, 0))})[name]
    gram = gram / data.count
    inverse = np.linalg.pinv(gram, rcond=1e-6, hermitian=True)
    return inverse @ scatter @ inverse / data.count


def _moving(factor: np.ndarray, noise: float) -> tuple[np.ndarray, float]:
    """The start without columns of zeros, which an ascent would leave as they are."""
    still = np.sum(factor**2, axis=0) < 1e-4 * noise
    return factor + still * 1e-2 * np.sqrt(noise) * np.eye(*factor.shape), noise


def _power(data: g.Data, name: str) -> float:
    """The mean power of an entry of the source, `Σ_i ‖y‖² / Σ_i ‖A‖²`."""
    normal = data.normal()
    return normal.power / max(float(np.trace(normal.matrix)), 1e-30)
