"""What a phase changes of its base, in parameters and in fields."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.model import ModelConfig, example_inputs, is_attentive
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.runs import phase, steps
from jaxlm.sharding import MeshConfig
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.replaced_token import ReplacedToken
from jaxlm.tasks.span_corruption import SpanCorruption
from jaxlm.tasks.task import PretrainTask

SMALL = {"vocab_size": 60, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 24}
LLAMA = LlamaConfig(**SMALL, max_length=32)
GPT2 = Gpt2Config(**SMALL, max_length=32)
BASES: dict[str, tuple[Any, PretrainTask]] = {
    "bert": (replace(BERT, vocab_size=60), MaskedLm()),
    "modernbert": (ModernBertConfig(**SMALL, max_length=32, window=4), MaskedLm()),
    "gpt2": (GPT2, CausalLm()),
    "llama": (LLAMA, CausalLm()),
    "tied llama": (replace(LLAMA, tied=True), CausalLm()),
    "t5": (T5Config(**SMALL), SpanCorruption()),
    "transformer": (TransformerConfig(**SMALL), SpanCorruption()),
}
NEW = {
    57: (5, 7),
    58: (9,),
    59: (3, 4, 11),
    60: (5, 6),
    61: (10, 11),
    62: (1, 2),
    63: (8, 9),
    64: (5,),
}
"""Of a base of 57 tokens, whose table has 60 rows."""


def shapes_of(config: ModelConfig, task: PretrainTask) -> dict[str, Any]:
    init = task.make_model(config).init
    return jax.eval_shape(init, jax.random.key(0), *example_inputs(config))["params"]


def params_of(config: ModelConfig, task: PretrainTask) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)
    return jax.tree.map(draw, shapes_of(config, task))


@pytest.mark.parametrize("name", BASES)
def test_new_tokens_begin_as_the_means_of_their_pieces(name: str) -> None:
    """They are as likely as geometric means of these, and a text without them is read as before."""
    config, task = BASES[name]
    params = params_of(config, task)
    more = phase.with_tokens(params, NEW)
    model = phase.next_model(config, None, 65, task, MeshConfig())
    encoder = steps.with_rows(phase.with_positions(more["encoder"], model), model)
    wide = {"encoder": encoder, "head": steps.with_bias(more.get("head", {}), model)}
    wide = {name: part for name, part in wide.items() if part}
    shapes = shapes_of(model, task)
    assert {p: x.shape for p, x in tree.leaves_with_path(shapes)} == {
        p: x.shape for p, x in tree.leaves_with_path(wide)
    }
    assert model.vocab_size == 128
    table, old = (x["encoder"]["token_embed"]["embedding"] for x in (wide, params))
    np.testing.assert_array_equal(table[:57], old[:57])
    for number, pieces in NEW.items():
        np.testing.assert_allclose(table[number], old[list(pieces)].mean(0), rtol=1e-6)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 57, (2, 8)), jnp.int32)
    inputs = [tokens] * len(example_inputs(config))
    before, after = (
        task.make_model(one).apply({"params": jax.tree.map(jnp.asarray, of)}, *inputs)
        for one, of in ((config, params), (model, wide))
    )
    np.testing.assert_allclose(after[..., :57], before[..., :57], rtol=1e-5, atol=1e-5)
    for number, pieces in NEW.items():
        mean = before[..., list(pieces)].mean(-1)
        np.testing.assert_allclose(after[..., number], mean, rtol=1e-4, atol=1e-4)
    assert after[..., 65:].max() < after[..., :65].min()  # no token


def test_new_tokens_have_their_place_in_a_generator() -> None:
    config, task = BASES["bert"][0], ReplacedToken()
    params = params_of(config, task)
    more = phase.with_tokens(params, NEW)
    old, new = (x["generator"]["head"]["bias"] for x in (params, more))
    assert new.shape == (65,)
    np.testing.assert_array_equal(new[:57], old[:57])
    for number, pieces in NEW.items():
        np.testing.assert_allclose(new[number], old[list(pieces)].mean(), rtol=1e-6)


def test_what_sees_what_is_a_difference() -> None:
    config = XlnetConfig(**SMALL)
    (said,) = phase.differences(replace(config, attention="uni"), config)
    assert said == "attention=bi (there uni)"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rope_base": 160_000.0, "max_length": 1024}),
        ("llama", {"dropout_rate": 0.1, "dtype": "bfloat16", "vocab_size": None}),
        ("modernbert", {"max_length": 1024, "global_rope_base": 1e6, "local_rope_base": 1e5}),
        ("bert", {"max_length": 1024}),
        ("gpt2", {"max_length": 64, "epsilon": 1e-6}),
        ("t5", {"dropout_rate": 0.2}),
        ("transformer", {"dropout_rate": 0.2}),
    ],
    ids=str,
)
def test_fields_that_no_shape_depends_on_may_be_others(name: str, change: dict[str, Any]) -> None:
    config, task = BASES[name]
    model = phase.next_model(config, replace(config, **change), 60, task, MeshConfig())
    changed = {
        field: value for field, value in change.items() if field not in ("dtype", "vocab_size")
    }
    assert phase.differences(config, model) == [
        f"{field}={changed[field]} (there {vars(config)[field]})"
        for field in vars(config)
        if field in changed
    ]
    settled = {"attention": "plain"} if is_attentive(config) else {}
    assert phase.differences(replace(config, **settled), config) == []  # which no user has chosen
    assert model.dtype == change.get("dtype")
    assert (model.vocab_size, phase.differences(config, config)) == (64, [])
    # The same as it stands in the folder of a run of that phase.
    assert phase.next_model(config, model, 60, task, MeshConfig()) == model


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"num_kv_heads": 1}, r"num_kv_heads=1 \(there None\), would have \S+key/kernel"),
        ("llama", {"tied": True}, r"would have head/unembed/kernel of shape None"),
        (
            "llama",
            {"attention_bias": True},
            r"would have \S+bias of shape .*, where the base has None",
        ),
        (
            "gpt2",
            {"max_length": 16},
            r"would have encoder/position_embed/embedding of shape \(16, ",
        ),
        ("bert", {"vocab_size": 70}, "vocab_size=70 is not the base's 60"),
    ],
    ids=str,
)
def test_others_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    config, task = BASES[name]
    with pytest.raises(InputError, match=message):
        phase.next_model(config, replace(config, **change), 60, task, MeshConfig())


def test_rotations_need_no_more_parameters_for_more_positions() -> None:
    params = params_of(LLAMA, CausalLm())["encoder"]
    assert phase.with_positions(params, replace(LLAMA, max_length=999)) is params
