"""Classes, sets of labels, or numbers for single texts and for pairs of texts."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from jaxlm.data.labelled import labels, spelling
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
    """What is to be predicted; None: the records have no labels. Several columns of 0 and 1, one
    for each label: their names with commas, such as toxic,insult."""
    target: Literal["class", "labels", "number"] = "class"
    """What a label is: one class, any number of labels, or a number."""
    separator: str = "|"
    """Stands between the labels of one record, where they are no list."""
    names: tuple[str, ...] | None = None
    """Names of labels that the data give as numbers from 0, or as rows of 0 and 1."""
    row_size: int | None = None
    """How many zeros and ones a row of labels has; 0: rows are lists of labels; None: as most
    records show."""
    decimal_commas: bool | None = None
    """Numbers are written as 3,5, so that 1,250 is one and a quarter; those with a point are read
    as well. None: as the data show, and what training data show holds for what is evaluated."""
    as_written: bool = False
    """Take labels as they stand: do not make those one that differ in case, accents' encoding,
    invisible characters or quotation marks, and refuse neither NaN and None nor a class for each
    example."""

    def __post_init__(self) -> None:
        if not self.separator:
            raise InputError(
                "task.fields.separator is empty: name what stands between labels, such as |"
            )
        if self.row_size is not None and self.row_size < 0:
            raise InputError(f"task.fields.row_size={self.row_size} is below 0; 0 is lists")


@dataclass(frozen=True, kw_only=True)
class TextExample:
    """A text or a pair, with a class, labels, a number, or nothing to be predicted."""

    text: str
    pair: str | None
    label: str | tuple[str, ...] | float | None
    origin: str
    written: tuple[str, ...] = ()
    """The labels as they stand in the file."""
    as_written: bool = False
    """They are taken so."""

    @property
    def content(self) -> str:
        """All text."""
        return self.text if self.pair is None else f"{self.text}\n{self.pair}"

    @property
    def stratum(self) -> str:
        """The class, or the first of several labels; numbers make no strata."""
        return min(self.classes, default="")

    def respelled(self, names: Mapping[str, str]) -> "TextExample":
        """With other names for its labels."""
        label = tuple(dict.fromkeys(names.get(own, own) for own in self.classes))
        return replace(self, label=label if isinstance(self.label, tuple) else label[0])

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
    examples, records = [], list(records)
    fields = decided(fields, records)
    commas = bool(fields.decimal_commas)
    as_written = fields.as_written and fields.label is not None and fields.target != "number"
    for record in records:
        text = record.text(fields.text)
        pair = None if fields.pair is None else record.text(fields.pair)
        label, written = _label(record, fields, commas)
        examples.append(
            TextExample(
                text=text,
                pair=pair,
                label=label,
                origin=record.origin,
                written=written,
                as_written=as_written,
            )
        )
    if fields.row_size:
        pairs = zip(examples, records, strict=True)
        examples = [_hot(example, record, fields) for example, record in pairs]
    return spelling.alike(examples)


def decided(fields: TextFields, records: Sequence[Record]) -> TextFields:
    """With how numbers are written, or rows of labels, as these records show together."""
    if fields.target == "labels" and fields.row_size is None:
        rows = [_row(record, fields) for record in records]
        return replace(fields, row_size=_row_size(rows, fields.names))
    if fields.target != "number" or fields.label is None or fields.decimal_commas is not None:
        return fields
    return replace(fields, decimal_commas=labels.has_decimal_commas(records, fields.label))


def settled(
    fields: TextFields, examples: Sequence[TextExample], before: TextFields | None = None
) -> TextFields:
    """With decimal commas where numbers of the training data have them, or as a run before had."""
    if fields.target != "number" or fields.decimal_commas is not None:
        return fields
    if before is not None:
        return replace(fields, decimal_commas=before.decimal_commas)
    is_so = any("," in text for example in examples for text in example.written)
    return replace(fields, decimal_commas=True) if is_so else fields


def _row(record: Record, fields: TextFields) -> list[bool] | None:
    """The zeros and ones that a record has for labels, if it does."""
    return labels.read_hot(record, fields.label) if fields.target == "labels" else None


def _row_size(rows: Sequence[list[bool] | None], names: Sequence[str] | None) -> int:
    """How many zeros and ones each row is to have; 0: rows are lists of labels.

    One that has either twice is no list of the labels 0 and 1, unless most others are lists.
    """
    sizes = Counter(len(row or ()) for row in rows)
    size, count = max(sizes.items(), key=lambda pair: pair[1], default=(0, 0))
    is_sure = any(row and len(row) > len(set(row)) for row in rows)
    if count <= (len(rows) / 2 if is_sure else len(rows) - 1):
        return 0
    return len(names) if names and is_sure and size else size


def _hot(example: TextExample, record: Record, fields: TextFields) -> TextExample:
    """With the labels whose places hold 1."""
    row = _row(record, fields)
    if row is None or len(row) != fields.row_size:
        why = "one for each of --task.fields.names" if fields.names else "as others have"
        raise InputError(
            f"{record.origin}: {fields.label} is {record.fields.get(str(fields.label))!r:.40}, "
            f"where {fields.row_size} zeros and ones are expected, {why}: correct it, or read "
            "lists of labels with --task.fields.row-size 0"
        )
    numbers = [str(i) for i, is_one in enumerate(row) if is_one]
    own = [labels.named(i, fields.names, str(fields.label), example.origin) for i in numbers]
    return replace(example, label=tuple(own), written=())


def _label(
    record: Record, fields: TextFields, decimal_commas: bool
) -> tuple[str | tuple[str, ...] | float | None, tuple[str, ...]]:
    """The label or labels, and how they are written."""
    name = fields.label
    if name is None:
        return None, ()
    if fields.target == "number":
        target = labels.read_target(record, name, decimal_commas=decimal_commas)
        return target, (str(record.value(name)),) if decimal_commas else ()
    several = fields.target == "labels"
    if several or ("," in name and name not in record.fields):
        written = labels.read_labels(record, name, fields.separator)
        if not several and len(written) != 1:
            raise InputError(
                f"{record.origin}: {len(written)} of {name} are 1, where a class is one of them: "
                "set --task.fields.target labels for any number"
            )
    else:
        written = (labels.read_label(record, name),)
    used = written if fields.as_written else tuple(map(spelling.clean, written))
    used = tuple(labels.named(label, fields.names, name, record.origin) for label in used)
    return (tuple(dict.fromkeys(used)) if several else used[0]), written


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
    exact = examples[0].as_written
    match own[0]:
        case float():
            return np.array(own, np.float32)
        case tuple():
            return labels.indicators_of([e.classes for e in examples], names, origins, exact)
        case _:
            return labels.numbers_of([e.stratum for e in examples], names, origins, exact)


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
