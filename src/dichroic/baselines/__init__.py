"""What to compare with."""

from dichroic.baselines.clvm_linear import ClvmLinear as ClvmLinear
from dichroic.baselines.clvm_vae import ClvmVae as ClvmVae
from dichroic.baselines.ddprism import Ddprism as Ddprism
from dichroic.baselines.ddprism import DdprismConfig as DdprismConfig
from dichroic.baselines.linear import back_projection as back_projection
from dichroic.baselines.linear import least_squares as least_squares
from dichroic.baselines.linear import second_moments as second_moments
from dichroic.baselines.linear import wiener as wiener
from dichroic.baselines.pcpca import Pcpca as Pcpca
from dichroic.baselines.wiener_filter import WienerFilter as WienerFilter
