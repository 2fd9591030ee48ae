"""Stationary components: the torus, M-steps against brute force and the truth, and the same in both kinds of EM."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import yaml
from scipy.linalg import toeplitz
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from dichroic import FitConfig, Problem, Separator, Source, View
from dichroic.cli.main import main
from dichroic.config import MixtureConfig
from dichroic.errors import ConfigError, FormatError
from dichroic.inference.low_rank_background import low_rank_log_evidence
from dichroic.inference.low_rank_sampling import low_rank_draws
from dichroic.io.model_files import load_denoiser, save_denoiser
from dichroic.learning.mixture.em import em_iteration, mean_log_evidence
from dichroic.learning.mixture.initialisation import split_components
from dichroic.learning.mixture.low_rank_em import (
    from_columns,
    low_rank_iteration,
    low_rank_statistics,
)
from dichroic.operators import Dense, Identity
from dichroic.operators.noise import DenseNoise
from dichroic.priors import GaussianMixture
from dichroic.priors.serialization import pack, unpack
from dichroic.priors.stationary import Torus, symmetric_power, torus_of
from dichroic.problem.identifiability.sample_size import scarcity
from dichroic.problem.observations import Observations

pytestmark = pytest.mark.usefixtures("x64")
GRIDS = [(1, (5,)), (2, (4,)), (1, (3, 4)), (3, (2, 3))]  # channels and positions
FREE = MixtureConfig(active_assignments=4096, steps=1, floor=1e-12)


def spectra(rng, torus, count=1):
    """Random ones of real fields: that of `k` components `(k, N, C, C)`."""
    n, c = int(np.prod(torus.size)), torus.channels
    root = rng.normal(size=(count, n, c, c)) + 1j * rng.normal(size=(count, n, c, c))
    half = root @ root.conj().swapaxes(-1, -2) + 0.1 * np.eye(c)
    back = np.ravel_multi_index(
        tuple(-np.indices(torus.size).reshape(len(torus.size), -1)), torus.size, mode="wrap"
    )
    return 0.5 * (half + half[:, back].conj())


def stationary(rng, torus, count, scale=1.0):
    cov = scale * torus.covariances(spectra(rng, torus, count))
    means = np.repeat(rng.normal(size=(count, torus.channels)), np.prod(torus.grid), axis=1)
    shape = (*([torus.channels] if torus.channels > 1 else []), *torus.grid)
    weights, axes = rng.dirichlet(np.full(count, 5.0)), len(torus.grid)
    return GaussianMixture.from_moments(weights, means, cov, shape=shape, stationary=axes)


def case(rng, *, n=60, missing=False):
    """A stationary source of 6 positions behind one of low rank, each seen through a dense operator."""
    torus = Torus(1, (6,))
    columns = rng.normal(size=(2, 4, 3))
    mixtures = {
        "sky": stationary(rng, torus, 3),
        "star": from_columns(np.array([0.4, 0.6]), columns, 0.1, (4,)),
    }
    operators = {"sky": Dense(rng.normal(size=(5, 6))), "star": Dense(rng.normal(size=(5, 4)))}
    root = rng.normal(size=(5, 5))
    noise = DenseNoise(0.1 * root @ root.T + 0.1 * np.eye(5))
    mask = np.array([1, 1, 0, 1, 1]) if missing else None
    y = rng.normal(size=(n, 5)) * 2
    return mixtures, View(y, operators, noise, mask=mask).prepare()


def by_hand(mixtures, obs):
    """The evidence, and `n`, `Σ r g`, `Σ r S`, `Σ r W` of the sky, tuple by tuple."""
    one = obs.one(0)
    seen = np.asarray(one.noise.observed(obs.size)) > 0
    a = {k: np.asarray(m)[seen] for k, m in one.system()[1].items()}
    noise = np.asarray(one.noise.as_matrix(obs.size))[np.ix_(seen, seen)]
    y = np.asarray(obs.y)[:, seen]
    sizes = [m.log_weights.size for m in mixtures.values()]
    scores, parts = [], []
    for which in itertools.product(*map(range, sizes)):
        m, c, w = np.zeros(seen.sum()), noise.copy(), 0.0
        for (k, x), j in zip(mixtures.items(), which, strict=True):
            m, w = m + a[k] @ np.asarray(x.means[j]), w + float(x.log_weights[j])
            c = c + a[k] @ np.asarray(x.covariances()[j]) @ a[k].T
        scores.append(w + np.atleast_1d(multivariate_normal(m, c).logpdf(y)))
        back = a["sky"].T @ np.linalg.inv(c)
        parts.append((which[0], (y - m) @ back.T, back @ a["sky"]))
    total = logsumexp(scores, axis=0)
    k, d = mixtures["sky"].means.shape
    n, g, s, w = np.zeros(k), np.zeros((k, d)), np.zeros((k, d, d)), np.zeros((k, d, d))
    for score, (j, u, info) in zip(scores, parts, strict=True):
        r = np.exp(score - total)
        n[j] += r.sum()
        g[j] += r @ u
        s[j] += (r * u.T) @ u
        w[j] += r.sum() * info
    missing = obs.count * np.sum(~seen)  # which count as 0, of variance 1
    return total.sum() - 0.5 * missing * np.log(2 * np.pi), (n, g, s, w)


@pytest.mark.parametrize(("channels", "grid"), GRIDS)
def test_covariances_and_spectra_are_each_others(channels, grid, rng):
    torus = Torus(channels, grid)
    s = spectra(rng, torus, 2)
    cov = torus.covariances(s)
    np.testing.assert_allclose(torus.spectrum(cov), s, atol=1e-12)
    assert np.linalg.eigvalsh(cov).min() > 0
    np.testing.assert_allclose(cov, cov.swapaxes(1, 2), atol=1e-12)


def test_the_covariance_of_a_series_is_toeplitz(rng):
    torus = Torus(1, (7,))
    (cov,) = torus.covariances(spectra(rng, torus))
    np.testing.assert_allclose(cov, toeplitz(cov[0]), atol=1e-12)


@pytest.mark.parametrize(("channels", "grid"), GRIDS)
def test_the_information_is_the_gradient(channels, grid, rng):
    torus = Torus(channels, grid)
    d = channels * int(np.prod(grid))
    q = rng.normal(size=(1, d, d))
    s = spectra(rng, torus)
    through = np.einsum("knij,knji->", torus.information(q + q.swapaxes(1, 2)), s)
    want = np.sum((q + q.swapaxes(1, 2)) * torus.covariances(s))
    assert through == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("missing", [False, True])
def test_evidence_and_sums_are_those_of_dense_formulas(missing, rng):
    mixtures, obs = case(rng, missing=missing)
    value, sums = by_hand(mixtures, obs)
    assert low_rank_log_evidence(mixtures, obs).sum() == pytest.approx(value, rel=1e-9)
    got, found = low_rank_statistics(mixtures, obs)
    assert got == pytest.approx(value, rel=1e-9)
    sky = found["sky"]
    for a, b in zip((sky.count, sky.force, sky.scatter, sky.information), sums, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7 * np.abs(b).max())


def test_sums_of_the_source_in_front_are_those_without_backgrounds(rng):
    mixtures, obs = case(rng)
    plain = {**mixtures, "sky": dataclasses.replace(mixtures["sky"], stationary=0)}
    _, behind = low_rank_statistics(mixtures, obs)
    _, latent = low_rank_statistics(plain, obs)
    sums = [dataclasses.replace(s["star"], bound=np.zeros(())) for s in (behind, latent)]
    for a, b in zip(*map(jax.tree.leaves, sums), strict=True):  # only the bound is of the noise
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def test_observations_one_by_one_have_the_same_sums(rng):
    mixtures, obs = case(rng, n=3)
    masked = View(
        np.asarray(obs.y), dict(obs.operators), obs.noise, mask=np.ones((3, 5), bool)
    ).prepare()
    value, found = low_rank_statistics(mixtures, obs)
    other, each = low_rank_statistics(mixtures, masked)
    assert other == pytest.approx(value, rel=1e-7)
    np.testing.assert_allclose(each["sky"].scatter, found["sky"].scatter, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(each["star"].inner, found["star"].inner, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("standard", [False, True])
def test_both_kinds_of_em_take_the_same_step(standard, rng, monkeypatch):
    mixtures, obs = case(rng)
    dense = {k: dataclasses.replace(m) for k, m in mixtures.items()}
    full = np.asarray(mixtures["star"].covariances())
    weights, means = np.exp(mixtures["star"].log_weights), np.asarray(mixtures["star"].means)
    dense["star"] = GaussianMixture.from_moments(weights, means, full)
    if standard:
        for module in ("em", "low_rank_em"):
            monkeypatch.setattr(f"dichroic.learning.mixture.{module}.monotone_em", _standard_only)
    one, a = em_iteration(dense, [obs], ["sky"], FREE)
    two, b = low_rank_iteration(mixtures, [obs], ["sky"], FREE)
    assert a == pytest.approx(b, rel=1e-7)
    for name in ("log_weights", "means"):
        got, want = np.asarray(getattr(one["sky"], name)), np.asarray(getattr(two["sky"], name))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        one["sky"].covariances(), two["sky"].covariances(), rtol=1e-5, atol=1e-6
    )


def _standard_only(mixtures, evaluate, update, *, steps, **_):
    for _ in range(steps):
        value, found = evaluate(mixtures)
        mixtures = update(mixtures, found, True)
    return mixtures, value


@pytest.mark.parametrize("standard", [False, True])
def test_steps_raise_the_evidence_and_stay_stationary(standard, rng, monkeypatch):
    mixtures, obs = case(rng, n=200)
    if standard:
        monkeypatch.setattr("dichroic.learning.mixture.low_rank_em.monotone_em", _standard_only)
    before = -np.inf
    for _ in range(12):
        mixtures, value = low_rank_iteration(mixtures, [obs], ["sky", "star"], FREE)
        assert value >= before - 1e-8 * abs(before)
        before = value
    sky = mixtures["sky"]
    torus, cov = torus_of(sky), np.asarray(sky.covariances())
    np.testing.assert_allclose(torus.covariances(torus.spectrum(cov)), cov, atol=1e-5)
    assert np.ptp(np.asarray(sky.means), axis=1) == pytest.approx(0, abs=1e-6)
    assert torus.spectrum(cov).real.min() > -1e-6


@pytest.mark.parametrize("size", [24, 160], ids=["dense", "low rank"])
def test_a_series_is_learned_as_well_as_its_few_numbers_allow(size):
    """`KL(truth ‖ found)` is half the number of parameters over that of observations: 2 L − 1 lags of L, a mean."""
    rng, n = np.random.default_rng(3), 600
    truth = toeplitz(0.8 ** np.arange(size)) + 0.1 * np.eye(size)
    y = 0.5 + rng.normal(size=(n, size)) @ np.linalg.cholesky(truth).T
    y += 0.1 * rng.normal(size=y.shape)
    obs = Observations(y, {"x": Identity(size)}, DenseNoise(0.01 * np.eye(size)))
    start = GaussianMixture.from_moments(
        [1.0], np.zeros((1, size)), np.eye(size)[None], stationary=1
    )
    config = dataclasses.replace(FREE, steps=40)
    found, _ = em_iteration({"x": start}, [obs], ["x"], config)
    excess = symmetric_power(np.asarray(found["x"].covariances()[0]) + 0.01 * np.eye(size), -1)
    ratio = excess @ (truth + 0.01 * np.eye(size))
    shift = np.asarray(found["x"].means[0]) - 0.5
    kl = 0.5 * (np.trace(ratio) - size - np.linalg.slogdet(ratio)[1] + shift @ excess @ shift)
    free = 0.5 * size * (size + 1) / 2 / n  # of a covariance with D (D + 1) / 2 entries
    assert kl < 0.5 * 2 * size / n * 1.5
    assert kl < free / 4


def test_halves_of_a_component_differ_in_variance(rng):
    whole = stationary(rng, Torus(1, (5,)), 3)
    parts = split_components(whole, 4)
    assert parts.stationary == 1 and parts.log_weights.size == 4
    for a, b in ((whole, parts),):
        total = [np.einsum("k,kij->ij", np.exp(m.log_weights), m.covariances()) for m in (a, b)]
        np.testing.assert_allclose(*total, rtol=1e-6)
    torus, cov = torus_of(parts), np.asarray(parts.covariances())
    np.testing.assert_allclose(torus.covariances(torus.spectrum(cov)), cov, atol=1e-6)


def test_draws_with_a_stationary_prior_of_many_numbers_are_from_the_posterior():
    rng, size, n = np.random.default_rng(0), 140, 400
    cov = toeplitz(0.9 ** np.arange(size))
    prior = GaussianMixture.from_moments([1.0], np.zeros((1, size)), cov[None], stationary=1)
    x = rng.normal(size=(n, size)) @ np.linalg.cholesky(cov).T
    y = x + 0.5 * rng.normal(size=x.shape)
    obs = Observations(y, {"x": Identity(size)}, DenseNoise(0.25 * np.eye(size)))
    drawn = low_rank_draws({"x": prior}, obs, jax.random.key(0)).x["x"][0]
    gain = cov @ np.linalg.inv(cov + 0.25 * np.eye(size))
    left = cov - gain @ cov
    z = np.linalg.solve(np.linalg.cholesky(left), (drawn - y @ gain.T).T)
    assert np.mean(z**2) == pytest.approx(1, abs=4 * np.sqrt(2 / z.size))


def problem(rng, shape=(6, 6), n=300):
    size = int(np.prod(shape))
    torus = Torus(1, shape)
    root = np.linalg.cholesky(torus.covariances(spectra(rng, torus))[0])
    x = (rng.normal(size=(n, size)) @ root.T).reshape(n, *shape)
    view = View(x + 0.1 * rng.normal(size=x.shape), {"sky": Identity(shape)}, 0.1, name="v")
    return Problem([Source("sky", shape)], [view])


SMALL = {"mixture.components": 2, "mixture.gaussian_iterations": 2, "mixture.iterations": 1}
SMALL |= {"mixture.final_iterations": 1, "diffusion.iterations": 0}


def test_a_fit_is_better_on_new_observations_with_what_is_known(rng, tmp_path):
    of = problem(rng)
    score = {}
    for told in ((), ("sky",)):
        config = FitConfig().replace({**SMALL, "mixture.stationary": told})
        fitted = Separator(of, config).fit()
        score[told] = max(m.get("heldout_log_evidence", -np.inf) for m in fitted.metrics)
    assert fitted.denoisers["sky"].stationary == 2
    assert score["sky",] > score[()] + 1
    save_denoiser(tmp_path / "sky.safetensors", fitted.denoisers["sky"])
    assert load_denoiser(tmp_path / "sky.safetensors").stationary == 2


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((6, 6), {"mixture.stationary": ["skye"]}, "no source 'skye'"),
        (
            (2, 3, 4),
            {"mixture.stationary": ["sky"], "diffusion.spatial_axes": 1},
            "along its last 1",
        ),
        ((65, 65), {"mixture.stationary": ["sky"]}, "4,225 entries"),
    ],
)
def test_sources_that_cannot_be_stationary_are_refused(shape, settings, message, rng):
    y = rng.normal(size=(12, *shape))
    view = View(y, {"sky": Identity(shape)}, 0.1, name="v")
    of = Problem([Source("sky", shape)], [view])
    with pytest.raises(ConfigError, match=message):
        Separator(of, FitConfig().replace({**SMALL, **settings})).fit()


def test_the_evidence_of_held_out_observations_is_the_same_in_both_kinds_of_em(rng):
    mixtures, obs = case(rng)
    star = mixtures["star"]
    full = GaussianMixture.from_moments(np.exp(star.log_weights), star.means, star.covariances())
    dense = mean_log_evidence({**mixtures, "star": full}, [obs])
    assert dense == pytest.approx(low_rank_log_evidence(mixtures, obs).mean(), rel=1e-7)


def test_few_observations_are_enough_of_a_stationary_source(rng):
    of = problem(rng, n=40)
    assert "say that it is stationary" in scarcity(of)[0]
    assert scarcity(of, ["sky"]) == ()
    assert "fewer than 10" in scarcity(problem(rng, n=9), ["sky"])[0]


def test_a_stationary_source_of_low_rank_is_no_model(rng):
    arrays, meta = pack(stationary(rng, Torus(1, (4,)), 2))
    assert unpack(arrays, meta).stationary == 1
    for change in ({"basis": arrays["basis"][:, :, 1:], "variances": arrays["variances"][:, 1:]},):
        with pytest.raises(FormatError, match="stationary"):
            unpack(arrays | change, meta)
    with pytest.raises(FormatError, match="stationary along 2"):
        unpack(arrays, meta | {"stationary": 2})


def test_the_command_line_takes_sources_that_are_stationary(rng, tmp_path, capsys):
    of = problem(rng, n=60)
    np.save(tmp_path / "y.npy", np.asarray(of.views[0].observations))
    view = {"observations": "y.npy", "operators": {"sky": "identity"}, "noise": 0.1}
    fit = {
        "mixture": {
            "components": 2,
            "gaussian_iterations": 2,
            "iterations": 1,
            "final_iterations": 1,
        }
    }
    stated = {
        "sources": {"sky": [6, 6]},
        "views": {"v": view},
        "fit": fit | {"diffusion": {"iterations": 0}},
    }
    path = tmp_path / "problem.yaml"
    path.write_text(yaml.safe_dump(stated))
    options = ["--out", str(tmp_path / "run"), "--no-report", "--mixture.stationary", "sky"]
    assert main(["fit", str(path), *options]) == 0
    assert Separator.load(tmp_path / "run").denoisers["sky"].stationary == 2
    stated["fit"]["mixture"]["stationary"] = ["dust"]
    path.write_text(yaml.safe_dump(stated))
    capsys.readouterr()
    assert main(["check", str(path)]) != 0
    assert "there is no source 'dust'" in capsys.readouterr().err
