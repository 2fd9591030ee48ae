"""How exact arithmetic is: full float32 in products of matrices on every device, and float64 within a block.

On recent GPUs JAX's default is TensorFloat-32, of three decimal digits: too few for residuals of a hundredth
of the signal. What a user has chosen (`JAX_DEFAULT_MATMUL_PRECISION`, or `jax.config`) stays. Networks that may be
less exact say so themselves (`diffusion.precision`).
"""

from contextlib import AbstractContextManager

import jax

try:
    from jax import enable_x64
except ImportError:  # JAX before 0.8
    from jax.experimental import enable_x64  # pyright: ignore

if jax.config.jax_default_matmul_precision is None:  # type: ignore[attr-defined]
    jax.config.update("jax_default_matmul_precision", "highest")


def float64(on: bool = True) -> AbstractContextManager[None]:
    """A block in which JAX computes in double precision; in single with `on=False`."""
    return enable_x64(on)
