"""Files made to do harm: no code runs, nothing is read elsewhere, and no memory is taken that is not there."""

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from dichroic.cli.main import main
from dichroic.config import FitConfig
from dichroic.errors import ConfigError, DataError, DichroicError, FormatError
from dichroic.io import load_array, load_problem, load_view
from dichroic.io.array_safety import check_zarr
from dichroic.io.model_files import (
    load_denoiser,
    load_model,
    pack,
    read_tensors,
    save_model,
    write_tensors,
)
from dichroic.runtime.hardware import peak_memory
from dichroic.runtime.limits import VARIABLE
from dichroic.runtime.records import read_json, read_record, write_json, write_record
from dichroic.runtime.tracking import read_metrics

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import targets as fuzz


@pytest.fixture(autouse=True)
def frugal():
    before = peak_memory()
    yield
    assert peak_memory() - before < 300


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# YAML


def laughs(form):
    lines = ["a: &a " + form("1")]
    lines += [f"{k}: &{k} " + form(f"*{j}") for j, k in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (laughs(lambda x: "[" + ", ".join([x] * 9) + "]"), "line 6: more than 100,000 values"),
        (laughs(lambda x: "{" + ", ".join(f"k{i}: {x}" for i in range(9)) + "}"), "more than 100,000"),
        ("a: &a [*a]", "line 1: an alias inside what it stands for"),
        ("[" * 5000, "line 1: nested more than 64 deep"),
        ("a: " + "9" * 5000, "line 1: a number that is too long"),
        ("a: " + "1:" * 4000 + "1", "line 1: a number that is too long"),
        ("a: 0x" + "f" * 5000, "line 1: a number that is too long"),
        ("a: 2001-13-45", "line 1: '2001-13-45' is no timestamp"),
        ("a: !!int x", "line 1: 'x' is no int"),
        ("a: !!python/name:os.system x", "line 1: a value of kind"),
        ("a: !!binary aGk=", "line 1: a value of kind"),
        ("b: 1\nb: 2", "line 2: key 'b' appears twice"),
        ('sources: {"a\\e[31m": 3}\nviews: {}', "'a.x1b.31m' is no name: it holds characters that control"),
        ("a: \0", "special characters are not allowed"),
        ("a: 1\n" * 200_000, "MiB, more than 0.5: keep arrays in files of their own"),
        ("sources: {a: [4294967296, 4294967296]}\nviews: {}", "at most 16,777,216 entries"),
    ],
)  # fmt: skip
def test_yaml_is_bounded(tmp_path, text, match):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_problem(tmp_path / "p.yaml")


# Arrays


def npy_header(shape, descr="<f8"):
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((10**6, 10**6), "states an array of 7,451 GiB, more than the 4 GiB"),
        ((2**40, 2**40), "states an array of .* GiB"),
        ((-1, 4), "it states an array of shape"),
        ((100,), "is damaged: it states 800 bytes of numbers, and has 16"),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "npz", "zipped"])
def test_arrays_are_no_larger_than_what_is_there(tmp_path, shape, match, kind):
    data = npy_header(shape) + bytes(16)
    method = zipfile.ZIP_DEFLATED if kind == "zipped" else zipfile.ZIP_STORED
    name = "x.npy" if kind == "npy" else "x.npz"
    (tmp_path / name).write_bytes(data if kind == "npy" else fuzz.archive({"y.npy": data}, method))
    with pytest.raises(DataError, match=match):
        load_array(name, tmp_path)
    if name == "x.npz":
        (tmp_path / name).write_bytes(fuzz.archive({"observations.npy": data}, method))
        with pytest.raises(DichroicError, match=match):
            load_view(tmp_path / name, fuzz.PROBLEM)


def test_what_expands_is_bounded_and_the_bound_can_be_raised(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", y=np.zeros(2**17))
    monkeypatch.setenv(VARIABLE, "0.0005")
    with pytest.raises(DataError, match=rf"if that is meant, set {VARIABLE}=1 in the environment"):
        load_array("x.npz", tmp_path)
    monkeypatch.setenv(VARIABLE, "1")
    assert load_array("x.npz", tmp_path).size == 2**17
    monkeypatch.setenv(VARIABLE, "much")
    with pytest.raises(ConfigError, match=f"{VARIABLE}=much: expected a number of GiB"):
        load_array("x.npz", tmp_path)


def test_a_large_file_that_really_is_large_is_read(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros(2**17))
    monkeypatch.setenv(VARIABLE, "0.0005")
    assert load_array("x.npy", tmp_path).size == 2**17


@pytest.mark.parametrize("name", ["x.npy", "x.npz:y"])
def test_pickles_are_not_read(tmp_path, name):
    value = np.array([Evil(tmp_path / "harm")], dtype=object)
    np.save(tmp_path / "x.npy", value, allow_pickle=True)
    np.savez(tmp_path / "x.npz", allow_pickle=True, y=value)
    with pytest.raises(DataError, match="holds pickled objects, which are not read"):
        load_array(name, tmp_path)
    (tmp_path / "x.npy").write_bytes(pickle.dumps(Evil(tmp_path / "harm")))
    with pytest.raises(DataError, match="cannot read 'x.npy'"):
        load_array("x.npy", tmp_path)
    assert not (tmp_path / "harm").exists()


def test_two_entries_of_one_name_and_rare_compression_are_refused(tmp_path):
    data = npy_header((2,)) + bytes(16)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file, pytest.warns(UserWarning, match="Dupl"):
        file.writestr("y.npy", data)
        file.writestr("y.npy", data)
    with pytest.raises(DataError, match="two arrays have the same name"):
        load_array("x.npz:y", tmp_path)
    (tmp_path / "x.npz").write_bytes(fuzz.archive({"y.npy": data}, zipfile.ZIP_LZMA))
    with pytest.raises(DataError, match="compressed in a way that numpy does not write"):
        load_array("x.npz", tmp_path)


def test_an_archive_that_lost_entries_is_refused(tmp_path):
    """Its directory states how many there are."""
    np.savez(tmp_path / "x.npz", y=np.zeros(2))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[-12] += 1
    (tmp_path / "x.npz").write_bytes(bytes(data))
    with pytest.raises(DataError, match="does not have as many arrays as it states"):
        load_array("x.npz:y", tmp_path)


def test_hdf5_reads_no_other_file(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.arange(4.0)
    (tmp_path / "raw").write_bytes(np.arange(4.0).tobytes())
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "x", (4,))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["link"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/x")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", (4,), "f8", external=[(str(tmp_path / "raw"), 0, 32)])
        file.create_dataset("huge", (2**20, 2**20), "f8", chunks=(2**10, 2**10))
        file.create_dataset("many", (2**24,), "u1", chunks=(1,))
        file["text"] = "abc"
    for name, match in {
        "link": "no 'link' in 'a.h5'",
        "virtual": "is kept in other files, which are not read",
        "raw": "is kept in other files, which are not read",
        "huge": "states an array of 8,192 GiB",
        "many": "has 16,777,216 chunks, more than 1,000,000",
        "text": "holds object, not real numbers",
    }.items():
        with pytest.raises(DataError, match=match):
            load_array(f"a.h5:{name}", tmp_path)


def zarr_2(folder, **changes):
    about = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "<f8", "compressor": None}
    about |= {"fill_value": 0, "order": "C", "filters": None, **changes}
    folder.mkdir()
    (folder / ".zarray").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("where", ["filters", "compressor"])
@pytest.mark.filterwarnings("ignore")
def test_zarr_unpickles_nothing(tmp_path, where):
    codec = {"id": "pickle"}
    folder = zarr_2(tmp_path / "x.zarr", **{where: [codec] if where == "filters" else codec})
    (folder / "0").write_bytes(pickle.dumps(Evil(tmp_path / "harm")))
    with pytest.raises(DataError, match=r"x\.zarr"):
        load_array("x.zarr", tmp_path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "about",
    [
        {"filters": [{"id": "delta"}, {"id": "pickle"}], "compressor": None},
        {"filters": None, "compressor": {"id": "json2"}},
        {"codecs": [{"name": "sharding_indexed", "configuration": {"codecs": [{"name": "numcodecs.pickle"}]}}]},
        {"codecs": [{"name": "their_codec"}]},
    ],
)  # fmt: skip
def test_codecs_of_zarr_are_known_ones(about):
    """Whatever the release of zarr: the first ones would have unpickled."""

    class Array:
        class metadata:
            to_dict = staticmethod(lambda: about)

    with pytest.raises(
        DataError, match=r"has a codec that is not read: (pickle|json2|their_codec)"
    ):
        check_zarr(Array, "x.zarr")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": [2**20, 2**20], "chunks": [2**10, 2**10]}, "states an array of 8,192 GiB"),
        ({"chunks": [2**50]}, "a chunk of x.zarr states an array"),
        ({"shape": [2**27], "chunks": [1]}, "134,217,728 chunks, more than"),
        ({"dtype": "|S4", "fill_value": ""}, "not real numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_zarr_is_bounded(tmp_path, changes, match):
    zarr_2(tmp_path / "x.zarr", **changes)
    with pytest.raises(DataError, match=match):
        load_array("x.zarr", tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(DataError, match="no file 'x.npy'"):
        load_array("x.npy", tmp_path)


# Models


@pytest.fixture(scope="module")
def packed():
    return pack(fuzz.network((4,)))


@pytest.fixture
def tensors(packed, tmp_path):
    """A mixture corrected by a network, as `(path, arrays, meta)`."""
    return tmp_path / "d.safetensors", *packed


def refused(tensors, match, arrays=None, **meta):
    path, good, about = tensors
    write_tensors(path, {**good, **(arrays or {})}, {**about, **meta})
    with pytest.raises(FormatError, match=match) as caught:
        load_denoiser(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 10**12}, "a network with width 1000000000000, but 300 parameters in all"),
        ({"width": 200}, r"but its settings ask for \[\(200, 4\)"),
        ({"depth": 300}, "a network of 300 blocks, but .* arrays in all"),
        ({"frequencies": -1}, "a network with frequencies -1"),
        ({"depth": True}, "a network with depth True"),
        ({"attention": "no"}, "a network with attention 'no'"),
        ({"width": 8.0}, "a network with width 8.0"),
        ({"nonsense": 3}, "unexpected keyword argument 'nonsense'"),
        ({"kind": "transformer"}, "no network of kind 'transformer'; there are mlp, unet"),
        ({"kind": ["mlp"]}, "no network of kind"),
    ],
)
def test_networks_are_no_larger_than_their_tensors(tensors, change, match):
    refused(tensors, match, network={**tensors[2]["network"], **change})


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("means", np.nan, "means has a number that is not finite"),
        ("basis", np.inf, "basis has a number that is not finite"),
        ("variances", -1.0, "variances has a variance below zero"),
        ("floor", -1e-9, "floor has a variance below zero"),
        ("log_weights", np.nan, "log_weights has a number that is not finite"),
        ("log_weights", -np.inf, "no component has a weight above zero"),
        ("network.0001", np.nan, "an array of a network has a number that is not finite"),
    ],
)
def test_numbers_that_no_denoiser_has_are_refused(tensors, name, value, match):
    refused(tensors, match, {name: np.full_like(tensors[1][name], value)})


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"means": np.zeros((2, 5), np.float32)}, r"means has shape \(2, 5\), which does not fit"),
        ({"floor": np.zeros((), np.float32)}, r"floor has shape \(\), which does not fit"),
        ({"basis": np.zeros((2, 4, 4), int)}, "basis holds int64, not real numbers"),
        ({"basis": np.full((2, 4, 4), 1e300)}, "basis has a number that is not finite"),
        ({"other": np.zeros(3)}, "does not have the arrays"),
        ({"network.0099": np.zeros(3, np.float32)}, "the arrays of a network have shapes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tensors, arrays, match):
    refused(tensors, match, arrays)


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({"shape": [10**9]}, "which does not fit 2 components of 1000000000 entries"),
        ({"shape": [10**12]}, "expected the shape of a source"),
        ({"shape": [0]}, "expected the shape of a source"),
        ({"shape": "4"}, "expected the shape of a source"),
        ({"kind": "pickle"}, "no denoiser of kind 'pickle'"),
        ({"kind": "mixture"}, "a mixture does not have the arrays"),
        ({"covariance": "none"}, "no covariance 'none'"),
        ({"network": None}, "no network of kind None"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(tensors, meta, match):
    refused(tensors, match, **meta)


def test_a_mixture_without_an_array_is_refused(tensors):
    path, arrays, meta = tensors
    write_tensors(path, {k: a for k, a in arrays.items() if k != "basis"}, meta)
    with pytest.raises(FormatError, match="a mixture without its array 'basis'"):
        load_denoiser(path)


def test_tensors_without_a_description_are_refused(tmp_path):
    from safetensors.numpy import save

    from dichroic.io.model_files import _digest

    header = {"format_version": "1", "sha256": _digest({"x": np.zeros(1)}, "")}
    (tmp_path / "x").write_bytes(save({"x": np.zeros(1)}, metadata=header))
    with pytest.raises(FormatError, match="x is damaged"):
        read_tensors(tmp_path / "x")


def test_types_that_numpy_does_not_have_are_refused(tmp_path):
    header = json.dumps(
        {
            "__metadata__": {"format_version": "1", "meta": "{}"},
            "x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]},
        }
    ).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(FormatError, match="is damaged"):
        read_tensors(tmp_path / "x")


@pytest.mark.parametrize("how", ["up", "absolute", "link"])
def test_a_model_names_no_file_outside_its_folder(tmp_path, how):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere.safetensors"
    save_model(folder, {"a": fuzz.mixture((4,))}, {})
    record = read_record(folder / "model.json")
    file = folder / record["sources"]["a"]["file"]
    file.rename(elsewhere)
    if how == "link":
        file.symlink_to(elsewhere)
    else:
        name = "../elsewhere.safetensors" if how == "up" else str(elsewhere)
        record["sources"]["a"]["file"] = name
        write_record(folder / "model.json", record)
    with pytest.raises(FormatError, match=r"names '.*', which is outside its folder"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "x" * 300, "a\nb", "\ud800"])
def test_a_model_has_no_source_that_would_be_written_elsewhere(tmp_path, name):
    save_model(tmp_path, {"a": fuzz.mixture((4,))}, {})
    record = read_record(tmp_path / "model.json")
    write_record(tmp_path / "model.json", {**record, "sources": {name: record["sources"]["a"]}})
    with pytest.raises(FormatError, match="use letters, digits, '_' and '-'"):
        load_model(tmp_path)


# Records


def test_records_of_before_they_had_a_hash_are_read(tmp_path):
    save_model(tmp_path, {"a": fuzz.mixture((4,))}, {"config": {"seed": 3}})
    record = json.loads((tmp_path / "model.json").read_text())
    del record["sha256"]
    write_json(tmp_path / "model.json", {**record, "format_version": 1})
    assert load_model(tmp_path)[1] == {"config": {"seed": 3}}
    write_json(tmp_path / "model.json", record)
    with pytest.raises(FormatError, match="its contents do not match its hash"):
        load_model(tmp_path)


def test_a_changed_setting_is_noticed(tmp_path):
    write_record(tmp_path / "run.json", {"config": {"seed": 3}, 7: [1.5, None]})
    assert read_record(tmp_path / "run.json") == {"config": {"seed": 3}, "7": [1.5, None]}
    text = (tmp_path / "run.json").read_text().replace('"seed": 3', '"seed": 4')
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(FormatError, match="its contents do not match its hash"):
        read_record(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "is damaged"),
        ('{"a": ' * 100 + "1" + "}" * 100, "is nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "is damaged"),
        ('{"a": 1, "a": 2}', "a key appears twice"),
    ],
)
def test_json_is_bounded(tmp_path, text, match):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FormatError, match=match):
        read_json(tmp_path / "x.json")


def test_json_of_any_size_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(2**33)
    with pytest.raises(FormatError, match=r"x.json has 8,192.0 MiB, more than 64"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "line",
    [b'{"seconds": "long"}', b"[1]", b'{"phase": 3}', b'{"iteration": {"a": 1}}', b"\xff", b'{"x": 1e999}'],
)  # fmt: skip
def test_metrics_end_at_a_line_that_is_no_iteration(tmp_path, line):
    (tmp_path / "m.jsonl").write_bytes(
        b'{"iteration": 1, "phase": "a"}\n' + line + b'\n{"iteration": 2}\n'
    )
    assert read_metrics(tmp_path / "m.jsonl") == [{"iteration": 1, "phase": "a"}]
    assert read_metrics(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ("/nowhere/p.yaml", "is not there any more: say where it is (--problem)"),
        ({"a": 1}, "does not know the problem file that it was fitted to"),
        ("a\0b", "does not know the problem file that it was fitted to"),
    ],
)
def test_a_run_that_names_no_problem_file_asks_for_it(tmp_path, capsys, named, match):
    write_record(tmp_path / "run.json", {"problem_file": named})
    assert main(["report", str(tmp_path)]) == 2
    assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["separate", "R", "v"], ["report", "R"], ["sample", "R", "--source", "a"]]
)
def test_a_folder_without_a_run_is_said(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder, match in {
        "nope": "there is no folder 'nope'; expected a run folder or a saved model",
        "empty": "'empty' holds neither a run nor a saved model",
    }.items():
        assert main([folder if word == "R" else word for word in words]) == 2
        assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["separate", "R", "v"], "expected a name that ends in .npz or .zarr, got"),
        (["sample", "R", "--source", "a"], "expected a name that ends in .npy, got"),
    ],
)
@pytest.mark.parametrize("out", ["x.txt", "x", "x.npz.gz"])
def test_a_result_of_another_kind_is_refused_at_once(capsys, words, match, out):
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--out", out])
    assert f"argument --out: {match} '{out}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"sampler": {"steps": 10**9}}, "fit.sampler.steps: must be at most 1000000"),
        ({"batch_size": 2**40}, "fit.batch_size: must be at most"),
        ({"seed": 2**63}, "fit.seed: must be at most"),
    ],
)
def test_settings_that_would_never_end_are_refused(values, match):
    with pytest.raises(ConfigError, match=match):
        FitConfig.from_dict(values)
