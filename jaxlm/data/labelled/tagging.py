"""One tag for each word of a sentence."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from jaxlm.data.labelled import labels, lists, spans, spelling, windows
from jaxlm.data.labelled.examples import Examples, Row
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.data.labelled.words import Split, split_words
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TagFields:
    """Which fields of a record are what."""

    words: str = "tokens"
    """A list of words, which may stand in a cell as JSON or Python write it, or words separated by
    spaces."""
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
    as_written: bool = False
    """They are taken so."""
    given: str | None = None
    """The text that the words were cut from; None: they were given as words."""
    unit: str = ""
    """What the file counts spans of characters in, if it is not characters."""
    is_cut: bool = False
    """A span begins or ends inside of a word."""
    of_spans: bool = False
    """Words are cut from a text as where it has spans of characters."""

    @property
    def spaced(self) -> list[bool] | None:
        """Whether white space is before each word; None: words stand by themselves."""
        if not self.of_spans or self.given is None:
            return None
        return [start == 0 or self.given[start - 1].isspace() for start, _ in self.places]

    @property
    def text(self) -> str:
        """As it was given, or the words with spaces between."""
        return " ".join(self.words) if self.given is None else self.given

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where each word stands in the text: its first character, and past its last."""
        text, end, places = self.text, 0, []
        for word in self.words:
            start = text.index(word, end)
            end = start + len(word)
            places.append((start, end))
        return places

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


def read(records: Iterable[Record], fields: TagFields, split: Split = "space") -> list[Sentence]:
    """The sentences of all records; tags that do not match the words raise.

    A text without tags is split into words as ``split`` says; one with tags at white space, or
    where it has spans of characters, which make its tags, as these need it.
    """
    sentences = []
    records = list(records)
    unit = "" if fields.tags is None else spans.unit_of(records, fields.words)
    for record in records:
        origin, given, of_spans = record.origin, None, False
        is_cut = fields.tags is not None and spans.are_cut(record, fields.words, unit)
        if fields.tags is None and (name := _plain(record, fields.words)):
            given = record.text(name)
            words, of_spans = split_words(given, split), split == "fine"
        else:
            if fields.tags is not None:
                own, record = record, spans.as_words(record, fields.words, fields.tags, unit)
                of_spans = record is not own
                given = record.text("text") if of_spans else None
            words = record.texts(fields.words)
        if not words or not all(words):
            raise InputError(f"{origin}: {'an empty word' if words else 'no words'}; remove it")
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
        sentences.append(
            Sentence(
                words=words,
                tags=tags,
                origin=origin,
                written=written,
                as_written=fields.as_written,
                given=given,
                unit=unit,
                is_cut=is_cut,
                of_spans=of_spans,
            )
        )
    return spelling.alike(sentences)


def _plain(record: Record, words: str) -> str:
    """The field that holds text to be split into words, if one does, and "" if none does."""
    name = words if words in record.fields else "text"
    value, where = record.fields.get(name), f"{record.origin}: field {name!r}"
    is_list = name == words and isinstance(value, str) and bool(lists.read(value, where))
    return name if isinstance(value, str) and not is_list else ""


@cache
def _clean(tag: str) -> str:
    return spelling.clean(tag)


def _tags(record: Record, name: str, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The tags; numbers get their names, or raise where there are none."""
    value = record.value(name)
    if isinstance(value, str):
        value = lists.read(value, f"{record.origin}: field {name!r}", kind=int)
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


def encode(
    framer: Framer,
    sentences: Sequence[Sentence],
    names: Sequence[str],
    doc_stride: int | None = None,
) -> Examples:
    """Rows of windows: a sentence that is too long for one has several, which overlap.

    ``doc_stride`` is the number of tokens that neighbouring windows share; None: a quarter of what
    has room. ``tokens``, ``token_type_ids``, ``lengths``, ``labels``, ``weights`` and ``words``
    [length], and ``sentence`` [], whose window it is. The first subword of each word carries its
    tag at weight 1, and in ``words`` its number, from 1, in the window that shows most around it;
    all else has 0. Words that the tokenizer drops are nowhere. Sentences without tags have no
    ``labels``.
    """
    rows: list[Row] = []
    room = framer.room(1)
    shared = room // 4 if doc_stride is None else doc_stride
    if shared >= room:
        raise InputError(
            f"task.doc_stride={shared} is not below the {room} tokens of a text that have room in "
            f"rows of {framer.max_length}: lower it{framer.or_longer}"
        )
    spaced = [sentence.spaced for sentence in sentences]
    encodings = framer.encodings([sentence.words for sentence in sentences], spaced)
    for number, (sentence, encoding) in enumerate(zip(sentences, encodings, strict=True)):
        ids = np.array(encoding.ids, np.int32)
        present, firsts = np.unique(np.array(encoding.word_ids, int), return_index=True)
        begins = windows.begins(len(ids), room, shared)
        best = windows.most_context(firsts, begins, room, len(ids))
        numbers = np.zeros(len(sentence.words), np.int32)
        if sentence.tags is not None:
            where, exact = sentence.origin, sentence.as_written
            all_numbers = [labels.number_of(tag, names, where, exact) for tag in sentence.tags]
            numbers = np.array(all_numbers, np.int32)
        for window, begin in enumerate(begins.tolist()):
            framed = framer.frame(ids[begin : begin + room])
            own = best == window
            places = firsts[own] - begin + framed.starts[0]
            row = {
                "tokens": framed.tokens,
                "token_type_ids": framed.token_type_ids,
                "lengths": np.array(len(framed.tokens), np.int32),
                "sentence": np.array(number, np.int32),
            }
            for name, values in (
                ("words", present[own] + 1),
                ("weights", np.ones(len(places), np.float32)),
                *([] if sentence.tags is None else [("labels", numbers[present[own]])]),
            ):
                dtype = np.float32 if name == "weights" else np.int32
                row[name] = np.zeros(len(framed.tokens), dtype)
                row[name][places] = values
            rows.append(row)
    return Examples(
        rows=rows,
        along_length=frozenset({"tokens", "token_type_ids", "labels", "weights", "words"}),
        pad=framer.special.pad,
        untruncated=np.array([row["lengths"] for row in rows], np.int32),
        windowed=windows.count(int(row["sentence"]) for row in rows),
    )
