"""What a task is to the one driver: of pretraining, on rows of tokens, or of labelled examples."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.data.prepared import PreparedInfo
from jaxlm.decode.beam import Writing
from jaxlm.decode.generate import Generate
from jaxlm.errors import InputError
from jaxlm.evaluate.baselines import Baselines
from jaxlm.evaluate.report import Prediction
from jaxlm.models.model import ModelConfig, has_transform, is_two_sided
from jaxlm.models.pooling import Pooling
from jaxlm.objectives.masking import Vocabulary
from jaxlm.objectives.supervised import Predict
from jaxlm.train.plots import Reference
from jaxlm.typing import Apply, Loss, Variables

# Of all rows of a data set, in its order: arrays, or lists of them where lengths differ. A row is
# an example, unless the task's rows say whose they are.
Outputs = Mapping[str, Any]
Labels = tuple[str, ...]
AbstractBatch = dict[str, jax.ShapeDtypeStruct]


class Given(NamedTuple):
    """A text that a pretrained model is asked about."""

    number: int
    """Among all texts, from 0."""
    origin: str
    """Where it is from, as messages name it."""
    text: str


@runtime_checkable
class PretrainTask(Protocol):
    """A pretraining objective, its model and its use: a frozen dataclass with these methods.

    Its batches are rows of tokens: ``tokens`` [batch, length], ``lengths`` [batch], ``index``
    [batch]; whatever is hidden, permuted or cut out is made inside the step.
    """

    @property
    def verb(self) -> str:
        """What scripts/predict.py calls its use."""
        ...

    @property
    def usage(self) -> str:
        """What follows the verb there."""
        ...

    def for_evaluation(self) -> "PretrainTask":
        """The same as it is evaluated."""
        ...

    def num_predicted(self, length: int) -> int:
        """Positions of a row of ``length`` tokens that reach the head in training."""
        ...

    def warning(self, tokens: Integer[np.ndarray, "rows length"], vocabulary: Vocabulary) -> str:
        """Why rows such as these are not what it is meant for, and a way out; empty: they are.

        Raises where it cannot be learned from them.
        """
        ...

    def make_model(self, config: ModelConfig) -> nn.Module:
        """The encoder and its head, as parameters ``encoder`` and ``head``.

        Raises where the architecture sees what is to be predicted, or does not see enough.
        """
        ...

    def metrics(self, loss: float, infos: Sequence[PreparedInfo], split: str) -> dict[str, float]:
        """What the mean loss on a split says of the text that it was made of.

        ``perplexity`` where it is the cross-entropy of a token, and so comparable with their
        entropy; may be empty.
        """
        ...

    def make_loss(self, apply: Apply, vocabulary: Vocabulary) -> Loss:
        """What is minimised in training."""
        ...

    def answers(
        self,
        config: ModelConfig,
        variables: Variables,
        tokenizer: Tokenizer,
        texts: Sequence[Given],
        *,
        top_k: int,
        generate: Writing,
    ) -> Iterator[dict[str, Any]]:
        """What the pretrained model says of each of ``texts``.

        That is only an ``error`` for one of which it can say nothing. ``top_k`` is for tasks that
        name candidates, ``generate`` for those that write.
        """
        ...

    def lines(self, answer: dict[str, Any]) -> Iterator[str]:
        """An answer as a person reads it."""
        ...


@runtime_checkable
class Generative(Protocol):
    """What a task has as well whose models write."""

    def make_generate(
        self, config: ModelConfig, variables: Variables, tokenizer: Tokenizer
    ) -> Generate:
        """What continues texts."""
        ...


@runtime_checkable
class Laborious(Protocol):
    """What a pretraining task has as well that computes other than its model's forward pass."""

    def more_flops(self, config: ModelConfig, length: int) -> float:
        """Operations for a row of ``length`` tokens, beside the config's ``forward_flops``.

        Below 0 where there are fewer.
        """
        ...


@runtime_checkable
class Task(Protocol):
    """A task on labelled examples: a frozen dataclass with these methods.

    Examples are of the task's own kind; they have a ``stratum``, a ``content`` and an ``origin``.
    """

    @property
    def verb(self) -> str:
        """The subcommand of scripts/predict.py."""
        ...

    @property
    def usage(self) -> str:
        """What follows the verb there."""
        ...

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The fields of a record that hold what a user gives: one or two texts."""
        ...

    @property
    def monitor(self) -> str:
        """The metric that says which checkpoint is best."""
        ...

    def for_evaluation(self) -> "Task":
        """The task without what only regularises training."""
        ...

    def with_pooling(self, pooling: Pooling | None) -> "Task":
        """With the pooling that the base's folder says, or a default, where its own is None.

        A task that pools nothing stays as it is.
        """
        ...

    def read(self, records: Iterable[Record], *, labelled: bool = True) -> list[Any]:
        """The examples; with ``labelled=False`` no label is looked for."""
        ...

    def check(self, examples: Sequence[Any]) -> list[str]:
        """Raise where all training examples together show a mistake; lines on what is odd."""
        ...

    def settled(self, examples: Sequence[Any], before: "Task | None" = None) -> "Task":
        """The task with what it left to the training examples, as the run folder keeps it.

        ``before`` is the task of a run that is there already: its head was trained to what that
        settled.
        """
        ...

    def labels(self, examples: Sequence[Any]) -> Labels:
        """The labels of the training examples, that the head distinguishes; empty for numbers."""
        ...

    def classes(self, examples: Sequence[Any]) -> list[str]:
        """All labels of all examples, to be counted."""
        ...

    def encode(self, framer: Framer, examples: Sequence[Any], labels: Labels) -> Examples:
        """Rows of arrays, in the order of the examples; with labels where those have them."""
        ...

    def abstract_batch(self, rows: int, length: int, num_labels: int) -> AbstractBatch:
        """Shapes of what :meth:`encode` and the batches make of labelled examples."""
        ...

    def make_model(self, config: ModelConfig, labels: Labels, dropout_rate: float) -> nn.Module:
        """The encoder with what is on top of it.

        Parameters are ``encoder``, ``head``, which is new in each run, and ``lm_head``, which is
        the base's. Raises where the architecture cannot do the task.
        """
        ...

    def make_loss(self, apply: Apply) -> Loss:
        """What is minimised in training."""
        ...

    def make_predict(self, apply: Apply) -> Predict:
        """The outputs for a batch."""
        ...

    def metric_names(self, examples: Sequence[Any], labels: Labels) -> tuple[str, ...]:
        """What :meth:`metrics` always measures on these examples, whatever the outputs."""
        ...

    def metrics(
        self, examples: Sequence[Any], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """The task's metrics over a whole data set."""
        ...

    def reference(self, train: Sequence[Any], validation: Sequence[Any]) -> Reference:
        """What the validation loss is compared with."""
        ...

    def baselines(
        self, train: Sequence[Any], validation: Sequence[Any], labels: Labels
    ) -> Baselines:
        """Metrics of what needs no network, such as the most frequent class; may be empty."""
        ...

    def predictions(
        self, examples: Sequence[Any], labels: Labels, outputs: Outputs
    ) -> list[Prediction]:
        """Each example with its loss, for a list of the most wrong ones; may be empty."""
        ...

    def plots(
        self, examples: Sequence[Any], labels: Labels, outputs: Outputs, folder: Path
    ) -> dict[str, str]:
        """Files on the outputs, written into ``folder``: their names, and what each shows."""
        ...

    def answers(
        self, examples: Sequence[Any], labels: Labels, outputs: Outputs
    ) -> list[dict[str, Any]]:
        """What a user is told about each example, in JSON."""
        ...


@runtime_checkable
class Responsive(Generative, Protocol):
    """What a task on labelled examples has as well whose models respond in words.

    ``outputs["written"]`` of its :meth:`Task.answers` is what they wrote for each example.
    """

    @property
    def num_samples(self) -> int:
        """Validation examples whose responses are shown at each evaluation."""
        ...

    @property
    def sample_tokens(self) -> int:
        """The most tokens of such a response."""
        ...

    def prompt_ids(self, framer: Framer, example: Any, *, room: int | None = None) -> list[int]:
        """The tokens that an example's response is a response to, or so many as have ``room``."""
        ...


@runtime_checkable
class Scored(Responsive, Protocol):
    """What a task has as well whose models' responses are compared with what was wanted.

    :meth:`Task.metrics` are of ``outputs["written"]``, too, which is of the first examples.
    """

    @property
    def num_scored(self) -> int | None:
        """Validation examples that are responded to at each evaluation; None: all."""
        ...

    def signatures(self) -> dict[str, str]:
        """How metrics are computed that are computed in several ways, by their names."""
        ...


@runtime_checkable
class Thresholded(Protocol):
    """What a task has as well whose answers depend on thresholds, one for each label."""

    @property
    def chooses_thresholds(self) -> bool:
        """Whether they are left to the validation data."""
        ...

    def chosen_thresholds(
        self, examples: Sequence[Any], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """The best on these examples, by label."""
        ...

    def with_thresholds(self, chosen: Mapping[str, float]) -> "Task":
        """The task with these."""
        ...


@runtime_checkable
class Varied(Protocol):
    """What a task has as well whose examples differ in their shapes, even of texts as long."""

    def kind(self, example: Any) -> Hashable:
        """What is the same of all examples of a batch."""
        ...


def require_one_text(config: ModelConfig, task: str, instead: str = "Seq2Seq") -> None:
    """Raises for a model that reads one text and writes another: the task has no other."""
    if is_two_sided(config):
        raise InputError(
            f"task={task} reads one text, and a model of {type(config).__name__} reads a source "
            f"and writes a target: use task={instead}, or an encoder such as a BERT"
        )


def head_options(config: ModelConfig) -> dict[str, Any]:
    """How heads of tasks on a model begin, for one that says so."""
    if not has_transform(config):
        return {}
    return {"transform": config.make_transform(), "initializer_std": config.hidden_dim**-0.5}


def class_entropy(classes: Sequence[str], num_examples: int) -> Reference:
    """The least loss of always answering the same, where every example has one class."""
    if len(classes) != num_examples:
        return Reference()
    shares = [count / num_examples for count in Counter(classes).values()]
    return Reference({"class entropy": -sum(share * math.log(share) for share in shares)})


def shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    """An array that is not there."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def rows_of_tokens(rows: int, length: int) -> AbstractBatch:
    """What every batch of labelled examples holds but its labels, with a weight for each row."""
    one, along = shape(jnp.int32, rows), shape(jnp.int32, rows, length)
    batch = {"tokens": along, "token_type_ids": along, "lengths": one, "index": one}
    return batch | {"weights": shape(jnp.float32, rows)}
