"""Figures of a fit: observations, separated sources, priors, learning curves, fit and calibration.

Every function returns `matplotlib.figure.Figure` objects made without pyplot, so that nothing
global changes and no window opens; `png` renders one. How an array is shown follows from its shape
alone (`kind`): images, lines, or scatter plots of its first entries; `shown` says what is shown of an
image. Each source has one colour.
"""

from dichroic.plot.agreement import calibration as calibration
from dichroic.plot.agreement import data_fit as data_fit
from dichroic.plot.agreement import residuals as residuals
from dichroic.plot.arrays import observed as observed
from dichroic.plot.arrays import several as several
from dichroic.plot.canvas import colour as colour
from dichroic.plot.canvas import kind as kind
from dichroic.plot.canvas import png as png
from dichroic.plot.canvas import shown as shown
from dichroic.plot.draws import separated as separated
from dichroic.plot.laps import learning as learning
