"""Shared fixtures; annotations of the numerical core are checked at run time while the tests run."""

import ctypes
import gc
import os
import sys
from pathlib import Path

from dichroic.runtime.compilation_cache import LEAST_SECONDS

# Tests, and processes that they start, share what they compile; JAX reads this when it is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", LEAST_SECONDS)
# Compiling is most of what tests do: LLVM does without its expensive passes, which changes no program but its speed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# The numerical core. Elsewhere bad input has to reach the package's own, clearer errors.
CORE = ("numerics", "operators", "problem.observations", "learning.mixture")
CORE += ("learning.diffusion.score_matching", "inference.evidence", "inference.evidence_grid")
CORE += ("inference.posterior", "inference.samplers", "inference.woodbury", "priors.components")
CORE += ("priors.covariance", "priors.denoiser", "priors.diffusion", "priors.gaussian_mixture")
CORE += ("priors.networks", "priors.schedule", "priors.spectrum")

if os.environ.get("DICHROIC_TYPECHECK", "1") != "0":
    jaxtyping.install_import_hook([f"dichroic.{m}" for m in CORE], "beartype.beartype")


def pytest_collection_modifyitems(items):
    """Files with few, long tests come first, so that no worker is left with them alone at the end."""
    first = ("system", "cli", "learning", "inference", "separation")
    rank = {folder: i for i, folder in enumerate(first)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(first)))


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Programs of earlier modules are let go of, and their memory, which tests of `--memory` count as in use."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def unchecked(request):
    """Most fits here are shorter than the predictive checks at their end, which have tests of their own.

    Of a whole module, so that fits of its fixtures and of its tests end alike.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("checked") is None:
            patch.setattr("dichroic.separation.separator.Separator._at_end", lambda *_: {})
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture
def x64():
    """Double precision for the length of one test."""
    from dichroic.numerics.precision import float64

    with float64():
        yield


@pytest.fixture(scope="session")
def grassy_files(tmp_path_factory):
    """A data folder in the form of grassy MNIST's: strokes of ten widths, and a photograph of waves.

    The pixels of image number `i` of each label add up to a number of its own.
    """
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 200), ("test", 100)):
        labels = np.arange(count) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        for i, label in enumerate(labels):
            images[i, 4:24, 2 : 4 + 2 * label] = 100 + i // 2
        arrays |= {f"x_{part}": images, f"y_{part}": labels.astype(np.uint8)}
    np.savez(folder / "mnist.npz", **arrays)
    wave = np.sin(np.arange(200)[:, None] / 3 + np.arange(400) / 5)
    photo = 128 + 40 * wave + 20 * rng.normal(size=wave.shape)
    (folder / "textures").mkdir()
    Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(folder / "textures" / "grass.png")
    return folder
