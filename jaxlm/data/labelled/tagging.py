"""One tag for each word of a sentence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from jaxlm.data.labelled import labels, spans
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


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """Words, with a tag each or none at all."""

    words: list[str]
    tags: list[str] | None
    origin: str

    @property
    def content(self) -> str:
        """All text."""
        return " ".join(self.words)

    @property
    def stratum(self) -> str:
        """Sentences are all of one class."""
        return ""


def read(records: Iterable[Record], fields: TagFields) -> list[Sentence]:
    """The sentences of all records; tags that do not match the words raise.

    Where a record has no words, but a text with spans of characters, these make words and tags.
    """
    sentences = []
    for record in records:
        record = spans.as_words(record, fields.words, fields.tags)
        words, origin = record.texts(fields.words), record.origin
        if not words or not all(word.strip() for word in words):
            raise InputError(f"{origin}: {'an empty word' if words else 'no words'}; remove it")
        tags = None if fields.tags is None else record.texts(fields.tags)
        if tags is not None and len(tags) != len(words):
            raise InputError(
                f"{origin}: {len(tags)} tags for {len(words)} words; give each word one tag"
            )
        sentences.append(Sentence(words=words, tags=tags, origin=origin))
    return sentences


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
