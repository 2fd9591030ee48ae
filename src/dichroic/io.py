"""Models on disk: safetensors and JSON, with a format version and hashes; never pickle.

Every write is atomic: to a temporary file, flushed to the disk, then renamed. A model folder is
committed by its `model.json`, which names the files of the sources by their hashes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from dichroic.denoise import Denoiser, Mixture, Preconditioned
from dichroic.errors import FormatError
from dichroic.files import write_atomic
from dichroic.nn import Mlp, UNet

FORMAT_VERSION = 1
NETWORKS = {"mlp": Mlp, "unet": UNet}
MIXTURE_FIELDS = ("log_weights", "means", "basis", "variances", "floor")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; raises `FormatError` where it is missing or damaged."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} is damaged: expected an object")
    return value


def check_version(found: Any, path: str | Path) -> None:
    """Raise `FormatError` unless `found` is the format version that this release reads."""
    if str(found) != str(FORMAT_VERSION):
        raise FormatError(
            f"{path} has format version {found}; this release of dichroic reads version "
            f"{FORMAT_VERSION}: use the release that wrote it, or fit again"
        )


def write_tensors(path: str | Path, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """Write arrays and JSON-able `meta` as one safetensors file; returns the hash of the file."""
    arrays = {k: np.asarray(v, order="C") for k, v in arrays.items()}
    header = {
        "format_version": str(FORMAT_VERSION),
        "meta": json.dumps(meta),
        "sha256": _digest(arrays, json.dumps(meta)),
    }
    data = to_bytes(arrays, metadata=header)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`(arrays, meta)` of a file written by `write_tensors`; raises `FormatError` if damaged."""
    if not Path(path).is_file():
        raise FormatError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="np") as f:
            header = f.metadata() or {}
            check_version(header.get("format_version"), path)
            arrays = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged: {error}") from None
    if header.get("sha256") != _digest(arrays, header.get("meta", "")):
        raise FormatError(f"{path} is damaged: its contents do not match its hash")
    return arrays, json.loads(header["meta"])


def _digest(arrays: Mapping[str, np.ndarray], meta: str) -> str:
    digest = hashlib.sha256(meta.encode())
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(f"{name} {a.shape} {a.dtype}".encode())
        digest.update(a.tobytes())
    return digest.hexdigest()


def pack(denoiser: Denoiser) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A denoiser as arrays and a JSON-able description."""
    if isinstance(denoiser, Mixture):
        arrays = {k: np.asarray(getattr(denoiser, k)) for k in MIXTURE_FIELDS}
        return arrays, {"kind": "mixture", "shape": list(denoiser.shape)}
    if isinstance(denoiser, Preconditioned) and isinstance(
        denoiser.network, tuple(NETWORKS.values())
    ):
        arrays, meta = pack(denoiser.base)
        leaves = jax.tree.leaves(eqx.filter(denoiser.network, eqx.is_array))
        arrays |= {f"network.{i:04d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        kind = next(k for k, c in NETWORKS.items() if isinstance(denoiser.network, c))
        network = {"kind": kind, **denoiser.network.settings}
        return arrays, {
            **meta,
            "kind": "preconditioned",
            "network": network,
            "covariance": denoiser.covariance,
        }
    raise FormatError(
        f"a denoiser of type {type(denoiser).__name__} cannot be saved: only mixtures and networks of "
        "dichroic.nn are; save the parameters of your own function yourself"
    )


def unpack(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Denoiser:
    """The denoiser that `pack` described."""
    shape = tuple(meta["shape"])
    base = Mixture(**{k: jnp.asarray(arrays[k]) for k in MIXTURE_FIELDS}, shape=shape)
    if meta["kind"] == "mixture":
        return base
    settings = {k: v for k, v in meta["network"].items() if k != "kind"}
    make = NETWORKS[meta["network"]["kind"]]
    empty = eqx.filter_eval_shape(lambda key: make(shape, **settings, key=key), jax.random.key(0))
    weights, frozen = eqx.partition(empty, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    names = sorted(k for k in arrays if k.startswith("network."))
    filled = jax.tree.unflatten(
        jax.tree.structure(weights), [jnp.asarray(arrays[k]) for k in names]
    )
    return Preconditioned(base, eqx.combine(filled, frozen), meta["covariance"])


def save_denoiser(path: str | Path, denoiser: Denoiser) -> str:
    """Save one denoiser as a safetensors file; returns the hash of the file."""
    return write_tensors(path, *pack(denoiser))


def load_denoiser(path: str | Path) -> Denoiser:
    """Load a denoiser saved by `save_denoiser`."""
    return unpack(*read_tensors(path))


def save_model(
    folder: str | Path, denoisers: Mapping[str, Denoiser], info: Mapping[str, Any]
) -> None:
    """Save all denoisers and `info` to `folder`; the rename of `model.json` commits them at once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, denoiser in denoisers.items():
        arrays, meta = pack(denoiser)
        file = f"{name}-{_digest(arrays, json.dumps(meta))[:12]}.safetensors"
        files[name] = {"file": file, "sha256": write_tensors(folder / file, arrays, meta)}
    write_json(folder / "model.json", {"format_version": FORMAT_VERSION, "sources": files, **info})
    for old in folder.glob("*.safetensors"):
        if old.name not in {f["file"] for f in files.values()}:
            old.unlink(missing_ok=True)


def load_model(folder: str | Path) -> tuple[dict[str, Denoiser], dict[str, Any]]:
    """`(denoisers, info)` of a folder written by `save_model`, every file checked against its hash."""
    path = Path(folder) / "model.json"
    info = read_json(path)
    check_version(info.pop("format_version", None), path)
    sources, denoisers = info.pop("sources", None), {}
    if not isinstance(sources, dict):
        raise FormatError(f"{path} is damaged: it has no table of sources")
    for name, entry in sources.items():
        known = entry if isinstance(entry, dict) else {}
        if not all(isinstance(known.get(k), str) for k in ("file", "sha256")):
            raise FormatError(f"{path} is damaged: source {name!r} has no file with its hash")
        file = Path(folder) / Path(entry["file"]).name
        if not file.is_file():
            raise FormatError(f"{path} names {file.name}, which is missing from its folder")
        if hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
            raise FormatError(
                f"{file} does not match the hash in {path.name}: it was changed or damaged"
            )
        denoisers[name] = load_denoiser(file)
    return denoisers, info
