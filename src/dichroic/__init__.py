"""dichroic: multi-view source separation with learned priors.

    problem = Problem([Source("background", (5,)), Source("signal", (5,))], [view1, view2])
    separator = Separator(problem).fit("runs/first")
    result = separator.separate(new_view, n_draws=32)    # result.mean["signal"], result.std["signal"]

Names are imported on first use, so that `import dichroic` (and `dichroic --help`) stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers and editors see; the table below is what happens
    from dichroic.config import DiffusionConfig as DiffusionConfig
    from dichroic.config import FitConfig as FitConfig
    from dichroic.config import MixtureConfig as MixtureConfig
    from dichroic.config import SamplerConfig as SamplerConfig
    from dichroic.diagnostics.report import write_report as write_report
    from dichroic.errors import ConfigError as ConfigError
    from dichroic.errors import DataError as DataError
    from dichroic.errors import DichroicError as DichroicError
    from dichroic.errors import DichroicWarning as DichroicWarning
    from dichroic.errors import FormatError as FormatError
    from dichroic.errors import RunError as RunError
    from dichroic.errors import ShapeError as ShapeError
    from dichroic.inference.samplers import DDIM as DDIM
    from dichroic.inference.samplers import DDPM as DDPM
    from dichroic.inference.samplers import AncestralSampler as AncestralSampler
    from dichroic.inference.samplers import ExactSampler as ExactSampler
    from dichroic.inference.samplers import GibbsSampler as GibbsSampler
    from dichroic.inference.samplers import Heun as Heun
    from dichroic.inference.samplers import PredictorCorrector as PredictorCorrector
    from dichroic.inference.samplers import sample_posterior as sample_posterior
    from dichroic.inference.samplers import sample_prior as sample_prior
    from dichroic.io import load_problem as load_problem
    from dichroic.io import load_view as load_view
    from dichroic.io import open_view as open_view
    from dichroic.operators import BlockAverage as BlockAverage
    from dichroic.operators import Compose as Compose
    from dichroic.operators import Convolve as Convolve
    from dichroic.operators import Dense as Dense
    from dichroic.operators import Diagonal as Diagonal
    from dichroic.operators import FunctionOperator as FunctionOperator
    from dichroic.operators import Identity as Identity
    from dichroic.operators import Learnable as Learnable
    from dichroic.operators import Operator as Operator
    from dichroic.operators import PatchPlacement as PatchPlacement
    from dichroic.operators import Scale as Scale
    from dichroic.operators import Stack as Stack
    from dichroic.operators import Sum as Sum
    from dichroic.operators import Zero as Zero
    from dichroic.operators import as_operator as as_operator
    from dichroic.operators.noise import DenseNoise as DenseNoise
    from dichroic.operators.noise import DiagonalNoise as DiagonalNoise
    from dichroic.operators.noise import IsotropicNoise as IsotropicNoise
    from dichroic.operators.noise import LowRankNoise as LowRankNoise
    from dichroic.operators.noise import Noise as Noise
    from dichroic.operators.noise import StationaryNoise as StationaryNoise
    from dichroic.priors import CustomDenoiser as CustomDenoiser
    from dichroic.priors import Denoiser as Denoiser
    from dichroic.priors import DiffusionPrior as DiffusionPrior
    from dichroic.priors import GaussianMixture as GaussianMixture
    from dichroic.priors import dct_spectrum as dct_spectrum
    from dichroic.priors import gaussian as gaussian
    from dichroic.problem.identifiability import identifiability as identifiability
    from dichroic.problem.problem import Problem as Problem
    from dichroic.problem.problem import Source as Source
    from dichroic.problem.stamps import pad_stamps as pad_stamps
    from dichroic.problem.view import View as View
    from dichroic.separation.result import Separation as Separation
    from dichroic.separation.separator import Separator as Separator
    from dichroic.separation.streaming import separate_to_zarr as separate_to_zarr

_WHERE = {
    "config": "DiffusionConfig FitConfig MixtureConfig SamplerConfig",
    "diagnostics.report": "write_report",
    "errors": "ConfigError DataError DichroicError DichroicWarning FormatError RunError ShapeError",
    "inference.samplers": "AncestralSampler DDIM DDPM ExactSampler GibbsSampler Heun PredictorCorrector"
    " sample_posterior sample_prior",
    "io": "load_problem load_view open_view",
    "operators": "BlockAverage Compose Convolve Dense Diagonal FunctionOperator Identity Learnable Operator"
    " PatchPlacement Scale Stack Sum Zero as_operator",
    "operators.noise": "DenseNoise DiagonalNoise IsotropicNoise LowRankNoise Noise StationaryNoise",
    "priors": "CustomDenoiser Denoiser DiffusionPrior GaussianMixture dct_spectrum gaussian",
    "problem.identifiability": "identifiability",
    "problem.problem": "Problem Source",
    "problem.stamps": "pad_stamps",
    "problem.view": "View",
    "separation.result": "Separation",
    "separation.separator": "Separator",
    "separation.streaming": "separate_to_zarr",
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = sorted(_MODULE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'dichroic' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dichroic.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
