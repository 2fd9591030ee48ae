"""Networks `F(x, c_noise)` for `dichroic.priors.DiffusionPrior`."""

from dichroic.priors.networks.mlp import Mlp as Mlp
from dichroic.priors.networks.unet import UNet as UNet
