"""Fine-tuning from a configuration: the whole way from labelled records to a run folder."""

import dataclasses
import json
import math
from collections import Counter
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from jaxlm import tree
from jaxlm.config import FinetuneConfig
from jaxlm.data import tokenizers
from jaxlm.data.labelled.augment import make_augment
from jaxlm.data.labelled.batches import make_buckets, train_batches
from jaxlm.data.labelled.dataset import Splits, read_splits
from jaxlm.data.labelled.statistics import describe, render
from jaxlm.data.prepare import TokenizerConfig
from jaxlm.data.tokenizers import SpecialTokens
from jaxlm.errors import InputError
from jaxlm.peft import tuning
from jaxlm.runs import base as bases
from jaxlm.runs import finetuned, pretraining, run
from jaxlm.runs.base import Base
from jaxlm.runtime import distributed
from jaxlm.runtime.storage import StoragePath, mirrored, write_whole
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.loop import fit
from jaxlm.train.metrics import Throughput
from jaxlm.train.progress import Progress
from jaxlm.train.restore import best_step, list_steps
from jaxlm.train.state import TrainState
from jaxlm.train.view import RECORDS, View


def finetune(config: FinetuneConfig, *, console: Console | None = None) -> StoragePath:
    """Train, and leave a self-contained run folder; returns it.

    An unfinished run in the folder is resumed.
    """
    main_process = jax.process_index() == 0
    console = console or Console(quiet=not main_process, highlight=False)
    directory, task = config.directory, config.task
    run.check_processes(config, directory / run.CHECKPOINTS)
    with distributed.first("data"):  # the others find what had to be downloaded and prepared
        splits = read_splits(config.data, task.read)
    base = None if config.base is None else bases.load(config.base)
    tokenizer = base.tokenizer if base else make_tokenizer(config.tokenizer, splits)
    config = resolve(config, base, tokenizer, jax.default_backend())
    labels = task.labels(splits.train)
    framer = finetuned.make_framer(config, tokenizer)
    train, validation = (task.encode(framer, part, labels) for part in splits[:2])
    steps = config.train.with_steps(len(train), config.data.batch_size)
    config = dataclasses.replace(config, train=steps)
    described = {
        "training": describe(train, task.classes(splits.train), duplicates=splits.duplicates),
        "validation": describe(validation, task.classes(splits.validation)),
    }
    console.print(render(described))
    lengths = np.concatenate([train.lengths, validation.lengths])
    buckets = make_buckets(lengths, config.data.num_buckets, max_length=framer.max_length)

    state = finetuned.make_state(config, labels, base)
    placement = finetuned.make_placement(config, labels, state)
    finetuned.check_monitor(
        config, labels, placement, state, splits.validation, validation, buckets
    )
    moments = round(tree.num_params(state.opt_state) / max(tree.num_params(state.trainable), 1))
    console.print(tuning.table(state.trainable, state.frozen, moments))
    resuming = bool(list_steps(directory / run.CHECKPOINTS))
    if resuming and not config.resume:
        raise InputError(f"{directory} holds a run: give another --name, or leave out --no-resume")

    with (
        Progress(config.train.steps, visible=main_process, console=console) as progress,
        Checkpointer(
            directory / run.CHECKPOINTS,
            keep=config.train.keep,
            monitor=finetuned.monitor(config),
            report=progress.warn,
        ) as checkpointer,
    ):
        own = tokenizers.fingerprint(tokenizer)
        cursor = run.make_cursor(config.train.seed, [splits.fingerprint], own)
        cursor |= {"labels": list(labels), "base_sha256": base and base.fingerprint}
        distributed.check_same("data", cursor)
        # The order of resuming: 1. the run's own newest undamaged checkpoint; 2. the base.
        if resuming:
            run.check_config(directory, config)
            abstract = placement.abstract_state
            restored = checkpointer.restore(abstract.learned)
            cursor = run.resume_cursor(config, restored.cursor, cursor)
            state = dataclasses.replace(restored.state, frozen=state.frozen)
            progress.print(f"resuming from step {restored.step} of {directory}")
        state = finetuned.put_state(state, placement)
        if main_process:
            run.write_folder(directory, config, tokenizer)
            write_whole(directory / finetuned.LABELS, json.dumps(labels))

        def evaluation(state: TrainState) -> dict[str, float]:
            sums, outputs = finetuned.predict(
                placement, state, validation, config.data.batch_size, buckets
            )
            assert sums is not None  # the validation data are labelled
            metrics = {"loss": sums.means()["loss"]}
            metrics |= task.metrics(splits.validation, labels, outputs)
            finetuned.check_measured(checkpointer.monitor.name, metrics)
            return metrics

        with (
            mirrored(directory, *RECORDS) if main_process else nullcontext() as records,
            View(
                records,
                progress,
                Throughput(None, jax.devices()[0].device_kind, jax.device_count()),
                step=int(state.step),
                tokens_seen=cursor["tokens_seen"],
                log_every=config.train.log_every,
                reference=_reference(task.classes(splits.validation), len(splits.validation)),
                more_writers=pretraining.writers(config) if main_process else (),
            ) as view,
        ):
            special = SpecialTokens.of(tokenizer)
            augment = config.data.augment
            fit(
                config.train,
                placement,
                state,
                train_batches(
                    train,
                    config.data.batch_size,
                    buckets,
                    seed=config.train.seed,
                    examples_seen=cursor["examples_seen"],
                    augment=augment and make_augment(augment, special, config.train.seed),
                    batch_rows=placement.batch_rows,
                ),
                evaluation,
                checkpointer,
                cursor,
                view,
                batch_size=config.data.batch_size,
            )
    best = best_step(directory / run.CHECKPOINTS, checkpointer.monitor)
    console.print(f"the best checkpoint by {checkpointer.monitor.name} is that of step {best}")
    return directory


def resolve(
    config: FinetuneConfig,
    base: Base | None,
    tokenizer: Tokenizer,
    platform: str,
) -> FinetuneConfig:
    """Fill in what the config leaves to the base, the data and the platform."""
    if base is not None:
        if config.model is not None:
            raise InputError(f"model is given, and also base={base.name!r}, which has its own")
        model: Any = finetuned.base_encoder(base.config, config.mesh)
    else:
        assert config.model is not None
        given, size = config.model.vocab_size, tokenizers.vocab_size(tokenizer)
        vocab_size = run.resolve_vocab_size(given, size, config.mesh)
        model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return finetuned.with_encoder(config, model, platform)


def make_tokenizer(config: TokenizerConfig | None, splits: Splits) -> Tokenizer:
    """Loaded, or trained on the training texts."""
    config = config or TokenizerConfig()
    if config.path is not None:
        return tokenizers.load(config.path)
    texts = [example.content for example in splits.train]
    return tokenizers.train(config.kind, texts, config.vocab_size)


def _reference(classes: list[str], num_examples: int) -> dict[str, float]:
    """Class entropy: the loss of a constant predictor, if each example has one class."""
    if len(classes) != num_examples:
        return {}
    counts = Counter(classes)
    shares = [count / num_examples for count in counts.values()]
    return {"class entropy": -sum(share * math.log(share) for share in shares)}
