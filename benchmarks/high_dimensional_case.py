"""The sources, observations and analytic posterior of `high_dimensional.py`.

`field` is a stationary Gaussian field of covariance `exp(−(|Δ₁| + |Δ₂|) / ℓ)`, a power law; `patches` are bumps of
random heights and white noise, or one of several such Gaussians about means of their own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import eigh
from scipy.special import softmax

from dichroic.operators import BlockAverage, Convolve, Identity, Operator
from dichroic.operators.noise import IsotropicNoise, Masked
from dichroic.priors import CustomDenoiser, Denoiser, DiffusionPrior, GaussianMixture, dct_spectrum
from dichroic.problem.observations import Observations

SEED, NOISE, COUNT, WIDEST = 0, 0.1, 64, 32
RANK, BUMPS, FLOOR, PRIOR_DRAWS = 64, 16, 0.01, 512
SIDE = 28


# The sources


class Field(Denoiser):
    """The exact denoiser of a field of covariance `C ⊗ C`, by the eigenvectors of `C`."""

    vectors: jax.Array
    values: jax.Array
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x_t, sigma):  # noqa: D102
        return self.filtered(x_t, self.values / (self.values + sigma**2))

    def filtered(self, x, gain):
        """`x` with its numbers along the eigenvectors times `gain`."""
        u = self.vectors
        return u @ (gain * (u.T @ x @ u)) @ u.T

    def base(self) -> GaussianMixture:
        """The Gaussian of its `RANK` leading directions and a floor."""
        u, values = np.asarray(self.vectors), np.asarray(self.values).ravel()
        order = np.argsort(values)[::-1]
        rank = min(RANK, values.size // 2)
        top, floor = order[:rank], values[order[rank:]].mean()
        basis = np.kron(u, u)[:, top]
        return mixture(basis[None], values[None, top] - floor, floor, np.zeros((1, values.size)))


def correlation(side: int) -> np.ndarray:
    """The field's along one axis."""
    steps = np.abs(np.subtract.outer(np.arange(side), np.arange(side)))
    return np.exp(-steps / (side / 6))


def random_field(side: int) -> Field:
    values, vectors = np.linalg.eigh(correlation(side))
    return Field(jnp.asarray(vectors), jnp.asarray(np.outer(values, values)), (side, side))


def mixture(basis, variances, floor: float, means) -> GaussianMixture:
    count, dim, _ = basis.shape
    side = round(np.sqrt(dim))
    weights, floors = np.full(count, -np.log(count)), np.full(count, floor)
    return GaussianMixture(weights, means, basis, variances, floors, (side, side))


def patches(side: int, kinds: int) -> GaussianMixture:
    """Gaussians of `BUMPS` bumps in random places; of several kinds, each about four bumps elsewhere."""
    rng = np.random.default_rng(SEED)
    at = np.stack(np.meshgrid(*[np.arange(side)] * 2, indexing="ij"), axis=-1).reshape(-1, 1, 2)
    bumps = lambda n: np.exp(
        -0.5 * np.sum((at - rng.uniform(0, side, size=(n, 2))) ** 2, axis=-1) / (side / 10) ** 2
    )
    parts = [np.linalg.svd(bumps(BUMPS), full_matrices=False)[:2] for _ in range(kinds)]
    basis, scales = (np.stack(a) for a in zip(*parts, strict=True))
    means = np.stack([bumps(4).sum(axis=1) * (kinds > 1) for _ in range(kinds)])
    return mixture(basis, scales**2, FLOOR, means)


class Correction(eqx.Module):
    """The network that training would find: what an exact denoiser has and its base has not."""

    exact: Denoiser
    base: GaussianMixture

    def __call__(self, x, c_noise):  # noqa: D102
        scale = self.base.scale
        sigma = scale * jnp.exp(4 * c_noise)
        total = jnp.sqrt(sigma**2 + scale**2)
        x_t = self.base.location + total * x
        return (self.exact(x_t, sigma) - self.base(x_t, sigma)) * total / (sigma * scale)


@dataclass(frozen=True)
class Sources:
    """The exact denoisers, with their bases and spectra."""

    exact: dict[str, Denoiser]
    bases: dict[str, GaussianMixture]
    spectra: dict[str, np.ndarray]

    def priors(self, model: str) -> dict[str, Denoiser]:
        """With a model of the covariance, or `"one + another"` for field and patches."""
        names = model.split(" + ") if " + " in model else [model] * len(self.exact)
        return {k: self._prior(k, m) for k, m in zip(self.exact, names, strict=True)}

    def _prior(self, name: str, model: str) -> Denoiser:
        exact, base = self.exact[name], self.bases[name]
        if model in ("jacobian", "base"):
            return DiffusionPrior(base, Correction(exact, base), model)  # type: ignore[arg-type]
        options = {} if model == "no base" else {"spectrum": self.spectra[name]}
        options |= {"covariance": "spectrum"} if model == "spectrum" else {}
        return CustomDenoiser(_call, exact.shape, exact, std=base.scale, **options)


def _call(denoiser: Denoiser, x, sigma):
    return denoiser(x, sigma)


def sources(side: int, kinds: int = 1) -> Sources:
    fields, many = random_field(side), patches(side, kinds)
    white = np.random.default_rng(SEED + 1).normal(size=(PRIOR_DRAWS, side, side))
    keys = jax.random.split(jax.random.key(SEED), PRIOR_DRAWS)
    draws = fields.filtered(white, jnp.sqrt(fields.values)), jax.vmap(many.sample)(keys)
    exact = {"field": fields, "patches": many}
    spectra = {k: dct_spectrum(np.asarray(x)) for k, x in zip(exact, draws, strict=True)}
    return Sources(exact, {"field": fields.base(), "patches": many}, spectra)


# The observations, and the analytic answer


def operator(name: str, side: int) -> Operator:
    if name == "blur":
        line = np.exp(-0.5 * np.arange(-2, 3) ** 2)
        return Convolve(np.outer(line, line) / line.sum() ** 2, shape=(side, side))
    return BlockAverage((side, side), 2) if name == "block" else Identity((side, side))


@dataclass(frozen=True)
class Case:
    """Observations, with the mean of their posterior, products with its precision and its widest directions."""

    found: Sources
    obs: Observations
    mean: np.ndarray
    elsewhere: float  # the posterior probability of other kinds of patches
    precision: Callable[[np.ndarray], np.ndarray]
    widest: tuple[np.ndarray, np.ndarray] | None

    def chi2(self, x: Mapping[str, Any]) -> list[str]:
        """`χ²/d` of one draw per observation; over the widest directions, too, or the share elsewhere."""
        parts = [np.asarray(x[k], np.float64).reshape(COUNT, -1) for k in self.found.exact]
        r = np.concatenate(parts, axis=1) - self.mean
        each = np.sum(r * self.precision(r), axis=1) / r.shape[1]
        if self.widest is None:
            near = each < 1.5
            return [f"{each[near].mean():.3f}", f"{100 * np.mean(~near):.0f}%"]
        values, vectors = self.widest
        return [f"{each.mean():.3f}", f"{np.mean((r @ vectors) ** 2 / values):.2f}"]


def case(name: str, side: int = SIDE, kinds: int = 1, *, directions: bool = False) -> Case:
    """Both sources through one operator; with several kinds, the posterior of the kind that it was.

    With `directions` (and one kind), the widest of the posterior too.
    """
    rng, dim = np.random.default_rng(SEED + 2), side * side
    found, op = sources(side, kinds), operator(name, side)
    many = found.bases["patches"]
    a = np.asarray(op.as_matrix(), np.float64)
    seen = (rng.uniform(size=len(a)) < 0.7).astype(float) if name == "mask" else np.ones(len(a))
    through = lambda x: x if name == "identity" else x @ (seen[:, None] * a).T
    back = lambda v: v if name == "identity" else v @ (seen[:, None] * a)

    root = np.linalg.cholesky(correlation(side))
    basis, variances, means = (
        np.asarray(v, np.float64) for v in (many.basis, many.variances, many.means)
    )
    kind = rng.integers(kinds, size=COUNT)
    heights = np.sqrt(variances[kind]) * rng.normal(size=(COUNT, BUMPS))
    x = (root @ rng.normal(size=(COUNT, side, side)) @ root.T).reshape(COUNT, dim)
    x = x + means[kind] + np.einsum("nir,nr->ni", basis[kind], heights)
    x = x + np.sqrt(FLOOR) * rng.normal(size=x.shape)
    y = through(x) + NOISE * seen * rng.normal(size=(COUNT, len(a)))
    noise = Masked(IsotropicNoise(NOISE), seen) if name == "mask" else IsotropicNoise(NOISE)
    obs = Observations(y, dict.fromkeys(found.exact, op), noise)

    mean, widest, cov = np.zeros((COUNT, 2 * dim)), None, np.kron(*[correlation(side)] * 2)
    scores = np.zeros((COUNT, kinds))
    for k in range(kinds):
        own = (basis[k] * variances[k]) @ basis[k].T + FLOOR * np.eye(dim)
        seen_of = np.concatenate([through(cov), through(own)])  # C Aᵀ of both
        cov_y = through(seen_of[:dim].T + seen_of[dim:].T) + NOISE**2 * np.eye(len(a))
        gain = np.linalg.solve(cov_y, seen_of.T)
        r, mine = y - through(means[k]), kind == k
        if kinds > 1:
            fit = np.sum(r * np.linalg.solve(cov_y, r.T).T, axis=1)
            scores[:, k] = -0.5 * (np.linalg.slogdet(cov_y)[1] + fit)
        mean[mine] = r[mine] @ gain
        mean[mine, dim:] += means[k]
        if directions:
            prior = np.zeros((2 * dim, 2 * dim))
            prior[:dim, :dim], prior[dim:, dim:] = cov, own
            last = [2 * dim - WIDEST, 2 * dim - 1]
            widest = eigh(prior - seen_of @ gain, subset_by_index=last)

    values, vectors = np.linalg.eigh(correlation(side))

    def precision(r: np.ndarray) -> np.ndarray:
        first, second = r[:, :dim], r[:, dim:]
        data = back(through(first + second)) / NOISE**2
        inner = vectors.T @ first.reshape(-1, side, side) @ vectors / np.outer(values, values)
        z = np.einsum("nir,ni->nr", basis[kind], second)
        z = z * variances[kind] / (variances[kind] + FLOOR)
        rest = (second - np.einsum("nir,nr->ni", basis[kind], z)) / FLOOR
        inner = (vectors @ inner @ vectors.T).reshape(first.shape)
        return np.concatenate([inner + data, rest + data], axis=1)

    own = softmax(scores, axis=1)[np.arange(COUNT), kind]
    return Case(found, obs, mean, float(1 - own.mean()), precision, widest)
