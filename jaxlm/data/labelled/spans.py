"""Texts whose entities are spans of characters, as annotation tools write them: words and tags."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from jaxlm.data.labelled import offsets
from jaxlm.data.labelled.records import Record
from jaxlm.data.labelled.words import split_finely
from jaxlm.errors import InputError

_FIELDS = ("label", "labels", "entities", "spans")  # of doccano, spaCy and Prodigy


def unit_of(records: Sequence[Record], words: str) -> str:
    """What spans of characters are counted in, of :data:`jaxlm.data.labelled.offsets.UNITS`.

    It is characters, but where only another unit lets all spans begin and end between words.
    """
    return next((u for u in offsets.UNITS if not any(are_cut(r, words, u) for r in records)), "")


def are_cut(record: Record, words: str, unit: str) -> bool:
    """Whether a span begins or ends inside of a word."""
    text = record.fields.get("text")
    if words in record.fields or not isinstance(text, str):
        return False
    places = offsets.places(text, unit)
    inside = {x for word in split_finely(text) for x in range(word.start() + 1, word.end())}
    _, given = _given(record) or ("", [])
    edges = (edge for span in given if (found := _edges(span)) for edge in found[:2])
    return any((x := offsets.at(places, edge)) < 0 or x in inside for edge in edges)


def _given(record: Record) -> tuple[str, list[Any]] | None:
    """The field with spans, and these; a text has further fields, such as the label of all of it.

    None: there is no such field.
    """
    held = {name: record.fields[name] for name in _FIELDS if name in record.fields}
    lists = {name: x for name, x in held.items() if isinstance(x, list)}
    alike = {name: x for name, x in lists.items() if any(isinstance(y, list | dict) for y in x)}
    spans = {name: x for name, x in alike.items() if any(map(_edges, x))}
    if len({frozenset(map(_edges, x)) for x in spans.values()}) > 1:
        raise InputError(
            f"{record.origin}: {' and '.join(spans)} hold other spans each: leave one of them out"
        )
    for found in (spans, alike, {name: [] for name, x in held.items() if not x}, lists):
        for name, given in found.items():
            return name, given
    for name, text in held.items():
        raise InputError(f"{record.origin}: {name} is {text!r:.40}, which is no list of spans")
    return None


def as_words(record: Record, words: str, tags: str, unit: str = "") -> Record:
    """The same record, with words and BIO tags if it has none but a ``text`` with spans.

    A span is [start, end, type], or an object with ``start``, ``end`` and ``label``. A word is as
    :func:`~jaxlm.data.labelled.words.split_finely` has it, for "John" of "John's" is a name; a span
    that begins or ends inside of one cuts it. Else words do not depend on spans.
    ``unit`` is what spans are counted in.
    """
    text = record.fields.get("text")
    if words in record.fields or not isinstance(text, str) or (held := _given(record)) is None:
        return record
    name, given = held
    places = offsets.places(text, unit)
    spans = [_span(span, text, places, f"{record.origin}: {name}") for span in given]
    spans = sorted(set(spans))
    for one, other in pairwise(spans):
        if other[0] < one[1]:
            raise InputError(
                f"{record.origin}: {name} has spans that overlap, {list(one)} and {list(other)}; a "
                "word has one tag: leave one out"
            )
    cuts = {edge for start, end, _ in spans for edge in (start, end)}
    found: list[tuple[str, str]] = []
    for word in split_finely(text):
        inner = (cut for cut in cuts if word.start() < cut < word.end())
        edges = [word.start(), *sorted(inner), word.end()]
        for start, end in pairwise(edges):
            own = next((span for span in spans if span[0] <= start < span[1]), None)
            first = own is not None and not text[own[0] : start].strip()
            tag = "O" if own is None else f"{'B' if first else 'I'}-{own[2]}"
            found.append((text[start:end], tag))
    fields: dict[str, Any] = {words: [word for word, _ in found], tags: [tag for _, tag in found]}
    return replace(record, fields=record.fields | fields)


def _edges(span: Any) -> tuple[int, int, str] | None:
    match span:
        case [int(start), int(end), str(kind)]:
            return start, end, kind
        case {"start": int(start), "end": int(end), "label": str(kind)}:
            return start, end, kind
        case {"start_offset": int(start), "end_offset": int(end), "label": str(kind)}:
            return start, end, kind
    return None


def _span(span: Any, text: str, places: Sequence[int], where: str) -> tuple[int, int, str]:
    found = _edges(span)
    if found is None:
        raise InputError(
            f"{where} holds {span!r:.60}, which is neither [start, end, type] nor an object "
            "with start, end and label"
        )
    start, end, kind = found
    given, (start, end) = [start, end, kind], (offsets.at(places, x) for x in (start, end))
    if not 0 <= start < end or not text[start:end].strip():
        raise InputError(
            f"{where} holds {given}, where there is no text: the text has {len(text)} characters"
        )
    return start, end, kind
