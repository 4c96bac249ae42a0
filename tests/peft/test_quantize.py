from dataclasses import replace
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import DTYPES, tolerance
from tiny_models import BERT

from jaxlm import tree
from jaxlm.config import PretrainingTask
from jaxlm.errors import InputError
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.model import example_inputs
from jaxlm.models.t5 import T5Config
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.nn.embed import Embed
from jaxlm.nn.intercept import Site, find_sites
from jaxlm.nn.linear import Linear
from jaxlm.nn.stack import apply_stack
from jaxlm.peft import lora
from jaxlm.peft.quantize import Quantized, adapt, dequantize, int8_product, quantize
from jaxlm.sharding import axes_of
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.permutation_lm import PermutationLm
from jaxlm.tasks.span_corruption import SpanCorruption
from tests.test_configs import VOCAB_SIZE, vocabulary

GPT2 = Gpt2Config(num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=32, max_length=20)
LONGER = replace(BERT, max_length=20)
XLNET = XlnetConfig(num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=32)
T5 = T5Config(num_layers=1, hidden_dim=16, num_heads=2, head_dim=8, mlp_dim=32)
# Channels of very different size, one of them zero.
SIZES = np.array([1e-4, 1.0, 0.0, 300.0])


def weight(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("path", "site", "value"),
    [
        ("down/kernel", Site(0, 1), weight(6, 4) * SIZES[None]),
        ("query/kernel", Site(1, 1), weight(3, 6, 2, 4) * SIZES[None, None, None]),
        ("attention/out/kernel", Site(1, 2), weight(3, 2, 6, 4) * SIZES[None, None, None]),
        ("token_embed/embedding", Site(0, 1), weight(4, 6) * SIZES[:, None]),
    ],
)
def test_each_channel_is_off_by_half_a_scale_at_most(path, site, value):
    module, name = path.rpartition("/")[0], path.rpartition("/")[2]
    params = {module: {name: value, "bias": jnp.ones(4)}}
    sites = {path: site}
    if "/" in module:
        outer, _, inner = module.partition("/")
        params = {outer: {inner: params[module]}}
    packed = jax.jit(lambda params: quantize(params, sites))(params)
    leaf = next(x for x in jax.tree.leaves(packed, is_leaf=is_quantized) if is_quantized(x))
    assert leaf.values.dtype == jnp.int8
    assert np.abs(leaf.values.astype(int)).max() == 127
    back = dict(tree.leaves_with_path(dequantize(packed)))[path]
    limit = np.expand_dims(leaf.scale, leaf.axes) / 2
    assert (np.abs(back - value) <= 1.001 * limit).all()
    # The control: with one scale for all, the smallest channel would be lost.
    assert np.abs(back).min(where=value != 0, initial=1) < np.abs(value).max() / 254
    assert {x.dtype for x in jax.tree.leaves(dequantize(packed, jnp.bfloat16))} == {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.float32),  # the bias, which stays
    }
    # Every part has its place on a mesh.
    parts = {end: x.ndim for end, x in (("values", leaf.values), ("scale", leaf.scale))}
    names = axes_of(path, value.ndim).names
    assert axes_of(f"{path}/values", parts["values"]).names == names
    kept = tuple(n for axis, n in enumerate(names) if axis - len(names) not in leaf.axes)
    assert axes_of(f"{path}/scale", parts["scale"]).names == kept


def is_quantized(leaf):
    return isinstance(leaf, Quantized)


def test_a_quarter_of_the_bytes():
    params = {"kernel": weight(64, 32), "bias": jnp.zeros(32)}
    packed = quantize(params, {"kernel": Site(0, 1)})
    assert tree.num_bytes(packed) == 64 * 32 + 4 * 32 + 4 * 32
    assert tree.num_bytes(params) == 4 * 64 * 32 + 4 * 32
    paths = [path for path, _ in tree.leaves_with_path(packed)]
    assert paths == ["bias", "kernel/values", "kernel/scale"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_learn_on_a_quantized_base(dtype):
    dense, x = nn.Dense(4, dtype=jnp.dtype(dtype)), weight(5, 6)
    params = {"kernel": weight(6, 4), "bias": jnp.zeros(4)}
    sites = find_sites(lambda v: dense.apply(v, x), {"params": params})
    config = lora.LoraConfig(targets=("kernel",), rank=2)
    adapter = lora.init_at(jax.random.key(0), params, sites, config)
    packed = quantize(params, sites)

    def apply(variables, x):
        return dense.apply(variables | {"params": dequantize(variables["params"])}, x)

    @jax.jit
    def loss_and_gradient(adapter, params):
        def loss(adapter):
            y = lora.adapt(apply, config)({"params": params, "lora": adapter}, x)
            return jnp.sin(y.astype(jnp.float32)).sum(), y

        return jax.value_and_grad(loss, has_aux=True)(adapter)

    found = loss_and_gradient(adapter, packed)
    assert np.abs(found[1]["b"]).max() > 0.1
    # Exactly what a base of the rounded weights computes: they are not rounded again, but for the
    # product. Two results, and two on the way back.
    exact = loss_and_gradient(adapter, dequantize(packed))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        a, b = np.float32(a), np.float32(b)
        assert np.abs(a - b).max() <= tolerance(dtype, depth=4) * max(1, np.abs(b).max())
    # Of the weights themselves each is off by half a scale, by at most 1/254 of the largest: of
    # the output, by the sum of six such.
    (_, y), (_, full) = found[0], loss_and_gradient(adapter, params)[0]
    limit = tolerance(dtype, depth=2) * np.abs(np.float32(full)).max()
    limit += (np.abs(x).sum(1) * np.abs(params["kernel"]).max() / 254).max()
    assert 0 < np.abs(np.float32(y) - np.float32(full)).max() < limit


@pytest.mark.parametrize(
    "module",
    [
        nn.DenseGeneral(5, axis=1),
        nn.DenseGeneral((5, 2), axis=(-1, 1)),
        nn.Einsum((4, 5), "blh,lo->bho"),
        nn.DenseGeneral(5),
        nn.Conv(5, (3,)),
    ],
    ids=["axis 1", "axes -1 and 1", "einsum", "the last", "convolution"],
)
def test_any_axis_is_multiplied(module):
    """Not the last alone, which is as long here; and of convolutions the weights are rounded."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4)), jnp.float32)
    params = module.init(jax.random.key(0), x)["params"]
    packed = quantize(params, find_sites(lambda v: module.apply(v, x), {"params": params}))
    expected = np.asarray(module.apply({"params": dequantize(packed)}, x))
    found = np.asarray(adapt(module.apply)({"params": packed}, x))
    assert any(isinstance(leaf, Quantized) for leaf in packed.values())
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_site_of_another_model_raises():
    with pytest.raises(InputError, match="there is no stray/kernel to quantize"):
        quantize({"kernel": weight(6, 4)}, {"stray/kernel": Site(0, 1)})


class Layer(nn.Module):
    """A map of one axis to two, and one back."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        y = Linear((2, 24), dtype=self.dtype, name="up")(x)
        return x + Linear(32, 2, use_bias=False, dtype=self.dtype, name="down")(y)


class Small(nn.Module):
    """A stack of layers, and a table that looks up and scores."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        table = Embed(50, 32, self.dtype, name="token_embed")
        x = apply_stack(Layer(self.dtype, name="layers"), 3, table(tokens))
        bias = self.param("bias", nn.initializers.normal(1), (50,), jnp.float32)
        return table.attend(x, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_products_of_bytes_are_off_by_what_rounding_allows(dtype, shape):
    tokens = jax.random.randint(jax.random.key(0), shape, 0, 50)
    model = Small(jnp.dtype(dtype))
    params = model.init(jax.random.key(1), tokens)["params"]
    params["layers"]["up"]["bias"] += 0.5
    sites = find_sites(lambda variables: model.apply(variables, tokens), {"params": params})
    assert len(sites) == 3
    packed = quantize(params, sites)
    apply = jax.jit(adapt(model.apply))
    exact, rough = model.apply({"params": params}, tokens), apply({"params": packed}, tokens)
    assert rough.dtype == exact.dtype
    off = jnp.abs(rough - exact).max() / jnp.std(exact)
    assert 0 < off < 0.1  # three roundings of 1/254 each, on either side
    # The control: weights of another scale are seen.
    up = packed["layers"]["up"]
    up["kernel"] = up["kernel"].replace(scale=1.3 * up["kernel"].scale)
    assert jnp.abs(apply({"params": packed}, tokens) - exact).max() / jnp.std(exact) > 0.2
    # Nothing quantized: the same.
    np.testing.assert_array_equal(adapt(model.apply)({"params": params}, tokens), exact)


def test_a_row_of_bytes_is_multiplied_exactly():
    x = jnp.array([[127.0, -1, 0, 64]])  # its own scale is 1
    values = jnp.arange(-6, 6, dtype=jnp.int8).reshape(4, 3)
    scale = jnp.array([1, 0.5, 2])
    for rows in (x, jnp.concatenate([x, -x])):
        expected = rows @ (values * scale[None])
        np.testing.assert_array_equal(int8_product(rows, values, scale), expected)
        np.testing.assert_array_equal(int8_product(rows, values.T, scale, axis=1), expected)


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=() if task is CausalLm else pytest.mark.slow, id=task.__name__)
        for task in get_args(PretrainingTask)
    ],
)
def test_every_pretrained_model_can_be_evaluated_in_bytes(task):
    config = {CausalLm: GPT2, PermutationLm: XLNET, SpanCorruption: T5}.get(task, LONGER)
    config = replace(config, vocab_size=VOCAB_SIZE)
    model = task().make_model(config)
    tokens = np.random.default_rng(0).integers(5, VOCAB_SIZE, (2, 20)).astype(np.int32)
    inputs = example_inputs(config)
    variables = model.init(jax.random.key(0), *inputs)
    sites = find_sites(lambda v: model.apply(v, *inputs), variables)
    packed = {**variables, "params": quantize(variables["params"], sites)}
    batch = {"tokens": tokens, "lengths": np.full(2, 20), "index": np.arange(2)}

    def loss(apply, variables):
        run = task().for_evaluation().make_loss(apply, vocabulary())
        key = jax.random.key(1)
        return run(variables, batch, key, progress=jnp.ones(()), deterministic=True)[1].means()

    exact = loss(model.apply, variables)["loss"]
    assert 0 < abs(loss(adapt(model.apply), packed)["loss"] / exact - 1) < 0.02
