"""How good posterior draws and learned priors are: distances between samples, and calibration."""

from dichroic.metrics.calibration import Coverage as Coverage
from dichroic.metrics.calibration import RankHistogram as RankHistogram
from dichroic.metrics.calibration import chi2_per_dim as chi2_per_dim
from dichroic.metrics.calibration import coverage as coverage
from dichroic.metrics.calibration import informed_chi2 as informed_chi2
from dichroic.metrics.calibration import mean_chi2 as mean_chi2
from dichroic.metrics.calibration import predictive_chi2 as predictive_chi2
from dichroic.metrics.calibration import rank_histogram as rank_histogram
from dichroic.metrics.frechet import frechet_distance as frechet_distance
from dichroic.metrics.output_snr import output_snr as output_snr
from dichroic.metrics.pqmass import PQMassResult as PQMassResult
from dichroic.metrics.pqmass import pqm_pvalues as pqm_pvalues
from dichroic.metrics.pqmass import pqmass as pqmass
from dichroic.metrics.reconstruction import psnr as psnr
from dichroic.metrics.transport import SinkhornResult as SinkhornResult
from dichroic.metrics.transport import sinkhorn_divergence as sinkhorn_divergence
