"""Full float32 in products of matrices, on every device.

On recent GPUs JAX's default is TensorFloat-32, of three decimal digits: too few for residuals of a hundredth
of the signal. What a user has chosen (`JAX_DEFAULT_MATMUL_PRECISION`, or `jax.config`) stays. Networks that may be
less exact say so themselves (`diffusion.precision`).
"""

import jax

if jax.config.jax_default_matmul_precision is None:  # type: ignore[attr-defined]
    jax.config.update("jax_default_matmul_precision", "highest")
