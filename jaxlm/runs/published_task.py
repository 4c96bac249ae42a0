"""A published model with the head of a task, used as a run is: evaluated, and asked.

What a run folder says and such a folder does not, such as how records look, is as usual: ``text``
and ``label``, and for two texts ``pair``. What else answers depend on is as usual, too, or as in
the run that the folder was merged from, where it says so.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp

from jaxlm.config import Config, FinetuneConfig, LabelledTask, decode
from jaxlm.convert import folder, hub, huggingface, layout
from jaxlm.convert.architecture import OWN, TaskHead, check_distinct
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig
from jaxlm.data.labelled.records import Table
from jaxlm.errors import InputError
from jaxlm.evaluate.tagging import read_entities
from jaxlm.nn.choose import Wanted
from jaxlm.peft.tuning import Full
from jaxlm.runs import finetuned, steps
from jaxlm.runs.base import Base
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.runs.folder import is_run, read_any_config
from jaxlm.runs.task_head import ANSWERING
from jaxlm.runtime.storage import locate
from jaxlm.tasks.by_label import by_label
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.tagging import Tagging
from jaxlm.tasks.task import Labels
from jaxlm.train.loop import TrainConfig
from jaxlm.train.state import TrainState

_LONGEST = 512  # tokens of a row, where a model has no limit
_TARGETS = {
    "single_label_classification": "class",
    "multi_label_classification": "labels",
    "regression": "number",
}


def read_config_of(name: str, *, pairs: bool = False) -> Config:
    """The config of a run; or what it would be of the model in a folder, or on the hub.

    ``pairs``: it reads two texts.
    """
    path = _task_model(name)
    if path is None:
        return read_any_config(locate(name))
    return _config(path, pairs)


def is_tuned(name: str) -> bool:
    """Whether it is a fine-tuned run, or a published model with the head of a task."""
    directory = locate(name)
    if is_run(directory):
        return isinstance(read_any_config(directory), FinetuneConfig)
    return _task_model(name) is not None


def open_tuned(
    name: str,
    *,
    step: int | None = None,
    base: Base | str | None = None,
    pairs: bool = False,
    attention: Wanted = "auto",
) -> FinetunedRun:
    """A fine-tuned run, or a published model with the head of a task, as one."""
    path = _task_model(name)
    if path is None:
        return finetuned.open_finetuned(name, base=base, step=step, attention=attention)
    for option, given in (("step", step), ("base", base)):
        if given is not None:
            raise InputError(f"--{option} {given} is for runs, and {name} is none: leave it out")
    published = huggingface.unread(path)
    if published.head is None or published.task_head is None:
        raise InputError(
            f"{path} names the class of a task in its {folder.CONFIG}, but its weights hold no "
            "head of one: it is something to fine-tune from, with --base"
        )
    config, attends = steps.for_evaluation(_config(path, pairs), attention)
    labels = published.task_head.labels
    init = finetuned.make_init(config, labels)
    placement = finetuned.make_placement(config, labels, init)
    unlabelled = finetuned.make_placement(config, labels, init, labelled=False)
    params = placement.put_params({**published.params, "head": published.head})
    state = TrainState(jnp.asarray(0), {"params": params}, {}, ())
    cursor: Any = {}
    return FinetunedRun(
        config,
        published.tokenizer,
        labels,
        state,
        placement,
        unlabelled,
        cursor=cursor,
        averaged=(0,),
        attends=attends,
    )


def find_task_model(name: str) -> Path | None:
    """The folder of a model with the head of a task; None where it is none, or a run's."""
    path = _published(name)
    return None if path is None or layout.read_task_head(path) is None else path


def _task_model(name: str) -> Path | None:
    """The same; raises where the head is not known here."""
    path = _published(name)
    if path is not None and (other := layout.other_head(path)) is not None:
        raise InputError(
            f"{path} is a {other}, whose head is computed in another way than any here: without "
            "it, it is something to fine-tune from, with --base"
        )
    return find_task_model(name)


def _published(name: str) -> Path | None:
    """The folder of a model in Hugging Face's layout; None where it is none, or a run's."""
    directory = locate(name)
    if is_run(directory) or not isinstance(directory, Path):
        return None
    is_name = not directory.exists() and not name.startswith((".", "/", "~")) and "/" in name
    if not (directory / folder.CONFIG).is_file() and not is_name:
        return None
    return hub.find(name)


def _config(path: Path, pairs: bool) -> FinetuneConfig:
    head = layout.read_task_head(path)
    assert head is not None  # or it would not be asked for
    check_distinct(head.labels, f"{path / folder.CONFIG}: id2label")
    model: Any = huggingface.read_config(path)
    task, max_length = _with_settings(_task(head, pairs), head, f"{path / folder.CONFIG}: {OWN}")
    config = FinetuneConfig(
        name=str(path),
        base=None,
        data=LabelledConfig(
            train=Table(path="texts.csv"),
            max_length=max_length or model.max_length or _LONGEST,
            num_buckets=8,
        ),
        model=model,
        task=task,
        tuning=Full(),
        dropout_rate=0.0,
        train=TrainConfig(steps=1),
    )
    return finetuned.with_encoder(config, model, jax.default_backend())


def _task(head: TaskHead, pairs: bool) -> LabelledTask:
    pooling: Any = head.pooling
    match head.task:
        case "SequenceClassification":
            assert head.problem_type is not None  # of this task
            target: Any = _TARGETS[head.problem_type]
            names = None if target == "number" else head.labels
            fields = TextFields(pair="pair" if pairs else None, target=target, names=names)
            scale = (0.0, 1.0) if target == "number" else None
            return Classification(fields=fields, pooling=pooling, scale=scale)
        case "TokenClassification":
            return Tagging(entities=_are_entities(head.labels), split="punctuation")
        case "QuestionAnswering":
            return QuestionAnswering(null_threshold=None)
    return MultipleChoice(pooling=pooling)


def _with_settings(
    task: LabelledTask, head: TaskHead, where: str
) -> tuple[LabelledTask, int | None]:
    """The task as a folder that was merged has it, and the tokens in the longest row it says."""
    hints = {name: get_type_hints(type(task))[name] for name in ANSWERING[head.task]}
    hints["max_length"] = int
    if unknown := head.settings.keys() - hints.keys():
        known = ", ".join(hints)
        raise InputError(f"{where} has {min(unknown)!r}, which is none of {known}: leave it out")
    values = {k: decode(hints[k], x, f"{where}.{k}") for k, x in head.settings.items()}
    max_length = values.pop("max_length", None)
    try:
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length={max_length} is not above 0")
        if "thresholds" in values:
            by_label(values["thresholds"], head.labels, 0.5, "thresholds")
        return replace(task, **values), max_length
    except InputError as error:
        raise InputError(f"{where}: {error}: correct it, or leave it out") from error


def _are_entities(labels: Labels) -> bool:
    """Whether tags mark the words of entities."""
    try:
        read_entities(labels)
    except InputError:
        return False
    return any(label.startswith("B-") or label.startswith("I-") for label in labels)
