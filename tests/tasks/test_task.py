"""What all tasks have in common."""

import dataclasses
from typing import get_args

import pytest

from jaxlm import config as configs
from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.errors import InputError
from jaxlm.models.bilstm import BilstmConfig
from jaxlm.models.t5 import T5Config
from jaxlm.models.transformer import TransformerConfig
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.tagging import Tagging
from jaxlm.train.loop import TrainConfig

TASKS = [
    Classification(label_smoothing=0.1, r_drop=1.0),
    Tagging(label_smoothing=0.1),
    MultipleChoice(label_smoothing=0.1),
    QuestionAnswering(null_threshold=None),
    Embedding(fields=TextFields(pair="other", label="score", target="number"), min_similarity=3.0),
]


def test_each_has_its_verb():
    assert [task.verb for task in TASKS] == ["classify", "tag", "choose", "answer", "embed"]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_a_run_folder_keeps_the_task(task):
    config = FinetuneConfig(
        name="a",
        data=LabelledConfig(train=Table(path="a.csv")),
        task=task,
        model=BilstmConfig(),
        train=TrainConfig(steps=1),
    )
    assert configs.from_json(configs.to_json(config)) == config


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_evaluation_leaves_out_what_regularises(task):
    plain = task.for_evaluation()
    changed = {
        f.name for f in dataclasses.fields(task) if getattr(task, f.name) != getattr(plain, f.name)
    }
    regularisers = {"label_smoothing", "r_drop"} & vars(task).keys()
    assert changed == regularisers
    assert all(getattr(plain, name) == 0 for name in regularisers)


@pytest.mark.parametrize("task", get_args(configs.LabelledTask), ids=lambda task: task.__name__)
def test_a_model_that_reads_a_source_and_writes_a_target_is_refused(task):
    refused(lambda model: task().make_model(model, ("a", "b"), 0.0), task)


@pytest.mark.parametrize("task", get_args(configs.PretrainingTask), ids=lambda task: task.__name__)
def test_and_is_not_pretrained_on_one_text(task):
    refused(lambda model: task().make_model(model), task)


def refused(make, task):
    """Unless it is of the tasks that have two texts."""
    models = [TransformerConfig(vocab_size=32), T5Config(vocab_size=32)]
    for model in models if task.__name__ not in ("Seq2Seq", "SpanCorruption") else []:
        with pytest.raises(InputError, match=f"task={task.__name__} reads one text, and a model"):
            make(model)
