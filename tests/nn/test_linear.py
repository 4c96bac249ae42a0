from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlm.nn import custom_vjp
from jaxlm.nn.embed import attend
from jaxlm.nn.linear import Linear, linear
from jaxlm.nn.products import product, product_gradients

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 3e-2}


def normal(*shape, seed=0, dtype=jnp.float32):
    # From numpy, which compiles nothing; rounded to bfloat16, so that both dtypes start equal.
    values = np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1])
    return jnp.asarray(values.astype(jnp.bfloat16).astype(dtype))


def value_and_gradients(function, *args):
    """Of a nonlinear function of the result, so that a wrong cotangent shows."""

    def total(*args):
        return jnp.sum(jnp.sin(3 * function(*args).astype(jnp.float32)))

    return function(*args), jax.grad(total, argnums=tuple(range(len(args))))(*args)


def compare(ours, plain, cases):
    """Value and gradients of both for every case, the plain one in float32: one compilation."""

    def both(*case):
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), case)
        return value_and_gradients(ours, *case), value_and_gradients(plain, *exact)

    return jax.jit(lambda cases: [both(*case) for case in cases])(cases)


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


@pytest.fixture(params=["cpu", "elsewhere"])
def platform(request, monkeypatch):
    """Both ways to compute: the one for CPUs, and the one for every other platform."""
    if request.param == "elsewhere":
        monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, cpu: default(*args))
    return request.param


def test_the_fixture_picks_a_platform(platform):
    gradient = jax.grad(lambda w: linear(jnp.ones((2, 3)), w).sum())
    text = str(jax.make_jaxpr(gradient)(jnp.ones((3, 4))))
    assert ("platform_index" in text) == (platform == "cpu")


# One row, several leading axes, and both orders of widths: the weight gradient transposes the
# narrower operand.
SHAPES = [((4,), 6), ((5, 4), 24), ((2, 3, 24), 4), ((2, 2, 3, 5), 5)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ours", [linear, attend])
def test_products_equal_plain_ones(ours, dtype, platform):
    cases = []
    for shape, width in SHAPES:
        weight = (shape[-1], width) if ours is linear else (width, shape[-1])
        x, weight = normal(*shape, dtype=dtype), normal(*weight, seed=1, dtype=dtype)
        cases.append((x, weight, 1.01 * normal(width, seed=2)))
    # In bfloat16 too products add up in float32; `attend` rounds its bias on CPUs, `linear` the
    # product elsewhere.
    rounds = (ours is attend) == (platform == "cpu")
    for (value, gradients), exact in compare(ours, ours.plain, cases):
        assert value.dtype == jnp.float32
        assert [g.dtype for g in gradients] == [dtype, dtype, jnp.float32]
        assert_close(value, exact[0], TOLERANCE[dtype] if rounds else 1e-5)
        assert_close(gradients, exact[1], TOLERANCE[dtype])


def differentiable_product(spec):
    ours = jax.custom_vjp(partial(product, spec))
    ours.defvjp(
        lambda a, b: (product(spec, a, b), (a, b)),
        lambda operands, g: product_gradients(spec, *operands, g),
    )
    return ours


@pytest.mark.parametrize("spec", ["bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"])
def test_products_of_activations_equal_einsum(spec, platform):
    sizes = {"b": 2, "q": 5, "k": 3, "h": 2, "d": 4}
    # XLA:CPU cannot compute the way of other platforms in bfloat16.
    for dtype in TOLERANCE if platform == "cpu" else (jnp.float32,):
        operands = [
            normal(*(sizes[axis] for axis in axes), seed=seed, dtype=dtype)
            for seed, axes in enumerate(spec.split("->")[0].split(","))
        ]
        (((value, gradients), exact),) = compare(
            differentiable_product(spec), partial(jnp.einsum, spec), [operands]
        )
        assert value.dtype == jnp.float32
        assert [g.dtype for g in gradients] == [dtype, dtype]
        assert_close(value, exact[0], 1e-5)
        assert_close(gradients, exact[1], TOLERANCE[dtype])


def test_linear_without_bias():
    x, kernel = normal(2, 3), normal(3, 4, seed=1)
    np.testing.assert_allclose(linear(x, kernel), x @ kernel, atol=1e-6)


@pytest.mark.parametrize("ours", [linear, attend])
def test_a_frozen_bias_may_be_low_precision(ours):
    gradient = jax.grad(lambda x, b: ours(x, jnp.ones((3, 3)), b).sum(), argnums=(0, 1))
    gx, gb = gradient(jnp.ones((2, 3)), jnp.ones(3, jnp.bfloat16))
    assert (gx.dtype, gb.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("ours", [linear, attend])
def test_bfloat16_gradients_are_accumulated_in_float32(ours):
    # 1 + 2^-9 cannot be held in bfloat16: summed there, 4096 rows of it would stop at 256.
    x, one = jnp.ones((4096, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16)
    weight, bias = jax.grad(lambda w, b: ours(x, w, b).sum(), argnums=(0, 1))(one, jnp.ones(1))
    assert (float(weight[0, 0]), float(bias[0])) == (4096, 4096)


@pytest.mark.parametrize("widths", [(3, 7), (7, 3)])
def test_the_weight_gradient_lowers_for_every_platform(widths):
    # The pinned layout is for CPUs alone; elsewhere there must be no trace of it.
    inputs, outputs = widths
    step = jax.jit(jax.grad(lambda w: jnp.sum(linear(jnp.ones((2, inputs)), w) ** 2)))
    traced = step.trace(jnp.ones((inputs, outputs)))
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    assert {p for p, text in texts.items() if "LayoutConstraint" in text} == {"cpu"}


def test_reverse_over_reverse(platform):
    x, args = normal(3, 4), (normal(4, 6, seed=1), normal(6, seed=2), normal(9, 6, seed=3))
    end = normal(9, seed=4)

    def curvature(linear, attend, product):
        def loss(kernel, bias, table):
            y = jnp.tanh(linear(x, kernel, bias))
            return jnp.sum(jnp.sin(product("ik,jk->ij", attend(y, table, end), table @ table.T)))

        def norm(*args):
            gradients = jax.grad(loss, argnums=(0, 1, 2))(*args)
            return sum(jnp.sum(g**2) for g in gradients)

        return jax.jit(jax.grad(norm, argnums=(0, 1, 2)))(*args)

    ours = curvature(linear, attend, product)
    plain = curvature(linear.plain, attend.plain, jnp.einsum)
    assert_close(ours, plain, 1e-5)
    assert all(float(jnp.abs(g).max()) > 1e-3 for g in plain)


def test_module_maps_several_axes():
    x = normal(2, 3, 4, 5)
    layer = Linear((2, 3), num_inputs=2, dtype=jnp.float32)
    variables = layer.init(jax.random.key(1), x)
    params = variables["params"]
    assert params["kernel"].shape == (4, 5, 2, 3)
    assert params["bias"].shape == (2, 3)
    params = {"kernel": params["kernel"], "bias": normal(2, 3, seed=2)}

    def plain(x, params):
        product = jnp.einsum("...ij,ijab->...ab", x, params["kernel"])
        return product + jnp.broadcast_to(params["bias"], product.shape)

    ((ours, exact),) = compare(lambda x, p: layer.apply({"params": p}, x), plain, [(x, params)])
    assert ours[0].shape == (2, 3, 2, 3)
    assert_close(ours, exact, 1e-5)


def test_module_keeps_parameters_in_float32():
    x = normal(2, 4)
    layer = Linear(3, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    y = layer.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    rounded = params["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    assert_close(y, x @ rounded, 3e-2)


def test_module_takes_an_empty_batch():
    variables = Linear(4).init(jax.random.key(0), jnp.ones((1, 8)))
    assert Linear(4).apply(variables, jnp.ones((0, 8))).shape == (0, 4)


def test_module_without_bias():
    layer = Linear(3, use_bias=False)
    assert list(layer.init(jax.random.key(0), jnp.ones((1, 2)))["params"]) == ["kernel"]


def test_initial_variance_follows_the_number_of_inputs():
    for layer, inputs in ((Linear((8, 16)), (256,)), (Linear(128, num_inputs=2), (4, 64))):
        kernel = layer.init(jax.random.key(0), jnp.ones((1, *inputs)))["params"]["kernel"]
        assert float(kernel.std()) == pytest.approx(256**-0.5, rel=0.05)


@pytest.mark.parametrize("broken", ["kernel", "bias"])
def test_a_wrong_gradient_would_be_seen(monkeypatch, broken):
    # The control: the comparison above must notice a gradient that is off.
    x, kernel, bias = normal(2, 4), normal(4, 6, seed=1), normal(6, seed=2)
    name = {"kernel": "outer", "bias": "sum_rows"}[broken]
    right = custom_vjp.outer if broken == "kernel" else custom_vjp.sum_rows
    monkeypatch.setattr(custom_vjp, name, lambda *args: right(*args) * 1.001)
    ((ours, exact),) = compare(
        linear,
        linear.plain,
        [(x, kernel, bias)],
    )
    with pytest.raises(AssertionError, match="Not equal"):
        assert_close(ours, exact, 1e-5)


def test_one_row_of_bfloat16_upcasts_no_kernel():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(256, 512)), jnp.bfloat16)
    row = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 256)), jnp.bfloat16)
    exact = np.asarray(row, np.float32) @ np.asarray(kernel, np.float32)
    np.testing.assert_allclose(linear(row, kernel), exact, atol=1e-4)

    def temporary(product):
        def again(kernel, row):
            feed = lambda row: product(row, kernel)[..., :256].astype(jnp.bfloat16)
            return jax.lax.fori_loop(0, 3, lambda _, row: feed(row), row)

        compiled = jax.jit(again).lower(kernel, row).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(linear) < 0.2 * kernel.nbytes
    assert temporary(linear.plain) > kernel.nbytes  # the control
