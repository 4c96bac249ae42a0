"""A tag for each word, such as BIO tags of named entities."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxlm.data.labelled import checks
from jaxlm.data.labelled import tagging as data
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.data.labelled.tagging import Sentence, TagFields
from jaxlm.data.labelled.words import Split, find_split
from jaxlm.errors import InputError
from jaxlm.evaluate import metrics
from jaxlm.evaluate.baselines import Baselines
from jaxlm.evaluate.report import Prediction, surprise
from jaxlm.evaluate.tagging import OUTSIDE, find_mentions, read_entities
from jaxlm.models.heads import TokenHead, WithHead
from jaxlm.models.model import ModelConfig
from jaxlm.models.pooling import Pooling
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

_SHOWN = 5  # tags, in a line


@dataclass(frozen=True, kw_only=True)
class Tagging:
    """Named entities, parts of speech: the first subword of each word bears its tag."""

    fields: TagFields = field(default_factory=TagFields)
    """Which fields hold words and tags."""
    entities: bool = True
    """Tags mark the words of entities (BIO, IOBES); else each word's tag stands for itself, such as
    a part of speech."""
    split: Split | None = None
    """Where a text that is given to be tagged is split into words: at white space, at punctuation
    as well, or at Chinese characters, too; fine: letters and digits are words, and each other
    character, as where tags are from spans of characters; None: as the training data are."""
    doc_stride: int | None = None
    """Tokens that neighbouring windows of a long document share; each word is learnt and tagged in
    the window that shows most around it. None: a quarter of a row."""
    label_smoothing: float = 0.0
    """Probability that is spread over all tags in training."""

    def __post_init__(self) -> None:
        if self.doc_stride is not None and self.doc_stride < 0:
            raise InputError(f"task.doc_stride={self.doc_stride} is below 0; 0 is no overlap")

    @property
    def verb(self) -> str:
        return "tag"

    @property
    def usage(self) -> str:
        """A sentence."""
        return "TEXT"

    @property
    def text_fields(self) -> tuple[str, ...]:
        return (self.fields.words,)

    @property
    def monitor(self) -> str:
        """The F1 of whole entities, or the share of words."""
        return "f1" if self.entities else "accuracy"

    def for_evaluation(self) -> "Tagging":
        """Without label smoothing."""
        return replace(self, label_smoothing=0.0)

    def with_pooling(self, pooling: Pooling | None) -> "Tagging":
        return self

    def read(self, records: Iterable[Record], *, labelled: bool = True) -> list[Sentence]:
        tags = self.fields.tags if labelled else None
        return data.read(records, replace(self.fields, tags=tags), self.split or "punctuation")

    def settled(self, examples: Sequence[Sentence], before: Task | None = None) -> "Tagging":
        """Texts will be split as the training data are."""
        split = self.split or (before.split if isinstance(before, Tagging) else None)
        if split is None and any(example.of_spans for example in examples):
            split = "fine"
        return replace(self, split=split or find_split(example.words for example in examples))

    def check(self, examples: Sequence[Sentence]) -> list[str]:
        """Tags that are words for a missing value, or mark no entity, raise; lines on spans."""
        if not self.fields.as_written:
            checks.check_missing(examples, str(self.fields.tags))
        if self.entities:
            _check_marks(examples)
        cut = [example.origin for example in examples if example.is_cut]
        said = [f"spans count {examples[0].unit}, and are read so"] if examples[0].unit else []
        said += checks.check_names(examples, str(self.fields.tags), self.fields.names)
        return said + [
            f"in {len(cut):,} of {len(examples):,} texts, first at {one}, a span begins or ends "
            "inside of a word, which is cut there: correct it, if it is not meant"
            for one in cut[:1]
        ]

    def labels(self, examples: Sequence[Sentence]) -> Labels:
        return data.label_names(examples)

    def classes(self, examples: Sequence[Sentence]) -> list[str]:
        return [tag for example in examples for tag in example.tags or ()]

    def encode(self, framer: Framer, examples: Sequence[Sentence], labels: Labels) -> Examples:
        """Rows of windows; ``words`` numbers, from 1, the word that each token begins, else 0."""
        return data.encode(framer, examples, labels, self.doc_stride)

    def abstract_batch(self, rows: int, length: int, num_labels: int) -> AbstractBatch:
        """Labels and weights at every position."""
        weights = shape(jnp.float32, rows, length)
        labels = shape(jnp.int32, rows, length)
        return rows_of_tokens(rows, length) | {"labels": labels, "weights": weights}

    def make_model(self, config: ModelConfig, labels: Labels, dropout_rate: float) -> nn.Module:
        """One output for each tag, at each position."""
        require_one_text(config, "Tagging")
        head = TokenHead(len(labels), dropout_rate, **head_options(config))
        return WithHead(config.make(), head)

    def make_loss(self, apply: Apply) -> Loss:
        """Cross-entropy of the tags of words."""
        return classification.make_loss(apply, label_smoothing=self.label_smoothing)

    def make_predict(self, apply: Apply) -> Predict:
        """``probabilities`` of tags at each position, and where words begin."""
        predict = classification.make_predict(apply)
        return lambda variables, batch: {
            "probabilities": predict(variables, batch)["probabilities"],
            **{name: batch[name] for name in ("words", "sentence")},
        }

    def metric_names(self, examples: Sequence[Sentence], labels: Labels) -> tuple[str, ...]:
        """In all, and of each type of entity among the examples."""
        if not self.entities:
            return ("accuracy",)
        tags = [example.tags or () for example in examples]
        types = sorted({entity.type for own in tags for entity in read_entities(own)})
        names = ("precision", "recall", "f1")
        return *names, *(f"{name}/{type}" for type in types for name in names), "accuracy"

    def metrics(
        self, examples: Sequence[Sentence], labels: Labels, outputs: Outputs
    ) -> dict[str, float]:
        """Metrics for entities and for words; those the tokenizer drops count as O, or as wrong."""
        tagged = _tags(examples, labels, outputs)
        return self._measure(examples, [self._shown(tags) for tags, _, _ in tagged])

    def _measure(
        self, examples: Sequence[Sentence], predicted: Sequence[Sequence[str | None]]
    ) -> dict[str, float]:
        gold = [example.tags or [] for example in examples]
        words = zip(chain.from_iterable(gold), chain.from_iterable(predicted), strict=True)
        accuracy = {"accuracy": float(np.mean([a == b for a, b in words]))}
        if not self.entities:
            return accuracy
        found = [[tag or OUTSIDE for tag in tags] for tags in predicted]
        return metrics.entities(gold, found) | accuracy

    def reference(self, train: Sequence[Sentence], validation: Sequence[Sentence]) -> Reference:
        return class_entropy(self.classes(validation), len(validation))

    def baselines(
        self, train: Sequence[Sentence], validation: Sequence[Sentence], labels: Labels
    ) -> Baselines:
        """Each word's most frequent tag in training; of unknown words, that of all."""
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for sentence in train:
            for word, tag in zip(sentence.words, sentence.tags or (), strict=True):
                counts[word][tag] += 1
        ((usual, _),) = sum(counts.values(), Counter()).most_common(1)
        own = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
        tags = [[own.get(word, usual) for word in sentence.words] for sentence in validation]
        return {"each word's most frequent tag": self._measure(validation, tags)}

    def predictions(
        self, examples: Sequence[Sentence], labels: Labels, outputs: Outputs
    ) -> list[Prediction]:
        """The worst word of each sentence with something wrong: by its own tag's probability.

        Of a word that the tokenizer drops there is no prediction. Tags that mark the same entities,
        such as I- for the B- of a first word, are right, as the metric has it.
        """
        found = []
        tagged, numbers = _tags(examples, labels, outputs), {tag: i for i, tag in enumerate(labels)}
        for example, (tags, probabilities, rows) in zip(examples, tagged, strict=True):
            gold = example.tags or []
            wrong = [i for i in self._wrong(gold, tags) if tags[i] not in (gold[i], None)]
            if not wrong:
                continue
            losses = {i: surprise(float(rows[i][numbers[gold[i]]])) for i in wrong}
            worst = max(wrong, key=losses.__getitem__)
            text = " ".join(example.words)
            found.append(
                Prediction(
                    loss=losses[worst],
                    gold=gold[worst],
                    predicted=tags[worst] or "",
                    probability=probabilities[worst],
                    text=f"{example.words[worst]}: {text}",
                    origin=example.origin,
                    right=False,
                )
            )
        return found

    def _wrong(self, gold: Sequence[str], tags: Sequence[str | None]) -> Iterable[int]:
        """Words in entities that are only given or only predicted; all, where there are none."""
        if not self.entities:
            return range(len(gold))
        found = [tag or "O" for tag in tags]
        different = set(read_entities(gold)) ^ set(read_entities(found))
        return {i for entity in different for i in range(entity.start, entity.end)}

    def plots(
        self, examples: Sequence[Sentence], labels: Labels, outputs: Outputs, folder: Path
    ) -> dict[str, str]:
        """None."""
        return {}

    def answers(
        self, examples: Sequence[Sentence], labels: Labels, outputs: Outputs
    ) -> list[dict[str, Any]]:
        """The text, its words' tags, and the entities with their places in the text as given.

        A word that the tokenizer drops, such as an invisible one, is of no entity; without
        entities it has no tag.
        """
        answers = []
        tagged = _tags(examples, labels, outputs)
        for example, (tags, probabilities, _) in zip(examples, tagged, strict=True):
            answer: dict[str, Any] = {"text": example.text, "tags": self._shown(tags)}
            if example.given is not None:
                answer["words"] = example.words
            if self.entities:
                marks = [tag or OUTSIDE for tag in tags]
                mentions = find_mentions(marks, example.places, example.text, probabilities)
                answer["entities"] = [vars(mention) for mention in mentions]
            answers.append(answer)
        return answers

    def _shown(self, tags: Sequence[str | None]) -> list[str | None]:
        return [tag or (OUTSIDE if self.entities else None) for tag in tags]


def _check_marks(examples: Sequence[Sentence]) -> None:
    """Raise where a tag marks no word of an entity, and name the first of such words."""
    reasons: dict[str, str] = {}
    for tag in {tag for example in examples for tag in example.tags or ()}:
        try:
            read_entities([tag])
        except InputError as error:
            reasons[tag] = str(error)
    wrong = [(e, i) for e in examples for i, tag in enumerate(e.tags or ()) if tag in reasons]
    if not wrong:
        return
    (first, i), tags = wrong[0], Counter(e.classes[i] for e, i in wrong)
    shown = ", ".join(f"{tag!r} ({count:,})" for tag, count in tags.most_common(_SHOWN))
    more = ", …" if len(tags) > _SHOWN else ""
    raise InputError(
        f"{first.origin}: {reasons[first.classes[i]]}, at word {i + 1} of the sentence, "
        f"{first.words[i]!r:.40}; there are {shown}{more}: correct them, or give "
        "--task.no-entities for tags such as parts of speech, or --task.fields.names O B-PER ... "
        "for numbers"
    )


def _tags(
    examples: Sequence[Sentence], labels: Labels, outputs: Outputs
) -> list[tuple[list[str | None], list[float], dict[int, np.ndarray]]]:
    """The likeliest tag of each word, its probability, and those of all; None: it was dropped."""
    tagged: list[tuple[list[str | None], list[float], dict[int, np.ndarray]]] = [
        ([None] * len(example.words), [0.0] * len(example.words), {}) for example in examples
    ]
    rows = zip(outputs["sentence"], outputs["probabilities"], outputs["words"], strict=True)
    for number, probabilities, words in rows:
        tags, likely, rows_of_words = tagged[number]
        for position in np.flatnonzero(words):
            best, word = int(probabilities[position].argmax()), int(words[position]) - 1
            tags[word] = labels[best]
            likely[word] = float(probabilities[position, best])
            rows_of_words[word] = probabilities[position]
    return tagged
