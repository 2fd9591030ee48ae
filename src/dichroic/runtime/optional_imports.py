"""Libraries that an extra installs, and that only some need."""

import importlib
from typing import Any

from dichroic.errors import DataError

_PACKAGES = {"astropy.io.fits": "astropy", "PIL.Image": "pillow", "google_crc32c": "google-crc32c"}


def library(name: str, extra: str, purpose: str) -> Any:
    """The module `name`; raises `DataError`, which says what `purpose` needs, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = _PACKAGES.get(name, name)
        raise DataError(f"{purpose} needs {package}: pip install 'dichroic[{extra}]'") from error
