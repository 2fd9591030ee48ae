"""The blends of example.py taken apart by scarlet2, with the same table (pip install scarlet2).

    python examples/galaxies/scarlet2_blends.py --data-dir DATA

Its usual model: a flux and a positive image for each galaxy, at the known centre, started from Gaussian moments (a
flat patch where these fail) and fitted by 300 steps of Adam; no prior that needs clean galaxies to learn from.
"""

import argparse
import warnings
from functools import partial

import jax.numpy as jnp
import numpy as np
import scarlet2
from numpyro.distributions import constraints
from scarlet2 import init, validation_utils
from scarlet2.bbox import Box
from scarlet2.frame import Frame
from scarlet2.module import Parameter, Parameters, relative_step
from scarlet2.observation import Observation
from scarlet2.psf import ArrayPSF, GaussianPSF
from scarlet2.scene import Scene
from scarlet2.source import Source

from dichroic.benchmark.problems import blends, galaxies
from dichroic.metrics import output_snr
from dichroic.operators import Compose, Operator, PatchPlacement
from dichroic.runtime.tables import text_table

STEPS = 300


def centre(op: Operator, i: int) -> np.ndarray:
    """Where the galaxy of observation `i` is, row and column."""
    if isinstance(op, PatchPlacement):
        return np.asarray(op.offset[i]) + (galaxies.SIZE - 1) / 2
    parts = op.operators if isinstance(op, Compose) else ()
    return next((c for p in parts if len(c := centre(p, i))), np.zeros(0))


def start(observation: Observation, at: jnp.ndarray) -> tuple:
    """A spectrum and a morphology."""
    try:
        return init.from_gaussian_moments(observation, at, min_corr=0)
    except ValueError:  # noise has given a negative width
        return jnp.ones(1), jnp.full((15, 15), 0.1)


def separate(image: np.ndarray, psf: np.ndarray, centres: list[np.ndarray]) -> list[np.ndarray]:
    """The image of each galaxy, as the camera sees it."""
    y = jnp.asarray(image[None], jnp.float32)
    blur = ArrayPSF(jnp.asarray(psf[None], jnp.float32))
    observation = Observation(y, jnp.ones_like(y), psf=blur, channels=["F814W"])
    frame = Frame(Box(y.shape), psf=GaussianPSF(0.7), channels=["F814W"])
    observation.match(frame)
    with Scene(frame) as scene:
        for at in map(jnp.asarray, centres):
            Source(at, *start(observation, at))
    with Parameters(scene):
        for k, source in enumerate(scene.sources):
            rate = partial(relative_step, factor=0.05)
            flux = {"constraint": constraints.positive, "stepsize": rate}
            Parameter(source.spectrum, name=f"flux{k}", **flux)
            shape = {"constraint": constraints.unit_interval, "stepsize": 0.1}
            Parameter(source.morphology, name=f"shape{k}", **shape)
    fitted = scene.fit(observation, max_iter=STEPS, progress_bar=False)
    fitted = fitted[0] if isinstance(fitted, tuple) else fitted
    whole = [fitted.evaluate_source(source) for source in fitted.sources]
    return [np.asarray(observation.render(model))[0] for model in whole]


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="the folder with galaxies/; by default $DICHROIC_DATA")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    validation_utils.set_validation(False)
    view, truth, _ = blends.blend_view(data_dir=args.data_dir)
    _, camera = galaxies.load_galaxies(args.data_dir)
    scores, errors = [], []
    for i, image in enumerate(view.observations):
        found = separate(image, camera.psf, [centre(view.operators[k], i) for k in truth])
        for name, x in zip(truth, found, strict=True):
            t = truth[name][i]
            scores.append(output_snr(x[None], t[None])[0])
            errors.append(x.sum() / t.sum() - 1)
    cells = [f"{np.mean(scores):.2f}", f"{np.mean(np.abs(errors)):.3f}", f"{np.mean(errors):+.3f}"]
    print(
        text_table(["", "dB", "flux error", "bias"], [[f"scarlet2 {scarlet2.__version__}", *cells]])
    )


if __name__ == "__main__":
    main()
