"""The joint posterior of all sources of one observation, itself a denoiser.

With `x_β | x_{t,β}` described by its mean `D_β` and covariance `V_β = σ_β² J_β` (moment matching),

    C_y = Σ + Σ_β A_β V_β A_βᵀ,   v = C_y⁻¹ (y − Σ_β A_β D_β),
    E[x_β | x_t, y] ≈ D_β + V_β A_βᵀ v                        (arXiv 2510.05205, eqs. 8 to 12).

All sources share `v`. `Posterior` also keeps apart the components of sources that are mixtures given
`x_t`; then nothing is approximated for mixture priors: see `dichroic.evidence`.
"""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from dichroic.denoise import Denoiser, Mixture
from dichroic.evidence import DEFAULT_MAX_TUPLES, Components, posterior_draw, posterior_means
from dichroic.linalg import psd_factor
from dichroic.observations import Observations
from dichroic.solve import conjugate_gradient

Sources = dict[str, Array]
EXACT_LIMIT = 128


class Estimate(eqx.Module):
    """What a denoiser says at one noise level.

    `mean` is `E[x | x_t]` (or `E[x | x_t, y]`) or a draw of `x`, `prior` is `E[x | x_t]`;
    `log_evidence` is `log p(y | x_t)` where it is known, else 0; `residual` and `converged` are those
    of the solve.
    """

    mean: PyTree[Array]
    prior: PyTree[Array]
    log_evidence: Float[Array, ""]
    residual: Float[Array, ""]
    converged: Bool[Array, ""]


class Prior(eqx.Module):
    """The denoisers of several independent sources as one denoiser over `{name: array}`."""

    denoisers: dict[str, Denoiser]

    def __call__(self, x_t: Sources, sigma: Sources) -> Estimate:
        """`E[x_β | x_{t,β}]` of every source."""
        return _unconditional({k: d(x_t[k], sigma[k]) for k, d in self.denoisers.items()})

    def draw(self, x_t: Sources, sigma: Sources, key: PRNGKeyArray) -> Estimate:
        """A draw from `p(x_β | x_{t,β})` of every source."""
        keys = jax.random.split(key, len(self.denoisers))
        given = {k: d.components(x_t[k], sigma[k]) for k, d in self.denoisers.items()}
        pairs = zip(given.items(), keys, strict=True)
        return _unconditional({k: c.draw(kk).reshape(x_t[k].shape) for (k, c), kk in pairs})


def _unconditional(x: Sources) -> Estimate:
    return Estimate(x, x, jnp.zeros(()), jnp.zeros(()), jnp.array(True))


class Posterior(eqx.Module):
    """`E[x_β | x_t, y]` with an exact solve in observation space; for up to ~128 numbers.

    `max_tuples` bounds the number of tuples of components; `max_tuples=1` is plain moment matching.
    """

    denoisers: dict[str, Denoiser]
    y: Float[Array, " obs"]
    matrices: dict[str, Float[Array, "obs _"]]
    cov_noise: Float[Array, "obs obs"]
    seen: Float[Array, " obs"]
    noise_root: Float[Array, "obs obs"]
    max_tuples: int = eqx.field(static=True)

    def __init__(
        self,
        denoisers: dict[str, Denoiser],
        observation: Observations,
        *,
        max_tuples: int = DEFAULT_MAX_TUPLES,
    ):
        self.denoisers = {k: denoisers[k] for k in observation.sources}
        self.y, self.matrices, self.cov_noise, self.seen = observation.parts()
        self.noise_root = psd_factor(self.cov_noise)
        self.max_tuples = max_tuples

    def __call__(self, x_t: Sources, sigma: Sources) -> Estimate:
        """The posterior mean of every source given its noised value `x_t` and the observation."""
        return self._condition(posterior_means, x_t, sigma)

    def draw(self, x_t: Sources, sigma: Sources, key: PRNGKeyArray) -> Estimate:
        """A draw of every source given its noised value `x_t` and the observation."""
        how = partial(posterior_draw, key=key, noise_root=self.noise_root)
        return self._condition(how, x_t, sigma)

    def draw_without_path(self, key: PRNGKeyArray) -> Sources:
        """An exact draw of `x_β | y`, when every prior is a mixture: no diffusion is needed."""
        given = {k: d.prior() for k, d in self.denoisers.items() if isinstance(d, Mixture)}
        x, _ = posterior_draw(
            *self._problem(given),
            key,
            noise_root=self.noise_root,
            seen=self.seen,
            max_tuples=self.max_tuples,
        )
        return {k: u.reshape(self.denoisers[k].shape) for k, u in zip(given, x, strict=True)}

    def _problem(self, given: dict[str, Components]) -> tuple:
        return self.y, [self.matrices[k] for k in given], self.cov_noise, list(given.values())

    def _condition(self, how: Callable, x_t: Sources, sigma: Sources) -> Estimate:
        given = {k: d.components(x_t[k], sigma[k]) for k, d in self.denoisers.items()}
        if self.max_tuples == 1:
            given = {k: c.collapse() for k, c in given.items()}
        x, log_evidence = how(*self._problem(given), seen=self.seen, max_tuples=self.max_tuples)
        return Estimate(
            mean={k: u.reshape(x_t[k].shape) for k, u in zip(given, x, strict=True)},
            prior={k: c.mean.reshape(x_t[k].shape) for k, c in given.items()},
            log_evidence=log_evidence,
            residual=jnp.zeros(()),
            converged=jnp.isfinite(log_evidence),
        )


class MatrixFreePosterior(eqx.Module):
    """`E[x_β | x_t, y]` by moment matching and conjugate gradients: no matrix is ever formed."""

    denoisers: dict[str, Denoiser]
    observation: Observations
    tolerance: float = eqx.field(static=True, default=1e-4)
    max_steps: int = eqx.field(static=True, default=100)

    def __call__(self, x_t: Sources, sigma: Sources) -> Estimate:
        """The posterior mean of every source given its noised value `x_t` and the observation."""
        obs = self.observation
        pairs = {k: self.denoisers[k].covariance_map(x_t[k], sigma[k]) for k in obs.sources}
        prior = {k: mean.reshape(x_t[k].shape) for k, (mean, _) in pairs.items()}

        def spread(v: Array) -> Sources:
            back = obs.adjoint(v)
            return {k: pairs[k][1](u.ravel()).reshape(u.shape) for k, u in back.items()}

        seen = obs.noise.observed(obs.size)
        solution = conjugate_gradient(
            lambda v: obs.noise.mv(v) + obs.apply(spread(v)),
            seen * obs.y - obs.apply(prior),
            tolerance=self.tolerance,
            max_steps=self.max_steps,
        )
        shift = spread(solution.x)
        mean = {k: prior[k] + shift[k] for k in prior}
        return Estimate(mean, prior, jnp.zeros(()), solution.residual, solution.converged)


def choose_solver(observation: Observations, solver: str = "auto") -> str:
    """`solver`, or for `"auto"` the exact solve up to 128 numbers per observation or source, else CG."""
    if solver != "auto":
        return solver
    largest = max(observation.size, *observation.dims.values())
    return "exact" if largest <= EXACT_LIMIT else "cg"


def build_posterior(
    denoisers: dict[str, Denoiser],
    observation: Observations,
    *,
    solver: str = "auto",
    max_tuples: int = DEFAULT_MAX_TUPLES,
    max_steps: int = 100,
) -> Posterior | MatrixFreePosterior:
    """The joint posterior of one observation; `solver` is `"exact"`, `"cg"` or `"auto"` (by size).

    `max_steps` bounds the steps of conjugate gradients.
    """
    if choose_solver(observation, solver) == "exact":
        return Posterior(denoisers, observation, max_tuples=max_tuples)
    used = {k: denoisers[k] for k in observation.sources}
    return MatrixFreePosterior(used, observation, max_steps=max_steps)
