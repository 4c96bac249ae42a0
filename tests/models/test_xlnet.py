"""XLNet: what each stream sees, memory, and the same however it is computed."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import BLOCK, tolerance

from jaxlm import sharding, tree
from jaxlm.errors import InputError
from jaxlm.models import xlnet
from jaxlm.models.bert import BertConfig
from jaxlm.models.heads import WithLmHead
from jaxlm.models.model import CausalConfig, ModelConfig, TwoStreamConfig
from jaxlm.models.xlnet import XlnetConfig, remember
from jaxlm.nn import masks
from jaxlm.nn.intercept import find_sites
from jaxlm.nn.relative import distance_table, shift
from jaxlm.peft import lora
from jaxlm.peft.lora import LoraConfig

VOCAB = 40
CONFIG = XlnetConfig(
    vocab_size=VOCAB, num_layers=2, hidden_dim=16, num_heads=4, mlp_dim=24, unroll=1
).with_dropout(0.0)
# Two documents; of the first two tokens are predicted, of the second, of one token, all.
ORDER = np.array([0, 2, 0, 0, 1, 0, 3, 4, 0, 0])
DOCUMENTS = np.array([0, 0, 0, 0, 0, 0, 0, 1, 2, 2])
PREDICTED = np.array([4, 1, 6, 7])
SEEN = [{0, 2, 3, 5}, {0, 2, 3, 5, 4}, {0, 2, 3, 5, 4, 1}, set()]
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 10)
ROWS = len(PREDICTED)  # the same row, once for each prediction


def model_of(config):
    return WithLmHead(config.make(), config.make_lm_head())


def shapes_of(config):
    return jax.eval_shape(model_of(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def random_like(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)


VARIABLES = random_like(shapes_of(CONFIG))
REPEATED = jnp.asarray(np.tile(TOKENS, (ROWS, 1)), jnp.int32)
GIVEN = {
    "predicted": jnp.asarray(np.tile(PREDICTED, (ROWS, 1)), jnp.int32),
    "segment_ids": jnp.asarray(np.tile(DOCUMENTS, (ROWS, 1)), jnp.int32),
    "mask": masks.permutation(jnp.asarray(np.tile(ORDER, (ROWS, 1)))),
    "weights": jnp.eye(ROWS),
}


@partial(jax.jit, static_argnums=0)
def hidden_and_gradient(config, tokens, predicted, segment_ids, mask, weights, memory=None):
    """Both streams, and the gradient of a part of the query stream by the embeddings."""
    params = VARIABLES["params"]["encoder"]
    table = params["token_embed"]["embedding"]

    def total(added):  # to each token as if it had a row of its own
        rows = jnp.concatenate([table, table[tokens.reshape(-1)] + added])
        own = VOCAB + jnp.arange(tokens.size).reshape(tokens.shape)
        streams = (
            replace(config, vocab_size=len(rows))
            .make()
            .apply(
                {"params": params | {"token_embed": {"embedding": rows}}},
                own,
                predicted,
                segment_ids=segment_ids,
                mask=mask,
                memory=memory,
                method="streams",
            )
        )
        return jnp.sum(jnp.sin(3 * streams.query) * weights[..., None]), streams

    gradient, streams = jax.grad(total, has_aux=True)(jnp.zeros((tokens.size, config.hidden_dim)))
    return streams, gradient.reshape(*tokens.shape, -1)


def run(config=CONFIG, tokens=REPEATED, **changes):
    streams, gradient = hidden_and_gradient(config, tokens, **(GIVEN | changes))
    return jax.tree.map(np.asarray, streams), np.asarray(gradient)


def difference(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in leaves)


def seen_by(gradient):
    return [set(np.flatnonzero(np.abs(row).max(-1) > 1e-6).tolist()) for row in gradient]


def test_a_prediction_sees_neither_itself_nor_a_later_one_nor_another_document():
    _, gradient = run()
    assert seen_by(gradient) == SEEN  # every one of them, and no other
    # The controls: with its own place in the mask, with a later one, and with one document.
    own = GIVEN["mask"] | jnp.eye(10, dtype=bool)[None, None]
    own = seen_by(run(mask=own)[1])
    assert own == [seen | {place} for seen, place in zip(SEEN, PREDICTED, strict=True)]
    reverse = jnp.asarray(np.tile(np.where(ORDER > 0, 5 - ORDER, 0), (ROWS, 1)))
    later = seen_by(run(mask=masks.permutation(reverse))[1])
    assert 1 in later[0]
    assert 6 in later[1]
    mixed = seen_by(run(segment_ids=0 * GIVEN["segment_ids"])[1])
    assert {8, 9} <= mixed[0] & mixed[3]


def test_the_content_stream_hides_what_comes_later():
    # What a later prediction is told changes no earlier hidden state, nor those of the context.
    other = REPEATED.at[:, 6].set((TOKENS[6] + 1) % VOCAB)
    (streams, _), (changed, _) = run(), run(tokens=other)
    same = [i for i in range(10) if i != 6]
    assert difference(streams.content[:, same], changed.content[:, same]) < 1e-6
    assert difference(streams.query, changed.query) < 1e-6  # it is predicted last in its document
    assert difference(streams.content[:, 6], changed.content[:, 6]) > 0.02
    everything = {"mask": jnp.ones((ROWS, 1, 10, 10), bool)}  # the control
    (streams, _), (changed, _) = run(**everything), run(tokens=other, **everything)
    assert difference(streams.content[:, same], changed.content[:, same]) > 0.02


def test_shifted_scores_by_hand():
    queries, keys, length = 3, 5, 3  # behind a memory of two
    distances = np.arange(keys, -length, -1)
    scores = jnp.asarray(distances, jnp.float32)[None, None, None].repeat(queries, 2)
    expected = np.arange(queries)[:, None] + keys - length - np.arange(keys)[None]
    np.testing.assert_array_equal(shift(scores, keys, None, length)[0, 0], expected)
    places = jnp.asarray(np.array([[2, 0, 2]]))
    np.testing.assert_array_equal(
        shift(scores, keys, places, length)[0, 0], expected[np.array([2, 0, 2])]
    )


def test_distances_by_hand():
    table = np.asarray(distance_table(3, 2, 4, clamp_length=2))
    angles = np.array([2, 2, 1, 0, -1])[:, None] * np.array([1, 0.01])
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    np.testing.assert_allclose(table, expected, atol=1e-6)


def test_angles_of_long_rows_are_rounded_once():
    angles = np.outer(np.arange(512, -512, -1), 10_000 ** -(np.arange(0, 64, 2) / 64))
    rounded = angles.astype(np.float32).astype(float)
    expected = np.concatenate([np.sin(rounded), np.cos(rounded)], axis=-1)
    np.testing.assert_allclose(distance_table(512, 512, 64), expected, atol=1e-5)


# The content stream alone.


@partial(jax.jit, static_argnums=0)
def encode(config, tokens, token_type_ids, segment_ids, mask):
    variables = {"params": VARIABLES["params"]["encoder"]}
    options = {"token_type_ids": token_type_ids, "segment_ids": segment_ids, "mask": mask}
    return config.make().apply(variables, tokens, **options)


def content(tokens, *, types=None, segment_ids=None, mask=None, config=CONFIG):
    """Always all arguments, so that there is one compilation."""
    rows = np.atleast_2d(tokens)
    zeros = np.zeros(rows.shape, int)
    types = zeros if types is None else np.broadcast_to(types, rows.shape)
    segments = zeros if segment_ids is None else np.broadcast_to(segment_ids, rows.shape)
    mask = np.ones(rows.shape, bool) if mask is None else np.broadcast_to(mask, rows.shape)
    arrays = (jnp.asarray(x, jnp.int32) for x in (rows, types, segments))
    return np.asarray(encode(config, *arrays, jnp.asarray(mask)[:, None, None]))


def test_padding_on_either_side_changes_nothing():
    places = np.arange(10)
    real = np.stack([places < 7, places >= 3])  # on the right of one row, on the left of the other
    rows = np.stack([TOKENS, np.roll(TOKENS, 3)])
    noise = np.where(real, rows, 39)
    padded = content(noise, segment_ids=np.where(real, 0, -1))
    masked = content(noise, mask=real)  # the other way to say it
    assert difference(padded[real], masked[real]) < 1e-6
    assert difference(padded[0, :7], padded[1, 3:]) < 1e-5
    assert difference(padded[0, :7], content(noise)[0, :7]) > 0.1  # the control


def test_packed_equals_unpacked():
    packed = content(TOKENS, segment_ids=(np.arange(10) < 6).astype(int))
    first = content(TOKENS, mask=np.arange(10) < 6)[0, :6]
    second = content(np.roll(TOKENS, 4), mask=np.arange(10) < 4)[0, :4]
    assert difference(packed[0], np.concatenate([first, second])) < 1e-5


def test_token_types_are_equal_or_not():
    plain = content(TOKENS)
    assert difference(plain, content(TOKENS, types=5)) < 1e-6
    types = (np.arange(10) > 4).astype(int)
    assert difference(plain, content(TOKENS, types=types)) > 0.02
    assert difference(content(TOKENS, types=types), content(TOKENS, types=7 - 3 * types)) < 1e-6


def test_distances_count_and_are_clamped():
    def far(config):
        return content(TOKENS, mask=np.arange(10) == 9, config=config)[0]  # one that all see

    plain, clamped = far(CONFIG), far(replace(CONFIG, clamp_length=3))
    assert difference(plain[6:], clamped[6:]) < 1e-6
    assert difference(plain[:5], clamped[:5]) > 0.01


def test_no_position_of_a_causal_one_sees_a_later_one():
    config = replace(CONFIG, attention="uni")
    whole = content(TOKENS, config=config)
    part = content(np.where(np.arange(10) < 6, TOKENS, 0), config=config)
    assert difference(whole[:, :6], part[:, :6]) < 1e-6
    assert difference(content(TOKENS)[:, :6], whole[:, :6]) > 0.02


def test_a_memory_is_what_was_read_and_no_gradient_passes():
    config = replace(CONFIG, attention="uni")
    variables = {"params": VARIABLES["params"]["encoder"]}
    streams = partial(config.make().apply, variables, method="streams")

    @jax.jit
    def both(tokens):
        whole = streams(tokens)
        first = streams(tokens[:, :6])
        second = streams(tokens[:, 6:], memory=remember(None, first.inputs, 6))
        return whole.content[:, 6:], second.content

    whole, second = both(REPEATED[:1])
    assert difference(whole, second) < 1e-5

    inputs = jnp.arange(5.0)[None, None, :, None].repeat(2, 0)
    old = inputs - 5
    kept = lambda *given: np.asarray(remember(*given))[0, 0, :, 0].tolist()
    assert kept(old, inputs, 3) == [2, 3, 4]
    assert kept(old, inputs, 4, 2) == [-2, -1, 0, 1]  # of which the next segment reads the rest
    assert kept(None, inputs, 9) == [0, 1, 2, 3, 4]
    assert float(jnp.abs(jax.grad(lambda x: remember(old, x, 3).sum())(inputs)).max()) == 0


def test_predictions_see_what_is_read_before():
    """As by a memory that is made by hand; of a row with nothing before it, nothing."""
    variables = {"params": VARIABLES["params"]["encoder"]}
    given = jax.tree.map(lambda x: x[:2], {k: v for k, v in GIVEN.items() if k != "weights"})
    tokens, call = REPEATED[:2], partial(CONFIG.make().apply, variables)
    lengths = jnp.array([6, 0])

    @jax.jit
    def all_ways(earlier):
        read = partial(call, tokens, **given, method="predict")
        memory = remember(None, call(earlier, method="streams").inputs, 6)
        by_hand = call(tokens, **given, memory=memory, method="streams").query
        return read(before=(earlier, lengths)), by_hand, read()

    earlier = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 6)), jnp.int32)
    found, by_hand, alone = all_ways(earlier)
    assert difference(found[0], by_hand[0]) < 1e-5
    assert difference(found[1], alone[1]) < 1e-5
    assert difference(found[0], alone[0]) > 1e-2
    other = all_ways((earlier + 1) % VOCAB)[0]
    assert difference(found[0], other[0]) > 1e-2
    assert difference(found[1], other[1]) == 0


# The same however it is computed.


@pytest.mark.parametrize(
    "how", [{"unroll": None}, pytest.param({"remat": "full"}, marks=pytest.mark.slow)], ids=str
)
def test_a_loop_equals_no_loop(how):
    plain = run()
    assert difference(plain, run(replace(CONFIG, **how))) < 1e-4
    assert float(np.abs(plain[1]).max()) > 0.1


def predict(variables, config=CONFIG, *, apply=None, tokens=REPEATED, given=GIVEN):
    named = {"mask": given["mask"], "segment_ids": given["segment_ids"], "method": "predict"}
    return (apply or model_of(config).apply)(variables, tokens, given["predicted"], **named)


def gradient(variables):
    return jax.grad(lambda variables: jnp.sum(jnp.sin(predict(variables))))(variables)


@pytest.mark.parametrize("look", [predict, pytest.param(gradient, marks=pytest.mark.slow)])
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


def test_adapters_are_seen_by_both_streams():
    sites = find_sites(predict, VARIABLES)
    kernels = {path.rpartition("/")[0] for path in sites if path.endswith("kernel")}
    names = ("query", "key", "value", "position", "out")
    assert kernels == {
        *(f"encoder/layers/attention/{name}" for name in names),
        *(f"encoder/layers/mlp/{name}" for name in ("up", "down")),
    }
    config = LoraConfig(targets=(r".*/kernel",), rank=2)
    make = partial(lora.init_at, params=VARIABLES["params"], sites=sites, config=config)
    adapter = random_like(jax.eval_shape(make, jax.random.key(0)))
    apply = lora.adapt(model_of(CONFIG).apply, config)
    adapted = jax.jit(lambda v: predict(v, apply=apply))({**VARIABLES, "lora": adapter})
    plain, merged = (
        jax.jit(predict)({"params": params})
        for params in (VARIABLES["params"], lora.merge(VARIABLES["params"], adapter, config))
    )
    assert difference(adapted, merged) < 1e-4 * float(jnp.abs(merged).max())
    assert difference(adapted, plain) > 0.1


def test_bfloat16_stays_near():
    exact, near = (
        jax.jit(partial(predict, config=replace(CONFIG, dtype=dtype)))(VARIABLES)
        for dtype in ("float32", "bfloat16")
    )
    assert near.dtype == jnp.float32
    size = float(jnp.abs(exact).max())
    assert 0 < difference(exact, near) < tolerance("bfloat16", depth=2 * BLOCK) * size


@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate"])
def test_dropout_follows_its_rates(rate):
    model = replace(CONFIG, **{rate: 0.5}).make()
    variables = {"params": VARIABLES["params"]["encoder"]}

    @jax.jit
    def drawn(key):
        return model.apply(variables, REPEATED, deterministic=False, rngs={"dropout": key})

    assert difference(drawn(jax.random.key(0)), drawn(jax.random.key(1))) > 0.01


@pytest.mark.parametrize(
    ("config", "published"), [(xlnet.BASE, 116_718_336), (xlnet.LARGE, 360_268_800)]
)
def test_number_of_parameters(config, published):
    """Those of ``XLNetModel`` in the published sizes, which has no bias over the vocabulary."""
    shapes = shapes_of(replace(config, vocab_size=32_000))["params"]
    assert tree.num_params(shapes["encoder"]) == published


def test_which_models_have_a_query_stream():
    assert isinstance(CONFIG, TwoStreamConfig)
    assert not isinstance(BertConfig(), TwoStreamConfig)
    assert isinstance(BertConfig(), ModelConfig)
    assert not isinstance(CONFIG, CausalConfig)


def test_flops_are_those_of_the_compiled_products():
    # XLA counts elementwise operations as well, a share that vanishes with the width; and the
    # projection of distances, which is one for the batch.
    sizes = {"hidden_dim": 512, "mlp_dim": 2048, "vocab_size": 512}
    config = replace(CONFIG, **sizes, unroll=None)
    rows, length, num_predicted = 16, 32, 8
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    predicted = jax.ShapeDtypeStruct((rows, num_predicted), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, 1, length, length), bool)
    model = model_of(config)
    plain = jax.jit(model.apply).lower(shapes_of(config), tokens, predicted)
    two = jax.jit(lambda v, t, p, m: model.apply(v, t, p, mask=m, method="predict"))
    two = two.lower(shapes_of(config), tokens, predicted, mask)
    expected = config.forward_flops(length, num_predicted)
    assert plain.cost_analysis()["flops"] == pytest.approx(rows * expected, rel=0.05)
    expected += config.query_flops(length, num_predicted)
    # Compiled: before that, JAX 0.10 counts what nobody reads as well, and JAX 0.12 a part of it.
    assert two.compile().cost_analysis()["flops"] == pytest.approx(rows * expected, rel=0.05)
    call = lambda v, t, p, m, b: model.apply(v, t, p, mask=m, before=b, method="predict")
    before = tokens, jax.ShapeDtypeStruct((rows,), jnp.int32)
    behind = jax.jit(call).lower(shapes_of(config), tokens, predicted, mask, before)
    expected += config.memory_flops(length, length + num_predicted)
    entered = (config.num_layers - 1) / config.num_layers
    expected += config.forward_flops(length, 0) * entered * 2 / 3  # forward it is as another row
    assert behind.compile().cost_analysis()["flops"] == pytest.approx(rows * expected, rel=0.05)


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_dim": 770}, "hidden_dim=770 is not divisible by num_heads=12"),
        ({"hidden_dim": 9, "num_heads": 3}, "hidden_dim=9 is odd"),
        ({"num_layers": 0}, "num_layers=0 is not above 0"),
        ({"clamp_length": -1}, "clamp_length=-1 is not above 0; None = no limit"),
        ({"max_length": 0}, "max_length=0 is not above 0; None = no limit"),
        ({"dropout_rate": 1.0}, r"dropout_rate=1.0 is not inside \[0, 1\)"),
    ],
)
def test_impossible_configs(change, message):
    with pytest.raises(InputError, match=message):
        XlnetConfig(**change)
    with pytest.raises(InputError, match="vocab_size=None"):
        XlnetConfig().make()


def test_rows_that_are_too_long():
    model = replace(CONFIG, max_length=12).make()
    with pytest.raises(InputError, match="rows of 13 tokens do not fit max_length=12"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 13), jnp.int32))
