"""The joint posterior of all sources of one observation, itself a denoiser.

With `x_β | x_{t,β}` described by its mean `D_β` and covariance `V_β = σ_β² J_β` (moment matching),

    C_y = Σ + Σ_β A_β V_β A_βᵀ,   v = C_y⁻¹ (y − Σ_β A_β D_β),
    E[x_β | x_t, y] ≈ D_β + V_β A_βᵀ v                        (arXiv 2510.05205, eqs. 8 to 12).

All sources share `v`. A draw comes from the same solve, of what a draw `x + e` from the prior given `x_t`
leaves (pathwise conditioning, Wilson et al., JMLR 22, 2021):

    x_β = D_β + e_β + V_β A_βᵀ C_y⁻¹ (y − Σ_β A_β (D_β + e_β) − η),   e_β ~ N(0, V_β),   η ~ N(0, Σ).

`Posterior` also keeps apart the components of sources that are mixtures given `x_t`; then nothing is
approximated for mixture priors: see `dichroic.inference.evidence`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dichroic.inference.evidence import DEFAULT_BEAM_WIDTH, posterior_draw, posterior_means
from dichroic.inference.woodbury import approximate_inverse
from dichroic.numerics.cholesky import psd_factor
from dichroic.numerics.conjugate_gradient import conjugate_gradient
from dichroic.priors import Denoiser, GaussianMixture
from dichroic.priors.components import Components
from dichroic.priors.covariance import Moments
from dichroic.problem.batches import AnyObservations
from dichroic.problem.observations import Observations

Sources = dict[str, Array]
EXACT_LIMIT = 128


class SolverStats(eqx.Module):
    """What the linear solves for one observation came to; a sum of two is that of both.

    The largest relative `residual`, the numbers of `solves` and of those that `converged`, and their `steps` of
    conjugate gradients, each of them one product with the covariance of every source.
    """

    residual: Float[Array, ""]
    solves: Int[Array, ""]
    converged: Int[Array, ""]
    steps: Int[Array, ""]

    @classmethod
    def none(cls) -> "SolverStats":
        """No solve."""
        zero = jnp.zeros((), int)
        return cls(jnp.zeros(()), zero, zero, zero)

    @classmethod
    def one(cls, converged: Any = True, residual: Any = 0.0, steps: Any = 0) -> "SolverStats":
        """One solve."""
        count = jnp.asarray(converged, int)
        return cls(jnp.asarray(residual, float), jnp.ones((), int), count, jnp.asarray(steps, int))

    def __add__(self, other: "SolverStats") -> "SolverStats":
        counts = (self.solves, self.converged, self.steps)
        others = (other.solves, other.converged, other.steps)
        residual = jnp.maximum(self.residual, other.residual)
        return SolverStats(residual, *(a + b for a, b in zip(counts, others, strict=True)))


class Estimate(eqx.Module):
    """What a denoiser says at one noise level.

    `mean` is `E[x | x_t]` (or `E[x | x_t, y]`) or a draw of `x`, `prior` is `E[x | x_t]`;
    `log_evidence` is `log p(y | x_t)` where it is known, else 0; `dual` is the `v` of an iterative solve.
    """

    mean: PyTree[Array]
    prior: PyTree[Array]
    log_evidence: Float[Array, ""]
    effort: SolverStats
    dual: Float[Array, " obs"] | None = None


class Prior(eqx.Module):
    """The denoisers of several independent sources as one denoiser over `{name: array}`."""

    denoisers: dict[str, Denoiser]

    def first_guess(self) -> None:
        """Nothing is solved for."""

    def __call__(self, x_t: Sources, sigma: Sources, guess: Array | None = None) -> Estimate:
        """`E[x_β | x_{t,β}]` of every source."""
        return _unconditional({k: d(x_t[k], sigma[k]) for k, d in self.denoisers.items()})

    def draw(self, x_t: Sources, sigma: Sources, key: PRNGKeyArray) -> Estimate:
        """A draw from `p(x_β | x_{t,β})` of every source."""
        keys = jax.random.split(key, len(self.denoisers))
        pairs = zip(self.denoisers.items(), keys, strict=True)
        return _unconditional({k: _draw(d, x_t[k], sigma[k], kk) for (k, d), kk in pairs})


def _draw(denoiser: Denoiser, x_t: Array, sigma: Array, key: PRNGKeyArray) -> Array:
    """A draw of `x` given `x_t`; beyond 128 entries without a matrix."""
    if x_t.size <= EXACT_LIMIT:
        return denoiser.components(x_t, sigma).draw(key).reshape(x_t.shape)
    moments = denoiser.moments(x_t, sigma)
    return (moments.mean + moments.deviate(key)).reshape(x_t.shape)


def _unconditional(x: Sources) -> Estimate:
    return Estimate(x, x, jnp.zeros(()), SolverStats.one())


class Posterior(eqx.Module):
    """`E[x_β | x_t, y]` with an exact solve in observation space; for up to ~128 entries.

    `beam_width` bounds the number of assignments of components; `beam_width=1` is plain moment matching.
    """

    denoisers: dict[str, Denoiser]
    y: Float[Array, " obs"]
    matrices: dict[str, Float[Array, "obs _"]]
    cov_noise: Float[Array, "obs obs"]
    seen: Float[Array, " obs"]
    noise_root: Float[Array, "obs obs"]
    beam_width: int = eqx.field(static=True)

    def __init__(
        self,
        denoisers: dict[str, Denoiser],
        observation: Observations,
        *,
        beam_width: int = DEFAULT_BEAM_WIDTH,
    ):
        self.denoisers = {k: denoisers[k] for k in observation.sources}
        self.y, self.matrices, self.cov_noise, self.seen = observation.parts()
        self.noise_root = psd_factor(self.cov_noise)
        self.beam_width = beam_width

    def first_guess(self) -> None:
        """None is needed."""

    def __call__(self, x_t: Sources, sigma: Sources, guess: Array | None = None) -> Estimate:
        """The posterior mean of every source given its noised value `x_t` and the observation."""
        return self._condition(posterior_means, x_t, sigma)

    def draw(self, x_t: Sources, sigma: Sources, key: PRNGKeyArray) -> Estimate:
        """A draw of every source given its noised value `x_t` and the observation."""
        how = partial(posterior_draw, key=key, noise_root=self.noise_root)
        return self._condition(how, x_t, sigma)

    def draw_without_path(self, key: PRNGKeyArray) -> Sources:
        """An exact draw of `x_β | y`, when every prior is a mixture: no diffusion is needed."""
        given = {k: d.prior() for k, d in self.denoisers.items() if isinstance(d, GaussianMixture)}
        x, _ = posterior_draw(
            *self._problem(given),
            key,
            noise_root=self.noise_root,
            seen=self.seen,
            beam_width=self.beam_width,
        )
        return {k: u.reshape(self.denoisers[k].shape) for k, u in zip(given, x, strict=True)}

    def _problem(
        self, given: dict[str, Components]
    ) -> tuple[Array, list[Array], Array, list[Components]]:
        return self.y, [self.matrices[k] for k in given], self.cov_noise, list(given.values())

    def _condition(
        self, how: Callable[..., tuple[list[Array], Array]], x_t: Sources, sigma: Sources
    ) -> Estimate:
        given = {k: d.components(x_t[k], sigma[k]) for k, d in self.denoisers.items()}
        if self.beam_width == 1:
            given = {k: c.collapse() for k, c in given.items()}
        x, log_evidence = how(*self._problem(given), seen=self.seen, beam_width=self.beam_width)
        return Estimate(
            mean={k: u.reshape(x_t[k].shape) for k, u in zip(given, x, strict=True)},
            prior={k: c.mean.reshape(x_t[k].shape) for k, c in given.items()},
            log_evidence=log_evidence,
            effort=SolverStats.one(jnp.isfinite(log_evidence)),
        )


class MatrixFreePosterior(eqx.Module):
    """`E[x_β | x_t, y]` by moment matching and conjugate gradients: no matrix is ever formed.

    What the sources know of their covariances without a product preconditions (`dichroic.inference.woodbury`),
    unless `precondition` is false. Means start from the `guess` they are given, unless `warm_start` is false.
    """

    denoisers: dict[str, Denoiser]
    observation: Observations
    tolerance: float = eqx.field(static=True, default=1e-2)
    max_steps: int = eqx.field(static=True, default=100)
    precondition: bool = eqx.field(static=True, default=True)
    warm_start: bool = eqx.field(static=True, default=True)

    def first_guess(self) -> Float[Array, " obs"]:
        """A guess of `v` before there is another."""
        return jnp.zeros(self.observation.size)

    def __call__(
        self, x_t: Sources, sigma: Sources, guess: Float[Array, " obs"] | None = None
    ) -> Estimate:
        """The posterior mean of every source given its noised value `x_t` and the observation.

        `guess` is the `dual` of an estimate near by.
        """
        given = self._moments(x_t, sigma)
        start = {k: m.mean for k, m in given.items()}
        return self._condition(given, start, 0.0, x_t, guess if self.warm_start else None)

    def draw(self, x_t: Sources, sigma: Sources, key: PRNGKeyArray) -> Estimate:
        """A draw of every source given its noised value `x_t` and the observation.

        No guess helps: most of `v` is the random part, new at every level.
        """
        obs = self.observation
        given = self._moments(x_t, sigma)
        key_noise, *keys = jax.random.split(key, 1 + len(given))
        pairs = zip(given.items(), keys, strict=True)
        start = {k: m.mean + m.deviate(key) for (k, m), key in pairs}
        return self._condition(given, start, obs.noise.sample(key_noise, obs.size), x_t, None)

    def _moments(self, x_t: Sources, sigma: Sources) -> dict[str, Moments]:
        names = self.observation.sources
        return {k: self.denoisers[k].moments(x_t[k], sigma[k]) for k in names}

    def _condition(
        self,
        given: Mapping[str, Moments],
        start: Sources,
        noise: Array | float,
        x_t: Sources,
        guess: Array | None,
    ) -> Estimate:
        """`start`, flattened, moved to explain what it and `noise` leave of the observation."""
        obs = self.observation
        shaped = lambda x: {k: u.reshape(x_t[k].shape) for k, u in x.items()}

        def spread(v: Array) -> Sources:
            back = obs.adjoint(v)
            return shaped({k: m.covariance(back[k].ravel()) for k, m in given.items()})

        start = shaped(start)
        options = {"precondition": approximate_inverse(obs, given)} if self.precondition else {}
        solution = conjugate_gradient(
            lambda v: obs.noise.mv(v) + obs.apply(spread(v)),
            obs.noise.observed(obs.size) * (obs.y - noise) - obs.apply(start),
            x0=guess,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            **options,
        )
        mean = jax.tree.map(jnp.add, start, spread(solution.x))
        prior = shaped({k: m.mean for k, m in given.items()})
        effort = SolverStats.one(solution.converged, solution.residual, solution.steps)
        return Estimate(mean, prior, jnp.zeros(()), effort, solution.x)


Denoise = Prior | Posterior | MatrixFreePosterior


def is_large(views: Sequence[AnyObservations]) -> bool:
    """Whether sources start as mixtures of low rank."""
    return max(max(obs.size, *obs.dims.values()) for obs in views) > EXACT_LIMIT


def choose_solver(observation: Observations, solver: str = "auto") -> str:
    """`solver`, or for `"auto"` the exact solve up to 128 entries per observation or source, else CG."""
    if solver != "auto":
        return solver
    largest = max(observation.size, *observation.dims.values())
    return "exact" if largest <= EXACT_LIMIT else "cg"


def build_posterior(
    denoisers: dict[str, Denoiser],
    observation: Observations,
    *,
    solver: str = "auto",
    beam_width: int = DEFAULT_BEAM_WIDTH,
    **options: Any,
) -> Posterior | MatrixFreePosterior:
    """The joint posterior of one observation; `solver` is `"exact"`, `"cg"` or `"auto"` (by size).

    `options` of `MatrixFreePosterior` (`tolerance`, `max_steps`, …) are for conjugate gradients alone.
    """
    if choose_solver(observation, solver) == "exact":
        return Posterior(denoisers, observation, beam_width=beam_width)
    used = {k: denoisers[k] for k in observation.sources}
    return MatrixFreePosterior(used, observation, **options)
