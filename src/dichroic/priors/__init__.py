"""Priors, as denoisers: exact for Gaussians and their mixtures, learned for the rest."""

from dichroic.priors.denoiser import Denoiser as Denoiser
from dichroic.priors.denoiser import Wrapped as Wrapped
from dichroic.priors.diffusion import Preconditioned as Preconditioned
from dichroic.priors.gaussian_mixture import Mixture as Mixture
from dichroic.priors.gaussian_mixture import gaussian as gaussian
from dichroic.priors.spectrum import spectrum_of as spectrum_of
