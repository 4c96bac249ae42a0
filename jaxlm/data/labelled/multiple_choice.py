"""Multiple choice: which of a few texts goes best with a context."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.data.labelled import labels
from jaxlm.data.labelled.examples import Examples, pad_rows
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ChoiceFields:
    """Which fields of a record are what."""

    context: str = "context"
    """The text that the choices follow."""
    question: str | None = None
    """A text that is put before each choice, such as a question or the beginning of an ending."""
    choices: tuple[str, ...] = ("choices",)
    """One field that holds a list, or one field for each choice."""
    label: str | None = "label"
    """The right choice, as a number from 0 or a letter from A; None: it is not known."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A context, choices, and which is right, if that is known."""

    context: str
    choices: tuple[str, ...]
    label: int | None
    origin: str
    question: str | None = None

    @property
    def endings(self) -> tuple[str, ...]:
        """What follows the context: the question, if there is one, and each choice."""
        if self.question is None:
            return self.choices
        return tuple(f"{self.question} {choice}" for choice in self.choices)

    @property
    def content(self) -> str:
        """All text."""
        return "\n".join((self.context, *self.endings))

    @property
    def stratum(self) -> str:
        """Examples are all of one class."""
        return ""


def read(records: Iterable[Record], fields: ChoiceFields) -> list[Choice]:
    """The examples of all records, which must have equally many choices."""
    examples: list[Choice] = []
    for record in records:
        choices = _choices(record, fields)
        expected = len(examples[0].choices) if examples else max(len(choices), 2)
        if len(choices) != expected:
            raise InputError(
                f"{record.origin}: {len(choices)} choices where {expected} are expected; "
                "give all records equally many, and at least two"
            )
        examples.append(
            Choice(
                context=record.text(fields.context),
                choices=choices,
                label=None if fields.label is None else _label(record, fields.label, len(choices)),
                origin=record.origin,
                question=None if fields.question is None else record.text(fields.question),
            )
        )
    return examples


def _choices(record: Record, fields: ChoiceFields) -> tuple[str, ...]:
    if len(fields.choices) == 1:
        (name,) = fields.choices
        if isinstance(record.value(name), str):
            raise InputError(
                f"{record.origin}: field {name!r} is text where a list of choices is expected; "
                "name one field for each choice"
            )
        choices = record.texts(name)
        if not all(choice.strip() for choice in choices):
            raise InputError(f"{record.origin}: an empty choice in field {name!r}")
    else:
        choices = [record.text(name) for name in fields.choices]
    return tuple(choices)


def _label(record: Record, name: str, count: int) -> int:
    label = labels.read_label(record, name)
    letters = [chr(ord("A") + i) for i in range(count)]
    for names in ([str(i) for i in range(count)], letters):
        if label in names:
            return names.index(label)
    raise InputError(
        f"{record.origin}: {name} is {label!r:.40}, which is none of the {count} choices; "
        f"number them from 0, or from A"
    )


def encode(framer: Framer, examples: Sequence[Choice]) -> Examples:
    """``tokens`` and ``token_type_ids`` [choices, length], ``lengths`` [choices], ``weights``.

    ``labels`` too, where they are known.
    """
    contexts = framer.ids([example.context for example in examples])
    all_choices = framer.ids([choice for example in examples for choice in example.endings])
    rows, sizes = [], []
    for example, context in zip(examples, contexts, strict=True):
        choices = [next(all_choices) for _ in example.choices]
        framed = [framer.frame(context, choice) for choice in choices]
        lengths = [len(one.tokens) for one in framed]
        types = [one.token_type_ids for one in framed]
        row = {
            "tokens": pad_rows([one.tokens for one in framed], framer.special.pad, max(lengths)),
            "token_type_ids": pad_rows(types, 0, max(lengths)),
            "lengths": np.array(lengths, np.int32),
            "weights": np.ones((), np.float32),
        }
        rows.append(
            row if example.label is None else row | {"labels": np.array(example.label, np.int32)}
        )
        sizes.append(max(framer.size(context, choice) for choice in choices))
    return Examples(
        rows=rows,
        along_length=frozenset({"tokens", "token_type_ids"}),
        pad=framer.special.pad,
        untruncated=np.array(sizes, np.int32),
    )
