"""Networks of the nonlinear contrastive latent variable model, and what they are given.

An encoder has to know the operators, which may be other ones for each observation, and nothing is gained by
telling it more than what the likelihood depends on. For small views that is, with `ỹ = Σ^{-½} y` and
`Ã = Σ^{-½} A`, all sources side by side and rows of missing entries zero,

    x̂ = G ỹ and P = G Ã,   G = Ãᵀ (Ã Ãᵀ + I / s²)⁻¹:

the posterior of sources `N(0, s² I)` would be `N(x̂, s² (I − P))`. `P` is left out where it is the same for all
observations or has more than 1024 entries. For large views the inputs are `A_βᵀ Σ⁻¹ y`. All inputs are
standardised by the training data.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from dichroic.errors import FormatError
from dichroic.inference.samplers import noise_like
from dichroic.numerics.batching import as_float, observation_axes, row_counts, split, take
from dichroic.numerics.cholesky import inverse_cholesky
from dichroic.operators import Dense, Operator, Shape
from dichroic.operators.noise import IsotropicNoise
from dichroic.problem.observations import Observations, whitened_chi2

SMALL, MOST_NUMBERS, OPERATOR_INPUTS = 128, 10**8, 1024

Decoders = Mapping[str, Callable[[Array], Array]]
Gaussian = tuple[Float[Array, " latent"], Float[Array, "latent latent"]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a fit depends on besides the problem."""

    seed: int = 0
    latent: int = 4  # per source
    width: int = 128
    depth: int = 3
    steps: int = 8000
    batch_size: int = 256  # per view
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    ema: float = 0.999


# What an encoder is given


class Datum(eqx.Module):
    """Observation(s), the inputs of their encoder, and, where whitened, `−½ log det 2πΣ` (else 0)."""

    obs: Observations
    inputs: Float[Array, "*n inputs"] = eqx.field(converter=as_float, metadata=observation_axes(1))
    constant: Float[Array, "*n"] = eqx.field(converter=as_float, metadata=observation_axes(0))
    white: bool = eqx.field(static=True)


def whitening(obs: Observations) -> tuple[Array, Array]:
    """`(R, −½ log det 2πΣ)` with `Rᵀ R = Σ⁻¹` of one observation; missing entries do not count."""
    _, _, cov, seen = obs.parts()
    std = jnp.sqrt(jnp.diagonal(cov))
    root, logdet = inverse_cholesky(cov / jnp.outer(std, std))
    logdet = logdet + 2 * jnp.sum(jnp.log(std)) + jnp.sum(seen) * math.log(2 * math.pi)
    return root * (seen / std), -0.5 * logdet


def white_parts(obs: Observations, scale: Array) -> tuple[Array, Array, Array, Array]:
    """The encoder's inputs of one observation: `R`, the constant, `Ã = R A`, and the ridge matrix `G`."""
    root, constant = whitening(obs)
    a = jnp.concatenate(
        [root @ obs.operators[k].as_matrix() for k in sorted(obs.operators)], axis=1
    )
    inverse, _ = inverse_cholesky(a @ a.T + jnp.eye(obs.size) / scale**2)
    return root, constant, a, a.T @ inverse.T @ inverse


def white_inputs(
    obs: Observations, scale: Array, operators: bool
) -> tuple[Observations, Array, dict[str, Array]]:
    """Whitened observation(s), the constant, and inputs by group; what all share is computed once."""
    rows, shared = split((obs.operators, obs.noise))
    empty = jnp.zeros(obs.size)
    one = lambda row: white_parts(Observations(empty, *eqx.combine(row, shared)), scale)
    root, constant, a, ridge = jax.vmap(one)(rows) if jax.tree.leaves(rows) else one(rows)
    times = lambda m, v: (m @ v[..., None])[..., 0]
    y = times(root, jnp.asarray(obs.y))
    n, names = y.shape[:-1], sorted(obs.operators)
    inputs = {"x": times(ridge, y)}
    if operators:
        low, high = np.tril_indices(a.shape[-1])
        p = (ridge @ a)[..., low, high]
        inputs["p"] = jnp.broadcast_to(p, (*n, p.shape[-1]))
    parts = jnp.split(a, np.cumsum([obs.dims[k] for k in names])[:-1], axis=-1)
    shapes = {k: op.in_shape for k, op in obs.operators.items()}
    white: dict[str, Operator] = {
        k: Dense(m, in_shape=shapes[k]) for k, m in zip(names, parts, strict=True)
    }
    return Observations(y, white, IsotropicNoise(1.0)), jnp.broadcast_to(constant, n), inputs


def large_inputs(obs: Observations) -> tuple[Observations, Array, dict[str, Array]]:
    """Observation(s) as they are, no constant, and `A_βᵀ Σ⁻¹ y` as inputs."""
    rows, shared = split(obs)

    def one(row: Observations) -> dict[str, Array]:
        o = eqx.combine(row, shared)
        v, _ = jax.scipy.sparse.linalg.cg(o.noise.mv, o.noise.observed(o.size) * o.y, maxiter=64)
        return {f"x {k}": x.ravel() for k, x in o.adjoint(v).items()}

    inputs = jax.vmap(one)(rows) if jnp.ndim(obs.y) > 1 else one(rows)
    return obs, jnp.zeros(jnp.shape(obs.y)[:-1]), inputs


# The networks


class Decoder(eqx.Module):
    """`g(z) = s · network(z)` for arrays of shape `shape`, `s` the scale of the sources."""

    network: eqx.nn.MLP
    scale: Float[Array, ""]
    shape: Shape = eqx.field(static=True)

    def __call__(self, z: Float[Array, " latent"]) -> Float[Array, "*shape"]:
        """`g(z)`."""
        return self.scale * self.network(z).reshape(self.shape)


class Encoder(eqx.Module):
    """`q(z | y, A, Σ)` of one (joint) view, over the latents of its sources, in alphabetical order.

    `centre` and `spread` standardise the inputs; `scale` is `s`, `ratio` the signal-to-noise ratio.
    """

    network: eqx.nn.MLP
    centre: Float[Array, " inputs"]
    spread: Float[Array, " inputs"]
    scale: Float[Array, ""]
    ratio: Float[Array, ""]
    sources: tuple[str, ...] = eqx.field(static=True)
    latent: int = eqx.field(static=True)
    white: bool = eqx.field(static=True)
    operators: bool = eqx.field(static=True)

    @property
    def latents(self) -> int:
        """The number of latents of all sources together."""
        return self.latent * len(self.sources)

    def datum(self, obs: Observations) -> Datum:
        """Observation(s) and their standardised inputs."""
        view, constant, inputs = raw_inputs(obs, self.scale, self.white, self.operators)
        standard = (joined(inputs) - self.centre) / self.spread
        return Datum(view, standard, constant, self.white)

    def __call__(self, inputs: Float[Array, " inputs"]) -> Gaussian:
        """`(m, F)` of one observation, `F` lower triangular with a positive diagonal."""
        d = self.latents
        mean, log_std, below = jnp.split(self.network(jnp.clip(inputs, -9, 9)), [d, 2 * d])
        factor = jnp.zeros((d, d)).at[jnp.tril_indices(d, -1)].set(below)
        return mean, factor + jnp.diag(jnp.exp(log_std))

    def decode(self, decoders: Decoders, z: Array) -> dict[str, Array]:
        """`{β: g_β(z_β)}` from all latents of the view."""
        parts = jnp.split(z, len(self.sources))
        return {k: decoders[k](part) for k, part in zip(self.sources, parts, strict=True)}


class Vae(eqx.Module):
    """All networks: a decoder per source, an encoder per (joint) view."""

    decoders: dict[str, Decoder]
    encoders: dict[str, Encoder]


@eqx.filter_jit
def raw_inputs(obs: Observations, scale: Array, white: bool, operators: bool) -> Any:
    """`(observations to compare with, constant, inputs by group)`."""
    return white_inputs(obs, scale, operators) if white else large_inputs(obs)


def joined(inputs: Mapping[str, Array]) -> Array:
    """The groups of inputs as one array, in alphabetical order."""
    return jnp.concatenate([inputs[k] for k in sorted(inputs)], axis=-1)


def blank(structure: Mapping[str, Any], settings: Settings) -> Vae:
    """The networks that `structure` (plain data, kept with a saved model) describes, with shapes for arrays."""
    width, depth, latent = settings.width, settings.depth, settings.latent

    def build(key: PRNGKeyArray) -> Vae:
        mlp = lambda i, o: eqx.nn.MLP(i, o, width, depth, activation=jax.nn.silu, key=key)
        decoders, encoders, one = {}, {}, jnp.ones(())
        for name, shape in structure["shapes"].items():
            decoders[name] = Decoder(mlp(latent, math.prod(shape)), one, tuple(shape))
        for name, e in structure["encoders"].items():
            d, given = latent * len(e["sources"]), jnp.ones(e["inputs"])
            network = mlp(given.size, 2 * d + d * (d - 1) // 2)
            fixed = (given, given, one, one, tuple(e["sources"]))
            encoders[name] = Encoder(network, *fixed, latent, e["white"], e["operators"])
        return Vae(decoders, encoders)

    return eqx.filter_eval_shape(build, jax.random.key(0))


def filled(empty: Vae, arrays: Sequence[Any]) -> Vae:
    """The networks with `arrays` in place of their shapes, in the order of `jax.tree.leaves`."""
    shapes, rest = eqx.partition(empty, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    leaves = [jnp.asarray(a) for a in arrays]
    if [a.shape for a in leaves] != [s.shape for s in jax.tree.leaves(shapes)]:
        raise FormatError("the arrays of the networks do not fit their settings")
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(shapes), leaves), rest)


def random_weights(empty: Vae, seed: int) -> Vae:
    """Weights of variance `1 / inputs`, biases of zero (and ones for what is not learned)."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 2:
            return rng.normal(size=shape) / math.sqrt(shape[1])
        return np.zeros(shape) if shape else np.ones(shape)

    leaves = jax.tree.leaves(eqx.filter(empty, lambda x: isinstance(x, jax.ShapeDtypeStruct)))
    return filled(empty, [draw(leaf.shape).astype(leaf.dtype) for leaf in leaves])


# Scales and inputs, from the observations alone


def signal_scales(obs: Observations) -> tuple[float, float]:
    """`(s, ρ)`: the root mean square of the sources, and of `y` over that of the noise.

    `E yᵀΣ⁻¹y = M + s² ‖Σ^{-½}A‖²` if all entries of all sources have the same mean square, and
    `‖Σ^{-½}A‖² = E ‖Σ^{-½}A w‖²` for white `w`.
    """
    chi2, count, gain = (float(np.mean(a)) for a in _squares(take(obs, slice(0, 1024))))
    signal = max(chi2 - count, 0.01 * count)
    return math.sqrt(signal / max(gain, 1e-30)), math.sqrt(chi2 / max(count, 1e-30))


@eqx.filter_jit
def _squares(obs: Observations) -> tuple[Array, Array, Array]:
    """`yᵀΣ⁻¹y`, the number of observed entries and `‖Σ^{-½}A w‖²` of each observation."""
    rows, shared = split(obs)

    def one(row: Observations, key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        o = eqx.combine(row, shared)
        zero = {k: jnp.zeros(op.in_shape) for k, op in o.operators.items()}
        both = jnp.stack([o.y, o.apply(noise_like(key, zero))])
        squares = lambda y: whitened_chi2(eqx.tree_at(lambda o: o.y, o, y), zero)
        (chi2, gain), (count, _) = jax.vmap(squares)(both)
        return chi2, count, gain

    return jax.vmap(one)(rows, jax.random.split(jax.random.key(0), obs.count))


def describe_encoder(obs: Observations) -> dict[str, Any]:
    """The sources of a view, and what its encoder is given."""
    d = sum(obs.dims.values())
    each = bool(row_counts((obs.operators, obs.noise)))
    numbers = obs.size * (obs.size + 3 * d) * (obs.count if each else 1)
    white = obs.size <= SMALL and numbers <= MOST_NUMBERS
    operators = white and each and d * (d + 1) // 2 <= OPERATOR_INPUTS
    return {"sources": sorted(obs.sources), "white": white, "operators": operators}


def standardise(inputs: Mapping[str, Array]) -> tuple[Array, Array]:
    """Mean and standard deviation of each input, the latter at least a tenth of that of its group."""
    centre = {k: jnp.mean(x, axis=0) for k, x in inputs.items()}
    spread = {k: jnp.std(x, axis=0) for k, x in inputs.items()}
    least = {k: 0.1 * jnp.sqrt(jnp.mean(s**2)) + 1e-30 for k, s in spread.items()}
    return joined(centre), joined({k: jnp.maximum(s, least[k]) for k, s in spread.items()})


def initial(
    views: Mapping[str, Observations], shapes: Mapping[str, Shape], settings: Settings
) -> tuple[Vae, dict[str, Any]]:
    """Untrained networks with the scales and the standardisation of the training data; the structure."""
    found: dict[str, dict[str, Any]] = {name: describe_encoder(obs) for name, obs in views.items()}
    fixed: dict[str, tuple[Array, ...]] = {}
    for name, obs in views.items():
        scale, ratio = (jnp.asarray(value) for value in signal_scales(obs))
        e = found[name]
        inputs = raw_inputs(obs, scale, e["white"], e["operators"])[2]
        fixed[name] = (*standardise(inputs), scale, ratio)
        e["inputs"] = fixed[name][0].size
    structure = {"shapes": {k: list(s) for k, s in shapes.items()}, "encoders": found}
    vae = random_weights(blank(structure, settings), settings.seed)
    of = lambda source: [fixed[name][2] for name, obs in views.items() if source in obs.sources]
    where = lambda v: [
        *(d.scale for d in v.decoders.values()),
        *(a for e in v.encoders.values() for a in (e.centre, e.spread, e.scale, e.ratio)),
    ]
    new = [jnp.mean(jnp.stack(of(k))) for k in vae.decoders]
    new += [a for name in vae.encoders for a in fixed[name]]
    return eqx.tree_at(where, vae, new), structure


def weights_of(vae: Vae) -> Float[Array, " weights"]:
    """All weights of all networks, as one vector: one array to optimise compiles and runs faster."""
    return ravel_pytree(_networks(vae)[0])[0]


def with_weights(vae: Vae, weights: Float[Array, " weights"]) -> Vae:
    """`vae` with other weights."""
    learned, rest = _networks(vae)
    return eqx.combine(ravel_pytree(learned)[1](weights), rest)


def _networks(vae: Vae) -> tuple[Vae, Vae]:
    """`vae` as `(weights of the networks, all the rest)`."""
    parts = lambda v: [m.network for m in (*v.decoders.values(), *v.encoders.values())]
    learned = [jax.tree.map(eqx.is_inexact_array, network) for network in parts(vae)]
    return eqx.partition(vae, eqx.tree_at(parts, jax.tree.map(lambda _: False, vae), learned))
