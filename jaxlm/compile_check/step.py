"""The train step of a configuration where there is nothing: no data, no weights, no devices."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import Config, FinetuneConfig, PretrainConfig
from jaxlm.convert import bert, folder
from jaxlm.data.prepared import PreparedInfo
from jaxlm.data.tokenizers import SpecialTokens
from jaxlm.errors import InputError
from jaxlm.models.bert import BertConfig
from jaxlm.objectives.masking import Vocabulary
from jaxlm.runs import finetuned, run
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.multiple_choice import MultipleChoice
from jaxlm.tasks.question_answering import QuestionAnswering
from jaxlm.tasks.tagging import Tagging
from jaxlm.tasks.task import Task
from jaxlm.train.placement import AbstractBatch, Placement

SPECIAL = SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4)
NUM_CHOICES = 4


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What a run reads from its data and base, and a check has to be told."""

    length: int | None = None
    """Tokens per row; None: as the config prepares or truncates them, else the longest input of
    the model."""
    vocab_size: int = 30_522
    """Size of the tokenizer's vocabulary, if the model leaves it to the data."""
    labels: int = 2
    """Number of labels of a task."""
    encoder: BertConfig = dataclasses.field(default_factory=BertConfig)
    """Sizes of a base that cannot be read on this machine."""


class Step(NamedTuple):
    """What can be lowered: ``placement.train_step.lower(placement.abstract_state, batch, ...)``."""

    placement: Placement
    batch: AbstractBatch
    num_tokens: int  # positions of the whole batch
    row_length: int
    flops: float | None  # of one step on all devices; None where no formula is known


def make_step(config: Config, assumed: Assumed, devices: Sequence[Any]) -> Step:
    """The step that training would compile for these devices."""
    if isinstance(config, PretrainConfig):
        return _pretraining(config, assumed, devices)
    return _finetuning(config, assumed, devices)


def _pretraining(config: PretrainConfig, assumed: Assumed, devices: Sequence[Any]) -> Step:
    length = assumed.length or (
        config.model.max_length if config.prepare is None else config.prepare.row_length
    )
    vocab_size = assumed.vocab_size
    if config.prepare is not None and config.prepare.tokenizer.path is None:
        vocab_size = config.prepare.tokenizer.vocab_size
    if config.model.vocab_size is not None:
        vocab_size = min(vocab_size, config.model.vocab_size)
    rows = config.data.batch_size
    config = run.resolve(config, _no_data(length, vocab_size, rows), "tpu")
    placement = run.make_placement(config, _vocabulary(vocab_size), devices)
    batch = {
        "tokens": _shape(jnp.uint16 if vocab_size <= 2**16 else jnp.int32, rows, length),
        "lengths": _shape(jnp.int32, rows),
        "index": _shape(jnp.int32, rows),
    }
    flops = run.flops_per_token(config, length) * rows * length
    return Step(placement, placement.abstract_batch(batch), rows * length, length, flops)


def _finetuning(config: FinetuneConfig, assumed: Assumed, devices: Sequence[Any]) -> Step:
    model: Any = config.model
    if config.base is not None:
        model = base_config(config.base) or assumed.encoder
    size = run.padded_vocab_size(assumed.vocab_size, config.mesh)
    model = dataclasses.replace(model, vocab_size=model.vocab_size or size)
    if config.base is not None:
        model = finetuned.base_encoder(model, config.mesh)
    config = finetuned.with_encoder(config, model, "tpu")
    labels = tuple(str(number) for number in range(assumed.labels))
    state = jax.eval_shape(partial(finetuned.make_state, config, labels, None))
    placement = finetuned.make_placement(config, labels, state, devices=devices)
    longest = min(config.data.max_length, model.max_length or config.data.max_length)
    length, rows = assumed.length or longest, config.data.batch_size
    batch = _labelled_batch(config.task, rows, length, assumed.labels)
    num_tokens = batch["tokens"].size
    per_token = finetuned.flops_per_token(config, state.trainable, length)
    flops = None if per_token is None else per_token * num_tokens
    return Step(placement, placement.abstract_batch(batch), num_tokens, length, flops)


def base_config(base: str) -> BertConfig | None:
    """Config of a run folder or a folder in Hugging Face's layout, weightless; else None."""
    directory = Path(base)
    if run.is_run(directory):
        return run.read_config(directory, PretrainConfig).model
    if not directory.is_dir():
        return None
    return bert.read_config(folder.read_config(directory), str(directory / folder.CONFIG))[1]


def _labelled_batch(task: Task, rows: int, length: int, num_labels: int) -> dict[str, Any]:
    """Shapes of what the task's ``encode`` and the batches make of examples."""
    one, along = _shape(jnp.int32, rows), _shape(jnp.int32, rows, length)
    batch = {"tokens": along, "token_type_ids": along, "lengths": one, "index": one}
    batch["weights"] = _shape(jnp.float32, rows)
    match task:
        case Classification():
            kind = task.fields.target
            many = _shape(jnp.float32, rows, num_labels)
            number = _shape(jnp.float32, rows)
            return batch | {"labels": {"class": one, "labels": many, "number": number}[kind]}
        case Tagging():
            return batch | {"labels": along, "weights": _shape(jnp.float32, rows, length)}
        case QuestionAnswering():
            return batch | {"starts": one, "ends": one, "allowed": _shape(bool, rows, length)}
        case MultipleChoice():
            many = _shape(jnp.int32, rows, NUM_CHOICES, length)
            lengths = _shape(jnp.int32, rows, NUM_CHOICES)
            more = {"tokens": many, "token_type_ids": many, "lengths": lengths, "labels": one}
            return batch | more
        case Embedding():
            del batch["token_type_ids"]
            pair = _shape(jnp.int32, rows, 2, length)
            return batch | {"tokens": pair, "lengths": _shape(jnp.int32, rows, 2)}
    raise InputError(f"the batches of {type(task).__name__} are not known to this check")


def _shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _vocabulary(size: int) -> Vocabulary:
    is_ordinary = np.arange(size) > max(dataclasses.asdict(SPECIAL).values())
    return Vocabulary(
        mask_id=SPECIAL.mask,
        start_id=SPECIAL.cls,
        ordinary=jnp.asarray(np.flatnonzero(is_ordinary)),
        is_ordinary=jnp.asarray(is_ordinary),
        word_starts=jnp.asarray(is_ordinary),
    )


def _no_data(row_length: int, vocab_size: int, rows: int) -> PreparedInfo:
    """What would be known of data with such rows."""
    one: Mapping[str, Any] = {"train": rows}
    return PreparedInfo(
        name="none",
        row_length=row_length,
        vocab_size=vocab_size,
        special=SPECIAL,
        documents=dict(one),
        duplicates=0,
        rows=dict(one),
        tokens={"train": rows * row_length},
        fill={"train": 1.0},
        unigram_entropy=0.0,
        fingerprint="",
        tokenizer_sha256="",
        source_fingerprint="",
        recipe={},
    )
