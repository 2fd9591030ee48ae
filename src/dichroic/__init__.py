"""dichroic: multi-view source separation with learned priors.

    problem = Problem([Source("background", (5,)), Source("signal", (5,))], [view1, view2])
    separator = Separator(problem).fit("runs/first")
    result = separator.separate(new_view, n_draws=32)    # result.mean["signal"], result.std["signal"]

Names are imported on first use, so that `import dichroic` (and `dichroic --help`) stays fast.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "numerics.batching": ["take"],
    "config": ["DiffusionConfig", "FitConfig", "MixtureConfig", "SamplerConfig"],
    "priors": [
        "Denoiser",
        "GaussianMixture",
        "DiffusionPrior",
        "CustomDenoiser",
        "gaussian",
        "dct_spectrum",
    ],
    "errors": [
        "ConfigError",
        "DataError",
        "DichroicError",
        "DichroicWarning",
        "FormatError",
        "RunError",
        "ShapeError",
    ],
    "problem.identifiability": ["identifiability"],
    "operators.noise": [
        "DenseNoise",
        "DiagonalNoise",
        "IsotropicNoise",
        "LowRankNoise",
        "Masked",
        "Noise",
    ],
    "problem.observations": ["Observations"],
    "operators": [
        "BlockAverage",
        "Compose",
        "Convolve",
        "Dense",
        "Diagonal",
        "External",
        "FunctionOperator",
        "Identity",
        "Operator",
        "Scale",
        "Sparse",
        "Stack",
        "Sum",
        "Zero",
        "as_operator",
    ],
    "inference.posterior": ["MatrixFreePosterior", "Posterior", "Prior", "build_posterior"],
    "problem.problem": ["Problem", "Source", "check_values", "joint_observations"],
    "problem.view": ["View"],
    "inference.samplers": [
        "AncestralSampler",
        "DDIM",
        "DDPM",
        "ExactSampler",
        "GibbsSampler",
        "Heun",
        "PredictorCorrector",
        "sample_posterior",
        "sample_prior",
    ],
    "priors.schedule": ["Geometric", "Karras"],
    "separation.separator": ["Separation", "Separator"],
    "problem.stamps": ["pad_stamps"],
    "io": ["load_problem", "load_view", "open_view"],
    "io.zarr_store": ["finished_blocks"],
    "separation.streaming": ["separate_to_zarr"],
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE)

if TYPE_CHECKING:
    from dichroic.numerics.batching import take as take
    from dichroic.problem.problem import Problem as Problem
    from dichroic.problem.problem import Source as Source
    from dichroic.problem.view import View as View
    from dichroic.separation.separator import Separator as Separator


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module 'dichroic' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dichroic.{_MODULE[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
