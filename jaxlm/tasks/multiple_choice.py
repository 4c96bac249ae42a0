"""Multiple choice: which of a few texts goes best with a context."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxlm.data.labelled import multiple_choice as data
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.multiple_choice import Choice, ChoiceFields
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError
from jaxlm.evaluate import baselines, metrics
from jaxlm.evaluate.baselines import Baselines
from jaxlm.evaluate.report import Prediction, surprise
from jaxlm.models.heads import ClassificationHead, WithHead
from jaxlm.models.model import ModelConfig
from jaxlm.models.pooling import POOLS, Pooling
from jaxlm.objectives import classification
from jaxlm.objectives.supervised import Predict
from jaxlm.tasks.task import (
    AbstractBatch,
    Labels,
    Outputs,
    Task,
    class_entropy,
    head_options,
    require_one_text,
    rows_of_tokens,
    shape,
)
from jaxlm.train.plots import Reference
from jaxlm.typing import Apply, Loss


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """Endings of stories, answers of exams (Devlin et al. 2018, section 4.4)."""

    fields: ChoiceFields = field(default_factory=ChoiceFields)
    """Which fields hold the context, the choices, and which of them is right."""
    label_smoothing: float = 0.0
    """Probability that is spread over all choices in training."""
    pooling: Pooling | None = None
    """One vector of a row's hidden states: BERT's dense layer on the first, the first alone (cls),
    the last, their mean, or their maximum; those of DistilBERT and ELECTRA are dense layers on the
    first, XLNet's on the last. None: as a sentence encoder's folder says, else bert, or last of a
    model in which no position sees a later one."""

    def __post_init__(self) -> None:
        if self.fields.label is None:
            raise InputError("task.fields.label is None: name the field of the right choice")

    @property
    def verb(self) -> str:
        return "choose"

    @property
    def usage(self) -> str:
        """JSON objects: a context has several choices."""
        return "--file FILE.jsonl"

    @property
    def text_fields(self) -> tuple[str, ...]:
        fields = self.fields
        question = () if fields.question is None else (fields.question,)
        return fields.context, *question, *fields.choices

    @property
    def monitor(self) -> str:
        """The share of right choices."""
        return "accuracy"

    def for_evaluation(self) -> "MultipleChoice":
        """Without label smoothing."""
        return replace(self, label_smoothing=0.0)

    def with_pooling(self, pooling: Pooling | None) -> "MultipleChoice":
        return replace(self, pooling=self.pooling or pooling or "bert")

    def read(self, records: Iterable[Record], *, labelled: bool = True) -> list[Choice]:
        label = self.fields.label if labelled else None
        return data.read(records, replace(self.fields, label=label))

    def kind(self, example: Choice) -> int:
        """The number of choices, which in training is the same for all examples."""
        return len(example.choices)

    def check(self, examples: Sequence[Choice]) -> list[str]:
        return []

    def settled(self, examples: Sequence[Choice], before: Task | None = None) -> "MultipleChoice":
        return self

    def labels(self, examples: Sequence[Choice]) -> Labels:
        """None: the head gives every choice one number, however many there are."""
        return ()

    def classes(self, examples: Sequence[Choice]) -> list[str]:
        """The positions of right choices, which ought to be equally frequent."""
        return [str(example.label) for example in examples if example.label is not None]

    def encode(self, framer: Framer, examples: Sequence[Choice], labels: Labels) -> Examples:
        """Rows of as many token rows as there are choices."""
        return data.encode(framer, examples)

    def abstract_batch(self, rows: int, length: int, num_labels: int) -> AbstractBatch:
        """Four choices an example, as most data sets have."""
        tokens = shape(jnp.int32, rows, 4, length)
        lengths = shape(jnp.int32, rows, 4)
        more = {"tokens": tokens, "token_type_ids": tokens, "lengths": lengths}
        return rows_of_tokens(rows, length) | more | {"labels": shape(jnp.int32, rows)}

    def make_model(self, config: ModelConfig, labels: Labels, dropout_rate: float) -> nn.Module:
        """One number for a choice."""
        require_one_text(config, "MultipleChoice")
        pool = POOLS[self.pooling or "bert"]
        head = ClassificationHead(1, dropout_rate, pool, **head_options(config))
        return WithHead(config.make(), head)

    def make_loss(self, apply: Apply) -> Loss:
        """Cross-entropy over the choices."""
        chosen = classification.choices(apply)
        return classification.make_loss(chosen, label_smoothing=self.label_smoothing)

    def make_predict(self, apply: Apply) -> Predict:
        """``probabilities`` of the choices."""
        return classification.make_predict(classification.choices(apply))

    def metric_names(self, examples: Sequence[Choice], labels: Labels) -> tuple[str, ...]:
        """One."""
        return ("accuracy",)

    def metrics(
        self, examples: Sequence[Choice], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """How often the right one is chosen."""
        gold = np.array([example.label for example in examples], np.int32)
        return metrics.choice(gold, outputs["logits"])

    def reference(self, train: Sequence[Choice], validation: Sequence[Choice]) -> Reference:
        return class_entropy(self.classes(validation), len(validation))

    def baselines(
        self, train: Sequence[Choice], validation: Sequence[Choice], labels: Labels
    ) -> Baselines:
        """The place where the right choice is most often."""
        best = baselines.most_frequent(np.array([example.label for example in train]))
        count = max(best + 1, *(len(example.choices) for example in validation))
        always = {"logits": np.eye(count)[[best] * len(validation)]}
        return {f"always choice {best}": self.metrics(validation, labels, always)}

    def predictions(
        self, examples: Sequence[Choice], labels: Labels, outputs: Outputs
    ) -> list[Prediction]:
        """Each example, with the texts of its right and its chosen choice."""
        found = []
        for example, row in zip(examples, outputs["probabilities"], strict=True):
            assert example.label is not None
            best = int(row.argmax())
            found.append(
                Prediction(
                    loss=surprise(float(row[example.label])),
                    gold=example.choices[example.label],
                    predicted=example.choices[best],
                    probability=float(row[best]),
                    text=" ".join(filter(None, (example.context, example.question))),
                    origin=example.origin,
                    right=best == example.label,
                )
            )
        return found

    def plots(
        self, examples: Sequence[Choice], labels: Labels, outputs: Outputs, folder: Path
    ) -> dict[str, str]:
        """None."""
        return {}

    def answers(
        self, examples: Sequence[Choice], labels: Labels, outputs: Outputs
    ) -> list[dict[str, Any]]:
        """The context, the chosen text, its number from 0, and the probability of each choice."""
        answers = []
        for example, row in zip(examples, outputs["probabilities"].tolist(), strict=True):
            best = row.index(max(row))
            answers.append(
                {
                    "context": example.context,
                    "choice": example.choices[best],
                    "number": best,
                    "probability": row[best],
                    "probabilities": row,
                }
            )
        return answers
