"""Shared fixtures; every annotation of the package is checked at run time while the tests run."""

import os

import jax
import jaxtyping
import numpy as np
import pytest

if os.environ.get("DICHROIC_TYPECHECK", "1") != "0":
    jaxtyping.install_import_hook("dichroic", "beartype.beartype")


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture
def x64():
    """Double precision for the length of one test."""
    with jax.enable_x64(True):
        yield
