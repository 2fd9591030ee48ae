"""Figures of a fit: observations, separated sources, priors, learning curves, fit and calibration.

Every function returns `matplotlib.figure.Figure` objects made without pyplot, so that nothing
global changes and no window opens; `png` renders one. How an array is shown follows from its shape
alone (`kind`): images, lines, or scatter plots of its first entries; `shown` says what is shown of an
image. Each source has one colour.
"""

from dichroic.diagnostics.plots.agreement import calibration as calibration
from dichroic.diagnostics.plots.agreement import data_fit as data_fit
from dichroic.diagnostics.plots.agreement import residuals as residuals
from dichroic.diagnostics.plots.arrays import observed as observed
from dichroic.diagnostics.plots.arrays import several as several
from dichroic.diagnostics.plots.canvas import colour as colour
from dichroic.diagnostics.plots.canvas import kind as kind
from dichroic.diagnostics.plots.canvas import png as png
from dichroic.diagnostics.plots.canvas import shown as shown
from dichroic.diagnostics.plots.draws import separated as separated
from dichroic.diagnostics.plots.iterations import learning as learning
