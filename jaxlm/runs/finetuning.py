"""Fine-tuning from a configuration: the whole way from labelled records to a run folder."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from jaxlm import sharding, tree
from jaxlm.config import FinetuneConfig
from jaxlm.data import tokenizers
from jaxlm.data.fidelity import report
from jaxlm.data.labelled import windows
from jaxlm.data.labelled.augment import make_augment
from jaxlm.data.labelled.batching import Even, make_batching
from jaxlm.data.labelled.dataset import Splits, encode_usable, read_splits, reading
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.packing import would_save
from jaxlm.data.labelled.statistics import describe, longer, render, tally
from jaxlm.data.special_tokens import SpecialTokens, own_frame
from jaxlm.data.tokenizers import TokenizerConfig
from jaxlm.decode.generate import GenerateConfig
from jaxlm.errors import InputError
from jaxlm.models.model import ModelConfig, has_transform
from jaxlm.models.pooling import FIRST, Pooling
from jaxlm.peft import tuning
from jaxlm.runs import attention, best, finetuned, resume, steps, thresholds, writing
from jaxlm.runs import base as bases
from jaxlm.runs.base import Base
from jaxlm.runs.finite import require_finite
from jaxlm.runs.folder import CHECKPOINTS, SOURCE_TOKENIZER, begun, read_json
from jaxlm.runs.train import Job, train
from jaxlm.runs.writing import Samples
from jaxlm.runtime import distributed
from jaxlm.runtime.console import make_console
from jaxlm.runtime.storage import StoragePath
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.tasks.task import Labels, Responsive, Scored, Thresholded
from jaxlm.train import restore
from jaxlm.train.state import TrainState
from jaxlm.typing import HostBatch


def finetune(config: FinetuneConfig, *, console: Console | None = None) -> StoragePath:
    """Train, and leave a self-contained run folder; returns it.

    Where the folder holds an unfinished run, it resumes.
    """
    console = console or make_console(quiet=jax.process_index() > 0)
    resume.check_processes(config, config.directory / CHECKPOINTS)
    with distributed.first("data"):  # the others find what had to be downloaded and prepared
        splits = read_splits(config.data, reading(config.task), config.task.check)
    before = begun(config)
    config = finetuned.settled(config, splits, before)
    base = None if config.base is None else bases.load(config.base)
    config = replace(config, base=base and bases.lasting(base.name))
    tokenizer = base.tokenizer if base else make_tokenizer(config, splits)
    source_tokenizer = make_source_tokenizer(config, splits)
    own = before and before.model
    config = resolve(config, base, tokenizer, jax.default_backend(), source_tokenizer, own)
    task = config.task
    console.print(_pooled(task, base), soft_wrap=True, end="")
    labels = task.labels(splits.train)
    if before:  # whose tags may lack those that no example has
        kept = tuple(read_json(config.directory / finetuned.LABELS))
        labels = kept if set(task.classes(splits.train)) <= set(kept) < set(labels) else labels
    best.check_monitor(config, labels, splits.validation)
    framer = finetuned.make_framer(config, tokenizer, source_tokenizer)
    bad = config.data.on_bad_row
    encode = partial(task.encode, framer, labels=labels)
    used, examples = encode_usable(encode, splits.train, bad)
    splits = splits._replace(train=used)
    encode = partial(task.for_evaluation().encode, framer, labels=labels)
    used, validation = encode_usable(encode, splits.validation, bad)
    splits = splits._replace(validation=used)
    lengths = np.concatenate([examples.lengths, validation.lengths])
    longest = config.model and config.model.max_length
    pieces = steps.pieces(config.train.num_micro_batches, sharding.make_mesh(config.mesh))
    options: Any = {
        "max_length": framer.max_length,
        "lengths": lengths,
        "longest": longest,
        "pieces": pieces,
    }
    batching = make_batching(
        examples, config.data, seed=config.train.seed, for_training=True, **options
    )
    eval_batching = make_batching(validation, config.data, **options)
    config = replace(config, train=config.train.with_epochs(batching.steps))
    parts = (
        ("training", examples, splits.train, splits.duplicates),
        ("validation", validation, splits.validation, 0),
    )
    described = {
        f"{name} {side}".rstrip(): describe(
            own, task.classes(found), duplicates=duplicates, number=len(found)
        )
        for name, encoded, found, duplicates in parts
        for side, own in encoded.sides.items()
    }
    console.print(render(described))
    said = [*examples.notes, *windows.describe(*examples.windowed)]
    about = [*validation.notes, *windows.describe(*validation.windowed)]
    said += [f"validation: {note}" for note in about]
    said += batching.describe()
    if isinstance(batching, Even) and config.may_pack:
        given = {name: options[name] for name in ("longest", "pieces")}
        size = config.data.batch_size
        said += would_save(examples, batching.buckets, batch_size=size, **given)
    for note in (*splits.notes, *said):
        console.print(Text(f"note: {note}"))
    reference = task.reference(splits.train, splits.validation)
    if reference.deviation is not None:
        console.print(
            f"numbers have a deviation of {reference.deviation:,.6g}: the loss is in its squares, "
            "answers and other metrics are in the unit of the data"
        )
    for side, own in examples.sides.items():
        is_own = side == "sources" and config.source_tokenizer is not None
        chosen = (config.source_tokenizer if is_own else config.tokenizer) or TokenizerConfig()
        reader = framer.source if is_own else framer
        report(
            console,
            reader.tokenizer,
            tally(own, (_text(one, side) for one in splits.train), reader.special.unk),
            None if base else chosen,
            longer=longer(own, longest, config.data.max_length),
            texts=side,
            option="--source-tokenizer" if is_own else "--tokenizer",
        )
    row_length = max(batching.longest, eval_batching.longest)
    config, attends = attention.settle(config, row_length, jax.devices())
    if attends:
        console.print(Text(attends), soft_wrap=True)
    begun_with = restore.trained(config.directory / CHECKPOINTS)
    init = finetuned.make_init(config, labels, begun_with)
    placement = finetuned.make_placement(config, labels, init)
    shapes = placement.abstract_state
    moments = round(tree.num_params(shapes.opt_state) / max(tree.num_params(shapes.trainable), 1))
    console.print(tuning.table(shapes.trainable, shapes.frozen, moments))

    def batches(examples_seen: int) -> Iterator[HostBatch]:
        augment = config.data.augment
        special = SpecialTokens.of(tokenizer)
        return batching.train_batches(
            examples_seen,
            augment=augment and make_augment(augment, special, config.train.seed),
            batch_rows=placement.batch_rows,
        )

    monitor = best.monitor(config)
    samples = _samples(config, labels, tokenizer, framer, splits.validation, console.width)

    def evaluation(state: TrainState) -> dict[str, float]:
        sums, outputs = finetuned.predict(placement, state, eval_batching)
        assert sums is not None  # the validation data are labelled
        written = samples(state)
        if isinstance(task, Scored) and task.num_scored != 0:
            outputs = {**outputs, "written": written.written}
        if int(state.step) == 0:  # nothing has been learned that could have diverged
            require_finite(outputs, state.variables)
        metrics = {"loss": sums.means()["loss"]}
        metrics |= task.metrics(splits.validation, labels, outputs)
        best.check_measured(monitor.name, metrics)
        for line in written.lines:
            console.print(Text(line), soft_wrap=True)
        return metrics

    cursor = resume.make_cursor(
        config,
        data=[splits.fingerprint],
        tokenizer_sha256=tokenizers.fingerprint(tokenizer),
        source_tokenizer_sha256=source_tokenizer and tokenizers.fingerprint(source_tokenizer),
        base_sha256=base and base.fingerprint,
        monitor=monitor.name,
    )
    files = {finetuned.LABELS: json.dumps(labels)}
    if source_tokenizer is not None:
        files[SOURCE_TOKENIZER] = tokenizers.text(source_tokenizer)
    job = Job(
        config=config,
        tokenizer=tokenizer,
        placement=placement,
        init=partial(finetuned.make_state, config, labels, base, placement),
        cursor=cursor | {"labels": list(labels)},
        batches=batches,
        examples_after=batching.after,
        next_begin=batching.next_begin,
        evaluate=evaluation,
        monitor=monitor,
        reference=reference,
        files=files,
    )
    directory = train(job, console)
    chosen = restore.best_step(directory / CHECKPOINTS, monitor)
    console.print(f"the best checkpoint by {monitor.name} is that of step {chosen}")
    known = {} if chosen is None else restore.measured(directory / CHECKPOINTS, chosen)
    if config.train.average is not None:
        line, known = _of_mean(directory, splits.validation, base)
        console.print(Text(line), soft_wrap=True)
    if isinstance(task, Thresholded) and task.chooses_thresholds:
        for line in _choose_thresholds(directory, splits.validation, base):
            console.print(Text(line))
    if config.baseline and not console.quiet:
        found = task.baselines(splits.train, splits.validation, labels)
        if found:
            console.print(_compared({"this run": known} | found, monitor.name, task.monitor))
        if task.verb == "classify" and len(found) < 2:
            console.print("TF-IDF is left out: on so many texts it takes more than seconds")
    return directory


def resolve(
    config: FinetuneConfig,
    base: Base | None,
    tokenizer: Tokenizer,
    platform: str,
    source_tokenizer: Tokenizer | None = None,
    own: ModelConfig | None = None,
) -> FinetuneConfig:
    """Fill in what the config leaves to the base, the data and the platform.

    ``own``: the model of the run so far, whose rows of the vocabulary stay, on any mesh.
    """
    if base is not None:
        model: Any = steps.base_model(base.config, config.mesh, own)
    else:
        assert config.model is not None
        size = tokenizers.vocab_size(tokenizer)
        source_size = source_tokenizer and tokenizers.vocab_size(source_tokenizer)
        model = steps.with_vocabulary(config.model, size, config.mesh, source_size, own)
    task = _with_prompt(_with_pooling(config.task, base, model, tokenizer), base)
    if isinstance(task, Classification) and task.head_bias is None:
        task = replace(task, head_bias=not model.is_causal)
    resolved = finetuned.with_encoder(replace(config, task=task), model, platform)
    if base is not None and config.model not in (None, resolved.model):  # it is in a run's config
        raise InputError(f"model is given, and also base={base.name!r}, which has its own")
    return resolved


def _with_pooling(task: Any, base: Base | None, model: ModelConfig, tokenizer: Tokenizer) -> Any:
    given, cls_last = vars(task).get("pooling"), own_frame(tokenizer).ends_with_cls
    if model.is_causal and given in FIRST:
        raise InputError(
            f"task.pooling={given} takes the first token, which in {type(model).__name__} has seen "
            "no other: use last, mean or max"
        )
    if cls_last and given in FIRST:
        raise InputError(
            f"task.pooling={given} takes the first token, and this tokenizer puts its classifying "
            "token last: use last, mean or max"
        )
    says = base and base.sentence_encoder
    # A head reads whole vectors: the cut is one of those that are answers.
    lost = says and (says.beyond_pooling or (isinstance(task, Embedding) and says.cut))
    if lost and task.with_pooling(None) != task:
        assert base is not None
        raise InputError(
            f"{base.name} makes one vector of a text with {lost}, which is not supported: choose "
            "how, such as --task.pooling mean"
        )
    default: Pooling | None = "last" if model.is_causal or cls_last else None
    if has_transform(model) and not isinstance(task, Embedding):
        default = default or model.pooling
    return task.with_pooling((says and says.pooling) or default)


def _with_prompt(task: Any, base: Base | None) -> Any:
    """With the one that the base's folder says, for a task that has one and leaves it open."""
    says = base and base.sentence_encoder
    if not says or not says.default_prompt or vars(task).get("prompt", "") is not None:
        return task
    return replace(task, prompt=says.default_prompt)


def _pooled(task: Any, base: Base | None) -> str:
    """A line, for tasks that make one vector of a text."""
    if "pooling" not in vars(task):
        return ""
    says = base and base.sentence_encoder and base.sentence_encoder.pooling
    source = "" if base is None or says is None else f" (the folder of {base.name} says {says})"
    given = {name: vars(task).get(name) for name in ("prompt", "pair_prompt")}
    prompts = "".join(f"; {name}: {text!r}" for name, text in given.items() if text)
    return f"pooling: {task.pooling}{source}{prompts}\n"


def make_tokenizer(config: FinetuneConfig, splits: Splits) -> Tokenizer:
    """Loaded, or trained on the training texts; on targets alone where sources have another."""
    wanted, of_targets = config.tokenizer or TokenizerConfig(), config.source_tokenizer is not None
    texts = (one.target if of_targets else one.content for one in splits.train)
    return _tokenizer(wanted, texts)


def make_source_tokenizer(config: FinetuneConfig, splits: Splits) -> Tokenizer | None:
    """That of sources, where they have one of their own: loaded, or trained on them."""
    wanted = config.source_tokenizer
    return wanted and _tokenizer(wanted, (one.source for one in splits.train))


def _tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    if config.path is not None:
        return tokenizers.load(config.path)
    return config.train(list(islice(texts, config.num_documents)))


def _samples(
    config: FinetuneConfig,
    labels: Labels,
    tokenizer: Tokenizer,
    framer: Framer,
    examples: Sequence[Any],
    width: int,
) -> Callable[[TrainState], Samples]:
    """What a state writes, where models of the task do."""
    if not isinstance(config.task, Responsive):
        return lambda _: Samples(written=[], lines=[])
    model = finetuned.make_model(config, labels)
    make = writing.make_responder(config, model, framer, tokenizer)
    return writing.make_samples(config, make, examples, width)


def _text(example: Any, side: str) -> str:
    """An example's text, or one of the two of a pair."""
    match side:
        case "sources":
            return example.source
        case "targets":
            return example.target
    return example.content


def _compared(found: Mapping[str, Mapping[str, float]], *names: str) -> str:
    """One line: a metric by a run and by baselines; the first that those have, and errors."""
    (*_, baseline) = found.values()
    name = next((name for name in names if name in baseline), next(iter(baseline)))
    parts = []
    for title, metrics in found.items():
        values = [f"{metrics[x]:.4g}" for x in dict.fromkeys((name, "rmse")) if x in metrics]
        parts += [f"{title} {' / '.join(values)}"] if values else []
    shown = f"{name} / rmse" if "rmse" in baseline and name != "rmse" else name
    return f"validation {shown}: {', '.join(parts).replace('nan', 'undefined')}"


def _of_mean(
    directory: StoragePath, examples: Sequence[Any], base: Base | None
) -> tuple[str, dict[str, float]]:
    """A line on the mean of a run's last checkpoints, and its metrics."""
    loaded = finetuned.open_finetuned(directory, base=base)
    sums, outputs = loaded.outputs(examples)
    assert sums is not None  # the examples are labelled
    task = loaded.task
    if isinstance(task, Scored) and task.num_scored != 0 and jax.process_count() == 1:
        greedy = GenerateConfig(max_new_tokens=task.sample_tokens)
        written = loaded.responder.respond(examples[: task.num_scored], greedy)
        outputs = {**outputs, "written": list(written)}
    metrics = {"loss": sums.means()["loss"]}
    metrics |= task.metrics(examples, loaded.labels, outputs)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    steps = ", ".join(map(str, loaded.averaged))
    line = f"the mean of the checkpoints of steps {steps}, which is used from now on: {shown}"
    return line, metrics


def _choose_thresholds(
    directory: StoragePath, examples: Sequence[Any], base: Base | None
) -> Iterator[str]:
    """Write a run's thresholds, the best of its best checkpoint on these examples; says them."""
    loaded = finetuned.open_finetuned(directory, base=base, choosing=True)
    assert isinstance(loaded.task, Thresholded)
    _, outputs = loaded.outputs(examples)
    before = loaded.task.metrics(examples, loaded.labels, outputs)
    chosen = loaded.task.chosen_thresholds(examples, loaded.labels, outputs)
    if jax.process_index() == 0:
        thresholds.write(directory, loaded.averaged, chosen)
    task = loaded.task.with_thresholds(chosen)
    after = task.metrics(examples, loaded.labels, outputs)
    values = ", ".join(f"{label} {value:.3f}" for label, value in list(chosen.items())[:20])
    yield f"thresholds chosen on the validation data ({thresholds.THRESHOLDS}): {values}"
    yield (
        ", ".join(
            f"{name} {after[name]:.4f} with them, {before[name]:.4f} with 0.5"
            for name in ("micro_f1", "macro_f1")
        )
        + ", on the data that they were chosen by"
    )
