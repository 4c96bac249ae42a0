"""Texts whose entities are spans of characters, as annotation tools write them: words and tags."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from jaxlm.data.labelled import offsets
from jaxlm.data.labelled.records import Record
from jaxlm.data.labelled.words import split_finely
from jaxlm.errors import InputError

_INSIDE = re.compile("[a-zA-Z0-9\u00c0-\u024f\u0370-\u052f]{2}")
_FIELDS = ("label", "labels", "entities", "spans")  # of doccano, spaCy and Prodigy


def unit_of(records: Sequence[Record], words: str) -> str:
    """What spans of characters are counted in, of :data:`jaxlm.data.labelled.offsets.UNITS`.

    It is characters, but where only another unit lets all spans begin and end between words.
    """
    return next((u for u in offsets.UNITS if not any(are_cut(r, words, u) for r in records)), "")


def are_cut(record: Record, words: str, unit: str) -> bool:
    """Whether a span begins or ends inside of a word of Latin, Greek or Cyrillic letters."""
    text, found = record.fields.get("text"), _given(record, words)
    if not isinstance(text, str):
        return False
    places = offsets.places(text, unit)
    for span in found:
        match span:
            case [int(start), int(end), *_] | {"start": int(start), "end": int(end)}:
                edges = [offsets.at(places, edge) for edge in (start, end)]
                if any(x < 0 or _INSIDE.fullmatch(text[max(x - 1, 0) : x + 1]) for x in edges):
                    return True
    return False


def _name(record: Record) -> str | None:
    return next((name for name in _FIELDS if name in record.fields), None)


def _given(record: Record, words: str) -> Sequence[Any]:
    name = _name(record)
    spans = None if name is None or words in record.fields else record.fields[name]
    return spans if isinstance(spans, list) else []


def as_words(record: Record, words: str, tags: str | None, unit: str = "") -> Record:
    """The same record, with words and BIO tags if it has none but a ``text`` with spans.

    A span is [start, end, type], or an object with ``start``, ``end`` and ``label``. A word is
    letters and digits with their marks, or another character; a span that begins or ends inside of
    one cuts it. That words do not depend on spans but for this is why they are cut more finely than
    :func:`~jaxlm.data.labelled.words.split_words` does: "John" of "John's" is a name.
    ``unit`` is what spans are counted in.
    """
    text = record.fields.get("text")
    if words in record.fields or not isinstance(text, str):
        return record
    name = _name(record)
    if tags is not None and name is None:
        return record
    given = (record.fields[name] if name and tags else None) or []
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
    fields: dict[str, Any] = {words: [word for word, _ in found]}
    if tags is not None:
        fields[tags] = [tag for _, tag in found]
    return replace(record, fields=record.fields | fields)


def _span(span: Any, text: str, places: Sequence[int], where: str) -> tuple[int, int, str]:
    match span:
        case [int(start), int(end), str(kind)]:
            pass
        case {"start": int(start), "end": int(end), "label": str(kind)}:
            pass
        case _:
            raise InputError(
                f"{where} holds {span!r:.60}, which is neither [start, end, type] nor an object "
                "with start, end and label"
            )
    given, (start, end) = [start, end, kind], (offsets.at(places, x) for x in (start, end))
    if not 0 <= start < end or not text[start:end].strip():
        raise InputError(
            f"{where} holds {given}, where there is no text: the text has {len(text)} characters"
        )
    return start, end, kind
