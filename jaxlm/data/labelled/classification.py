"""Classes, sets of labels, or numbers for single texts and for pairs of texts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from jaxlm.data.labelled import labels
from jaxlm.data.labelled.examples import Examples, pad_rows
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TextFields:
    """Which fields of a record are what."""

    text: str = "text"
    """The text, or the first of a pair."""
    pair: str | None = None
    """The second text of a pair."""
    label: str | None = "label"
    """What is to be predicted; None: the records have no labels."""
    target: Literal["class", "labels", "number"] = "class"
    """What a label is: one class, any number of labels, or a number."""
    separator: str = "|"
    """Stands between the labels of one record, where they are no JSON list."""

    def __post_init__(self) -> None:
        if not self.separator:
            raise InputError(
                "task.fields.separator is empty: name what stands between labels, such as |"
            )


@dataclass(frozen=True, kw_only=True)
class TextExample:
    """A text or a pair, with a class, labels, a number, or nothing to be predicted."""

    text: str
    pair: str | None
    label: str | tuple[str, ...] | float | None
    origin: str

    @property
    def content(self) -> str:
        """All text."""
        return self.text if self.pair is None else f"{self.text}\n{self.pair}"

    @property
    def stratum(self) -> str:
        """The class, or the first of several labels; numbers make no strata."""
        return min(self.classes, default="")

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, as a tuple."""
        match self.label:
            case str(label):
                return (label,)
            case tuple(several):
                return several
            case _:
                return ()


def read(records: Iterable[Record], fields: TextFields) -> list[TextExample]:
    """The examples of all records."""
    return [
        TextExample(
            text=record.text(fields.text),
            pair=None if fields.pair is None else record.text(fields.pair),
            label=None if fields.label is None else _label(record, fields.label, fields),
            origin=record.origin,
        )
        for record in records
    ]


def _label(record: Record, name: str, fields: TextFields) -> str | tuple[str, ...] | float:
    match fields.target:
        case "class":
            return labels.read_label(record, name)
        case "labels":
            return labels.read_labels(record, name, fields.separator)
        case "number":
            return labels.read_target(record, name)


def label_names(examples: Sequence[TextExample]) -> tuple[str, ...]:
    """The classes or labels of training data, sorted; none if they are numbers."""
    if isinstance(examples[0].label, float):
        return ()
    return labels.discover(name for example in examples for name in example.classes)


def label_array(
    examples: Sequence[TextExample], names: Sequence[str]
) -> Shaped[np.ndarray, "examples *labels"]:
    """int32 [examples] of classes, float32 [examples, labels] of labels, float32 [examples]."""
    own, origins = [e.label for e in examples], [e.origin for e in examples]
    match own[0]:
        case float():
            return np.array(own, np.float32)
        case tuple():
            return labels.indicators_of([e.classes for e in examples], names, origins)
        case _:
            return labels.numbers_of([e.stratum for e in examples], names, origins)


def encode(
    framer: Framer,
    examples: Sequence[TextExample],
    label_array: Shaped[np.ndarray, "examples *labels"] | None = None,
) -> Examples:
    """``tokens``, ``token_type_ids``, ``lengths``, ``weights``, and ``labels`` if there are any."""
    rows, sizes = [], []
    for i, texts in enumerate(_ids(framer, examples)):
        framed = framer.frame(*texts)
        row = {
            "tokens": framed.tokens,
            "token_type_ids": framed.token_type_ids,
            "lengths": np.array(len(framed.tokens), np.int32),
            "weights": np.ones((), np.float32),
        }
        rows.append(row if label_array is None else row | {"labels": np.asarray(label_array[i])})
        sizes.append(framer.size(*texts))
    return Examples(
        rows=rows,
        along_length=frozenset({"tokens", "token_type_ids"}),
        pad=framer.special.pad,
        untruncated=np.array(sizes, np.int32),
    )


def encode_contrastive(framer: Framer, examples: Sequence[TextExample]) -> Examples:
    """Pairs as two rows each: ``tokens`` [2, length], ``lengths`` [2] and ``weights``."""
    rows, sizes = [], []
    for texts in _ids(framer, examples):
        if len(texts) == 1:
            raise InputError(f"{examples[0].origin}: a pair of texts is needed; name its second")
        tokens = [framer.frame(text).tokens for text in texts]
        lengths = [len(own) for own in tokens]
        rows.append(
            {
                "tokens": pad_rows(tokens, framer.special.pad, max(lengths)),
                "lengths": np.array(lengths, np.int32),
                "weights": np.ones((), np.float32),
            }
        )
        sizes.append(max(framer.size(text) for text in texts))
    return Examples(
        rows=rows,
        along_length=frozenset({"tokens"}),
        pad=framer.special.pad,
        untruncated=np.array(sizes, np.int32),
    )


def _ids(framer: Framer, examples: Sequence[TextExample]) -> Iterable[tuple[np.ndarray, ...]]:
    columns = [framer.ids([example.text for example in examples])]
    if any(example.pair is not None for example in examples):
        columns.append(framer.ids([example.pair or "" for example in examples]))
    return zip(*columns, strict=True)
