"""Grassy MNIST from files, what is fetched, and the classifier whose features distances are of."""

import hashlib

import jax
import numpy as np
import pytest
from PIL import Image

from dichroic.benchmark.problems import digit_features, grassy
from dichroic.benchmark.problems.download import Patience
from dichroic.benchmark.problems.remote import (
    DATA_VARIABLE,
    RemoteFile,
    data_folders,
    fetch,
    find_file,
)
from dichroic.errors import DataError


@pytest.fixture
def data(grassy_files, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(grassy_files))
    return grassy_files


def file_at(path, content=b"what it holds"):
    path.write_bytes(content)
    return RemoteFile("a.bin", path.as_uri(), hashlib.sha256(content).hexdigest(), len(content))


def test_a_file_is_fetched_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    file = file_at(tmp_path / "origin")
    path = fetch(file)
    assert path == tmp_path / "cache" / "dichroic" / "a.bin"
    assert path.read_bytes() == b"what it holds"
    (tmp_path / "origin").unlink()
    assert fetch(file) == path


def test_a_users_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = file_at(tmp_path / "origin")
    for name in ("own", "stated"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.bin").write_bytes(name.encode())
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "own"))
    assert fetch(file).read_bytes() == b"own"
    assert fetch(file, tmp_path / "stated").read_bytes() == b"stated"
    assert find_file("b.bin") is None
    assert data_folders()[0] == tmp_path / "own"


@pytest.mark.parametrize("content", [b"something else", b"what it hold", b"what it holds and more"])
def test_another_file_than_expected_is_refused_and_not_kept(content, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = file_at(tmp_path / "origin")
    (tmp_path / "origin").write_bytes(content)
    with pytest.raises(DataError, match="is not what it was"):
        fetch(file, tmp_path)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size]


def test_a_file_that_cannot_be_fetched_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = RemoteFile("a.bin", (tmp_path / "nothing").as_uri(), "", 1)
    with pytest.raises(DataError, match=r"a\.bin is not in .*cache.*--data-dir.*DICHROIC_DATA"):
        fetch(file, patience=Patience(tries=2, wait=0.0))


def test_observations_are_what_the_operators_give_of_the_truth_and_noise(data):
    views = grassy.grassy_views(count=60, seed=3, held_out=True)
    assert [v.name for v in views] == ["grass", "mixture"]
    assert [set(v.operators) for v in views] == [{"grass"}, {"grass", "digit"}]
    for view in views:
        clean = sum(np.asarray(jax.vmap(op.mv)(view.truth[k])) for k, op in view.operators.items())
        residual = np.asarray(view.observations) - clean
        assert abs(residual.std() / 0.01 - 1) < 4.5 / np.sqrt(2 * residual.size)
    truth = views[1].truth
    np.testing.assert_allclose(
        np.asarray(views[1].observations), truth["grass"] + 0.5 * truth["digit"], atol=0.06
    )


@pytest.mark.parametrize(
    ("size", "factors", "shapes"),
    [(14, (1,), [(60, 14, 14)]), (28, (1, 2, 4), [(20, 28, 28), (20, 14, 14), (20, 7, 7)])],
)
def test_views_of_lower_resolution_share_the_observations(size, factors, shapes, data):
    problem = grassy.grassy_problem(count=60, seed=0, size=size, factors=factors)
    assert [np.shape(v.observations) for v in problem.views[::2]] == shapes
    assert all(np.shape(v.truth["grass"])[1:] == (size, size) for v in problem.views)
    for view in problem.views:
        assert view.held_out.sum() == len(view.held_out) // 10


def test_digits_are_zeros_and_ones_and_no_part_has_those_of_another(data):
    train = grassy.grassy_views(count=40, seed=0)[1]
    test = grassy.grassy_views(count=10, seed=0, held_out=True)[1]
    fresh = grassy.fresh_sources(50, seed=0)["digit"]
    stop = train.held_out
    mark = lambda x: set(np.round(255 * np.max(np.asarray(x), axis=(1, 2))).astype(int))
    label = lambda x: set(np.sum(np.max(np.asarray(x), axis=1) > 0, axis=1))
    parts = {
        "train": train.truth["digit"][~stop],
        "stop": train.truth["digit"][stop],
        "test": test.truth["digit"],
        "fresh": fresh,
    }
    for x in parts.values():
        assert label(x) <= {2, 4}
    # Of a label, image number i has pixels of 100 + 5 i or so: 40 for training, 20 for tests.
    assert max(mark(parts["train"])) < min(mark(parts["stop"]))
    assert len(fresh) == 10
    key = lambda x: {(m.tobytes()) for m in np.asarray(x, np.float32)}
    assert not key(parts["test"]) & key(parts["fresh"])


def test_grass_is_from_its_region_of_the_photograph():
    across = np.broadcast_to(np.arange(600, dtype=np.float32) / 600, (300, 600))
    for region, (low, high) in grassy.REGIONS.items():
        rng = np.random.default_rng(0)
        x = grassy.grass_patches(rng, [across], 200, size=14, region=region)
        assert low < x.min() < x.max() < high
    # A patch of 28 to 56 pixels, of which the outer ones are half a sample away from its edges.
    span = 600 * (x.max(axis=(1, 2)) - x.min(axis=(1, 2))) * 14 / 13
    assert 28 - 0.1 < span.min() < 30 < 54 < span.max() < 56 + 0.1
    turned = np.argmax(np.stack([x[:, 0, -1] - x[:, 0, 0], x[:, -1, 0] - x[:, 0, 0]]), axis=0)
    assert 0.2 < turned.mean() < 0.8


def test_patches_are_means_of_what_they_cover():
    checks = np.kron(np.indices((30, 30)).sum(axis=0) % 2, np.ones((2, 2))).astype(np.float32)
    x = grassy.grass_patches(np.random.default_rng(0), [np.tile(checks, (4, 8))], 50, size=7)
    assert np.abs(x.mean(axis=(1, 2)) - 0.5).max() < 0.02
    assert x.std() < 0.1


@pytest.mark.parametrize("size", [27, 56, 0])
def test_other_sizes_are_refused(size, data):
    with pytest.raises(DataError, match="must be 28, 14 or 7"):
        grassy.grassy_views(count=10, seed=0, size=size)


def test_a_file_that_is_not_mnist_is_refused(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="is not MNIST as an npz file"):
        grassy.load_mnist(tmp_path)
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros((3, 9, 9)), y_train=np.zeros(3))
    with pytest.raises(DataError, match=r"images of shape \(3, 9, 9\)"):
        grassy.load_mnist(tmp_path)
    with pytest.raises(DataError, match="with x_test"):
        grassy.load_mnist(tmp_path, held_out=True)


def test_photographs_are_those_of_the_folder(data, tmp_path):
    (photo,) = grassy.load_photographs()
    assert photo.shape == (200, 400)
    assert 0 <= photo.min() < photo.max() <= 1
    (tmp_path / "textures").mkdir()
    for name in grassy.PHOTOGRAPHS:
        Image.new("RGB", (60, 50), (255, 0, 0)).save(tmp_path / name)
    both = grassy.load_photographs(tmp_path)
    assert [p.shape for p in both] == [(50, 60), (50, 60)]
    np.testing.assert_allclose(both[0], 0.299, atol=0.005)  # the weight of red in grey


def test_the_classifier_tells_digits_and_its_features_differ(data, monkeypatch):
    monkeypatch.setattr(digit_features, "_STEPS", 200)
    model, right = digit_features.train_classifier(14)
    assert right > 0.9
    images, labels = grassy.load_mnist(held_out=True)
    x = grassy.shrink(images, 14)
    features = model.of(x)
    assert features.shape == (100, 64)
    assert features.min() >= 0
    within = features[labels == 1].std(axis=0).mean()
    assert np.abs(features[labels == 1].mean(0) - features[labels == 8].mean(0)).mean() > 2 * within
