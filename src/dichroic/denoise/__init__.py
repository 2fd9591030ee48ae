"""Priors, as denoisers: exact for Gaussians and their mixtures, learned for the rest."""

from dichroic.denoise.base import Denoiser as Denoiser
from dichroic.denoise.base import Wrapped as Wrapped
from dichroic.denoise.mixture import Mixture as Mixture
from dichroic.denoise.mixture import gaussian as gaussian
from dichroic.denoise.precondition import Preconditioned as Preconditioned
from dichroic.denoise.spectrum import spectrum_of as spectrum_of
