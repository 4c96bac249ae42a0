"""The train step of a configuration where there is nothing: no data, no weights, no devices."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlm.config import UNKNOWN_BASE, Config, FinetuneConfig, Model, PretrainConfig
from jaxlm.data.labelled.token_batches import rows_of
from jaxlm.data.prepared import PreparedInfo
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.errors import InputError
from jaxlm.objectives.masking import SpanTokens, Vocabulary
from jaxlm.runs import attention, finetuned, pretrained, steps
from jaxlm.runs import base as bases
from jaxlm.tasks.task import shape
from jaxlm.train.placement import AbstractBatch, Placement

SPECIAL = SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4)


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
    encoder: Model = UNKNOWN_BASE
    """Sizes of a base that cannot be read on this machine."""


class Step(NamedTuple):
    """What can be lowered: ``placement.train_step.lower(placement.abstract_state, batch, ...)``."""

    placement: Placement
    batch: AbstractBatch
    num_tokens: int  # positions of the whole batch, of sources and of targets
    row_length: int
    flops: float | None  # of one step on all devices; None where no formula is known
    attention: str  # how it is computed, and why; "" for models of one way


def make_step(config: Config, assumed: Assumed, devices: Sequence[Any]) -> Step:
    """The step that training would compile for these devices."""
    if isinstance(config, PretrainConfig):
        return _pretraining(config, assumed, devices)
    return _finetuning(config, assumed, devices)


def _pretraining(config: PretrainConfig, assumed: Assumed, devices: Sequence[Any]) -> Step:
    model = encoder_config(config, assumed)
    base: Any = None if config.base is None else model
    length = assumed.length or (
        model.max_length if config.prepare is None else config.prepare.row_length
    )
    if length is None:
        raise InputError("neither the config nor the model says how long rows are: give --length")
    vocab_size = assumed.vocab_size
    if config.prepare is not None and config.prepare.tokenizer.path is None:
        vocab_size = config.prepare.tokenizer.vocab_size
    if model.vocab_size is not None:
        vocab_size = min(vocab_size, model.vocab_size)
    elif base is not None:
        base = dataclasses.replace(model, vocab_size=vocab_size)
    rows = config.data.batch_size
    config = pretrained.resolve(config, [_no_data(length, vocab_size, rows)], "tpu", base)
    config, attends = attention.settle(config, length, devices, present=False)
    placement = pretrained.make_placement(config, _vocabulary(vocab_size), devices)
    batch = {
        "tokens": shape(jnp.uint16 if vocab_size <= 2**16 else jnp.int32, rows, length),
        "lengths": shape(jnp.int32, rows),
        "index": shape(jnp.int32, rows),
    }
    if before := pretrained.tokens_before(config.task):
        batch["before"] = shape(batch["tokens"].dtype, rows, before)
        batch["before_lengths"] = batch["lengths"]
    flops = pretrained.flops_per_token(config, length) * rows * length
    return Step(placement, placement.abstract_batch(batch), rows * length, length, flops, attends)


def _finetuning(config: FinetuneConfig, assumed: Assumed, devices: Sequence[Any]) -> Step:
    model = encoder_config(config, assumed)
    size = steps.padded_vocab_size(assumed.vocab_size, config.mesh)
    own = ("vocab_size", *(["source_vocab_size"] if config.source_tokenizer else []))
    model = dataclasses.replace(model, **{name: vars(model)[name] or size for name in own})
    if config.base is not None:
        model = steps.base_model(model, config.mesh)
    config = finetuned.with_encoder(config, model, "tpu")
    train = config.train.with_epochs(lambda epochs: 1000)  # as many as examples would give
    config = dataclasses.replace(config, train=train)
    labels = tuple(str(number) for number in range(assumed.labels))
    longest = min(config.data.max_length, model.max_length or config.data.max_length)
    length = assumed.length or longest
    config, attends = attention.settle(config, length, devices, present=False)
    init = finetuned.make_init(config, labels)
    placement = finetuned.make_placement(config, labels, init, devices=devices)
    rows = rows_of(length, config.data.batch_size, config.data.batch_tokens)
    batch = config.task.abstract_batch(rows, length, assumed.labels)
    num_tokens = sum(batch[side].size for side in ("tokens", "targets") if side in batch)
    flops = (
        finetuned.flops_per_token(config, placement.abstract_state.trainable, length) * num_tokens
    )
    return Step(placement, placement.abstract_batch(batch), num_tokens, length, flops, attends)


def encoder_config(config: Config, assumed: Assumed) -> Any:
    """The model that a config names, or that of its base, as far as that can be read here."""
    if config.base is None:
        return config.model
    return bases.read_model(config.base) or config.model or assumed.encoder


def _vocabulary(size: int) -> Vocabulary:
    is_ordinary = np.arange(size) > max(SPECIAL.ids)
    return Vocabulary(
        mask_id=SPECIAL.mask,
        start_id=SPECIAL.cls,
        end_id=SPECIAL.sep,
        ordinary=jnp.asarray(np.flatnonzero(is_ordinary)),
        is_ordinary=jnp.asarray(is_ordinary),
        word_starts=jnp.asarray(is_ordinary),
        spans=SpanTokens(SPECIAL.cls, SPECIAL.sep, tuple(range(size - 1, max(SPECIAL.ids), -1))),
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
