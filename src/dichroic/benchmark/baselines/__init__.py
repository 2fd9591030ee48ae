"""What to compare with."""

from dichroic.benchmark.baselines.clvm_linear import ClvmLinear as ClvmLinear
from dichroic.benchmark.baselines.clvm_vae import ClvmVae as ClvmVae
from dichroic.benchmark.baselines.ddprism import Ddprism as Ddprism
from dichroic.benchmark.baselines.ddprism import DdprismConfig as DdprismConfig
from dichroic.benchmark.baselines.linear import back_projection as back_projection
from dichroic.benchmark.baselines.linear import least_squares as least_squares
from dichroic.benchmark.baselines.linear import second_moments as second_moments
from dichroic.benchmark.baselines.linear import wiener as wiener
from dichroic.benchmark.baselines.pcpca import Pcpca as Pcpca
from dichroic.benchmark.baselines.wiener_filter import WienerFilter as WienerFilter
