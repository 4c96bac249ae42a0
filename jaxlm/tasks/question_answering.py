"""Extractive question answering: the answer is a span of a context, or is not in it."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxlm.data.labelled import question_answering as data
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.question_answering import Question, SpanFields
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError
from jaxlm.evaluate import metrics
from jaxlm.evaluate.baselines import Baselines
from jaxlm.evaluate.question_answering import Answer, Reading, Window, read_windows
from jaxlm.evaluate.report import Prediction, surprise
from jaxlm.models.heads import TokenHead, WithHead
from jaxlm.models.model import ModelConfig
from jaxlm.models.pooling import Pooling
from jaxlm.objectives import question_answering
from jaxlm.objectives.supervised import Predict
from jaxlm.tasks.task import (
    AbstractBatch,
    Labels,
    Outputs,
    Task,
    head_options,
    require_one_text,
    rows_of_tokens,
    shape,
)
from jaxlm.train.plots import Reference
from jaxlm.typing import Apply, Loss


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering:
    """SQuAD, with questions that have no answer or without; long contexts slide by in windows."""

    fields: SpanFields = field(default_factory=SpanFields)
    """Which fields hold questions, contexts and answers."""
    doc_stride: int = 32
    """Tokens that neighbouring windows of a context share: as many as the longest answer has, or
    some window ends inside of it."""
    num_best: int = 20
    """Answers among which probabilities are shared out, besides no answer."""
    max_answer_length: int = 30
    """Tokens of the longest answer that is given."""
    null_threshold: float | None = 0.0
    """There is no answer where that scores more than this above the best one; None: there always
    is one, as in SQuAD 1."""

    def __post_init__(self) -> None:
        if self.fields.answers is None:
            raise InputError("task.fields.answers is None: name the field that holds the answers")
        if self.doc_stride < 0:
            raise InputError(f"task.doc_stride={self.doc_stride} is below 0; 0 is no overlap")
        for name in ("num_best", "max_answer_length"):
            if vars(self)[name] < 1:
                raise InputError(f"task.{name}={vars(self)[name]} is not above 0")

    @property
    def verb(self) -> str:
        return "answer"

    @property
    def usage(self) -> str:
        """A question and its context."""
        return "QUESTION --pair CONTEXT"

    @property
    def text_fields(self) -> tuple[str, ...]:
        return self.fields.question, self.fields.context

    @property
    def monitor(self) -> str:
        """The F1 of words shared with a right answer."""
        return "f1"

    def for_evaluation(self) -> "QuestionAnswering":
        return self

    def with_pooling(self, pooling: Pooling | None) -> "QuestionAnswering":
        return self

    def read(self, records: Iterable[Record], *, labelled: bool = True) -> list[Question]:
        fields = self.fields if labelled else replace(self.fields, answers=None, id=None)
        return data.read(records, fields)

    def check(self, examples: Sequence[Question]) -> list[str]:
        """A line on starts that count something else than characters."""
        units = Counter(example.unit for example in examples if example.unit)
        return [
            f"starts of {n:,} answers count {unit}, and are read so" for unit, n in units.items()
        ]

    def settled(
        self, examples: Sequence[Question], before: Task | None = None
    ) -> "QuestionAnswering":
        return self

    def labels(self, examples: Sequence[Question]) -> Labels:
        return ()

    def classes(self, examples: Sequence[Question]) -> list[str]:
        return []

    def encode(self, framer: Framer, examples: Sequence[Question], labels: Labels) -> Examples:
        """A row for each window.

        ``question`` [] is the number of its question, and ``offsets`` [2, length] are the
        characters of the context where each token begins and ends.
        """
        encoded = data.encode(framer, examples, self.doc_stride)
        rows = encoded.examples.rows
        long = set()
        for row, window in zip(rows, encoded.windows, strict=True):
            row["question"] = np.array(window.example, np.int32)
            row["offsets"] = window.offsets.T
            if row["ends"] - row["starts"] >= self.max_answer_length:
                long.add(window.example)
        notes = encoded.examples.notes
        if long:
            notes += (
                f"answers to {len(long):,} questions have more tokens than "
                f"task.max_answer_length={self.max_answer_length}, and are never predicted",
            )
        along_length = encoded.examples.along_length | {"offsets"}
        return replace(encoded.examples, along_length=along_length, notes=notes)

    def abstract_batch(self, rows: int, length: int, num_labels: int) -> AbstractBatch:
        """First and last tokens of answers, and where answers may be."""
        one, allowed = shape(jnp.int32, rows), shape(bool, rows, length)
        return rows_of_tokens(rows, length) | {"starts": one, "ends": one, "allowed": allowed}

    def make_model(self, config: ModelConfig, labels: Labels, dropout_rate: float) -> nn.Module:
        """Two outputs at each position: the answer starts here, it ends here."""
        require_one_text(config, "QuestionAnswering")
        head = TokenHead(2, dropout_rate, **head_options(config))
        return WithHead(config.make(), head)

    def make_loss(self, apply: Apply) -> Loss:
        """Cross-entropy of first and last tokens."""
        return question_answering.make_loss(apply)

    def make_predict(self, apply: Apply) -> Predict:
        """``start_logits``, ``end_logits``, and what leads from them to an answer."""
        predict = question_answering.make_predict(apply)
        return lambda variables, batch: {
            **predict(variables, batch),
            **{name: batch[name] for name in ("question", "offsets", "allowed")},
        }

    def metric_names(self, examples: Sequence[Question], labels: Labels) -> tuple[str, ...]:
        """As SQuAD counts them."""
        given = [bool(example.answers) for example in examples]
        return metrics.squad_names(given, thresholds=self.null_threshold is not None)

    def metrics(
        self, examples: Sequence[Question], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """As SQuAD counts them."""
        readings = self._readings(examples, outputs)
        # By number and not by id, which need not be unique.
        references = {str(i): example.answers for i, example in enumerate(examples)}
        texts = {str(i): reading.answer(math.inf) for i, reading in enumerate(readings)}
        if self.null_threshold is None:
            return metrics.squad(texts, references)
        nulls = {str(i): reading.null_score for i, reading in enumerate(readings)}
        return metrics.squad(texts, references, nulls, threshold=self.null_threshold)

    def reference(self, train: Sequence[Question], validation: Sequence[Question]) -> Reference:
        return Reference()

    def baselines(
        self, train: Sequence[Question], validation: Sequence[Question], labels: Labels
    ) -> Baselines:
        """No answer to any question, where some have none."""
        references = {str(i): example.answers for i, example in enumerate(validation)}
        if all(references.values()):
            return {}
        return {"never an answer": metrics.squad(dict.fromkeys(references, ""), references)}

    def predictions(
        self, examples: Sequence[Question], labels: Labels, outputs: Outputs
    ) -> list[Prediction]:
        """Each question; the loss is -log of the probability of all that is right."""
        found = []
        for example, reading in zip(examples, self._readings(examples, outputs), strict=True):
            answer = self._answer(reading)
            text = answer.text if answer else ""
            answers = example.answers
            probability = _null_probability(reading)
            if answers:
                found_ones = (a for a in reading.answers if metrics.is_exact(a.text, answers))
                probability = sum((a.probability for a in found_ones), 0.0)
            found.append(
                Prediction(
                    loss=surprise(probability),
                    gold=next(iter(answers), ""),
                    predicted=text,
                    probability=answer.probability if answer else _null_probability(reading),
                    text=example.question,
                    origin=example.origin,
                    right=metrics.is_exact(text, answers) if answer else not answers,
                )
            )
        return found

    def plots(
        self, examples: Sequence[Question], labels: Labels, outputs: Outputs, folder: Path
    ) -> dict[str, str]:
        """None."""
        return {}

    def answers(
        self, examples: Sequence[Question], labels: Labels, outputs: Outputs
    ) -> list[dict[str, Any]]:
        """The question, the answer or None, its characters in the context, and its probability."""
        answers = []
        for example, reading in zip(examples, self._readings(examples, outputs), strict=True):
            best = self._answer(reading)
            answers.append(
                {
                    "question": example.question,
                    "answer": best.text if best else None,
                    "start": best.start if best else None,
                    "end": best.end if best else None,
                    "probability": best.probability if best else _null_probability(reading),
                }
            )
        return answers

    def _readings(self, examples: Sequence[Question], outputs: Outputs) -> list[Reading]:
        windows: list[list[Window]] = [[] for _ in examples]
        names = ("question", "start_logits", "end_logits", "offsets", "allowed")
        for number, start, end, offsets, allowed in zip(
            *(outputs[name] for name in names), strict=True
        ):
            windows[number].append(
                Window(start_logits=start, end_logits=end, offsets=offsets.T, allowed=allowed)
            )
        return [
            read_windows(
                example.context,
                own,
                num_best=self.num_best,
                max_answer_length=self.max_answer_length,
            )
            for example, own in zip(examples, windows, strict=True)
        ]

    def _answer(self, reading: Reading) -> Answer | None:
        threshold = math.inf if self.null_threshold is None else self.null_threshold
        return reading.answers[0] if reading.answer(threshold) else None


def _null_probability(reading: Reading) -> float:
    return max(0.0, 1.0 - sum(answer.probability for answer in reading.answers))
