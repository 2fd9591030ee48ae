"""The public interface: learn the sources of a problem, separate observations, sample the priors."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dichroic.config import FitConfig, check_keys
from dichroic.errors import DataError, RunError, ShapeError
from dichroic.inference.constraints import within_bounds
from dichroic.inference.samplers import make_sampler, sample_prior
from dichroic.inference.sampling import Denoisers, draw, predictive_chi2
from dichroic.io.model_files import load_model, save_model
from dichroic.learning.data import Data, prepare
from dichroic.learning.fit import InitialPriors, fit
from dichroic.learning.predictive.checks import predictive_checks
from dichroic.learning.predictive.result import PredictiveChecks
from dichroic.learning.state import State
from dichroic.operators.learnable import Parameters, from_lists, to_lists
from dichroic.operators.scaling import check_scaling, renamed_scaling, unscaled, without_scaling
from dichroic.priors import Denoiser, GaussianMixture
from dichroic.problem.identifiability import advice, zero_operators
from dichroic.problem.lazy_view import AnyView
from dichroic.problem.offsets import prepared
from dichroic.problem.problem import Problem, named_views
from dichroic.problem.view import View, numbering
from dichroic.problem.view_validation import check_seen, check_view, with_operators
from dichroic.runtime.blocks import spans
from dichroic.runtime.tracking import Tracker, as_tracker, warn
from dichroic.separation.result import Separation

MEMORY = 4 * 2**30  # to read observations in files by, where nothing else is said


def selectable(view: AnyView | str | Sequence[AnyView], separator: "Separator") -> list[AnyView]:
    """The co-observed views that `view` stands for, as in `named_views`; those in memory as `stated` has them."""
    if isinstance(view, str):
        return list(named_views(view, separator.problem))
    views = list(view) if isinstance(view, Sequence) else [view]
    return [separator.stated(v) if isinstance(v, View) else v for v in views]


def common_count(views: Sequence[AnyView]) -> int:
    """The number of observations of co-observed `views`; raises `ShapeError` where they differ."""
    counts = sorted({v.count for v in views})
    if len(counts) != 1:
        raise ShapeError(f"co-observed views need the same number of observations, got {counts}")
    if not counts[0]:
        raise DataError("there are no observations")
    return counts[0]


class Separator:
    """Learns one prior per source from a `Problem`, and separates with them.

    >>> separator = Separator(problem, FitConfig(seed=1)).fit()        # doctest: +SKIP
    >>> separator.separate("view2", n_draws=32).mean["signal"].shape   # doctest: +SKIP
    (8192, 5)
    """

    def __init__(
        self, problem: Problem | None = None, config: FitConfig | Mapping[str, Any] | None = None
    ):
        """`problem` is what to learn from; `config` a `FitConfig` or (nested) settings of one."""
        if not isinstance(config, FitConfig):
            config = FitConfig.from_dict(config or {}, where="config")
        self.problem, self.config = problem, config
        self.denoisers: dict[str, Denoiser] = {}
        self.operators: Parameters = {}  # what was learned of operators, by name
        self.metrics: list[dict[str, Any]] = []
        self._checks: PredictiveChecks | None = None  # of what was fitted

    @cached_property
    def advice(self) -> tuple[str, ...]:
        """Sentences to warn of before a fit: what cannot be learned, and where there are few observations."""
        if self.problem is None:
            raise RunError(
                "this separator was loaded without a problem, of which there is no advice"
            )
        c = self.config
        return advice(self.problem, c.mixture.stationary, outliers=c.outliers)

    def fit(
        self,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        progress: bool | Tracker | Sequence[bool | Tracker] = True,
        memory: int | None = None,
        start: "Separator | str | Path | None" = None,
    ) -> "Separator":
        """Learn the priors; with `out`, keep the run in that folder, with `resume`, go on with it.

        With `memory`, in bytes, training observations that are in files stay there: see `load_problem`.

        A `start`, a separator or what `load` takes, stands for the mixture phase: the fit goes on from its priors
        with diffusion iterations alone. Mixtures of one fit can so be where several fits of networks start,
        elsewhere or of other observations too.

        What there is to warn of is warned of where the fit begins: a `DichroicWarning` each.

        `progress` follows the fit: `True` shows it on the terminal, a `Tracker` gets the metrics of
        every iteration, and of a list all do: `[True, TensorBoard("logs")]`.

        At the end entries of held-out observations are left out and predicted (`predictive_checks`), and there is
        a warning for each view of which they are predicted badly.
        """
        if self.problem is None:
            raise RunError(
                "this separator was loaded without a problem; Separator(problem) can fit"
            )
        options: dict[str, Any] = {"out": out, "resume": resume, "memory": memory}
        if start is not None:
            other = start if isinstance(start, Separator) else Separator.load(start)
            options["start"] = InitialPriors(other._fitted(), other.operators)
        options |= {"tracker": as_tracker(progress), "advice": lambda: self.advice}
        options["at_end"] = self._at_end
        self._checks = None
        state, self.metrics = fit(self.problem, self.config, **options)
        self.denoisers, self.operators = dict(state.best), state.best_operators
        return self

    def predictive_checks(self) -> PredictiveChecks:
        """How well the priors predict entries left out of held-out observations, beside a linear filter.

        Of every view of the problem: see `dichroic.learning.predictive.checks`. What `fit` found, or computed
        anew.

        >>> print(separator.predictive_checks().table())  # doctest: +SKIP
        """
        if self.problem is None:
            raise RunError(
                "predictive checks need the problem that was fitted: Separator.load(…, problem=problem)"
            )
        if self._checks is not None:
            return self._checks
        denoisers, in_memory = self._fitted(), all(isinstance(v, View) for v in self.problem.views)
        data = prepare(self.problem, self.config, None if in_memory else MEMORY)
        return self._check(denoisers, data.at(self.operators))

    def _check(self, denoisers: Denoisers, data: Data) -> PredictiveChecks:
        assert self.problem is not None
        shapes = [[(v.name, tuple(v.shape)) for v in g] for g in self.problem.joint_views()]
        return predictive_checks(denoisers, data, self.config, shapes)

    def _at_end(self, state: State, data: Data) -> dict[str, float]:
        """Check what was fitted, warn, and give the metrics."""
        if self.config.checks == "none":
            return {}
        self._checks = self._check(state.best, data)
        warn(*self._checks.warnings)
        return self._checks.metrics

    def separate(
        self,
        view: View | str | Sequence[View],
        *,
        n_draws: int = 1,
        seed: int = 0,
        first_index: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Separation:
        """Joint posterior draws of all sources of every observation of `view`.

        `view` is a `View`, the name of a view of the problem, or a list of co-observed views. An
        observation's draws depend on `seed` and its number (from `first_index` on) only.
        """
        views = [self.stated(v) for v in named_views(view, self.problem)]
        return self._separate(
            views, n_draws=n_draws, seed=seed, first_index=first_index, progress=progress
        )

    def stated(self, view: AnyView) -> AnyView:
        """`view` with what stands for operators as operators of the sources.

        Raises `DataError` if one is zero for all observations, and warns if one is for some.
        """
        view = with_operators(view, {k: d.shape for k, d in self._fitted().items()})
        check_seen(view)
        warn(*zero_operators([view]))
        return view

    def _separate(
        self,
        views: Sequence[AnyView],
        *,
        n_draws: int,
        seed: int,
        first_index: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Separation:
        for v in views:
            check_view(v, {k: d.shape for k, d in self._fitted().items()})
        observations = prepared(views, self.operators)
        options = {"n_draws": n_draws, "first_index": first_index, "progress": progress}
        draws = draw(
            {k: self.denoisers[k] for k in observations.sources},
            observations,
            jax.random.key(seed),
            self.config,
            **options,
        )
        chi2 = predictive_chi2(observations, draws, first_index)
        x = unscaled(draws.x, self.operators)  # which may round past a bound
        x = within_bounds(x, self.config.bounds)
        return Separation(x, chi2, draws.residual, draws.converged, draws.steps)

    def stream(
        self,
        view: AnyView | str | Sequence[AnyView],
        *,
        n_draws: int = 1,
        seed: int = 0,
        chunk: int = 4096,
        first_index: int = 0,
    ) -> Iterator[tuple[int, Separation]]:
        """`separate`, `chunk` observations at a time: `(number of the first, Separation)` one after the other.

        The draws are those of `separate`, bit for bit, whatever `chunk` is. Memory is bounded by the chunk where
        `view` keeps its arrays on disk: a `io.open_view`, or a `View` whose `observations` (and mask)
        are a memory map, an HDF5 or a zarr array. Raises what `separate` does, at the chunk that it is about,
        with the numbers of its observations.

        >>> for first, part in separator.stream(open_view("new.yaml", problem), chunk=1000):  # doctest: +SKIP
        ...     np.save(f"mean-{first}.npy", part.mean["signal"])
        """
        views = selectable(view, self)
        if chunk < 1:
            raise DataError(f"chunk {chunk}: at least one observation at a time")
        for start, stop in spans(common_count(views), chunk):
            yield (
                first_index + start,
                self.separate_part(
                    views, start, stop, n_draws=n_draws, seed=seed, first_index=first_index
                ),
            )

    def separate_part(
        self,
        views: Sequence[AnyView],
        start: int,
        stop: int,
        *,
        n_draws: int = 1,
        seed: int = 0,
        first_index: int = 0,
    ) -> Separation:
        """What `separate` gives of the observations from `start` up to `stop` of co-observed `views` alone."""
        with numbering(start, stop):
            some = [v.select(slice(start, stop)) for v in views]
            return self._separate(some, n_draws=n_draws, seed=seed, first_index=first_index + start)

    def sample_prior(self, source: str, n: int, *, seed: int = 0) -> np.ndarray:
        """`n` draws from the learned prior of `source`, `(n, *shape)`."""
        if source not in self._fitted():
            raise DataError(f"no source {source!r}; there are {', '.join(self.denoisers)}")
        denoiser = self.denoisers[source]
        sampler = (
            None
            if isinstance(denoiser, GaussianMixture)
            else make_sampler(self.config.sampler, auto="heun")
        )
        key, size = jax.random.key(seed), self.config.batch_size
        x = sample_prior(denoiser, n, key, sampler=sampler, batch_size=size)
        x = unscaled({source: x}, self.operators)
        return within_bounds(x, self.config.bounds)[source]

    def with_sources(self, sources: Mapping[str, str]) -> "Separator":
        """A separator of other sources, each of a kind that was learned: `{new name: learned source}`.

        Several sources may be of one kind, such as all galaxies of a blend; what is to be separated is then a
        `View` with an operator for each.

        >>> blend = separator.with_sources({"left": "galaxy", "right": "galaxy"})  # doctest: +SKIP
        """
        check_keys(dict.fromkeys(sources.values()), self._fitted(), "with_sources")
        known = self.config.bounds
        bounds = {new: known[kind] for new, kind in sources.items() if kind in known}
        other = Separator(None, dataclasses.replace(self.config, bounds=bounds))
        other.denoisers = {name: self.denoisers[kind] for name, kind in sources.items()}
        other.operators = without_scaling(self.operators) | renamed_scaling(self.operators, sources)
        return other

    def save(self, path: str | Path) -> None:
        """Save the learned priors to a folder, as safetensors and JSON."""
        shapes = {k: list(d.shape) for k, d in self._fitted().items()}
        info = {"shapes": shapes, "config": self.config.to_dict()}
        save_model(path, self.denoisers, {**info, "operators": to_lists(self.operators)})

    @classmethod
    def load(cls, path: str | Path, *, problem: Problem | None = None) -> "Separator":
        """Load what `save` wrote, or the best model of a run folder."""
        path = Path(path)
        folder = path / "best" if (path / "run.json").exists() else path
        if folder != path and not (folder / "model.json").exists():
            raise RunError(
                f"{path} has no model yet: its fit has not learned every source; resume it"
            )
        denoisers, info = load_model(folder)
        separator = cls(problem, FitConfig.from_dict(info.get("config"), where=f"{folder}: config"))
        separator.denoisers = denoisers
        separator.operators = from_lists(info.get("operators", {}), f"{folder}: operators")
        shapes = {k: d.shape for k, d in denoisers.items()}
        check_scaling(separator.operators, shapes, f"{folder}: operators")
        return separator

    def _fitted(self) -> dict[str, Denoiser]:
        if not self.denoisers:
            raise RunError("nothing is learned yet: call fit() first, or load a model")
        return self.denoisers
