"""The Transformer and T5: what a target sees, with a cache and without, in a loop, on a mesh."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlm import sharding, tree
from jaxlm.config import ANY_BASE
from jaxlm.errors import InputError
from jaxlm.models import t5, transformer
from jaxlm.models.bert import BertConfig
from jaxlm.models.heads import EncoderDecoderLm
from jaxlm.models.model import CausalConfig, EncoderDecoderConfig, has_source_vocab
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.feedforward import Mlp
from jaxlm.nn.intercept import find_sites
from jaxlm.peft import lora
from jaxlm.peft.lora import LoraConfig

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = {"vocab_size": 40, "num_layers": 2, "num_decoder_layers": 3, "hidden_dim": 16}
SIZES |= {"mlp_dim": 24, "num_heads": 4, "dropout_rate": 0.0}
# T5's rows are longer than the distances that it tells apart.
V1_1 = {"gated": True, "tied": False, "scale_outputs": False, "activation": "gelu_tanh"}
CONFIGS = {
    "transformer": TransformerConfig(**SIZES),
    "t5": T5Config(**SIZES, **V1_1, head_dim=6, num_buckets=4, max_distance=5),
}
RNG = np.random.default_rng(0)
SOURCE, TARGET = (RNG.integers(0, 40, (2, n)).astype(np.int32) for n in (8, 7))
SIDES = jnp.asarray(SOURCE), jnp.asarray(TARGET)
PLACES, PLACES_ = (np.arange(n, dtype=np.int32)[None].repeat(2, 0) for n in (8, 7))
both = pytest.mark.parametrize("kind", CONFIGS)
# What both do by the same code is slow for one of them.
one = pytest.mark.parametrize("kind", [pytest.param("transformer", marks=pytest.mark.slow), "t5"])


def model_of(config):
    return EncoderDecoderLm(config.make(), config.make_lm_head())


def shapes_of(config):
    tokens = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(model_of(config).init, jax.random.key(0), tokens, tokens)


def random_like(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)


VARIABLES = {kind: random_like(shapes_of(config)) for kind, config in CONFIGS.items()}


@partial(jax.jit, static_argnums=0)
def logits_and_gradients(config, variables, sides, segments, positions, weights):
    """Logits, and the gradient of a sum over the positions with weight by all embeddings."""
    source, target = sides
    counts = source.size, target.size

    def total(added):
        table = variables["params"]["encoder"]["token_embed"]["embedding"]
        # Of each token as if it had a row of its own; there is no other use of the table.
        rows = table[jnp.concatenate([source.reshape(-1), target.reshape(-1)])] + added
        params = variables["params"]["encoder"] | {"token_embed": {"embedding": rows}}
        own = jnp.arange(sum(counts))
        hidden = (
            replace(config, vocab_size=sum(counts))
            .make()
            .apply(
                {"params": params},
                own[: counts[0]].reshape(source.shape),
                own[counts[0] :].reshape(target.shape),
                segment_ids=segments[0],
                decoder_segment_ids=segments[1],
                positions=positions[0],
                decoder_positions=positions[1],
            )
        )
        scored = lambda module, x: module.head(x, module.encoder.token_embed)
        logits = model_of(config).apply(variables, hidden, method=scored)
        return jnp.sum(jnp.sin(3 * hidden) * weights[..., None]), logits

    gradient, logits = jax.grad(total, has_aux=True)(jnp.zeros((sum(counts), config.hidden_dim)))
    parts = jnp.split(gradient, counts[:1])
    sides = (part.reshape(*side.shape, -1) for part, side in zip(parts, sides, strict=True))
    return logits, *sides


def run(kind, sides=(SOURCE, TARGET), segments=None, positions=None, weights=None):
    """Always all arguments, so that there is one compilation for each model."""
    segments = segments or (0 * PLACES, 0 * PLACES_)
    weights = np.ones((2, 7)) if weights is None else weights
    positions = positions or (PLACES, PLACES_)
    arguments = jax.tree.map(jnp.asarray, (sides, segments, positions, np.float32(weights)))
    out = logits_and_gradients(CONFIGS[kind], VARIABLES[kind], *arguments)
    return jax.tree.map(np.asarray, out)


def difference(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in leaves)


@pytest.mark.parametrize(
    ("config", "vocab_size", "published"),
    [
        (t5.SMALL, 32128, 60_506_624),
        (t5.BASE, 32128, 222_903_552),
        (t5.SMALL_V1_1, 32128, 76_961_152),
        (t5.BASE_V1_1, 32128, 247_577_856),
        # Table 3 rounds, to 65 and 213 million; attention has no biases in the paper's equations.
        (transformer.BASE, 37000, 63_045_632),
        (transformer.BIG, 37000, 214_171_648),
    ],
)
def test_number_of_parameters(config, vocab_size, published):
    assert tree.num_params(shapes_of(replace(config, vocab_size=vocab_size))) == published


def test_which_models_read_a_source():
    for config in CONFIGS.values():
        assert isinstance(config, EncoderDecoderConfig)
        assert not config.is_causal
    for other in (BertConfig(), ANY_BASE):
        assert not isinstance(other, EncoderDecoderConfig)
    assert isinstance(ANY_BASE, CausalConfig)


def test_sources_are_read_by_a_table_of_their_own():
    shared = replace(CONFIGS["transformer"], num_layers=1)
    own = replace(shared, source_vocab_size=12)
    assert has_source_vocab(own)
    assert not has_source_vocab(CONFIGS["t5"])
    drawn = random_like(shapes_of(own))["params"]["encoder"]
    assert shapes_of(own)["params"].keys() == {"encoder"}  # the decoder's table gives the logits
    assert {name: x["embedding"].shape[0] for name, x in drawn.items() if "_embed" in name} == {
        "token_embed": 40,
        "source_embed": 12,
    }
    source = jnp.asarray(SOURCE % 12)
    encoded = own.make().apply({"params": drawn}, source, method="encode")
    # As with the shared table of those rows; and so it is read, and the other is not.
    for name, is_same in (("source_embed", True), ("token_embed", False)):
        params = {"params": drawn | {"token_embed": drawn[name]}}
        alike = replace(shared, vocab_size=len(drawn[name]["embedding"]))
        other = alike.make().apply(params, source, method="encode")
        assert (difference(encoded, other) < 1e-5) is is_same


def seen_by(gradient):
    return set(np.flatnonzero(np.abs(gradient[0]).max(-1) > 1e-6))


@both
def test_a_target_sees_its_source_and_nothing_later(kind):
    documents = np.where(PLACES < 5, 3, 1), np.where(PLACES_ < 4, 3, 1)
    padded = np.where(PLACES < 5, 0, -1), np.where(PLACES_ < 6, 0, -1)
    for place in (0, 3, 4, 5):
        weights = np.where(place == PLACES_, 1.0, 0.0)
        _, source, target = run(kind, weights=weights)
        assert seen_by(source) == set(range(8))
        assert seen_by(target) == set(range(place + 1))  # every one of them, and no other
        _, source, target = run(kind, weights=weights, segments=documents)
        assert seen_by(source) == set(range(5) if place < 4 else range(5, 8))
        assert seen_by(target) == set(range(0 if place < 4 else 4, place + 1))
        _, source, target = run(kind, weights=weights, segments=padded)
        assert seen_by(source) == set(range(5))
    # The control: with all of it under one id, the second document sees the first.
    ids = 0 * PLACES, 0 * PLACES_
    _, source, target = run(kind, weights=np.where(PLACES_ == 6, 1.0, 0.0), segments=ids)
    assert (seen_by(source), seen_by(target)) == (set(range(8)), set(range(7)))


@both
def test_packed_equals_unpacked(kind):
    segments = np.where(PLACES < 5, 0, 1), np.where(PLACES_ < 4, 0, 1)
    starts = np.where(PLACES < 5, PLACES, PLACES - 5), np.where(PLACES_ < 4, PLACES_, PLACES_ - 4)
    packed, *_ = run(kind, segments=segments, positions=starts)
    alone = np.where(PLACES < 5, 0, -1), 0 * PLACES_
    first, *_ = run(kind, segments=alone)
    alone = np.where(PLACES < 3, 0, -1), 0 * PLACES_
    moved = np.roll(SOURCE, 3, axis=1), np.roll(TARGET, 3, axis=1)
    second, *_ = run(kind, moved, segments=alone)
    assert difference(packed, np.concatenate([first[:, :4], second[:, :3]], axis=1)) < 1e-5
    counted, *_ = run(kind, segments=segments)  # T5 counts distances, whatever the positions
    assert (difference(packed, counted) > 1e-2) == (kind == "transformer")


@both
def test_padding_on_either_side_changes_nothing(kind):
    # On the right of one row, on the left of the other; so with the positions.
    real, real_ = (np.stack([p[0] < len(p[0]) - 3, p[0] >= 3]) for p in (PLACES, PLACES_))
    counted = tuple(np.stack([p[0], np.maximum(p[0] - 3, 0)]) for p in (PLACES, PLACES_))
    segments = np.where(real, 0, -1), np.where(real_, 0, -1)
    logits, *_ = run(kind, segments=segments, positions=counted)
    noise = np.where(real, SOURCE, 39), np.where(real_, TARGET, 39)
    other, *_ = run(kind, noise, segments=segments, positions=counted)
    assert difference(logits[real_], other[real_]) == 0
    rolled = tuple(np.stack([x[0], np.roll(x[1], -3)]) for x in (SOURCE, TARGET))
    alone, *_ = run(kind, rolled, segments=(np.where(PLACES < 5, 0, -1), 0 * PLACES_))
    assert difference(logits[0, :4], alone[0, :4]) < 1e-5
    assert difference(logits[1, 3:], alone[1, :4]) < 1e-5
    unmasked, *_ = run(kind, noise, positions=counted)  # the control
    assert difference(logits[1, 3:], unmasked[1, 3:]) > 1e-2


def test_the_transformer_equals_that_of_torch():
    arrays = load_file(GOLDEN / "seq2seq_transformer.safetensors")
    config = TransformerConfig(
        vocab_size=24,
        num_layers=2,
        num_decoder_layers=3,
        hidden_dim=8,
        num_heads=2,
        mlp_dim=12,
        epsilon=1e-2,
        dropout_rate=0.0,
    )
    sides = [jnp.int32(arrays[name]) for name in ("tokens", "decoder_tokens")]

    @jax.jit
    def run(params, real, decoder_real):
        def total(params):
            logits = model_of(config).apply(
                {"params": params}, *sides, segment_ids=jnp.where(real, 0, -1)
            )
            return jnp.where(decoder_real[..., None], jnp.sin(logits), 0).sum(), logits

        return jax.grad(total, has_aux=True)(params)

    params = jax.tree.map(np.zeros_like, shapes_of(config)["params"])
    params = tree.map_with_path(lambda path, _: jnp.asarray(arrays[f"weights/{path}"]), params)
    for side in ("left", "right"):
        real, decoder_real = arrays[f"tokens/{side}"], arrays[f"decoder_tokens/{side}"]
        gradients, logits = run(params, real, decoder_real)
        assert np.abs(arrays[f"logits/{side}"]).max() > 1
        assert difference(logits, arrays[f"logits/{side}"]) < 1e-5
    for path, gradient in tree.leaves_with_path(gradients):
        theirs = arrays[f"gradients/{path}"]
        assert np.abs(theirs).max() > 1e-2
        assert difference(gradient, theirs) < 1e-5 * max(1, np.abs(theirs).max()), path


# With a cache.


@cache
def steps(config, adapted=None):
    """The two compiled functions: what reads the source, and what goes on."""
    model = model_of(config)
    apply = model.apply if adapted is None else lora.adapt(model.apply, adapted)

    def start(variables, source, segment_ids, empty):
        return apply(variables, source, empty, segment_ids=segment_ids, method="start")

    def extend(variables, tokens, cache, positions, segment_ids):
        return apply(
            variables, tokens, cache, positions=positions, segment_ids=segment_ids, method="extend"
        )

    return jax.jit(start), jax.jit(extend)


REAL = np.stack([PLACES[0] < 8, PLACES[0] < 5])
IDS = np.where(REAL, 0, -1).astype(np.int32)
PROMPT = np.array([[0] * 3, [-1, -1, 0], [0] * 3, [-1, -1, 0]], np.int32)  # of one token or three


def prompted(config, variables, adapted=None, dtype=None):
    """Two rows of targets for each source, of which every second is padded on the left."""
    start, extend = steps(config, adapted)
    cache = start(variables, SOURCE, IDS, config.make_cache(4, 8, 8, dtype))
    tokens = np.stack([TARGET[0, :3], TARGET[0, 4:], TARGET[1, :3], TARGET[1, 4:]])
    positions = np.maximum(np.arange(3)[None] + np.array([[0], [-2], [0], [-2]]), 0)
    return extend(variables, tokens, cache, np.int32(positions), PROMPT)


@both
def test_cached_equals_uncached_token_by_token(kind):
    variables = VARIABLES[kind]
    _, extend = steps(CONFIGS[kind])
    segments = IDS, 0 * PLACES_
    full, *_ = run(kind, segments=segments)
    late, *_ = run(kind, (SOURCE, np.roll(TARGET, 1, axis=1)), segments)  # from its last token on
    logits, cache = prompted(CONFIGS[kind], variables)
    expected = lambda i: np.stack([full[0, i + 2], late[0, i], full[1, i + 2], late[1, i]])
    for i in range(4):
        assert difference(logits, expected(i)) < 1e-5
        fed = np.stack([TARGET[0, i + 3], TARGET[0, i], TARGET[1, i + 3], TARGET[1, i]])[:, None]
        at = np.int32([[3 + i], [1 + i], [3 + i], [1 + i]])
        if i == 2:  # rows that share a source change places
            order = np.array([1, 0, 2, 2])
            logits, moved = extend(
                variables, fed[order], cache.take(jnp.asarray(order)), at[order], 0 * at
            )
            assert difference(logits, expected(3)[order]) < 1e-5
            assert moved.source.keys[0].shape[0] == 2  # as many as there are sources
        logits, cache = extend(variables, fed, cache, at, 0 * at)
    assert int(cache.index) == 7


@one
def test_a_model_and_its_cache_in_bfloat16_stay_near(kind):
    config = replace(CONFIGS[kind], dtype="bfloat16")
    exact, _ = prompted(CONFIGS[kind], VARIABLES[kind])
    near, cache = prompted(config, VARIABLES[kind])
    assert cache.source.keys[0].dtype == cache.own.keys[0].dtype == jnp.bfloat16
    assert near.dtype == jnp.float32
    assert 0 < difference(exact, near) < 0.05 * float(jnp.abs(exact).max())


@one
def test_adapters_with_a_cache(kind):
    config, variables = CONFIGS[kind], VARIABLES[kind]
    apply = model_of(config).apply
    sites = find_sites(lambda variables: apply(variables, *SIDES), variables)
    kernels = LoraConfig(targets=(r".*/kernel",), rank=2)
    make = partial(lora.init_at, params=variables["params"], sites=sites, config=kernels)
    adapter = random_like(jax.eval_shape(make, jax.random.key(0)))
    assert len(adapter) == len({"encoder", "head"} & variables["params"].keys())
    adapted, _ = prompted(config, {**variables, "lora": adapter}, adapted=kernels)
    merged = {"params": lora.merge(variables["params"], adapter, kernels)}
    assert difference(adapted, prompted(config, merged)[0]) < 1e-4 * float(jnp.abs(adapted).max())
    assert difference(adapted, prompted(config, variables)[0]) > 0.1


# The same however it is computed.


@both
def test_a_loop_equals_no_loop(kind):
    plain = run(kind)
    loop = replace(CONFIGS[kind], unroll=1, remat="full")
    arguments = (SOURCE, TARGET), (0 * PLACES, 0 * PLACES_), (PLACES, PLACES_), np.ones((2, 7))
    arguments = jax.tree.map(jnp.asarray, arguments)
    looped = logits_and_gradients(loop, VARIABLES[kind], *arguments)
    assert difference(plain, looped) < 1e-4 * float(np.abs(plain[1]).max())
    assert float(np.abs(plain[1]).max()) > 0.1


@one
def test_a_mesh_gives_what_one_device_gives(kind):
    config, variables = CONFIGS[kind], VARIABLES[kind]
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    places = sharding.tree_shardings(variables, mesh)
    source, target = (jnp.concatenate([x, x[:, ::-1]]) for x in SIDES)
    ids = jnp.asarray(np.concatenate([IDS, IDS]))

    @partial(jax.jit, in_shardings=(places,))
    def on_mesh(variables):
        with sharding.use_mesh(mesh):
            model, cache = model_of(config), config.make_cache(4, 7, 8)
            logits = model.apply(variables, source, target, segment_ids=ids)
            cache = model.apply(variables, source, cache, segment_ids=ids, method="start")
            positions = jnp.arange(7)[None].repeat(4, 0)
            last, cache = model.apply(
                variables, target, cache, positions=positions, method="extend"
            )
            return logits, last, cache

    logits, last, made = on_mesh(jax.device_put(variables, places))
    one, *_ = run(kind, segments=(IDS, 0 * PLACES_))
    assert difference(one, logits[:2]) < 1e-5
    assert difference(logits[:, -1], last) < 1e-5
    for keys in (made.own.keys[0], made.source.keys[0]):  # stay where their heads and rows are
        assert {shard.data.shape[:2] for shard in keys.addressable_shards} == {(1, 2)}


@one
def test_logits_of_some_positions_alone(kind):
    model, predicted = model_of(CONFIGS[kind]), jnp.array([[1, 4], [6, 0]])
    some = jax.jit(model.apply)(VARIABLES[kind], SOURCE, TARGET, predicted)
    every, *_ = run(kind)
    expected = np.take_along_axis(every, np.asarray(predicted)[..., None], axis=1)
    assert difference(some, expected) < 1e-5


PUBLISHED = {
    "transformer": {"embed_dropout", "encoder_layers/dropout", "decoder_layers/dropout"},
    "t5": {
        "dropout",
        *(f"{stack}_layers/dropout" for stack in ("encoder", "decoder")),
        *(f"{stack}_layers/mlp/dropout" for stack in ("encoder", "decoder")),
        *(f"{stack}_layers/attention" for stack in ("encoder", "decoder")),
        "decoder_layers/cross_attention",
    },
}


@one
def test_dropout_where_it_is_published(kind):
    model = model_of(replace(CONFIGS[kind], dropout_rate=0.5, unroll=1))
    seen = set()

    def note(call, args, options, context):
        module = context.module
        rate = module.rate if isinstance(module, Dropout) else vars(module).get("dropout_rate", 0)
        if rate and not isinstance(module, Mlp) and not options.get("deterministic"):
            seen.add("/".join(module.path[1:]))
        return call(*args, **options)

    @jax.jit
    def drawn(key):
        with nn.intercept_methods(note):
            rngs = {"dropout": key}
            return model.apply(VARIABLES[kind], *SIDES, deterministic=False, rngs=rngs)

    assert difference(drawn(jax.random.key(0)), drawn(jax.random.key(1))) > 0.01
    assert seen == PUBLISHED[kind]


@both
def test_flops_are_those_of_the_compiled_products(kind):
    # XLA counts elementwise operations as well, a share that vanishes with the width.
    sizes = {"hidden_dim": 256, "mlp_dim": 1024, "vocab_size": 512}
    sizes |= {"head_dim": 48} if kind == "t5" else {}
    config = replace(CONFIGS[kind], **sizes)
    args = shapes_of(config), jnp.zeros((1, 32), jnp.int32), jnp.zeros((1, 8), jnp.int32)
    counted = jax.jit(model_of(config).apply).lower(*args).cost_analysis()["flops"]
    assert counted == pytest.approx(config.forward_flops(32, 8), rel=0.05)


# Bad input.


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (TransformerConfig, {"hidden_dim": 770}, "hidden_dim=770 is not divisible by num_heads=8"),
        (TransformerConfig, {"hidden_dim": 9, "num_heads": 3}, "hidden_dim=9 is not even: positi"),
        (TransformerConfig, {"num_decoder_layers": 0}, "num_decoder_layers=0 is not above 0"),
        (TransformerConfig, {"dropout_rate": 1.0}, "dropout_rate=1.0 is not inside"),
        (T5Config, {"head_dim": 0}, "head_dim=0 is not above 0"),
        (T5Config, {"num_layers": 0}, "num_layers=0 is not above 0"),
        (T5Config, {"num_buckets": 2}, "num_buckets=2 is not an even number from 4 up; 32 is us"),
        (T5Config, {"num_buckets": 33}, "num_buckets=33 is not an even number from 4 up"),
        (T5Config, {"max_distance": 16}, "max_distance=16 is not above half of num_buckets=32"),
        (T5Config, {"dropout_rate": -0.1}, "dropout_rate=-0.1 is not inside"),
    ],
)
def test_impossible_configs(config, change, message):
    with pytest.raises(InputError, match=message):
        config(**change)
    with pytest.raises(InputError, match="vocab_size=None"):
        config().make()


@both
@pytest.mark.parametrize(("rows", "length"), [(3, 8), (4, 9)])
def test_a_source_that_is_not_that_of_the_cache(kind, rows, length):
    config = CONFIGS[kind]
    empty = jax.eval_shape(lambda: config.make_cache(rows, 4, length))
    start = partial(model_of(config).apply, method="start")
    with pytest.raises(InputError, match=rf"2 sources of 8 tokens .* {rows} rows .*={length}: ma"):
        jax.eval_shape(start, VARIABLES[kind], SOURCE, empty)
