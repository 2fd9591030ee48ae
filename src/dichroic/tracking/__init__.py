"""What a run says while it works: metrics and events as JSON lines, progress bars, trackers of others."""

from dichroic.tracking.base import Clock as Clock
from dichroic.tracking.base import Several as Several
from dichroic.tracking.base import Silent as Silent
from dichroic.tracking.base import Tracker as Tracker
from dichroic.tracking.base import following as following
from dichroic.tracking.choose import as_tracker as as_tracker
from dichroic.tracking.choose import parse_tracker as parse_tracker
from dichroic.tracking.console import Console as Console
from dichroic.tracking.events import event as event
from dichroic.tracking.events import logged as logged
from dichroic.tracking.events import quiet as quiet
from dichroic.tracking.events import warn as warn
from dichroic.tracking.metrics_file import MetricsFile as MetricsFile
from dichroic.tracking.metrics_file import read_metrics as read_metrics
