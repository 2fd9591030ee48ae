"""DDPRISM as published, and DDPRISM-Gibbs: what to compare a `Separator` with, on the same `Problem`.

Expectation-maximisation by sampling alone. The sources of each group of `learning_order` are learned in turn,
those of earlier groups frozen, from the views that see no later source:

    Gaussian iterations    E-step: draws of the sources of every observation; M-step: one Gaussian by PPCA
    diffusion iterations   E-step: the same with what was learned last; M-step: a network by score matching

Draws with an entry beyond `±limit` are dropped before training. The E-step draws all sources of an
observation jointly or, with `sampling="gibbs"`, one at a time given the others; then draws out of range are
replaced by those of the iteration before, where the next iteration also starts. The weights after the last
iteration count; nothing is held out. See `ddprism_sampling` and `ddprism_training` for the two steps.

Source: arXiv 2510.05205 (NeurIPS 2025) and its public configurations. Left out: dropout and the modulation of
layers by the noise level in the networks of the mixed problem (those of the contrastive one are used).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from dichroic.benchmark.baselines.ddprism_iterations import DdprismConfig as DdprismConfig
from dichroic.benchmark.baselines.ddprism_iterations import (
    State,
    advance,
    alone_steps,
    draw,
    fresh_network,
    make_sampler,
)
from dichroic.benchmark.baselines.ddprism_sampling import Absolute
from dichroic.errors import DataError, FormatError, RunError
from dichroic.inference.samplers import sample_prior
from dichroic.inference.sampling import Denoisers, predictive_chi2
from dichroic.io.model_files import pack, read_tensors, unpack, write_tensors
from dichroic.learning.data import learning_order
from dichroic.priors import Denoiser, DiffusionPrior, GaussianMixture
from dichroic.problem.identifiability import advice
from dichroic.problem.observations import Observations
from dichroic.problem.offsets import check_no_offset, prepared
from dichroic.problem.problem import Problem, check_known, joint_observations, named_views
from dichroic.problem.splits import holdout
from dichroic.problem.view import View
from dichroic.problem.view_validation import check_view, with_operators
from dichroic.runtime.files import writing
from dichroic.runtime.records import understanding
from dichroic.runtime.tracking import Tracker, as_tracker, warn
from dichroic.separation.result import Separation

FILE = "ddprism.safetensors"
FREE_SETTINGS = ("batch_size",)


class Ddprism:
    """Learns the sources of a problem as DDPRISM does, and separates with them.

    >>> ddprism = Ddprism(problem, config=DdprismConfig.small()).fit()   # doctest: +SKIP
    >>> ddprism.separate("view2").draws["source2"].shape                 # doctest: +SKIP
    (1, 8192, 5)
    """

    def __init__(
        self, problem: Problem, *, seed: int = 0, config: DdprismConfig | None = None
    ) -> None:
        """`problem` is what to learn from; the default `config` is `DdprismConfig()`, as published."""
        self.problem, self.seed, self.config = problem, seed, config or DdprismConfig()
        self.denoisers: Denoisers = {}
        self.metrics: list[dict[str, Any]] = []

    def fit(
        self,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        progress: bool | Tracker = True,
    ) -> "Ddprism":
        """Run all iterations; with `out`, keep the state there after each, with `resume`, go on with it.

        Raises `RunError` if `out` holds a fit and `resume` is not given, or that of another problem.
        """
        check_known(self.problem, "DDPRISM")
        check_no_offset(self.problem, "DDPRISM")
        tracker = as_tracker(progress)
        about = self._about()
        state = State() if out is None else _open(Path(out), about, resume=resume)
        if not state.total:
            warn(*advice(self.problem, outliers="keep"))
        data = training_observations(self.problem)
        order = learning_order(data)
        while not state.done:
            state = advance(state, data, order, self.seed, self.config, tracker)
            if out is not None:
                save_state(Path(out) / FILE, state, about)
            tracker.iteration(state.metrics[-1])
        self.denoisers, self.metrics = dict(state.denoisers), list(state.metrics)
        return self

    def separate(
        self,
        view: View | str | Sequence[View],
        *,
        n_draws: int = 1,
        seed: int = 0,
        first_index: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Separation:
        """Posterior draws of all sources of every observation of `view`, as `Separator.separate`.

        Draws beyond `±limit` are kept. Gibbs sampling starts from zero.
        """
        views = named_views(view, self.problem)
        shapes = {k: d.shape for k, d in self._fitted().items()}
        views = [with_operators(v, shapes) for v in views]
        for v in views:
            check_view(v, shapes)
        obs = prepared(views, {})
        options = {"n_draws": n_draws, "first_index": first_index, "progress": progress}
        key = jax.random.key(seed)
        draws = draw(self.denoisers, obs, key, self.config, self.config.steps, **options)
        rest = draws.residual, draws.converged, draws.steps
        return Separation(draws.x, predictive_chi2(obs, draws, first_index), *rest)

    def sample_prior(self, source: str, n: int, *, seed: int = 0) -> np.ndarray:
        """`n` draws from the learned prior of `source`, `(n, *shape)`."""
        if source not in self._fitted():
            raise DataError(f"no source {source!r}; there are {', '.join(self.denoisers)}")
        prior = Absolute(self.denoisers[source], self.config.unit)
        sampler = make_sampler(self.config, alone_steps(self.config, self.config.steps))
        key = jax.random.key(seed)
        return sample_prior(prior, n, key, sampler=sampler, batch_size=self.config.batch_size)

    def _fitted(self) -> Denoisers:
        if not self.denoisers:
            raise RunError("nothing is learned yet: call fit() first")
        return self.denoisers

    def _about(self) -> dict[str, Any]:
        settings = {"seed": self.seed, **dataclasses.asdict(self.config)}
        settings["iterations"] = list(self.config.iterations)
        return {"fingerprint": self.problem.fingerprint(), "settings": settings}


def training_observations(problem: Problem) -> list[Observations]:
    """The observations of each (joint) view, all but those that the view itself holds out."""
    chosen = lambda views: any(v.held_out_mask is not None for v in views)
    split = lambda views: holdout(views, 0.0, 0)[0] if chosen(views) else views
    return [joint_observations(split(views)) for views in problem.joint_views()]


# On disk


def save_state(path: Path, state: State, about: Mapping[str, Any]) -> None:
    """Write a state, and what it is a fit of, as one file, atomically."""
    arrays: dict[str, Any] = {}
    described = {}
    for name, denoiser in state.denoisers.items():
        described[name], tensors = _pack(denoiser)
        arrays |= {f"denoiser:{name}:{k}": a for k, a in tensors.items()}
    for i, x in state.samples.items():
        arrays |= {f"samples:{i}:{k}": a for k, a in x.items()}
    plain = {k: getattr(state, k) for k in ("group", "phase", "iteration", "total", "metrics")}
    write_tensors(path, arrays, {**about, "state": plain, "denoisers": described})


def _open(folder: Path, about: Mapping[str, Any], *, resume: bool) -> State:
    """The state kept in `folder`, checked to be of the same fit; the initial one if there is none."""
    path = folder / FILE
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return State()
    if not resume:
        raise RunError(f"{folder} already holds a fit; resume it, or choose another folder")
    arrays, meta = read_tensors(path)
    with understanding(path):
        return _same_fit(folder, arrays, meta, about)


def _same_fit(
    folder: Path, arrays: Any, meta: Mapping[str, Any], about: Mapping[str, Any]
) -> State:
    if meta["fingerprint"] != about["fingerprint"]:
        raise RunError(f"{folder} holds a fit of another problem; choose another folder")
    before, now = meta["settings"], about["settings"]
    changed = [
        f"{k}: {before.get(k)!r} before, {now[k]!r} now"
        for k in now
        if before.get(k) != now[k] and k not in FREE_SETTINGS
    ]
    if changed:
        raise RunError(f"{folder} holds a fit with other settings ({'; '.join(changed)})")
    return _state(arrays, meta)


def _state(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> State:
    denoisers, samples = {}, {}
    config = DdprismConfig(**{k: v for k, v in meta["settings"].items() if k != "seed"})
    for name, described in meta["denoisers"].items():
        prefix = f"denoiser:{name}:"
        own = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
        denoisers[name] = _unpack(described, own, config)
    for label, a in arrays.items():
        if label.startswith("samples:"):
            _, i, name = label.split(":")
            samples.setdefault(int(i), {})[name] = a
    plain: dict[str, Any] = {**meta["state"], "metrics": tuple(meta["state"]["metrics"])}
    return State(**plain, denoisers=denoisers, samples=samples)


def _pack(denoiser: Denoiser) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if isinstance(denoiser, GaussianMixture):
        arrays, about = pack(denoiser)
        return about, arrays
    assert isinstance(denoiser, DiffusionPrior)
    leaves = jax.tree.leaves(eqx.filter(denoiser.network, eqx.is_array))
    about = {"kind": "network", "shape": list(denoiser.shape)}
    return about, {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}


def _unpack(
    about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], config: DdprismConfig
) -> Denoiser:
    if about["kind"] != "network":
        return unpack(arrays, about)
    if math.prod(about["shape"]) > sum(a.size for a in arrays.values()):
        raise FormatError("a network for larger sources than its arrays are")
    like = fresh_network(tuple(about["shape"]), jax.random.key(0), config)
    weights, frozen = eqx.partition(like.network, eqx.is_array)
    filled = [jnp.asarray(arrays[k]) for k in sorted(arrays)]
    if [a.shape for a in filled] != [a.shape for a in jax.tree.leaves(weights)]:
        raise FormatError("the arrays of a network do not fit its settings")
    network = eqx.combine(jax.tree.unflatten(jax.tree.structure(weights), filled), frozen)
    return eqx.tree_at(lambda d: d.network, like, network)
