from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from rounding import DTYPES, tolerance

from jaxlm.nn.recurrent import BiLstm, Lstm, lstm

BATCH, LENGTH, EMBED, STATE = 3, 6, 5, 4
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(BATCH, LENGTH, EMBED)))


def variables_of(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(X))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape)), shapes)


MODULE = BiLstm(STATE)
VARIABLES = variables_of(MODULE)


@partial(jax.jit, static_argnames="dtype")
def run(x, segment_ids=None, dtype="float32"):
    return BiLstm(STATE, jnp.dtype(dtype)).apply(VARIABLES, x, segment_ids).astype(jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(params, x):
    """One row, one direction, the equations one after the other."""
    flat = {path: np.float64(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    h, c, found = np.zeros(STATE), np.zeros(STATE), []
    for step in x:
        gates = np.einsum("e,egs->gs", step, flat["input/kernel"]) + flat["input/bias"]
        i, f, g, o = gates + np.einsum("s,sgt->gt", h, flat["recurrent_kernel"])
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        found.append(h)
    return np.stack(found)


def test_by_hand():
    hidden = run(X)
    for row, x in enumerate(X):
        forward = by_hand(VARIABLES["params"]["forward"], x)
        backward = by_hand(VARIABLES["params"]["backward"], x[::-1])[::-1]
        np.testing.assert_allclose(hidden[row], np.hstack([forward, backward]), atol=1e-5)


def test_equals_flax():
    module = Lstm(STATE)
    variables = variables_of(module)
    params = variables["params"]
    theirs = {}
    for gate, name in enumerate("ifgo"):
        bias = params["input"]["bias"][gate] + (name == "f")  # our forget gate has 1 built in
        theirs[f"i{name}"] = {"kernel": params["input"]["kernel"][:, gate]}
        theirs[f"h{name}"] = {"kernel": params["recurrent_kernel"][:, gate], "bias": bias}
    exact = jax.jit(nn.RNN(nn.OptimizedLSTMCell(STATE)).apply)
    exact = exact({"params": {"cell": theirs}}, jnp.asarray(X))
    np.testing.assert_allclose(jax.jit(module.apply)(variables, jnp.asarray(X)), exact, atol=1e-5)


def test_the_gradient_is_that_of_the_plain_loop():
    gates = jnp.float32(RNG.normal(size=(LENGTH, BATCH, 4, STATE)))
    kernel = jnp.float32(RNG.normal(size=(STATE, 4, STATE)))
    continues = jnp.asarray(RNG.random((LENGTH, BATCH)) < 0.7)
    weights = jnp.float32(RNG.normal(size=(LENGTH, BATCH, STATE)))

    def gradient(function):
        def total(gates, kernel, continues):
            return jnp.sum(jnp.sin(function(gates, kernel, continues)) * weights)

        return jax.jit(jax.grad(total, argnums=(0, 1)))

    ours = gradient(lstm)(gates, kernel, continues)
    plain = gradient(lstm.plain)(gates, kernel, continues)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # The control: it is felt where the state starts again.
    other = gradient(lstm)(gates, kernel, continues | True)
    assert all(np.abs(a - b).max() > 0.01 for a, b in zip(ours, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_changes_nothing(dtype):
    lengths = np.array([LENGTH, 3, 1])
    real = np.arange(LENGTH)[None] < lengths[:, None]
    noise = np.where(real[..., None], X, 9)
    segments = np.where(real, 0, -1)
    hidden, limit = run(noise, segments, dtype), tolerance(dtype, depth=LENGTH)
    for row, length in enumerate(lengths):
        alone = run(X[row : row + 1, :length], dtype=dtype)
        np.testing.assert_allclose(hidden[row, :length], alone[0], rtol=0, atol=limit)
    # The control: told nothing of the end, the backward direction starts behind it.
    assert np.abs(run(noise, dtype=dtype)[1, :3] - hidden[1, :3]).max() > 4 * limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_rows_do_not_mix(dtype):
    segments = np.array([[0, 0, 0, 0, 1, 1]] * BATCH)
    packed, limit = run(X, segments, dtype), tolerance(dtype, depth=LENGTH)
    apart = [run(x, dtype=dtype) for x in (X[:, :4], X[:, 4:])]
    apart = np.concatenate(apart, axis=1)
    np.testing.assert_allclose(packed, apart, rtol=0, atol=limit)
    assert np.abs(run(X, dtype=dtype) - apart).max() > 4 * limit  # the control


def test_both_directions_reach_every_position():
    @jax.jit
    def reach(x):
        def total(x, place):
            return jnp.sum(MODULE.apply(VARIABLES, x)[:, place])

        return [jnp.abs(jax.grad(total)(x, place)).max((0, 2)) for place in (0, LENGTH - 1)]

    assert np.min(reach(X)) > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_are_float32_and_outputs_are_not_bound_to_be(dtype):
    module = BiLstm(STATE, dtype)
    hidden = jax.jit(module.apply)(VARIABLES, jnp.asarray(X))
    assert hidden.dtype == dtype
    np.testing.assert_allclose(np.float32(hidden), run(X), atol=0.05)
    made = jax.jit(module.init)(jax.random.key(0), jnp.asarray(X))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    kernel = made["params"]["forward"]["recurrent_kernel"].reshape(STATE, -1)
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(STATE), atol=1e-5)  # orthogonal
