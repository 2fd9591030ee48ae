"""Errors that say what is wrong, where, and what to do, all `ValueError`s; and the category of warnings."""


class DichroicError(ValueError):
    """Base of every error that dichroic raises on purpose."""


class DichroicWarning(UserWarning):
    """What may spoil a result, though nothing stops it: few observations, outliers, a step that failed."""


class ShapeError(DichroicError):
    """Arrays or operators whose shapes do not fit together."""


class DataError(DichroicError):
    """Values that cannot be used: NaN without a mask, a noise covariance that is not PSD, …"""


class ConfigError(DichroicError):
    """A problem file or configuration that cannot be understood."""


class RunError(DichroicError):
    """A run folder that is missing, belongs to another problem, or cannot be resumed."""


class LostError(RunError):
    """Another of the processes that share a fit is gone."""


class WriteError(RunError):
    """A file that cannot be written, because the disk is full or its folder is read-only."""


class FormatError(DichroicError):
    """A saved file of another format version, or one whose contents do not match its hash."""


class VersionError(FormatError):
    """A saved file of a format version that this release does not read."""
