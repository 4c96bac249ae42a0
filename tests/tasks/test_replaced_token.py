"""Replaced-token detection: which models it takes, and what it says of texts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import tokenizers
from jaxlm.decode.generate import GenerateConfig
from jaxlm.errors import InputError
from jaxlm.models import bert
from jaxlm.models.bert import BertConfig
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.models.heads import MlmHead, WithLmHead
from jaxlm.models.xlnet import XlnetConfig
from jaxlm.objectives.masking import MaskingConfig
from jaxlm.tasks.replaced_token import ReplacedToken
from jaxlm.tasks.task import Given

SIZES = {"vocab_size": 64, "num_layers": 4, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 32}
CONFIG = BertConfig(**SIZES, max_length=12, unroll=1)


@pytest.mark.parametrize(
    "config", [CONFIG, XlnetConfig(**SIZES), BilstmConfig(vocab_size=64, embed_dim=8, hidden_dim=8)]
)
def test_any_encoder_that_reads_both_ways(config):
    model = ReplacedToken().make_model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    tables = {name for name in shapes["encoder"] if name.endswith("_embed")}
    assert "token_embed" in tables
    assert shapes["encoder"].keys() - shapes["generator"]["encoder"].keys() == tables
    predicted = jnp.zeros((1, 3), jnp.int32)
    run = lambda v: model.apply(v, jnp.zeros((1, 8), jnp.int32), predicted, method="generate")
    assert jax.eval_shape(run, {"params": shapes}).shape == (1, 3, 64)


def test_the_generator_is_a_part_of_the_discriminator():
    task = ReplacedToken()
    assert task.generator(bert.BASE) == replace(bert.BASE, num_layers=3)
    assert task.generator(CONFIG) == replace(CONFIG, num_layers=1)
    assert ReplacedToken(generator_share=1.0).generator(CONFIG) == CONFIG
    assert task.generator(replace(CONFIG, num_layers=1)).num_layers == 1
    config = replace(bert.BASE, vocab_size=64)
    forward = config.forward_flops(32, 5)
    assert task.more_flops(config, 32) == pytest.approx(config.forward_flops(32, 0) / 4)
    assert task.num_predicted(32) == 5
    assert forward > config.forward_flops(32, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ReplacedToken().make_model(Gpt2Config(**SIZES)),
            "Gpt2Config reads one way: use o",
        ),
        (lambda: ReplacedToken(generator_share=0.0), r"generator_share=0.0 is not inside \(0, 1\]"),
        (lambda: ReplacedToken(generator_share=1.5), r"generator_share=1.5 is not inside \(0, 1\]"),
        (lambda: ReplacedToken(detection_weight=0.0), "detection_weight=0.0 is not a number above"),
        (
            lambda: ReplacedToken(eval_masking=MaskingConfig(final_rate=0.4)),
            "eval_masking.final_rate=0.4, but evaluation hides the same all the run",
        ),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(InputError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_each_token_of_a_text_has_a_probability():
    tokenizer = tokenizers.train("characters", ["abcdefgh ijkl"], 20)
    task = ReplacedToken()
    model = task.make_model(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s.shape) / 2), shapes)
    texts = [Given(0, "x:1", "abc d"), Given(1, "x:2", "a" * 20), Given(2, "x:3", "cab")]
    first, error, last = task.answers(
        CONFIG, variables, tokenizer, texts, top_k=1, generate=GenerateConfig()
    )
    assert error == {"error": "x:2 has 22 tokens, more than the model's 12"}
    ids = jnp.asarray([tokenizer.encode("abc d").ids])
    expected = jax.nn.sigmoid(model.apply(variables, ids))[0, 1:-1]
    found = [one["probability"] for one in first["tokens"]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert [one["token"] for one in last["tokens"]] == ["c", "a", "b"]
    assert len(list(task.lines(last))) == 3


def test_the_encoder_goes_on_as_any_other():
    """Its parameters are those of an encoder that was pretrained otherwise."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = [
        jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]["encoder"]
        for model in (ReplacedToken().make_model(CONFIG), WithLmHead(CONFIG.make(), MlmHead()))
    ]
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])
