"""A pretrained model put together from its configuration: what training and using it share."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from tokenizers import Tokenizer

from jaxlm import optim
from jaxlm.config import PretrainConfig
from jaxlm.data import tokenizers
from jaxlm.data.labelled.records import Record
from jaxlm.data.loader import eval_batches
from jaxlm.data.prepared import Prepared, PreparedInfo
from jaxlm.data.tabular import is_plain
from jaxlm.data.windows import window_batches
from jaxlm.decode.beam import Writing
from jaxlm.decode.generate import Generate, GenerateConfig
from jaxlm.errors import InputError
from jaxlm.models.model import ModelConfig, example_inputs
from jaxlm.nn.choose import Wanted
from jaxlm.nn.intercept import find_sites
from jaxlm.objectives.masking import Vocabulary
from jaxlm.peft import quantize
from jaxlm.runs import phase, steps
from jaxlm.runs.answers import ERROR, Answer, Answered, answered, as_records, joined
from jaxlm.runs.finite import not_finite
from jaxlm.runs.folder import CHECKPOINTS, check_tokenizer, read_config, read_tokenizer
from jaxlm.runtime.batch_rows import ALL_ROWS, BatchRows
from jaxlm.runtime.storage import StoragePath, locate
from jaxlm.tasks.permutation_lm import PermutationLm
from jaxlm.tasks.task import Generative, Given, Laborious, PretrainTask
from jaxlm.tasks.vocabulary import make_vocabulary
from jaxlm.train import restore, stored
from jaxlm.train.loop import evaluate
from jaxlm.train.placement import Placement
from jaxlm.train.restore import Cursor, Monitor
from jaxlm.train.state import TrainState
from jaxlm.train.step import make_eval_step
from jaxlm.typing import HostBatch, PRNGKey, Variables


def resolve(
    config: PretrainConfig,
    infos: Sequence[PreparedInfo],
    platform: str,
    base: ModelConfig | None = None,
    own: ModelConfig | None = None,
) -> PretrainConfig:
    """Fill in what the config leaves to the base, the data and the platform; raise on a clash.

    ``own``: the model of the run so far, whose rows of the vocabulary stay, on any mesh.
    """
    info = infos[0]  # the others are cut alike
    model: Any = config.model
    if base is not None:
        model = phase.next_model(base, model, info.vocab_size, config.task, config.mesh, own)
    model = steps.with_vocabulary(model, info.vocab_size, config.mesh, own=own)
    model = replace(model, dtype=model.dtype or steps.default_dtype(platform))
    require_length(config, model, info.row_length)
    num_rows = sum(info.rows["train"] for info in infos)
    train = config.train.with_epochs(
        lambda epochs: config.data.steps_to(math.ceil(epochs * num_rows))
    )
    return replace(config, model=model, train=train)


def require_length(config: PretrainConfig, model: ModelConfig, row_length: int) -> None:
    """:class:`InputError` where rows are longer than what the model reads."""
    longest, folder = model.max_length, config.data.paths[0]
    if longest is not None and row_length > longest:
        shorter = f"prepare shorter rows (--prepare.row-length {longest} and another --data.paths)"
        if config.prepare is None:  # one given with it would be of other text than the folder's
            shorter = (
                f"prepare the text of {folder} again, into another folder, with scripts/prepare.py "
                f"--row-length {longest} --tokenizer.path {folder}"
            )
        raise InputError(
            f"the data's rows of {row_length} tokens are longer than the model's max_length="
            f"{longest}: raise it (--model.max-length {row_length}), or {shorter}"
        )


def make_model(config: PretrainConfig) -> nn.Module:
    """The resolved config's encoder with its task's head."""
    assert config.model is not None  # resolved
    return config.task.make_model(config.model)


def make_placement(
    config: PretrainConfig, vocabulary: Vocabulary, devices: Sequence[Any] | None = None
) -> Placement:
    """The run's steps on all devices, or on ``devices``.

    ``init`` takes a key and, from a base, the parameters that are given.
    """
    assert config.model is not None  # resolved
    model, inputs = make_model(config), example_inputs(config.model)
    optimizer = optim.make_optimizer(config.optimizer)

    def init(key: PRNGKey, given: Mapping[str, PyTree] | None = None) -> TrainState:
        drawn = model.init(key, *inputs)["params"]
        params = {**drawn, **(given or {})}  # what is not returned is not computed
        return TrainState.create({"params": params}, {}, optimizer)

    eval_loss = config.task.for_evaluation().make_loss(quantize.adapt(model.apply), vocabulary)
    return steps.make_placement(
        config,
        init,
        config.task.make_loss(model.apply, vocabulary),
        lambda axis_name: make_eval_step(eval_loss, seed=steps.EVAL_SEED, axis_name=axis_name),
        devices=devices,
    )


def flops_per_token(config: PretrainConfig, row_length: int) -> float:
    """Floating-point operations of one training step per token read (forward and backward)."""
    assert config.model is not None  # resolved
    task, model = config.task, config.model
    forward = model.forward_flops(row_length, task.num_predicted(row_length))
    if isinstance(task, Laborious):
        forward += task.more_flops(model, row_length)
    return 3 * forward / row_length


def eval_rows(
    datasets: Sequence[Prepared],
    batch_size: int,
    *,
    split: str = "validation",
    max_rows: int | None = None,
    batch_rows: BatchRows = ALL_ROWS,
    windows: Mapping[str, int] | None = None,
    before: int = 0,
) -> Iterator[HostBatch]:
    """Batches of a split of every data set, from each in proportion to its size.

    ``before``: with so many tokens of the row before each (:mod:`jaxlm.data.loader`).
    ``windows``: not the rows, but windows over them, of a ``length`` and at a ``stride``.
    """
    sizes = [dataset.info.rows.get(split, 0) for dataset in datasets]
    if not sum(sizes):
        datasets[0].source(split)  # says which splits there are
    wanted = min(max_rows or sum(sizes), sum(sizes))
    for dataset, size in zip(datasets, sizes, strict=True):
        if size:
            rows = math.ceil(wanted * size / sum(sizes))
            chosen: Any = {"split": split, "max_rows": rows, "batch_rows": batch_rows}
            if windows is None:
                yield from eval_batches(dataset, batch_size, before=before, **chosen)
            else:
                chosen |= windows
                yield from window_batches(dataset, batch_size, **chosen)


def check_rows(name: StoragePath | str, model: ModelConfig, data: Prepared) -> None:
    """Raise where rows are longer than what a trained model reads."""
    longest, length = model.max_length, data.info.row_length
    if longest is not None and length > longest:
        raise InputError(
            f"{data.directory} has rows of {length} tokens, and {name} reads {longest} at most: "
            f"prepare it again, into another folder, with scripts/prepare.py --row-length "
            f"{longest}"
        )


def tokens_before(task: PretrainTask) -> int:
    """How many tokens of the row before each a task's batches have."""
    return task.memory if isinstance(task, PermutationLm) else 0


def measure(
    placement: Placement,
    state: TrainState,
    batches: Iterable[HostBatch],
    task: PretrainTask,
    infos: Sequence[PreparedInfo],
    split: str,
) -> dict[str, float]:
    """Means over batches of a split, the loss first, and what the task makes of the loss."""
    means = evaluate(placement, state, batches)
    loss = means.pop("loss")
    return {"loss": loss, **task.metrics(loss, infos, split), **means}


def unlearned(
    task: PretrainTask, infos: Sequence[PreparedInfo], split: str = "validation"
) -> dict[str, float]:
    """Losses of what needs no learning, by name; none where the task's is not that of a token.

    The unigram entropy is the mean of the data sets' own, weighted by their tokens of the split
    that losses are of: one without it has no part in these. If none has it, it is of training's.
    """
    known = split if any(split in info.tokens for info in infos) else "train"
    tokens = [info.tokens.get(known, 0) for info in infos]
    pairs = zip(tokens, infos, strict=True)
    entropy = sum(count * info.unigram_entropy for count, info in pairs) / sum(tokens)
    return {"unigram entropy": entropy} if "perplexity" in task.metrics(0.0, infos, "train") else {}


TEXT = "text"  # the field of a record that is read, unless told


@dataclass(frozen=True)
class Pretrained:
    """A pretrained run, read from its folder."""

    config: PretrainConfig
    tokenizer: Tokenizer
    step: int
    variables: Variables
    cursor: Cursor
    placement: Placement
    averaged: tuple[int, ...]
    """The steps that the variables are the mean of; a single one is as it was saved."""
    attends: str = ""
    """How it computes attention and why, in a line; "" where it has no choice."""

    @property
    def task(self) -> PretrainTask:
        """What it learned."""
        return self.config.task

    @property
    def model(self) -> nn.Module:
        """The encoder with its head; ``model.apply(variables, tokens)`` gives logits."""
        return make_model(self.config)

    @property
    def state(self) -> TrainState:
        """What ``placement.eval_step`` takes."""
        return TrainState(jnp.asarray(self.step), self.variables, {}, ())

    def answer(
        self,
        given: Iterable[Any],
        *,
        top_k: int = 5,
        generate: Writing | None = None,
    ) -> list[Answer]:
        """What the model says of each of a list: the fillings of its blanks, or how it goes on.

        Of texts, or of dicts with a ``text``, whose other fields are in the answers, too. What
        cannot be answered has an ``error`` instead; where nothing can, :class:`InputError` is
        raised.
        """
        records = as_records(given, (TEXT,))
        return list(joined(self.stream(records, top_k=top_k, generate=generate), (TEXT,)))

    def stream(
        self,
        records: Iterable[Record],
        *,
        column: str = TEXT,
        top_k: int = 5,
        generate: Writing | None = None,
    ) -> Iterator[Answered]:
        """Each record with what the model says of its text, in JSON."""
        config, numbers = self.config.model, itertools.count()
        assert config is not None  # resolved
        # Whole on each device, of which one answers: no kernel runs on several by itself.
        variables = jax.tree.map(lambda x: x.addressable_data(0), self.variables)

        def read(record: Record) -> Given:
            return Given(next(numbers), record.origin, record.text(column))

        def answer(texts: list[Given]) -> list[Answer]:
            options: dict[str, Any] = {"top_k": top_k, "generate": generate or GenerateConfig()}
            found = self.task.answers(config, variables, self.tokenizer, texts, **options)
            answers = list(found)
            broken = [i for i, one in enumerate(answers) if not is_plain(one)]
            error = str(not_finite(self.variables)) if broken else ""
            for i in broken:
                answers[i] = {ERROR: error}
            return answers

        return answered(records, read, answer)

    def quantized(self) -> "Pretrained":
        """With weights of 8 bits, by which evaluation and generation multiply: a quarter the bytes.

        See :func:`jaxlm.peft.quantize.adapt`.
        """
        assert self.config.model is not None  # resolved
        inputs = example_inputs(self.config.model)
        call = lambda variables: self.model.apply(variables, *inputs)
        params = quantize.quantize(self.variables["params"], find_sites(call, self.variables))
        return replace(self, variables={**self.variables, "params": params})

    def generate(self) -> Generate:
        """What continues texts, as :class:`~jaxlm.decode.generate.Generate` describes it."""
        assert self.config.model is not None  # resolved
        if not isinstance(self.task, Generative):
            raise InputError(
                f"{self.config.name} was trained for {type(self.task).__name__}, which does not "
                f"write: use {self.task.verb}"
            )
        return self.task.make_generate(self.config.model, self.variables, self.tokenizer)


def open_pretrained(
    directory: StoragePath | str,
    step: int | None = None,
    *,
    attention: Wanted | None = None,
    row_length: int | None = None,
    data: PreparedInfo | None = None,
    spread: bool = False,
) -> Pretrained:
    """Read a run folder: its best checkpoint, the mean of its last, or that of ``step``.

    ``attention``: how it is computed, if not as suits the devices and rows of ``row_length``.
    ``data``: what it is evaluated on, whose texts may have an older frame.
    ``spread``: parameters are split over all devices, and not whole on each.
    Raises :class:`InputError` where the folder, a file in it, or the step is missing or damaged.
    """
    directory = locate(directory)
    known = read_config(directory, PretrainConfig)
    config, attends = steps.for_evaluation(known, attention, row_length)
    tokenizer = read_tokenizer(directory)
    own = data is not None and data.tokenizer_sha256 == tokenizers.fingerprint(tokenizer)
    vocabulary = make_vocabulary(tokenizer, data.special if data and own else None)
    placement = make_placement(config, vocabulary)
    checkpoints = directory / CHECKPOINTS
    chosen = steps.chosen(config, checkpoints, Monitor(), step)
    target = {"trainable": placement.abstract_state.trainable}
    target = stored.spread(target) if spread else target
    restored = restore.restore_mean(checkpoints, target, chosen)
    check_tokenizer(directory, restored.cursor, tokenizer)
    return Pretrained(
        config,
        tokenizer,
        restored.step,
        restored.state["trainable"],
        restored.cursor,
        placement,
        tuple(chosen or [restored.step]),
        attends,
    )
