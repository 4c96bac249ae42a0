"""A fine-tuned model put together from its configuration: what training and using it share."""

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tokenizers import Tokenizer

from jaxlm import optim, tree
from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled.batching import Batching, make_batching
from jaxlm.data.labelled.dataset import Splits, read_splits, reading
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.decode.beam import Writing
from jaxlm.decode.generate import GenerateConfig
from jaxlm.errors import InputError
from jaxlm.models.model import example_inputs, is_two_sided
from jaxlm.nn.choose import Wanted
from jaxlm.peft import tuning
from jaxlm.peft.lora import LoraConfig
from jaxlm.runs import base as bases
from jaxlm.runs import beginning, best, steps, thresholds
from jaxlm.runs.answers import Answer, Answered, answered, as_records, by_kind, joined, say_long
from jaxlm.runs.base import Base
from jaxlm.runs.finite import require_finite
from jaxlm.runs.folder import (
    CHECKPOINTS,
    SOURCE_TOKENIZER,
    check_tokenizer,
    read_config,
    read_json,
    read_tokenizer,
)
from jaxlm.runs.writing import Responder, make_responder
from jaxlm.runtime.storage import StoragePath, locate
from jaxlm.sums import Sums, add_all
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.tasks.task import Labels, Outputs, Responsive, Task, Thresholded, Varied
from jaxlm.train import restore, stored
from jaxlm.train.placement import Init, Placement
from jaxlm.train.restore import Cursor
from jaxlm.train.state import TrainState
from jaxlm.train.step import EvalStep, make_predict_step
from jaxlm.typing import Apply, Params, PRNGKey, Variables

LABELS = "labels.json"


def with_encoder(config: FinetuneConfig, model: Any, platform: str) -> FinetuneConfig:
    """The config with that encoder, which gets the run's dropout rate and dtype."""
    dtype = config.dtype or model.dtype or steps.default_dtype(platform)
    rate = 0.1 if config.dropout_rate is None and config.base is not None else config.dropout_rate
    model = replace(model if rate is None else model.with_dropout(rate), dtype=dtype)
    rate = model.dropout_rate if rate is None else rate
    return replace(config, model=model, dropout_rate=rate, monitor=best.monitor(config).name)


def settled(
    config: FinetuneConfig, splits: Splits, before: FinetuneConfig | None = None
) -> FinetuneConfig:
    """The config whose task has what it left to the training data, or to the run so far, if any."""
    task = config.task if before or splits.task is None else splits.task
    return replace(config, task=task.settled(splits.train, before and before.task))


def make_model(config: FinetuneConfig, labels: Labels) -> nn.Module:
    """The resolved config's encoder with its task's head."""
    assert config.model is not None  # resolved
    assert config.dropout_rate is not None
    return config.task.make_model(config.model, labels, config.dropout_rate)


def adapted_apply(config: FinetuneConfig, labels: Labels) -> Apply:
    """The model's, reading adapters and frozen parameters of any dtype."""
    return tuning.adapt(config.tuning, make_model(config, labels).apply)


def make_init(config: FinetuneConfig, labels: Labels, trained: Collection[str] = ()) -> Init:
    """What makes step 0: the parameters that are given, of a base, a new head, and new adapters.

    ``trained`` is :func:`restore.trained` of a run that has begun.
    """
    assert config.model is not None  # resolved
    model, inputs = make_model(config, labels), example_inputs(config.model)
    split_layers = config.model.unrolls_layers

    def init(key: PRNGKey, given: Params | None = None) -> TrainState:
        trainable, frozen = tuning.prepare(
            config.tuning,
            jax.random.split(key)[1],
            beginning.make_params(config, model, key, given or {}),
            lambda variables: model.apply(variables, *inputs),
            config.frozen_dtype,
            split_layers=split_layers,
            trained=trained,
        )
        if not trainable:
            raise InputError(
                f"tuning={type(config.tuning).__name__} leaves nothing to learn: the head of "
                f"{type(config.task).__name__} has no parameters; tune the encoder as well"
            )
        return TrainState.create(trainable, frozen, make_optimizer(config))

    return jax.jit(init)  # so that it is traced once for several placements


def make_state(
    config: FinetuneConfig, labels: Labels, base: Base | None, placement: Placement
) -> TrainState:
    """Step 0 on the devices of its placement."""
    given = beginning.given(config, make_model(config, labels), base)
    key = jax.random.key(config.train.seed)
    if isinstance(config.tuning, LoraConfig) and config.tuning.init == "pissa":
        # Of whole matrices, on one device: XLA's CPUs may wait for each other in an SVD for ever.
        init = make_init(config, labels, tree.shapes(placement.abstract_state.trainable))
        return steps.put_state(init(key, stored.read(given)), placement)
    keep = [tuning.kept] if tuning.may_keep(config.tuning, config.frozen_dtype) else []
    return placement.init(key, placement.put_params(given, *keep))


def make_optimizer(config: FinetuneConfig) -> Any:
    """The config's, with the rates of its tuning."""
    return optim.make_optimizer(config.optimizer, tuning.lr_factor(config.tuning))


def make_placement(
    config: FinetuneConfig,
    labels: Labels,
    init: Init,
    *,
    labelled: bool = True,
    devices: Sequence[Any] | None = None,
) -> Placement:
    """The run's steps on all devices, or on ``devices``, from what :func:`make_init` makes.

    ``eval_step`` gives sums, of labelled data, and outputs.
    """
    apply = adapted_apply(config, labels)
    task = config.task.for_evaluation()
    predict = task.make_predict(apply)

    def predict_step(axis_name: str | None) -> EvalStep:
        return make_predict_step(
            task.make_loss(apply) if labelled else None,
            lambda variables, batch: {
                **predict(variables, batch),
                **{name: batch[name] for name in ("example", "lengths")},
            },
            seed=steps.EVAL_SEED,
            axis_name=axis_name,
        )

    loss, lr_factor = config.task.make_loss(apply), tuning.lr_factor(config.tuning)
    return steps.make_placement(
        config, init, loss, predict_step, lr_factor=lr_factor, devices=devices
    )


def flops_per_token(config: FinetuneConfig, trainable: PyTree, row_length: int) -> float:
    """Floating-point operations of a training step per token, of sources or of targets as long.

    The products of the encoder, of a decoder and of a head over the vocabulary forward; again for
    the gradients of activations, where anything below the head learns, and of kernels, where those
    do; and six for every number in an adapter. Other heads, norms and biases are left out: below
    1 % for a BERT-base.
    """
    model = config.model
    assert model is not None  # resolved
    written = row_length if isinstance(config.task, Responsive) else 0
    read = row_length + (written if is_two_sided(model) else 0)
    forward = model.forward_flops(row_length, written) / read
    passes = {tuning.Full: 3, tuning.HeadOnly: 1}.get(type(config.tuning), 2)
    return passes * forward + 6.0 * tree.num_params(trainable.get("lora", {}))


def predict(
    placement: Placement, state: TrainState, batching: Batching
) -> tuple[Sums | None, Outputs]:
    """Sums over all examples, if they are labelled, and the outputs for each, in their order."""
    sums, rows = [], {}
    for batch in batching.eval_batches(batch_rows=placement.batch_rows):
        one, outputs = jax.device_get(placement.eval_step(state, placement.put_batch(batch)))
        sums += [] if one is None else [one]
        rows |= dict(batching.apart(outputs))
    # Arrays, unless rows were padded to different lengths.
    stack = lambda x: np.stack(x) if len({np.shape(value) for value in x}) == 1 else x
    outputs = {name: stack([rows[i][name] for i in range(len(rows))]) for name in rows[0]}
    return add_all(sums) if sums else None, outputs


@dataclass(frozen=True)
class FinetunedRun:
    """A fine-tuned run, read from its folder."""

    config: FinetuneConfig
    tokenizer: Tokenizer
    labels: Labels
    state: TrainState
    placement: Placement
    unlabelled: Placement
    """For data without labels."""
    cursor: Cursor
    averaged: tuple[int, ...]
    """The steps that the parameters are the mean of; a single one is as it was saved."""
    source_tokenizer: Tokenizer | None = None
    """That of sources, where they have one of their own."""
    attends: str = ""
    """How it computes attention and why, in a line; "" where it has no choice."""

    @property
    def task(self) -> Task:
        """What it was tuned for."""
        return self.config.task

    @cached_property
    def framer(self) -> Framer:
        """What makes rows of texts."""
        return make_framer(self.config, self.tokenizer, self.source_tokenizer)

    @property
    def variables(self) -> Variables:
        """All collections, adapters among them, as plain arrays."""
        return tuning.plain(self.state.variables)

    def splits(self) -> Splits:
        """The examples that it was trained on and chosen by; raises if they are others now."""
        data = self.config.data
        splits = read_splits(data, reading(self.task))
        if self.cursor["data"] not in ([], [splits.fingerprint]):  # none of an imported adapter
            raise InputError(
                f"{data.train} or the validation data have changed since {self.config.name} was "
                "trained, and other examples would be held out now: restore them, or evaluate "
                "another file (--data)"
            )
        return splits

    def merged(self) -> Params:
        """The parameters of a plain model, without adapters, that computes the same."""
        model = make_model(self.config, self.labels)
        assert self.config.model is not None  # resolved
        inputs = example_inputs(self.config.model)
        call = lambda variables: model.apply(variables, *inputs)
        return tuning.merge(self.config.tuning, self.variables, call)

    def outputs(
        self,
        examples: Sequence[Any],
        *,
        labelled: bool = True,
        report: Callable[[int, int, int, tuple[int, int]], None] = say_long,
    ) -> tuple[Sums | None, Outputs]:
        """What the model gives for examples of its task, in their order.

        ``report`` is told how many are cut, of how many, and at how many tokens; and how many are
        read in windows, and in how many.
        """
        placement, framer = self.placement if labelled else self.unlabelled, self.framer
        encoded = self.task.for_evaluation().encode(framer, examples, self.labels)
        longest = self.config.model and self.config.model.max_length
        options: Any = {"longest": longest, "in_parts": not labelled}
        batching = make_batching(encoded, self.config.data, framer.max_length, **options)
        found = predict(placement, self.state, batching)
        require_finite(found[1], self.state.variables)
        most = framer.max_length
        report(encoded.longer_than(most), len(examples), most, encoded.windowed)
        return found

    def cut(self, examples: Sequence[Any]) -> tuple[int, int, int, tuple[int, int]]:
        """What :func:`say_long` takes, of examples that are responded to: sources are cut."""
        task, framer = self.task, self.framer
        count = task.num_cut(framer, examples) if isinstance(task, Seq2Seq) else 0
        return count, len(examples), framer.max_length, (0, 0)

    @cached_property
    def responder(self) -> Responder:
        """What responds in words; :class:`InputError` where the task is another."""
        model = make_model(self.config, self.labels)
        make = make_responder(self.config, model, self.framer, self.tokenizer)
        return make(self.state.variables)

    def answer(
        self, given: Iterable[Any], *, chunk: int = 4096, generate: Writing | None = None
    ) -> list[Answer]:
        """What the model says of each of a list, in its order: of texts, of dicts, of records.

        A dict has the fields of the training data, and its others are in the answer, too. What
        cannot be answered, such as an empty text, has an ``error`` instead; where nothing can,
        :class:`InputError` is raised. ``generate`` is for tasks whose models write.
        """
        names = self.task.text_fields
        pairs = self.stream(as_records(given, names), chunk=chunk, generate=generate)
        return list(joined(pairs, names))

    def stream(
        self, records: Iterable[Record], *, chunk: int = 4096, generate: Writing | None = None
    ) -> Iterator[Answered]:
        """Each record with what the model says of it, in JSON; says how many were cut."""
        seen: list[tuple[int, int, int, tuple[int, int]]] = []
        numbers, way = itertools.count(), generate or GenerateConfig()

        def answer(numbered: list[tuple[int, Any]]) -> list[Answer]:
            own, examples = map(list, zip(*numbered, strict=True))
            if isinstance(self.task, Responsive):
                written = list(self.responder.respond(examples, way, numbers=own))
                seen.append(self.cut(examples))
                return self.task.answers(examples, self.labels, {"written": written})
            report = lambda *counts: seen.append(counts)
            _, outputs = self.outputs(examples, labelled=False, report=report)
            return self.task.answers(examples, self.labels, outputs)

        def read(record: Record) -> tuple[int, Any]:
            number = next(numbers)  # of what cannot be read as well
            (example,) = self.task.read([record], labelled=False)
            return number, example

        answer_all = answer
        if isinstance(self.task, Varied):
            kind = self.task.kind
            answer_all = by_kind(lambda one: kind(one[1]), answer)
        yield from answered(records, read, answer_all, chunk=chunk)
        if seen:
            cut, total, (longest, *_), windowed = zip(*seen, strict=True)
            documents, several = map(sum, zip(*windowed, strict=True))
            say_long(sum(cut), sum(total), longest, (documents, several))


def make_framer(
    config: FinetuneConfig, tokenizer: Tokenizer, source_tokenizer: Tokenizer | None = None
) -> Framer:
    """Rows no longer than both data and model allow."""
    assert config.model is not None
    most, given = config.model.max_length, config.data.max_length
    return Framer(tokenizer, min(given, most or given), source_tokenizer, most)


def open_finetuned(
    directory: StoragePath | str,
    *,
    base: Base | str | None = None,
    step: int | None = None,
    attention: Wanted | None = None,
    choosing: bool = False,
) -> FinetunedRun:
    """Read a fine-tuned run: its best checkpoint, the mean of its last, or that of ``step``.

    ``base`` is the encoder's path, if it is no longer the config's, or is that encoder, read
    once for several adapters; it is not needed if all parameters were tuned. ``attention``: how it
    is computed, if not as suits the devices. ``choosing``: thresholds are to be chosen, and those
    that were are not read. Raises :class:`InputError` where the encoder is not the adapters' own.
    """
    directory = locate(directory)
    config = read_config(directory, FinetuneConfig)
    tokenizer = read_tokenizer(directory)
    checkpoints = directory / CHECKPOINTS
    cursor = restore.peek(checkpoints)
    check_tokenizer(directory, cursor, tokenizer)
    source_tokenizer = None
    if config.source_tokenizer is not None:
        source_tokenizer = read_tokenizer(directory, SOURCE_TOKENIZER)
        check_tokenizer(directory, cursor, source_tokenizer, SOURCE_TOKENIZER)
    if (names := read_json(directory / LABELS)) != cursor["labels"]:
        raise InputError(
            f"{directory / LABELS} does not hold the labels that the run was trained with: write "
            f"{json.dumps(cursor['labels'])} there"
        )
    labels = tuple(names)
    loaded = None
    if config.base is not None and not isinstance(config.tuning, tuning.Full):
        loaded = base if isinstance(base, Base) else bases.load(base or config.base)
        if loaded.fingerprint != cursor["base_sha256"]:
            raise InputError(
                f"{loaded.name} (sha256 {loaded.fingerprint[:12]}) is not the encoder that the "
                f"adapters of {directory} were trained on ({cursor['base_sha256'][:12]}): give "
                "that one with --base"
            )
    config, attends = steps.for_evaluation(config, attention)
    init = make_init(config, labels, restore.trained(checkpoints))
    placement = make_placement(config, labels, init)
    unlabelled = make_placement(config, labels, init, labelled=False)
    chosen = steps.chosen(config, checkpoints, best.monitor(config), step)
    shapes = placement.abstract_state
    restored = restore.restore_mean(checkpoints, {"trainable": shapes.trainable}, chosen)
    is_frozen = bool(jax.tree.leaves(shapes.frozen))
    frozen = make_state(config, labels, loaded, placement).frozen if is_frozen else {}
    state = TrainState(jnp.asarray(restored.step), restored.state["trainable"], frozen, ())
    averaged = tuple(chosen or [restored.step])
    if isinstance(config.task, Thresholded) and config.task.chooses_thresholds and not choosing:
        config = replace(config, task=thresholds.read(config.task, directory, averaged))
    about = restored.cursor, averaged, source_tokenizer, attends
    return FinetunedRun(config, tokenizer, labels, state, placement, unlabelled, *about)
