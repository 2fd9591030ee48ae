"""Models on disk: safetensors and JSON, with a format version and hashes; never pickle.

Every write is atomic: to a temporary file, flushed to the disk, then renamed. A model folder is
committed by its `model.json`, which names the files of the sources by their hashes. Reading runs no code,
reads nothing outside the folder, and needs no more memory than the files have.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from dichroic.errors import FormatError
from dichroic.priors import Denoiser
from dichroic.priors.serialization import pack as pack
from dichroic.priors.serialization import unpack as unpack
from dichroic.problem.problem import name_fault
from dichroic.runtime.files import write_atomic, writing
from dichroic.runtime.records import check_version, parse_object, read_record, write_record
from dichroic.runtime.records import read_json as read_json
from dichroic.runtime.records import write_json as write_json

FORMAT_VERSION = 1  # of files of tensors


def write_tensors(
    path: str | Path,
    arrays: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    keep: str | Path | None = None,
) -> str:
    """Write arrays and JSON-able `meta` as one safetensors file; returns the hash of the file.

    With `keep`, the file that was at `path` is moved there.
    """
    data = file_of_tensors(arrays, meta)
    write_atomic(path, data, keep=keep)
    return hashlib.sha256(data).hexdigest()


def file_of_tensors(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    """The contents of the file that `write_tensors` writes."""
    arrays = {k: np.asarray(v, order="C") for k, v in arrays.items()}
    header = {
        "format_version": str(FORMAT_VERSION),
        "meta": json.dumps(meta),
        "sha256": _digest(arrays, json.dumps(meta)),
    }
    return _ordered(to_bytes(arrays, metadata=header))


def _ordered(data: bytes) -> bytes:
    """The file with the entries of its header in order, so that equal models are equal files."""
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`(arrays, meta)` of a file written by `write_tensors`; raises `FormatError` if damaged."""
    if not Path(path).is_file():
        raise FormatError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="np") as f:
            header = f.metadata() or {}
            check_version(header.get("format_version"), path, known=(FORMAT_VERSION,))
            arrays = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except FormatError:
        raise
    except (SafetensorError, ValueError, TypeError, OSError, AttributeError) as error:
        raise FormatError(f"{path} is damaged: {error}") from None
    if header.get("sha256") != _digest(arrays, header.get("meta", "")):
        raise FormatError(f"{path} is damaged: its contents do not match its hash")
    return arrays, parse_object(header.get("meta", ""), path)


def _digest(arrays: Mapping[str, np.ndarray], meta: str) -> str:
    digest = hashlib.sha256(meta.encode())
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(f"{name} {a.shape} {a.dtype}".encode())
        digest.update(a.tobytes())
    return digest.hexdigest()


def save_denoiser(path: str | Path, denoiser: Denoiser) -> str:
    """Save one denoiser as a safetensors file; returns the hash of the file."""
    return write_tensors(path, *pack(denoiser))


def load_denoiser(path: str | Path) -> Denoiser:
    """Load a denoiser saved by `save_denoiser`; raises `FormatError` where that is not what it holds."""
    return unpack(*read_tensors(path), where=str(path))


def save_model(
    folder: str | Path, denoisers: Mapping[str, Denoiser], info: Mapping[str, Any]
) -> None:
    """Save all denoisers and `info` to `folder`; the rename of `model.json` commits them at once."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, denoiser in denoisers.items():
        arrays, meta = pack(denoiser)
        file = f"{name}-{_digest(arrays, json.dumps(meta))[:12]}.safetensors"
        files[name] = {"file": file, "sha256": write_tensors(folder / file, arrays, meta)}
    write_record(folder / "model.json", {"sources": files, **info})
    for old in folder.glob("*.safetensors"):
        if old.name not in {f["file"] for f in files.values()}:
            old.unlink(missing_ok=True)


def load_model(folder: str | Path) -> tuple[dict[str, Denoiser], dict[str, Any]]:
    """`(denoisers, info)` of a folder written by `save_model`, every file checked against its hash."""
    path = Path(folder) / "model.json"
    info = read_record(path)
    sources = info.pop("sources", None)
    if not isinstance(sources, dict):
        raise FormatError(f"{path} is damaged: it has no table of sources")
    files = {name: _file_of(name, entry, path) for name, entry in sources.items()}
    return {name: load_denoiser(file) for name, file in files.items()}, info


def _file_of(name: str, entry: Any, path: Path) -> Path:
    """The file of the source `name` of the model in `path`: in its folder, and what its hash says."""
    if fault := name_fault(name):
        raise FormatError(f"{path} is damaged: {fault}")
    known = entry if isinstance(entry, dict) else {}
    if not all(isinstance(known.get(k), str) for k in ("file", "sha256")):
        raise FormatError(f"{path} is damaged: source {name!r} has no file with its hash")
    file = path.parent / known["file"]
    try:
        inside = file.resolve().parent == path.parent.resolve() and "\0" not in known["file"]
        found = inside and file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        inside, found = True, False
    if not inside:
        raise FormatError(f"{path} names {known['file']!r}, which is outside its folder")
    if not found:
        raise FormatError(f"{path} names {file.name}, which is missing from its folder")
    if hashlib.sha256(file.read_bytes()).hexdigest() != known["sha256"]:
        raise FormatError(
            f"{file} does not match the hash in {path.name}: it was changed or damaged"
        )
    return file
