"""A standard deviation that is an array of no axes, in a file or in memory, is the number that it holds."""

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

from dichroic.errors import ConfigError, DataError, ShapeError
from dichroic.io import load_problem, load_view, open_view
from dichroic.operators import Identity
from dichroic.problem.lazy_view import LazyView
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View

Y = np.random.default_rng(0).normal(size=(5, 3))
STATEMENT = """
sources: {{s: [3]}}
views:
  v: {{observations: data.npz:y, operators: {{s: identity}}, noise: {noise}}}
"""


def view(noise):
    return View(Y, {"s": Identity((3,))}, noise, "v")


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "data.npz", y=Y, sigma=np.array(0.05), several=np.full(5, 0.05))
    np.save(tmp_path / "sigma.npy", np.float64(0.05))
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["sigma"] = 0.05
    zarr.create_array(tmp_path / "sigma.zarr", shape=(), dtype="f8")[...] = 0.05
    return tmp_path


@pytest.mark.parametrize(
    "noise", [np.array(0.05), jnp.asarray(0.05), np.float32(0.05), np.array(0.05, np.float32)]
)
def test_a_view_takes_an_array_of_no_axes(noise):
    problem = Problem([Source("s", (3,))], [view(noise)])
    found = problem.views[0].noise_model
    assert found.std == view(0.05).noise_model.std
    assert problem.views[0].select(slice(2)).noise_model.std == found.std
    np.testing.assert_array_equal(view(noise).prepare().noise.std, view(0.05).prepare().noise.std)
    assert load_view({"observations": Y}, problem).noise_model.std == found.std
    assert load_view({"observations": Y, "noise": noise}, problem).noise_model.std == found.std


@pytest.mark.parametrize("noise", [np.array("0.05"), np.array(0.05j), np.array([0.05, 0.1])])
def test_other_arrays_are_no_standard_deviation(noise):
    with pytest.raises(DataError, match="view 'v'"):
        Problem([Source("s", (3,))], [view(noise)])


@pytest.mark.parametrize(
    "noise",
    [
        "data.npz:sigma",
        "sigma.npy",
        "data.h5:/sigma",
        "sigma.zarr",
        "{file: data.npz, key: sigma}",
        "{isotropic: sigma.npy}",
    ],
)
def test_a_problem_and_a_new_view_take_a_number_from_a_file(folder, noise):
    (folder / "p.yaml").write_text(STATEMENT.format(noise=noise))
    problem, _ = load_problem(folder / "p.yaml")
    assert problem.views[0].noise_model.std == np.float32(0.05)
    (folder / "new.yaml").write_text(f"{{observations: data.npz:y, noise: {noise!s}}}")
    assert load_view(folder / "new.yaml", problem).noise_model.std == np.float32(0.05)
    stored = open_view(folder / "new.yaml", problem)
    assert isinstance(stored, LazyView)
    assert stored.select(np.array([1, 3])).noise_model.std == np.float32(0.05)


def test_a_new_view_in_one_file_takes_a_number(folder):
    (folder / "p.yaml").write_text(STATEMENT.format(noise=0.1))
    problem, _ = load_problem(folder / "p.yaml")
    np.savez(folder / "new.npz", observations=Y, noise=np.array(0.05))
    assert load_view(folder / "new.npz", problem).noise_model.std == np.float32(0.05)


def test_several_numbers_say_what_they_are(folder):
    (folder / "p.yaml").write_text(STATEMENT.format(noise="data.npz:several"))
    said = r"v.noise: 'data.npz:several' has shape \(5,\).*isotropic: ….*diagonal: …"
    with pytest.raises(ShapeError, match=said):
        load_problem(folder / "p.yaml")
    (folder / "p.yaml").write_text(STATEMENT.format(noise="diagonl"))
    with pytest.raises(ConfigError, match=r"v.noise: expected the standard deviation.*'diagonl'"):
        load_problem(folder / "p.yaml")
    (folder / "p.yaml").write_text(STATEMENT.format(noise="data.npz:sgma"))
    with pytest.raises(DataError, match=r"v.noise: no 'sgma' in 'data.npz'; did you mean 'sigma'"):
        load_problem(folder / "p.yaml")
