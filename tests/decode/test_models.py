"""Decoding with the models of this codebase, whose state is a cache of keys and values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import VOCAB, characters

from jaxlm import sharding
from jaxlm.decode.causal_model import CausalModel
from jaxlm.decode.choices import Choose
from jaxlm.decode.generate import Generate, GenerateConfig
from jaxlm.errors import InputError
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.heads import EncoderDecoderLm, WithLmHead
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.nn import stack
from jaxlm.sharding import MeshConfig, make_mesh
from jaxlm.tasks.causal_lm import causal_model
from jaxlm.tasks.seq2seq import encoder_decoder
from jaxlm.tree import map_with_path

SIZES = dict(vocab_size=VOCAB, num_layers=2, hidden_dim=16, mlp_dim=24, max_length=64)
CONFIGS = {
    "gpt2": Gpt2Config(**SIZES, num_heads=2, initializer_std=0.3),
    "llama": LlamaConfig(**SIZES, num_heads=4, num_kv_heads=2, initializer_std=0.3),
}
PROMPTS = ["abc", "a", "hello no", "feed me a fig. a big fig!"]
GREEDY = GenerateConfig(max_new_tokens=16)


def make_causal_model(config) -> tuple[CausalModel, WithLmHead]:
    """Of random parameters, as runs make it; texts begin with nothing."""
    module = WithLmHead(config.make(), config.make_lm_head())
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    model = causal_model(module, config, variables, characters(("<|endoftext|>",)))
    return dataclasses.replace(model, start=()), module


def reader(model: CausalModel, module: WithLmHead):
    """Log-probabilities at all positions of a text, by the model as it is trained."""
    whole = jax.jit(module.apply)

    def read(ids):
        logits = whole(model.variables, jnp.asarray([ids + [0] * (64 - len(ids))]))
        return np.asarray(jax.nn.log_softmax(logits[0, : len(ids), : model.vocab_size]))

    return read


def agrees(model: CausalModel, read) -> None:
    """Greedy tokens are the likeliest without a cache."""
    generations = list(Generate(model)(PROMPTS, GREEDY))
    assert len({one.text for one in generations}) == len(PROMPTS)
    for text, one in zip(PROMPTS, generations, strict=True):
        ids = model.encode(text)
        each = read(ids + one.tokens)[len(ids) - 1 : -1]
        assert one.tokens == each.argmax(axis=1).tolist()
        np.testing.assert_allclose(one.log_probabilities, each.max(axis=1), atol=1e-4)


def test_gpt2_as_without_a_cache():
    """With parameters layer by layer, which are not copied for each token (``jaxlm.nn.stack``)."""
    model, module = make_causal_model(CONFIGS["gpt2"])
    layers = model.arranged["params"]["encoder"]["layers"]
    assert isinstance(layers, stack.Layers)
    assert len(layers.layers) == 2
    agrees(model, reader(model, module))


@pytest.fixture(scope="module")
def llama():
    return make_causal_model(CONFIGS["llama"])


@pytest.mark.slow
def test_llama_as_without_a_cache_and_on_a_mesh(llama):
    model, module = llama
    agrees(model, reader(model, module))
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    places = sharding.tree_shardings(model.variables, mesh)
    on_mesh = dataclasses.replace(
        model, variables=jax.device_put(model.variables, places), mesh=mesh
    )
    sampled = GenerateConfig(max_new_tokens=16, temperature=1.0, top_p=0.9, stop_strings=("!!!",))
    one, several = Generate(model), Generate(on_mesh)
    for config in (GREEDY, sampled):
        want = [generation.text for generation in one(PROMPTS, config)]
        assert [generation.text for generation in several(PROMPTS, config)] == want


def test_choices_go_on_from_one_cache(llama):
    model, module = llama
    read = reader(model, module)
    choices = [" a", "big", " hello", "."]
    for text, ranked in zip(PROMPTS, Choose(model)(PROMPTS, choices), strict=True):
        for one in ranked:
            ids, rest = model.encode(text), model.encode(one.text)
            each = read(ids + rest)[len(ids) - 1 : -1]
            want = each[np.arange(len(rest)), rest].sum()
            assert one.log_probability == pytest.approx(want, abs=1e-4)


SIDES = dict(vocab_size=VOCAB, num_layers=1, num_decoder_layers=2, hidden_dim=16, mlp_dim=24)
READERS = {
    "transformer": TransformerConfig(**SIDES, num_heads=2, dropout_rate=0.0),
    "t5": T5Config(**SIDES, num_heads=2, head_dim=8, num_buckets=4, max_distance=6),
}
SOURCES = ["abc", "hello no. a big fig", "a", "bad cafe."]


def random_leaf(path, shape):
    """Kernels large enough that what is written depends on what is read."""
    if not path.endswith(("kernel", "embedding")):
        return jnp.full(shape.shape, float(path.endswith("scale")))
    return jnp.float32(np.random.default_rng(len(path)).normal(size=shape.shape) * 0.8)


@pytest.mark.parametrize("kind", ["transformer", pytest.param("t5", marks=pytest.mark.slow)])
def test_targets_are_the_likeliest_of_full_passes(kind):
    """Source and target anew for each token, without a cache and without a batch."""
    config = READERS[kind]
    module = EncoderDecoderLm(config.make(), config.make_lm_head())
    row = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), row, row)
    variables = map_with_path(random_leaf, shapes)
    tokenizer = characters(("<|endoftext|>",))
    model = encoder_decoder(module, config, variables, tokenizer)
    written = list(Generate(model)(SOURCES, GenerateConfig(max_new_tokens=12), batch_size=3))
    assert len({one.text for one in written}) > 2  # it depends on what is read
    whole = jax.jit(module.apply)
    for text, one in zip(SOURCES, written, strict=True):
        assert one.prompt == text
        source, target = model.source(text), [*model.start, *one.tokens]
        rows = [jnp.asarray([ids + [0] * (24 - len(ids))]) for ids in (source, target)]
        padding = [jnp.where(jnp.arange(24)[None] < len(ids), 0, -1) for ids in (source, target)]
        logits = whole(variables, *rows, segment_ids=padding[0], decoder_segment_ids=padding[1])
        each = jax.nn.log_softmax(logits[0, : len(one.tokens), : model.vocab_size])
        assert one.tokens == np.asarray(each).argmax(-1).tolist()
        np.testing.assert_allclose(one.log_probabilities, each.max(-1), atol=1e-4)


def test_a_source_is_cut_or_refused():
    config = READERS["t5"]
    module = EncoderDecoderLm(config.make(), config.make_lm_head())
    model = encoder_decoder(module, config, {}, characters(("<|endoftext|>",)))
    model = dataclasses.replace(model, max_length=4)
    assert model.source("abcdef") == model.encode("abcd")
    assert model.prompt("abcdef") == [*model.start]
    with pytest.raises(InputError, match="a source holds no token: give at least one word"):
        model.source("")
