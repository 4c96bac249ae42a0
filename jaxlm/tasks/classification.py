"""A class, any number of labels, or a number for a text or a pair of texts."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64, Int

from jaxlm.data.labelled import checks
from jaxlm.data.labelled import classification as data
from jaxlm.data.labelled.classification import TextExample, TextFields
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError
from jaxlm.evaluate import baselines, calibration, metrics, plots, report
from jaxlm.evaluate.baselines import Baselines
from jaxlm.evaluate.report import Prediction
from jaxlm.evaluate.thresholds import best_thresholds
from jaxlm.models.heads import ClassificationHead, WithHead
from jaxlm.models.model import ModelConfig
from jaxlm.models.pooling import POOLS, Pooling
from jaxlm.objectives import classification, multi_label, rdrop, regression
from jaxlm.objectives.supervised import Predict
from jaxlm.tasks.by_label import by_label, pairs
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

OBJECTIVES = {"class": classification, "labels": multi_label, "number": regression}


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Sentiment, topics, entailment, similarity: what ``fields.target`` says."""

    fields: TextFields = field(default_factory=TextFields)
    """Which columns hold the texts and the label, and what a label is."""
    label_smoothing: float = 0.0
    """Probability that is spread over all classes in training."""
    r_drop: float = 0.0
    """Weight of the divergence of two draws of dropout; 0 = one draw."""
    class_weights: tuple[str, ...] = ()
    """Weights of classes in the training loss, which is then the mean over examples weighted by
    their classes: `balanced`, inverse to each class's share, or pairs such as neg=1 pos=5 (1 for
    others). Empty: all 1. Evaluation weighs all examples alike."""
    thresholds: tuple[str, ...] = ()
    """Above which probability each of several labels counts: pairs such as toxic=0.3 (0.5 for
    others), or `chosen`: those of the best F1 on the validation data, found when training ends,
    and kept in thresholds.json. Empty: 0.5."""
    pooling: Pooling | None = None
    """One vector of a row's hidden states: BERT's dense layer on the first, the first alone (cls),
    the last, their mean, or their maximum; those of DistilBERT and ELECTRA are dense layers on the
    first, XLNet's on the last. None: as a sentence encoder's folder says, else bert, or last of a
    model in which no position sees a later one."""
    head_bias: bool | None = None
    """Adds a bias in the last layer; None: unless no position of the model sees a later one, as in
    transformers' classes of GPT-2 and Llama."""
    scale: tuple[float, float] | None = None
    """Mean and standard deviation of numbers: by them those are brought to about -2 to 2 to be
    learned, and back to be answered and measured. None: those of the training data."""

    def __post_init__(self) -> None:
        if self.scale is not None and (
            self.fields.target != "number"
            or not (all(map(math.isfinite, self.scale)))
            or self.scale[1] <= 0
        ):
            raise InputError(
                f"scale={self.scale} is not a mean and a deviation above 0 of numbers "
                f"(fields.target={self.fields.target}); None takes them from the training data"
            )
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing={self.label_smoothing} is not in [0, 1); 0 is off")
        if self.r_drop < 0:
            raise InputError(f"r_drop={self.r_drop} is below 0; 0 is off")
        if self.fields.target != "class" and (self.label_smoothing or self.r_drop):
            raise InputError(
                f"label_smoothing={self.label_smoothing} and r_drop={self.r_drop} are for classes, "
                f"not for fields.target={self.fields.target}: set both to 0"
            )
        for name, target in (("class_weights", "class"), ("thresholds", "labels")):
            given = vars(self)[name]
            if given and self.fields.target != target:
                raise InputError(
                    f"task.{name}={given} is for fields.target={target}, not {self.fields.target}"
                )
            pairs(() if given in (("balanced",), ("chosen",)) else given, f"task.{name}")

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
        """Without label smoothing, R-Drop and weights of classes."""
        return dataclasses.replace(self, label_smoothing=0.0, r_drop=0.0, class_weights=())

    def with_pooling(self, pooling: Pooling | None) -> "Classification":
        return dataclasses.replace(self, pooling=self.pooling or pooling or "bert")

    def read(self, records: Iterable[Record], *, labelled: bool = True) -> list[TextExample]:
        label = self.fields.label if labelled else None
        return data.read(records, dataclasses.replace(self.fields, label=label))

    def decided(self, records: Sequence[Record]) -> "Classification":
        return dataclasses.replace(self, fields=data.decided(self.fields, records))

    def check(self, examples: Sequence[TextExample]) -> list[str]:
        """Labels that nobody meant raise."""
        fields, name = self.fields, str(self.fields.label)
        if fields.target == "number":
            written = next((e.written for e in examples if e.written and "," in e.written[0]), ())
            return [f"{name} has decimal commas: {x} is read so" for x in written]
        if fields.as_written:
            return []
        checks.check_missing(examples, name)
        said = checks.check_names(examples, name, fields.names)
        if fields.target == "class":
            return said + checks.check_single(examples, name)
        return said + checks.check_several(examples, name, fields.separator, fields.names)

    def shown(self, examples: Sequence[TextExample]) -> "Classification":
        return dataclasses.replace(self, fields=data.settled(self.fields, examples))

    def settled(
        self, examples: Sequence[TextExample], before: Task | None = None
    ) -> "Classification":
        """With the mean and the deviation of numbers in training data, unless they are given.

        Runs of before had none, and learn numbers as they are. And with how numbers are written.
        """
        if self.fields.target != "number":
            return self
        was = before if isinstance(before, Classification) else None
        fields, scale = data.settled(self.fields, examples, was and was.fields), self.scale
        if scale is None and was is not None:
            scale = was.scale
        elif scale is None:
            numbers = _numbers(examples)
            scale = numbers.mean().item(), numbers.std().item() or 1.0
        return dataclasses.replace(self, fields=fields, scale=scale)

    def labels(self, examples: Sequence[TextExample]) -> Labels:
        """The classes or labels; none for numbers."""
        names = data.label_names(examples)
        if self.class_weights not in ((), ("balanced",)):
            self._weights(np.zeros(0, int), names)
        self.thresholds_of(names)  # both raise where they name another label
        return names

    def classes(self, examples: Sequence[TextExample]) -> list[str]:
        return [name for example in examples for name in example.classes]

    def encode(self, framer: Framer, examples: Sequence[TextExample], labels: Labels) -> Examples:
        """Rows of tokens."""
        if examples[0].label is None:
            return data.encode(framer, examples)
        if self.fields.target == "number":
            mean, deviation = self._scale
            numbers = (_numbers(examples) - mean) / deviation
            return data.encode(framer, examples, numbers.astype(np.float32))
        array = data.label_array(examples, labels)
        encoded = data.encode(framer, examples, array)
        if self.class_weights:
            weights = self._weights(np.asarray(array), labels)
            for row, number in zip(encoded.rows, np.asarray(array), strict=True):
                row["weights"] = np.array(weights[number], np.float32)
        return encoded

    def _weights(
        self, numbers: Int[np.ndarray, "examples"], labels: Labels
    ) -> Float[np.ndarray, "labels"]:
        """The weight of each class."""
        if self.class_weights == ("balanced",):
            counts = np.maximum(np.bincount(numbers, minlength=len(labels)), 1)
            return len(numbers) / (len(labels) * counts)
        return by_label(self.class_weights, labels, 1.0, "task.class_weights")

    def thresholds_of(self, labels: Labels) -> Float[np.ndarray, "labels"]:
        """The threshold of each label: 0.5 before they are chosen."""
        given = () if self.chooses_thresholds else self.thresholds
        return by_label(given, labels, 0.5, "task.thresholds")

    def abstract_batch(self, rows: int, length: int, num_labels: int) -> AbstractBatch:
        """Labels are classes, columns of ones and zeros, or numbers."""
        labels = {
            "class": shape(jnp.int32, rows),
            "labels": shape(jnp.float32, rows, num_labels),
            "number": shape(jnp.float32, rows),
        }
        return rows_of_tokens(rows, length) | {"labels": labels[self.fields.target]}

    def make_model(self, config: ModelConfig, labels: Labels, dropout_rate: float) -> nn.Module:
        """One output for each label, or for the number."""
        require_one_text(config, "Classification")
        size = 1 if self.fields.target == "number" else len(labels)
        pool = POOLS[self.pooling or "bert"]
        bias = self.head_bias is not False  # runs of before have one
        head = ClassificationHead(size, dropout_rate, pool, use_bias=bias, **head_options(config))
        return WithHead(config.make(), head)

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
        return metrics.classification_names(self.fields.target, labels)

    def metrics(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """Metrics for classes, for sets of labels, or for numbers."""
        if self.fields.target == "number":
            return metrics.regression(_numbers(examples), self._values(outputs))
        gold: Any = data.label_array(examples, labels)
        if self.fields.target == "labels":
            thresholds = self.thresholds_of(labels)
            return metrics.multilabel(gold, outputs["probabilities"], threshold=thresholds)
        return metrics.classification(gold, outputs["probabilities"], labels)

    def reference(
        self, train: Sequence[TextExample], validation: Sequence[TextExample]
    ) -> Reference:
        """The entropy of classes; of numbers, the loss of always answering their mean."""
        match self.fields.target:
            case "class":
                return class_entropy(self.classes(validation), len(validation))
            case "labels":  # of as many labels as texts there would be one, but of another loss
                return Reference()
        deviation = self._scale[1]
        errors = (_numbers(validation) - _numbers(train).mean()) / deviation
        return Reference({"always the mean": float(np.mean(np.square(errors)))}, deviation)

    def baselines(
        self, train: Sequence[TextExample], validation: Sequence[TextExample], labels: Labels
    ) -> Baselines:
        """The most frequent class or set of labels, or the mean; linear models on TF-IDF."""
        own, texts = [e.content for e in train], [e.content for e in validation]
        gold: Any = data.label_array(train, labels)
        quick = baselines.takes_seconds(own, max(len(labels), 1))
        match self.fields.target:
            case "class":
                best = baselines.most_frequent(gold)
                found = {f"always {labels[best]}": np.eye(len(labels))[[best] * len(texts)]}
                if quick:
                    linear = baselines.classes(own, gold, texts, len(labels))
                    found["TF-IDF + logistic regression"] = linear
            case "labels":
                sets, counts = np.unique(gold, axis=0, return_counts=True)
                found = {"always the commonest set": sets[[counts.argmax()] * len(texts)]}
                if quick:
                    linear = baselines.label_sets(own, gold, texts)
                    found["TF-IDF + logistic regression"] = linear
            case "number":
                mean, deviation = self._scale
                targets = (_numbers(train) - mean) / deviation
                found = {"always the mean": np.full(len(texts), targets.mean())}
                if quick:
                    found["TF-IDF + ridge regression"] = baselines.numbers(own, targets, texts)
        output = "values" if self.fields.target == "number" else "probabilities"
        return {
            name: self.metrics(validation, labels, {output: values})
            for name, values in found.items()
        }

    def predictions(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs
    ) -> list[Prediction]:
        """By their own loss; several labels are right together, and a number where it is met."""
        texts, origins = [e.content for e in examples], [e.origin for e in examples]
        if self.fields.target == "number":
            own = _numbers(examples)
            return report.regressed(texts, own, self._values(outputs), self._scale[1], origins)
        gold, probabilities = (
            np.asarray(data.label_array(examples, labels)),
            outputs["probabilities"],
        )
        if self.fields.target == "labels":
            thresholds = self.thresholds_of(labels)
            return report.labelled(texts, gold, probabilities, thresholds, labels, origins)
        return report.classified(texts, gold, probabilities, labels, origins)

    def plots(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs, folder: Path
    ) -> dict[str, str]:
        """Which classes are confused, and how far probabilities can be trusted."""
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
        if self.fields.target == "number":
            values = self._values(outputs).tolist()
            return [_texts(e) | {"value": x} for e, x in zip(examples, values, strict=True)]
        return [
            _texts(example) | self._answer(labels, outputs, i) for i, example in enumerate(examples)
        ]

    @property
    def _scale(self) -> tuple[float, float]:
        return self.scale or (0.0, 1.0)  # runs of before learned numbers as they are

    def _values(self, outputs: Outputs) -> Float64[np.ndarray, "examples"]:
        """Numbers in the unit of the data, in float64: a large mean would round them."""
        mean, deviation = self._scale
        return np.asarray(outputs["values"], np.float64) * deviation + mean

    def _answer(self, labels: Labels, outputs: Outputs, i: int) -> dict[str, Any]:
        row = outputs["probabilities"][i].tolist()
        probabilities = dict(zip(labels, row, strict=True))
        if self.fields.target == "labels":
            above = np.array(row) > self.thresholds_of(labels)
            chosen: Any = [name for name, is_above in zip(labels, above, strict=True) if is_above]
            return {"labels": chosen, "probabilities": probabilities}
        best = max(probabilities, key=probabilities.__getitem__)
        return {"label": best, "probability": probabilities[best], "probabilities": probabilities}

    @property
    def chooses_thresholds(self) -> bool:
        return self.thresholds == ("chosen",)

    def with_thresholds(self, chosen: Mapping[str, float]) -> "Classification":
        pairs = tuple(f"{label}={value!r}" for label, value in chosen.items())
        return dataclasses.replace(self, thresholds=pairs)

    def chosen_thresholds(
        self, examples: Sequence[TextExample], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """The threshold of each label with the best F1 on these examples; where none is, 0.5."""
        gold = np.asarray(data.label_array(examples, labels))
        values = best_thresholds(gold, np.asarray(outputs["probabilities"]))
        return dict(zip(labels, values.tolist(), strict=True))


def _numbers(examples: Sequence[TextExample]) -> Float64[np.ndarray, "examples"]:
    return np.array([example.label for example in examples], np.float64)


def _texts(example: TextExample) -> dict[str, Any]:
    return {"text": example.text} | ({} if example.pair is None else {"pair": example.pair})
