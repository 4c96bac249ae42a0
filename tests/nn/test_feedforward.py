import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.feedforward import Mlp, gelu

X = np.concatenate([np.linspace(-12, 12, 481), [0, -0.0, 1e-8, 60, -60]])


def test_gelu_by_its_definition():
    exact = [x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in X]
    np.testing.assert_allclose(jax.jit(gelu)(jnp.asarray(X, jnp.float32)), exact, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_gelu_gradient_is_that_of_the_definition(dtype, tolerance):
    x = jnp.asarray(X, dtype)
    weights = jnp.asarray(np.cos(X), dtype)  # another cotangent for every element

    def gradient(function, x, weights):
        return jax.grad(lambda x: jnp.sum(function(x) * weights).astype(jnp.float32))(x)

    ours = jax.jit(lambda: gradient(gelu, x, weights))()
    exact = jax.jit(
        lambda: gradient(gelu.plain, x.astype(jnp.float32), weights.astype(jnp.float32))
    )()
    assert ours.dtype == dtype
    np.testing.assert_allclose(np.asarray(ours, np.float32), exact, atol=tolerance)
    # The control: the tanh approximation is told apart.
    if dtype == jnp.float32:
        approximate = jax.jit(lambda: gradient(jax.nn.gelu, x, weights))()
        assert np.abs(np.asarray(approximate) - exact).max() > 1e-4


def test_gelu_twice_differentiated():
    def curvature(function):
        return jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(lambda x: function(x).sum())(x) ** 2)))

    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(curvature(gelu)(x), curvature(gelu.plain)(x), atol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
def test_mlp_equals_its_equation(use_bias):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4))
    params = {
        "up": {"kernel": rng.normal(size=(4, 6))},
        "down": {"kernel": rng.normal(size=(6, 4))},
    }
    if use_bias:
        params["up"]["bias"], params["down"]["bias"] = rng.normal(size=6), rng.normal(size=4)
    module = Mlp(6, use_bias=use_bias, activation=jnp.tanh)
    y = module.apply({"params": jax.tree.map(jnp.float32, params)}, jnp.float32(x))
    inner = np.tanh(x @ params["up"]["kernel"] + params["up"].get("bias", np.zeros(6)))
    expected = inner @ params["down"]["kernel"] + params["down"].get("bias", np.zeros(4))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, 4)))["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
