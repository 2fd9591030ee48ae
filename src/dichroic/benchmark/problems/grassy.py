"""Grassy MNIST: handwritten zeros and ones over photographs of grass (arXiv 2510.05205, section 5.2).

Two views, with white noise of 0.01: `grass`, and `mixture`, grass + 0.5 × a digit. With several `factors` each
view is as many, of means over blocks of 1, 2 or 4 entries: a resolution lost, and fewer outputs.

Grass is cut from photographs at a random position and scale, turned and mirrored at random; training uses the
left four fifths of each photograph, held-out observations the rest. Digits are those of MNIST, its training
images for training and every other test image for held-out observations. A tenth of the training observations
is kept for stopping: of digits, and of a region of the photographs, that the others do not have. All in units of
full range.

`textures/grass.png` and `textures/grass_lawn.png` are taken from the data folder, as many as there are; without
one, the photograph of grass that scikit-image ships. `mnist.npz` is fetched where it is not there.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dichroic.benchmark.problems.remote import RemoteFile, fetch, find_file
from dichroic.errors import DataError
from dichroic.operators import BlockAverage, Identity, Operator, Scale
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View
from dichroic.runtime.optional_imports import library

SIZE = 28
AMPLITUDE, NOISE = 0.5, 0.01
LARGEST = 56  # pixels of a photograph across a patch, at most; at least `SIZE`
REGIONS = {
    "train": (0.0, 0.65),
    "stop": (0.65, 0.8),
    "test": (0.8, 1.0),
}  # of the width of a photograph
STOP_SHARE = 0.1  # of the training observations
MNIST = RemoteFile(
    "mnist.npz",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
    "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
    11_490_434,
)
PHOTOGRAPHS = ("textures/grass.png", "textures/grass_lawn.png")


def load_mnist(
    data_dir: str | Path | None = None, *, held_out: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Images `(n, 28, 28)` in [0, 1] and labels `(n,)` of MNIST: for training, or its test images."""
    path, part = fetch(MNIST, data_dir), "test" if held_out else "train"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not MNIST as an npz file with x_{part} and y_{part}") from error
    if images.shape[1:] != (SIZE, SIZE) or labels.shape != images.shape[:1]:
        raise DataError(f"{path}: images of shape {images.shape}, labels of shape {labels.shape}")
    return images / np.float32(255), labels


def load_photographs(data_dir: str | Path | None = None) -> list[np.ndarray]:
    """Photographs of grass as grey images in [0, 1]."""
    pictures = library("PIL.Image", "images", "a photograph")
    found = [p for name in PHOTOGRAPHS if (p := find_file(name, data_dir))]
    if not found:
        try:
            from skimage import data
        except ImportError as error:
            raise DataError(
                f"no photograph of grass ({PHOTOGRAPHS[0]} in the data folder): give --data-dir, or "
                "pip install 'dichroic[images]'"
            ) from error
        return [np.asarray(data.grass(), np.float32) / 255]
    return [np.asarray(pictures.open(p).convert("L"), np.float32) / 255 for p in found]


def grass_patches(
    rng: np.random.Generator,
    photographs: Sequence[np.ndarray],
    count: int,
    *,
    size: int = SIZE,
    region: str = "train",
) -> np.ndarray:
    """`count` patches `(size, size)`, each of 28 to 56 pixels across, from one of the `REGIONS`."""
    from PIL import Image

    images = [Image.fromarray(p) for p in photographs]
    out = np.empty((count, size, size), np.float32)
    for patch in out:
        image = images[rng.integers(len(images))]
        low, high = (share * image.width for share in REGIONS[region])
        across = rng.uniform(SIZE, min(LARGEST, high - low, image.height))
        x, y = rng.uniform(low, high - across), rng.uniform(0, image.height - across)
        cut = image.resize((size, size), Image.Resampling.BOX, (x, y, x + across, y + across))
        turned = np.rot90(np.asarray(cut), int(rng.integers(4)))
        patch[:] = turned[:, ::-1] if rng.integers(2) else turned
    return out


def digits(
    rng: np.random.Generator, images: np.ndarray, count: int, *, size: int = SIZE
) -> np.ndarray:
    """`count` of the `images`, each as often as any other, at another size."""
    which = rng.permutation(np.arange(count) % len(images))
    return shrink(images[which], size)


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Images `(n, 28, 28)` as means of blocks, `(n, size, size)`."""
    block = SIZE // size
    return images.reshape(-1, size, block, size, block).mean(axis=(2, 4))


def zeros_and_ones(data_dir: str | Path | None = None, *, held_out: bool = False) -> np.ndarray:
    """The images of MNIST that show these."""
    images, labels = load_mnist(data_dir, held_out=held_out)
    return images[labels < 2]


def grassy_views(
    *,
    count: int,
    seed: int,
    held_out: bool = False,
    size: int = SIZE,
    factors: Sequence[int] = (1,),
    data_dir: str | Path | None = None,
) -> list[View]:
    """The views with their truth, `count` observations of `grass` and of `mixture`, shared by the `factors`.

    `size` is 28, or 14 or 7 for images of which blocks were averaged.
    """
    if size not in (28, 14, 7):
        raise DataError(f"grassy MNIST of {size} × {size} pixels: the size must be 28, 14 or 7")
    rng = np.random.default_rng([2, int(held_out), seed])
    photographs = load_photographs(data_dir)
    images = zeros_and_ones(data_dir, held_out=held_out)
    stop = int((1 - STOP_SHARE) * len(images))
    pools = {"test": images[::2]} if held_out else {"train": images[:stop], "stop": images[stop:]}
    views = []
    for factor, n in zip(factors, _shares(count, len(factors)), strict=True):
        suffix = "" if len(factors) == 1 else f"-{factor}"
        look = BlockAverage((size, size), factor) if factor > 1 else Identity((size, size))
        parts = _parts(n, held_out)
        cut = lambda parts=parts: np.concatenate(
            [grass_patches(rng, photographs, k, size=size, region=r) for r, k in parts.items()]
        )
        digit = np.concatenate([digits(rng, pools[r], k, size=size) for r, k in parts.items()])
        alone, behind = cut(), cut()
        faint = Scale((size, size), AMPLITUDE)
        faint = look @ faint if factor > 1 else faint
        last = None if held_out else np.arange(n) >= parts["train"]
        both = {"grass": (look, behind), "digit": (faint, digit)}
        views += [
            _view(rng, f"grass{suffix}", {"grass": (look, alone)}, last),
            _view(rng, f"mixture{suffix}", both, last),
        ]
    return views


def fresh_sources(
    count: int, *, seed: int, size: int = SIZE, data_dir: str | Path | None = None
) -> dict[str, np.ndarray]:
    """True sources that no observation shows, `(n, size, size)`: at most `count`, digits only once each."""
    rng = np.random.default_rng([3, seed])
    grass = grass_patches(rng, load_photographs(data_dir), count, size=size, region="test")
    images = zeros_and_ones(data_dir, held_out=True)[1::2]
    return {"grass": grass, "digit": digits(rng, images, min(count, len(images)), size=size)}


def _shares(count: int, parts: int) -> list[int]:
    return [count // parts + (i < count % parts) for i in range(parts)]


def _parts(count: int, held_out: bool) -> dict[str, int]:
    """How many observations are from each of the `REGIONS`."""
    stop = int(STOP_SHARE * count)
    return {"test": count} if held_out else {"train": count - stop, "stop": stop}


def _view(
    rng: np.random.Generator,
    name: str,
    seen: dict[str, tuple[Operator, np.ndarray]],
    held_out: np.ndarray | None,
) -> View:
    clean = sum(op.each(x) for op, x in seen.values())
    y = clean + NOISE * rng.normal(size=np.shape(clean))
    operators = {k: op for k, (op, _) in seen.items()}
    truth = {k: x.astype(np.float32) for k, (_, x) in seen.items()}
    return View(y.astype(np.float32), operators, NOISE, name=name, truth=truth, held_out=held_out)


def grassy_problem(
    *,
    count: int = 16384,
    seed: int = 0,
    size: int = SIZE,
    factors: Sequence[int] = (1,),
    data_dir: str | Path | None = None,
) -> Problem:
    """The training problem: sources `grass` and `digit`."""
    views = grassy_views(count=count, seed=seed, size=size, factors=factors, data_dir=data_dir)
    return Problem([Source("grass", (size, size)), Source("digit", (size, size))], views)
