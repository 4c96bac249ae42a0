"""A class, any number of labels, or a number for a text or a pair of texts."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxlm.data.labelled import classification as data
from jaxlm.data.labelled.classification import TextExample, TextFields
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError
from jaxlm.evaluate import calibration, metrics, plots, report
from jaxlm.evaluate.report import Prediction
from jaxlm.models.heads import ClassificationHead, bert_pooler, mean_pool
from jaxlm.objectives import classification, multi_label, rdrop, regression
from jaxlm.objectives.supervised import Predict
from jaxlm.tasks.task import AbstractBatch, Labels, Outputs, rows_of_tokens, shape
from jaxlm.typing import Apply, Loss

OBJECTIVES = {"class": classification, "labels": multi_label, "number": regression}
POOLS = {"bert": bert_pooler, "mean": mean_pool}


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Sentiment, topics, entailment, similarity: what ``fields.target`` says."""

    fields: TextFields = field(default_factory=TextFields)
    """Which columns hold the texts and the label, and what a label is."""
    label_smoothing: float = 0.0
    """Probability that is spread over all classes in training."""
    r_drop: float = 0.0
    """Weight of the divergence of two draws of dropout; 0 = one draw."""
    pooling: Literal["bert", "mean"] = "bert"
    """One vector of a row's hidden states: a dense layer on the first, or their mean."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing={self.label_smoothing} is not in [0, 1); 0 is off")
        if self.r_drop < 0:
            raise InputError(f"r_drop={self.r_drop} is below 0; 0 is off")
        if self.fields.target != "class" and (self.label_smoothing or self.r_drop):
            raise InputError(
                f"label_smoothing={self.label_smoothing} and r_drop={self.r_drop} are for classes, "
                f"not for fields.target={self.fields.target}: set both to 0"
            )

    @property
    def verb(self) -> str:
        return "classify"

    @property
    def usage(self) -> str:
        """A text, or two."""
        return "TEXT" if self.fields.pair is None else "TEXT --pair TEXT"

    @property
    def text_fields(self) -> tuple[str, ...]:
        fields = self.fields
        return (fields.text,) if fields.pair is None else (fields.text, fields.pair)

    @property
    def monitor(self) -> str:
        return {"class": "accuracy", "labels": "micro_f1", "number": "spearman"}[self.fields.target]

    @property
    def _objective(self) -> ModuleType:
        return OBJECTIVES[self.fields.target]

    def for_evaluation(self) -> "Classification":
        """Without label smoothing and R-Drop."""
        return dataclasses.replace(self, label_smoothing=0.0, r_drop=0.0)

    def read(self, records: Iterable[Record], *, labelled: bool = True) -> list[TextExample]:
        label = self.fields.label if labelled else None
        return data.read(records, dataclasses.replace(self.fields, label=label))

    def settled(self, examples: Sequence[TextExample]) -> "Classification":
        return self

    def labels(self, examples: Sequence[TextExample]) -> Labels:
        """The classes or labels; none for numbers."""
        return data.label_names(examples)

    def classes(self, examples: Sequence[TextExample]) -> list[str]:
        return [name for example in examples for name in example.classes]

    def encode(self, framer: Framer, examples: Sequence[TextExample], labels: Labels) -> Examples:
        """Rows of tokens."""
        known = examples[0].label is not None
        return data.encode(framer, examples, data.label_array(examples, labels) if known else None)

    def abstract_batch(self, rows: int, length: int, num_labels: int) -> AbstractBatch:
        """Labels are classes, columns of ones and zeros, or numbers."""
        labels = {
            "class": shape(jnp.int32, rows),
            "labels": shape(jnp.float32, rows, num_labels),
            "number": shape(jnp.float32, rows),
        }
        return rows_of_tokens(rows, length) | {"labels": labels[self.fields.target]}

    def make_head(self, labels: Labels, dropout_rate: float) -> nn.Module:
        """One output for each label, or for the number."""
        return ClassificationHead(max(len(labels), 1), dropout_rate, POOLS[self.pooling])

    def make_loss(self, apply: Apply) -> Loss:
        """Cross-entropy, or the squared error of numbers."""
        if self.fields.target != "class":
            return self._objective.make_loss(apply)
        score = partial(classification.score, label_smoothing=self.label_smoothing)
        if self.r_drop:
            return rdrop.make_loss(apply, score, alpha=self.r_drop)
        return classification.make_loss(apply, label_smoothing=self.label_smoothing)

    def make_predict(self, apply: Apply) -> Predict:
        """``probabilities``, or ``values`` for numbers."""
        return self._objective.make_predict(apply)

    def metric_names(self, examples: Sequence[TextExample], labels: Labels) -> tuple[str, ...]:
        """By the kind of label."""
        return metrics.classification_names(self.fields.target, len(labels))

    def metrics(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """Metrics for classes, for sets of labels, or for numbers."""
        gold: Any = data.label_array(examples, labels)
        match self.fields.target:
            case "class":
                return metrics.classification(gold, outputs["probabilities"], len(labels))
            case "labels":
                return metrics.multilabel(gold, outputs["probabilities"])
            case "number":
                return metrics.regression(gold, outputs["values"])

    def predictions(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs
    ) -> list[Prediction]:
        """Only for classes."""
        if self.fields.target != "class":
            return []
        return report.classified(
            [example.content for example in examples],
            np.asarray(data.label_array(examples, labels)),
            outputs["probabilities"],
            labels,
            [example.origin for example in examples],
        )

    def plots(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs, folder: Path
    ) -> dict[str, str]:
        """Of classes: which are confused, and how far probabilities can be trusted."""
        if self.fields.target != "class":
            return {}
        gold = np.asarray(data.label_array(examples, labels))
        predicted = np.asarray(outputs["probabilities"]).argmax(-1)
        plots.plot_confusion(gold, predicted, labels, folder / "confusion.png")
        reliable = calibration.reliability(gold, outputs["probabilities"])
        plots.plot_reliability(reliable, folder / "reliability.png")
        return {
            "confusion.png": "confusion matrix",
            "reliability.png": "reliability diagram",
        }

    def answers(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs
    ) -> list[dict[str, Any]]:
        """The text, the label or labels or number, and the probability of each label."""
        return [
            _texts(example) | self._answer(labels, outputs, i) for i, example in enumerate(examples)
        ]

    def _answer(self, labels: Labels, outputs: Outputs, i: int) -> dict[str, Any]:
        if self.fields.target == "number":
            return {"value": float(outputs["values"][i])}
        row = outputs["probabilities"][i].tolist()
        probabilities = dict(zip(labels, row, strict=True))
        if self.fields.target == "labels":
            chosen: Any = [name for name, probability in probabilities.items() if probability > 0.5]
            return {"labels": chosen, "probabilities": probabilities}
        best = max(probabilities, key=probabilities.__getitem__)
        return {"label": best, "probability": probabilities[best], "probabilities": probabilities}


def _texts(example: TextExample) -> dict[str, Any]:
    pair = {} if example.pair is None else {"pair": example.pair}
    return {"text": example.text} | pair
