"""EM of mixtures against the standard update, tuple by tuple, in float64 NumPy."""

import itertools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from scipy.linalg import block_diag

from dichroic.config import MixtureConfig
from dichroic.learning.mixture import em as mixture_em
from dichroic.learning.mixture import statistics as mixture_statistics
from dichroic.learning.mixture import statistics_shared
from dichroic.learning.mixture.em import choose, em_iteration, mean_log_evidence, statistics
from dichroic.learning.mixture.initialisation import split_components
from dichroic.learning.mixture.m_step import joint_shifts, maximise
from dichroic.learning.mixture.statistics import SufficientStatistics, view_statistics
from dichroic.learning.mixture.statistics_shared import shared_log_evidence, shared_statistics
from dichroic.numerics.batching import take
from dichroic.numerics.precision import float64
from dichroic.operators import Dense, Identity
from dichroic.operators.noise import DenseNoise, IsotropicNoise, Masked
from dichroic.priors import GaussianMixture, gaussian
from dichroic.problem.observations import Observations, is_shared

pytestmark = pytest.mark.usefixtures("x64")

ALL = MixtureConfig(active_assignments=4096)


def spd(rng, dim):
    root = rng.normal(size=(dim, dim))
    return root @ root.T / dim + 0.2 * np.eye(dim)


def mixture(rng, count, dim):
    return GaussianMixture.from_moments(
        rng.dirichlet(np.full(count, 5.0)),
        rng.normal(size=(count, dim)),
        [spd(rng, dim) for _ in range(count)],
    )


def draws(rng, m, n):
    weights, means, covs = parameters(m)
    roots = np.linalg.cholesky(covs)
    k = rng.choice(weights.size, p=weights / weights.sum(), size=n)
    return means[k] + np.einsum("nij,nj->ni", roots[k], rng.normal(size=(n, m.dim)))


def case(rng, counts=(3, 2), *, kind, n=40, dims=(3, 2), size=3):
    """Mixtures `a`, `b` and `n` observations of their sum, of one of the kinds of operators and noise."""
    mixtures = {k: mixture(rng, c, d) for k, c, d in zip("ab", counts, dims, strict=False)}
    rows = () if kind.startswith("shared") else (n,)
    ops = {k: rng.normal(size=(*rows, size, m.dim)) for k, m in mixtures.items()}
    noise = DenseNoise(0.1 * spd(rng, size))
    if kind == "per observation":
        noise = IsotropicNoise(rng.uniform(0.2, 0.5, size=n))
    if kind == "shared mask":
        noise = Masked(noise, np.arange(size) != 1)
    if kind == "masks":
        seen = rng.uniform(size=(n, size)) < 0.7
        seen[:, 0] |= ~seen.any(axis=1)
        noise = Masked(noise, seen)
    y = sum(np.einsum("...md,...d->...m", a, draws(rng, mixtures[k], n)) for k, a in ops.items())
    y += 0.3 * rng.normal(size=y.shape)
    return mixtures, Observations(y, {k: Dense(a) for k, a in ops.items()}, noise)


def rows_of(obs):
    """`(observed, y, matrices, Σ)` of each observation, missing entries left out."""
    for i in range(obs.count):
        row = jax.tree.map(np.asarray, take(jax.tree.map(np.asarray, obs), i))
        masked = isinstance(row.noise, Masked)
        seen = row.noise.mask > 0 if masked else np.ones(obs.size, bool)
        noise = row.noise.noise if masked else row.noise
        cov = noise.covariance if isinstance(noise, DenseNoise) else noise.std**2 * np.eye(obs.size)
        matrices = {k: op.matrix[seen] for k, op in row.operators.items()}
        yield seen, row.y[seen], matrices, cov[np.ix_(seen, seen)]


def parameters(m):
    return np.exp(np.asarray(m.log_weights)), np.asarray(m.means), np.asarray(m.covariances())


def moments(weights, means, covs):
    mean = weights @ means
    centred = means - mean
    return mean, np.tensordot(weights, covs, 1) + (weights[:, None] * centred).T @ centred


def brute_force(mixtures, obs):
    """By conditioning on each observation, tuple by tuple: `Σ log p(y)`, and for every source the sums
    of the E-step and the EM update."""
    theta = {k: parameters(mixtures[k]) for k in obs.sources}
    index = list(itertools.product(*(range(len(w)) for w, _, _ in theta.values())))
    zeros = lambda w, m, c: [0 * w, 0 * m, 0 * c, 0 * c, 0 * m, 0 * c]
    sums = {k: zeros(*v) for k, v in theta.items()}
    total = 0.0
    for _, y, matrices, noise in rows_of(obs):
        a = np.concatenate([matrices[k] for k in theta], axis=1)
        scores, found = [], []
        for t in index:
            parts = [[v[j] for v in theta[k]] for k, j in zip(theta, t, strict=True)]
            mean = np.concatenate([m for _, m, _ in parts])
            cov = block_diag(*[c for _, _, c in parts])
            cov_y = noise + a @ cov @ a.T
            inverse = np.linalg.inv(cov_y)
            u, information = a.T @ inverse @ (y - a @ mean), a.T @ inverse @ a
            scores.append(
                sum(np.log(w) for w, _, _ in parts)
                + stats.multivariate_normal(a @ mean, cov_y).logpdf(y)
            )
            found.append((u, information, mean + cov @ u, cov - cov @ information @ cov))
        total += special.logsumexp(scores)
        for t, r, (u, information, mean, cov) in zip(
            index, special.softmax(scores), found, strict=True
        ):
            end = 0
            for own, j in zip(sums.values(), t, strict=True):
                part = slice(end, end + own[1].shape[1])
                end, m = part.stop, mean[part]
                for sum_, term in zip(
                    own,
                    (1, u[part], np.outer(u[part], u[part]), information[part, part], m,
                     cov[part, part] + np.outer(m, m)),
                    strict=True,
                ):  # fmt: skip
                    sum_[j] += r * term
    update = {}
    for k, (n, _, _, _, first, second) in sums.items():
        means = first / n[:, None]
        covs = second / n[:, None, None] - means[:, :, None] * means[:, None, :]
        update[k] = (n / n.sum(), means, covs)
    return total, {k: own[:4] for k, own in sums.items()}, update


def e_step(mixtures, views, config=ALL):
    return statistics(mixtures, views, [choose(mixtures, obs, config) for obs in views])


def em_step(mixtures, views, *, floor=1e-12, standard=True, **options):
    """The mixtures after one EM step, and the mean log evidence before it."""
    found = e_step(mixtures, views)
    updated = {
        k: maximise(m, found.sums[k], floor=floor, standard=standard, **options)
        for k, m in mixtures.items()
    }
    return updated, float(found.log_evidence) / sum(obs.count for obs in views)


def assert_close(mixture, expect, **tolerance):
    for got, want in zip(parameters(mixture), expect, strict=True):
        np.testing.assert_allclose(got, want, **tolerance)


def assert_same_sums(got, want, **tolerance):
    for a, b in zip(jax.tree.leaves(got), want, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("per observation", (1,)),
        ("per observation", (3, 2)),
        ("masks", (3, 2)),
        ("shared", (3, 2)),
        ("shared mask", (3, 2)),
    ],
)
def test_an_em_step_is_the_textbook_update(kind, counts, rng):
    mixtures, obs = case(rng, counts, kind=kind)
    _, sums, update = brute_force(mixtures, obs)
    found = e_step(mixtures, [obs])
    updated, _ = em_step(mixtures, [obs])
    for k in mixtures:
        assert_same_sums(found.sums[k], sums[k], rtol=1e-8, atol=1e-8)
        assert_close(updated[k], update[k], atol=1e-9)


def test_a_step_in_single_precision_is_close_to_the_textbook_update(rng):
    mixtures, obs = case(rng, kind="per observation")
    _, _, update = brute_force(mixtures, obs)
    with float64(False):
        single = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
        updated, _ = em_step(single(mixtures), [single(obs)])
    for k in mixtures:
        assert_close(updated[k], update[k], atol=1e-4)


def test_two_views_add_up(rng):
    """Source `a` is seen by both views, `b` by the second: sums over observations add."""
    mixtures, both = case(rng, kind="per observation")
    _, alone = case(rng, (3,), kind="shared")
    found = e_step(mixtures, [alone, both])
    parts = [e_step({"a": mixtures["a"]}, [alone]), e_step(mixtures, [both])]
    np.testing.assert_allclose(found.log_evidence, sum(float(p.log_evidence) for p in parts))
    for name, expect in (("a", parts), ("b", parts[1:])):
        leaves = [jax.tree.leaves(p.sums[name]) for p in expect]
        total = [sum(np.asarray(a) for a in same) for same in zip(*leaves, strict=True)]
        assert_same_sums(found.sums[name], total, rtol=1e-10)


@pytest.mark.parametrize("kind", ["per observation", "shared"])
def test_the_evidence_is_that_of_scipy_and_its_mean_is_over_all_observations(kind, rng):
    mixtures, obs = case(rng, kind=kind)
    views = [obs, Observations(obs.y[:1], obs.operators, obs.noise)][: 1 + (kind == "shared")]
    totals = [brute_force(mixtures, v)[0] for v in views]
    expect = sum(totals) / sum(v.count for v in views)
    np.testing.assert_allclose(mean_log_evidence(mixtures, views), expect, rtol=1e-10)
    np.testing.assert_allclose(em_step(mixtures, views)[1], expect, rtol=1e-10)


def test_shared_and_general_e_steps_agree(rng):
    mixtures, obs = case(rng, kind="shared mask")
    assert is_shared(obs)
    assert choose(mixtures, obs, ALL) is None
    priors = {k: m.prior() for k, m in mixtures.items()}
    coupled = (("a", "b"), ("b", "a"))
    found = shared_statistics(priors, obs, coupled)
    value, sums = found.log_evidence, found.sums
    every = np.tile(list(itertools.product(range(3), range(2))), (obs.count, 1, 1))
    general = view_statistics(priors, obs, jnp.asarray(every), coupled)
    for pair, expect in general.cross.items():
        np.testing.assert_allclose(found.cross[pair], expect, rtol=1e-9, atol=1e-9)
    for k, expect in general.sums.items():
        assert_same_sums(sums[k], jax.tree.leaves(expect), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(value, general.log_evidence, rtol=1e-10)
    np.testing.assert_allclose(shared_log_evidence(priors, obs).sum(), value, rtol=1e-12)
    # A missing entry counts as a standard normal number that is zero.
    missing = sum(int((~seen).sum()) for seen, *_ in rows_of(obs))
    scipy = brute_force(mixtures, obs)[0] + missing * stats.norm.logpdf(0)
    np.testing.assert_allclose(value, scipy, rtol=1e-10)


@pytest.mark.parametrize("kind", ["per observation", "masks"])
def test_views_with_anything_per_observation_are_not_shared(kind, rng):
    assert not is_shared(case(rng, (1,), kind=kind)[1])


def test_the_most_probable_tuples_are_chosen(rng):
    """Each observation's own: those with the highest joint probability of tuple and data."""
    mixtures, obs = case(rng, kind="per observation")
    chosen = np.asarray(choose(mixtures, obs, MixtureConfig(active_assignments=2)))
    assert chosen.shape == (40, 2, 2)
    index = list(itertools.product(range(3), range(2)))
    (wa, ma, ca), (wb, mb, cb) = (parameters(mixtures[k]) for k in "ab")
    for (_, y, a, noise), found in zip(rows_of(obs), chosen, strict=True):
        scores = [
            np.log(wa[i] * wb[j])
            + stats.multivariate_normal(
                a["a"] @ ma[i] + a["b"] @ mb[j],
                noise + a["a"] @ ca[i] @ a["a"].T + a["b"] @ cb[j] @ a["b"].T,
            ).logpdf(y)
            for i, j in index
        ]
        best = [index[i] for i in np.argsort(scores)[:-3:-1]]
        assert {tuple(t) for t in found.tolist()} == set(best)


@pytest.mark.parametrize("kind", ["shared", "per observation"])
def test_observations_are_summed_over_chunks(kind, rng, monkeypatch):
    """37 observations in chunks of 8: the last is padded, and padding counts for nothing."""
    mixtures, obs = case(rng, kind=kind, n=37)
    module, per_observation = (
        (statistics_shared, 4 * 6 * 3) if kind == "shared" else (mixture_statistics, 16 * 6 * 35)
    )
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * per_observation)
    if kind != "shared":  # 6 assignments, each with numbers for 3 × 3, twice 3 × 3 and twice 2 × 2
        assert mixture_statistics.chunks(37, 6 * 35)[0].shape == (5, 8)
    total, _, update = brute_force(mixtures, obs)
    updated, evidence = em_step(mixtures, [obs])
    np.testing.assert_allclose(evidence, total / 37, rtol=1e-10)
    np.testing.assert_allclose(mean_log_evidence(mixtures, [obs]), evidence, rtol=1e-10)
    for k in mixtures:
        assert_close(updated[k], update[k], atol=1e-9)


@pytest.mark.parametrize("kind", ["shared", "per observation"])
def test_textbook_steps_never_lower_the_evidence(kind, rng):
    mixtures, obs = case(rng, kind=kind)
    evidences = []
    for _ in range(40):
        mixtures, evidence = em_step(mixtures, [obs])
        evidences.append(evidence)
    assert np.diff(evidences).min() > -1e-10
    assert evidences[-1] > evidences[0] + 0.1


@pytest.mark.parametrize("kind", ["shared", "per observation"])
def test_iterations_reach_a_higher_evidence_than_as_many_textbook_steps(kind, rng):
    start, obs = case(rng, kind=kind)
    config = MixtureConfig(steps=5, active_assignments=6, floor=1e-8)
    mixtures, evidences = start, []
    for _ in range(8):
        mixtures, evidence = em_iteration(mixtures, [obs], ["a", "b"], config)
        evidences.append(evidence)
    assert np.diff(evidences).min() > -1e-5
    slow = start
    for _ in range(40):
        slow, _ = em_step(slow, [obs])
    ours, theirs = (mean_log_evidence(m, [obs]) for m in (mixtures, slow))
    assert ours > theirs
    assert ours >= evidences[-1] - 1e-5


def test_a_iteration_of_some_sources_leaves_the_others(rng):
    mixtures, obs = case(rng, kind="shared")
    updated, _ = em_iteration(mixtures, [obs], ["b"], MixtureConfig(steps=2))
    assert updated["a"] is mixtures["a"]
    assert not np.allclose(updated["b"].means, mixtures["b"].means)


@pytest.mark.parametrize("standard", [True, False])
def test_with_little_noise_a_step_is_that_of_scikit_learn(standard, rng):
    sklearn = pytest.importorskip("sklearn.mixture")
    start, truth = mixture(rng, 3, 2), mixture(rng, 3, 2)
    x = draws(rng, truth, 500)
    weights, means, covs = parameters(start)
    theirs = sklearn.GaussianMixture(
        3,
        max_iter=1,
        reg_covar=0,
        weights_init=weights,
        means_init=means,
        precisions_init=np.linalg.inv(covs),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, and says so
        theirs.fit(x)
    obs = Observations(x, {"a": Identity(2)}, IsotropicNoise(1e-5))
    updated, _ = em_step({"a": start}, [obs], standard=standard)
    expect = theirs.weights_, theirs.means_, theirs.covariances_
    assert_close(updated["a"], expect, atol=2e-6)


def test_the_step_of_the_mean_is_generalised_least_squares(rng):
    """Given the covariance, the best mean is (Σ AᵀPA)⁻¹ Σ AᵀPy, found in one step; damping shortens it."""
    mixtures, obs = case(rng, (1,), kind="per observation")
    _, (mean,), (cov,) = parameters(mixtures["a"])
    left, right = np.zeros((3, 3)), np.zeros(3)
    for _, y, a, noise in rows_of(obs):
        p = a["a"].T @ np.linalg.inv(noise + a["a"] @ cov @ a["a"].T)
        left, right = left + p @ a["a"], right + p @ y
    best = np.linalg.solve(left, right)
    for damping in (1.0, 0.5):
        updated, _ = em_step(mixtures, [obs], standard=False, damping=damping)
        expect = mean + damping * (best - mean)
        np.testing.assert_allclose(updated["a"].means[0], expect, rtol=1e-5)


@pytest.mark.parametrize("kind", ["per observation", "shared", "masks"])
def test_means_of_several_sources_are_solved_for_together(kind, rng):
    """Given the assignments and covariances, the shifts d leave no force: `Σ r AᵀP (y − m − Σ A d) = 0`."""
    mixtures, obs = case(rng, kind=kind)
    chosen = [choose(mixtures, obs, ALL)]
    found = statistics(mixtures, [obs], chosen, ["b", "a"])
    assert set(found.cross) == {("a", "b")}
    shifts = joint_shifts(mixtures, found, ["a", "b"], {})
    theta = {k: parameters(m) for k, m in mixtures.items()}
    left = {k: np.zeros_like(m) for k, (_, m, _) in theta.items()}
    assignments = list(itertools.product(range(3), range(2)))
    for _, y, a, noise in rows_of(obs):
        scores, forces = [], []
        for t in assignments:
            w, m, c = zip(
                *[[v[j] for v in theta[k]] for k, j in zip("ab", t, strict=True)], strict=True
            )
            cov = noise + sum(a[k] @ c @ a[k].T for k, c in zip("ab", c, strict=True))
            mean = sum(a[k] @ m for k, m in zip("ab", m, strict=True))
            scores.append(np.log(w).sum() + stats.multivariate_normal(mean, cov).logpdf(y))
            moved = sum(a[k] @ shifts[k][j] for k, j in zip("ab", t, strict=True))
            forces.append({k: a[k].T @ np.linalg.solve(cov, y - mean - moved) for k in "ab"})
        for t, r, force in zip(assignments, special.softmax(scores), forces, strict=True):
            for k, j in zip("ab", t, strict=True):
                left[k][j] += r * force[k]
    for k, force in found.sums.items():
        np.testing.assert_allclose(left[k], 0, atol=1e-4 * np.abs(force.force).max())


def test_a_component_without_observations_does_not_move_with_the_others(rng):
    mixtures, obs = case(rng, kind="shared")
    far = mixtures["b"].means + jnp.array([[0.0], [1e3]])
    mixtures = {**mixtures, "b": eqx.tree_at(lambda m: m.means, mixtures["b"], far)}
    found = statistics(mixtures, [obs], [choose(mixtures, obs, ALL)], ["a", "b"])
    shifts = joint_shifts(mixtures, found, ["a", "b"], {})
    np.testing.assert_array_equal(shifts["b"][1], 0)
    assert np.abs(shifts["b"][0]).min() > 0


def test_nearly_the_same_mixture_in_two_views_takes_few_steps(rng, monkeypatch):
    """Weights (1, 0.9) and (0.9, 1): one iteration of 5 steps finds the means; source by source it does not."""
    truth = {"a": np.array([1.0, -2.0, 0.5]), "b": np.array([-1.0, 0.5, 2.0])}
    views = []
    for weights in ((1, 0.9), (0.9, 1)):
        a = rng.normal(size=(400, 2, 3))
        x = {k: m + 0.1 * rng.normal(size=(400, 3)) for k, m in truth.items()}
        ops = {k: w * a for k, w in zip("ab", weights, strict=True)}
        y = sum(np.einsum("nmd,nd->nm", ops[k], x[k]) for k in "ab") + 0.01 * rng.normal(
            size=(400, 2)
        )
        views.append(Observations(y, {k: Dense(a) for k, a in ops.items()}, IsotropicNoise(0.01)))
    start = {k: gaussian(np.zeros(3), np.eye(3)) for k in "ab"}
    away = {}
    for most in (mixture_em.MOST_MEANS, 0):
        monkeypatch.setattr(mixture_em, "MOST_MEANS", most)
        mixtures, _ = em_iteration(start, views, ["a", "b"], MixtureConfig())
        away[most > 0] = np.max([np.abs(mixtures[k].means[0] - m).max() for k, m in truth.items()])
    # 800 observations of 2 entries with a spread of 0.14 tell the difference of the sources, seen at a
    # tenth, to about 0.14 / 0.1 / √800 = 0.05 a number.
    assert away[True] < 4 * 0.05
    assert away[False] > 0.5


@pytest.mark.parametrize("standard", [True, False])
def test_a_variance_that_should_be_zero_falls_at_the_stated_rate(standard):
    """One number with variance c seen n times in noise σ², where the data have just variance σ²: then
    `S = W c̃` with `W = 1 / (c + σ²)`, and c falls as σ² / iterations, or as σ² / √(2 iterations) by the standard."""
    c, noise, n, iterations = 1.0, 0.04, 100, 400
    for _ in range(iterations):
        w = n / (c + noise)
        sums = SufficientStatistics(*(np.asarray(a, float) for a in (
            [n], [[0.0]], [[[w * noise / (c + noise)]]], [[[w]]]
        )))  # fmt: skip
        m = gaussian(np.zeros(1), [[c]])
        c = float(maximise(m, sums, floor=1e-12, standard=standard).covariances()[0, 0, 0])
    expect = noise / np.sqrt(2 * iterations) if standard else noise / iterations
    np.testing.assert_allclose(c, expect, rtol=0.1)


def test_both_kinds_of_steps_rest_at_a_maximum(rng):
    m = GaussianMixture.from_moments(
        [1, 2], np.array([[-2.0, 0], [2, 1]]), [spd(rng, 2), spd(rng, 2)]
    )
    y = draws(rng, m, 200) + 0.3 * rng.normal(size=(200, 2))
    obs = Observations(y, {"a": Identity(2)}, IsotropicNoise(0.3))
    for _ in range(60):
        m = em_step({"a": m}, [obs], standard=False)[0]["a"]
    assert np.linalg.eigvalsh(m.covariances()).min() > 0.01, "an inner maximum"
    for standard in (True, False):
        again = em_step({"a": m}, [obs], standard=standard)[0]["a"]
        assert_close(again, parameters(m), atol=1e-5)


def test_two_gaussians_in_contrastive_views_are_recovered_within_the_sampling_error(rng):
    """With moments S₁ = A + Σ and S₂ = A + B + Σ, an entry of S₁ or S₂ − S₁ scatters as
    √((S_ii S_jj + S_ij²) / n); maximum likelihood is at least as good for large n."""
    n, noise, dim = 4000, 0.3, 3
    cov = {"a": spd(rng, dim), "b": spd(rng, dim)}
    mean = {"a": rng.normal(size=dim), "b": rng.normal(size=dim)}
    draw = lambda k: rng.multivariate_normal(mean[k], cov[k], size=n)
    eye = Identity(dim)
    y = draw("a"), draw("a") + draw("b")
    y = [v + noise * rng.normal(size=v.shape) for v in y]
    views = [
        Observations(y[0], {"a": eye}, IsotropicNoise(noise)),
        Observations(y[1], {"a": eye, "b": eye}, IsotropicNoise(noise)),
    ]
    found = {k: gaussian(np.zeros(dim), np.eye(dim)) for k in cov}
    for _ in range(10):
        found, _ = em_iteration(found, views, ["a", "b"], MixtureConfig())
    s1 = cov["a"] + noise**2 * np.eye(dim)
    s2 = s1 + cov["b"]
    scatter = lambda s: (np.outer(np.diag(s), np.diag(s)) + s**2) / n
    variance = {"a": (scatter(s1), s1 / n), "b": (scatter(s1) + scatter(s2), (s1 + s2) / n)}
    for k, (of_cov, of_mean) in variance.items():
        _, (m,), (c,) = parameters(found[k])
        assert np.all(np.abs(c - cov[k]) < 4 * np.sqrt(of_cov))
        assert np.all(np.abs(m - mean[k]) < 4 * np.sqrt(np.diag(of_mean)))


@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize("components", [3, 4, 6, 9])
def test_splitting_keeps_the_moments_and_the_maximum(components, precision, rng):
    with float64(precision == "double"):
        before = mixture(rng, 3, 3)
        after = split_components(before, components)
    weights, means, covs = parameters(after)
    assert weights.size == min(components, 6)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6)
    old = parameters(before)
    for ours, theirs in zip(moments(weights, means, covs), moments(*old), strict=True):
        close(ours, theirs)
    # The heaviest are split, each into two of half its weight that keep its own moments.
    split = np.argsort(-old[0])[: weights.size - 3]
    close(weights[split], old[0][split] / 2)
    close(weights[3:], old[0][split] / 2)
    for parent, child in zip(split, range(3, weights.size), strict=True):
        apart = 0.5 * (means[child] - means[parent])
        close(means[child] - apart, old[1][parent])
        close(covs[child], covs[parent])
        close(covs[child] + np.outer(apart, apart), old[2][parent])
        close(apart @ apart, np.linalg.eigvalsh(old[2][parent])[-1] / 2)
    assert np.linalg.eigvalsh(covs).min() > 0


def test_with_a_strong_prior_all_components_have_one_covariance(rng):
    mixtures, obs = case(rng, (3,), kind="shared")
    sums = e_step(mixtures, [obs]).sums["a"]
    options = {"shrinkage": 1e9, "standard": True, "floor": 1e-12}
    covs = parameters(maximise(mixtures["a"], sums, **options))[2]
    np.testing.assert_allclose(covs, np.broadcast_to(covs[:1], covs.shape), rtol=1e-4)


def converged(rng, shrinkage, noise, steps=400):
    """A mixture of three at a fixed point of EM with a prior, of 60 observations, and its sums there."""
    means, d = np.array([[-20.0, 0], [0, 20], [20, 0]]), 2
    which = rng.integers(3, size=60)
    y = means[which] + rng.normal(size=(60, d)) + noise * rng.normal(size=(60, d))
    obs = Observations(y, {"a": Identity(d)}, IsotropicNoise(noise))
    found = GaussianMixture.from_moments(np.ones(3), means, np.stack([np.eye(d)] * 3))
    with float64():
        obs = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), obs)
        found = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), found)
        for _ in range(steps):
            sums = e_step({"a": found}, [obs]).sums["a"]
            found = maximise(found, sums, floor=1e-12, shrinkage=shrinkage)
        return found, e_step({"a": found}, [obs]).sums["a"]


def test_a_fixed_point_with_a_prior_is_that_of_the_penalised_likelihood(rng):
    """Σ r g = κ T⁻¹ (μ − m), and Σ r S + ν C⁻¹ C̄ C⁻¹ = Σ r W + ν C⁻¹."""
    shrinkage = 6.0
    found, sums = converged(rng, shrinkage, 0.5)
    weights, means, covs = parameters(found)
    pooled = np.einsum("k,kij->ij", weights, covs)
    off = means - weights @ means
    total = pooled + (weights * off.T) @ off
    pull = 0.3 * shrinkage * off @ np.linalg.inv(total)
    np.testing.assert_allclose(sums.force, pull, atol=1e-4 * np.abs(pull).max())
    inverse = np.linalg.inv(covs)
    left = np.asarray(sums.scatter) + 6 * inverse @ pooled @ inverse
    right = np.asarray(sums.information) + 6 * inverse
    np.testing.assert_allclose(left, right, atol=1e-3 * np.abs(right).max())


def test_the_floor_lifts_small_eigenvalues_only(rng):
    mixtures, obs = case(rng, (3,), kind="shared")
    sums = e_step(mixtures, [obs]).sums["a"]
    plain = parameters(maximise(mixtures["a"], sums, floor=1e-12))[2]
    values, vectors = np.linalg.eigh(plain)
    floor = np.median(values)
    got = parameters(maximise(mixtures["a"], sums, floor=floor))[2]
    lifted = np.einsum("kir,kr,kjr->kij", vectors, np.maximum(values, floor), vectors)
    np.testing.assert_allclose(got, lifted, atol=1e-12)


def test_a_component_without_observations_stays_with_next_to_no_weight(rng):
    alive = mixture(rng, 2, 3)
    _, means, covs = parameters(alive)
    far, cov = np.full(3, 1e3), spd(rng, 3)
    start = GaussianMixture.from_moments([1, 1, 1], [*means, far], [*covs, cov])
    _, obs = case(rng, (2,), kind="shared")
    for _ in range(3):
        updated, _ = em_step({"a": start}, [obs], shrinkage=2.0)
        weights, means, covs = parameters(updated["a"])
        np.testing.assert_allclose(weights[2], 1e-6, rtol=1e-3)
        np.testing.assert_allclose(means[2], far)
        np.testing.assert_allclose(covs[2], cov, atol=1e-12)
        start = updated["a"]
