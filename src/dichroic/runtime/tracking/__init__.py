"""What a run says while it works: metrics and events as JSON lines, progress bars, trackers of others."""

from dichroic.runtime.tracking.base import Clock as Clock
from dichroic.runtime.tracking.base import Several as Several
from dichroic.runtime.tracking.base import Silent as Silent
from dichroic.runtime.tracking.base import Tracker as Tracker
from dichroic.runtime.tracking.base import following as following
from dichroic.runtime.tracking.choose import as_tracker as as_tracker
from dichroic.runtime.tracking.choose import parse_tracker as parse_tracker
from dichroic.runtime.tracking.console import Console as Console
from dichroic.runtime.tracking.events import event as event
from dichroic.runtime.tracking.events import logged as logged
from dichroic.runtime.tracking.events import quiet as quiet
from dichroic.runtime.tracking.events import warn as warn
from dichroic.runtime.tracking.metrics_file import MetricsFile as MetricsFile
from dichroic.runtime.tracking.metrics_file import read_metrics as read_metrics
