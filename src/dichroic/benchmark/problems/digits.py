"""Real handwritten digits over real photographs, from what scikit-learn ships.

The 8 × 8 digits of scikit-learn (UCI ML hand-written digits) are added to 8 × 8 patches of its two
bundled photographs, all in units of full range: `background` alone in one view, `background + digit`
in the other, with white noise. Training uses the left four fifths of the photographs and the first
1,437 digits; held-out observations use the rest of both. Where there are more observations than digits,
each digit is reused with other backgrounds. A tenth of the digits is kept for stopping.
"""

import numpy as np

from dichroic.operators import Identity
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View

SIZE = 8
TRAIN_DIGITS = 1437


def load_digit_images() -> np.ndarray:
    """The digits, `(1797, 8, 8)` in [0, 1]."""
    from sklearn.datasets import load_digits

    pixels, _ = load_digits(return_X_y=True)
    return np.asarray(pixels).reshape(-1, SIZE, SIZE) / 16.0


def load_photographs() -> list[np.ndarray]:
    """The photographs as grey images in [0, 1]."""
    from sklearn.datasets import load_sample_images

    return [image.mean(axis=-1) / 255.0 for image in load_sample_images().images]


def patches(rng: np.random.Generator, count: int, *, held_out: bool) -> np.ndarray:
    """`count` random patches, from the left of the photographs or, held out, from their right."""
    photos = load_photographs()
    which = rng.integers(len(photos), size=count)
    out = np.empty((count, SIZE, SIZE))
    for i, p in enumerate(which):
        height, width = photos[p].shape
        edge = int(0.8 * width)
        low, high = (edge, width - SIZE) if held_out else (0, edge - SIZE)
        row, column = rng.integers(height - SIZE), rng.integers(low, high)
        out[i] = photos[p][row : row + SIZE, column : column + SIZE]
    return out


def digits_over_patches(
    *, count: int, seed: int, held_out: bool = False, noise: float = 0.02
) -> tuple[View, View]:
    """The views `background` and `mixture`, `count` observations each, with their truth.

    For training, the last tenth of the digits used is marked as held out.
    """
    rng = np.random.default_rng([int(held_out), seed])
    images = load_digit_images()
    pool = images[TRAIN_DIGITS:] if held_out else images[:TRAIN_DIGITS]
    which = rng.permutation(np.arange(count) % len(pool))
    digit, used = pool[which], min(count, len(pool))
    alone, behind = (patches(rng, count, held_out=held_out) for _ in range(2))
    noisy = lambda x: (x + noise * rng.normal(size=x.shape)).astype(np.float32)
    eye = Identity((SIZE, SIZE))
    return (
        View(noisy(alone), {"background": eye}, noise, "background", truth={"background": alone}),
        View(
            noisy(behind + digit),
            {"background": eye, "digit": eye},
            noise,
            "mixture",
            truth={"background": behind, "digit": digit},
            held_out=None if held_out else which >= 0.9 * used,
        ),
    )


def digits_problem(*, count: int = 6000, seed: int = 0, noise: float = 0.02) -> Problem:
    """The training problem: sources `background` and `digit`, both `(8, 8)`."""
    sources = [Source("background", (SIZE, SIZE)), Source("digit", (SIZE, SIZE))]
    return Problem(sources, digits_over_patches(count=count, seed=seed, noise=noise))
