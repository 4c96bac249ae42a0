"""One tag for each word of a sentence."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from jaxtyping import Int32

from jaxlm.data.labelled import labels, spans, spelling
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TagFields:
    """Which fields of a record are what."""

    words: str = "tokens"
    """A list of words, or words separated by spaces."""
    tags: str | None = "tags"
    """As many tags; None: the records have none."""
    names: tuple[str, ...] | None = None
    """Names of tags that the data give as numbers from 0, such as O B-PER I-PER."""
    as_written: bool = False
    """Take tags as they stand: do not make those one that differ in case, accents' encoding or
    invisible characters, and do not refuse NaN and None."""


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """Words, with a tag each or none at all."""

    words: list[str]
    tags: list[str] | None
    origin: str
    written: tuple[str, ...] = ()
    """The tags as they stand in the file."""

    @property
    def content(self) -> str:
        """All text."""
        return " ".join(self.words)

    @property
    def stratum(self) -> str:
        """Sentences are all of one class."""
        return ""

    @property
    def classes(self) -> tuple[str, ...]:
        """The tags, of each word."""
        return tuple(self.tags or ())

    def respelled(self, names: Mapping[str, str]) -> "Sentence":
        """With other names for its tags."""
        return replace(self, tags=[names.get(tag, tag) for tag in self.classes])


def read(records: Iterable[Record], fields: TagFields) -> list[Sentence]:
    """The sentences of all records; tags that do not match the words raise.

    Where a record has no words, but a text with spans of characters, these make words and tags.
    """
    sentences = []
    for record in records:
        record = spans.as_words(record, fields.words, fields.tags)
        words, origin = record.texts(fields.words), record.origin
        if not all(words):
            raise InputError(f"{origin}: an empty word; remove it")
        if not words:
            raise InputError(f"{origin}: no words; remove it")
        written = () if fields.tags is None else _tags(record, fields.tags, fields.names)
        if fields.tags is not None and len(written) != len(words):
            raise InputError(
                f"{origin}: {len(written)} tags for {len(words)} words; give each word one tag"
            )
        used = written if fields.as_written else tuple(map(_clean, written))
        if not all(used):
            raise InputError(
                f"{origin}: the tag {written[used.index('')]!a} has no visible character; "
                "give each word a tag"
            )
        tags = None if fields.tags is None else list(used)
        sentences.append(Sentence(words=words, tags=tags, origin=origin, written=written))
    return sentences if fields.as_written else spelling.alike(sentences)


@cache
def _clean(tag: str) -> str:
    return spelling.clean(tag)


def _tags(record: Record, name: str, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The tags; numbers get their names, or raise where there are none."""
    value = record.value(name)
    if isinstance(value, list) and all(type(tag) is int for tag in value):
        if names is None and value:
            raise InputError(
                f"{record.origin}: field {name!r} holds numbers of tags: give their names, in the "
                "order of the numbers, such as --task.fields.names O B-PER I-PER"
            )
        record = replace(record, fields={name: list(map(str, value))})
    tags = record.texts(name)
    return tuple(labels.named(tag, names, name, record.origin) for tag in tags)


def label_names(sentences: Sequence[Sentence]) -> tuple[str, ...]:
    """The tags of training data, sorted; BIO tags in pairs."""
    return labels.discover_tags(tag for sentence in sentences for tag in sentence.tags or ())


@dataclass(frozen=True, kw_only=True)
class Tagged:
    """Encoded sentences, and what leads from positions back to words."""

    examples: Examples
    first_positions: list[Int32[np.ndarray, " _"]]
    """For each sentence, where each word's first subword is; -1 for words that were cut off, or
    that the tokenizer drops."""


def encode(framer: Framer, sentences: Sequence[Sentence], names: Sequence[str]) -> Tagged:
    """``tokens``, ``token_type_ids``, ``lengths``, ``labels`` and ``weights`` [length].

    The first subword of each word carries its tag, at weight 1; all else has weight 0. Sentences
    without tags have no ``labels``.
    """
    rows, sizes, first_positions = [], [], []
    encodings = framer.encodings([sentence.words for sentence in sentences])
    for sentence, encoding in zip(sentences, encodings, strict=True):
        ids = np.array(encoding.ids, np.int32)
        framed = framer.frame(ids)
        length = len(framed.tokens)
        kept, firsts = np.unique(np.array(encoding.word_ids, int)[: framer.room(1)], True)
        positions = np.full(len(sentence.words), -1, np.int32)
        positions[kept] = firsts + framed.starts[0]
        row = {
            "tokens": framed.tokens,
            "token_type_ids": framed.token_type_ids,
            "lengths": np.array(length, np.int32),
            "weights": np.zeros(length, np.float32),
        }
        row["weights"][positions[kept]] = 1
        if sentence.tags is not None:
            numbers = [labels.number_of(tag, names, sentence.origin) for tag in sentence.tags]
            row["labels"] = np.zeros(length, np.int32)
            row["labels"][positions[kept]] = np.array(numbers, np.int32)[kept]
        rows.append(row)
        sizes.append(framer.size(ids))
        first_positions.append(positions)
    examples = Examples(
        rows=rows,
        along_length=frozenset({"tokens", "token_type_ids", "labels", "weights"}),
        pad=framer.special.pad,
        untruncated=np.array(sizes, np.int32),
    )
    return Tagged(examples=examples, first_positions=first_positions)
