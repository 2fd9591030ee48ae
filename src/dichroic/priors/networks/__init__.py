"""Networks `F(x, c_noise)` for `dichroic.priors.Preconditioned`."""

from dichroic.priors.networks.mlp import Mlp as Mlp
from dichroic.priors.networks.unet import UNet as UNet
