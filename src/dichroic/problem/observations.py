"""Observations of one view, with their operators and noise, as one pytree.

Everything that computes takes this, not a `View`: it is an argument of the jitted functions, so new
data of the same shapes never recompile. Views of the same draws are already stacked here.
"""

import math
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dichroic.numerics.batching import as_float, observation_axes, split, take
from dichroic.operators import Operator
from dichroic.operators.learnable import Parameters, with_parameters
from dichroic.operators.noise import Noise
from dichroic.operators.scaling import scaled_operators

Tree = TypeVar("Tree")


class Observations(eqx.Module):
    """`y = Σ_β A_β x_β + η`: `y` is `(n, M)` flattened (or `(M,)`, one of them), 0 where missing."""

    y: Float[Array, "*n obs"] = eqx.field(converter=as_float, metadata=observation_axes(1))
    operators: dict[str, Operator]
    noise: Noise

    @property
    def count(self) -> int:
        """The number of observations."""
        return self.y.shape[0]

    @property
    def size(self) -> int:
        """The number of entries `M` of one observation."""
        return self.y.shape[-1]

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources seen."""
        return tuple(self.operators)

    @property
    def dims(self) -> dict[str, int]:
        """The number of entries of each source."""
        return {name: math.prod(op.in_shape) for name, op in self.operators.items()}

    # All observations, in the one process that there is: what `batches.AnyObservations` has too.

    @property
    def first(self) -> int:
        """The index of the first of them: there are no others."""
        return 0

    def blocks(self) -> Iterator["Observations"]:
        """All of them at once."""
        yield self

    def between(self, start: int, stop: int) -> "Observations":
        """The observations from `start` up to `stop`."""
        return take(self, slice(start, stop))

    def head(self, count: int) -> "Observations":
        """The first `count`, or all."""
        return take(self, slice(0, count))

    def some(self, count: int) -> "Observations":
        """`count` of them, evenly spread, or all."""
        return take(self, np.linspace(0, self.count - 1, min(self.count, count)).astype(int))

    def total(self, work: Callable[[], Tree]) -> Tree:
        """What `work` finds here is all."""
        return work()

    def gathered(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """The rows of all `blocks` are all."""
        return rows

    def at(self, operators: Parameters) -> "Observations":
        """With the parameters of operators that are learned replaced by `operators`, of scaled sources."""
        obs = with_parameters(self, operators)
        return Observations(obs.y, scaled_operators(obs.operators, operators), obs.noise)

    def one(self, i: int) -> "Observations":
        """Observation number `i` alone, without a leading axis."""
        return take(self, i)

    # One observation (no leading axis) from here on.

    def parts(self) -> tuple[Array, dict[str, Array], Array, Array]:
        """`(y, {β: A_β}, Σ, seen)` as dense arrays; `seen` is 1 where an entry was observed, else 0.

        `y` is 0 where missing, and `Σ` there that of independent unit noise. `A_β` is whole, so that it
        stays shared by observations with other missing entries.
        """
        seen = self.noise.observed(self.size)
        matrices = {name: op.as_matrix() for name, op in self.operators.items()}
        return seen * self.y, matrices, self.noise.as_matrix(self.size), seen

    def system(self) -> tuple[Array, dict[str, Array], Array]:
        """`(y, {β: A_β}, Σ)` as dense arrays, with the rows of missing entries taken out."""
        y, matrices, cov_noise, seen = self.parts()
        return y, {name: seen[:, None] * a for name, a in matrices.items()}, cov_noise

    def apply(self, x: dict[str, Array]) -> Float[Array, " obs"]:
        """`Σ_β A_β x_β`, 0 where missing."""
        total = sum((op.mv(x[k]).ravel() for k, op in self.operators.items()), jnp.zeros(self.size))
        return self.noise.observed(self.size) * total

    def adjoint(self, v: Float[Array, " obs"]) -> dict[str, Array]:
        """`{β: A_βᵀ v}`, shaped as the sources."""
        v = self.noise.observed(self.size) * v
        return {k: op.rmv(v.reshape(op.out_shape)) for k, op in self.operators.items()}

    def simulate(self, x: dict[str, Array], key: PRNGKeyArray) -> "Observations":
        """The observation with `y` drawn anew from the sources `x`."""
        noise = self.noise.observed(self.size) * self.noise.sample(key, self.size)
        return eqx.tree_at(lambda o: o.y, self, self.apply(x) + noise)


def is_shared(obs: Observations) -> bool:
    """Whether every observation has the same operators, noise and missing entries."""
    rows, _ = split((obs.operators, obs.noise))
    return not jax.tree.leaves(rows)


def groups(obs: Observations) -> Iterator[tuple[np.ndarray, Observations]]:
    """The observations with the same operators, noise and missing entries, and their numbers.

    Masks that recur, stamps of a few sizes, amplitudes in classes: groups are found by comparing the numbers.
    """
    if is_shared(obs):
        yield np.arange(obs.count), obs
        return
    obs = jax.tree.map(np.asarray, obs)  # many slices of JAX arrays take their time
    leaves = jax.tree.leaves(split((obs.operators, obs.noise))[0])
    found: dict[bytes, list[int]] = {}
    for i in range(obs.count):
        key = blake2b(digest_size=16)
        for leaf in leaves:
            key.update(np.ascontiguousarray(leaf[i]).data)
        found.setdefault(key.digest(), []).append(i)
    for index in found.values():
        yield np.array(index), take(obs, np.array(index))


def whitened_chi2(
    obs: Observations, x: dict[str, Array]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`(rᵀ Σ⁻¹ r, number of observed entries)` of one observation, `r = y − Σ_β A_β x_β`.

    `Σ⁻¹ r` comes from conjugate gradients on what is scaled to variances of 1: exact in one step where noise is
    diagonal, and of any units.
    """
    seen = obs.noise.observed(obs.size)
    std = jnp.sqrt(obs.noise.variances(obs.size))
    r = (seen * obs.y - obs.apply(x)) / std
    v, _ = jax.scipy.sparse.linalg.cg(lambda v: obs.noise.mv(v / std) / std, r, maxiter=64)
    return r @ v, jnp.sum(seen)
