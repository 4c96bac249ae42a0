"""Choosing among continuations, against log-probabilities of whole texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import END, attention_model, table_model
from tokenizers import Tokenizer, decoders, models

from jaxlm.decode.causal_model import CausalModel
from jaxlm.decode.choices import Choose
from jaxlm.errors import InputError
from jaxlm.sharding import MeshConfig, make_mesh

PROMPTS = ["abc", "a fig is", "no", "h"]
CHOICES = [" a", "big", " hello", "."]


@pytest.fixture(scope="module")
def model() -> CausalModel:
    return attention_model(start=[END])


@pytest.fixture(scope="module")
def choose(model) -> Choose:
    return Choose(model)


def log_probability(model: CausalModel, text: str, choice: str) -> float:
    """Of the choice, by one reading of both together."""
    ids = [*model.start, *model.encode(text + choice)]
    tokens = np.array([ids + [0] * (64 - len(ids))])
    positions = jnp.arange(64)[None]
    segment_ids = jnp.where(positions < len(ids), 0, -1)
    state = model.make_state(1, 64)
    logits, _ = jax.jit(model.step)(model.variables, state, tokens, positions, segment_ids)
    each = jax.nn.log_softmax(logits[0, :, : model.vocab_size])
    border = len(ids) - len(model.encode(choice))
    return float(sum(each[i - 1, ids[i]] for i in range(border, len(ids))))


def test_scores_are_those_of_whole_texts(model, choose):
    for text, ranked in zip(PROMPTS, choose(PROMPTS, CHOICES), strict=True):
        want = {choice: log_probability(model, text, choice) for choice in CHOICES}
        got = {one.text: one.log_probability for one in ranked}
        assert got == pytest.approx(want, abs=1e-4)
        assert [one.text for one in ranked] == sorted(want, key=want.__getitem__, reverse=True)
        assert {one.text: one.num_tokens for one in ranked} == {c: len(c) for c in CHOICES}
        assert sum(one.probability for one in ranked) == pytest.approx(1)
        assert ranked[0].probability / ranked[1].probability == pytest.approx(
            np.exp(ranked[0].log_probability - ranked[1].log_probability)
        )


def test_rows_alone_and_on_a_mesh(choose):
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    on_mesh = Choose(attention_model(start=[END], mesh=mesh))
    together = list(choose(PROMPTS, CHOICES))
    for others in (choose(PROMPTS, CHOICES, batch_size=1), on_mesh(PROMPTS, CHOICES)):
        for one, other in zip(together, others, strict=True):
            assert [c.text for c in one] == [c.text for c in other]
            assert [c.log_probability for c in one] == pytest.approx(
                [c.log_probability for c in other], abs=1e-4
            )


def test_longer_choices_by_their_means():
    """Each token has one chance in 20, but c follows a: two likely tokens pass one of chance."""
    logits = np.zeros((32, 32))
    logits[0, 2] = 3
    choose = Choose(table_model(logits))
    best = {per: next(choose(["b"], ["ac", "d"], per=per))[0].text for per in ("text", "token")}
    assert best == {"text": "d", "token": "ac"}


def test_bytes_are_counted_not_tokens():
    vocab = {"a": 0, "b": 1, "ü": 2, "c": 3, "ccc": 4}
    tokenizer = Tokenizer(models.BPE(vocab | {"cc": 5}, [("c", "c"), ("cc", "c")]))
    tokenizer.decoder = decoders.Fuse()
    logits = np.zeros((32, 32))
    logits[0, 1] = 1.0
    choose = Choose(table_model(logits, tokenizer=tokenizer))
    order = {
        per: [c.text for c in next(choose(["a"], ["b", "ccc", "ü"], per=per))]
        for per in ("token", "byte")
    }
    assert order == {"token": ["b", "ccc", "ü"], "byte": ["ccc", "ü", "b"]}


def test_a_border_inside_a_token():
    """The prompt's last token is another one before some choices."""
    vocab = {"x": 0, "a": 1, "b": 2, "ab": 3, "c": 4}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b")]))
    tokenizer.decoder = decoders.Fuse()
    table = np.random.default_rng(0).normal(size=(32, 32))
    each = np.asarray(jax.nn.log_softmax(jnp.asarray(table[:, :5]), axis=1))
    ranked = next(Choose(table_model(table, tokenizer=tokenizer))(["xa"], ["b", "c"]))
    got = {one.text: (one.log_probability, one.num_tokens) for one in ranked}
    assert got["b"] == (pytest.approx(each[0, 3], abs=1e-5), 1)
    assert got["c"] == (pytest.approx(each[0, 1] + each[1, 4], abs=1e-5), 2)
    with pytest.raises(InputError, match="join the first token of 'a': begin each with a space"):
        list(Choose(table_model(table, tokenizer=tokenizer))(["a"], ["b", "bc"]))


def test_bad_choices(choose):
    for texts, choices, message in (
        (["a"], "bc", "choices='bc' is one string"),
        ("a", ["b", "c"], "texts='a' is one string"),
        (["a"], ["b"], r"choices=\['b'\] are not two or more different ones"),
        (["a"], ["b", "b"], "are not two or more different ones"),
        (["a"], ["b", ""], "the choice '' adds no token to 'a'"),
        (["a"], ["b", "Z"], "the choice 'Z' adds no token to 'a'"),
        ([""], ["a", "b"], "the prompt '' holds no token"),
        ([40 * "a"], ["b", 30 * "c"], "has 71 tokens, more than the model's 64: shorten either"),
    ):
        with pytest.raises(InputError, match=message):
            list(choose(texts, choices))
    assert len(list(choose([30 * "a"], ["b", 30 * "c"]))) == 1  # shortened, as it says
    with pytest.raises(InputError, match="batch_size=0"):
        list(choose(["a"], ["b", "c"], batch_size=0))

    def last(*args):
        logits, state = table_model().step(*args)
        return logits[:, -1:], state

    with pytest.raises(InputError, match="the logits of all positions: give step_all"):
        list(Choose(table_model(step=last))(["a"], ["b", "ccc"]))
    list(Choose(table_model(step=last, step_all=table_model().step))(["a"], ["b", "ccc"]))
