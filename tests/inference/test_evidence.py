import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal
from scipy import special, stats

from dichroic.inference import evidence
from dichroic.inference.evidence import assignments, log_evidence, posterior_draw, posterior_means
from dichroic.inference.evidence_grid import grid_log_evidence, grid_scores
from dichroic.numerics.cholesky import psd_factor
from dichroic.priors import GaussianMixture
from dichroic.priors.components import Components

DRAWS = 20_000
COUNTS = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}
DIMS = (3, 2, 4)


def spd(rng, *shape):
    root = rng.normal(size=(*shape, shape[-1]))
    return root @ np.swapaxes(root, -1, -2) / shape[-1] + 0.1 * np.eye(shape[-1])


def mixture(rng, count, dim):
    weights = rng.dirichlet(np.ones(count))
    return Components(
        jnp.log(weights),
        jnp.asarray(rng.normal(size=(count, dim))),
        jnp.asarray(spd(rng, count, dim)),
    )


def case(rng, counts, size, noise=0.5):
    """`(y, matrices, noise covariance, sources)`."""
    dims = DIMS[: len(counts)]
    sources = [mixture(rng, k, d) for k, d in zip(counts, dims, strict=True)]
    matrices = [jnp.asarray(rng.normal(size=(size, d))) for d in dims]
    return (
        jnp.asarray(rng.normal(size=size)),
        matrices,
        jnp.asarray(noise * spd(rng, size)),
        sources,
    )


def projected(matrices, sources):
    """Plain triples `(log weights, means, covariances)` of the projected mixtures."""
    return [
        (c.log_weights, c.means @ a.T, jnp.einsum("ij,kjl,ml->kim", a, c.covariances, a))
        for a, c in zip(matrices, sources, strict=True)
    ]


def enumerated(y, cov_noise, views):
    """`log p(y)` tuple by tuple."""
    scores = []
    for index in itertools.product(*(range(view[0].size) for view in views)):
        w, m, v = (
            sum(view[part][k] for view, k in zip(views, index, strict=True)) for part in range(3)
        )
        scores.append(w + multivariate_normal.logpdf(y, m, cov_noise + v))
    return jax.nn.logsumexp(jnp.stack(scores))


def by_scipy(y, cov_noise, views):
    views = [[np.asarray(part, float) for part in view] for view in views]
    scores = []
    for index in itertools.product(*(range(view[0].size) for view in views)):
        w, m, v = (
            sum(view[part][k] for view, k in zip(views, index, strict=True)) for part in range(3)
        )
        scores.append(w + stats.multivariate_normal(m, np.asarray(cov_noise) + v).logpdf(y))
    return special.logsumexp(scores), np.array(scores)


def conditioned(y, matrices, cov_noise, sources):
    """Every tuple's probability, and mean and covariance of all sources, concatenated, given y."""
    a = np.concatenate(matrices, axis=1)
    value, scores = by_scipy(y, cov_noise, projected(matrices, sources))
    means, covs = [], []
    for index in itertools.product(*(range(c.log_weights.size) for c in sources)):
        picked = list(zip(sources, index, strict=True))
        m = np.concatenate([c.means[k] for c, k in picked])
        v = jax.scipy.linalg.block_diag(*(c.covariances[k] for c, k in picked))
        gain = np.linalg.solve(a @ v @ a.T + cov_noise, a @ v).T
        means.append(m + gain @ (y - a @ m))
        covs.append(v - gain @ a @ v)
    return np.exp(scores - value), np.array(means), np.array(covs)


def moments(weights, means, covs):
    mean = weights @ means
    centred = means - mean
    spread = np.einsum("k,ki,kj->ij", weights, centred, centred)
    return mean, np.einsum("k,kij->ij", weights, covs) + spread


def single(args):
    """The same case in single precision."""
    return jax.tree.map(lambda a: a.astype(jnp.float32), args)


@pytest.mark.parametrize("sources", [1, 2, 3])
@pytest.mark.parametrize("size", range(1, 7))
def test_grid_value_and_gradient_are_those_of_enumeration(sources, size, rng, x64):
    y, matrices, cov_noise, mixtures = case(rng, COUNTS[sources], size)
    views = projected(matrices, mixtures)
    value, gradient = GRID_GRADIENT(y, cov_noise, views)
    expect, scores = by_scipy(y, cov_noise, views)
    np.testing.assert_allclose(value, expect, rtol=1e-10)
    np.testing.assert_allclose(GRID_SCORES(y, cov_noise, views).ravel(), scores, rtol=1e-9)
    for ours, theirs in zip(gradient, ENUMERATED_GRADIENT(y, cov_noise, views), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


ENUMERATED_GRADIENT = jax.jit(jax.grad(enumerated, argnums=2))
GRID_GRADIENT = jax.jit(jax.value_and_grad(grid_log_evidence, argnums=2))
GRID_SCORES = jax.jit(grid_scores)


@pytest.mark.parametrize("size", [2, 6])
def test_grid_and_general_path_agree(size, rng, x64, monkeypatch):
    y, matrices, cov_noise, sources = case(rng, (3, 4), size)
    objective = jax.value_and_grad(lambda s: log_evidence(y, matrices, cov_noise, s))
    by_grid = jax.jit(objective)(sources)
    monkeypatch.setattr(evidence, "SMALL", 0)
    general = jax.jit(lambda s: objective(s))(sources)
    # The general path reads one triangle of a covariance, so only the symmetric part is defined.
    even = lambda a: 0.5 * (a + a.swapaxes(-1, -2)) if a.ndim == 3 else a
    for a, b in zip(jax.tree.leaves(by_grid), jax.tree.leaves(general), strict=True):
        np.testing.assert_allclose(even(a), even(b), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [1, 3, 6, 7, 11])
@pytest.mark.parametrize("sources", [1, 2, 3])
def test_evidence_in_single_precision_is_that_of_scipy(sources, size, rng):
    y, matrices, cov_noise, mixtures = case(rng, COUNTS[sources], size)
    expect, _ = by_scipy(y, cov_noise, projected(matrices, mixtures))
    value = jax.jit(log_evidence)(y, matrices, cov_noise, mixtures)
    np.testing.assert_allclose(value, expect, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [3, 8])
def test_components_without_weight_count_for_nothing(size, rng):
    y, matrices, cov_noise, (source,) = case(rng, (3,), size)
    weights = jnp.array([0.4, 0.0, 0.6])
    padded = Components(jnp.log(weights), source.means, source.covariances)
    kept = jax.tree.map(lambda a: a[jnp.array([0, 2])], padded)
    evaluate = jax.jit(jax.value_and_grad(lambda c: log_evidence(y, matrices, cov_noise, [c])))
    value, gradient = evaluate(padded)
    np.testing.assert_allclose(value, evaluate(kept)[0], rtol=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert np.all(gradient.means[1] == 0)


@pytest.mark.parametrize("size", [2, 6, 9])
@pytest.mark.parametrize("counts", [(1,), (4,), (1, 1), (3, 2), (2, 1, 2)])
def test_posterior_means_are_those_of_gaussian_conditioning(counts, size, rng):
    args = case(rng, counts, size)
    weights, means, covs = conditioned(*args)
    result, value = jax.jit(posterior_means)(*args)
    expect, _ = by_scipy(args[0], args[2], projected(args[1], args[3]))
    np.testing.assert_allclose(np.concatenate(result), weights @ means, atol=2e-3)
    np.testing.assert_allclose(value, expect, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2, 6, 9])
def test_posterior_means_in_double_precision(size, rng, x64):
    args = case(rng, (3, 2), size)
    weights, means, _ = conditioned(*args)
    result, _ = jax.jit(posterior_means)(*args)
    np.testing.assert_allclose(np.concatenate(result), weights @ means, atol=1e-10)


def test_evidence_maps_over_observations(rng):
    _, matrices, cov_noise, sources = case(rng, (3, 2), 4)
    y = jnp.asarray(rng.normal(size=(5, 4)))
    mapped = jax.jit(jax.vmap(lambda y: log_evidence(y, matrices, cov_noise, sources)))(y)
    expect = [by_scipy(one, cov_noise, projected(matrices, sources))[0] for one in y]
    np.testing.assert_allclose(mapped, expect, rtol=1e-4)


def curves(rng, counts, size, noise=0.01):
    """Mixtures along random curves, components in order, as learned ones are; and an observation."""
    sources = []
    for k in counts:
        t, (a, b) = np.linspace(0, 1, k)[:, None], rng.normal(size=(2, 3))
        means = np.sin(2 * np.pi * (t * (0.5 + rng.uniform(size=3)) + a)) + b
        step = np.gradient(means, axis=0)
        covs = 0.2 * step[:, :, None] * step[:, None, :] + 1e-4 * np.eye(3)
        sources.append(GaussianMixture.from_moments(np.full(k, 1 / k), means, covs))
    matrices = [jnp.asarray(rng.normal(size=(size, 3))) for _ in counts]
    x = [s.sample(jax.random.key(i)) for i, s in enumerate(sources)]
    y = sum(a @ u for a, u in zip(matrices, x, strict=True)) + noise * rng.normal(size=size)
    return jnp.asarray(y), matrices, noise**2 * jnp.eye(size), sources


EVIDENCE = jax.jit(log_evidence, static_argnames="beam_width")
ASSIGNMENTS = jax.jit(assignments, static_argnames="beam_width")


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_search_from_coarse_to_fine_finds_what_matters(size, shuffled, rng, x64):
    """With 256 of 4,096 assignments, nearly all of the evidence; `ordered` undoes any shuffling."""
    for _ in range(5):
        y, matrices, cov_noise, mixtures = curves(rng, (16, 16, 16), size)
        if shuffled:
            mix = lambda m: jax.tree.map(lambda a, o=rng.permutation(16): a[o], m).ordered()
            mixtures = [mix(m) for m in mixtures]
        sources = [m.prior() for m in mixtures]
        exact = EVIDENCE(y, matrices, cov_noise, sources)
        found = EVIDENCE(y, matrices, cov_noise, sources, beam_width=256)
        assert -1e-9 < exact - found < 0.05


def test_ordered_keeps_the_mixture_and_sorts_a_line(rng):
    at = rng.permutation(37)
    mixture = GaussianMixture.from_moments(
        at + 1.0, at[:, None] * [1.0, 2.0], np.tile(np.eye(2), (37, 1, 1))
    )
    ordered = mixture.ordered()
    line = np.asarray(ordered.means)[:, 0]
    assert list(line) in (list(range(37)), list(range(36, -1, -1)))
    np.testing.assert_allclose(
        np.exp(ordered.log_weights), (line + 1) / (line + 1).sum(), rtol=1e-5
    )


def test_room_for_every_tuple_is_exact(rng, x64):
    y, matrices, cov_noise, sources = case(rng, (4, 5, 4), 8)
    views = [evidence.project(c, a) for c, a in zip(sources, matrices, strict=True)]
    index, scores = ASSIGNMENTS(y, views, cov_noise, beam_width=80)
    _, expect = by_scipy(y, cov_noise, projected(matrices, sources))
    assert [tuple(i) for i in index.tolist()] == list(
        itertools.product(range(4), range(5), range(4))
    )
    np.testing.assert_allclose(scores, expect, rtol=1e-9)


@pytest.mark.parametrize("most", [1, 3, 8, 30])
@pytest.mark.parametrize("size", [4, 8])
def test_found_tuples_are_of_the_enumeration_once_each(size, most, rng, x64):
    y, matrices, cov_noise, sources = case(rng, (4, 5, 3), size)
    views = [evidence.project(c, a) for c, a in zip(sources, matrices, strict=True)]
    index, scores = ASSIGNMENTS(y, views, cov_noise, beam_width=most)
    _, every = by_scipy(y, cov_noise, projected(matrices, sources))
    real = np.all(np.asarray(index) < [4, 5, 3], axis=1)
    assert np.all(np.isneginf(np.asarray(scores)[~real]))
    flat = np.ravel_multi_index(np.asarray(index)[real].T, (4, 5, 3))
    assert len(set(flat.tolist())) == real.sum() > 0
    assert real.sum() <= max(most, 8)
    np.testing.assert_allclose(np.asarray(scores)[real], every[flat], rtol=1e-9)


def test_merged_pairs_have_the_moments_of_the_whole(rng, x64):
    *_, (components,) = case(rng, (5,), 4)
    merged = components.merge_pairs()
    assert merged.log_weights.size == 3
    np.testing.assert_allclose(merged.mean, components.mean, rtol=1e-9)
    np.testing.assert_allclose(merged.covariance, components.covariance, rtol=1e-9)


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("counts", [(1,), (1, 1), (3, 2)])
def test_draws_have_the_mean_and_covariance_of_the_posterior(counts, size, rng):
    args = case(rng, counts, size)
    root = psd_factor(args[2])
    draw = lambda key: posterior_draw(*args, key, noise_root=root)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    draws, values = jax.jit(jax.vmap(draw))(keys)
    x = np.concatenate(draws, axis=1).astype(float)
    mean, cov = moments(*conditioned(*args))
    variance = np.diag(cov)
    assert np.all(np.abs(x.mean(0) - mean) <= 4.5 * np.sqrt(variance / DRAWS) + 1e-3)
    # Entries of the sample covariance scatter as their products do; their own spread says by how much.
    centred = x - mean
    products = centred[:, :, None] * centred[:, None, :]
    error = products.std(0) / np.sqrt(DRAWS)
    assert np.all(np.abs(products.mean(0) - cov) <= 4.5 * error + 2e-3 * variance.max())
    np.testing.assert_allclose(values, EVIDENCE(*args), rtol=1e-4)


def test_draws_come_from_both_modes_in_proportion(rng):
    source = Components(
        jnp.log(jnp.array([0.3, 0.7])), jnp.array([[-5.0], [5.0]]), jnp.full((2, 1, 1), 0.1)
    )
    blind = jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.eye(1)
    draw = lambda key: posterior_draw(
        jnp.zeros(1), [blind[0], blind[1]], blind[2], [source, source], key, noise_root=jnp.eye(1)
    )[0]
    keys = jax.random.split(jax.random.key(2), DRAWS)
    a, b = (np.asarray(x)[:, 0] > 0 for x in jax.jit(jax.vmap(draw))(keys))
    for fraction, p in ((a.mean(), 0.7), (b.mean(), 0.7), ((a & b).mean(), 0.49)):
        assert abs(fraction - p) <= 4.5 * np.sqrt(p * (1 - p) / DRAWS)


def test_moments_of_a_mixture_are_those_of_its_draws(rng):
    source = single(mixture(rng, 3, 2))
    mean, cov = moments(
        np.exp(source.log_weights), np.asarray(source.means), np.asarray(source.covariances)
    )
    np.testing.assert_allclose(source.mean, mean, atol=1e-5)
    np.testing.assert_allclose(source.covariance, cov, atol=1e-5)
    collapsed = source.collapse()
    np.testing.assert_allclose(collapsed.mean, mean, atol=1e-5)
    np.testing.assert_allclose(collapsed.covariance, cov, atol=1e-5)
    draws = np.asarray(jax.vmap(source.draw)(jax.random.split(jax.random.key(0), DRAWS)))
    error = np.sqrt(np.diag(cov) / DRAWS)
    assert np.all(np.abs(draws.mean(0) - mean) <= 4.5 * error)
