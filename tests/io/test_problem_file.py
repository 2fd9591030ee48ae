"""A problem stated in YAML is the problem stated in Python, and every mistake names its place."""

import re
import sys
import textwrap

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

from dichroic.cli.commands import _config
from dichroic.cli.main import parser
from dichroic.config import FitConfig
from dichroic.errors import ConfigError, DataError, DichroicError, ShapeError
from dichroic.io import load_array, load_problem, load_view, summary_rows
from dichroic.operators import (
    BlockAverage,
    Compose,
    Convolve,
    Dense,
    Diagonal,
    FunctionOperator,
    Identity,
    PatchPlacement,
    Scale,
    Stack,
    Sum,
    Zero,
)
from dichroic.operators.noise import DenseNoise, DiagonalNoise, IsotropicNoise, LowRankNoise, Masked
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View

N = 6


@pytest.fixture
def arrays(tmp_path):
    """Arrays of the problem below, also written to `tmp_path`."""
    rng = np.random.default_rng(0)
    psf = np.full((3, 3), 1 / 9)
    values = {
        "y1": rng.normal(size=(N, 3)).astype(np.float32),
        "y2": rng.normal(size=(N, 4, 4)),
        "A1": rng.normal(size=(N, 3, 5)),
        "A2": rng.normal(size=(16, 5)),
        "m2": (rng.uniform(size=(N, 4, 4)) > 0.2).astype(np.float32),
        "var": rng.uniform(0.5, 1, size=(4, 4)),
        "x": rng.normal(size=(N, 8, 8)),
    }
    np.savez(tmp_path / "data.npz", **values)
    np.save(tmp_path / "psf.npy", psf)
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "complex.npy", np.ones(3) * 1j)
    np.savez(tmp_path / "archive.npz", values["m2"])
    (tmp_path / "archive.npz").rename(tmp_path / "wrong.npy")
    np.save(tmp_path / "array.npy", values["m2"])
    (tmp_path / "array.npy").rename(tmp_path / "wrong.npz")
    with h5py.File(tmp_path / "data.h5", "w") as file:
        for name, value in values.items():
            file[f"group/{name}"] = value
    group = zarr.open_group(tmp_path / "data.zarr", mode="w")
    for name, value in values.items():
        array = group.create_array(f"group/{name}", shape=value.shape, dtype=value.dtype)
        array[...] = value
    zarr.save_array(tmp_path / "one.zarr", values["y1"])
    return {**values, "psf": psf}


MIXTURE = """
sources:
  background: [5]
  signal: {shape: [8, 8]}
views:
  noise_only:
    observations: data.npz:y1
    operators:
      background: {dense: data.npz:A1}
    noise: 1e-2
  mixed:
    observations: {file: data.npz, key: y2}
    mask: data.npz:m2
    held_out: [1, 0, 0, 0, 0, 1]
    operators:
      background: {dense: data.npz:A2}
      signal: {compose: [{block_average: {factor: 2}}, {convolve: psf.npy}]}
    noise: {diagonal: data.npz:var}
    truth: {signal: data.npz:x}
fit: {seed: 1, mixture: {components: 16}}
"""


def mixture(a):
    blur = BlockAverage((8, 8), 2) @ Convolve(a["psf"], shape=(8, 8))
    dense = Dense(a["A2"], out_shape=(4, 4))
    return Problem(
        [Source("background", (5,)), Source("signal", (8, 8))],
        [
            View(a["y1"], {"background": Dense(a["A1"])}, 0.01, "noise_only"),
            View(
                a["y2"],
                {"background": dense, "signal": blur},
                DiagonalNoise(jnp.asarray(a["var"])),
                "mixed",
                a["m2"],
                truth={"signal": a["x"]},
                held_out=np.array([1, 0, 0, 0, 0, 1], bool),
            ),
        ],
    )


def write(folder, text, name="problem.yaml"):
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def one_view(
    folder, arrays, *, operators="{x: identity}", shape="[8, 8]", y=None, stored=False, **keys
):
    """A problem of one view with arrays of zeros, loaded from YAML."""
    np.save(folder / "y.npy", np.zeros((N, 8, 8)) if y is None else y)
    more = "".join(f"\n    {k}: {v}" for k, v in {"noise": 0.1, **keys}.items())
    text = f"sources: {{x: {shape}}}\nviews:\n  v:\n    observations: y.npy\n"
    path = write(folder, f"{text}    operators: {operators}{more}\n")
    return load_problem(path, stored=stored)[0]


def test_yaml_states_the_same_problem_as_python(tmp_path, arrays):
    problem, fit = load_problem(write(tmp_path, MIXTURE))
    want = mixture(arrays)
    assert problem.fingerprint() == want.fingerprint()
    assert FitConfig.from_dict(fit).mixture.components == 16
    np.testing.assert_array_equal(problem.view("mixed").truth["signal"], arrays["x"])
    np.testing.assert_array_equal(problem.view("mixed").held_out, [1, 0, 0, 0, 0, 1])
    assert problem.origin == str((tmp_path / "problem.yaml").resolve())


@pytest.mark.parametrize("store", ["data.h5:/group/", "data.h5:group/", "data.zarr:group/"])
def test_other_formats_state_the_same_problem(tmp_path, arrays, store):
    problem, _ = load_problem(write(tmp_path, MIXTURE.replace("data.npz:", store)))
    assert problem.fingerprint() == mixture(arrays).fingerprint()


def test_operator_kinds(tmp_path, arrays):
    text = """
    sources: {x: [8, 8]}
    views:
      zero:
        observations: y.npy
        operators: {x: {sum: [{scale: 0.5}, {diagonal: d.npy}, zero, {mask: e.npy}]}}
        noise: {isotropic: std.npy}
      stack:
        observations: s.npy
        operators:
          x: {stack: [identity, {block_average: {factor: 4, axes: [0]}}, {zero: {out_shape: 2}}]}
        noise: {low_rank: {factor: u.npy, variance: v.npy}}
      dense:
        observations: z.npy
        operators: {x: {compose: [{dense: {matrix: m.npy, out_shape: [2, 1]}}, {convolve: k.npy}]}}
        noise: {dense: [[2, 0], [0, 1]]}
        group: 7
      conv:
        observations: y.npy
        operators: {x: {convolve: {kernel: [0.25, 0.5, 0.25], ndim: 1}}}
        noise: 0.1
        mask: nan
      scene:
        observations: y.npy
        operators:
          x: {compose: [{patch_placement: {offset: o.npy, out_shape: [8, 8]}}, {patch_placement: {offset: [1, -2], out_shape: [9, 9]}}]}
        noise: 0.1
    """
    rng = np.random.default_rng(1)
    a = {
        "y": rng.normal(size=(N, 8, 8)),
        "d": rng.uniform(size=(N, 8, 8)),
        "e": np.indices((8, 8)).sum(0) % 2,
        "std": np.full(N, 0.3),
        "s": rng.normal(size=(N, 82)),
        "u": rng.normal(size=(82, 2)),
        "v": np.ones(82),
        "z": rng.normal(size=(N, 2, 1)),
        "m": rng.normal(size=(2, 64)),
        "k": np.ones((N, 3, 3)),
        "o": rng.integers(-3, 3, size=(N, 2)),
    }
    for name, value in a.items():
        np.save(tmp_path / f"{name}.npy", value)
    problem, fit = load_problem(write(tmp_path, text))
    s, diagonal = (8, 8), Diagonal(a["d"], shape=(8, 8))
    total = Sum((Scale(s, 0.5), diagonal, Zero(s, s), Diagonal(a["e"], shape=s)))
    stack = Stack((Identity(s), BlockAverage(s, 4, axes=(0,)), Zero(s, (2,))))
    dense = Compose((Dense(a["m"], in_shape=s, out_shape=(2, 1)), Convolve(a["k"], shape=s)))
    line = Convolve([0.25, 0.5, 0.25], shape=s, ndim=1)
    scene = PatchPlacement((9, 9), s, a["o"]) @ PatchPlacement(s, (9, 9), (1, -2))
    low_rank = LowRankNoise(jnp.asarray(a["u"]), jnp.asarray(a["v"]))
    views = [
        View(a["y"], {"x": total}, IsotropicNoise(jnp.asarray(a["std"])), "zero"),
        View(a["s"], {"x": stack}, low_rank, "stack"),
        View(a["z"], {"x": dense}, DenseNoise(jnp.diag(jnp.array([2.0, 1.0]))), "dense", group="7"),
        View(a["y"], {"x": line}, 0.1, "conv", "nan"),
        View(a["y"], {"x": scene}, 0.1, "scene"),
    ]
    assert problem.fingerprint() == Problem([Source("x", s)], views).fingerprint()
    assert fit == {}


def test_zero_takes_its_shape_from_the_observations(tmp_path, arrays):
    text = MIXTURE.replace("{dense: data.npz:A2}", "zero")
    problem, _ = load_problem(write(tmp_path, text))
    assert problem.view("mixed").operators["background"].out_shape == (4, 4)
    assert problem.seen_by("background") == ("noise_only",)


def test_a_section_without_settings_is_empty(tmp_path, arrays):
    start = MIXTURE.partition("fit:")[0]
    for end in ("", "fit:", "fit: null", "fit: {}"):
        assert load_problem(write(tmp_path, start + end))[1] == {}


def test_numbers_may_be_written_with_an_exponent(tmp_path, arrays):
    end = "fit: {diffusion: {learning_rate: 1e-4}, sampler: {sigma_max: 2e+1}}"
    problem, section = load_problem(write(tmp_path, MIXTURE.partition("fit:")[0] + end))
    config = FitConfig.from_dict(section)
    assert (config.diffusion.learning_rate, config.sampler.sigma_max) == (1e-4, 20)
    assert problem.view("noise_only").noise == 0.01
    given = lambda *words: parser().parse_args(["fit", "problem.yaml", "--out", "run", *words])
    assert _config(given("--sampler.sigma_max", "3e1"), section).sampler.sigma_max == 30
    with pytest.raises(ConfigError, match=r"^settings.holdout: must be finite, got nan"):
        _config(given("--holdout", "nan"), section)


def test_anchors_and_merge_keys_are_allowed(tmp_path, arrays):
    text = """
    sources: {background: [5]}
    views:
      one: &one {observations: data.npz:y1, operators: {background: {dense: data.npz:A1}}, noise: 1}
      two: {<<: *one, noise: 2}
    """
    problem, _ = load_problem(write(tmp_path, text))
    assert [v.noise for v in problem.views] == [1.0, 2.0]


# Mistakes: (what to replace in the problem above, by what, the error, the start of it, a part).

OTHER_ROWS = f"one row per observation, but there are {N} observations (axis 0)"
MISTAKES = [
    ("views:", "veiws:", ConfigError, "problem.yaml: unknown key 'veiws'", "did you mean 'views'?"),
    (
        "    mask:",
        "    msk:",
        ConfigError,
        "problem.yaml: views.mixed: unknown key 'msk'",
        "'mask'?",
    ),
    (
        "      signal: {compose",
        "      signl: {compose",
        ConfigError,
        "problem.yaml: views.mixed.operators: unknown key 'signl'",
        "did you mean 'signal'?",
    ),
    (
        "{convolve: psf.npy}",
        "{convolv: psf.npy}",
        ConfigError,
        "problem.yaml: views.mixed.operators.signal.compose[1]: unknown key 'convolv'",
        "did you mean 'convolve'?",
    ),
    (
        "truth: {signal",
        "truth: {sgnal",
        ConfigError,
        "problem.yaml: views.mixed.truth: unknown key 'sgnal'",
        "did you mean 'signal'?",
    ),
    (
        "factor: 2}",
        "factr: 2}",
        ConfigError,
        "problem.yaml: views.mixed.operators.signal.compose[0].block_average: unknown key 'factr'",
        "did you mean 'factor'?",
    ),
    (
        "factor: 2}",
        "factor: two}",
        ConfigError,
        "problem.yaml: views.mixed.operators.signal",
        "'two'",
    ),
    (
        "factor: 2}",
        "factor: 2, axes: [0, 5]}",
        ShapeError,
        "problem.yaml: views.mixed.operators.signal.compose[0].block_average: BlockAverage",
        "no axis 5 in (8, 8)",
    ),
    ("factor: 2}", "factor: 3}", ShapeError, "problem.yaml: views.mixed.operators.signal", "of 3"),
    (
        "data.npz:y1",
        "dta.npz:y1",
        DataError,
        "problem.yaml: views.noise_only.observations: no file 'dta.npz'",
        "did you mean 'data.npz'? there is: complex.npy, data.h5, data.npz, data.zarr",
    ),
    (
        "data.npz:var",
        "data.npz:vr",
        DataError,
        "problem.yaml: views.mixed.noise.diagonal: no 'vr' in 'data.npz'",
        "did you mean 'var'? there is: A1, A2, m2, var, x, y1, y2",
    ),
    (
        "data.npz:m2",
        "data.h5:/group/mm2",
        DataError,
        "problem.yaml: views.mixed.mask: no '/group/mm2' in 'data.h5'",
        "did you mean '/group/m2'?",
    ),
    (
        "data.npz:m2",
        "data.zarr:group/mm2",
        DataError,
        "problem.yaml: views.mixed.mask: no 'group/mm2' in 'data.zarr'",
        "did you mean 'group/m2'?",
    ),
    (
        "data.npz:m2",
        "data.npz",
        DataError,
        "problem.yaml: views.mixed.mask: 'data.npz'",
        "say which",
    ),
    ("psf.npy", "psf.npy:k", DataError, "problem.yaml: views.mixed.operators", "leave out ':k'"),
    ("data.npz:m2", "folder/m.npy", DataError, "problem.yaml: views.mixed.mask", "no folder"),
    ("data.npz:m2", "data.csv", ConfigError, "problem.yaml: views.mixed.mask", "'data.csv'"),
    ("data.npz:m2", "[[1, 0], [1]]", DataError, "problem.yaml: views.mixed.mask", "no array"),
    ("1e-2", "1" + 400 * "0", ConfigError, "problem.yaml: views.noise_only.noise", "expected"),
    (
        "[1, 0, 0, 0, 0, 1]",
        f"[1{400 * '0'}]",
        DataError,
        "problem.yaml: views.mixed.held_out",
        "too large",
    ),
    (
        "noise: 1e-2",
        "noise: high",
        ConfigError,
        "problem.yaml: views.noise_only.noise: expected the standard deviation",
        "'high'",
    ),
    (
        "noise: 1e-2",
        "noise: {diagnal: 1}",
        ConfigError,
        "problem.yaml: views.noise_only.noise: unknown key 'diagnal'",
        "did you mean 'diagonal'?",
    ),
    (
        "    noise: 1e-2\n",
        "",
        ConfigError,
        "problem.yaml: views.noise_only: 'noise' is missing",
        "",
    ),
    ("noise: 1e-2", "noise: -1", DataError, "problem.yaml: views.noise_only: view", "positive"),
    *[
        (
            "noise: 1e-2",
            f"noise: {value}",
            ConfigError,
            "problem.yaml: views.noise_only.noise: the standard deviation must be finite",
            shown,
        )
        for value, shown in (
            (".nan", "nan"),
            ("nan", "'nan'"),
            ("1e400", "1e400"),
            ("-.inf", "-inf"),
        )
    ],
    (
        "noise: 1e-2",
        "noise: {isotropic: .nan}",
        DataError,
        "problem.yaml: views.noise_only: view 'noise_only': the noise standard deviation is nan",
        "",
    ),
    ("noise: 1e-2", "noise: true", ConfigError, "problem.yaml: views.noise_only.noise", "True"),
    (
        "{dense: data.npz:A1}",
        "{dense: data.npz:A2}",
        ShapeError,
        "problem.yaml: views.noise_only: view 'noise_only', source 'background'",
        "axis 0 is 16 instead of 3",
    ),
    (
        "{dense: data.npz:A1}",
        "{dense: data.npz:x}",
        ShapeError,
        "problem.yaml: views.noise_only.operators.background.dense: Dense:",
        "cannot map",
    ),
    (
        "{dense: data.npz:A1}",
        "dense",
        ConfigError,
        "problem.yaml: views.noise_only.operators.background: dense needs a value",
        "",
    ),
    (
        "{dense: data.npz:A1}",
        "{dense: data.npz:A1, scale: 2}",
        ConfigError,
        "problem.yaml: views.noise_only.operators.background: expected one {kind: …}",
        "",
    ),
    (
        "{dense: data.npz:A1}",
        "{scale: data.npz:A2}",
        ShapeError,
        "problem.yaml: views.noise_only.operators.background.scale: Scale: a factor",
        "(16, 5)",
    ),
    (
        "{dense: data.npz:A1}",
        "{compose: [zero, {dense: data.npz:A1}, zero]}",
        ConfigError,
        "problem.yaml: views.noise_only.operators.background.compose[2].zero: give the shape",
        "",
    ),
    (
        "{dense: data.npz:A1}",
        "{identity: 3}",
        ConfigError,
        "problem.yaml: views.noise_only.operators.background.identity: identity takes no",
        "",
    ),
    (
        "background: [5]",
        "background: 5.5",
        ConfigError,
        "problem.yaml: sources.background: expected a shape",
        "5.5",
    ),
    (
        "background: [5]",
        "back.ground: [5]",
        ShapeError,
        "problem.yaml: sources.back.ground",
        "files",
    ),
    (
        "background: [5]",
        "background: {shap: [5]}",
        ConfigError,
        "problem.yaml: sources.background: unknown key 'shap'",
        "did you mean 'shape'?",
    ),
    ("background: [5]", "on: [5]", ConfigError, "problem.yaml: sources: True is no name", "quotes"),
    (
        "background: [5]",
        "other: [5]\n  background: [5]",
        DataError,
        "problem.yaml: source 'other' is seen by no view",
        "",
    ),
    ("  mixed:", "  noise_only:", ConfigError, "problem.yaml: line 11: key 'noise_only'", "twice"),
    ("fit: {", "fit: }{", ConfigError, "problem.yaml: line 20:", ""),
    (
        "fit: {seed: 1, mixture: {components: 16}}",
        "fit: [1]",
        ConfigError,
        "problem.yaml: fit:",
        "[1]",
    ),
    *[
        (
            "fit: {seed: 1, mixture: {components: 16}}",
            f"fit: {empty}",
            ConfigError,
            "problem.yaml: fit: expected a table",
            shown,
        )
        for empty, shown in (("[]", "[]"), ("false", "False"), ("0", "0"), ("''", "''"))
    ],
    *[
        (
            "data.npz:m2",
            f"wrong.{kind}",
            DataError,
            f"problem.yaml: views.mixed.mask: 'wrong.{kind}' {words}",
            "rename it",
        )
        for kind, words in (("npy", "is an archive"), ("npz", "holds a single"))
    ],
    (
        "data.npz:m2",
        "empty.npz",
        DataError,
        "problem.yaml: views.mixed.mask: cannot read 'empty.npz': No data left in file",
        "",
    ),
    (
        "factor: 2}",
        "factor: 2, axes: [true]}",
        ConfigError,
        "problem.yaml: views.mixed.operators.signal.compose[0].block_average: axes: expected",
        "[True]",
    ),
    (
        "{dense: data.npz:A1}",
        "{identity: []}",
        ConfigError,
        "problem.yaml: views.noise_only.operators.background.identity: identity takes no",
        "[]",
    ),
    (
        "{dense: data.npz:A1}",
        "{dense: complex.npy}",
        DataError,
        "problem.yaml: views.noise_only.operators.background.dense: complex.npy holds complex128",
        "not real numbers",
    ),
]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("old", "new", "error", "start", "end"), MISTAKES)
def test_a_mistake_names_its_place(tmp_path, arrays, old, new, error, start, end, stored):
    assert old in MIXTURE
    path = write(tmp_path, MIXTURE.replace(old, new, 1))
    with pytest.raises(DichroicError) as caught:
        load_problem(path, stored=stored)
    message = str(caught.value)
    if stored and new in ("{scale: data.npz:A2}", "{dense: complex.npy}"):
        error, start, end = ShapeError, start.rsplit(": ", 1)[0], OTHER_ROWS
        start = start.removesuffix(": Scale")
    assert type(caught.value) is error, message
    assert message.startswith(start), message
    assert end in message, message
    assert message.count("problem.yaml: ") == 1


def test_a_missing_problem_file_names_the_nearest(tmp_path):
    write(tmp_path, MIXTURE)
    with pytest.raises(ConfigError, match=r"no file 'problm.yaml'.*did you mean 'problem.yaml'\?"):
        load_problem(tmp_path / "problm.yaml")


def test_a_folder_is_no_problem_file(tmp_path, monkeypatch):
    write(tmp_path, MIXTURE)
    monkeypatch.chdir(tmp_path)
    said = r"^'\.' is a folder; expected a problem file \(YAML\); there is: problem.yaml$"
    with pytest.raises(ConfigError, match=said):
        load_problem(".")


def test_an_empty_file_is_no_problem(tmp_path):
    with pytest.raises(ConfigError, match=r"^problem.yaml: expected a table"):
        load_problem(write(tmp_path, ""))


def test_yaml_cannot_construct_python_objects(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^problem.yaml: line 1: a value of kind .*python/object/apply"
    ):
        load_problem(write(tmp_path, "sources: !!python/object/apply:os.getcwd []"))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (
            {"noise": "{low_rank: {factor: [1, 2], variance: 1}}"},
            r"noise.low_rank.factor: expected",
        ),
        ({"noise": "{low_rank: {variance: 1}}"}, r"noise.low_rank: 'factor' is missing"),
        ({"noise": "{dense: 1}"}, r"noise.dense: expected \(M, M\)"),
        ({"noise": "{isotropic: [[1]]}"}, r"noise.isotropic: expected a number"),
        ({"operators": "{x: {diagonal: 1}}"}, r"operators.x.diagonal: Diagonal: an array"),
        ({"noise": "{diagonal: 1}"}, r"noise.diagonal: expected one variance per entry"),
        ({"held_out": "[1, 1]"}, r"views.v: view 'v': held_out has shape"),
        ({"operators": "{x: {block_average: {factor: 2, axes: a}}}"}, r"average: axes: expected a"),
        ({"operators": "{x: {sum: []}}"}, r"operators.x.sum: expected a list"),
        ({"operators": "{x: {convolve: {ndim: 1}}}"}, r"operators.x.convolve: 'kernel' is missing"),
        (
            {"operators": "{x: {convolve: [[[[1, 2]]]]}}"},
            r"operators.x.convolve: Convolve: a kernel of shape",
        ),
        ({"operators": "{x: {block_average: 0}}"}, r"operators.x.block_average: factor: expected"),
        ({"operators": "{x: 3}"}, r"operators.x: expected one"),
        ({"mask": "no"}, r"views.v.mask: expected an array"),
        ({"y": np.zeros(4)}, r"views.v: view 'v' has no observations"),
        ({"y": np.zeros(())}, r"views.v: view 'v': the observations are one number \(.*; expected"),
        ({"y": np.full((N, 8, 8), np.nan)}, r"views.v: view 'v': observation 0 is nan"),
    ],
)
def test_a_mistake_in_an_array_names_its_place(tmp_path, arrays, keys, match):
    with pytest.raises(DichroicError, match=r"^problem.yaml: .*" + match):
        one_view(tmp_path, arrays, **keys)
    if match.endswith(("rank.factor: expected", "expected a number")):  # its rows are counted first
        match = match.split(": expected")[0] + ": .*" + re.escape(OTHER_ROWS)
    with pytest.raises(DichroicError, match=r"^problem.yaml: .*" + match):
        one_view(tmp_path, arrays, stored=True, **keys)


# Arrays.


@pytest.mark.parametrize(
    "reference",
    [
        "data.npz:y1",
        "data.npz:/y1",
        "data.npz:y1/",
        "data.h5:/group/y1",
        "data.h5:group/y1",
        "data.zarr:group/y1",
        "data.zarr:/group/y1",
        "one.zarr",
        {"file": "data.npz", "key": "y1"},
        {"file": "one.zarr"},
    ],
)
def test_array_references(tmp_path, arrays, reference):
    got = load_array(reference, tmp_path)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, arrays["y1"])


def test_inline_arrays(tmp_path):
    assert load_array("1e-3", tmp_path) == 1e-3
    assert load_array(2, tmp_path).shape == ()
    np.testing.assert_array_equal(load_array([[1, 2]], tmp_path), [[1.0, 2.0]])
    np.testing.assert_array_equal(load_array(jnp.ones(2), tmp_path), [1.0, 1.0])


def test_a_file_of_one_array_needs_no_key(tmp_path):
    np.savez(tmp_path / "one.npz", only=np.arange(3))
    np.testing.assert_array_equal(load_array("one.npz", tmp_path), np.arange(3))


def test_a_name_with_slashes_is_read_exactly_where_two_are_alike(tmp_path):
    np.savez(tmp_path / "two.npz", **{"y": np.zeros(1), "/y": np.ones(1), "/z": np.full(1, 2)})
    assert [load_array(f"two.npz:{key}", tmp_path)[0] for key in ("y", "/y", "z")] == [0, 1, 2]


def test_arrays_of_objects_or_text_are_refused(tmp_path):
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"object.npy holds pickled objects, which are not read"):
        load_array("object.npy", tmp_path)
    np.save(tmp_path / "text.npy", np.array(["a"]))
    with pytest.raises(DataError, match=r"text.npy holds <U1, not real numbers"):
        load_array("text.npy", tmp_path)
    np.save(tmp_path / "complex.npy", np.ones(3) * 1j)
    with pytest.raises(DataError, match=r"complex.npy holds complex128, not real numbers"):
        load_array("complex.npy", tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 damaged", b"\x93NUMPY\x01"])
@pytest.mark.parametrize("name", ["bad.npz:x", "bad.npy", "bad.h5:/x", "bad.zarr"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name.partition(":")[0]).write_bytes(content)
    with pytest.raises(DataError, match=r"(cannot read |^)'bad\.(?!.*pickle)"):
        load_array(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "match"),
    [("bad.npz:x", r"no archive of arrays \(.npz\)"), ("bad.npy", r"no array of numpy's \(.npy\)")],
)
def test_text_is_no_array(tmp_path, name, match):
    (tmp_path / name.partition(":")[0]).write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=rf"cannot read 'bad.np.': it (is|holds) {match}$"):
        load_array(name, tmp_path)


@pytest.mark.parametrize(("package", "name"), [("h5py", "data.h5:/x"), ("zarr", "data.zarr:x")])
def test_a_missing_package_names_the_extra(tmp_path, arrays, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"needs {package}: pip install 'dichroic\[data\]'"):
        load_array(name, tmp_path)


def test_wrong_references(tmp_path):
    for reference in (None, True, {"key": "a"}, {"file": 3}):
        with pytest.raises(ConfigError, match="expected"):
            load_array(reference, tmp_path)
    with pytest.raises(ConfigError, match=r"unknown key 'fil'; did you mean 'file'\?"):
        load_array({"fil": "a.npz"}, tmp_path)


# New views.


def shared_problem(a):
    """Two views that share everything between observations, and one that does not."""
    rng = np.random.default_rng(2)
    x, both = Scale((4,), 0.5), rng.normal(size=(N, 4))
    mask = np.array([1.0, 1, 0, 1])
    own = Dense(rng.normal(size=(N, 4, 4)))
    return Problem(
        [Source("a", (4,)), Source("b", (4,))],
        [
            View(both, {"a": Identity((4,))}, 0.1, "alone"),
            View(both, {"a": Identity((4,)), "b": x}, DiagonalNoise(jnp.ones(4)), "both", mask),
            View(both, {"a": own, "b": own}, IsotropicNoise(jnp.ones(N)), "own", np.ones((N, 4))),
        ],
    )


def test_a_new_view_takes_over_what_is_missing(tmp_path, arrays):
    problem, y = shared_problem(arrays), np.ones((3, 4))
    np.savez(tmp_path / "new.npz", observations=y)
    view = load_view(tmp_path / "new.npz", problem)
    assert view.name == "new"
    assert view.operators == problem.view("both").operators
    assert isinstance(view.noise, DiagonalNoise)
    np.testing.assert_array_equal(view.mask, [1, 1, 0, 1])
    alone = load_view(tmp_path / "new.npz", problem, like="alone")
    assert (tuple(alone.operators), alone.noise, alone.mask) == (("a",), 0.1, None)


def test_a_new_view_with_its_own_parts(tmp_path, arrays):
    problem, rng = shared_problem(arrays), np.random.default_rng(3)
    parts = {
        "observations": rng.normal(size=(3, 2)),
        "mask": "nan",
        "operator/a": rng.normal(size=(3, 2, 4)),
        "operator/b": rng.normal(size=(2, 4)),
        "noise/diagonal": np.full(2, 0.3),
        "truth/a": rng.normal(size=(3, 4)),
    }
    np.savez(tmp_path / "new.npz", **parts)
    view = load_view(tmp_path / "new.npz", problem)
    want = View(
        parts["observations"],
        {"a": Dense(parts["operator/a"]), "b": Dense(parts["operator/b"])},
        DiagonalNoise(jnp.asarray(parts["noise/diagonal"])),
        "new",
        "nan",
    )
    sources = problem.sources
    assert Problem(sources, [view]).fingerprint() == Problem(sources, [want]).fingerprint()
    np.testing.assert_array_equal(view.truth["a"], parts["truth/a"])


def test_a_new_view_in_yaml_or_a_mapping(tmp_path, arrays):
    problem, y = shared_problem(arrays), np.ones((3, 4))
    np.save(tmp_path / "y.npy", y)
    text = "observations: y.npy\noperators: {a: zero}\nnoise: 0.2\nmask: [1, 1, 1, 1]"
    view = load_view(write(tmp_path, text, "view.yaml"), problem)
    assert isinstance(view.operators["a"], Zero)
    assert view.operators["b"] == problem.view("both").operators["b"]
    assert (view.name, view.noise) == ("view", 0.2)
    spec = {"observations": y, "noise": np.float32(0.5), "operators": {"b": {"scale": 2}}}
    view = load_view(spec, problem)
    assert view.operators["b"].factor == 2
    assert view.noise.std == 0.5


@pytest.mark.parametrize(
    ("parts", "like", "match"),
    [
        ({}, "own", r"^new.npz: no operator for source 'a', and that of view 'own' differs"),
        ({"operator/a": np.eye(4)}, "own", r"^new.npz: no operator for source 'b'"),
        (
            {"operator/a": np.eye(4), "operator/b": np.eye(4)},
            "own",
            r"^new.npz: no noise, and that",
        ),
        (
            {"operator/c": np.eye(4)},
            None,
            r"^new.npz: unknown key 'operator/c'; did you mean 'oper",
        ),
        ({"operator/a": np.eye(5)}, None, r"^new.npz: operators.a.dense: Dense: a 5 × 5 matrix"),
        (
            {"observations": np.ones((3, 5))},
            None,
            r"^new.npz: view 'new', source 'a'.*gives arrays",
        ),
        ({"noise": 1.0, "noise/dense": np.eye(4)}, None, r"^new.npz: .*: give one of them"),
        ({"noise": np.ones(5)}, None, r"^new.npz: view 'new': the noise has per-observation"),
        ({"mask": np.ones(3)}, None, r"^new.npz: view 'new': a mask of shape"),
        ({"mask": np.full(4, np.nan)}, None, r"^new.npz: view 'new': a mask with 4 NaN"),
        (
            {"noise/diagonal": np.full(4, np.nan)},
            None,
            r"^new.npz: view 'new': the noise variance is nan at entry",
        ),
        (
            {"operator/a": np.eye(4) * 1j},
            None,
            r"^new.npz: operators.a.dense: new.npz:operator/a holds complex",
        ),
        ({}, "boht", r"no view 'boht'; there are alone, both, own"),
    ],
)
def test_mistakes_in_a_new_view(tmp_path, arrays, parts, like, match):
    np.savez(tmp_path / "new.npz", **{"observations": np.ones((3, 4)), **parts})
    with pytest.raises(DichroicError, match=match):
        load_view(tmp_path / "new.npz", shared_problem(arrays), like=like)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 damaged", None])
def test_a_new_view_in_a_file_that_is_no_archive(tmp_path, arrays, content):
    if content is None:
        np.save(tmp_path / "new.npy", np.ones((3, 4)))
        content = (tmp_path / "new.npy").read_bytes()
    (tmp_path / "new.npz").write_bytes(content)
    with pytest.raises(
        DataError, match=r"^new.npz: (cannot read 'new.npz'|'new.npz' holds a single)(?!.*pickle)"
    ):
        load_view(tmp_path / "new.npz", shared_problem(arrays))


def test_a_masked_noise_is_taken_over_with_its_mask(tmp_path):
    noise = Masked(IsotropicNoise(0.1), np.array([1, 0, 1, 1]))
    views = [View(np.ones((N, 4)), {"a": Identity((4,))}, noise, "v")]
    problem = Problem([Source("a", (4,))], views)
    view = load_view({"observations": np.ones((3, 4))}, problem)
    np.testing.assert_array_equal(view.observed(), [[True, False, True, True]])
    _, (_, row) = summary_rows(problem)
    assert row[4:6] == ["isotropic", "25.0%"]


def test_a_mask_that_differs_per_observation_is_not_taken_over(tmp_path, arrays):
    y = np.ones((N, 4))
    views = [View(y, {"a": Identity((4,))}, 0.1, "v", np.ones((N, 4)))]
    problem = Problem([Source("a", (4,))], views)
    np.savez(tmp_path / "new.npz", observations=y)
    with pytest.raises(DataError, match=r"^new.npz: no mask, and that of view 'v' differs"):
        load_view(tmp_path / "new.npz", problem)
    np.savez(tmp_path / "new.npz", **{"observations": y, "operator/a": np.eye(4)})
    assert load_view(tmp_path / "new.npz", problem).mask is None


def test_where_a_new_view_can_be(tmp_path, arrays):
    problem = shared_problem(arrays)
    with pytest.raises(DataError, match=r"^nw.npz: no file 'nw.npz'"):
        load_view(tmp_path / "nw.npz", problem)
    with pytest.raises(ConfigError, match=r"new.csv: expected a view in an .npz or a .yaml file"):
        load_view(tmp_path / "new.csv", problem)
    with pytest.raises(ConfigError, match=r"^view.yaml: 'observations' is missing"):
        load_view(write(tmp_path, "noise: 1", "view.yaml"), problem)
    with pytest.raises(ConfigError, match=r"^view: unknown key 'obs'"):
        load_view({"obs": 1}, problem)


# Tables.


def test_summary_of_a_mixture(tmp_path, arrays):
    sources, views = summary_rows(mixture(arrays))
    missing = f"{100 * (1 - arrays['m2'].mean()):.1f}%"
    blur = "background: dense, signal: (block_average ∘ convolve)"
    assert sources == [
        ["source", "shape", "learned from", "observations"],
        ["background", "5", "noise_only, mixed", 2 * N],
        ["signal", "8 × 8", "mixed", N],
    ]
    assert views == [
        ["view", "observations", "shape", "sources", "noise", "missing", "group", "truth"],
        ["noise_only", N, "3", "background: dense (i)", "isotropic", "0.0%", "–", "no"],
        ["mixed", N, "4 × 4", blur, "diagonal", missing, "–", "yes"],
    ]


def test_summary_counts_co_observed_draws_once():
    y, fn = np.ones((N, 4)), FunctionOperator(jnp.cumsum, in_shape=(4,))
    views = [View(y, {"x": fn}, 1.0, "a", group="g"), View(y, {"x": fn}, 1.0, "b", group="g")]
    sources, (_, *rows) = summary_rows(Problem([Source("x", (4,))], views))
    assert sources[1][-1] == N
    assert [row[3] for row in rows] == ["x: function cumsum"] * 2
    assert [row[-2] for row in rows] == ["g", "g"]
