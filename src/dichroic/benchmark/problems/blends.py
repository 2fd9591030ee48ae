"""Galaxies that overlap: simulated blends of two real ones, and a real scene of the Hyper Suprime-Cam.

What is learned of galaxies (`dichroic.benchmark.problems.galaxies`) says how to take blends apart: with
`Separator.with_sources` every object of a scene is a source of that one kind, put to its place and seen by the
camera of the scene,

    y = Σ_o P_b S_o E G a_ob x_o + η,

`S_o` the patch of object `o` in the scene, `b` the band: an observation for each, with a point-spread function and
amplitudes of its own (from the brightness at the object's centre).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dichroic.benchmark.problems import galaxies
from dichroic.benchmark.problems.galaxies import SIZE, precondition
from dichroic.benchmark.problems.remote import find_file
from dichroic.errors import DataError
from dichroic.operators import Convolve, Operator, PatchPlacement, Scale
from dichroic.operators.noise import DiagonalNoise, StationaryNoise
from dichroic.problem.view import View

SCENE = 40  # pixels across, of a blend of two
DISTANCES = (5.0, 11.0)  # pixels between the two
LEAST = 2.0  # standard deviations of noise at an object's centre, for its amplitude
INTERPOLATED = 12  # bits of the mask of the Hyper Suprime-Cam: interpolated, cosmic ray
HSC = "galaxies/hsc_cosmos_35.npz"


@dataclass(frozen=True)
class Scene:
    """Images and their variances `(bands, H, W)`, where they are good, PSFs `(bands, k, k)`, centres `(n, 2)`."""

    images: np.ndarray
    variance: np.ndarray
    good: np.ndarray
    psfs: np.ndarray
    centres: np.ndarray
    bands: tuple[str, ...]


def corner(centre: np.ndarray) -> np.ndarray:
    """Where a patch's first pixel lies if its middle lies at `centre`, row and column."""
    return np.round(np.asarray(centre) - (SIZE - 1) / 2).astype(int)


def see(
    psf: np.ndarray, shape: tuple[int, int], offset: np.ndarray, amplitude: float | np.ndarray
) -> Operator:
    """`P S E G a`; per observation where its parts are."""
    blur = Convolve(psf, shape=shape)
    return (
        blur
        @ PatchPlacement((SIZE, SIZE), shape, offset)
        @ precondition()
        @ Scale((SIZE, SIZE), amplitude)
    )


def blend_view(
    *, count: int = 24, seed: int = 0, data_dir: str | Path | None = None
) -> tuple[View, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two held-out galaxies in each image, `left` and `right`: their true images `(n, 40, 40)`.

    And the standard deviations `(n, 40, 40)` of the noise that these have themselves, in their stamps.
    """
    rng = np.random.default_rng([6, seed])
    stamps, camera = galaxies.load_galaxies(data_dir)
    _, _, held = galaxies.divided(stamps)
    distance, angle = (
        rng.uniform(*DISTANCES, size=count),
        rng.uniform(-0.5, 0.5, size=count) * np.pi,
    )
    half = 0.5 * distance[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    middle = (SCENE - 1) / 2
    truth, own, operators = {}, {}, {}
    offsets = {"left": corner(middle - half), "right": corner(middle + half)}
    which = np.stack([rng.choice(len(held.image), size=2, replace=False) for _ in range(count)])
    for i, (name, offset) in enumerate(offsets.items()):
        some = held.pick(which[:, i])
        flux = np.exp(rng.uniform(*np.log(galaxies.FAINT), size=count))
        place = PatchPlacement((SIZE, SIZE), (SCENE, SCENE), offset)
        truth[name] = place.each(galaxies.with_flux(some.image, flux))
        own[name] = place.each(some.seen * (flux / some.flux)[:, None, None])
    noise = StationaryNoise(camera.covariance, shape=(SCENE, SCENE))
    y = sum(truth.values()) + galaxies.simulated_noise(noise, count, seed + 2)
    for name, offset in offsets.items():
        patches = np.stack([patch(image, o) for image, o in zip(y, offset, strict=True)])
        amplitude = galaxies.amplitudes(patches)
        operators[name] = see(camera.psf, (SCENE, SCENE), offset, amplitude)
    return View(y, operators, noise, name="blend"), truth, own


def patch(image: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The pixels of a scene that a patch covers, `(32, 32)`; 0 outside of the scene."""
    row, column = np.asarray(offset) + SIZE
    return np.pad(image, SIZE)[row : row + SIZE, column : column + SIZE]


def load_scene(data_dir: str | Path | None = None) -> Scene:
    """The scene of the Hyper Suprime-Cam, seven objects in five bands; raises `DataError` if it is not there."""
    path = find_file(HSC, data_dir)
    if path is None:
        raise DataError(
            f"no {HSC} in the data folder (--data-dir, or the variable DICHROIC_DATA); it comes with scarlet"
        )
    with np.load(path, allow_pickle=False) as a:
        centres = np.stack([a["catalog"]["y"], a["catalog"]["x"]], axis=1)
        good = (a["mask"] & INTERPOLATED) == 0
        bands = tuple(map(str, a["filters"]))
        return Scene(a["images"], a["variance"], good, a["psfs"], centres, bands)


def scene_view(scene: Scene) -> View:
    """The scene, an observation for each band and a source for each object, `object1`, `object2`, …."""
    shape = scene.images.shape[1:]
    peak = float(galaxies.envelope().max())
    operators = {}
    for i, centre in enumerate(scene.centres):
        at = (slice(None), *np.round(centre).astype(int))
        amplitude = np.maximum(scene.images[at], LEAST * np.sqrt(scene.variance[at])) / peak
        offset = np.tile(corner(centre), (len(scene.bands), 1))
        operators[f"object{i + 1}"] = see(scene.psfs, shape, offset, amplitude)
    noise = DiagonalNoise(scene.variance.reshape(len(scene.bands), -1))
    return View(scene.images, operators, noise, name="scene", mask=scene.good)
