"""Fréchet distance between Gaussians fitted to two samples.

With means μ and covariances C of the two samples (of features, for the Fréchet inception distance),

    d² = ‖μ_x − μ_y‖² + Tr(C_x + C_y − 2 (C_x C_y)^½),

the squared Wasserstein-2 distance between `N(μ_x, C_x)` and `N(μ_y, C_y)`. The product of
covariances is not symmetric and often singular, so its square root is never formed. Any factors
`C = Rᵀ R` give

    Tr (C_x C_y)^½ = Tr (R_x C_y R_xᵀ)^½ = ‖R_x R_yᵀ‖_*,

the sum of singular values, because `(R_x R_yᵀ)(R_x R_yᵀ)ᵀ = R_x C_y R_xᵀ` is symmetric and has
the eigenvalues of `C_x C_y`. Taking R from a QR factorisation of the centred samples avoids
squaring their condition number as well, and holds for fewer samples than dimensions.
"""

import numpy as np
from jaxtyping import ArrayLike, Float

from dichroic.metrics._inputs import clouds


def frechet_distance(x: Float[ArrayLike, "n d"], y: Float[ArrayLike, "m d"]) -> float:
    """The squared Fréchet distance between two samples, as Gaussians.

    `‖μ_x − μ_y‖² + Tr(C_x + C_y − 2 (C_x C_y)^½)`, with unbiased covariances.

    - `x`, `y`: `(n, d)` and `(m, d)`, at least two samples each. Its bias falls only as `1/n`, so
      compare values for the same sample sizes.

    Returns a float, zero for equal moments up to rounding. Reference: Dowson and Landau, J.
    Multivariate Analysis 12, 1982; Heusel et al., arXiv 1706.08500.
    """
    a, b = clouds("frechet_distance", x, y, at_least=2)
    mean_x, mean_y = a.mean(axis=0), b.mean(axis=0)
    root_x, root_y = _root(a - mean_x), _root(b - mean_y)
    cross = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    traces = np.sum(root_x**2) + np.sum(root_y**2)
    return float(np.sum((mean_x - mean_y) ** 2) + traces - 2 * cross)


def _root(centred: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "k d"]:
    """R with `RᵀR` the covariance of the centred sample."""
    return np.linalg.qr(centred, mode="r") / np.sqrt(len(centred) - 1)
