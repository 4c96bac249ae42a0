"""Attention block by block equals the plain definition, and never makes the square array."""

import importlib
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import BERT

from jaxlm import sharding
from jaxlm.errors import InputError
from jaxlm.nn import custom_vjp, masks
from jaxlm.nn.attention import dot_product_attention, grouped_attention
from jaxlm.nn.blockwise import Sizes, blockwise_attention, cut
from jaxlm.nn.masks import Visible, visible
from jaxlm.sharding import MeshConfig, make_mesh, use_mesh

SMALL = Sizes(block=16, window_block=8, plain=0)
blockwise = partial(blockwise_attention, sizes=SMALL)
LENGTH = 50  # no multiple of a block


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def segments(length=LENGTH, batch=2):
    """Four documents a row, the last of them padding."""
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (batch, length)), axis=1)
    return jnp.asarray(np.where(ids == 3, -1, ids), jnp.int32)


def difference(mask, *, kv_heads=4, lengths=(LENGTH, LENGTH), rate=0.0, dtype="float32"):
    """Largest relative differences of outputs and gradients, ours and the equation's own."""
    query, weights = normal(2, lengths[0], 4, 8), normal(2, lengths[0], 4, 8, seed=3)
    key, value = (normal(2, lengths[1], kv_heads, 8, seed=seed) for seed in (1, 2))
    drawn = {"dropout_rate": rate, "dropout_key": jax.random.key(5) if rate else None}

    def gradient(attend, dtype):
        def total(*operands):
            out = grouped_attention(attend, *operands, mask=mask, **drawn)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        operands = [x.astype(dtype) for x in (query, key, value)]
        return jax.grad(total, (0, 1, 2), has_aux=True)(*operands)

    both = jax.jit(lambda: (gradient(blockwise, dtype), gradient(dot_product_attention, dtype)))()
    ours, plain = (jax.tree.leaves(x) for x in both)
    assert {x.dtype for x in ours} == {jnp.dtype(dtype)}
    wide = lambda x: np.asarray(x, np.float32)
    return [
        float(np.abs(wide(a) - wide(b)).max() / np.abs(wide(b)).max())
        for a, b in zip(ours, plain, strict=True)
    ]


CASES = {
    "everything": lambda: visible(),
    "causal": lambda: visible(after=0),
    "documents": lambda: visible(segments()),
    "window": lambda: visible(before=3, after=3),
    "causal window over documents": lambda: visible(segments(), before=5, after=0),
    "padding": lambda: masks.padding(jnp.array([50, 20]), LENGTH),
    "an array": lambda: visible(segments(), masks.padding(jnp.array([50, 9]), LENGTH)),
    "rows that see nothing": lambda: (jnp.arange(LENGTH) != 2)[None, None, :, None],
    "segments that no key has": lambda: Visible(segments(), jnp.zeros_like(segments())),
}


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_plain_definition(name):
    assert max(difference(CASES[name]())) < 2e-6


@pytest.mark.parametrize("seen", [{"after": 0}, {"before": 2, "after": 4}])
def test_heads_that_share_keys_and_dropped_weights(seen):
    mask = visible(segments(), **seen)
    assert max(difference(mask, kv_heads=2, rate=0.3)) < 2e-6


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.15, 0.2])
def test_in_bfloat16(rate):
    # Which makes another rate of most of them: the gradient has to drop what the values have.
    assert max(difference(visible(segments(), after=0), dtype="bfloat16", rate=rate)) < 2e-2


def test_over_another_row():
    seen = masks.padding(jnp.array([24, 3]), 24)
    assert max(difference(seen, lengths=(70, 24))) < 2e-6


def test_a_mask_is_what_its_parts_say():
    places = np.arange(12)
    ids = segments(12)
    seen = visible(ids, masks.padding(jnp.array([12, 7]), 12), before=3, after=1)
    ahead = places[None, :] - places[:, None]
    near = (ahead <= 1) & (ahead >= -3) & np.asarray(masks.segments(ids, ids))
    expected = near & (places < np.array([[12], [7]]))[:, None, None, :]
    np.testing.assert_array_equal(masks.dense(seen, 12, 12), expected)
    np.testing.assert_array_equal(seen.part(4, 5, 2, 6), expected[:, :, 4:9, 2:8])
    narrower = visible(None, visible(ids, before=3, after=4), before=5, after=1)
    np.testing.assert_array_equal(masks.dense(narrower, 12, 12), near)
    both = visible(ids, visible(segments(12)[:, ::-1]))
    same = masks.segments(ids, ids) & masks.segments(ids[:, ::-1], ids[:, ::-1])
    np.testing.assert_array_equal(masks.dense(both, 12, 12), same)
    assert masks.dense(Visible(), 12, 12) is None


def computed(mask, length, sizes):
    blocks = cut(mask, length, length, sizes)
    return len(blocks.starts) * blocks.q_size * blocks.kv_size / length**2


def test_hidden_blocks_are_left_out():
    sizes = Sizes(block=64, window_block=64)
    assert computed(visible(), 1024, sizes) == 1
    assert computed(visible(after=0), 1024, sizes) == pytest.approx(0.5, abs=0.04)
    assert computed(visible(before=64, after=64), 1024, sizes) == pytest.approx(192 / 1024)


@pytest.mark.parametrize("mask", [visible(), visible(before=32, after=32)], ids=["all", "window"])
def test_memory_is_linear_in_the_length(mask):
    def temporaries(attend, length):
        def total(x):
            return jnp.sum(jnp.square(attend(x, x, x, mask=mask)))

        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        compiled = jax.jit(jax.grad(total)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    attend = partial(blockwise_attention, sizes=Sizes(64, 64, 0))
    assert temporaries(attend, 4096) < 4.5 * temporaries(attend, 1024)
    # The control: the plain definition's grow by the square.
    assert temporaries(dot_product_attention, 2048) > 3.5 * temporaries(dot_product_attention, 1024)


def test_documents_of_other_blocks_are_passed_over_on_a_cpu():
    """The program says so: what is computed for a block stands in a branch."""
    attend = lambda ids: partial(blockwise, mask=visible(ids))
    x = normal(1, 64, 1, 8)
    text = lambda ids: jax.jit(lambda x: attend(ids)(x, x, x)).lower(x).compile().as_text()
    assert "conditional(" in text(segments(64, 1))
    assert "conditional(" not in text(None)


def gradients(attend, mask, mesh=None):
    x = [normal(4, 64, 4, 8, seed=seed) for seed in range(4)]
    drawn = {"dropout_rate": 0.2, "dropout_key": jax.random.key(1)}

    def run(query, key, value, weights):
        total = lambda *x: jnp.sum(attend(*x, mask=mask, **drawn) * weights)
        return jax.value_and_grad(total, (0, 1, 2))(query, key, value)

    if mesh is None:
        return jax.jit(run)(*x)

    def sharded(*x):
        with use_mesh(mesh):
            names = ("batch", "length", "heads", "head_dim")
            return run(*(sharding.constrain(one, names) for one in x))

    return jax.jit(sharded)(*x)


@pytest.mark.parametrize(
    "config", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, tensor=2, sequence=2)]
)
def test_on_a_mesh(config):
    mask = visible(segments(64, 4), before=9, after=0)
    mesh = make_mesh(config, jax.devices()[:8])
    ours, one = gradients(blockwise, mask, mesh), gradients(dot_product_attention, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, one)


def test_inside_shard_map():
    mask, x = visible(after=0), normal(4, 48, 2, 8)
    key = normal(1, 48, 2, 8, seed=1)
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])

    def total(x, key):  # whose keys all rows share
        shared = jnp.broadcast_to(key, x.shape)
        return jnp.sum(jnp.sin(blockwise(x, shared, shared, mask=mask)))

    def local(x, key):
        value, gradient = jax.value_and_grad(total, (0, 1))(x, key)
        return jax.lax.psum(value, "data"), gradient

    specs = P("data"), P()
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), specs))
    ours = jax.jit(sharded)(x, key)
    expected = jax.jit(jax.value_and_grad(total, (0, 1)))(x, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected)


def test_there_is_a_forward_mode_inside_plain():
    x = normal(1, 40, 1, 8)
    total = lambda x: jnp.sum(blockwise(x, x, x, mask=visible(after=0)))
    with custom_vjp.plain():
        slope = jax.jit(lambda x: jax.jvp(total, (x,), (jnp.ones_like(x),))[1])(x)
    np.testing.assert_allclose(slope, jnp.sum(jax.jit(jax.grad(total))(x)), rtol=1e-4)


def test_a_bias_is_refused():
    x = normal(1, 300, 1, 8)
    with pytest.raises(InputError, match="attention=plain"):
        blockwise_attention(x, x, x, bias=jnp.zeros((1, 1, 300, 300)))


def largest(attention):
    """Elements of the largest array that a gradient of a model makes, over rows of 1,536."""
    config = replace(BERT, max_length=1536, attention=attention, unroll=1)
    model, tokens = config.make(), jnp.zeros((1, 1536), jnp.int32)
    total = lambda params: jnp.sum(model.apply({"params": params}, tokens, segment_ids=tokens))
    params = jax.eval_shape(model.init, jax.random.key(0), tokens[:, :8])["params"]
    text = str(jax.make_jaxpr(jax.grad(total))(params))
    shapes = re.findall(r"(?:f32|bool)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_a_model_makes_no_square_array():
    assert largest("blockwise") < 3 * 2 * 512**2  # a block of two heads, of three in a row
    assert largest("plain") >= 2 * 1536**2  # the control


def test_a_model_under_scan_and_remat():
    config = replace(BERT, max_length=520, attention_dropout_rate=0.1, unroll=1, remat="full")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 520)))
    ids = segments(520)

    def gradient(attention):
        model = replace(config, attention=attention).make()
        key = {"dropout": jax.random.key(0)}

        def total(params):
            options = {"segment_ids": ids, "deterministic": False, "rngs": key}
            return jnp.sum(jnp.sin(model.apply({"params": params}, tokens, **options)))

        params = jax.jit(model.init)(jax.random.key(1), tokens[:, :8])["params"]
        return jax.jit(jax.value_and_grad(total))(params)

    ours, plain = gradient("blockwise"), gradient("plain")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), ours, plain)


def test_the_benchmark_has_a_row_for_each_length(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    monkeypatch.setenv("COLUMNS", "200")
    benchmark = importlib.import_module("benchmark_attention")
    benchmark.main(lengths=(4,), tokens=4, num_heads=1, head_dim=4, rounds=1)
    header, row = [line for line in capsys.readouterr().out.splitlines() if line[1:2] == " "]
    assert "window, blockwise" in header
    assert len(re.findall(r"\d+", row)) == 7
