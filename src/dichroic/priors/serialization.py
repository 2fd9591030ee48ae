"""Denoisers as arrays and a JSON-able description, and back.

What comes back may be from a stranger: nothing is built before the description is known to fit the
arrays that are really there, so that a few bytes cannot ask for a network of terabytes.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from dichroic.errors import FormatError
from dichroic.operators import Shape
from dichroic.priors import Denoiser, DiffusionPrior, GaussianMixture
from dichroic.priors.networks import Mlp, UNet

NETWORKS = {"mlp": Mlp, "unet": UNet}
MIXTURE_FIELDS = ("log_weights", "means", "basis", "variances", "floor")
Arrays = Mapping[str, np.ndarray]
_WORDS = {"attention": (False, True), "precision": ("float32", "bfloat16")}  # others are counts


def pack(denoiser: Denoiser) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A denoiser as arrays and a JSON-able description."""
    if isinstance(denoiser, GaussianMixture):
        arrays = {k: np.asarray(getattr(denoiser, k)) for k in MIXTURE_FIELDS}
        meta = {"kind": "mixture", "shape": list(denoiser.shape)}
        return arrays, meta | ({"stationary": axes} if (axes := denoiser.stationary) else {})
    network = denoiser.network if isinstance(denoiser, DiffusionPrior) else None
    if isinstance(denoiser, DiffusionPrior) and isinstance(network, Mlp | UNet):
        arrays, meta = pack(denoiser.base)
        leaves = jax.tree.leaves(eqx.filter(network, eqx.is_array))
        arrays |= {f"network.{i:04d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        kind = "mlp" if isinstance(network, Mlp) else "unet"
        return arrays, {
            **meta,
            "kind": "preconditioned",
            "network": {"kind": kind, **network.settings},
            "covariance": denoiser.covariance,
        }
    raise FormatError(
        f"a denoiser of type {type(denoiser).__name__} cannot be saved: only mixtures and networks of "
        "dichroic.priors.networks are; save the parameters of your own function yourself"
    )


def unpack(arrays: Arrays, meta: Mapping[str, Any], where: str = "model") -> Denoiser:
    """The denoiser that `pack` described.

    Raises `FormatError`, which starts with `where`, if the description and the arrays do not fit, or
    hold numbers that no denoiser has.
    """
    try:
        return _unpack(arrays, meta)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


def _unpack(arrays: Arrays, meta: Any) -> Denoiser:
    kind = meta.get("kind") if isinstance(meta, Mapping) else None
    if kind not in ("mixture", "preconditioned"):
        raise FormatError(
            f"no denoiser of kind {_short(kind)}; this release knows mixtures and networks"
        )
    base = _mixture(arrays, _shape(meta.get("shape")), meta.get("stationary", 0))
    weights = [arrays[k] for k in sorted(arrays) if k.startswith("network.")]
    if len(arrays) != len(MIXTURE_FIELDS) + len(weights) or (kind == "mixture" and weights):
        raise FormatError(f"a {kind} does not have the arrays {_short(sorted(arrays))}")
    if kind == "mixture":
        return base
    covariance = meta.get("covariance")
    if covariance not in ("jacobian", "base"):
        raise FormatError(f"no covariance {_short(covariance)}; there are 'jacobian' and 'base'")
    return DiffusionPrior(base, _network(weights, meta.get("network"), base.shape), covariance)


def _shape(value: Any) -> Shape:
    if not isinstance(value, list) or not value or not all(_is_count(n) for n in value):
        raise FormatError(f"expected the shape of a source, got {_short(value)}")
    return tuple(value)


def _mixture(arrays: Arrays, shape: Shape, stationary: Any) -> GaussianMixture:
    if stationary != 0 and not (_is_count(stationary) and stationary <= len(shape)):
        raise FormatError(
            f"a source of {len(shape)} axes that is stationary along {_short(stationary)}"
        )
    missing = [k for k in MIXTURE_FIELDS if k not in arrays]
    if missing:
        raise FormatError(f"a mixture without its array {missing[0]!r}")
    parts = {k: arrays[k] for k in MIXTURE_FIELDS}
    k, dim = parts["log_weights"].size, math.prod(shape)
    rank = parts["variances"].shape[-1] if parts["variances"].ndim else 0
    sizes = {"log_weights": (k,), "means": (k, dim), "basis": (k, dim, rank)}
    sizes |= {"variances": (k, rank), "floor": (k,)}
    for name, a in parts.items():
        if a.shape != sizes[name] or not k or rank > dim:
            raise FormatError(
                f"{name} has shape {a.shape}, which does not fit {k} components of {dim} entries"
            )
        _check_numbers(name, a)
    if stationary and (rank < dim or np.any(parts["floor"])):
        raise FormatError("a stationary source whose covariances are of low rank, or with a floor")
    if not np.any(np.isfinite(parts["log_weights"])):
        raise FormatError("no component has a weight above zero")
    return GaussianMixture(
        **{k: jnp.asarray(a) for k, a in parts.items()}, shape=shape, stationary=stationary
    )


def _check_numbers(name: str, a: np.ndarray) -> None:
    """Raise `FormatError` unless `a` holds real numbers in the range of `name`, as JAX will keep them."""
    if a.dtype.kind != "f":
        raise FormatError(f"{name} holds {a.dtype}, not real numbers")
    with np.errstate(over="ignore"):
        a = a.astype(jnp.asarray(0.0).dtype)
    fine = a < np.inf if name == "log_weights" else np.isfinite(a)
    if not np.all(fine):
        raise FormatError(f"{name} has a number that is not finite")
    if name in ("variances", "floor") and np.any(a < 0):
        raise FormatError(f"{name} has a variance below zero")


def _network(weights: list[np.ndarray], about: Any, shape: Shape) -> Mlp | UNet:
    """The network that `about` describes, with `weights`; its sizes are bounded by those of `weights`."""
    settings = dict(about) if isinstance(about, Mapping) else {}
    kind = settings.pop("kind", None)
    if kind not in tuple(NETWORKS):
        raise FormatError(f"no network of kind {_short(kind)}; there are {', '.join(NETWORKS)}")
    most, blocks = sum(a.size for a in weights), 1
    for name, value in settings.items():
        words = _WORDS.get(name)
        if not (_is_count(value) and value <= most if words is None else value in words):
            raise FormatError(
                f"a network with {name} {_short(value)}, but {most:,} parameters in all"
            )
        blocks *= value if name in ("depth", "levels") else 1
    if blocks > len(weights):
        raise FormatError(f"a network of {blocks:,} blocks, but {len(weights)} arrays in all")
    make = cast(Any, NETWORKS[kind])
    try:
        build = lambda key: make(shape, **settings, key=key)
        empty = eqx.filter_eval_shape(build, jax.random.key(0))
    except Exception as error:  # of a constructor, at settings that it does not have
        raise FormatError(f"a network with settings {_short(settings)}: {error}") from None
    slots, frozen = eqx.partition(empty, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    _check_weights(weights, jax.tree.leaves(slots))
    if empty.settings != settings:
        raise FormatError(f"a network with settings {_short(settings)}")
    filled = jax.tree.unflatten(jax.tree.structure(slots), [jnp.asarray(a) for a in weights])
    return eqx.combine(filled, frozen)


def _check_weights(weights: list[np.ndarray], slots: list[Any]) -> None:
    found, wanted = [a.shape for a in weights], [s.shape for s in slots]
    if found != wanted:
        raise FormatError(
            f"the arrays of a network have shapes {_short(found)}, but its settings ask for {_short(wanted)}"
        )
    for a in weights:
        _check_numbers("an array of a network", a)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:199]}…"
