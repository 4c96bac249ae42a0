"""Texts whose entities are spans of characters, as annotation tools write them: words and tags."""

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError

_FIELDS = ("label", "labels", "entities", "spans")  # of doccano, spaCy and Prodigy


def as_words(record: Record, words: str, tags: str | None) -> Record:
    """The same record, with words and BIO tags if it has none but a ``text`` with spans.

    A span is [start, end, type], or an object with ``start``, ``end`` and ``label``. A word is
    letters and digits, or another character; a span that begins or ends inside of one cuts it.
    """
    text = record.fields.get("text")
    if words in record.fields or not isinstance(text, str):
        return record
    name = next((name for name in _FIELDS if name in record.fields), None)
    if tags is not None and name is None:
        return record
    given = (record.fields[name] if name and tags else None) or []
    spans = [_span(span, text, f"{record.origin}: {name}") for span in given]
    spans = sorted(set(spans))
    for one, other in pairwise(spans):
        if other[0] < one[1]:
            raise InputError(
                f"{record.origin}: {name} has spans that overlap, {list(one)} and {list(other)}; a "
                "word has one tag: leave one out"
            )
    cuts = {edge for start, end, _ in spans for edge in (start, end)}
    found: list[tuple[str, str]] = []
    for word in re.finditer(r"\w+|[^\w\s]", text):
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


def _span(span: Any, text: str, where: str) -> tuple[int, int, str]:
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
    if not 0 <= start < end <= len(text) or not text[start:end].strip():
        raise InputError(
            f"{where} holds {[start, end, kind]}, where there is no text: the text has "
            f"{len(text)} characters"
        )
    return start, end, kind
