"""A matrix of few entries, by sums over them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dichroic.errors import ShapeError
from dichroic.numerics.batching import as_float, observation_axes
from dichroic.operators.base import Operator, Shape
from dichroic.operators.elementary import matrix_shapes


class Sparse(Operator):
    """`A x = matrix @ x` on flattened arrays, for a SciPy sparse matrix or array `(M, D)` of any format.

    `in_shape` and `out_shape` default to `(D,)` and `(M,)`. Only entries that are stored take memory and time.
    """

    values: Float[Array, "*n entries"] = eqx.field(converter=as_float, metadata=observation_axes(1))
    rows: Int[Array, " entries"]
    columns: Int[Array, " entries"]
    in_shape: Shape = eqx.field(static=True)
    out_shape: Shape = eqx.field(static=True)

    def __init__(
        self,
        matrix: Any,
        *,
        in_shape: int | tuple[int, ...] | None = None,
        out_shape: int | tuple[int, ...] | None = None,
    ):
        if len(matrix.shape) != 2:
            raise ShapeError(f"Sparse: expected a matrix (M, D), got {matrix.shape}")
        by_rows = matrix.tocsr(copy=True)
        by_rows.sum_duplicates()
        entries = by_rows.tocoo()
        self.values = entries.data
        self.rows, self.columns = (jnp.asarray(a, jnp.int32) for a in (entries.row, entries.col))
        self.in_shape, self.out_shape = matrix_shapes("Sparse", matrix.shape, in_shape, out_shape)

    def mv(self, x: Array) -> Array:
        terms = self.values * x.ravel()[self.columns]
        return self._by_row(terms).reshape(self.out_shape)

    def rmv(self, y: Array) -> Array:
        terms = self.values * y.ravel()[self.rows]
        size = int(np.prod(self.in_shape))
        return jax.ops.segment_sum(terms, self.columns, size).reshape(self.in_shape)

    def as_matrix(self) -> Array:
        zeros = jnp.zeros((int(np.prod(self.out_shape)), int(np.prod(self.in_shape))))
        return zeros.at[self.rows, self.columns].set(self.values)

    def row_squares(self) -> Array:
        return self._by_row(self.values**2).reshape(self.out_shape)

    def _by_row(self, terms: Array) -> Array:
        """Sums of the `terms` of each row, which are in their order."""
        size = int(np.prod(self.out_shape))
        return jax.ops.segment_sum(terms, self.rows, size, indices_are_sorted=True)
