"""Networks `F(x, c_noise)` for `dichroic.denoise.Preconditioned`."""

from dichroic.nn.mlp import Mlp as Mlp
from dichroic.nn.unet import UNet as UNet
