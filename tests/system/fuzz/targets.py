"""What is fuzzed: files as dichroic writes or reads them, how they are loaded, and what they say.

A target knows good contents of a file, puts any contents where they belong in a folder, and loads them. What
it returns is equal for files that say the same; `sealed` files carry a checksum, so that whatever loads has
to be what was saved.
"""

import dataclasses
import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import edfio
import equinox as eqx
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import soundfile
from astropy.io import fits

from dichroic.config import FitConfig
from dichroic.io import load_array, load_problem, load_view
from dichroic.io.model_files import load_denoiser, load_model, pack, save_denoiser, save_model
from dichroic.learning.checkpoint import load_state, save_state
from dichroic.learning.fit import describe, write_record
from dichroic.learning.state import State
from dichroic.operators import Dense, Identity
from dichroic.priors import DiffusionPrior, GaussianMixture
from dichroic.priors.networks import Mlp
from dichroic.problem.problem import Problem, Source, check_values
from dichroic.problem.view import View
from dichroic.runtime.fingerprint import fingerprint
from dichroic.runtime.records import read_record
from dichroic.runtime.tracking import read_metrics

with warnings.catch_warnings():  # of obspy, about its own dependencies
    warnings.simplefilter("ignore")
    import obspy

PROBLEM = Problem(
    [Source("a", (4,)), Source("b", (2, 2))],
    [
        View(
            np.ones((3, 4)), {"a": Identity((4,)), "b": Dense(np.eye(4), in_shape=(2, 2))}, 0.1, "v"
        )
    ],
)
STATEMENT = """
sources: {a: [4], b: {shape: [2, 2]}}
views:
  v: &v
    observations: y.npy
    operators: {a: {block_average: 2}, b: {dense: {matrix: [[1, 0, 0, 0], [0, 1, 0, 0]], out_shape: [2]}}}
    noise: {low_rank: {factor: [[1], [1]], variance: [0.1, 1e-2]}}
    mask: nan
  w: {<<: *v, noise: 0.5, operators: {a: {compose: [{block_average: {factor: 2}}, {convolve: [0.2, 0.6, 0.2]}]}}}
fit: {seed: 1, order: [[a], [b]], mixture: {components: 16, floor: 1e-3}, sampler: {name: ddim}}
"""


@dataclass(frozen=True)
class Target:
    """`good` contents of the file `name`, `load` of its path, `folder` with what else is needed."""

    name: str
    good: bytes
    load: Callable[[Path], object]
    folder: Path
    sealed: bool = True

    def run(self, data: bytes) -> object:
        """What a file of `data` says; raises what the loader raises."""
        path = self.folder / self.name
        path.write_bytes(data)
        return self.load(path)


def mixture(shape, seed=0):
    rng, dim = np.random.default_rng(seed), math.prod(shape)
    root = rng.normal(size=(2, dim, dim))
    return GaussianMixture.from_moments(
        [0.4, 0.6], rng.normal(size=(2, *shape)), root @ root.swapaxes(1, 2)
    )


def network(shape):
    made = eqx.filter_jit(lambda key: Mlp(shape, 8, 1, 2, key=key))(jax.random.key(0))
    return DiffusionPrior(mixture(shape), made, "base")


def said(denoiser):
    arrays, about = pack(denoiser)
    return about, {k: (a.dtype.str, a.shape, a.tobytes()) for k, a in arrays.items()}


def said_of_state(path):
    state = load_state(path)
    parts = {w: {k: said(d) for k, d in getattr(state, w).items()} for w in ("current", "best")}
    return dataclasses.replace(state, current=parts["current"], best=parts["best"])


def said_of_model(path):
    denoisers, info = load_model(path.parent)
    return {k: said(d) for k, d in denoisers.items()}, info


def said_of_view(path):
    return Problem(PROBLEM.sources, [load_view(path, PROBLEM)]).fingerprint()


def said_of_problem(path):
    problem, fit = load_problem(path)
    return problem.fingerprint(), FitConfig.from_dict(fit)


def said_of_stored(path):
    problem, _ = load_problem(path, stored=True)
    check_values(problem, 2)
    return problem.fingerprint()


def said_of_rows(path):
    """Every other row, and a few that are consecutive."""
    other = lambda shape: np.arange(0, min(shape[0], 100), 2) if shape else ...
    first = lambda shape: slice(1, 3) if shape else ...
    arrays = (load_array(f"{path.name}:x", path.parent, part) for part in (other, first))
    return fingerprint(list(arrays))


def saved(write, name, folder):
    """The bytes that `write(path)` leaves."""
    write(folder / name)
    return (folder / name).read_bytes()


def targets(root: Path | None = None) -> dict[str, Target]:
    """All targets by name, with folders of their own below `root`."""
    root = Path(tempfile.mkdtemp()) if root is None else root
    found = {}

    def add(label, name, write, load, sealed=True):
        folder = root / label
        folder.mkdir()
        found[label] = Target(name, saved(write, name, folder), load, folder, sealed)

    state = State(
        "diffusion", 1, 2, 0, 9, 0.5, 1.25, 300, {"a": mixture((4,)), "b": network((2, 2))},
        {"a": mixture((4,), 1), "b": mixture((2, 2))}, {"f": (jnp.float32(0.3),)},
    )  # fmt: skip
    write_model = lambda path: save_model(
        path.parent, {"a": mixture((4,))}, {"config": {"seed": 3}}
    )
    array = np.linspace(0, 1, 12).reshape(3, 4)
    view = {
        "observations": array,
        "mask": "nan",
        "noise": 0.5,
        "truth/a": array,
        "operator/a": np.eye(4),
    }

    def write_problem(path):
        np.save(path.parent / "y.npy", np.arange(6.0).reshape(3, 2))
        path.write_text(STATEMENT)

    def write_h5(path):
        with h5py.File(path, "w") as file:
            file.create_dataset("g/x", data=array, chunks=(2, 4), compression="gzip")

    said_of = lambda path: said(load_denoiser(path))
    add("mixture", "d.safetensors", lambda p: save_denoiser(p, mixture((2, 2))), said_of)
    add("mlp", "d.safetensors", lambda p: save_denoiser(p, network((4,))), said_of)
    add("state", "latest.safetensors", lambda p: save_state(p, state), said_of_state)
    add("model", "model.json", write_model, said_of_model)
    add("run", "run.json", lambda p: write_record(p, describe(PROBLEM, FitConfig())), read_record)
    add("view", "view.npz", lambda p: np.savez(p, **view), said_of_view)
    add("zipped", "view.npz", lambda p: np.savez_compressed(p, **view), said_of_view)
    add("problem", "p.yaml", write_problem, said_of_problem, False)
    add("stored", "p.yaml", write_problem, said_of_stored, False)
    add("rows", "x.npz", lambda p: np.savez(p, x=array, y=array), said_of_rows, False)
    add("packed", "x.npz", lambda p: np.savez_compressed(p, x=array), said_of_rows, False)
    add("npy", "x.npy", lambda p: np.save(p, array), lambda p: _array(p.name, p.parent), False)
    add("h5", "x.h5", write_h5, lambda p: _array(f"{p.name}:g/x", p.parent), False)
    for label, (name, write) in field_files().items():
        add(label, name, write, lambda p: _array(p.name, p.parent), False)
    lines = "".join(
        json.dumps({"iteration": i, "phase": "refinement", "seconds": i / 7}) + "\n"
        for i in range(4)
    )
    add("metrics", "metrics.jsonl", lambda p: p.write_text(lines), read_metrics, False)
    return found


def field_files():
    """`{label: (name, write(path))}` of small files in the formats of a field."""
    rng = np.random.default_rng(0)
    counts, sound = rng.integers(0, 900, size=(8, 12)).astype(np.int16), rng.uniform(-1, 1, (90, 2))

    def trace(start, data):
        about = {"station": "A", "channel": "BHZ", "sampling_rate": 100}
        return obspy.Trace(data, {**about, "starttime": obspy.UTCDateTime(2020, 1, 1) + start})

    def write_mseed(path):
        parts = [trace(0, sound[:, 0].copy()), trace(1, sound[:, 1].copy())]
        obspy.Stream(parts).write(str(path), "MSEED", reclen=256)

    def write_edf(path):
        signals = [edfio.EdfSignal(sound[:, 0], 10, label="C3")]
        edfio.Edf(signals, annotations=[edfio.EdfAnnotation(1, 1, "on")]).write(path)

    image = lambda kind: lambda path: fits.HDUList([fits.PrimaryHDU(), kind(counts)]).writeto(path)
    gzipped = lambda data: fits.CompImageHDU(data, compression_type="GZIP_1")
    return {
        "fits": ("x.fits", image(fits.ImageHDU)),
        "rice": ("x.fits.fz", image(fits.CompImageHDU)),
        "gzipped": ("x.fits.fz", image(gzipped)),
        "mseed": ("x.mseed", write_mseed),
        "sac": ("x.sac", lambda path: trace(0, sound[:, 0].copy()).write(str(path), "SAC")),
        "flac": ("x.flac", lambda path: soundfile.write(path, sound, 100)),
        "edf": ("x.edf", write_edf),
    }


def _array(reference, folder):
    return fingerprint(load_array(reference, folder))


def resealed(data: bytes) -> bytes | None:
    """A safetensors file with its hash made right again, as a stranger would; `None` if it is none any more."""
    from safetensors.numpy import load, save

    from dichroic.io.model_files import _digest

    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about, arrays = header["__metadata__"], load(data)
        about["sha256"] = _digest(arrays, about["meta"])
        return save(arrays, metadata=about)
    except Exception:
        return None


def archive(members: dict[str, bytes], method: int) -> bytes:
    """A zip archive."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()
