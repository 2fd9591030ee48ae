"""Operators are what they claim: linear, with their adjoint, other than zero; what is not is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from test_operators import EVERY

from dichroic import DataError, Problem, Source, View, load_problem, load_view
from dichroic.cli.main import main
from dichroic.operators import (
    Convolve,
    Dense,
    Diagonal,
    FunctionOperator,
    Identity,
    Learnable,
    Operator,
    PatchPlacement,
    Scale,
    Zero,
)
from dichroic.operators.linearity import brought, is_zero, probe, zero_rows
from dichroic.problem.identifiability import advice

D = 24
KERNEL = np.random.default_rng(0).normal(size=30).astype(np.float32)
SCALED = np.random.default_rng(1).normal(size=(D, D)) * 10.0 ** np.arange(-20, 28, 2)[:, None]
HILBERT = 1 / (np.arange(9)[:, None] + np.arange(9) + 1.0)


def decay(x):
    step = lambda c, a: (0.9 * c + a, 0.9 * c + a)
    return jax.lax.scan(step, jnp.zeros((), jnp.float32), x)[1]


def delay(x):
    return jnp.fft.ifft(jnp.fft.fft(x) * jnp.exp(-2j * jnp.pi * jnp.fft.fftfreq(D) * 3.3)).real


def long_convolution(x):
    return jnp.fft.irfft(jnp.fft.rfft(x, 8192) * jnp.fft.rfft(KERNEL, 8192), 8192)[:5000]


LINEAR = {
    "cumsum": (jnp.cumsum, D),
    "spectrum": (lambda x: jnp.concatenate([f(jnp.fft.rfft(x)) for f in (jnp.real, jnp.imag)]), D),
    "long-convolution": (long_convolution, 5000),
    "rows-of-all-sizes": (lambda x: jnp.asarray(SCALED, jnp.float32) @ x, D),
    "entries-1e20": (lambda x: 1e20 * x, D),
    "entries-1e-20": (lambda x: 1e-20 * x, D),
    "fixed-mask": (lambda x: jnp.where(jnp.arange(D) % 3 == 0, x, 0), D),
    "float64-closure": (lambda x: np.arange(D) / 7.0 * x, D),
    "whole-numbers": (lambda x: 3 * x, D),
    "ill-conditioned": (lambda x: jnp.linalg.solve(jnp.asarray(HILBERT, jnp.float32), x), 9),
    "less-its-mean": (lambda x: x - x.mean(), D),
    "scan": (decay, D),
    "delay": (delay, D),
    "interpolation": (lambda x: jnp.interp(jnp.linspace(0, D - 1, 9), jnp.arange(D), x), D),
}
NOT_LINEAR = {
    "clip": (lambda x: jnp.clip(x, 0, 1.5), r"A\(2 x\) differs from 2 A\(x\) by \d+.*not linear"),
    "full-well": (lambda x: jnp.clip(x, -1e5, 1e5), "1.07e.09 x.*not linear"),
    "relu": (jax.nn.relu, r"A\(-x\) differs from -A\(x\)"),
    "absolute": (jnp.abs, r"A\(-x\) differs from -A\(x\) by 200%"),
    "power": (lambda x: jnp.abs(jnp.fft.rfft(x)) ** 2, "by 100%.*not linear"),
    "tanh": (lambda x: 1e4 * jnp.tanh(x / 1e4), "1.02e.03 x"),
    "expm1": (jnp.expm1, "not linear"),
    "absorption": (lambda x: jnp.exp(-x), r"A\(0\) is not 0 \(up to 1, at entry \(0,\)\)"),
    "pedestal": (lambda x: x + 5.0, "A.0. is not 0 .up to 5.*take the constant off the observ"),
    "small-pedestal": (
        lambda x: x.at[3].add(1e-6),
        r"A\(0\) is not 0 \(up to 1e-06, at entry \(3,",
    ),
    "rounded": (lambda x: jnp.round(x * 1e4) / 1e4, "not linear"),
    "soft-threshold": (lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 1e-4, 0), "not linear"),
    "modulus": (lambda x: jnp.mod(x, 65536.0), "not linear"),
    "sorted": (jnp.sort, "not linear"),
    "median": (lambda x: x - jnp.median(x), r"A\(x \+ y\) differs from A\(x\) \+ A\(y\) by"),
    "one-entry": (lambda x: x.at[-1].set(jnp.clip(x[-1], -10, 10)), r"entry \(23,\)"),
    "small-entries": (lambda x: jnp.concatenate([1e8 * x, jnp.clip(x, 0, 1)]), "not linear"),
    "slightly": (lambda x: x + 1e-5 * x**2, "not linear"),
    "normalised": (lambda x: x / jnp.linalg.norm(x), r"A\(0\) is nan, at entry \(0,\)"),
    "infinite": (lambda x: x * jnp.inf, r"A\(0\) is nan"),
    "random": (lambda x: x * np.random.default_rng().normal(), "from one call to another"),
    "loop": (
        lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1],
        "JAX cannot derive its transpose .ValueError",
    ),
}


@pytest.mark.parametrize(("fn", "size"), LINEAR.values(), ids=LINEAR.keys())
def test_what_is_linear_passes(fn, size):
    probe(FunctionOperator(fn, in_shape=size), "view 'v'")


@pytest.mark.parametrize(("fn", "why"), NOT_LINEAR.values(), ids=NOT_LINEAR.keys())
def test_what_is_not_linear_is_refused_with_its_view_and_source(fn, why):
    size = jax.eval_shape(fn, jax.ShapeDtypeStruct((D,), jnp.float32)).shape
    view = View(np.zeros((3, *size)), {"x": FunctionOperator(fn, in_shape=D)}, 1.0, name="v")
    with pytest.raises(DataError, match=f"view 'v', source 'x': FunctionOperator .*{why}"):
        Problem([Source("x", D)], [view])


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
def test_operators_of_this_package_are_as_they_say(make):
    """Also if they are probed as those of users are."""
    op = make()
    whole = type("Brought", (CustomDenoiser,), {})(op)
    probe(whole, "v")


class CustomDenoiser(Operator):
    """An operator of a user's own."""

    operator: Operator

    @property
    def in_shape(self):
        return self.operator.in_shape

    @property
    def out_shape(self):
        return self.operator.out_shape

    def mv(self, x: Array) -> Array:
        return self.operator.mv(x)

    def rmv(self, y: Array) -> Array:
        return self.operator.rmv(y)

    def as_matrix(self) -> Array:
        return self.operator.as_matrix()


class Backwards(CustomDenoiser):
    """With the same kernel in the adjoint, which is not the adjoint."""

    def rmv(self, y: Array) -> Array:
        return self.operator.mv(y)


class Transposed(CustomDenoiser):
    def as_matrix(self) -> Array:
        return self.operator.as_matrix().T


def test_an_adjoint_or_a_matrix_of_another_operator_is_refused():
    blur = Convolve(np.array([1.0, 2.0, 4.0]), shape=8)
    with pytest.raises(DataError, match=r"Backwards: <A x, y> = .*rmv is not the adjoint of mv"):
        probe(Backwards(blur), "v")
    with pytest.raises(DataError, match=r"as_matrix\(\) @ x differs from mv\(x\)"):
        probe(Transposed(blur), "v")


def test_parts_are_found_in_compositions_and_each_observation_has_its_own():
    clip = FunctionOperator(
        lambda x, top: jnp.minimum(x, top), in_shape=4, params=np.full(9, 1e7), per_observation=True
    )
    op = Learnable(Scale((4,), 2.0), "g") @ (Dense(np.eye(4)) @ clip + Identity(4))
    assert brought(op) == [clip]
    with pytest.raises(DataError, match="observation 0: FunctionOperator .*not linear"):
        probe(op, "v")


def test_the_probe_can_be_left_out_by_name(tmp_path, capsys):
    op = FunctionOperator(lambda x: jnp.clip(x, 0, 1), in_shape=D)
    Problem([Source("x", D)], [View(np.zeros((3, D)), {"x": op}, 1.0, probe=False)])
    text = "sources: {x: 2}\nviews:\n  v: {observations: [[1, 2], [2, 1]], operators: {x: {diagonal: [0, 0]}}, noise: 1"
    file = tmp_path / "problem.yaml"
    file.write_text(text + "}\n")
    with pytest.raises(
        DataError, match="view 'v': the operator of 'x' is zero; give Zero, or none"
    ):
        load_problem(file)
    assert main(["check", str(file)]) == 2
    load_problem(file, probe=False)
    assert main(["check", str(file), "--no-probe"]) == 0
    file.write_text(text + ", probe: false}\n")
    problem, _ = load_problem(file, stored=True)
    assert not problem.view("v").probe
    view = {"observations": np.ones((1, 2)), "operators": {"x": {"scale": 0.0}}}
    assert load_view(view, problem).probe
    assert not load_view(view, problem, probe=False).probe
    file.write_text(text + ", probe: 3}\n")
    assert main(["check", str(file)]) == 2
    assert "probe: expected true or false, got 3" in capsys.readouterr().err


# Operators that are zero.


def test_observations_for_which_an_operator_is_zero_are_counted(rng):
    offset = rng.integers(0, 3, (160, 2))
    offset[:80] += 400
    placed = lambda offset: {"g": PatchPlacement((2, 2), (4, 4), offset)}
    assert np.array_equal(zero_rows(placed(offset)["g"]), np.arange(160) < 80)
    view = View(rng.normal(size=(160, 4, 4)), placed(offset), 0.1)
    problem = Problem([Source("g", (2, 2))], [view])
    said = "view 'view1': the operator of 'g' is zero for 80 of 160 observations: offsets outside"
    assert any(s.startswith(said) for s in advice(problem))
    with pytest.raises(DataError, match="of 'g' is zero for all 80 observations: offsets outside"):
        Problem([Source("g", (2, 2))], [View(np.zeros((80, 4, 4)), placed(offset[:80]), 0.1)])


def test_what_is_zero_and_what_is_not():
    assert is_zero(Dense(np.zeros((2, 3)))) and is_zero(Zero(2, 3))
    assert not is_zero(Dense(1e-20 * np.eye(3)))
    assert is_zero(Dense(np.eye(4)[:2]) @ Diagonal([0, 0, 1, 1]))
    assert not is_zero(Learnable(Scale((2,), 0.0), "gain"))  # which starts there
    few = np.zeros((100, 2, 3))
    assert is_zero(Dense(few))
    few[41] = 1
    assert not is_zero(Dense(few)) and zero_rows(Dense(few)).sum() == 99
