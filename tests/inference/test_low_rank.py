"""Mixtures of probabilistic PCA: against dense formulas, and fits with known answers."""

import dataclasses
import time
from functools import partial, reduce
from threading import get_ident

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import toeplitz
from scipy.stats import multivariate_normal
from threadpoolctl import threadpool_limits

from dichroic.config import MixtureConfig
from dichroic.errors import DataError
from dichroic.inference.low_rank import LowRankView, moments
from dichroic.inference.low_rank_background import every_assignment, low_rank_log_evidence
from dichroic.inference.low_rank_masked import DiagonalObservations
from dichroic.inference.low_rank_sampling import low_rank_draws
from dichroic.inference.matrix_free import SharedObservations
from dichroic.inference.samplers import AncestralSampler
from dichroic.learning.mixture.low_rank_em import (
    from_columns,
    low_rank_iteration,
    low_rank_statistics,
    maximise_low_rank,
)
from dichroic.learning.mixture.low_rank_initialisation import initial_low_rank, largest_eigenpairs
from dichroic.learning.mixture.statistics import merged
from dichroic.numerics.batching import take
from dichroic.operators import Dense, Diagonal, Identity, Scale
from dichroic.operators.noise import DenseNoise, DiagonalNoise
from dichroic.priors import GaussianMixture
from dichroic.problem.observations import Observations, groups
from dichroic.problem.problem import joint_observations
from dichroic.problem.view import View
from dichroic.runtime.hardware import in_threads

SIZES = {"a": (3, 5, 2), "b": (2, 4, 3)}  # components, numbers, rank


def ppca(seed, k, d, r, floor=0.1):
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(k, d, 1 + r))
    return from_columns(rng.uniform(0.5, 1, size=k), columns, floor, (d,))


def case(kind, n=6, seed=0):
    """Two sources of a view, and its observations: with dense or with diagonal operators and noise."""
    rng = np.random.default_rng(seed)
    if kind == "dense":
        mixtures = {k: ppca(i, *s) for i, (k, s) in enumerate(SIZES.items())}
        operators = {k: Dense(rng.normal(size=(6, s[1]))) for k, s in SIZES.items()}
        root = rng.normal(size=(6, 6))
        noise = DenseNoise(0.1 * root @ root.T + 0.1 * np.eye(6))
    else:
        mixtures = {k: ppca(i, s[0], 6, s[2]) for i, (k, s) in enumerate(SIZES.items())}
        operators = {
            "a": Identity(6),
            "b": Scale(6, 0.5) @ Diagonal(rng.uniform(0.5, 2, size=6)),
        }
        noise = DiagonalNoise(rng.uniform(0.1, 0.3, size=6))
    mask = np.array([1, 1, 0, 1, 1, 1]) if kind == "masked" else None
    return mixtures, View(rng.normal(size=(n, 6)), operators, noise, mask=mask).prepare()


KINDS = ["dense", "diagonal", "masked"]


def behind(kind, names, n=6):
    """The same with the sources `names` stationary, and seen as dense covariances (`dichroic.inference.low_rank_background`)."""
    mixtures, obs = case(kind, n)
    for name in names:
        k, d = mixtures[name].means.shape
        rng = np.random.default_rng(k)
        covs = [toeplitz((0.5 + 0.2 * j) ** np.arange(d)) for j in range(k)]
        means = np.repeat(rng.normal(size=(k, 1)), d, axis=1)
        mixtures[name] = GaussianMixture.from_moments(
            rng.uniform(0.5, 1, k), means, covs, stationary=1
        )
    return mixtures, obs


def systems(mixtures, obs):
    """For each tuple: the log weight, and mean and covariance of `(x_a, x_b, z_a, z_b, y)`, in float64."""
    y, a, noise = obs.one(0).system()
    a = {k: np.asarray(m, float) for k, m in a.items()}
    columns = {k: moments(mixtures[k]) for k in obs.sources}
    for i in range(columns["a"][0].shape[0]):
        for j in range(columns["b"][0].shape[0]):
            pick = {"a": i, "b": j}
            mean, blocks, latent = [], [], []
            for k in obs.sources:
                c, floor = columns[k]
                u = c[pick[k], :, 1:]
                mean.append(c[pick[k], :, 0])
                blocks.append(u @ u.T + floor * np.eye(len(u)))
                latent.append(u)
            d, r = [len(b) for b in blocks], [u.shape[1] for u in latent]
            cov_x = np.zeros((sum(d), sum(d)))
            cov_xz = np.zeros((sum(d), sum(r)))
            cov_x[: d[0], : d[0]], cov_x[d[0] :, d[0] :] = blocks
            cov_xz[: d[0], : r[0]], cov_xz[d[0] :, r[0] :] = latent
            both = np.concatenate([a[k] for k in obs.sources], axis=1)
            joint = np.block([[cov_x, cov_xz], [cov_xz.T, np.eye(sum(r))]])
            with_y = np.concatenate([cov_x @ both.T, cov_xz.T @ both.T])
            cov_y = both @ cov_x @ both.T + np.asarray(noise, float)
            weight = sum(float(mixtures[k].log_weights[pick[k]]) for k in obs.sources)
            prior = np.concatenate([*mean, np.zeros(sum(r))])
            yield (i, j), weight, prior, joint, with_y, both @ np.concatenate(mean), cov_y


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_and_responsibilities_are_those_of_dense_gaussians(kind):
    mixtures, obs = case(kind)
    view = LowRankView(mixtures, SharedObservations(obs))
    y = np.concatenate([y for _, y in view.chunks()])
    scores = [
        weight + multivariate_normal.logpdf(y, mean, cov)
        for _, weight, _, _, _, mean, cov in systems(mixtures, obs)
    ]
    np.testing.assert_allclose(view.given(y).scores, np.stack(scores, axis=1), rtol=1e-6, atol=1e-5)
    total = np.logaddexp.reduce(scores, axis=0)
    assert low_rank_log_evidence(mixtures, obs).sum() == pytest.approx(total.sum(), rel=1e-6)


@pytest.mark.parametrize("names", ["", "a", "b", "ab"])
def test_sums_over_the_likely_assignments_are_those_over_all(names):
    mixtures, obs = behind("diagonal", names, n=40)
    apart = lambda m: np.asarray(m.means) + 20 * np.arange(len(m.means))[:, None]
    mixtures = {k: dataclasses.replace(m, means=apart(m)) for k, m in mixtures.items()}
    y = np.asarray(obs.y) + 20 * np.arange(40)[:, None] % 60
    obs = dataclasses.replace(obs, y=jnp.asarray(y))
    assert every_assignment(mixtures, obs, 6 * 40 - 1) is None
    near = every_assignment(mixtures, obs, 6 * 40)
    assert near is not None and near.all()
    value, sums = low_rank_statistics(mixtures, obs, "ab", near)
    assert near.any(axis=(0, 1)).all() and not near.all()
    again, of_likely = low_rank_statistics(mixtures, obs, "ab", near)
    assert again == pytest.approx(value, rel=1e-12)
    for a, b in zip(jax.tree.leaves(of_likely), jax.tree.leaves(sums), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8 * np.max(np.abs(b)))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_conditioned_gaussians(kind):
    mixtures, obs = case(kind)
    value, sums = low_rank_statistics(mixtures, obs)
    y = np.concatenate([y for _, y in LowRankView(mixtures, SharedObservations(obs)).chunks()])
    assert value == pytest.approx(low_rank_log_evidence(mixtures, obs).sum(), rel=1e-9)
    parts = list(systems(mixtures, obs))
    scores = [w + multivariate_normal.logpdf(y, m, c) for _, w, _, _, _, m, c in parts]
    r = np.exp(np.stack(scores) - np.logaddexp.reduce(scores, axis=0))
    dims, ranks = [mixtures[k].dim for k in "ab"], [mixtures[k].variances.shape[1] for k in "ab"]
    for s, name in enumerate("ab"):
        x = slice(sum(dims[:s]), sum(dims[: s + 1]))
        z = slice(sum(dims) + sum(ranks[:s]), sum(dims) + sum(ranks[: s + 1]))
        inner, cross = np.zeros_like(sums[name].inner), np.zeros_like(sums[name].force)
        square = scatter = information = 0.0
        a = np.asarray(obs.one(0).system()[1][name], float)
        for t, (pick, _, prior, joint, with_y, mean, cov) in enumerate(parts):
            gain = with_y @ np.linalg.inv(cov)
            post = prior + (y - mean) @ gain.T
            left = joint - gain @ with_y.T
            for row, w in zip(post, r[t], strict=True):
                zz = np.outer(row[z], row[z]) + left[z, z]
                ones = np.concatenate([[1], row[z]])
                inner[pick[s]] += w * np.block([[1, row[None, z]], [row[z, None], zz]])
                cross[pick[s]] += w * np.outer(row[x], ones)
                cross[pick[s], :, 1:] += w * left[x, z]
                square += w * (row[x] @ row[x] + np.trace(left[x, x]))
            v = (y - mean) @ np.linalg.inv(cov) @ a
            scatter += r[t] @ np.sum(v**2, axis=1)
            information += r[t].sum() * np.trace(a.T @ np.linalg.inv(cov) @ a)
        told = sums[name].scatter, sums[name].information
        assert told == pytest.approx((scatter, information), rel=1e-4)
        np.testing.assert_allclose(sums[name].inner, inner, rtol=1e-5, atol=1e-5)
        columns, floor = moments(mixtures[name])
        found = columns @ sums[name].inner + floor * sums[name].force  # Σ r E[x z̄ᵀ]
        np.testing.assert_allclose(found, cross, rtol=1e-5, atol=1e-5)
        assert sums[name].square == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize("sampler", [None, AncestralSampler(3)], ids=["exact", "ancestral"])
@pytest.mark.parametrize(
    ("kind", "stationary"),
    [*((kind, "") for kind in KINDS), ("dense", "a"), ("masked", "b"), ("diagonal", "ab")],
)
def test_draws_have_the_moments_of_the_posterior(kind, stationary, sampler):
    """Of each observation: mean and second moments of both sources jointly, over 4,000 draws."""
    mixtures, obs = behind(kind, stationary, n=3)
    n_draws = 4000
    often = take(obs, np.tile(np.arange(3), n_draws))
    found = low_rank_draws(mixtures, often, jax.random.key(0), sampler=sampler).x
    x = np.concatenate([found["a"][0], found["b"][0]], axis=1).astype(float)
    x = x.reshape(n_draws, 3, -1)
    y = np.concatenate([y for _, y in LowRankView(mixtures, SharedObservations(obs)).chunks()])
    parts = list(systems(mixtures, obs))
    scores = np.stack([w + multivariate_normal.logpdf(y, m, c) for _, w, _, _, _, m, c in parts])
    r = np.exp(scores - np.logaddexp.reduce(scores, axis=0))
    d = x.shape[2]
    for i in range(3):
        mean, square = np.zeros(d), np.zeros((d, d))
        for t, (_, _, prior, joint, with_y, m, cov) in enumerate(parts):
            gain = with_y @ np.linalg.inv(cov)
            post, left = (prior + gain @ (y[i] - m))[:d], (joint - gain @ with_y.T)[:d, :d]
            mean, square = mean + r[t, i] * post, square + r[t, i] * (np.outer(post, post) + left)
        outer = x[:, i, :, None] * x[:, i, None, :]
        error = 5 / np.sqrt(n_draws)
        np.testing.assert_array_less(
            np.abs(x[:, i].mean(axis=0) - mean), error * x[:, i].std(axis=0)
        )
        np.testing.assert_array_less(np.abs(outer.mean(axis=0) - square), error * outer.std(axis=0))


def own_operators(n=5, seed=0, *, shared=False):
    """Observations that differ in operators (if not `shared`), noise and what is missing; each as a view of its own."""
    rng = np.random.default_rng(seed)
    mixtures = {k: ppca(i, s[0], 6, s[2]) for i, (k, s) in enumerate(SIZES.items())}
    dense, gains = rng.normal(size=(n, 6, 6)), rng.uniform(0.5, 2, size=(n, 6))
    std, mask = rng.uniform(0.1, 0.3, size=(n, 6)), rng.uniform(size=(n, 6)) < 0.8
    y = rng.normal(size=(n, 6))
    view = lambda i, a, g: View(
        y[i], {"a": Dense(a), "b": Diagonal(g, shape=6)}, DiagonalNoise(std[i] ** 2), mask=mask[i]
    ).prepare()
    if shared:
        dense, gains = (
            np.broadcast_to(dense[0], dense.shape),
            np.broadcast_to(gains[0], gains.shape),
        )
    alone = [view(slice(i, i + 1), dense[i], gains[i]) for i in range(n)]
    of_all = (dense[0], gains[0]) if shared else (dense, gains)
    return mixtures, view(slice(None), *of_all), alone


@pytest.mark.parametrize("shared", [False, True])
def test_observations_with_operators_or_masks_of_their_own_add_up(shared):
    mixtures, obs, alone = own_operators(shared=shared)
    value, sums = low_rank_statistics(mixtures, obs)
    parts = [low_rank_statistics(mixtures, one) for one in alone]
    assert value == pytest.approx(sum(v for v, _ in parts), rel=1e-9)
    assert low_rank_log_evidence(mixtures, obs).sum() == pytest.approx(value, rel=1e-9)
    added = reduce(merged, (p for _, p in parts))
    for name, found in sums.items():
        expect = added[name]
        for field in ("inner", "force", "bound", "square", "scatter", "information", "count"):
            np.testing.assert_allclose(getattr(found, field), getattr(expect, field), rtol=1e-6)


@pytest.mark.parametrize("sampler", [None, AncestralSampler(3)], ids=["exact", "ancestral"])
def test_draws_of_observations_with_operators_of_their_own_are_as_of_each_alone(sampler):
    mixtures, obs, alone = own_operators()
    backwards = {
        k: obs.operators[k] for k in "ba"
    }  # the order of sources is not that of the alphabet
    obs = Observations(obs.y, backwards, obs.noise)
    alone = [Observations(o.y, {k: o.operators[k] for k in "ba"}, o.noise) for o in alone]
    key, options = jax.random.key(2), {"sampler": sampler, "n_draws": 3}
    whole = low_rank_draws(mixtures, obs, key, **options).x
    for i, one in enumerate(alone):
        part = low_rank_draws(mixtures, one, key, first_index=i, **options).x
        for k, x in part.items():
            np.testing.assert_allclose(whole[k][:, i : i + 1], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [None, AncestralSampler(3)], ids=["exact", "ancestral"])
def test_draws_are_the_same_bits_for_any_number_of_threads(sampler):
    """Of products large enough for several threads to share one."""
    mixtures = {k: ppca(i, 4, 300, 40) for i, k in enumerate("ab")}
    operators = {"a": Identity(300), "b": Scale(300, 0.5)}
    obs = View(np.random.default_rng(3).normal(size=(150, 300)), operators, 0.1).prepare()
    found = []
    for threads in (1, 3):
        with threadpool_limits(threads, user_api="blas"):
            with in_threads() as each:
                used = set(each(lambda _: (time.sleep(0.05), get_ident())[1], range(6)))
            assert len(used) == threads
            found.append(low_rank_draws(mixtures, obs, jax.random.key(1), sampler=sampler).x)
    for k, x in found[0].items():
        np.testing.assert_array_equal(x, found[1][k])


def test_observations_with_the_same_operators_and_masks_are_taken_together():
    rng = np.random.default_rng(8)
    kinds = np.array([0, 1, 0, 2, 1, 0, 0, 2])
    gains, masks = np.array([0.5, 1, 2])[kinds], rng.uniform(size=(3, 6))[kinds] < 0.7
    mixtures, alike = case("diagonal", n=8)
    operators = {"a": Scale(6, gains), "b": alike.operators["b"]}
    obs = View(np.asarray(alike.y), operators, 0.3, mask=masks).prepare()
    found = list(groups(obs))
    assert sorted(i.tolist() for i, _ in found) == [[0, 2, 5, 6], [1, 4], [3, 7]]
    for index, some in found:
        np.testing.assert_array_equal(some.y, np.asarray(obs.y)[index])
        assert np.ptp(np.asarray(some.operators["a"].factor)) == 0
    value, sums = low_rank_statistics(mixtures, obs)
    parts = [low_rank_statistics(mixtures, obs_i) for _, obs_i in each(obs)]
    assert value == pytest.approx(sum(v for v, _ in parts), rel=1e-9)
    added = reduce(merged, (p for _, p in parts))
    for name, mine in sums.items():
        expect = added[name]
        for field in ("inner", "force", "bound", "square", "scatter", "information", "count"):
            np.testing.assert_allclose(getattr(mine, field), getattr(expect, field), rtol=1e-6)


def each(obs):
    """Every observation by itself, as one that is alone."""
    for i in range(obs.count):
        one = obs.one(i)
        yield i, Observations(np.asarray(one.y)[None], one.operators, one.noise)


@pytest.mark.parametrize("rank", [3, 12])
def test_the_largest_eigenvalues_of_an_indefinite_matrix(rank):
    rng = np.random.default_rng(9)
    q, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    values = np.concatenate([2.0 ** -np.arange(20), -np.linspace(0, 1, 180)])
    matrix = (q * values) @ q.T
    found, vectors = largest_eigenpairs(lambda v: matrix @ v, 200, rank)
    np.testing.assert_allclose(found[:3], values[:3], rtol=0.02)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=1e-10)
    assert np.all(found <= values[:rank] + 1e-10)  # Rayleigh quotients
    small = q[:30, :30] + q[:30, :30].T  # a space that is the whole
    found, vectors = largest_eigenpairs(lambda v: small @ v, 30, rank)
    np.testing.assert_allclose(small @ vectors, vectors * found, atol=1e-10)


def test_a_start_from_masked_observations_has_the_moments_of_the_source():
    """Half of the entries are missing at random: means and covariance are those of what is left, scaled."""
    rng = np.random.default_rng(6)
    d, n = 12, 6000
    axis = np.sin(np.arange(d))
    x = 2 + rng.normal(size=(n, 1)) * axis + 0.1 * rng.normal(size=(n, d))
    mask = rng.uniform(size=(n, d)) < 0.5
    y = x + 0.1 * rng.normal(size=x.shape)
    obs = View(y, {"a": Identity(d)}, 0.1, mask=mask).prepare()
    start = initial_low_rank("a", [obs], 2, 1.0, {}, 1)
    assert np.isfinite(np.asarray(start.variances)).all()
    np.testing.assert_allclose(start.means[0], 2, rtol=0.15)
    found, _ = low_rank_iteration(
        {"a": start}, [take(obs, slice(0, 100))], ["a"], MixtureConfig(steps=8)
    )
    basis, variances = np.asarray(found["a"].basis[0]), np.asarray(found["a"].variances[0])
    top = basis[:, np.argmax(variances)]
    assert abs(top @ axis) / np.linalg.norm(axis) > 0.95
    assert variances.max() == pytest.approx(axis @ axis, rel=4 * np.sqrt(2 / 100))


def test_draws_depend_on_the_number_of_the_observation_and_the_draw_only():
    mixtures, obs = case("diagonal", n=5)
    whole = low_rank_draws(mixtures, obs, jax.random.key(1), n_draws=2).x["b"]
    part = low_rank_draws(mixtures, take(obs, slice(2, 5)), jax.random.key(1), first_index=2).x["b"]
    np.testing.assert_allclose(whole[:1, 2:], part, rtol=1e-5)
    assert np.abs(whole[0] - whole[1]).min() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_no_textbook_step_lowers_the_evidence(kind):
    mixtures, obs = case(kind, n=200)
    values = []
    for _ in range(12):
        value, sums = low_rank_statistics(mixtures, obs)
        values.append(value / 200)
        step = partial(maximise_low_rank, least=1e-8, standard=True)
        mixtures = {k: step(mixtures[k], sums[k]) for k in mixtures}
    assert np.diff(values).min() > -1e-6
    assert values[-1] > values[0] + 1


def test_a_floor_that_should_be_zero_falls_faster_than_in_the_textbook():
    rng = np.random.default_rng(5)
    y = rng.normal(size=(2000, 2)) @ rng.normal(size=(2, 20)) + 0.1 * rng.normal(size=(2000, 20))
    obs = View(y, {"a": Identity(20)}, 0.1).prepare()
    start = {"a": initial_low_rank("a", [obs], 2, 1.0, {}, 1)}
    start = {"a": GaussianMixture(**{**start["a"].__dict__, "floor": np.full(1, 0.1)})}
    ours, _ = low_rank_iteration(start, [obs], ["a"], MixtureConfig(steps=30))
    book = start
    for _ in range(30):
        _, sums = low_rank_statistics(book, obs)
        book = {"a": maximise_low_rank(book["a"], sums["a"], least=1e-8, standard=True)}
    assert float(ours["a"].floor[0]) < 0.3 * float(book["a"].floor[0])
    assert low_rank_log_evidence(ours, obs).sum() > low_rank_log_evidence(book, obs).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_information_of_a_source_is_bounded_by_a_diagonal_matrix(kind):
    mixtures, obs = case(kind)
    view = LowRankView(mixtures, SharedObservations(obs))
    _, matrices, noise = obs.one(0).system()
    a = {k: np.asarray(m, float) for k, m in matrices.items()}
    floors = {k: moments(mixtures[k])[1] for k in a}
    base = np.asarray(noise, float) + sum(floors[k] * a[k] @ a[k].T for k in a)
    for name in a:
        information = a[name].T @ np.linalg.inv(base) @ a[name]
        bound = view.information_bound(name)
        scale = np.linalg.norm(information, 2)
        assert np.linalg.eigvalsh(np.diag(bound) - information).min() > -1e-5 * scale
        if kind != "dense":
            np.testing.assert_allclose(np.diag(bound), information, atol=1e-5 * scale)


def gappy(seed, n=140, size=60, noise=1.0):
    """Observations of two directions about a level of 100; every seventh misses a stretch. And the truth."""
    rng = np.random.default_rng(seed)
    factors = 3 * rng.normal(size=(size, 2))
    y = 100 + rng.normal(size=(n, 2)) @ factors.T + noise * rng.normal(size=(n, size))
    mask = np.ones((n, size))
    mask[::7, 10:25] = 0
    return View(np.where(mask > 0, y, 7e4), {"a": Identity(size)}, noise, mask=mask), y, factors


def test_gaps_are_not_taken_for_zeros_by_the_first_moments():
    view, y, factors = gappy(0)
    start = initial_low_rank("a", [view.prepare()], 4, 1.0, {}, 1)
    np.testing.assert_allclose(start.means[0], y.mean(axis=0), atol=6 * 3 * np.sqrt(2 / 120))
    found = np.sum(start.basis[0] ** 2 * start.variances[0], axis=1) + start.floor[0]
    expect = np.sum(factors**2, axis=1)
    spread = np.sqrt(2 / 120) * (expect + 1)
    assert np.all(np.abs(found - expect) < 6 * spread + 1)


def test_loadings_where_entries_are_missing_are_mended_though_the_floor_is_far_below_the_noise():
    """With the source as missing data they move by a part floor / (floor + noise): not at all."""
    view, y, factors = gappy(1)
    obs, rng = view.prepare(), np.random.default_rng(2)
    columns = np.zeros((1, 60, 4))
    columns[0, :, 0] = y.mean(axis=0)
    columns[0, :, 1:3] = factors + 0.1 * rng.normal(size=factors.shape)
    columns[0, 10:25, 0] -= 30
    columns[0, 10:25, 3] = 40  # as if gaps were zeros
    wrong = {"a": from_columns(np.ones(1), columns, 1e-4, (60,))}
    found, _ = low_rank_iteration(wrong, [obs], ["a"], MixtureConfig(steps=60))
    mixture = found["a"]
    seen = np.delete(np.arange(140), np.s_[::7])
    np.testing.assert_allclose(mixture.means[0][10:25], y[seen, 10:25].mean(axis=0), atol=1.0)
    variance = np.sum(mixture.basis[0] ** 2 * mixture.variances[0], axis=1)
    expect = np.sum(factors**2, axis=1)
    assert np.all(np.abs(variance - expect)[10:25] < 6 * np.sqrt(2 / 120) * (expect + 1)[10:25])


def test_one_component_without_noise_is_pca():
    """The maximum of the likelihood is known: leading eigenvectors, and the mean of other eigenvalues."""
    rng = np.random.default_rng(3)
    n, d, r, noise = 4000, 8, 2, 0.05
    x = (
        rng.normal(size=(n, r)) @ (rng.normal(size=(r, d)) * [[2], [1]])
        + 0.3 * rng.normal(size=(n, d))
        + 1
    )
    y = x + noise * rng.normal(size=x.shape)
    obs = View(y, {"a": Identity(d)}, noise).prepare()
    mixture = {"a": initial_low_rank("a", [obs], r, 1.0, {}, 1)}
    mixture, _ = low_rank_iteration(mixture, [obs], ["a"], MixtureConfig(steps=60))
    values, vectors = np.linalg.eigh(np.cov(y.T, bias=True))
    found = mixture["a"]
    floor = values[:-r].mean() - noise**2
    assert float(found.floor[0]) == pytest.approx(floor, rel=1e-2)
    np.testing.assert_allclose(found.means[0], y.mean(axis=0), atol=1e-3)
    expect = (vectors[:, -r:] * (values[-r:] - floor - noise**2)) @ vectors[:, -r:].T
    outer = (found.basis[0] * found.variances[0]) @ found.basis[0].T
    np.testing.assert_allclose(outer, expect, atol=2e-2 * values[-1])


def test_two_sources_in_two_views_are_told_apart():
    rng = np.random.default_rng(4)
    truth = {"a": ppca(10, 2, 30, 2, 0.01), "b": ppca(11, 2, 30, 2, 0.01)}

    def draw(m, n):
        columns, floor = moments(m)
        k = rng.integers(2, size=n)
        z = np.concatenate([np.ones((n, 1)), rng.normal(size=(n, columns.shape[2] - 1))], axis=1)
        return np.einsum("nij,nj->ni", columns[k], z) + np.sqrt(floor) * rng.normal(size=(n, 30))

    noise = lambda: 0.1 * rng.normal(size=(1500, 30))
    alone = View(draw(truth["a"], 1500) + noise(), {"a": Identity(30)}, 0.1).prepare()
    operators = {"a": Identity(30), "b": Scale(30, 0.5)}
    both = draw(truth["a"], 1500) + 0.5 * draw(truth["b"], 1500) + noise()
    mixed = View(both, operators, 0.1).prepare()
    best = low_rank_log_evidence(truth, mixed).mean()
    config = MixtureConfig(steps=40)
    start = {k: ppca(20 + i, 2, 30, 2, 1.0) for i, k in enumerate("ab")}
    found, _ = low_rank_iteration({"a": start["a"]}, [alone], ["a"], config)
    found, _ = low_rank_iteration({**found, "b": start["b"]}, [mixed], ["b"], config)
    value = low_rank_log_evidence(found, mixed).mean()
    # Two components of 30 × 3 entries each for two sources, and the floors: about half a nat each of n.
    assert abs(value - best) < 4 * 30 * 3 / 1500


def test_a_component_without_observations_stays():
    mixtures, obs = case("diagonal", n=50)
    far = mixtures["a"].means.at[0].set(1e3)
    moved = GaussianMixture(**{**mixtures["a"].__dict__, "means": far})
    _, sums = low_rank_statistics({**mixtures, "a": moved}, obs)
    found = maximise_low_rank(moved, sums["a"], least=1e-8)
    np.testing.assert_allclose(found.means[0], far[0], rtol=1e-6)
    assert np.exp(found.log_weights[0]) < 1e-5


def test_what_is_too_large_is_said(monkeypatch):
    mixtures, obs = case("dense")
    monkeypatch.setattr("dichroic.inference.low_rank.MOST_DENSE", 5)
    with pytest.raises(DataError, match="not diagonal"):
        LowRankView(mixtures, SharedObservations(obs))
    monkeypatch.setattr("dichroic.inference.low_rank.MAX_ASSIGNMENTS", 5)
    with pytest.raises(DataError, match="3 × 2 components"):
        LowRankView(mixtures, SharedObservations(obs))


def test_observations_with_masks_of_their_own_are_as_one_by_one(rng, monkeypatch):
    """All at once, where operators are shared and diagonal and noise is independent."""
    size, count = 140, 12
    draw = lambda k, rank: from_columns(
        rng.uniform(0.5, 1, k), rng.normal(size=(k, size, 1 + rank)), 0.3, (size,)
    )
    mixtures = {"a": draw(3, 2), "b": draw(2, 3)}
    noise = DiagonalNoise(rng.uniform(0.5, 1, size=(count, size)))
    operators = {"a": Identity(size), "b": Diagonal(rng.uniform(0.5, 2, size))}
    seen = rng.uniform(size=(count, size)) > 0.15
    view = View(3 * rng.normal(size=(count, size)), operators, noise, mask=seen)
    obs = joint_observations([view])
    assert DiagonalObservations.of(obs) is not None
    near = every_assignment(mixtures, obs, 10**6)
    value, sums = low_rank_statistics(mixtures, obs)
    some = low_rank_statistics(mixtures, obs, ["b"], near)[1]
    each = low_rank_log_evidence(mixtures, obs)
    monkeypatch.setattr(DiagonalObservations, "of", classmethod(lambda cls, obs: None))
    want, expected = low_rank_statistics(mixtures, obs)
    assert value == pytest.approx(want, rel=1e-12)
    assert each == pytest.approx(low_rank_log_evidence(mixtures, obs), rel=1e-12)
    assert list(some) == ["b"]
    assert 0 < near.mean() < 1
    for name, one in expected.items():
        for leaf, other in zip(jax.tree.leaves(one), jax.tree.leaves(sums[name]), strict=True):
            np.testing.assert_allclose(other, leaf, atol=1e-9 * np.abs(leaf).max())
    for leaf, other in zip(jax.tree.leaves(sums["b"]), jax.tree.leaves(some["b"]), strict=True):
        np.testing.assert_allclose(other, leaf, atol=1e-9 * np.abs(leaf).max())
