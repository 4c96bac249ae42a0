"""ModernBERT: what layers see, and the same however it is computed."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import BLOCK, tolerance

from jaxlm import sharding, tree
from jaxlm.errors import InputError
from jaxlm.models import bert, modernbert
from jaxlm.models.bert import BertConfig
from jaxlm.models.heads import WithLmHead
from jaxlm.models.model import ModelConfig, TransformConfig
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.nn.intercept import find_sites
from jaxlm.peft import lora
from jaxlm.peft.lora import LoraConfig

VOCAB, LENGTH = 24, 12
CONFIG = ModernBertConfig(
    vocab_size=VOCAB,
    num_layers=4,
    hidden_dim=16,
    num_heads=4,
    mlp_dim=24,
    max_length=LENGTH,
    window=2,
    unroll=1,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (4, LENGTH)), jnp.int32)
DOCUMENTS = jnp.asarray(np.tile(np.repeat([0, 1, -1], [5, 4, 3]), (4, 1)), jnp.int32)


def model_of(config):
    return WithLmHead(config.make(), config.make_lm_head())


def shapes_of(config):
    return jax.eval_shape(model_of(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def random_like(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)


VARIABLES = random_like(shapes_of(CONFIG))


def first(num_layers):
    """The model of the first layers alone, and its variables."""
    params = VARIABLES["params"]
    layers = jax.tree.map(lambda x: x[:num_layers], params["encoder"]["layers"])
    encoder = params["encoder"] | {"layers": layers}
    return replace(CONFIG, num_layers=num_layers), {"params": params | {"encoder": encoder}}


def difference(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in leaves)


def logits(variables, config=CONFIG, *, tokens=TOKENS, segment_ids=DOCUMENTS, apply=None):
    return (apply or model_of(config).apply)(variables, tokens, segment_ids=segment_ids)


def gradient(variables, config=CONFIG):
    total = lambda variables: jnp.sum(jnp.sin(logits(variables, config)))
    return jax.value_and_grad(total)(variables)


def seen(num_layers, documents):
    """Which tokens each position of the last layer depends on, found by changing them."""
    config, variables = first(num_layers)
    params = {"params": variables["params"]["encoder"]}
    hidden = jax.jit(lambda tokens, ids: config.make().apply(params, tokens, segment_ids=ids))
    changed = np.tile(TOKENS[0], (LENGTH + 1, 1))
    changed[np.arange(LENGTH), np.arange(LENGTH)] += 1
    ids = np.tile(documents, (LENGTH + 1, 1))
    *rows, plain = np.asarray(hidden(jnp.asarray(changed % VOCAB), jnp.asarray(ids)))
    return np.abs(np.stack(rows) - plain).max(-1).T > 1e-6  # [position, token]


def test_the_first_of_three_layers_sees_all_and_the_next_a_window(monkeypatch):
    whole = np.zeros(LENGTH, np.int32)
    assert seen(1, whole).all()
    # Without what the first adds, two layers of a window of two reach as far as four.
    layers = VARIABLES["params"]["encoder"]["layers"]
    out = layers["attention"]["out"]
    monkeypatch.setitem(out, "kernel", out["kernel"].at[0].set(0))
    apart = np.abs(np.arange(LENGTH)[:, None] - np.arange(LENGTH))
    np.testing.assert_array_equal(seen(2, whole), apart <= 2)
    np.testing.assert_array_equal(seen(3, whole), apart <= 4)
    assert seen(4, whole).all()  # it sees all again
    assert CONFIG.is_local.tolist() == [False, True, True, False]


def test_documents_of_a_row_stay_apart():
    documents = np.asarray(DOCUMENTS[0])
    np.testing.assert_array_equal(seen(4, documents), documents[:, None] == documents)


def test_padding_and_other_documents_change_nothing():
    run = jax.jit(partial(logits, VARIABLES))
    packed = run(segment_ids=DOCUMENTS)
    moved = jnp.roll(TOKENS, 3, axis=1), jnp.roll(DOCUMENTS, 3, axis=1)  # padding on the left
    assert difference(packed[:, :9], run(tokens=moved[0], segment_ids=moved[1])[:, 3:]) < 1e-5
    alone = logits(VARIABLES, tokens=TOKENS[:, 5:9], segment_ids=None)
    assert difference(packed[:, 5:9], alone) < 1e-5
    assert difference(packed[:, :4], alone) > 0.1  # the control


# The same however it is computed.


@pytest.mark.parametrize(
    "how",
    [
        {"unroll": None},
        pytest.param({"unroll": 3}, marks=pytest.mark.slow),
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"unroll": None, "remat": "dots"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_loop_equals_no_loop(how):
    plain = jax.jit(gradient)(VARIABLES)
    other = jax.jit(partial(gradient, config=replace(CONFIG, **how)))(VARIABLES)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain))
    assert difference(plain, other) < 1e-5 * size
    assert size > 1


def test_without_a_loop_the_kind_of_a_layer_is_a_constant():
    def compiled(global_every, unroll=None):
        config = replace(CONFIG, num_layers=2, global_every=global_every, unroll=unroll)
        run = jax.jit(partial(logits, config=config, segment_ids=None))
        return run.lower(shapes_of(config)).compile().as_text()

    is_square = re.compile(rf"pred\[[\d,]*{LENGTH},{LENGTH}\]")
    assert not is_square.search(compiled(1))  # a layer that sees all of a row has no mask
    assert is_square.search(compiled(2))
    assert " conditional(" not in compiled(2)
    assert " conditional(" in compiled(2, unroll=1)  # the control


def test_blocks_make_no_square_and_change_nothing():
    config = replace(CONFIG, num_layers=2, global_every=2, window=8, max_length=1024)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (1, 1024)), jnp.int32)
    documents = (jnp.arange(1024) // 300)[None]
    shapes = jax.eval_shape(config.make().init, jax.random.key(0), tokens)
    variables = random_like(shapes)

    def run(attention):
        model = replace(config, attention=attention).make()
        run = jax.jit(partial(model.apply, segment_ids=documents))
        done = run.lower(variables, tokens).compile()
        return done(variables, tokens), re.search(r"\[[\d,]*1024,1024\]", done.as_text())

    (plain, has_square), (blocks, has_none) = run("plain"), run("blockwise")
    assert has_square
    assert not has_none
    np.testing.assert_allclose(blocks, plain, atol=2e-5)


@pytest.mark.parametrize("look", [logits, pytest.param(gradient, marks=pytest.mark.slow)])
def test_a_mesh_gives_what_one_device_gives(look):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    places = sharding.tree_shardings(VARIABLES, mesh)

    @partial(jax.jit, in_shardings=(places,))
    def on_mesh(variables):
        with sharding.use_mesh(mesh):
            return look(variables)

    one, many = jax.jit(look)(VARIABLES), on_mesh(jax.device_put(VARIABLES, places))
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(one))
    assert difference(one, many) < 1e-4 * size
    assert size > 1


def test_adapters_equal_what_is_merged():
    sites = find_sites(logits, VARIABLES)
    kernels = {path.rpartition("/")[0] for path in sites if path.endswith("kernel")}
    assert kernels == {
        "head/transform",
        *(f"encoder/layers/attention/{name}" for name in ("query", "key", "value", "out")),
        *(f"encoder/layers/mlp/{name}" for name in ("gate", "up", "down")),
    }
    config = LoraConfig(targets=(r".*/kernel",), rank=2)
    make = partial(lora.init_at, params=VARIABLES["params"], sites=sites, config=config)
    adapter = random_like(jax.eval_shape(make, jax.random.key(0)))
    apply = lora.adapt(model_of(CONFIG).apply, config)
    adapted = jax.jit(lambda v: logits(v, apply=apply))({**VARIABLES, "lora": adapter})
    plain, merged = (
        jax.jit(logits)({"params": params})
        for params in (VARIABLES["params"], lora.merge(VARIABLES["params"], adapter, config))
    )
    assert difference(adapted, merged) < 1e-4 * float(jnp.abs(merged).max())
    assert difference(adapted, plain) > 0.1


def test_bfloat16_stays_near():
    config, variables = first(2)
    exact, near = (
        jax.jit(partial(logits, config=replace(config, dtype=dtype)))(variables)
        for dtype in ("float32", "bfloat16")
    )
    assert near.dtype == jnp.float32
    size = float(jnp.abs(exact).max())
    assert 0 < difference(exact, near) < tolerance("bfloat16", depth=3 * BLOCK) * size


@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate", "mlp_dropout_rate"])
def test_dropout_follows_its_rates(rate):
    config, variables = first(1)
    model, params = replace(config, **{rate: 0.5}).make(), variables["params"]["encoder"]

    @jax.jit
    def drawn(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, TOKENS, deterministic=False, rngs=rngs)

    assert difference(drawn(jax.random.key(0)), drawn(jax.random.key(1))) > 0.01


@pytest.mark.parametrize(
    ("config", "published"), [(modernbert.BASE, 149_655_232), (modernbert.LARGE, 395_881_664)]
)
def test_number_of_parameters(config, published):
    """Those of ``ModernBertForMaskedLM`` in the published sizes."""
    assert tree.num_params(shapes_of(replace(config, vocab_size=50_368))) == published


@pytest.mark.parametrize(
    ("config", "sibling"),
    [
        (modernbert.TINY, BertConfig(num_layers=3, hidden_dim=192, num_heads=3, mlp_dim=768)),
        (modernbert.MINI, bert.MINI),
    ],
)
def test_small_ones_are_as_large_as_their_siblings(config, sibling):
    sizes = [
        tree.num_params(shapes_of(replace(c, vocab_size=8192))["params"]["encoder"]["layers"])
        for c in (config, sibling)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.03)


def test_first_weights_are_as_published():
    config = replace(CONFIG, hidden_dim=64, num_layers=8)
    params = jax.jit(model_of(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    encoder, head = params["params"]["encoder"], params["params"]["head"]
    layers = encoder["layers"]
    truncated = 0.8796  # of the deviation of a normal cut at two of it
    for x in (encoder["token_embed"]["embedding"], layers["mlp"]["gate"]["kernel"]):
        assert float(x.std()) == pytest.approx(0.02 * truncated, rel=0.1)
    down = layers["mlp"]["down"]["kernel"], layers["attention"]["out"]["kernel"]
    for x in (*down, head["transform"]["kernel"]):
        assert float(x.std()) == pytest.approx(0.02 / 16**0.5 * truncated, rel=0.1)


def test_heads_of_tasks_begin_as_the_language_models():
    assert isinstance(CONFIG, TransformConfig)
    assert isinstance(CONFIG, ModelConfig)
    assert not isinstance(BertConfig(), TransformConfig)


def test_flops_are_those_of_the_compiled_products():
    # XLA counts elementwise operations as well, a share that vanishes with the width.
    sizes = {"hidden_dim": 512, "mlp_dim": 1024, "vocab_size": 512, "max_length": 64}
    config = replace(CONFIG, **sizes, unroll=None, window=64)
    rows, length, num_predicted = 16, 32, 8
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    predicted = jax.ShapeDtypeStruct((rows, num_predicted), jnp.int32)
    done = jax.jit(model_of(config).apply).lower(shapes_of(config), tokens, predicted)
    expected = rows * config.forward_flops(length, num_predicted)
    assert done.cost_analysis()["flops"] == pytest.approx(expected, rel=0.05)
    # Two of four layers see five positions and not 32, of keys and of values.
    narrow = replace(config, window=2).forward_flops(length, num_predicted)
    assert rows * narrow == expected - rows * 2 * 2 * 2 * length * (32 - 5) * 512


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "hidden_dim=768 is not divisible by twice num_heads=5"),
        ({"hidden_dim": 36}, "hidden_dim=36 is not divisible by twice num_heads=12"),
        ({"num_layers": 0}, "num_layers=0 is not above 0"),
        ({"window": 0}, "window=0 is not above 0"),
        ({"global_every": 0}, "global_every=0 is not above 0"),
        ({"local_rope_base": 0.0}, "local_rope_base=0.0 is not a finite number above 0; 10000"),
        ({"mlp_dropout_rate": 1.0}, r"mlp_dropout_rate=1.0 is not inside \[0, 1\)"),
    ],
)
def test_impossible_configs(change, message):
    with pytest.raises(InputError, match=message):
        ModernBertConfig(**change)
    with pytest.raises(InputError, match="vocab_size=None"):
        ModernBertConfig().make()


def test_rows_that_are_too_long():
    model, rows = CONFIG.make(), jnp.zeros((1, 13), jnp.int32)
    with pytest.raises(InputError, match="rows of 13 tokens do not fit max_length=12") as raised:
        jax.eval_shape(model.init, jax.random.key(0), rows)
    assert "\n" not in str(raised.value)
    longer = replace(CONFIG, max_length=13).make()  # the way out
    assert jax.eval_shape(longer.init, jax.random.key(0), rows)
