"""Known cases of what views determine, and agreement with the map formed entry by entry."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dichroic.operators import (
    BlockAverage,
    Convolve,
    Dense,
    Diagonal,
    FunctionOperator,
    Identity,
    Operator,
    Scale,
)
from dichroic.operators.base import as_shape
from dichroic.problem.identifiability import identifiability
from dichroic.problem.identifiability.sample_size import scarcity
from dichroic.problem.problem import Problem, Source
from dichroic.problem.view import View


def view(operators, *, n=2, name="", **kwargs):
    """A view of zeros with the given operators."""
    op = next(iter(operators.values()))
    return View(np.zeros((n, *op.out_shape), np.float32), operators, 1.0, name, **kwargs)


def problem(views, **shapes):
    return Problem([Source(k, as_shape(s)) for k, s in shapes.items()], views)


def verdicts(result):
    return [s.verdict for s in result.sources]


def determined(result):
    return [(s.determined, s.dimensions) for s in result.sources]


def contrastive(op: Operator, other: Operator | None = None, **shapes):
    return problem([view({"a": op}), view({"a": op, "b": other or op})], **shapes)


def test_contrastive_views_identify_both_sources():
    result = identifiability(contrastive(Identity((4,)), a=(4,), b=(4,)))
    assert verdicts(result) == ["identified"] * 2
    assert determined(result) == [(10, 10)] * 2
    assert [(s.mean_determined, s.mean_dimensions) for s in result.sources] == [(4, 4)] * 2
    assert result.exact
    assert result.identified
    assert result.warnings == ()
    assert 1 < result["b"].condition < 10
    assert result["b"].smallest == pytest.approx(1 / result["b"].condition)


def test_the_same_operator_in_every_view_leaves_only_the_sum(rng):
    shared = Dense(rng.normal(size=(5, 4)))
    both = {"a": Identity((4,)), "b": Identity((4,))}
    result = identifiability(problem([view(both), view({"a": shared, "b": shared})], a=4, b=4))
    assert verdicts(result) == ["not identified"] * 2
    assert determined(result) == [(0, 10)] * 2
    assert (result["a"].condition, result["a"].smallest) == (np.inf, 0)
    assert not result.identified
    assert result.warnings == (
        "sources 'a' and 'b' enter every view through the same operator: only their sum can be "
        "learned; add a view that sees one of them alone or with another weight",
    )


def test_another_weight_leaves_a_weighted_sum_and_two_weights_both():
    eye = Identity((3,))
    first, second = {"a": eye, "b": 0.1 * eye}, {"a": 0.1 * eye, "b": eye}
    result = identifiability(problem([view(first), view(first)], a=3, b=3))
    assert verdicts(result) == ["not identified"] * 2
    assert "only one weighted sum of them can be learned" in result.warnings[0]
    result = identifiability(problem([view(first), view(second)], a=3, b=3))
    assert verdicts(result) == ["identified"] * 2


def test_a_sign_is_another_weight_for_means_but_not_for_covariances():
    eye = Identity((3,))
    views = [view({"a": eye, "b": eye}), view({"a": eye, "b": -1.0 * eye})]
    result = identifiability(problem(views, a=3, b=3))
    assert verdicts(result) == ["not identified"] * 2
    assert [s.mean_determined for s in result.sources] == [3, 3]


def test_means_can_be_confused_where_covariances_are_not():
    eye = Identity((2,))
    weights = [{"a": 1.0, "c": 1.0}, {"b": 1.0, "c": 1.0}, {"a": 1.0, "b": 1.0, "c": 2.0}]
    views = [view({k: w * eye for k, w in row.items()}) for row in weights]
    result = identifiability(problem(views, a=2, b=2, c=2))
    assert determined(result) == [(3, 3)] * 3
    assert [s.mean_determined for s in result.sources] == [0, 0, 0]
    assert verdicts(result) == ["not identified"] * 3
    (warning,) = result.warnings
    assert warning.startswith("sources 'a', 'b' and 'c': their means cannot be distinguished")


def test_random_projections_with_two_mixing_weights_identify_both(rng):
    matrix = lambda: Dense(rng.normal(size=(400, 3, 5)))
    first, second = matrix(), matrix()
    views = [
        view({"a": first, "b": 0.1 * first}, n=400),
        view({"a": 0.1 * second, "b": second}, n=400),
    ]
    result = identifiability(problem(views, a=5, b=5))
    assert verdicts(result) == ["identified"] * 2
    alone = identifiability(problem(views[:1], a=5, b=5))
    assert verdicts(alone) == ["not identified"] * 2
    contrast = [view({"a": second}, n=400), views[0]]
    assert verdicts(identifiability(problem(contrast, a=5, b=5))) == ["identified"] * 2


def test_a_fixed_projection_determines_what_it_sees(rng):
    fixed, varying = rng.normal(size=(3, 5)), rng.normal(size=(300, 3, 5))
    result = identifiability(problem([view({"x": Dense(fixed)})], x=5))
    assert determined(result) == [(6, 15)]
    assert result["x"].mean_determined == 3
    assert verdicts(result) == ["not identified"]
    assert "the views see only 6 of the 15 dimensions of its covariance" in result.warnings[0]
    result = identifiability(problem([view({"x": Dense(varying)}, n=300)], x=5))
    assert verdicts(result) == ["identified"]


def test_too_few_observations_of_random_projections_are_too_few(rng):
    matrix = rng.normal(size=(3, 1, 5))
    result = identifiability(problem([view({"x": Dense(matrix)}, n=3)], x=5))
    assert result["x"].mean_determined == 3
    # Three equations leave a kernel of 12 dimensions: 3 directions remain.
    assert determined(result) == [(3, 15)]


def test_co_observed_views_determine_the_covariance_between_them():
    left = Dense(np.eye(4)[:2])
    right = Dense(np.eye(4)[2:])
    apart = identifiability(problem([view({"x": left}), view({"x": right})], x=4))
    assert determined(apart) == [(6, 10)]
    together = [view({"x": left}, group="g"), view({"x": right}, group="g")]
    assert determined(identifiability(problem(together, x=4))) == [(10, 10)]


def test_co_observed_mixtures_with_other_weights_are_told_apart():
    eye = Identity((3,))
    pair = [view({"a": eye, "b": eye}, group="g"), view({"a": eye, "b": 2.0 * eye}, group="g")]
    assert verdicts(identifiability(problem(pair, a=3, b=3))) == ["identified"] * 2


def test_masks_that_are_shared_hide_entries():
    mask = np.array([1.0, 1, 0, 1])
    result = identifiability(problem([view({"x": Identity((4,))}, mask=mask)], x=4))
    assert determined(result) == [(6, 10)]
    assert result["x"].mean_determined == 3


def test_masks_that_vary_show_all_pairs_of_entries_in_turn():
    masks = np.array([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]])
    result = identifiability(problem([view({"x": Identity((4,))}, n=4, mask=masks)], x=4))
    # All variances, and the covariances of neighbours; those of (0, 2) and (1, 3) are never seen.
    assert determined(result) == [(8, 10)]
    assert result["x"].mean_determined == 4
    masks = np.concatenate([masks, [[1, 0, 1, 0], [0, 1, 0, 1]]])
    result = identifiability(problem([view({"x": Identity((4,))}, n=6, mask=masks)], x=4))
    assert verdicts(result) == ["identified"]


def test_masks_of_nan_and_of_co_observed_views(rng):
    y = np.where(rng.uniform(size=(300, 6)) < 0.5, np.nan, 0.0)
    op = {"x": Identity((6,))}
    views = [View(y, op, 1.0, "one", "nan", "g"), view(op, n=300, group="g")]
    assert verdicts(identifiability(problem(views, x=6))) == ["identified"]
    assert verdicts(identifiability(problem(views[:1], x=6))) == ["identified"]


def test_few_observed_entries_need_more_than_256_observations(rng):
    masks = rng.uniform(size=(4000, 24)) < 0.1
    result = identifiability(problem([view({"x": Identity((24,))}, n=4000, mask=masks)], x=24))
    assert result["x"].determined == result["x"].dimensions == 300


def test_sources_of_unequal_shapes(rng):
    block, dense = BlockAverage((4, 4), 2), Dense(rng.normal(size=(4, 3)), out_shape=(2, 2))
    mixed = {"big": block, "small": dense}
    alone = identifiability(problem([view(mixed), view({"small": dense})], big=(4, 4), small=3))
    # Four averages of the big source are seen, 10 of its 136 dimensions.
    assert determined(alone) == [(10, 136), (6, 6)]
    assert verdicts(alone) == ["not identified", "identified"]
    assert len(alone.warnings) == 1
    mixed_only = identifiability(problem([view(mixed)], big=(4, 4), small=3))
    assert determined(mixed_only) == [(4, 136), (0, 6)]
    seen, confused = mixed_only.warnings
    assert "only 10 of the 136 dimensions" in seen
    assert "'big' and 'small' cannot be distinguished" in confused
    assert "6 of 136 for 'big', 6 of 6 for 'small'" in confused


def test_a_source_that_is_barely_seen_is_weakly_identified():
    weak = Diagonal([1.0, 1.0, 3e-3])
    result = identifiability(problem([view({"x": weak})], x=3))
    assert verdicts(result) == ["weakly identified"]
    assert result["x"].condition == pytest.approx(1 / 9e-6, rel=1e-3)
    assert "weakly identified (condition number 1.1e+05)" in result.warnings[0]


def test_units_do_not_matter():
    eye = Identity((3,))
    views = [view({"a": 1e-6 * eye}), view({"a": 1e3 * eye, "b": 1e-3 * eye})]
    result = identifiability(problem(views, a=3, b=3))
    assert determined(result) == [(6, 6)] * 2


def direct(problem_, name):
    """The determined dimensions of a source, from the map formed entry by entry."""
    maps = []
    for views in problem_.views:
        obs = views.prepare()
        for i in range(obs.count):
            _, matrices, _ = jax.tree.map(lambda a: np.asarray(a, float), obs.one(i).system())
            columns = []
            for source in problem_.sources:
                d = int(np.prod(source.shape))
                a = matrices.get(source.name, np.zeros((obs.size, d)))
                for j in range(d):
                    for k in range(j, d):
                        e = np.zeros((d, d))
                        e[j, k] = e[k, j] = 1 if j == k else np.sqrt(0.5)
                        columns.append((a @ e @ a.T).ravel())
            maps.append(np.array(columns).T)
    _, s, vt = np.linalg.svd(np.concatenate(maps))
    rank = int(np.sum(s > 1e-6 * s[0]))
    sizes = [int(np.prod(x.shape)) * (int(np.prod(x.shape)) + 1) // 2 for x in problem_.sources]
    start = sum(sizes[: problem_.names.index(name)])
    block = vt[rank:, start : start + sizes[problem_.names.index(name)]]
    lost = np.linalg.matrix_rank(block, tol=1e-6) if block.size else 0
    return block.shape[1] - int(lost)


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_the_map_formed_entry_by_entry(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": 2, "b": 3, "c": (2, 2)}
    views = []
    for _ in range(4):
        n, m = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        seen = [k for k in shapes if rng.uniform() < 0.6] or ["a"]
        rows = (n,) if rng.uniform() < 0.5 else ()
        operators = {}
        for k in seen:
            size = int(np.prod(shapes[k]))
            operators[k] = Dense(rng.normal(size=(*rows, m, size)), in_shape=shapes[k])
        mask = (rng.uniform(size=(n, m)) < 0.8) | (np.arange(m) == 0)
        views.append(view(operators, n=n, mask=mask))
    views.append(
        view({k: Dense(np.ones((1, int(np.prod(s)))), in_shape=s) for k, s in shapes.items()})
    )
    stated = problem(views, **shapes)
    result = identifiability(stated)
    assert [s.determined for s in result.sources] == [direct(stated, k) for k in shapes]


# Beyond what is formed in full.


def test_a_probe_finds_the_same_operator_in_every_view():
    kernel = np.full((5, 5), 1 / 25)
    op = Convolve(kernel, shape=(32, 32))
    result = identifiability(problem([view({"a": op, "b": op})], a=(32, 32), b=(32, 32)))
    assert not result.exact
    assert verdicts(result) == ["not identified"] * 2
    assert [s.determined for s in result.sources] == [0, 0]
    assert "enter every view through the same operator" in result.warnings[0]
    assert "(probe)" in result.table()


def test_a_probe_of_contrastive_images_finds_nothing_wrong():
    blur = Convolve(np.outer([0.1, 0.8, 0.1], [0.1, 0.8, 0.1]), shape=(32, 32))
    result = identifiability(contrastive(blur, Identity((32, 32)), a=(32, 32), b=(32, 32)))
    assert verdicts(result) == ["identified"] * 2
    assert result.warnings == ()


def test_a_probe_counts_equations():
    few = Dense(np.random.default_rng(0).normal(size=(60, 1024)) / 32)
    result = identifiability(problem([view({"x": few})], x=1024))
    assert verdicts(result) == ["not identified"]
    assert (
        "its covariance has 524800 entries, but those of the views that see it only 1830"
        in (result.warnings[0])
    )


@pytest.mark.parametrize("small", [False, True])
def test_a_probe_counts_the_equations_of_sources_together(small):
    """One view cannot hold two covariances, in whatever directions a probe looks."""
    eye = Identity((32, 32))
    turned = FunctionOperator(lambda x: x.T, in_shape=(32, 32))
    line = Dense(np.random.default_rng(0).normal(size=(1024, 5)), out_shape=(32, 32))
    op = line if small else turned
    views = [view({"a": eye, "b": op})]
    result = identifiability(problem(views, a=(32, 32), b=op.in_shape))
    assert not result.identified
    assert result.short == (("a", "b"),)
    assert "'a' and 'b': their covariances have" in result.warnings[0]
    assert "only 524800: not all can be identified" in result.warnings[0]
    result = identifiability(problem([*views, view({"a": eye})], a=(32, 32), b=op.in_shape))
    assert result.identified
    assert (result.short, result.warnings) == ((), ())


def test_a_probe_sees_what_averages_hide():
    average = BlockAverage((32, 32), 2)
    result = identifiability(problem([view({"x": average}), view({"x": average})], x=(32, 32)))
    assert verdicts(result) == ["not identified"]
    assert result["x"].determined < result["x"].dimensions


def test_a_probe_with_operators_and_masks_per_observation(rng):
    amplitude = Scale((32, 32), rng.uniform(0.5, 1, size=300))
    shear = FunctionOperator(
        lambda x, p: p * x, in_shape=(32, 32), params=jnp.ones(300), per_observation=True
    )
    mask = rng.uniform(size=(300, 32, 32)) < 0.9
    views = [view({"a": amplitude}, n=300), view({"a": shear, "b": shear}, n=300, mask=mask)]
    result = identifiability(problem(views, a=(32, 32), b=(32, 32)))
    assert verdicts(result) == ["identified"] * 2


def test_many_small_sources_are_probed():
    eye = Identity((20,))
    names = [f"s{k}" for k in range(24)]
    views = [view({n: eye}) for n in names]
    result = identifiability(problem(views, **dict.fromkeys(names, 20)))
    assert not result.exact
    assert result.identified


def test_two_sources_of_64_entries_are_done_in_full_and_fast():
    start = time.monotonic()
    result = identifiability(contrastive(Identity((64,)), a=64, b=64))
    assert time.monotonic() - start < 10
    assert result.exact
    assert determined(result) == [(2080, 2080)] * 2


def test_the_table_has_a_row_per_source():
    table = identifiability(contrastive(Identity((2,)), a=2, b=2)).table()
    header, _, *rows = table.splitlines()
    assert header.split() == ["source", "verdict", "covariance", "mean", "condition"]
    assert rows[0].split()[:2] == ["a", "identified"]
    assert "3 of 3" in rows[1]


def test_the_seed_decides(rng):
    stated = problem([view({"x": Dense(rng.normal(size=(600, 1, 8)))}, n=600)], x=8)
    first, second = (identifiability(stated, seed=3) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("count", "few"), [(39, ["a", "b"]), (40, ["b"]), (79, ["b"]), (80, [])])
def test_too_few_observations_for_the_numbers_of_a_source_are_said(count, few):
    """Ten for each entry; co-observed views count once."""
    y = np.random.default_rng(0).normal(size=(count, 8))
    both = {"a": Identity((8,)), "b": Identity((8,))}
    views = [
        View(y, {"a": Identity((8,))}, 0.1, name="alone"),
        View(y, both, 0.1, name="one", group="pair"),
        View(y, both, 0.2, name="other", group="pair"),
    ]
    problem = Problem([Source("a", (8,)), Source("b", (8,))], views)
    found = [words for words in scarcity(problem) if words.startswith("source")]
    assert [words.split("'")[1] for words in found] == few
    assert all(f"{count:,} observations for 8 entries" in words for words in found[-1:])


def seeing(n, operators, name, **kwargs):
    return view({k: g * Identity((8,)) for k, g in operators.items()}, n=n, name=name, **kwargs)


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ([(12, {"a": 1}), (900, {"a": 1, "b": 1})], ["'a' is distinguished from 'b' by view 'v0' only, which has 12 "]),
        ([(80, {"a": 1}), (900, {"a": 1, "b": 1})], []),
        # Views that tell the same count together.
        ([(20, {"a": 1}), (25, {"a": 2}), (900, {"a": 1, "b": 1})], ["by views 'v0' and 'v1' only, which have 45 "]),
        ([(40, {"a": 1}), (40, {"a": 2}), (900, {"a": 1, "b": 1})], []),
        # One of two that are seen alone is enough.
        ([(12, {"a": 1}), (900, {"b": 1}), (900, {"a": 1, "b": 1})], []),
        # Weights that differ, in two views and in three.
        ([(12, {"a": 1, "b": 0.1}), (900, {"a": 0.1, "b": 1})], ["'a' and 'b' are distinguished by view 'v0' only"]),
        ([(12, {"a": 1, "b": 0.1}), (900, {"a": 0.1, "b": 1}), (900, {"a": 1, "b": 1})], []),
        # Source by source.
        (
            [(12, {"a": 1}), (20, {"a": 1, "b": 1}), (900, {"a": 1, "b": 1, "c": 1})],
            ["'a' is distinguished from 'b' by view 'v0'", "'a' and 'b' are distinguished from 'c' by views 'v0' and 'v1' only"],
        ),
    ],
)  # fmt: skip
def test_few_observations_that_tell_sources_apart_are_said(views, said):
    views = [seeing(n, operators, f"v{i}") for i, (n, operators) in enumerate(views)]
    names = sorted({name for v in views for name in v.operators})
    found = scarcity(problem(views, **dict.fromkeys(names, 8)))
    assert len(found) == len(said)
    assert all(text in words for text, words in zip(said, found))


def test_few_co_observed_observations_that_tell_sources_apart_are_said():
    pair = [
        seeing(60, {"a": 1}, "one", group="g"),
        seeing(60, {"a": 1, "b": 1}, "other", group="g"),
    ]
    (words,) = scarcity(problem([*pair, seeing(900, {"a": 1, "b": 1}, "mixed")], a=8, b=8))
    assert (
        "distinguished by view 'one+other' only, which has 60 observations for 8 entries" in words
    )


def test_few_observations_of_what_other_views_do_not_see_are_said():
    half_seen = seeing(900, {"a": 1}, "half", mask=np.arange(8) < 4)
    (words,) = scarcity(problem([seeing(12, {"a": 1}, "whole"), half_seen], a=8))
    assert words.startswith(
        "source 'a': 26 dimensions of its covariance are seen by view 'whole' only"
    )


def test_a_stationary_source_needs_ten_observations_to_be_told_apart():
    mixed = seeing(900, {"a": 1, "b": 1}, "mixed")
    few, enough = (problem([seeing(n, {"a": 1}, "v"), mixed], a=8, b=8) for n in (9, 10))
    (words,) = scarcity(few, ["a"])
    assert "by view 'v' only, which has 9 observations; with fewer than 10 intervals" in words
    assert scarcity(enough, ["a"]) == ()


def test_many_views_of_one_observation_each_count_together(rng):
    views = [view({"x": Dense(rng.normal(size=(6, 8)))}, n=1, name=f"v{i}") for i in range(90)]
    assert scarcity(problem(views, x=8)) == ()
