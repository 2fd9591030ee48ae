"""Shared fixtures; annotations of the numerical core are checked at run time while the tests run."""

import os

import jax
import jaxtyping
import numpy as np
import pytest

# The numerical core. Elsewhere bad input has to reach the package's own, clearer errors.
CORE = ("batching", "operators", "noise", "linalg", "grid", "evidence", "solve", "schedule")
CORE += ("observations", "denoise", "nn", "posterior", "sample", "mixture_em", "shared", "train")
CORE += ("mixture_step", "mixture_sums", "operator_em")

if os.environ.get("DICHROIC_TYPECHECK", "1") != "0":
    jaxtyping.install_import_hook([f"dichroic.{m}" for m in CORE], "beartype.beartype")


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture
def x64():
    """Double precision for the length of one test."""
    with jax.enable_x64(True):
        yield
