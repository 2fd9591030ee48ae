"""Files: bit-for-bit round trips, and damage that is always noticed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.errors import FormatError, RunError
from dichroic.io.model_files import (
    FORMAT_VERSION,
    load_denoiser,
    load_model,
    pack,
    read_json,
    read_tensors,
    save_denoiser,
    save_model,
    write_json,
    write_tensors,
)
from dichroic.priors import CustomDenoiser, DiffusionPrior, GaussianMixture
from dichroic.priors.networks import Mlp, UNet
from dichroic.runtime.files import write_atomic
from dichroic.runtime.records import RECORD_VERSION, read_record, write_record

build = jax.jit(lambda key: Mlp((2, 2), width=16, depth=1, key=key))
build_unet = jax.jit(lambda key: UNet((2, 2), 8, 2, 1, True, "bfloat16", key=key))


def denoiser(kind, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(3, 4, 4))
    mixture = GaussianMixture.from_moments(
        rng.dirichlet(np.ones(3)),
        rng.normal(size=(3, 2, 2)),
        root @ root.swapaxes(1, 2),
        rank=2 if kind == "low rank" else None,
    )
    if kind in ("mixture", "low rank"):
        return mixture
    network = (build_unet if kind == "unet" else build)(jax.random.key(seed))
    kind = "base" if kind == "unet" else kind
    random = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), network)
    return DiffusionPrior(mixture, random, kind)


KINDS = ["mixture", "low rank", "jacobian", "base", "unet"]


def assert_same(a, b):
    """The same structure, static settings included, and the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_denoiser_comes_back_bit_for_bit(kind, tmp_path):
    d = denoiser(kind)
    save_denoiser(tmp_path / "d.safetensors", d)
    assert_same(load_denoiser(tmp_path / "d.safetensors"), d)


def test_a_model_comes_back_with_its_info(tmp_path):
    model = {kind.replace(" ", "_"): denoiser(kind, i) for i, kind in enumerate(KINDS)}
    info = {"config": {"seed": 3}, "shapes": {"a": [2, 2]}}
    save_model(tmp_path / "new" / "folder", model, info)
    found, found_info = load_model(tmp_path / "new" / "folder")
    assert found_info == info
    assert found.keys() == model.keys()
    for k in model:
        assert_same(found[k], model[k])


def test_a_model_saved_over_another_leaves_no_file_of_it(tmp_path):
    for seed in (0, 1):
        save_model(tmp_path, {"a": denoiser("mixture", seed), "b": denoiser("mixture", 5)}, {})
    assert_same(load_model(tmp_path)[0]["a"], denoiser("mixture", 1))
    assert len(list(tmp_path.iterdir())) == 3


def test_any_shape_type_and_value_survives(tmp_path):
    arrays = {
        "one": np.array([np.pi], np.float32),
        "empty": np.zeros((0, 3)),
        "special": np.array([np.nan, -np.inf, -0.0, 1e-45], np.float32),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "int": np.arange(3),
    }
    write_tensors(tmp_path / "t", arrays, {"α": [1, None, {"b": True}]})
    found, meta = read_tensors(tmp_path / "t")
    assert meta == {"α": [1, None, {"b": True}]}
    for k, a in arrays.items():
        assert (found[k].shape, found[k].dtype) == (np.shape(a), np.asarray(a).dtype)
        assert found[k].tobytes() == np.ascontiguousarray(a).tobytes()


def test_scalars_stay_scalars(tmp_path):
    write_tensors(tmp_path / "t", {"scalar": np.float32(np.pi)}, {})
    assert read_tensors(tmp_path / "t")[0]["scalar"].shape == ()


def assert_refused(path, data, what):
    path.write_bytes(bytes(data))
    try:
        load_denoiser(path)
    except FormatError:
        return
    except BaseException as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    pytest.fail(f"{what}: not noticed")


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_of_a_mixture_is_noticed(bit, tmp_path):
    path = tmp_path / "d.safetensors"
    save_denoiser(path, denoiser("mixture"))
    good = path.read_bytes()
    for i in range(len(good)):
        bad = bytearray(good)
        bad[i] ^= 1 << bit
        assert_refused(path, bad, f"byte {i} ({good[i : i + 1]!r})")


def test_flipped_bytes_of_a_network_are_noticed(tmp_path, rng):
    path = tmp_path / "d.safetensors"
    save_denoiser(path, denoiser("jacobian"))
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    positions = np.concatenate([rng.integers(header, size=300), rng.integers(len(good), size=300)])
    for i, change in zip(positions, rng.integers(1, 256, size=600), strict=True):
        bad = bytearray(good)
        bad[i] ^= change
        white = bad[i : i + 1].isspace() and good[i : i + 1].isspace()
        if not white:  # the header may be padded with any white space
            assert_refused(path, bad, f"byte {i} ({good[i : i + 1]!r} to {bad[i : i + 1]!r})")


@pytest.mark.parametrize("kind", ["mixture", "jacobian"])
def test_a_truncated_or_longer_file_is_noticed(kind, tmp_path):
    path = tmp_path / "d.safetensors"
    save_denoiser(path, denoiser(kind))
    good = path.read_bytes()
    for size in {0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 4, len(good) - 1}:
        assert_refused(path, good[:size], f"{size} of {len(good)} bytes")
    assert_refused(path, good + b"\0", "one byte more")


def test_other_format_versions_are_refused(tmp_path):
    from safetensors.numpy import save

    path = tmp_path / "d.safetensors"
    for meta in ({"format_version": str(FORMAT_VERSION + 1)}, {}):
        path.write_bytes(save({"x": np.zeros(2)}, metadata={**meta, "meta": "{}"}))
        with pytest.raises(
            FormatError, match=r"format version (2|None); this release .* version 1"
        ):
            read_tensors(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, {"a": denoiser("mixture")}, {"shapes": {"a": [2, 2]}, "config": {}})
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A folder with a good model, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def test_missing_files_are_named(model):
    with pytest.raises(FormatError, match=r"nowhere does not exist"):
        load_denoiser(model / "nowhere")
    next(model.glob("a-*.safetensors")).unlink()
    with pytest.raises(FormatError, match=r"names a-.*\.safetensors, which is missing"):
        load_model(model)
    (model / "model.json").unlink()
    with pytest.raises(FormatError, match=r"model\.json does not exist"):
        load_model(model)


def test_a_file_of_another_model_is_refused(model):
    save_denoiser(next(model.glob("a-*.safetensors")), denoiser("mixture", 1))
    with pytest.raises(FormatError, match="does not match the hash in model.json"):
        load_model(model)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "null", '{"format_version": 1, "sources": {"a"']
)
def test_a_model_file_that_is_no_json_object_is_refused(text, model):
    (model / "model.json").write_text(text)
    with pytest.raises(FormatError, match="damaged"):
        load_model(model)


def test_bytes_that_are_no_text_are_refused(model):
    (model / "model.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(FormatError, match=r"model\.json cannot be read: .* codec can't decode"):
        read_json(model / "model.json")


@pytest.mark.parametrize("version", [RECORD_VERSION + 1, None, "x"])
def test_a_model_of_another_version_is_refused(version, model):
    info = json.loads((model / "model.json").read_text())
    write_json(model / "model.json", {**info, "format_version": version})
    with pytest.raises(FormatError, match=f"format version {version}"):
        load_model(model)


@pytest.mark.parametrize(
    "change", ["no sources", "a list", "no file", "no hash", "hash 7", "null entry"]
)
def test_a_model_file_with_entries_missing_is_refused(change, model):
    info = read_record(model / "model.json")
    entry = info["sources"]["a"]
    if change == "no sources":
        del info["sources"]
    elif change == "a list":
        info["sources"] = ["a"]
    elif change == "no file":
        del entry["file"]
    elif change == "no hash":
        del entry["sha256"]
    elif change == "hash 7":
        entry["sha256"] = 7
    else:
        info["sources"]["a"] = None
    write_record(model / "model.json", info)
    with pytest.raises(FormatError, match=r"model\.json is damaged: (it has no|source 'a' has no)"):
        load_model(model)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_write_onto_a_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*folder: Is a directory; .* make room"):
        write_atomic(tmp_path / "folder", b"data")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_users_function_cannot_be_saved_and_harms_no_saved_model(model):
    users = CustomDenoiser(lambda x, sigma: x, shape=4)
    with pytest.raises(FormatError, match="type CustomDenoiser cannot be saved"):
        pack(users)
    before = load_model(model)[0]
    with pytest.raises(FormatError, match="cannot be saved"):
        save_model(model, {"a": denoiser("mixture", 2), "b": users}, {})
    found, _ = load_model(model)
    assert_same(found["a"], before["a"])


def test_equal_models_are_equal_files(tmp_path):
    arrays = {k: np.arange(n, dtype=np.float32) for n, k in enumerate("abcd", 1)}
    for i in range(8):  # the order of a header's entries is not left to chance
        write_tensors(tmp_path / f"{i}.safetensors", arrays, {"kind": "x", "about": [1, 2]})
    first, *others = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert all(other == first for other in others)
    found, _ = read_tensors(tmp_path / "0.safetensors")
    for k, a in arrays.items():
        np.testing.assert_array_equal(found[k], a)
