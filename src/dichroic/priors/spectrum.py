"""Covariances that are diagonal in the discrete cosine transform (orthonormal DCT-II): stationary sources.

Of a prior with variances `λ` in the transform `T`, `x_t = x + σ z` leaves

    V[x | x_t] = Tᵀ diag(σ² λ / (λ + σ²)) T,

which needs no Jacobian of a denoiser. The transform nearly diagonalises the covariance of a stationary field,
without taking it for periodic.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.fft import dctn, idctn
from jaxtyping import Array, Float

from dichroic.numerics.arrays import unmasked
from dichroic.priors.covariance import Moments, strongest


def dct_spectrum(samples: Float[np.ndarray, "n *shape"]) -> Float[np.ndarray, "*shape"]:
    """The variances of `samples` in the transform over all of their axes but the first."""
    x = jnp.asarray(unmasked(samples, "dct_spectrum: samples"), float)
    transformed = dctn(x - x.mean(axis=0), axes=tuple(range(1, x.ndim)), norm="ortho")
    return np.asarray(jnp.mean(transformed**2, axis=0))


def spectral_moments(
    mean: Float[Array, " dim"], spectrum: Float[Array, "*shape"], sigma: Float[Array, ""]
) -> Moments:
    """`mean` with the covariance above."""
    shape = spectrum.shape
    left = sigma**2 * spectrum / (spectrum + sigma**2)
    forth = lambda u: dctn(u.reshape(shape), norm="ortho")
    back = lambda c: idctn(c, norm="ortho").ravel()
    deviate = lambda key: back(jnp.sqrt(left) * jax.random.normal(key, shape))
    mode = lambda i: back(jax.nn.one_hot(i, left.size).reshape(shape))
    columns, floor = strongest(lambda index: jax.vmap(mode)(index).T, left.ravel(), left.size)
    return Moments(mean, lambda u: back(left * forth(u)), deviate, floor, columns)
