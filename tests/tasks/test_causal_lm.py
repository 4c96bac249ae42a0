"""Causal language modelling: which models it takes, what it says of text, and how it continues."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxlm.data import tokenizers
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.decode.generate import GenerateConfig
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.models.gpt2 import Gpt2Config
from jaxlm.nn.intercept import find_sites
from jaxlm.peft import quantize
from jaxlm.tasks.causal_lm import CausalLm
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.task import Generative, Given
from tests.runs.test_pretrained import prepared

CONFIG = Gpt2Config(
    vocab_size=64, num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=32, max_length=40
).with_dropout(0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.train("characters", ["abcdefgh ijkl"], 20)


@pytest.fixture(scope="module")
def variables():
    model = CausalLm().make_model(CONFIG)
    return model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))


def test_models_that_see_too_much_or_too_little_are_refused():
    bert = BertConfig(vocab_size=64, num_layers=1, hidden_dim=16, num_heads=2, mlp_dim=32)
    with pytest.raises(InputError, match="BertConfig sees all of them: use task=MaskedLm"):
        CausalLm().make_model(bert)
    with pytest.raises(InputError, match="Gpt2Config reads one way: use task=CausalLm"):
        MaskedLm().make_model(CONFIG)
    assert isinstance(CausalLm(), Generative)
    assert not isinstance(MaskedLm(), Generative)


def test_bits_per_byte():
    info = replace(
        prepared(64),
        tokens={"train": 110, "validation": 50},
        documents={"train": 10, "validation": 10},
    )
    counted = replace(info, bytes={"train": 400, "validation": 160})
    found = CausalLm().metrics(2 * math.log(2), [counted, counted], "validation")
    assert found == {
        "perplexity": pytest.approx(4.0),
        "bits_per_byte": pytest.approx(2 * 40 / 160),
    }
    joined = CausalLm(isolate_documents=False).metrics(math.log(2), [counted], "validation")
    assert joined["bits_per_byte"] == pytest.approx(50 / 160)
    before = CausalLm().metrics(1.0, [counted, info], "validation")  # bytes were not counted
    assert before == {"perplexity": pytest.approx(math.e)}


def test_a_text_is_continued_as_a_document_begins(tokenizer, variables):
    """Greedily, by the uncached model."""
    apply = CausalLm().make_model(CONFIG).apply
    special = SpecialTokens.of(tokenizer)
    ids = [special.cls, *tokenizer.encode("abc", add_special_tokens=False).ids]
    for _ in range(5):
        logits = np.asarray(apply(variables, jnp.asarray([ids])))[0, -1]
        ids.append(int(logits[: tokenizers.vocab_size(tokenizer)].argmax()))
        if ids[-1] == special.sep:
            break
    texts = [Given(0, "x:1", "abc"), Given(1, "x:2", "cab ab")]
    first, second = CausalLm().answers(
        CONFIG,
        variables,
        tokenizer,
        texts,
        top_k=1,
        generate=GenerateConfig(max_new_tokens=5),
    )
    assert first["tokens"] == ids[4:]
    assert first["text"] + first["continuation"] == next(CausalLm().lines(first))
    assert len(first["log_probabilities"]) == len(first["tokens"])
    assert second["text"] == "cab ab"


def test_one_prompt_that_is_too_long_changes_no_other(tokenizer, variables):
    """Nor does a record without text, which is counted, but not given."""
    texts = {0: "ab", 1: "a" * 60, 2: "cab", 4: "h"}
    given = [Given(i, f"x:{i}", text) for i, text in texts.items()]
    sampled = GenerateConfig(max_new_tokens=5, temperature=1.0)

    def answers(texts):
        return list(
            CausalLm().answers(CONFIG, variables, tokenizer, texts, top_k=1, generate=sampled)
        )

    found = answers(given)
    assert "the model takes 40 together with what it adds" in found[1]["error"]
    for i in (0, 2, 3):  # the last is number 4
        (alone,) = answers([given[i]])
        assert alone["tokens"] == found[i]["tokens"]


@pytest.mark.slow
def test_weights_of_bytes_generate(tokenizer, variables):
    """By what their products give without a cache."""
    model = CausalLm().make_model(CONFIG)
    call = lambda variables: model.apply(variables, jnp.zeros((1, 4), jnp.int32))
    packed = {"params": quantize.quantize(variables["params"], find_sites(call, variables))}
    write = CausalLm().make_generate(CONFIG, packed, tokenizer)
    (found,) = write(["abc"], GenerateConfig(max_new_tokens=6, min_new_tokens=6))
    tokens = [*write._model.prompt("abc"), *found.tokens]

    def likely(apply, variables):
        logits = apply(variables, jnp.array([tokens]))[0, -7:-1, : write._model.vocab_size]
        return jax.nn.log_softmax(logits)[jnp.arange(6), jnp.array(found.tokens)]

    rough = likely(quantize.adapt(model.apply), packed)
    np.testing.assert_allclose(rough, found.log_probabilities, atol=2e-5)
    assert jnp.abs(rough - likely(model.apply, variables)).max() > 1e-4
