import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.norms import LayerNorm, RmsNorm


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def apply(x, scale, bias, **options):
    return LayerNorm(**options).apply({"params": {"scale": scale, "bias": bias}}, x)


def test_equation_in_float64():
    x, scale, bias = 3 * normal(2, 3, 16) + 1, normal(16, seed=1), normal(16, seed=2)
    for epsilon in (1e-12, 0.5):
        y = apply(*(jnp.asarray(a, jnp.float32) for a in (x, scale, bias)), epsilon=epsilon)
        centred = x - x.mean(-1, keepdims=True)
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias
        np.testing.assert_allclose(y, expected, atol=1e-5)


def test_a_large_mean_does_not_cost_the_digits():
    x = normal(4, 64) + 1e4
    y = apply(jnp.asarray(x, jnp.float32), jnp.ones(64), jnp.zeros(64))
    x = x.astype(np.float32).astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(y, expected, atol=1e-2)
    # The control: E[x²] - E[x]² in float32, the usual shortcut, is far off.
    x = x.astype(np.float32)
    shortcut = (x**2).mean(-1) - x.mean(-1) ** 2
    assert np.abs(shortcut / x.astype(np.float64).var(-1) - 1).max() > 0.5


def test_statistics_of_bfloat16_are_float32():
    x = jnp.asarray(100 + normal(4, 256), jnp.bfloat16)
    y = apply(x, jnp.ones(256), jnp.zeros(256), dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    exact = apply(x.astype(jnp.float32), jnp.ones(256), jnp.zeros(256))
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.02)
    assert exact.dtype == jnp.float32


def test_a_constant_row_is_finite():
    x = jnp.full((2, 8), 3.0)

    def total(x):
        return apply(x, jnp.ones(8), jnp.zeros(8)).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(x)
    assert (float(value), np.isfinite(gradient).all()) == (0, True)


def test_parameters():
    params = jax.jit(LayerNorm(dtype=jnp.bfloat16).init)(jax.random.key(0), jnp.ones((1, 4)))
    params = params["params"]
    assert {name: (leaf.dtype, leaf.tolist()) for name, leaf in params.items()} == {
        "scale": (jnp.float32, [1.0] * 4),
        "bias": (jnp.float32, [0.0] * 4),
    }


@pytest.mark.parametrize("shape", [(8,), (2, 3, 4, 8)])
def test_any_number_of_leading_axes(shape):
    x = jnp.asarray(normal(*shape), jnp.float32)
    y = apply(x, jnp.ones(8), jnp.zeros(8))
    np.testing.assert_allclose(y.mean(-1), np.zeros(shape[:-1]), atol=1e-5)
    np.testing.assert_allclose(y.std(-1), np.ones(shape[:-1]), atol=1e-4)


# RMSNorm.


def test_rms_norm_by_its_equation():
    x, scale = 3 * normal(2, 3, 16) + 1, normal(16, seed=1)
    variables = {"params": {"scale": jnp.asarray(scale, jnp.float32)}}
    for epsilon in (1e-6, 0.5):
        y = RmsNorm(epsilon).apply(variables, jnp.asarray(x, jnp.float32))
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale
        np.testing.assert_allclose(y, expected, atol=1e-5)


def test_rms_norm_rounds_before_it_scales():
    x = jnp.asarray(normal(4, 256), jnp.bfloat16)
    scale = jnp.asarray(1 + normal(256, seed=1), jnp.float32)
    y = RmsNorm(1e-6, jnp.bfloat16).apply({"params": {"scale": scale}}, x)
    wide = np.asarray(x, np.float32)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    low = jnp.bfloat16
    rounded = wide.astype(low).astype(np.float32) * np.asarray(scale.astype(low), np.float32)
    np.testing.assert_array_equal(np.asarray(y, np.float32), rounded.astype(low))
    # The control: the other order gives other numbers.
    other = (wide * np.asarray(scale)).astype(low)
    assert (np.asarray(y, np.float32) != other.astype(np.float32)).mean() > 0.1
