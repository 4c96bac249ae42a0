"""Heads of tasks on a model whose own head is shared: what a base gives, what a folder gets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT
from tokenizers import Tokenizer, models

from jaxlm.config import FinetuneConfig
from jaxlm.convert import bert
from jaxlm.convert.architecture import TaskHead
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.models.heads import WithLmHead
from jaxlm.models.llama import LlamaConfig
from jaxlm.models.modernbert import ModernBertConfig
from jaxlm.runs import finetuned
from jaxlm.runs.base import Base
from jaxlm.runs.finetuning import resolve
from jaxlm.runs.task_head import publish
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.tagging import Tagging
from jaxlm.train.loop import TrainConfig
from jaxlm.tree import leaves_with_path

SIZES = {"vocab_size": 32, "num_layers": 1, "hidden_dim": 8, "num_heads": 2, "mlp_dim": 8}
MODERN = ModernBertConfig(**SIZES, max_length=8, pooling="mean")
TASKS = [Classification(), MultipleChoice(), Tagging(), QuestionAnswering()]
named = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)


@pytest.fixture(scope="module")
def base() -> Base:
    model = WithLmHead(MODERN.make(), MODERN.make_lm_head())
    params = jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda x: np.asarray(x) + 0.5, params)
    return Base(
        name="base",
        config=MODERN,
        encoder=params["encoder"],
        pooler=None,
        lm_head=params["head"],
        tokenizer=Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, "[UNK]")),
        tokenizer_path=Path("tokenizer.json"),
        fingerprint="",
    )


def resolved(task, base: Base) -> FinetuneConfig:
    data = LabelledConfig(train=Table(path="a.csv"), batch_size=16)
    train = TrainConfig(steps=10)
    config = FinetuneConfig(name="a", base="base", data=data, task=task, train=train)
    return resolve(config, base, base.tokenizer, "cpu")


def begun(config: FinetuneConfig, base: Base) -> Any:
    """The parameters of step 0."""
    labels = ("a", "b", "c")
    placement = finetuned.make_placement(config, labels, finetuned.make_init(config, labels))
    return finetuned.make_state(config, labels, base, placement).trainable["params"]


@named
def test_a_head_begins_with_what_was_pretrained(task, base):
    config = resolved(task, base)
    head = begun(config, base)["head"]
    assert base.lm_head is not None
    found = dict(leaves_with_path(head))
    known = dict(leaves_with_path(base.lm_head))
    assert found.keys() == {
        *(known.keys() - {"bias"}),
        "classifier/kernel",
        "classifier/bias",
    }
    for path in found.keys() & known.keys():
        np.testing.assert_array_equal(found[path], known[path])
    # The control: of a base without that head it is new, as is one that only looks alike.
    alike = {"transform": base.lm_head["transform"], "classifier": head["classifier"]}
    for other in (None, alike):
        kernel = begun(config, replace(base, lm_head=other))["head"]["transform"]["kernel"]
        assert np.abs(kernel - known["transform/kernel"]).min() > 0.1


def test_heads_of_models_that_read_one_way_have_no_bias(base):
    llama = replace(base, config=LlamaConfig(**SIZES, num_kv_heads=1, max_length=8))
    for given, on, expected in (
        (Classification(), llama, False),
        (Classification(head_bias=True), llama, True),
        (Classification(), base, True),
    ):
        config = resolved(given, on)
        assert vars(config.task)["head_bias"] == expected
        model = finetuned.make_model(config, ("a", "b"))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        assert ("bias" in shapes["params"]["head"]["classifier"]) == expected


def test_heads_pool_as_the_config_says(base):
    for task in (Classification(), MultipleChoice()):
        assert vars(resolved(task, base).task)["pooling"] == "mean"
        first = replace(base, config=replace(MODERN, pooling="cls"))
        assert vars(resolved(task, first).task)["pooling"] == "cls"
        assert vars(resolved(replace(task, pooling="max"), first).task)["pooling"] == "max"
    # An embedding has no head, and what says how a head pools says nothing of it.
    first = replace(base, config=replace(MODERN, pooling="cls"))
    assert vars(resolved(Embedding(), first).task)["pooling"] == "mean"


HEAD = {"classifier": {"kernel": np.ones((8, 1), np.float32), "bias": np.ones(1, np.float32)}}
NUMBER = TextFields(target="number")
LABELS = TextFields(target="labels")
ASKED = {"doc_stride": 32, "num_best": 20, "max_answer_length": 30}


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (
            Classification(pooling="mean"),
            ("SequenceClassification", ("a", "b"), "single_label_classification", "mean", {}),
        ),
        (
            Classification(pooling="cls", fields=LABELS, thresholds=("chosen",)),
            ("SequenceClassification", ("a", "b"), "multi_label_classification", "cls", {}),
        ),
        (MultipleChoice(pooling="cls"), ("MultipleChoice", (), None, "cls", {})),
        (Tagging(), ("TokenClassification", ("a", "b"), None, None, {"entities": True})),
        (
            QuestionAnswering(null_threshold=None),
            ("QuestionAnswering", (), None, None, ASKED),
        ),
    ],
)
def test_what_is_told_of_a_head(task, expected):
    labels = ("a", "b") if isinstance(task, Classification | Tagging) else ()
    published = publish(task, labels, HEAD, MODERN)
    names = ("task", "labels", "problem_type", "pooling", "settings")
    assert published.said == TaskHead(**dict(zip(names, expected, strict=True)))
    assert (published.head, published.left_out) == (HEAD, "")


def test_numbers_come_out_in_their_unit():
    task = Classification(fields=NUMBER, pooling="cls", scale=(10.0, 2.0))
    published = publish(task, (), HEAD, MODERN)
    assert published.said is not None
    assert published.said.write_config(bert.BERT)["id2label"] == {"0": "LABEL_0"}
    hidden = np.arange(8.0)
    learned = hidden @ HEAD["classifier"]["kernel"] + HEAD["classifier"]["bias"]
    last = published.head["classifier"]
    np.testing.assert_allclose(hidden @ last["kernel"] + last["bias"], learned * 2 + 10)


def test_what_has_no_place_stays_behind():
    published = publish(Classification(pooling="max"), ("a",), HEAD, MODERN)
    assert published == (
        {},
        None,
        "; its head, which pools by max and not by cls or mean, is left out",
    )
    pooler = {"pooler": {"kernel": np.ones((8, 8))}}
    llama = LlamaConfig(**SIZES, num_kv_heads=1, max_length=8)
    why = "; its pooler, which has no place there, is left out with the head"
    assert publish(MultipleChoice(), (), HEAD | pooler, llama) == ({}, None, why)
    why = "; its head, which pools by bert and not by last, is left out"
    assert publish(Classification(), ("a",), HEAD | pooler, llama) == ({}, None, why)
    last = publish(Classification(pooling="last"), ("a",), HEAD, llama)
    assert "whose last layer has a bias, and there has none, is left out" in last.left_out
    head = {"classifier": {"kernel": HEAD["classifier"]["kernel"]}}  # as it is trained
    assert publish(Classification(pooling="last"), ("a",), head, llama).head == head
    whole = publish(Classification(), ("a",), HEAD | pooler, BERT)
    assert whole.head == HEAD | pooler
    assert whole.said is not None
    assert (whole.said.task, whole.said.pooling) == ("SequenceClassification", "bert")
    why = "; its head, which pools by mean and not by bert or distilbert or electra, is left out"
    assert publish(Classification(pooling="mean"), ("a",), HEAD, BERT) == ({}, None, why)
