"""Matrices, sparse matrices, linear operators and NumPy functions as operators: one adaptor, their own adjoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from dichroic import DataError, Problem, Separator, ShapeError, Source, View, as_operator
from dichroic.operators import Dense, External, FunctionOperator, Identity, Sparse
from dichroic.operators.linearity import probe
from dichroic.runtime.fingerprint import fingerprint

KERNEL = np.array([0.5, 1.0, 0.25])


def blur_matrix(size):
    return scipy.sparse.csr_array(sum(k * np.eye(size - 1, size, i) for i, k in enumerate(KERNEL)))


class Like:
    """As pylops has it: no class of SciPy, products of vectors of one axis."""

    def __init__(self, matrix, dtype=np.float64):
        self.matrix, self.shape, self.dtype = (
            np.asarray(matrix, dtype),
            matrix.shape,
            np.dtype(dtype),
        )

    def matvec(self, x):
        assert x.ndim == 1
        return self.matrix @ x

    def rmatvec(self, y):
        assert y.ndim == 1
        return self.matrix.T @ y


def convolved(x):
    return np.convolve(x, KERNEL)


def correlated(y):
    return np.correlate(y, KERNEL, "valid")


FEW = np.random.default_rng(0).normal(size=(5, 12)) * (np.arange(60).reshape(5, 12) % 3 == 0)
MATRIX = scipy.sparse.csr_array(FEW)
BROUGHT = {
    "sparse-array": (lambda: as_operator(MATRIX), MATRIX, Sparse),
    "sparse-matrix": (
        lambda: as_operator(scipy.sparse.csc_matrix(MATRIX), in_shape=(3, 4)),
        MATRIX,
        Sparse,
    ),
    "linear-operator": (lambda: as_operator(aslinearoperator(MATRIX)), MATRIX, External),
    "like-pylops": (
        lambda: as_operator(Like(MATRIX.todense()), in_shape=(4, 3), out_shape=(1, 5)),
        MATRIX,
        External,
    ),
    "array": (lambda: as_operator(MATRIX.toarray()), MATRIX, Dense),
    "function": (lambda: as_operator(jnp.cumsum, in_shape=4), np.tri(4), FunctionOperator),
    "function-of-numpy": (
        lambda: as_operator(convolved, in_shape=4, adjoint=correlated),
        np.array([np.convolve(e, KERNEL) for e in np.eye(4)]).T,
        External,
    ),
}


@pytest.mark.parametrize(("make", "matrix", "kind"), BROUGHT.values(), ids=BROUGHT.keys())
def test_what_is_brought_is_an_operator_with_its_own_adjoint(make, matrix, kind, rng):
    op = make()
    dense = matrix.toarray() if scipy.sparse.issparse(matrix) else matrix
    assert type(op) is kind
    probe(op, "v")
    assert np.allclose(op.as_matrix(), dense)
    x, y = (jnp.asarray(rng.normal(size=(3, *s)), float) for s in (op.in_shape, op.out_shape))
    assert np.allclose(op.each(x).reshape(3, -1), x.reshape(3, -1) @ dense.T, atol=1e-5)
    adjoint = y.reshape(3, -1) @ dense
    assert np.allclose(jax.jit(jax.vmap(op.rmv))(y).reshape(3, -1), adjoint, atol=1e-5)
    assert np.allclose(jax.linear_transpose(op.mv, x[0])(y[0])[0].ravel(), adjoint[0], atol=1e-5)
    assert np.allclose(jax.jvp(op.mv, (x[0],), (x[1],))[1], op.mv(x[1]), atol=1e-5)
    if kind is Sparse:
        assert np.allclose(op.row_squares().ravel(), (dense**2).sum(axis=1), atol=1e-5)


def test_entries_that_are_given_twice_are_added():
    twice = scipy.sparse.coo_array(([1.0, 2.0], ([0, 0], [1, 1])), shape=(2, 3))
    assert np.allclose(Sparse(twice).as_matrix(), [[0, 3, 0], [0, 0, 0]])
    assert np.allclose(Sparse(twice).row_squares(), [9, 0])


def test_a_fingerprint_depends_on_what_an_operator_outside_of_jax_does():
    prints = {fingerprint(as_operator(aslinearoperator(s * MATRIX))) for s in (1.0, 1.0, 1.01)}
    assert len(prints) == 2


WRONG = {
    "no-adjoint": (
        lambda: as_operator(LinearOperator((5, 12), matvec=lambda x: MATRIX @ x)),
        DataError,
        r"adjoint of A is not there.*rmatvec=…",
    ),
    "numpy": (
        lambda: FunctionOperator(lambda x: np.convolve(x, KERNEL), in_shape=4),
        DataError,
        r"Function '<lambda>' needs the values .*as_operator\(function, adjoint=…, in_shape=…\)",
    ),
    "numpy-alone": (
        lambda: as_operator(convolved, in_shape=4),
        DataError,
        "'convolved' needs the values",
    ),
    "no-shape": (lambda: as_operator(convolved), ShapeError, "in_shape=…"),
    "complex": (
        lambda: as_operator(Like(np.eye(2), complex)),
        DataError,
        "stack the real and the imag",
    ),
    "complex-products": (
        lambda: as_operator(np.fft.rfft, in_shape=4, adjoint=np.fft.irfft),
        DataError,
        "of type complex128; expected real",
    ),
    "other-shape": (
        lambda: as_operator(MATRIX, in_shape=(3, 3)),
        ShapeError,
        r"5 × 12 matrix cannot map \(3, 3\)",
    ),
    "adjoint-of-other-shape": (
        lambda: as_operator(convolved, in_shape=4, adjoint=lambda y: y),
        ShapeError,
        r"adjoint of A has shape \(6,\); expected \(4,\)",
    ),
    "fails": (
        lambda: as_operator(Like(np.ones((2, 2))), in_shape=4),
        ShapeError,
        r"2 × 2 operator cannot map \(4,\)",
    ),
    "masked": (
        lambda: as_operator(np.ma.masked_invalid(np.eye(2))),
        DataError,
        "masked array as an operator",
    ),
    "number": (
        lambda: as_operator(3.0),
        DataError,
        "an operator of type float; expected one such as",
    ),
}


@pytest.mark.parametrize(("make", "error", "why"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_an_operator_is_refused_with_what_to_give(make, error, why):
    with pytest.raises(error, match=why):
        make()


def test_a_wrong_adjoint_of_another_library_is_found():
    wrong = LinearOperator((5, 5), matvec=np.cumsum, rmatvec=np.cumsum)
    with pytest.raises(
        DataError, match="view 'v', source 'x': External: <A x, y> = .*not the adjoint"
    ):
        Problem([Source("x", 5)], [View(np.zeros((3, 5)), {"x": wrong}, 1.0, name="v")])


@pytest.mark.parametrize("shape", [(6,), (10, 13)], ids=["few-entries", "many-entries"])
def test_a_fit_is_that_with_the_matrix(shape, rng):
    """With all that is needed: EM by matrices or by products, and exact draws."""
    size = int(np.prod(shape))
    sparse = blur_matrix(size)
    x = rng.normal(size=(60, 2)) @ rng.normal(size=(2, size))
    y = x @ sparse.toarray().T + 0.1 * rng.normal(size=(60, size - 1))
    settings = {
        "mixture": {
            "components": 1,
            "gaussian_iterations": 3,
            "iterations": 1,
            "final_iterations": 1,
            "steps": 5,
        },
        "diffusion": {"iterations": 0},
    }

    def mean(op):
        views = [
            View(x.reshape(60, *shape), {"x": Identity(shape)}, 0.1, name="alone"),
            View(y, {"x": op}, 0.1, name="blurred"),
        ]
        separator = Separator(Problem([Source("x", shape)], views), settings).fit(progress=False)
        new = View(y[:5], {"x": op}, 0.1)
        whole = separator.separate(new, n_draws=2)
        for first, part in separator.stream(new, n_draws=2, chunk=3):
            assert np.array_equal(part.draws["x"], whole.draws["x"][:, first : first + 3])
        twin = separator.with_sources({"twin": "x"})
        assert np.array_equal(
            twin.separate(View(y[:5], {"twin": op}, 0.1), n_draws=2).draws["twin"], whole.draws["x"]
        )
        clip = FunctionOperator(lambda x: jnp.clip(x.ravel()[1:], 0, 1), in_shape=shape)
        with pytest.raises(DataError, match="source 'twin': FunctionOperator .*not linear"):
            twin.separate(View(y[:5], {"twin": clip}, 0.1))
        return whole.mean["x"]

    dense = mean(sparse.toarray())
    assert dense.shape == (5, *shape)
    for op in (aslinearoperator(sparse), sparse)[: 1 if size < 128 else 2]:
        assert np.allclose(mean(op), dense, atol=2e-3 * np.abs(dense).max()), np.abs(
            mean(op) - dense
        ).max()
