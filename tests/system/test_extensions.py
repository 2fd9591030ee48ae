"""What CONTRIBUTING.md says can be added, each as a small extension outside of the package."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic import (
    Identity,
    IsotropicNoise,
    Noise,
    Operator,
    Problem,
    Separator,
    Source,
    View,
    sample_posterior,
)
from dichroic.inference.samplers import Sampler
from dichroic.io import load_array
from dichroic.io.formats import READERS
from dichroic.io.recorded import Recorded
from dichroic.numerics.batching import as_float, observation_axes
from dichroic.priors import Denoiser, gaussian
from dichroic.priors.schedule import Geometric
from dichroic.problem.observations import Observations

FIT = {
    "mixture": {"components": 1, "gaussian_iterations": 3},
    "joint_iterations": 0,
    "diffusion": {"iterations": 0},
}


class Reversed(Operator):
    """`A x`, the entries of `x` in reverse."""

    size: int = eqx.field(static=True)

    @property
    def in_shape(self):
        return (self.size,)

    @property
    def out_shape(self):
        return (self.size,)

    def mv(self, x):
        return x[::-1]


class WithCommonLevel(Noise):
    """Independent noise, and a level that all entries of an observation share."""

    std: jax.Array = eqx.field(converter=as_float, metadata=observation_axes(0))
    level: jax.Array = eqx.field(converter=as_float, metadata=observation_axes(0))

    def mv(self, v):
        return self.std**2 * v + self.level**2 * jnp.sum(v)

    def sample(self, key, size):
        a, b = jax.random.split(key)
        return self.std * jax.random.normal(a, (size,)) + self.level * jax.random.normal(b)


class Standard(Denoiser):
    """`N(0, I)`."""

    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x_t, sigma):
        return x_t / (1 + sigma**2)


class Euler(Sampler):
    """First-order steps of dx/dσ = (x − D) / σ."""

    def step(self, denoise, x, key, here, there, guess):
        e = denoise(x, here, guess)
        move = lambda x, d, t, s: x + (s - t) * (x - d) / t
        return jax.tree.map(move, x, e.mean, here, there), e


def normal(rng, n, noise=None):
    """`n` observations of a standard normal source of three entries, in reverse."""
    x = rng.normal(size=(n, 3))
    y = x[:, ::-1] + 0.5 * rng.normal(size=x.shape)
    return View(y, {"x": Reversed(3)}, 0.5 if noise is None else noise, "v", truth={"x": x})


def test_an_operator(rng):
    view = normal(rng, 4000)
    mean = Separator(Problem([Source("x", 3)], [view]), FIT).fit(progress=False).separate(view)
    error = mean.draws["x"][0] - view.truth["x"]
    # A draw is off by √2 posterior standard deviations: posterior variances are 0.2.
    assert np.mean(error**2) == pytest.approx(2 * 0.2, rel=4 * np.sqrt(2 / 12000))


def test_a_noise_model(rng):
    noise = WithCommonLevel(0.3, 0.8)
    dense = noise.as_matrix(3)
    y = rng.normal(size=(2, 3)).astype(np.float32)
    prior = {"x": gaussian(np.zeros(3), np.eye(3))}
    draws = sample_posterior(
        prior,
        Observations(jnp.asarray(y), {"x": Identity((3,))}, noise),
        jax.random.key(0),
        n_draws=4000,
    ).x["x"]
    gain = np.linalg.inv(np.eye(3) + dense)
    np.testing.assert_allclose(draws.mean(axis=0), y @ gain, atol=5 / np.sqrt(4000))
    np.testing.assert_allclose(np.cov(draws[:, 0].T), dense @ gain, atol=5 * np.sqrt(2 / 4000))


@pytest.mark.parametrize("sampler", [None, Euler(64, Geometric(1e-3, 30.0))])
def test_a_prior_and_a_sampler(sampler, rng):
    view = normal(rng, 1500)
    separator = Separator(Problem([Source("x", 3)], [view]), {"sampler": {"steps": 16}})
    separator.denoisers = {"x": Standard((3,))}
    if sampler is None:
        draws = separator.separate(view).draws["x"][0]
    else:
        observations = Observations(
            jnp.asarray(view.observations, jnp.float32), {"x": Reversed(3)}, IsotropicNoise(0.5)
        )
        key = jax.random.key(0)
        draws = sample_posterior(separator.denoisers, observations, key, sampler=sampler).x["x"][0]
    error = draws - view.truth["x"]
    # 4,500 squares; Euler's 64 steps are off by some percent of the standard deviation besides.
    assert np.mean(error**2) == pytest.approx(2 * 0.2, rel=4 * np.sqrt(2 / 4500) + 0.05)


def test_a_file_format(tmp_path, monkeypatch):
    def read(path, key):
        return Recorded(np.array([[float(x) for x in path.read_text().split()]]))

    monkeypatch.setitem(READERS, "numbers", read)
    (tmp_path / "a.numbers").write_text("1 2 3")
    np.testing.assert_array_equal(load_array("a.numbers", tmp_path), [[1, 2, 3]])
