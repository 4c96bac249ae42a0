from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import DTYPES, tolerance

from jaxlm.nn import masks
from jaxlm.nn.attention import MultiHeadAttention, dot_product_attention, grouped_attention

LOG = np.log


def one_head(*rows):
    return jnp.asarray(np.array(rows, np.float32))[None, :, None, :]  # [1, length, 1, head_dim]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Two positions, head_dim 4, so the scores are halved: q·k/2 is log 3 for (0, 0) and 0 elsewhere.
QUERY = one_head([2, 0, 0, 0], [0, 0, 0, 0])
KEY = one_head([LOG(3), 0, 0, 0], [0, 0, 0, 0])
VALUE = one_head([1, 0, 2, 0], [5, 4, 0, 0])


def attend(**options):
    return np.asarray(dot_product_attention(QUERY, KEY, VALUE, **options))[0, :, 0]


def test_two_by_two_by_hand():
    # Weights (3/4, 1/4) and (1/2, 1/2).
    expected = [[2, 1, 1.5, 0], [3, 2, 1, 0]]
    np.testing.assert_allclose(attend(), expected, atol=1e-6)


def test_bias_is_added_to_the_scores():
    bias = jnp.asarray(np.array([[0, LOG(3)], [LOG(7), 0]], np.float32))[None, None]
    # Weights (1/2, 1/2) and (7/8, 1/8): the bias is not scaled by head_dim.
    np.testing.assert_allclose(attend(bias=bias), [[3, 2, 1, 0], [1.5, 0.5, 1.75, 0]], atol=1e-6)


def test_mask_says_who_may_attend():
    mask = jnp.asarray(np.array([[True, False], [True, True]]))[None, None]
    np.testing.assert_allclose(attend(mask=mask), [[1, 0, 2, 0], [3, 2, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(attend(mask=~mask)[0], [5, 4, 0, 0], atol=1e-6)


def test_a_row_that_sees_nothing_is_finite():
    mask = jnp.asarray(np.array([[False, False], [True, True]]))[None, None]

    @jax.jit
    def both(q, k, v):
        def total(q, k, v):
            return jnp.sum(jnp.square(dot_product_attention(q, k, v, mask=mask)))

        out = dot_product_attention(q, k, v, mask=mask)
        return out, jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    out, gradients = both(QUERY, KEY, VALUE)
    np.testing.assert_allclose(out[0, 0, 0], VALUE[0, :, 0].mean(0), atol=1e-6)
    assert all(np.isfinite(g).all() for g in gradients)
    assert float(jnp.abs(gradients[2]).max()) > 0
    # The control: a mask of minus infinity, the usual way to write it, is not finite.
    infinite = dot_product_attention(QUERY, KEY, VALUE, bias=jnp.where(mask, 0, -jnp.inf))
    assert np.isnan(infinite[0, 0]).all()


def test_dropped_weights():
    # With the identity as values, the outputs are the weights.
    length = 64
    query, key = normal(1, length, 1, length), normal(1, length, 1, length, seed=1)
    value = jnp.asarray(np.eye(length, dtype=np.float32))[None, :, None, :]
    plain = np.asarray(dot_product_attention(query, key, value, dropout_rate=0.5))
    dropped = np.asarray(
        dot_product_attention(query, key, value, dropout_rate=0.5, dropout_key=jax.random.key(0))
    )
    np.testing.assert_allclose(plain.sum(-1), 1, atol=1e-5)
    assert (dropped == 0).mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(dropped[dropped > 0], 2 * plain[dropped > 0], rtol=1e-6)


def test_bfloat16_keeps_its_softmax_in_float32():
    operands = [normal(2, 16, 2, 8, seed=seed).astype(jnp.bfloat16) for seed in range(3)]
    low = dot_product_attention(*operands)
    exact = dot_product_attention(*(x.astype(jnp.float32) for x in operands))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low, np.float32), exact, atol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_the_gradient_equals_that_of_the_equation(dtype, tolerance):
    operands = [normal(2, 7, 3, 8, seed=seed).astype(dtype) for seed in range(3)]
    # One row sees nothing: no gradient reaches its scores. The bias is shared by rows and queries.
    mask = masks.padding(jnp.array([7, 4]), 7) & (jnp.arange(7) != 2)[None, None, :, None]
    bias, cotangent = normal(1, 3, 1, 7, seed=3).astype(dtype), normal(2, 7, 3, 8, seed=4)

    @jax.jit
    def both(operands, bias):
        def gradient(attention, operands, bias):
            def total(operands, bias):
                options = {"mask": mask, "bias": bias, "dropout_rate": 0.3}
                out = attention(*operands, **options, dropout_key=jax.random.key(0))
                return jnp.sum(out.astype(jnp.float32) * cotangent)

            return jax.grad(total, argnums=(0, 1))(operands, bias)

        exact = jax.tree.map(lambda x: x.astype(jnp.float32), (operands, bias))
        plain = gradient(dot_product_attention.plain, *exact)
        return gradient(dot_product_attention, operands, bias), plain

    ours, plain = both(operands, bias)
    assert {g.dtype for g in jax.tree.leaves(ours)} == {jnp.dtype(dtype)}
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        scale = float(jnp.abs(expected).max())
        assert scale > 0.1
        np.testing.assert_allclose(
            np.asarray(got, np.float32), expected, rtol=0, atol=tolerance * scale
        )


# The module: 6 positions, 2 heads.
X = normal(2, 6, 8)
ATTENTION = MultiHeadAttention(num_heads=2, head_dim=3)
LOW = MultiHeadAttention(num_heads=2, head_dim=3, dtype=jnp.dtype("bfloat16"))


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(ATTENTION.init, jax.random.key(0), X)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten(
        [0.5 * normal(*leaf.shape, seed=seed) for seed, leaf in enumerate(leaves)]
    )


@partial(jax.jit, static_argnames="module")
def value_and_gradient(params, x, mask, bias, segment_ids, weights, module=ATTENTION):
    """The output, and the gradient of a nonlinear sum of the positions with weight."""

    def total(params, x):
        out = module.apply({"params": params}, x, mask=mask, bias=bias, segment_ids=segment_ids)
        out = out.astype(jnp.float32)
        return jnp.sum(jnp.sin(out) * weights[..., None]), out

    gradients, out = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
    return out, gradients


def test_the_module_equals_its_equation(params):
    bias = normal(1, 2, 6, 6, seed=9)
    mask = masks.padding(jnp.array([6, 4]), 6)
    out, _ = value_and_gradient(params, X, mask, bias, None, jnp.ones((2, 6)))
    params = jax.tree.map(np.asarray, params)

    def project(name):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        return np.einsum("ble,ehd->bhld", X, kernel) + bias[None, :, None, :]

    scores = np.einsum("bhqd,bhkd->bhqk", project("query"), project("key")) / np.sqrt(3)
    scores = np.where(np.asarray(mask), scores + np.asarray(bias), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bhqk,bhkd->bqhd", weights, project("value"))
    expected = np.einsum("bqhd,hde->bqe", heads, params["out"]["kernel"]) + params["out"]["bias"]
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_parameters_have_their_real_axes(params):
    shapes = {name: params[name]["kernel"].shape for name in params}
    assert shapes == {"query": (8, 2, 3), "key": (8, 2, 3), "value": (8, 2, 3), "out": (2, 3, 8)}


@pytest.mark.parametrize("module", [ATTENTION, LOW], ids=DTYPES)
def test_packed_equals_unpacked(params, module):
    # Documents of 4 and 2 positions: in one row, and in two padded ones.
    apart = np.zeros((2, 6, 8), np.float32)
    apart[0, :4], apart[1, :2] = X[0, :4], X[0, 4:]
    weights = np.zeros((2, 6), np.float32)
    weights[0, :4] = weights[1, :2] = 1
    packed = np.concatenate([X[:1], X[:1]])
    in_first_row = jnp.asarray(np.array([[1.0] * 6, [0.0] * 6], np.float32))

    padding = masks.padding(jnp.array([4, 2]), 6)
    out, (gradient, _) = value_and_gradient(params, apart, padding, None, None, weights, module)

    def difference(segment_ids):
        segments = jnp.asarray(np.array([segment_ids] * 2))
        same, (same_gradient, _) = value_and_gradient(
            params, packed, None, None, segments, in_first_row, module
        )
        rows = np.concatenate([out[0, :4], out[1, :2]])
        pairs = [(rows, same[0])]
        pairs += zip(jax.tree.leaves(gradient), jax.tree.leaves(same_gradient), strict=True)
        return [float(np.abs(a - b).max() / max(1, np.abs(a).max())) for a, b in pairs]

    limit = tolerance(module.dtype, depth=10)  # six results, and four on the way back
    assert max(difference([0] * 4 + [1] * 2)) < limit
    assert difference([0] * 6)[0] > 4 * limit  # the control: one document
    assert difference([0] * 3 + [1] * 3)[0] > 4 * limit  # and a boundary in the wrong place


@pytest.mark.parametrize("module", [ATTENTION, LOW], ids=DTYPES)
def test_mask_and_segments_both_hold(params, module):
    segments = jnp.asarray(np.array([[0, 0, 0, 1, 1, 1]] * 2))
    mask = masks.padding(jnp.array([5, 5]), 6)
    weights = np.zeros((2, 6), np.float32)
    weights[0, 4] = 1
    _, (_, gradient) = value_and_gradient(params, X, mask, None, segments, weights, module)
    assert list(np.abs(gradient[0]).max(-1) > 0) == [False, False, False, True, True, False]
    assert float(np.abs(gradient[1]).max()) == 0  # rows do not see each other


def test_dropout_only_when_asked(params):
    attention = MultiHeadAttention(num_heads=2, head_dim=3, dropout_rate=0.5)

    @jax.jit
    def run(key):
        variables = {"params": params}
        drawn = attention.apply(variables, X, deterministic=False, rngs={"dropout": key})
        return attention.apply(variables, X), drawn

    (still, first), (_, second) = run(jax.random.key(0)), run(jax.random.key(1))
    plain, _ = value_and_gradient(params, X, None, None, None, jnp.ones((2, 6)))
    np.testing.assert_allclose(still, plain, atol=1e-6)
    assert np.abs(first - second).max() > 1e-2


# Heads that share keys and values.


@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (2, 1, 3, 5), (2, 6, 3, 5), (1, 6, 1, 5)])
def test_a_group_of_heads_shares_a_key(shape):
    query = normal(2, 3, 6, 4)
    key, value = normal(2, 5, 2, 4, seed=1), normal(2, 5, 2, 4, seed=2)
    mask, bias = normal(*shape, seed=3) > -0.8, normal(*shape, seed=4)
    weights = jnp.cos(query)

    @jax.jit
    def both(*operands):
        def grouped(query, key, value, bias):
            out = grouped_attention(dot_product_attention, query, key, value, mask=mask, bias=bias)
            return (out * weights).sum(), out

        def repeated(query, key, value, bias):
            # Heads 0, 1 and 2 of queries have head 0 of keys; in the control, 0, 2 and 4 have.
            key, value = (jnp.repeat(x, 3, axis=2) for x in (key, value))
            out = dot_product_attention.plain(query, key, value, mask=mask, bias=bias)
            return (out * weights).sum(), out

        other = dot_product_attention.plain(
            operands[0], *(jnp.tile(x, (1, 1, 3, 1)) for x in operands[1:3]), mask=mask
        )
        gradient = lambda f: jax.grad(f, argnums=(0, 1, 2, 3), has_aux=True)(*operands)
        return gradient(grouped), gradient(repeated), other

    ours, expected, other = both(query, key, value, bias)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert np.abs(other - expected[1]).max() > 0.1


# Attention to something else.


def test_keys_and_values_may_come_from_elsewhere(params):
    x, source = normal(2, 3, 8), normal(2, 5, 8, seed=1)
    mask = jnp.asarray(np.arange(5) < 4)[None, None, None, :]

    @jax.jit
    def over(params, x, source):
        call = lambda module, x, source: module.over(x, *module.project(source), mask=mask)
        return ATTENTION.apply({"params": params}, x, source, method=call)

    out = over(params, x, source)
    # With both in one row, where what is read sees itself, the same is seen.
    joined = jnp.concatenate([x, source], axis=1)
    seen = jnp.asarray((np.arange(8) >= 3) & (np.arange(8) < 7))[None, None, None, :]
    expected = ATTENTION.apply({"params": params}, joined, mask=seen)[:, :3]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    # Rows that share a source are as if each had its own.
    many = normal(6, 3, 8, seed=2)
    shared, own = over(params, many, source), over(params, many, jnp.repeat(source, 3, axis=0))
    np.testing.assert_allclose(shared, own, atol=1e-5)
    assert np.abs(shared - over(params, many, jnp.tile(source, (3, 1, 1)))).max() > 1e-2


def test_the_scale_of_scores():
    scale = 0.3
    query, key, value = (normal(2, 3, 2, 4, seed=seed) for seed in range(3))

    @jax.jit
    def both(query, key, value):
        told = lambda *x: jnp.sum(jnp.sin(dot_product_attention(*x, scale=scale)))
        turned = lambda q, k, v: jnp.sum(jnp.sin(dot_product_attention(2 * scale * q, k, v)))
        return [jax.value_and_grad(f, (0, 1, 2))(query, key, value) for f in (told, turned)]

    ours, expected = both(query, key, value)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected)
