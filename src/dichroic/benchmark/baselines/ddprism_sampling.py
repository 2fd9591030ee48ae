"""The E-step of DDPRISM as published: one conjugate-gradient step, and very many sampler steps.

With `D_β = D_β(x_{t,β}, σ_t)` and `J_β` its Jacobian, as it comes (neither made symmetric nor projected),

    r = y − Σ_β A_β D_β,   C_y u = Σ u + Σ_β σ_t² A_β J_βᵀ A_βᵀ u,
    v = r (rᵀ r) / (rᵀ C_y r),   E[x_β | x_t, y] ≈ D_β + σ_t² J_βᵀ A_βᵀ v,

where `v` is one step of conjugate gradients on `C_y v = r` from zero. It is a multiple of `r`, so that one
vector–Jacobian product per source serves both `C_y r` and the answer. A step of the sampler from σ_t to σ_s
is that of DDIM, then Langevin corrections at the new level, each with a new posterior mean `D`:

    x ← D + (σ_s / σ_t) (x − D),    x ← x − τ (x − D) + σ_s √(2τ) z.

Source: arXiv 2510.05205, section 3 and appendices; settings of its one-dimensional manifolds.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from dichroic.inference.posterior import (
    Denoise,
    Estimate,
    MatrixFreePosterior,
    SolverStats,
    Sources,
)
from dichroic.inference.samplers import DDIM, Draw, GibbsSampler, Sampler, noise_like, walk
from dichroic.numerics.batching import per_observation_if
from dichroic.numerics.conjugate_gradient import conjugate_gradient
from dichroic.priors import Denoiser
from dichroic.problem.observations import Observations


class Absolute(Denoiser):
    """`inner` with noise levels in units of `unit`, not of its own scale, and walks that start about zero."""

    inner: Denoiser
    unit: float = eqx.field(static=True, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The shape of the inner denoiser's arrays."""
        return self.inner.shape

    @property
    def scale(self) -> Array:
        """The unit of noise levels."""
        return jnp.asarray(self.unit, float)

    def __call__(self, x_t: Array, sigma: Array) -> Array:
        """`E[x | x_t]` of `inner`."""
        return self.inner(x_t, sigma)


class PublishedPosterior(MatrixFreePosterior):
    """`E[x_β | x_t, y]` by moment matching and `max_steps` steps of conjugate gradients (see above).

    `ridge` is added to the diagonal of `C_y`. A direction of negative curvature, which a learned `J` can
    have, leaves `v = 0`, the mean of the prior.
    """

    ridge: float = eqx.field(static=True, default=0.0)

    def __call__(self, x_t: Sources, sigma: Sources, guess: Array | None = None) -> Estimate:
        """The posterior mean of every source given its noised value `x_t` and the observation; from no `guess`."""
        obs = self.observation
        pulled = {
            k: jax.vjp(lambda v, k=k: self.denoisers[k](v, sigma[k]), x_t[k]) for k in obs.sources
        }
        prior = {k: mean for k, (mean, _) in pulled.items()}

        def spread(v: Array) -> Sources:
            return {k: sigma[k] ** 2 * pulled[k][1](u)[0] for k, u in obs.adjoint(v).items()}

        def cov(v: Array, spread_v: Sources) -> Array:
            return obs.noise.mv(v) + obs.apply(spread_v) + self.ridge * v

        r = obs.noise.observed(obs.size) * obs.y - obs.apply(prior)
        if self.max_steps == 1:
            along = spread(r)
            weight, residual = _one_step(r, cov(r, along))
            shift, v, steps = {k: weight * u for k, u in along.items()}, weight * r, 1
        else:
            solution = conjugate_gradient(
                lambda v: cov(v, spread(v)), r, tolerance=self.tolerance, max_steps=self.max_steps
            )
            v, residual, steps = solution.x, solution.residual, solution.steps
            shift = spread(v)
        mean = {k: prior[k] + shift[k] for k in prior}
        effort = SolverStats.one(residual <= self.tolerance, residual, steps)
        return Estimate(mean, prior, jnp.zeros(()), effort, v)


def _one_step(r: Array, cov_r: Array) -> tuple[Array, Array]:
    """`(w, ‖r − w C r‖ / ‖r‖)` with `w = rᵀ r / rᵀ C r`, or 0 where `rᵀ C r` is not positive."""
    square, curvature = r @ r, r @ cov_r
    ok = jnp.isfinite(curvature) & (curvature > 0)
    weight = jnp.where(ok, square / jnp.where(ok, curvature, 1), 0)
    left = r - weight * cov_r
    return weight, jnp.sqrt(left @ left / jnp.where(square > 0, square, 1))


class PublishedPredictorCorrector(Sampler):
    """DDIM steps, each followed by `corrections` Langevin steps of size `tau` (see above).

    A step evaluates the posterior `1 + corrections` times; the walk ends with one more evaluation.
    """

    corrections: int = eqx.field(static=True, default=1)
    tau: float = eqx.field(static=True, default=0.1)
    cg_steps: int = eqx.field(static=True, default=1)
    ridge: float = eqx.field(static=True, default=0.0)

    def step(
        self,
        denoise: Denoise,
        x: Sources,
        key: PRNGKeyArray,
        here: Sources,
        there: Sources,
        guess: Array | None,
    ):
        """A prediction at the next level and its corrections."""
        x, e = DDIM.step(self, denoise, x, key, here, there, guess)  # type: ignore[arg-type]
        for i in range(self.corrections):
            d = denoise(x, there).mean
            z = noise_like(jax.random.fold_in(key, i), x)
            move = lambda x, d, z, s: x - self.tau * (x - d) + s * (2 * self.tau) ** 0.5 * z
            x = jax.tree.map(move, x, d, z, there)
        return x, e

    def draw(
        self, denoisers: dict[str, Denoiser], obs: Observations, key: PRNGKeyArray, **options: Any
    ) -> Draw:
        """One joint draw of the sources of one observation."""
        posterior = PublishedPosterior(
            denoisers, obs, tolerance=1e-6, max_steps=self.cg_steps, ridge=self.ridge
        )
        return walk(self, posterior, denoisers, key)


class Started(Observations):
    """Observations with the draws of their sources where Gibbs sampling starts, `{name: (n, *shape)}`."""

    start: dict[str, Array] = eqx.field(metadata=per_observation_if("many"))

    @property
    def many(self) -> bool:
        """`start` is per observation, always."""
        return True


class PublishedGibbs(GibbsSampler):
    """Gibbs sampling from the draws that `Started` observations bring, else from zero."""

    def start(self, denoisers: dict[str, Denoiser], obs: Observations) -> Sources:
        """Where the first sweep starts."""
        return obs.start if isinstance(obs, Started) else super().start(denoisers, obs)
