"""Real galaxies and the sky about them: postage stamps of HST COSMOS, their point-spread function and noise.

The stamps (F814W, 0.03″ a pixel, from GalSim) are averaged over blocks of 2 × 2, cut or padded to 32 × 32 pixels,
and divided by the standard deviation of their noise, whose correlation is measured. Fluxes are linear. Two views,

    galaxy:   y = P E G a x_galaxy + x_sky + η,        sky:   y = x_sky + η,

with `P` the point-spread function and `a` an amplitude (from the flux near the centre, a power of 2). `E`, an
envelope `(1 + r²/r₀²)^(−3/2)`, and `G`, an exponential kernel, precondition: they leave numbers of like size to
the prior in the middle and far from it, for bright galaxies and faint ones. `η` is stationary. What lies outside
a stamp is missing. No image of blank sky is at hand: `sky` is simulated from the measured noise. Half of its
fields, and half of the stamps, have a *neighbour*: another real galaxy off the centre, far fainter than it was
observed, so that it brings next to no noise with it.

Held-out observations are simulated too, of galaxies that no view shows: bright ones made as faint as the others,
by which most of their own noise vanishes, over simulated sky. So their truth is known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.ndimage import center_of_mass, convolve, shift

from dichroic.benchmark.problems.remote import find_file
from dichroic.errors import DataError
from dichroic.operators import Convolve, Diagonal, Identity, Operator, Scale
from dichroic.operators.noise import StationaryNoise
from dichroic.problem.view import View
from dichroic.runtime.optional_imports import library

SIZE, BLOCK, PIXEL = 32, 2, 0.06  # pixels across, of the file averaged into one, arcseconds
APERTURE, CORE, SMOOTH = 6.0, 5.0, 0.8  # pixels: of central fluxes; r₀; of G
SEEN = 4  # stamps are cut to a multiple of it, so that few masks differ
NEIGHBOURS, NEAREST = 0.5, 9.0  # share of fields with one; pixels from the centre
NEIGHBOUR_FLUX, FAINT = (40.0, 200.0), (80.0, 250.0)  # of neighbours, of held-out galaxies
HELD_OUT, STOP, DONORS = 8, 10, 15  # galaxies
LARGEST = 72  # pixels of the file, of a galaxy to hold out
STAMPS, CATALOGUE = "real_galaxy_images_extension", "real_galaxy_catalog_26_extension_example"
PSFS, CORRELATION = "real_galaxy_PSF_images_extension", "acs_I_unrot_sci_20_cf"


@dataclass(frozen=True)
class Galaxies:
    """Stamps `image` in units of their noise, and where they were `seen`, `(n, 32, 32)`; `extent` in the file."""

    image: np.ndarray
    seen: np.ndarray
    extent: np.ndarray

    def pick(self, index: Any) -> "Galaxies":
        """Some of them."""
        return Galaxies(self.image[index], self.seen[index], self.extent[index])

    @property
    def flux(self) -> np.ndarray:
        """Their central fluxes, `(n,)`."""
        return central_flux(self.image)


@dataclass(frozen=True)
class Camera:
    """The point-spread function `(k, k)`, and the noise's covariance `(2r + 1, 2r + 1)`, of variance 1."""

    psf: np.ndarray
    covariance: np.ndarray

    @property
    def noise(self) -> StationaryNoise:
        """The noise of a field."""
        return StationaryNoise(self.covariance, shape=(SIZE, SIZE))

    def look(self, amplitude: Any) -> Operator:
        """`P E G a`, for an amplitude, or one `(n,)` per observation."""
        shape = (SIZE, SIZE)
        return Convolve(self.psf, shape=shape) @ precondition() @ Scale(shape, amplitude)


def _images(name: str, data_dir: str | Path | None) -> list[np.ndarray]:
    """The images in a FITS file of the data folder."""
    with _opened(name, data_dir) as units:
        return [np.asarray(u.data, np.float64) for u in units if u.data is not None]


def _opened(name: str, data_dir: str | Path | None):
    path = find_file(f"galaxies/{name}.fits", data_dir)
    if path is None:
        raise DataError(
            f"no galaxies/{name}.fits in the data folder (--data-dir, or the variable DICHROIC_DATA); the stamps "
            "come with GalSim and the Blending ToolKit"
        )
    return library("astropy.io.fits", "astronomy", f"reading {path.name!r}").open(path)


def load_galaxies(data_dir: str | Path | None = None) -> tuple[Galaxies, Camera]:
    """The 100 galaxies, and what they were seen with; raises `DataError` where the files are not there."""
    correlation = _images(CORRELATION, data_dir)[0]
    correlation = correlation / correlation.max()
    covariance = blocked_covariance(correlation)
    with _opened(CATALOGUE, data_dir) as units:
        variance = np.asarray(units[1].data["NOISE_VARIANCE"], np.float64)
    stamps = _images(STAMPS, data_dir)
    level = np.sqrt(variance * covariance.max())
    placed = [place(shrink(s) / std) for s, std in zip(stamps, level, strict=True)]
    image, seen = (np.stack(a) for a in zip(*placed, strict=True))
    psf = psf_of(_images(PSFS, data_dir))
    extent = np.array([len(s) for s in stamps])
    return Galaxies(image, seen, extent), Camera(psf, covariance / covariance.max())


def shrink(image: np.ndarray) -> np.ndarray:
    """The means of blocks of 2 × 2 pixels."""
    h, w = (n // BLOCK for n in image.shape)
    cut = image[: h * BLOCK, : w * BLOCK]
    return cut.reshape(h, BLOCK, w, BLOCK).mean(axis=(1, 3))


def blocked_covariance(covariance: np.ndarray, radius: int = 6) -> np.ndarray:
    """The covariance of means of blocks, at lags up to `radius`, of noise with `covariance` at those of pixels.

    Two blocks `l` apart have `Σ_k (2 − |k|) c(2 l + k) / 4` along each axis.
    """
    middle = np.array(covariance.shape) // 2
    lags = np.arange(-radius, radius + 1)
    out = np.zeros((len(lags),) * 2)
    for i in range(1 - BLOCK, BLOCK):
        for j in range(1 - BLOCK, BLOCK):
            weight = (BLOCK - abs(i)) * (BLOCK - abs(j)) / BLOCK**4
            out += (
                weight
                * covariance[
                    np.ix_(*(m + BLOCK * lags + k for m, k in zip(middle, (i, j), strict=True)))
                ]
            )
    return 0.5 * (out + out[::-1, ::-1])


def psf_of(images: Sequence[np.ndarray], radius: int = 7) -> np.ndarray:
    """The mean of point-spread functions on the larger pixels, with sum 1, `(2 radius + 1,) * 2`.

    Centred on the centroid, and its own image in all eight orientations, since galaxies are seen in these. A pixel
    is the light of 2 × 2 pixels of the file about its middle: of one, of half of its neighbours, of a quarter of
    the corners.
    """
    mean = np.mean(np.stack([p / p.sum() for p in images]), axis=0)
    size = max(mean.shape) + 4 * radius
    square = np.zeros((size + 1 - size % 2,) * 2)
    square[: mean.shape[0], : mean.shape[1]] = mean
    middle = len(square) // 2
    offset = middle - np.asarray(center_of_mass(square))
    centred = shift(square, offset, order=3)
    light = convolve(centred, np.outer([0.5, 1, 0.5], [0.5, 1, 0.5]))
    at = middle + BLOCK * np.arange(-radius, radius + 1)
    out = np.mean([turned(light[np.ix_(at, at)], way) for way in range(8)], axis=0)
    return out / out.sum()


def place(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image in the middle of 32 × 32 pixels, and where that is."""
    side = min(SEEN * (min(image.shape) // SEEN), SIZE)
    out, seen = np.zeros((2, SIZE, SIZE))
    to = slice(SIZE // 2 - side // 2, SIZE // 2 + side // 2)
    h, w = (n // 2 - side // 2 for n in image.shape)
    out[to, to], seen[to, to] = image[h : h + side, w : w + side], 1
    return out, seen


def radius() -> np.ndarray:
    """Pixels from the centre, `(32, 32)`."""
    x = np.arange(SIZE) - (SIZE - 1) / 2
    return np.hypot(x[:, None], x)


def envelope() -> np.ndarray:
    """`E`, `(32, 32)`."""
    return (1 + (radius() / CORE) ** 2) ** -1.5


def smoothing(reach: int = 5) -> np.ndarray:
    """`G`, an exponential, `(2 reach + 1,) * 2`: neighbouring pixels are alike, at several scales."""
    x = np.arange(-reach, reach + 1)
    out = np.exp(-np.hypot(x[:, None], x) / SMOOTH)
    return out / np.sqrt(np.sum(out**2))


def precondition() -> Operator:
    """`E G`."""
    return Diagonal(envelope()) @ Convolve(smoothing(), shape=(SIZE, SIZE))


def central_flux(image: np.ndarray) -> np.ndarray:
    """The sum of the pixels within the aperture, `(n,)` of `(n, 32, 32)`."""
    return np.sum(image * (radius() < APERTURE), axis=(-2, -1))


def amplitudes(image: np.ndarray) -> np.ndarray:
    """The amplitudes that images are seen with, `(n,)`: of a source of one, the central flux is that of `E`."""
    unit = central_flux(envelope())
    return 2 ** np.round(np.log2(np.maximum(central_flux(image), 10) / unit))


def turned(images: np.ndarray, way: int) -> np.ndarray:
    """Images turned by a multiple of 90°, and mirrored: `way` is 0 to 7."""
    out = np.rot90(images, way % 4, axes=(-2, -1))
    return out[..., ::-1] if way >= 4 else out


def with_flux(image: np.ndarray, flux: np.ndarray) -> np.ndarray:
    """Images `(n, 32, 32)` with other central fluxes `(n,)`."""
    return image * (flux / central_flux(image))[:, None, None]


def neighbours(rng: np.random.Generator, donors: Galaxies, count: int) -> np.ndarray:
    """For each of `count` fields a galaxy off its centre, or nothing, `(count, 32, 32)`."""
    which = rng.integers(len(donors.image), size=count)
    flux = np.exp(rng.uniform(*np.log(NEIGHBOUR_FLUX), size=count))
    images = with_flux(donors.image[which], flux)
    out = np.zeros((count, SIZE, SIZE))
    for field, image in zip(out, images, strict=True):
        if rng.uniform() < NEIGHBOURS:
            at = np.zeros(2)
            while np.hypot(at[0], at[1]) < NEAREST:
                at = rng.integers(-SIZE // 2, SIZE // 2, size=2)
            padded = np.pad(turned(image, int(rng.integers(8))), SIZE)
            y, x = SIZE - at
            field[:] = padded[y : y + SIZE, x : x + SIZE]
    return out


def simulated_noise(noise: StationaryNoise, count: int, seed: int) -> np.ndarray:
    """The noise of `count` fields, `(count, *shape)`."""
    keys = jax.random.split(jax.random.key(seed), count)
    draw = jax.jit(jax.vmap(lambda key: noise.sample(key, math.prod(noise.shape))))
    return np.asarray(draw(keys), np.float64).reshape(count, *noise.shape)


def divided(galaxies: Galaxies) -> tuple[Galaxies, Galaxies, Galaxies]:
    """`(training, stopping, held out)`: every second of the brightest that fit, and of the others every ninth."""
    order = np.argsort(-galaxies.flux)
    fits = order[galaxies.extent[order] <= LARGEST]
    held = fits[1 : 2 * HELD_OUT : 2]
    rest = order[~np.isin(order, held)]
    stop = np.zeros(len(rest), bool)
    stop[:: len(rest) // STOP] = True
    return galaxies.pick(rest[~stop]), galaxies.pick(rest[stop]), galaxies.pick(held)


def galaxy_arrays(
    *, sky: int = 1024, seed: int = 0, data_dir: str | Path | None = None
) -> dict[str, np.ndarray]:
    """What to learn from: every stamp in all eight orientations, `sky` fields of sky, and what they are seen with.

    Arrays by name: `sky`, `galaxy`, `mask` `(n, 32, 32)`, `amplitude` and `held_out` `(n,)`, `psf`, `envelope`,
    `kernel`, `noise` (the covariance).
    """
    rng = np.random.default_rng([4, seed])
    galaxies, camera = load_galaxies(data_dir)
    train, stop, _ = divided(galaxies)
    donors = train.pick(slice(DONORS))
    images, seen, last = [], [], []
    for part in (train, stop):
        for way in range(8):
            images.append(turned(part.image, way) + neighbours(rng, donors, len(part.image)))
            seen.append(turned(part.seen, way))
            last.append(np.full(len(part.image), part is stop))
    y, mask = np.concatenate(images), np.concatenate(seen)
    return {
        "sky": simulated_noise(camera.noise, sky, seed) + neighbours(rng, donors, sky),
        "galaxy": y * mask,
        "mask": mask,
        "amplitude": amplitudes(y),
        "held_out": np.concatenate(last),
        "psf": camera.psf,
        "envelope": envelope(),
        "kernel": smoothing(),
        "noise": camera.covariance,
    }


def held_out_view(
    *, count: int = 160, seed: int = 0, data_dir: str | Path | None = None
) -> tuple[View, dict[str, np.ndarray], np.ndarray]:
    """Simulated observations of held-out galaxies, and true images `(n, 32, 32)` as the camera sees them.

    Noise and neighbours differ from one observation of a galaxy to the next. Last the standard deviation `(n,)` of
    the noise that is left in the true galaxies themselves.
    """
    rng = np.random.default_rng([5, seed])
    galaxies, camera = load_galaxies(data_dir)
    _, _, held = divided(galaxies)
    which = np.arange(count) % len(held.image)
    some = held.pick(which)
    ways = rng.integers(8, size=count)
    flux = np.exp(rng.uniform(*np.log(FAINT), size=count))
    turn = lambda a: np.stack([turned(x, w) for x, w in zip(a, ways, strict=True)])
    mask = turn(some.seen)
    galaxy = turn(with_flux(some.image, flux))
    sky = neighbours(rng, held, count)
    y = galaxy + sky + simulated_noise(camera.noise, count, seed + 1)
    look = {"galaxy": camera.look(amplitudes(y)), "sky": Identity((SIZE, SIZE))}
    view = View(y * mask, look, camera.noise, name="held-out", mask=mask)
    return view, {"galaxy": galaxy * mask, "sky": sky * mask}, flux / some.flux


def wiener(view: View, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Galaxies by a Wiener filter, for comparison: `S / (S + N)` by frequency, `(n, 32, 32)`.

    `S` is the mean power of the training stamps less that of their noise `N`, per amplitude; missing pixels are 0.
    """
    power = lambda images: np.abs(np.fft.rfft2(images)) ** 2
    radius = arrays["noise"].shape[0] // 2
    lags = np.zeros((SIZE, SIZE))
    lags[: 2 * radius + 1, : 2 * radius + 1] = arrays["noise"]
    noise = np.maximum(np.fft.rfft2(np.roll(lags, (-radius, -radius), (0, 1))).real, 0) * SIZE**2
    share = arrays["mask"].mean(axis=(1, 2))[:, None, None]
    unit = arrays["amplitude"][:, None, None]
    signal = np.maximum(np.mean((power(arrays["galaxy"]) - share * noise) / unit**2, axis=0), 0)
    y, a = np.asarray(view.observations), amplitudes(view.observations)[:, None, None]
    gain = a**2 * signal / (a**2 * signal + noise)
    return np.fft.irfft2(gain * np.fft.rfft2(y), y.shape[1:]) * view.mask
