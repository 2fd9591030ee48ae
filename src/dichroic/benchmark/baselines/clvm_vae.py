"""The nonlinear contrastive latent variable model: one decoder per source, one encoder per view.

    x_β = g_β(z_β),  z_β ~ N(0, I_L),      y = Σ_β A_β x_β + η,  η ~ N(0, Σ),
    q(z | y, A, Σ) = N(m, F Fᵀ),           z = all latents that the view sees,

with networks `g_β` shared by the views and `(m, F)` from one network per (joint) view, all trained together on
the evidence bound of all views (Severson, Ghosh and Ng, AAAI 2019; Abid and Zou, arXiv 1902.04601; there
`A = I`, and `F` is diagonal). What the encoders are given is in `clvm_vae_networks`, the training in
`clvm_vae_training`. A draw is `g(z)` with `z ~ q`. Latents that a source has no use for fall back to the prior
at no cost, so their number `L` only has to be large enough. The truth is never looked at.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from dichroic.benchmark.baselines.clvm_vae_networks import (
    Encoder,
    Settings,
    Vae,
    blank,
    filled,
    initial,
)
from dichroic.benchmark.baselines.clvm_vae_training import train
from dichroic.config import FitConfig
from dichroic.errors import ConfigError, DataError, FormatError, RunError
from dichroic.inference.samplers import Draws, observation_keys
from dichroic.inference.sampling import predictive_chi2
from dichroic.io.model_files import read_tensors, write_tensors
from dichroic.learning.data import prepare
from dichroic.numerics.deterministic_map import BATCH_WIDTH, chunk_size, chunks, own_slots
from dichroic.problem.batches import in_memory
from dichroic.problem.identifiability import advice
from dichroic.problem.observations import Observations
from dichroic.problem.offsets import check_no_offset, prepared
from dichroic.problem.problem import Problem, check_known, named_views
from dichroic.problem.view import View
from dichroic.problem.view_validation import check_view, with_operators
from dichroic.runtime.records import understanding
from dichroic.runtime.tracking import Tracker, as_tracker, warn
from dichroic.separation.result import Separation

FILE = "clvm_vae.safetensors"
MOST_LATENT = 16
BATCH = 1024


# Draws


@eqx.filter_jit
def draw_batches(vae: Vae, name: str, rows: Any, shared: Any, keys: Array) -> dict[str, Array]:
    """`g(z)`, `z ~ q(z | y)`, for batches of observations."""
    encoder = vae.encoders[name]

    def one(row: Observations, key: PRNGKeyArray) -> dict[str, Array]:
        mean, factor = encoder(encoder.datum(eqx.combine(row, shared)).inputs)
        return encoder.decode(vae.decoders, mean + factor @ jax.random.normal(key, mean.shape))

    return jax.lax.map(lambda group: jax.vmap(one)(*group), (rows, keys))


@eqx.filter_jit
def prior_batches(decoder: Callable[[Array], Array], latent: int, keys: Array) -> Array:
    """`g(z)`, `z ~ N(0, I)`, for batches of keys."""
    return jax.lax.map(jax.vmap(lambda k: decoder(jax.random.normal(k, (latent,)))), keys)


# The public interface


class ClvmVae:
    """A variational contrastive latent variable model of a `Problem`, used as a `Separator` is.

    `latent` is the number of latents of each source, by default that of its entries, 16 at most;
    `width` that of the hidden layers; `steps` the number of training steps.

    >>> model = ClvmVae(problem, seed=1).fit()                     # doctest: +SKIP
    >>> model.separate("view2", n_draws=32).mean["signal"].shape   # doctest: +SKIP
    (8192, 5)
    """

    def __init__(
        self,
        problem: Problem | None = None,
        *,
        seed: int = 0,
        latent: int | None = None,
        width: int = 128,
        steps: int = 8000,
    ):
        if latent is None:
            sizes = [math.prod(s) for s in problem.shapes.values()] if problem else [1]
            latent = min(MOST_LATENT, max(sizes))
        for name, value in (("latent", latent), ("width", width), ("steps", steps)):
            if int(value) != value or value < 1:
                raise ConfigError(
                    f"ClvmVae: {name} must be a whole number from 1 on, got {value!r}"
                )
        self.problem = problem
        self.settings = Settings(int(seed), int(latent), int(width), steps=int(steps))
        self.metrics: list[dict[str, Any]] = []
        self.vae: Vae | None = None
        self._structure: dict[str, Any] = {}
        self._fingerprint = ""

    def fit(
        self,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        progress: bool | Tracker = True,
    ) -> "ClvmVae":
        """Train; with `out`, keep the finished model in that folder, with `resume`, take it from there.

        Nothing is kept of a training that was cut off. Raises `RunError` if the folder holds a model and
        `resume` is not given, or if it is of another problem or other settings.
        """
        if self.problem is None:
            raise RunError("this model was loaded without a problem; ClvmVae(problem) can fit")
        check_known(self.problem, "CLVM-VAE")
        check_no_offset(self.problem, "CLVM-VAE")
        path = None if out is None else Path(out) / FILE
        if path is not None and path.exists():
            if not resume:
                raise RunError(
                    f"{path.parent} already holds a model; resume, or choose another folder"
                )
            return self._restore(path, problem=self.problem, settings=self.settings)
        tracker = as_tracker(progress)
        self._train(self.problem, tracker)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.save(path.parent)
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
        """Draws from `q` of all sources of every observation of `view`.

        `view` is the name of a view of the problem, or a `View` (or several co-observed ones) with the names
        of those that an encoder was trained on. An observation's draws depend on `seed` and its number (from
        `first_index` on) only.
        """
        views = named_views(view, self.problem, what="model")
        vae, name = self._fitted(), "+".join(v.name for v in views)
        shapes = {k: d.shape for k, d in vae.decoders.items()}
        views = [with_operators(v, shapes) for v in views]
        for v in views:
            check_view(v, shapes)
        obs = prepared(views, {})
        _check_encoder(vae.encoders, name, obs)
        x, key, own = [], jax.random.key(seed), own_slots(obs.count, first_index)
        for d in range(n_draws):
            parts = []
            for start, chunk, index in chunks(obs, BATCH, first_index):
                keys = observation_keys(key, jnp.asarray(d), index)
                parts.append(jax.tree.map(_flat, draw_batches(vae, name, *chunk, keys)))
                if progress:
                    progress(
                        d * obs.count + min(start + index.size, obs.count), n_draws * obs.count
                    )
            x.append(jax.tree.map(lambda *a: np.concatenate(a)[own], *parts))
        draws = jax.tree.map(lambda *a: np.stack(a), *x)
        zeros, ones = np.zeros((2, n_draws, obs.count), np.float32), np.ones((n_draws, obs.count))
        rest = zeros[0], ones, zeros[1].astype(int)
        chi2 = predictive_chi2(obs, Draws(draws, zeros[1], *rest), first_index)
        return Separation(draws, chi2, *rest)

    def sample_prior(self, source: str, n: int, *, seed: int = 0) -> np.ndarray:
        """`n` draws `g(z)`, `z ~ N(0, I)`, of `source`, `(n, *shape)`."""
        vae, out = self._fitted(), []
        if source not in vae.decoders:
            raise DataError(f"no source {source!r}; there are {', '.join(vae.decoders)}")
        key, width = jax.random.key(seed), chunk_size(n, BATCH)
        for start in range(0, n, width):
            index = jnp.arange(start, start + width).reshape(-1, BATCH_WIDTH)
            keys = observation_keys(key, jnp.zeros((), int), index)
            out.append(_flat(prior_batches(vae.decoders[source], self.settings.latent, keys)))
        return np.concatenate(out)[:n]

    def save(self, path: str | Path) -> None:
        """Save the model to a folder, as safetensors."""
        vae = self._fitted()
        leaves = jax.tree.leaves(eqx.filter(vae, eqx.is_array))
        meta = {
            "kind": "clvm-vae",
            "settings": dataclasses.asdict(self.settings),
            "structure": self._structure,
            "fingerprint": self._fingerprint,
            "metrics": self.metrics,
        }
        Path(path).mkdir(parents=True, exist_ok=True)
        write_tensors(Path(path) / FILE, {f"{i:04d}": a for i, a in enumerate(leaves)}, meta)

    @classmethod
    def load(cls, path: str | Path, *, problem: Problem | None = None) -> "ClvmVae":
        """Load what `save` or `fit` wrote to a folder."""
        return cls(problem)._restore(Path(path) / FILE)

    def _restore(
        self, path: Path, *, problem: Problem | None = None, settings: Settings | None = None
    ) -> "ClvmVae":
        """Take the model from `path`, checked to be of `problem` and `settings` where they are given."""
        arrays, meta = read_tensors(path)
        if meta.get("kind") != "clvm-vae":
            raise FormatError(f"{path} holds something other than a ClvmVae")
        with understanding(path):
            return self._take(path, arrays, meta, problem, settings)

    def _take(
        self,
        path: Path,
        arrays: Mapping[str, np.ndarray],
        meta: Mapping[str, Any],
        problem: Problem | None,
        settings: Settings | None,
    ) -> "ClvmVae":
        found = Settings(**meta["settings"])
        if settings is not None and found != settings:
            raise RunError(f"{path} was fitted with other settings: {found}, not {settings}")
        if problem is not None and meta["fingerprint"] != problem.fingerprint():
            raise RunError(f"{path} was fitted to another problem; choose another folder")
        leaves = [arrays[k] for k in sorted(arrays)]
        if found.depth > len(leaves):
            raise FormatError(f"{path} is damaged: {found.depth} layers, but {len(leaves)} arrays")
        self.vae = filled(blank(meta["structure"], found), leaves)
        self.settings, self._structure, self.metrics = found, meta["structure"], meta["metrics"]
        self._fingerprint = meta["fingerprint"]
        return self

    def _train(self, problem: Problem, tracker: Tracker) -> None:
        warn(*advice(problem))
        data, began = prepare(problem, FitConfig(seed=self.settings.seed)), time.perf_counter()
        views = dict(zip(data.names, map(in_memory, data.train), strict=True))
        held_out = dict(zip(data.names, map(in_memory, data.test), strict=True))
        self.metrics, sources = [], "+".join(problem.names)

        def follow(done: int, steps: int, bound: float) -> None:
            seconds = round(time.perf_counter() - began, 3)
            row = {"phase": "clvm-vae", "sources": sources, "step": done, "evidence_bound": bound}
            self.metrics.append({**row, "seconds": seconds})
            tracker.progress("clvm-vae", done, steps)

        self._fingerprint = problem.fingerprint()
        vae, self._structure = initial(views, problem.shapes, self.settings)
        self.vae, bound = train(vae, views, held_out, self.settings, follow)
        tracker.iteration({**self.metrics[-1], "evidence_bound": bound})

    def _fitted(self) -> Vae:
        if self.vae is None:
            raise RunError("nothing is learned yet: call fit() first, or load a model")
        return self.vae


def _check_encoder(encoders: Mapping[str, Encoder], name: str, obs: Observations) -> None:
    """Raise `DataError` unless there is an encoder called `name` for the sources of `obs`."""
    if name not in encoders:
        raise DataError(
            f"no encoder for a view called {name!r}: an encoder belongs to a view that was trained on, "
            f"so name yours as one of {', '.join(encoders)}"
        )
    if set(obs.sources) != set(encoders[name].sources):
        raise DataError(
            f"view {name!r} sees {', '.join(sorted(obs.sources))}, but its encoder was trained on "
            f"{', '.join(encoders[name].sources)}"
        )


def _flat(a: Array) -> np.ndarray:
    return np.asarray(a).reshape(-1, *a.shape[2:])
