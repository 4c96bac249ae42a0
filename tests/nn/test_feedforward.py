import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.feedforward import GatedMlp, Mlp, gelu, gelu_tanh

X = np.concatenate([np.linspace(-12, 12, 481), [0, -0.0, 1e-8, 60, -60]])


def test_gelu_by_its_definition():
    exact = [x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in X]
    np.testing.assert_allclose(jax.jit(gelu)(jnp.asarray(X, jnp.float32)), exact, atol=2e-6)


def test_gelu_tanh_by_its_definition():
    exact = [x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in X]
    y = jax.jit(gelu_tanh)(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(y, exact, atol=2e-6)
    assert 1e-4 < np.abs(y - jax.jit(gelu)(jnp.asarray(X, jnp.float32))).max() < 1e-3


@pytest.mark.parametrize("equation", [gelu, gelu_tanh])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_gelu_gradient_is_that_of_the_definition(equation, dtype, tolerance):
    x = jnp.asarray(X, dtype)
    weights = jnp.asarray(np.cos(X), dtype)  # another cotangent for every element

    def gradient(function, x, weights):
        return jax.grad(lambda x: jnp.sum(function(x) * weights).astype(jnp.float32))(x)

    ours = jax.jit(lambda: gradient(equation, x, weights))()
    exact = jax.jit(
        lambda: gradient(equation.plain, x.astype(jnp.float32), weights.astype(jnp.float32))
    )()
    assert ours.dtype == dtype
    np.testing.assert_allclose(np.asarray(ours, np.float32), exact, atol=tolerance)
    # The control: the two are told apart.
    if dtype == jnp.float32:
        other = gelu if equation is gelu_tanh else gelu_tanh
        approximate = jax.jit(lambda: gradient(other.plain, x, weights))()
        assert np.abs(np.asarray(approximate) - exact).max() > 1e-4


def test_gelu_twice_differentiated():
    def curvature(function):
        return jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(lambda x: function(x).sum())(x) ** 2)))

    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(curvature(gelu)(x), curvature(gelu.plain)(x), atol=1e-5)


@pytest.mark.parametrize("kind", [Mlp, GatedMlp])
@pytest.mark.parametrize("use_bias", [True, False])
def test_mlp_equals_its_equation(kind, use_bias):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4))
    params = {
        "up": {"kernel": rng.normal(size=(4, 6))},
        "down": {"kernel": rng.normal(size=(6, 4))},
    }
    if kind is GatedMlp:
        params["gate"] = {"kernel": rng.normal(size=(4, 6))}
    if use_bias:
        for part in params.values():
            part["bias"] = rng.normal(size=part["kernel"].shape[1])
    module = kind(6, use_bias=use_bias, activation=jnp.tanh)
    y = module.apply({"params": jax.tree.map(jnp.float32, params)}, jnp.float32(x))

    def linear(name, x):
        return x @ params[name]["kernel"] + params[name].get("bias", np.zeros(1))

    inner = np.tanh(linear("up", x))
    if kind is GatedMlp:
        inner = np.tanh(linear("gate", x)) * linear("up", x)
    expected = linear("down", inner)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, 4)))["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("kind", [Mlp, GatedMlp])
def test_mlp_drops_what_its_last_map_gets(kind):
    module, x = kind(6, use_bias=False, dropout_rate=0.5), jnp.asarray(X[:8].reshape(1, 2, 4))
    params = module.init(jax.random.key(0), x)
    key = {"dropout": jax.random.key(1)}
    dropped = module.apply(params, x, deterministic=False, rngs=key)
    kept = module.apply(params, x)
    assert np.abs(dropped - kept).max() > 1e-3
    np.testing.assert_array_equal(kept, kind(6, use_bias=False).apply(params, x))
