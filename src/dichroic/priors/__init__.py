"""Priors, as denoisers: exact for Gaussians and their mixtures, learned for the rest."""

from dichroic.priors.denoiser import CustomDenoiser as CustomDenoiser
from dichroic.priors.denoiser import Denoiser as Denoiser
from dichroic.priors.diffusion import DiffusionPrior as DiffusionPrior
from dichroic.priors.gaussian_mixture import GaussianMixture as GaussianMixture
from dichroic.priors.gaussian_mixture import gaussian as gaussian
from dichroic.priors.spectrum import dct_spectrum as dct_spectrum
