import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from rounding import BLOCK, DTYPES, tolerance
from tiny_models import BERT

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.models import bert
from jaxlm.models.bert import BertBlock, BertConfig
from jaxlm.models.heads import MlmHead, WithLmHead
from jaxlm.nn import masks

GOLDEN = Path(__file__).parent.parent / "golden" / "bert_tiny.npz"
CONFIG = replace(
    BERT,
    vocab_size=40,
    max_length=12,
    dropout_rate=0.1,
    attention_dropout_rate=0.1,
    unroll=1,
)
MODEL = CONFIG.make()
LOW = replace(CONFIG, dtype="bfloat16").make()


def shapes_of(module, *args):
    return jax.eval_shape(module.init, jax.random.key(0), *args)


def random_like(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)


TOKENS = np.random.default_rng(0).integers(0, 20, (2, 10))
VARIABLES = random_like(shapes_of(MODEL, jnp.asarray(TOKENS)))
COUNTED = np.arange(10)[None].repeat(2, 0)


@partial(jax.jit, static_argnames="model")
def hidden_and_gradient(model, tokens, positions, segment_ids, mask, weights):
    """Hidden states, and the gradient of a sum over the positions with weight."""

    def total(variables):
        hidden = model.apply(
            variables, tokens, positions=positions, segment_ids=segment_ids, mask=mask
        ).astype(jnp.float32)
        return jnp.sum(jnp.sin(3 * hidden) * weights[..., None]), hidden

    gradients, hidden = jax.grad(total, has_aux=True)(VARIABLES)
    return hidden, gradients["params"]


def run(
    tokens,
    *,
    model=MODEL,
    positions=COUNTED,
    segment_ids=0 * COUNTED,
    lengths=(10, 10),
    weights=None,
):
    """Always all arguments, so that there is one compilation."""
    mask = np.arange(10)[None] < np.array(lengths)[:, None]
    weights = np.float32(mask if weights is None else weights)
    arguments = (tokens, positions, segment_ids, mask[:, None, None], weights)
    return jax.tree.map(np.asarray, hidden_and_gradient(model, *map(jnp.asarray, arguments)))


@partial(jax.jit, static_argnames="model")
def run_plainly(tokens, model=MODEL):
    """No argument but the tokens."""
    return model.apply(VARIABLES, tokens).astype(jnp.float32)


def difference(a, b):
    return max(
        float(np.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize(
    ("config", "vocab_size", "published"),
    [
        # Hugging Face's bert-base-uncased and bert-large-uncased without poolers; roberta-base
        # without its pooler and the two unused rows of its position table.
        (bert.BASE, 30522, 109_482_240 - (768 * 768 + 768)),
        (bert.LARGE, 30522, 335_141_888 - (1024 * 1024 + 1024)),
        (bert.ROBERTA_BASE, 50265, 124_645_632 - (768 * 768 + 768) - 2 * 768),
    ],
    ids=["base", "large", "roberta"],
)
def test_number_of_parameters(config, vocab_size, published):
    c = replace(config, vocab_size=vocab_size)
    h, m = c.hidden_dim, c.mlp_dim
    layer = 4 * (h * h + h) + (h * m + m) + (m * h + h) + 2 * 2 * h
    tables = (vocab_size + c.max_length + c.num_token_types) * h
    assert tables + 2 * h + c.num_layers * layer == published
    assert tree.num_params(shapes_of(c.make(), jnp.zeros((1, 8), jnp.int32))) == published


def test_number_of_parameters_with_the_head():
    model = WithLmHead(replace(bert.BASE, vocab_size=30522).make(), MlmHead())
    assert tree.num_params(shapes_of(model, jnp.zeros((1, 8), jnp.int32))) == 109_514_298


# Published numerics.


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(GOLDEN))
    params = {path[7:]: leaf for path, leaf in arrays.items() if path.startswith("params/")}
    arrays["params"] = unflatten_dict({k: jnp.asarray(v) for k, v in params.items()}, sep="/")
    return arrays


GOLDEN_MODEL = WithLmHead(
    replace(BERT, vocab_size=60, hidden_dim=32, mlp_dim=48, max_length=16, unroll=1).make(),
    MlmHead(),
)


@jax.jit
def compute_golden(params, tokens, token_type_ids, mask):
    """Hidden states after each layer, and logits."""

    def logits(model):
        hidden = model.encoder(tokens, token_type_ids=token_type_ids, mask=mask)
        return model.head(hidden, model.encoder.token_embed)

    logits, kept = GOLDEN_MODEL.apply(
        {"params": params},
        method=logits,
        capture_intermediates=lambda module, _: isinstance(module, BertBlock),
        mutable="intermediates",
    )
    return kept["intermediates"]["encoder"]["layers"]["__call__"][0], logits


def test_equals_hugging_face(golden):
    tokens, types = jnp.asarray(golden["tokens"]), jnp.asarray(golden["token_type_ids"])
    mask = masks.padding(jnp.asarray(golden["lengths"]), tokens.shape[1])
    hidden, logits = compute_golden(golden["params"], tokens, types, mask)
    for ours, theirs in ((hidden, golden["hidden"]), (logits, golden["logits"])):
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    # Controls: each input is felt.
    for other in ((0 * types, mask), (types, mask | True)):
        _, logits = compute_golden(golden["params"], tokens, *other)
        assert np.abs(logits - golden["logits"]).max() > 0.1


def test_every_golden_parameter_matters(golden):
    tokens, types = jnp.asarray(golden["tokens"]), jnp.asarray(golden["token_type_ids"])
    mask = masks.padding(jnp.asarray(golden["lengths"]), tokens.shape[1])

    def total(params):
        return jnp.sum(jnp.sin(compute_golden(params, tokens, types, mask)[1]))

    gradients = tree.leaves_with_path(jax.jit(jax.grad(total))(golden["params"]))
    assert len(gradients) == 26
    # A key's bias adds the same to all scores of a row, and softmax takes it away again.
    unfelt = {path for path, g in gradients if float(np.abs(g).max()) < 1e-3}
    assert unfelt == {"encoder/layers/attention/key/bias"}


# Invariants.


def test_no_argument_means_no_restriction():
    assert difference(run(TOKENS)[0], run_plainly(TOKENS)) < 1e-6


def share(a, b):
    """The largest difference, over the largest number of the array that it is in."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    pairs = zip(a, b, strict=True)
    return max(difference(x, y) / max(1, float(np.abs(y).max())) for x, y in pairs)


MODELS = pytest.mark.parametrize("model", [MODEL, LOW], ids=DTYPES)
LIMITS = {MODEL: tolerance("float32", depth=2 * BLOCK), LOW: tolerance("bfloat16", depth=2 * BLOCK)}


@MODELS
def test_padding_changes_nothing(model):
    lengths = np.array([10, 6])
    real = np.less(COUNTED, lengths[:, None])
    hidden, gradient = run(TOKENS, lengths=lengths, model=model)

    noise = np.where(real, TOKENS, 39)  # other tokens behind the end
    other, other_gradient = run(noise, lengths=lengths, model=model)
    assert difference(hidden[real], other[real]) == 0
    assert difference(gradient, other_gradient) == 0

    segments = np.where(real, 0, -1)  # the other way to say it
    same, same_gradient = run(noise, segment_ids=segments, weights=real, model=model)
    assert share(hidden[real], same[real]) < LIMITS[model]
    assert share(gradient, same_gradient) < LIMITS[model]
    assert share(hidden[1, :6], run_plainly(TOKENS[:, :6], model)[1]) < LIMITS[model]

    _, unmasked = run(noise, weights=real, model=model)  # the control
    assert share(unmasked, gradient) > 4 * LIMITS[model]


@MODELS
def test_packed_documents_do_not_mix(model):
    # Documents of different tokens: the gradient of one's hidden states never reaches the other's.
    tokens = np.array([[*range(20, 26), *range(30, 34)]] * 2)
    first = np.array([[1] * 6 + [0] * 4] * 2)
    _, isolated = run(tokens, segment_ids=1 - first, weights=first, model=model)
    _, mixed = run(tokens, weights=first, model=model)

    def reached(gradient):
        table = gradient["token_embed"]["embedding"]
        return set(np.flatnonzero(np.abs(table).max(-1) > 0))

    assert reached(isolated) == set(range(20, 26))
    assert reached(mixed) == {*range(20, 26), *range(30, 34)}  # the control


@MODELS
def test_packed_equals_unpacked(model):
    starts = np.array([[*range(6), *range(4)]] * 2)
    segments = np.array([[0] * 6 + [1] * 4] * 2)
    packed, gradient = run(TOKENS, positions=starts, segment_ids=segments, model=model)
    first, first_gradient = run(TOKENS, lengths=(6, 6), model=model)
    second, second_gradient = run(np.roll(TOKENS, 4, axis=1), lengths=(4, 4), model=model)
    apart = np.concatenate([first[:, :6], second[:, :4]], axis=1)
    assert share(packed, apart) < LIMITS[model]
    both = jax.tree.map(np.add, first_gradient, second_gradient)
    assert share(gradient, both) < LIMITS[model]
    _, continued = run(TOKENS, segment_ids=segments, model=model)
    assert share(continued, gradient) > 4 * LIMITS[model]  # the control: positions go on counting


def test_positions_count_from_zero_unless_told():
    hidden, _ = run(TOKENS)
    assert difference(hidden, run(TOKENS, positions=COUNTED + 2)[0]) > 1e-2
    # Without positions BERT sees a set: the same tokens in another order, in that order.
    forwards, _ = run(TOKENS, positions=0 * COUNTED)
    backwards, _ = run(TOKENS[:, ::-1], positions=0 * COUNTED)
    assert difference(forwards, backwards[:, ::-1]) < 1e-5


def test_bfloat16_stays_near():
    low = jax.jit(replace(CONFIG, dtype="bfloat16").make().apply)(VARIABLES, jnp.asarray(TOKENS))
    assert low.dtype == jnp.bfloat16
    assert difference(np.asarray(low, np.float32), run_plainly(TOKENS)) < 0.1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_every_product_is_bfloat16_in_and_float32_out(platform):
    config = replace(CONFIG, dtype="bfloat16")
    model = WithLmHead(config.make(), MlmHead(dtype=jnp.bfloat16))
    tokens = jnp.asarray(TOKENS, jnp.int32)

    def products(model):
        gradient = jax.grad(lambda variables: jnp.sum(jnp.sin(model.apply(variables, tokens))))
        traced = jax.jit(gradient).trace(shapes_of(model, tokens))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        types = re.findall(r"stablehlo.dot_general.* : \((.*), (.*)\) -> (.*)", text)
        return {tuple(re.sub(r"tensor<[\dx]*x|>.*", "", t) for t in types_) for types_ in types}

    assert products(model) == {("bf16", "bf16", "f32")}
    assert products(WithLmHead(CONFIG.make(), MlmHead())) == {("f32", "f32", "f32")}  # the control


@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate", None])
def test_dropout_follows_its_rates(rate):
    rates = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    model = replace(CONFIG, **(rates if rate is None else rates | {rate: 0.5})).make()

    @jax.jit
    def drawn(key, tokens):
        return model.apply(VARIABLES, tokens, deterministic=False, rngs={"dropout": key})

    first, second = (drawn(jax.random.key(seed), TOKENS) for seed in (0, 1))
    if rate is None:
        assert difference(first, run_plainly(TOKENS)) < 1e-6
    else:
        assert difference(first, second) > 0.01
        with pytest.raises(Exception, match="dropout"):
            jax.eval_shape(
                lambda v: model.apply(v, jnp.asarray(TOKENS), deterministic=False), VARIABLES
            )


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_dim": 770}, "hidden_dim=770 is not divisible by num_heads=12"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0 is not inside"),
        ({"attention_dropout_rate": -0.1}, "attention_dropout_rate=-0.1 is not inside"),
    ],
)
def test_impossible_configs(change, message):
    with pytest.raises(InputError, match=message):
        BertConfig(**change)


def test_the_vocabulary_must_be_known():
    with pytest.raises(InputError, match="vocab_size=None"):
        BertConfig().make()


def test_rows_that_are_too_long():
    with pytest.raises(InputError, match="rows of 13 tokens do not fit max_length=12"):
        jax.eval_shape(MODEL.apply, VARIABLES, jnp.zeros((1, 13), jnp.int32))
    assert jax.eval_shape(MODEL.apply, VARIABLES, jnp.zeros((1, 12), jnp.int32)).shape == (
        1,
        12,
        16,
    )


def test_flops_are_those_of_the_compiled_products():
    # XLA counts elementwise operations as well, a share that vanishes with the width.
    config = replace(
        CONFIG, hidden_dim=256, mlp_dim=1024, vocab_size=512, max_length=32, unroll=None
    )
    model = WithLmHead(config.make(), MlmHead())
    tokens = jnp.zeros((1, 32), jnp.int32)
    args = shapes_of(model, tokens), tokens, jnp.zeros((1, 8), jnp.int32)
    counted = jax.jit(model.apply).lower(*args).cost_analysis()["flops"]
    assert counted == pytest.approx(config.forward_flops(32, 8), rel=0.05)
