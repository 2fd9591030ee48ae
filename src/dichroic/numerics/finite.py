"""Whether all values of arrays are finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def finite(tree: Any) -> bool:
    """Whether no number in the arrays of `tree` is NaN or infinite."""
    leaves = (np.asarray(a) for a in jax.tree.leaves(tree) if hasattr(a, "dtype"))
    return all(np.all(np.isfinite(a)) for a in leaves if jnp.issubdtype(a.dtype, jnp.inexact))
