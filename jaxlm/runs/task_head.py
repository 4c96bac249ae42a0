"""The head of a fine-tuned run, as the classes of Hugging Face's transformers have it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxlm.config import encode
from jaxlm.convert import huggingface
from jaxlm.convert.architecture import Problem, TaskHead, TaskName
from jaxlm.models.model import ModelConfig
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.tagging import Tagging
from jaxlm.tasks.task import Labels, Task

# Fields that answers depend on, beside weights and what else a folder says.
ANSWERING: dict[TaskName, tuple[str, ...]] = {
    "SequenceClassification": ("thresholds",),
    "TokenClassification": ("entities", "split", "doc_stride"),
    "QuestionAnswering": ("doc_stride", "num_best", "max_answer_length", "null_threshold"),
    "MultipleChoice": (),
}
NAMES: dict[type, TaskName] = {
    Classification: "SequenceClassification",
    MultipleChoice: "MultipleChoice",
    Tagging: "TokenClassification",
    QuestionAnswering: "QuestionAnswering",
}
Head = Mapping[str, Mapping[str, Float[np.ndarray, "..."]]]  # its parameters


class Published(NamedTuple):
    """A head, and what a folder's configuration says of it; or why it stays behind."""

    head: dict[str, Any]
    said: TaskHead | None
    left_out: str = ""


def settings(task: Task) -> dict[str, Any]:
    """What is set of a task's :data:`ANSWERING`, in JSON."""
    is_open = isinstance(task, Classification) and task.chooses_thresholds  # not chosen yet
    names = () if is_open or type(task) not in NAMES else ANSWERING[NAMES[type(task)]]
    set_ones = {name: encode(vars(task)[name]) for name in names}
    return {name: value for name, value in set_ones.items() if value not in (None, [])}


def publish(
    task: Task, labels: Labels, head: Head, model: ModelConfig, max_length: int | None = None
) -> Published:
    """What of a run's head other libraries can have.

    ``max_length``: the tokens in the run's longest row, to be kept for answers like the run's.
    """
    found = _publish(task, labels, head, model)
    if found.said is not None:
        longest = {} if max_length is None else {"max_length": max_length}
        found = found._replace(said=replace(found.said, settings=settings(task) | longest))
    bias = found.head.get("classifier", {}).get("bias")
    if found.said is None or bias is None or not np.any(bias):
        return found
    if huggingface.keeps_bias(model, found.said):
        return found
    why = "; its head, whose last layer has a bias, and there has none, is left out"
    return Published({}, None, f"{why}: --task.head-bias False trains one without")


def _publish(task: Task, labels: Labels, head: Head, model: ModelConfig) -> Published:
    pooling = vars(task).get("pooling") or "bert"
    known = huggingface.poolings(model, NAMES[type(task)]) if type(task) in NAMES else None
    if known is None:  # then a layer of it, which only BERT's have
        pooler = {name: leaf for name, leaf in head.items() if name == "pooler"}
        if pooler and not huggingface.keeps_pooler(model):
            why = "; its pooler, which has no place there, is left out with the head"
            return Published({}, None, why)
        return Published(pooler, None)
    match task:
        case Classification() | MultipleChoice() if pooling not in known:
            way = " or ".join(known)
            why = f"; its head, which pools by {pooling} and not by {way}, is left out"
            return Published({}, None, why)
        case Classification():
            kinds: dict[str, Problem] = {
                "class": "single_label_classification",
                "labels": "multi_label_classification",
                "number": "regression",
            }
            said = TaskHead(
                task="SequenceClassification",
                labels=labels,
                problem_type=kinds[task.fields.target],
                pooling=pooling,
            )
            return Published(_in_units(task, head), said)
        case MultipleChoice():
            return Published(dict(head), TaskHead(task="MultipleChoice", pooling=pooling))
        case Tagging():
            return Published(dict(head), TaskHead(task="TokenClassification", labels=labels))
        case QuestionAnswering():
            return Published(dict(head), TaskHead(task="QuestionAnswering"))
    return Published({}, None)


def _in_units(task: Classification, head: Head) -> dict[str, Any]:
    """With numbers in the unit of the data, where they were learned in another."""
    if task.fields.target != "number" or task.scale is None:
        return dict(head)
    mean, deviation = task.scale
    kernel = np.asarray(head["classifier"]["kernel"])
    bias = np.asarray(head["classifier"].get("bias", np.zeros(1)))
    scaled = {"kernel": kernel * deviation, "bias": bias * deviation + mean}
    return {**head, "classifier": {name: x.astype(np.float32) for name, x in scaled.items()}}
