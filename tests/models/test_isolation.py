"""Every encoder: texts that share a row do not see each other, and are what they are alone."""

import math
from functools import partial
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import Model
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.nn.positions import LinearScaling
from jaxlm.objectives import packing

SIZES = {"vocab_size": 16, "num_layers": 1, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 24}
CONFIGS = {
    BertConfig: BertConfig(max_length=16, **SIZES),
    BilstmConfig: BilstmConfig(vocab_size=16, embed_dim=8, hidden_dim=16),
    Gpt2Config: Gpt2Config(max_length=16, **SIZES),
    LlamaConfig: LlamaConfig(max_length=16, **SIZES),
    ModernBertConfig: ModernBertConfig(max_length=16, global_every=1, **SIZES),
    XlnetConfig: XlnetConfig(**SIZES),
}
LENGTHS = (5, 4)  # of two texts, of which no token is in both; tokens 9 to 11 are padding
TOKENS = np.arange(12)[None]


def test_all_encoders_are_tried():
    of_two_sides = {TransformerConfig, T5Config}  # tests/models/test_encoder_decoder.py
    assert set(CONFIGS) == set(get_args(Model)) - of_two_sides


NUMBERS = [
    (kind, name)
    for kind in get_args(Model)
    for name, hint in get_type_hints(kind).items()
    if hint is float
]


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_numbers_of_which_activations_are_not_finite_are_refused(kind, name):
    for value in (math.nan, math.inf, -1.0):
        with pytest.raises(InputError, match=f"{name}={value} is not"):
            kind(**{name: value})


def test_so_are_those_that_scale_rotations():
    for scaling in (LinearScaling(factor=0.0), LinearScaling(factor=math.nan)):
        with pytest.raises(InputError, match=r"factor=.* is not a finite number above 0"):
            LlamaConfig(rope_scaling=scaling)


def variables_of(encoder):
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)


@partial(jax.jit, static_argnums=0)
def run(encoder, variables, tokens, packed, counts):
    """Hidden states, and which tokens the gradient of those that count reaches."""

    def total(variables):
        segments, positions = packed
        hidden = encoder.apply(variables, tokens, segment_ids=segments, positions=positions)
        return (jnp.sin(hidden) * counts[..., None]).sum(), hidden

    gradient, hidden = jax.grad(total, has_aux=True)(variables)
    return hidden, jnp.abs(gradient["params"]["token_embed"]["embedding"]).max(-1) > 1e-6


@pytest.mark.parametrize("kind", CONFIGS)
def test_texts_of_a_row_are_what_they_are_alone(kind):
    encoder = CONFIGS[kind].with_dropout(0.0).make()
    variables = variables_of(encoder)
    packed = packing.of_lengths(jnp.asarray([[*LENGTHS, 0]]), 12)
    np.testing.assert_array_equal(packed.segment_ids, [[0] * 5 + [1] * 4 + [-1] * 3])
    assert packed.positions is not None
    np.testing.assert_array_equal(packed.positions[0, :9], [*range(5), *range(4)])
    for number, start in enumerate((0, 5)):
        own = np.arange(start, start + LENGTHS[number])
        counts = jnp.zeros((1, 12)).at[0, own].set(1)
        hidden, reached = run(encoder, variables, jnp.asarray(TOKENS), packed, counts)
        assert np.flatnonzero(reached).tolist() == own.tolist()
        # Alone, at the start of a row.
        tokens = np.full((1, 12), 15).astype(np.int32)
        tokens[0, : len(own)] = own
        single = packing.of_lengths(jnp.asarray([[len(own), 0, 0]]), 12)
        first = jnp.zeros((1, 12)).at[0, : len(own)].set(1)
        alone, _ = run(encoder, variables, jnp.asarray(tokens), single, first)
        np.testing.assert_allclose(hidden[0, own], alone[0, : len(own)], atol=2e-5)
    # The control: as one text, the second sees the first.
    whole = packing.of_lengths(jnp.asarray([[9, 0, 0]]), 12)
    _, reached = run(encoder, variables, jnp.asarray(TOKENS), whole, counts)
    assert reached[:9].all()
