"""GPT-2 and Llama: what they see, with a cache and without, in a loop and on a mesh."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding, tree
from jaxlm.errors import InputError
from jaxlm.models import gpt2, llama
from jaxlm.models.bert import BertConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.heads import WithLmHead
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.model import CausalConfig, ModelConfig
from jaxlm.nn import stack
from jaxlm.nn.intercept import find_sites
from jaxlm.peft import lora
from jaxlm.peft.lora import LoraConfig
from jaxlm.peft.quantize import dequantize, quantize

SIZES = {"vocab_size": 40, "num_layers": 2, "hidden_dim": 16, "mlp_dim": 24, "max_length": 12}
CONFIGS = {
    "gpt2": Gpt2Config(num_heads=4, **SIZES).with_dropout(0.0),
    "llama": LlamaConfig(num_heads=4, num_kv_heads=2, head_dim=6, tied=True, **SIZES),
}
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 10)).astype(np.int32)
ARRAY = jnp.asarray(TOKENS)
COUNTED = np.arange(10, dtype=np.int32)[None].repeat(2, 0)
both = pytest.mark.parametrize("kind", CONFIGS)


def model_of(config):
    return WithLmHead(config.make(), config.make_lm_head())


def shapes_of(config):
    return jax.eval_shape(model_of(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def random_like(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)


VARIABLES = {kind: random_like(shapes_of(config)) for kind, config in CONFIGS.items()}


@partial(jax.jit, static_argnums=0)
def hidden_and_gradient(config, variables, tokens, positions, segment_ids, mask, weights):
    """Hidden states, and the gradient of a sum over the positions with weight by the embeddings."""

    def total(added):
        table = variables["params"]["encoder"]["token_embed"]["embedding"]
        # Of each token as if it had a row of its own.
        rows = jnp.concatenate([table, table[tokens.reshape(-1)] + added])
        params = variables["params"]["encoder"] | {"token_embed": {"embedding": rows}}
        own = 40 + jnp.arange(tokens.size).reshape(tokens.shape)
        hidden = (
            replace(config, vocab_size=40 + tokens.size)
            .make()
            .apply({"params": params}, own, positions=positions, segment_ids=segment_ids, mask=mask)
        )
        return jnp.sum(jnp.sin(3 * hidden) * weights[..., None]), hidden

    gradient, hidden = jax.grad(total, has_aux=True)(jnp.zeros((tokens.size, config.hidden_dim)))
    return hidden, gradient.reshape(*tokens.shape, -1)


def run(kind, tokens=TOKENS, positions=COUNTED, segment_ids=0 * COUNTED, mask=None, weights=None):
    """Always all arguments, so that there is one compilation for each model."""
    mask = np.ones((2, 10), bool) if mask is None else mask
    weights = np.ones((2, 10)) if weights is None else weights
    arguments = tokens, positions, segment_ids, mask[:, None, None], np.float32(weights)
    out = hidden_and_gradient(CONFIGS[kind], VARIABLES[kind], *map(jnp.asarray, arguments))
    return jax.tree.map(np.asarray, out)


def difference(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in leaves)


@pytest.mark.parametrize(
    ("config", "vocab_size", "published"),
    [
        (gpt2.SMALL, 50257, 124_439_808),
        (gpt2.MEDIUM, 50257, 354_823_168),
        (gpt2.LARGE, 50257, 774_030_080),
        (gpt2.XL, 50257, 1_557_611_200),
        (llama.TINY, 32000, 15_191_712),
        (llama.SMALL, 32000, 162_417_408),
        (llama.BASE, 32000, 1_100_048_384),
    ],
)
def test_number_of_parameters(config, vocab_size, published):
    assert tree.num_params(shapes_of(replace(config, vocab_size=vocab_size))) == published


def test_which_models_can_generate():
    assert all(isinstance(config, CausalConfig) for config in CONFIGS.values())
    assert isinstance(BertConfig(), ModelConfig)
    assert not isinstance(BertConfig(), CausalConfig)


def seen_by(gradient, row=0):
    return set(np.flatnonzero(np.abs(gradient[row]).max(-1) > 1e-6))


@both
def test_no_position_sees_a_later_one_or_another_document(kind):
    segments = np.where(COUNTED < 6, 3, 1)
    for place in (0, 4, 5, 6, 9):
        weights = np.where(place == COUNTED, 1.0, 0.0)
        _, gradient = run(kind, weights=weights)
        assert seen_by(gradient) == set(range(place + 1))  # every one of them, and no other
        _, gradient = run(kind, weights=weights, segment_ids=segments)
        assert seen_by(gradient) == set(range(0 if place < 6 else 6, place + 1))
    # The control: with both documents under one id, the second sees the first.
    _, gradient = run(kind, weights=np.where(COUNTED == 9, 1.0, 0.0), segment_ids=0 * segments)
    assert seen_by(gradient) == set(range(10))


@both
def test_packed_equals_unpacked(kind):
    segments = np.where(COUNTED < 6, 0, 1)
    starts = np.where(COUNTED < 6, COUNTED, COUNTED - 6)
    packed, _ = run(kind, positions=starts, segment_ids=segments)
    first, _ = run(kind)
    second, _ = run(kind, np.roll(TOKENS, 4, axis=1))
    assert difference(packed, np.concatenate([first[:, :6], second[:, :4]], axis=1)) < 1e-5
    # Positions matter, though to Llama only their differences do.
    moved, _ = run(kind, positions=COUNTED + 2)
    assert (difference(moved, first) > 1e-2) == (kind == "gpt2")
    stretched, _ = run(kind, positions=2 * COUNTED % 12)
    assert difference(stretched, first) > 1e-2


@both
def test_padding_on_either_side_changes_nothing(kind):
    real = np.stack(
        [COUNTED[0] < 7, COUNTED[0] >= 3]
    )  # on the right of one row, on the left of the other
    counted = np.stack([COUNTED[0], np.maximum(COUNTED[0] - 3, 0)])
    hidden, _ = run(kind, positions=counted, segment_ids=np.where(real, 0, -1))
    noise = np.where(real, TOKENS, 39)
    other, _ = run(kind, noise, counted, np.where(real, 0, -1))
    masked, _ = run(kind, noise, counted, mask=real)  # the other way to say it
    alone, _ = run(kind, np.stack([TOKENS[0], np.roll(TOKENS[1], -3)]))
    assert difference(hidden[real], other[real]) == 0
    assert difference(hidden[real], masked[real]) < 1e-6
    assert difference(hidden[0, :7], alone[0, :7]) < 1e-5
    assert difference(hidden[1, 3:], alone[1, :7]) < 1e-5
    unmasked, _ = run(kind, noise, counted)  # the control
    assert difference(hidden[1, 3:], unmasked[1, 3:]) > 1e-2


# With a cache.


@partial(jax.jit, static_argnums=0)
def extend(config, variables, tokens, cache, positions, segment_ids):
    return model_of(config).apply(
        variables, tokens, cache, positions=positions, segment_ids=segment_ids, method="extend"
    )


@both
@pytest.mark.parametrize("unroll", [None, 1])
def test_cached_equals_uncached_token_by_token(kind, unroll):
    config = replace(CONFIGS[kind], unroll=unroll)
    model, variables = model_of(config), VARIABLES[kind]
    # The second row's prompt has one token, the first row's four.
    prompt, segments = np.stack([TOKENS[0, :4], TOKENS[1, :4]]), np.array([[0] * 4, [-1] * 3 + [0]])
    starts = np.array([4, 1])
    tokens = np.stack([TOKENS[0], np.roll(TOKENS[1], -3)])
    full = np.asarray(jax.jit(model.apply)(variables, tokens))
    cache = config.make_cache(2, 11)
    positions = np.maximum(np.arange(4)[None] - np.array([[0], [3]]), 0)
    logits, cache = extend(config, variables, prompt, cache, jnp.asarray(positions), segments)
    for _ in range(6):
        assert difference(logits, full[[0, 1], starts - 1]) < 1e-5
        fed = jnp.asarray(tokens[[0, 1], starts][:, None])
        at = jnp.asarray(starts[:, None], jnp.int32)
        logits, cache = extend(config, variables, fed, cache, at, 0 * at)
        starts += 1
    assert int(cache.index) == 10
    assert np.asarray(cache.segment_ids[1]).tolist() == [-1] * 3 + [0] * 7 + [-1]
    if unroll is None:
        assert extend._cache_size() == 2 * (1 + list(CONFIGS).index(kind))  # prompt and token


@both
def test_what_another_document_wrote_into_the_cache_is_not_seen(kind):
    config, variables = CONFIGS[kind], VARIABLES[kind]

    def last(before, segments):
        cache = config.make_cache(2, 10)
        ids = np.full((2, 4), segments, np.int32)
        _, cache = extend(config, variables, before, cache, COUNTED[:, :4], ids)
        one = jnp.zeros((2, 1), jnp.int32)
        return extend(config, variables, TOKENS[:, 4:5], cache, one, one)[0]

    first, second = TOKENS[:, :4], TOKENS[:, 5:9]
    assert difference(last(first, 1), last(second, 1)) == 0
    assert difference(last(first, 0), last(second, 0)) > 1e-2  # the control


@both
def test_a_cache_in_bfloat16_stays_near(kind):
    config = CONFIGS[kind]
    exact, rounded = (config.make_cache(2, 10, dtype) for dtype in (None, jnp.bfloat16))
    assert exact.keys[0].dtype == jnp.float32
    for part in (slice(0, 9), slice(9, 10)):  # many queries, and one
        arguments = COUNTED[:, part], 0 * COUNTED[:, part]
        logits, exact = extend(config, VARIABLES[kind], TOKENS[:, part], exact, *arguments)
        near, rounded = extend(config, VARIABLES[kind], TOKENS[:, part], rounded, *arguments)
        assert 0 < difference(logits, near) < 0.1
    assert rounded.keys[0].dtype == jnp.bfloat16


@both
def test_adapters_and_quantized_weights_with_a_cache(kind):
    config, variables = CONFIGS[kind], VARIABLES[kind]
    apply, cache = model_of(config).apply, config.make_cache(2, 10)

    def extended(apply, variables):
        positions = jnp.asarray(COUNTED)
        call = partial(apply, positions=positions, segment_ids=0 * positions, method="extend")
        return jax.jit(lambda v: call(v, ARRAY, cache)[0])(variables)

    sites = find_sites(lambda variables: apply(variables, ARRAY), variables)
    kernels = LoraConfig(targets=(r".*/kernel",), rank=2)
    make = partial(lora.init_at, params=variables["params"], sites=sites, config=kernels)
    adapter = random_like(jax.eval_shape(make, jax.random.key(0)))
    adapted = extended(lora.adapt(apply, kernels), {**variables, "lora": adapter})
    merged = extended(apply, {"params": lora.merge(variables["params"], adapter, kernels)})
    assert difference(adapted, merged) < 1e-4
    plain = extended(apply, variables)
    assert difference(adapted, plain) > 0.1

    packed = quantize(variables["params"], sites)
    table = variables["params"]["encoder"]["token_embed"]["embedding"]
    assert tree.num_bytes(packed) < 0.5 * tree.num_bytes(variables) + table.nbytes
    near = extended(apply, {"params": dequantize(packed)})
    assert 0 < difference(near, plain) < 0.1 * float(jnp.abs(plain).max())


@both
def test_neither_split_weights_nor_the_cache_are_copied_for_each_token(kind):
    """XLA:CPU would make each layer's slice of a stack anew in each iteration of a loop."""
    sizes = {"hidden_dim": 64, "mlp_dim": 256}
    config = replace(CONFIGS[kind], **sizes, num_layers=4, vocab_size=16)
    variables = shapes_of(config)
    model, weights = model_of(config), tree.num_bytes(variables)

    def generate(variables, cache):
        def step(carry):
            tokens, cache = carry
            logits, cache = model.apply(
                stack.join(variables), tokens, cache, positions=tokens * 0, method="extend"
            )
            return jnp.argmax(logits, -1).astype(jnp.int32)[:, None], cache

        carry = jnp.zeros((2, 1), jnp.int32), cache
        return jax.lax.while_loop(lambda carry: carry[1].index < cache.kv_length, step, carry)

    def temporary(variables, kv_length=8):
        cache = jax.eval_shape(lambda: config.make_cache(2, kv_length))
        compiled = jax.jit(generate, donate_argnums=1).lower(variables, cache).compile()
        return compiled.memory_analysis().temp_size_in_bytes, cache.keys[0].size * 4

    layers = variables["params"]["encoder"]["layers"]
    split = {**variables["params"]["encoder"], "layers": jax.tree.map(split_shape, layers)}
    apart = {"params": {**variables["params"], "encoder": split}}
    small, _ = temporary(apart)
    assert small < 0.2 * weights
    assert temporary(variables)[0] > small + 0.1 * weights  # the control
    large, key = temporary(apart, 512)
    assert large - small < 0.7 * key  # where XLA transposes, it holds the keys of one layer


def split_shape(leaf):
    return jax.eval_shape(stack.split, leaf)


# The same however it is computed.


@both
def test_a_loop_equals_no_loop(kind):
    config, variables = CONFIGS[kind], VARIABLES[kind]

    @partial(jax.jit, static_argnums=0)
    def gradient(config):
        total = lambda v: jnp.sum(jnp.sin(model_of(config).apply(v, ARRAY)))
        return jax.value_and_grad(total)(variables)

    plain = gradient(config)
    assert difference(plain, gradient(replace(config, unroll=1, remat="full"))) < 1e-3
    assert float(np.abs(plain[0])) > 1


@both
def test_a_mesh_gives_what_one_device_gives(kind):
    config, variables = CONFIGS[kind], VARIABLES[kind]
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    places = sharding.tree_shardings(variables, mesh)
    tokens = jnp.asarray(np.concatenate([TOKENS, TOKENS[:, ::-1]]))

    def both_ways(variables):
        cache = config.make_cache(4, 10)
        positions = jnp.arange(10)[None].repeat(4, 0)
        extended, cache = model_of(config).apply(
            variables, tokens, cache, positions=positions, method="extend"
        )
        return model_of(config).apply(variables, tokens), extended, cache.keys

    @partial(jax.jit, in_shardings=(places,))
    def on_mesh(variables):
        with sharding.use_mesh(mesh):
            return both_ways(variables)

    one, many = jax.jit(both_ways)(variables), on_mesh(jax.device_put(variables, places))
    assert difference(one, many) < 1e-5
    assert difference(one[0][:, -1], one[1]) < 1e-5
    # Keys stay where their heads and rows are.
    batch, heads, *_ = one[2][0].shape
    shards = {shard.data.shape[:2] for shard in many[2][0].addressable_shards}
    assert shards == {(batch // 4, heads // 2)}


RATES = [(kind, rate) for kind in CONFIGS for rate in ("dropout_rate", "attention_dropout_rate")]


@pytest.mark.parametrize(("kind", "rate"), [*RATES, ("gpt2", "embed_dropout_rate")])
def test_dropout_follows_its_rates(kind, rate):
    model = replace(CONFIGS[kind].with_dropout(0.0), **{rate: 0.5}, unroll=1).make()
    variables = {"params": VARIABLES[kind]["params"]["encoder"]}

    @jax.jit
    def drawn(key):
        return model.apply(variables, ARRAY, deterministic=False, rngs={"dropout": key})

    assert difference(drawn(jax.random.key(0)), drawn(jax.random.key(1))) > 0.01


@both
def test_residual_projections_start_smaller(kind):
    config = replace(CONFIGS[kind], num_layers=8, hidden_dim=64, mlp_dim=128, unroll=1)
    params = jax.jit(config.make().init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    kernels = {p: float(x.std()) for p, x in tree.leaves_with_path(params) if p.endswith("kernel")}
    smaller = {path for path in kernels if path.endswith(("out/kernel", "down/kernel"))}
    assert len(smaller) == 2
    for path, std in kernels.items():
        assert std == pytest.approx(0.02 / 4 if path in smaller else 0.02, rel=0.05)


@both
def test_bfloat16_stays_near(kind):
    low = replace(CONFIGS[kind], dtype="bfloat16", unroll=1)
    exact, near = (
        jax.jit(model_of(c).apply)(VARIABLES[kind], TOKENS)
        for c in (replace(CONFIGS[kind], unroll=1), low)
    )
    assert near.dtype == jnp.float32
    assert low.make_cache(1, 4).keys[0].dtype == jnp.bfloat16
    assert 0 < difference(exact, near) < 0.05 * float(jnp.abs(exact).max())


@both
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_compiled_products(kind, tied):
    # XLA counts elementwise operations as well, a share that vanishes with the width.
    sizes = {"hidden_dim": 256, "mlp_dim": 1024, "vocab_size": 512, "max_length": 32}
    sizes |= {"head_dim": 48} if kind == "llama" else {}
    config = replace(CONFIGS[kind], **sizes, tied=tied)
    args = shapes_of(config), jnp.zeros((1, 32), jnp.int32), jnp.zeros((1, 8), jnp.int32)
    counted = jax.jit(model_of(config).apply).lower(*args).cost_analysis()["flops"]
    assert counted == pytest.approx(config.forward_flops(32, 8), rel=0.05)


# Bad input.


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (Gpt2Config, {"hidden_dim": 770}, "hidden_dim=770 is not divisible by num_heads=12"),
        (Gpt2Config, {"embed_dropout_rate": 1.0}, "embed_dropout_rate=1.0 is not inside"),
        (Gpt2Config, {"num_layers": 0}, "num_layers=0 is not above 0"),
        (LlamaConfig, {"hidden_dim": 770}, "hidden_dim=770 is not divisible .* or give head_dim"),
        (LlamaConfig, {"num_kv_heads": 5}, "num_heads=12 is not divisible by num_kv_heads=5"),
        (LlamaConfig, {"num_kv_heads": 0}, "num_heads=12 is not divisible by num_kv_heads=0"),
        (LlamaConfig, {"head_dim": 5}, "head_dim=5 is not even"),
        (LlamaConfig, {"rope_base": 0.0}, "rope_base=0.0 is not a finite number above 0"),
        (LlamaConfig, {"dropout_rate": -0.1}, "dropout_rate=-0.1 is not inside"),
    ],
)
def test_impossible_configs(config, change, message):
    with pytest.raises(InputError, match=message):
        config(**change)
    with pytest.raises(InputError, match="vocab_size=None"):
        config().make()


@both
def test_rows_that_are_too_long(kind):
    model, long = model_of(CONFIGS[kind]), jnp.zeros((1, 13), jnp.int32)
    with pytest.raises(InputError, match="rows of 13 tokens do not fit max_length=12"):
        jax.eval_shape(model.apply, VARIABLES[kind], long)
