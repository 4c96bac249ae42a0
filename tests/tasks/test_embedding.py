"""Embeddings of texts."""

import importlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT

from jaxlm.data.labelled import batches
from jaxlm.data.labelled.batches import eval_batches
from jaxlm.data.labelled.classification import TextFields
from jaxlm.errors import InputError
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.peft.tuning import HeadOnly
from jaxlm.runs import finetuned
from jaxlm.runs.base import Base
from jaxlm.runs.embedder import DOCUMENTS, open_embedder
from jaxlm.tasks import embedding
from jaxlm.tasks.embedding import Embedding, make_embed

SCORED = Embedding(
    fields=TextFields(pair="pair", label="score", target="number"), min_similarity=3.0
)


def test_a_run_brings_pairs_together(train, write, records, eval_metrics, tmp_path, monkeypatch):
    words = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")
    rows = [
        {"text": f"{word} {x}", "pair": f"{x} {y} {word}"}
        for word in words
        for x in "abc"
        for y in "de"
    ]
    run = train(Embedding(prompt="b ", pair_prompt=""), write(rows))
    assert eval_metrics()["recall@1"] > 0.5  # by chance 1 in 12
    asked = [row["pair" if i % 2 else "text"] for i, row in enumerate(rows)][:20]
    answers = list(run.answer(records(*({"text": text} for text in [*asked, asked[5]]))))
    assert [answer["text"] for answer in answers] == [*asked, asked[5]]
    vectors = np.array([answer["embedding"] for answer in answers])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[5], vectors[-1], atol=1e-5)
    assert abs(vectors[5] - vectors[0]).max() > 1e-2
    embedder = open_embedder(str(run.config.directory))  # queries, if nothing else is asked for
    np.testing.assert_allclose(embedder(asked), vectors[:-1], atol=1e-5)
    documents = embedder.with_prompt(None, *DOCUMENTS)
    np.testing.assert_allclose(documents([f"b {text}" for text in asked]), vectors[:-1], atol=1e-5)
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    saved = []  # what is written: its head has no parameters

    def save(path, kept, *_, task_head, card, **said):
        assert task_head is None
        assert card.startswith("---")
        saved.append((kept.keys(), said))

    merge_lora = importlib.import_module("merge_lora")
    monkeypatch.setattr(merge_lora.huggingface, "save", save)
    merge_lora.main(run.config.directory, tmp_path / "merged")
    prompts = {"query": "b ", "document": ""}
    said = {"pooling": "mean", "prompts": prompts, "default_prompt_name": "query"}
    assert saved == [({"encoder"}, said | {"max_length": run.framer.max_length})]


def test_given_similarities_choose_what_trains_and_are_compared(framer, records):
    rows = [{"text": "a", "pair": "b c", "score": score} for score in (5, 3, 1)]
    examples = SCORED.read(records(*rows))
    assert [float(row["weights"]) for row in SCORED.encode(framer, examples, ()).rows] == [1, 1, 0]
    cosines = np.array([0.9, 0.5, 0.1], np.float32)
    second = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    embeddings = np.stack([np.tile(np.float32([1, 0]), (3, 1)), second], axis=1)
    assert SCORED.monitor == "spearman"
    for order, expected in (([0, 1, 2], 1.0), ([2, 1, 0], -1.0)):
        found = SCORED.metrics(examples, (), {"embeddings": embeddings[order]})
        assert found["spearman"] == pytest.approx(expected)


def test_the_baseline_is_the_likeness_of_words(records):
    task = Embedding()
    pairs = [{"text": f"w{i} a", "pair": f"w{i} b"} for i in range(4)]
    (found,) = task.baselines([], task.read(records(*pairs)), ()).values()
    assert found["recall@1"] == 1.0


def test_retrieval_counts_equal_partners_as_right_and_collapse_as_chance(records):
    task, eye = Embedding(), np.eye(4, dtype=np.float32)
    examples = task.read(records(*({"text": "a", "pair": pair} for pair in "xyzx")))
    pairs = np.stack([eye, eye], axis=1)
    pairs[0, 1] = pairs[3, 1]  # the same text has the same vector
    pairs[0, 0] = pairs[3, 0]
    perfect = {"recall@1": 1, "recall@5": 1, "recall@10": 1, "mrr": 1, "candidates": 3}
    assert task.metrics(examples, (), {"embeddings": pairs}) == perfect
    collapsed = np.ones((4, 2, 4), np.float32) / 2
    found = task.metrics(examples, (), {"embeddings": collapsed})
    assert found == pytest.approx(perfect | {"recall@1": 1 / 3, "mrr": (1 + 1 / 2 + 1 / 3) / 3})


def test_an_encoder_embeds_as_it_is(tokenizer, monkeypatch):
    config = replace(BERT, vocab_size=64, num_layers=1, mlp_dim=16, max_length=32)
    encoder = config.make()
    params = encoder.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    embed = make_embed(encoder, params, tokenizer, max_length=32, batch_size=4)
    texts = ["a b", "john smith", "a b c d e f g h in new york . who lives in york ?", "c", "a b"]
    vectors = embed(texts)
    assert vectors.shape == (5, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # Of the batch and its padding nothing is seen.
    tokens = jnp.array([tokenizer.encode("a b").ids])
    hidden = encoder.apply({"params": params}, tokens)[0].mean(0)
    np.testing.assert_allclose(vectors[0], hidden / jnp.linalg.norm(hidden), atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[4], atol=1e-5)
    assert abs(vectors[0] - vectors[1]).max() > 1e-2
    with pytest.raises(InputError, match="there are no texts to embed"):
        embed([])
    # Parts of a file of many texts have the same shapes, however long their own are.
    buckets = []
    monkeypatch.setattr(batches, "MANY", 4)
    monkeypatch.setattr(
        embedding, "eval_batches", lambda *a: buckets.append(a[-1]) or eval_batches(*a)
    )
    np.testing.assert_allclose(embed(texts), vectors, atol=1e-5)
    embed(["a"] * 4)
    assert buckets == [tuple(range(4, 33, 4))] * 2


def test_a_published_pooler_is_left_out(tiny, write, tokenizer):
    model = replace(BERT, vocab_size=64, num_layers=1, hidden_dim=8, num_heads=1, max_length=512)
    encoder = model.make().init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]
    base = Base(
        name="base",
        config=model,
        encoder=encoder,
        pooler={"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)},
        lm_head=None,
        tokenizer=tokenizer,
        tokenizer_path=Path("tokenizer.json"),
        fingerprint="",
    )
    config = replace(tiny(Embedding(), write([])), model=model)
    placement = finetuned.make_placement(config, (), finetuned.make_init(config, ()))
    state = finetuned.make_state(config, (), base, placement)
    assert state.trainable["params"].keys() == {"encoder"}
    jax.tree.map(np.testing.assert_array_equal, state.trainable["params"]["encoder"], encoder)


def test_a_text_is_nearest_to_itself_so_the_loss_decides():
    assert Embedding().monitor == "recall@1"
    assert Embedding(fields=TextFields(pair="text", label=None)).monitor == "loss"


def test_bad_input(tiny, write, records):
    fields = TextFields(pair="pair", label=None)
    with pytest.raises(InputError, match=r"task\.fields\.pair is None"):
        Embedding(fields=TextFields(label=None))
    with pytest.raises(InputError, match="target=class is not a similarity"):
        Embedding(fields=TextFields(pair="pair"))
    with pytest.raises(InputError, match=r"label=None and task\.min_similarity=1\.0 go together"):
        Embedding(fields=fields, min_similarity=1.0)
    with pytest.raises(InputError, match=r"temperature=0\.0 is not above 0"):
        Embedding(fields=fields, temperature=0.0)
    with pytest.raises(InputError, match=r"x\.jsonl:1: no field 'pair'"):
        Embedding().read(records({"text": "a"}))
    config = replace(
        tiny(Embedding(), write([])),
        base="runs/base",
        tokenizer=None,
        tuning=HeadOnly(),
        model=BilstmConfig(vocab_size=8, embed_dim=2, hidden_dim=2),
    )
    with pytest.raises(InputError, match="HeadOnly leaves nothing to learn: the head of Embedding"):
        finetuned.make_init(config, ())(jax.random.key(0))
