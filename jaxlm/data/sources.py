"""Where text comes from: one dataclass for each kind of source.

Every source has the same three methods. ``documents(on_read)`` yields the texts, always in the
same order, and tells ``on_read`` how far it got; ``size()`` is the total that ``on_read`` will
have been told; ``fingerprint()`` is a sha256 of all that decides the documents.
"""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxlm.data import files
from jaxlm.data.files import OnRead, ignore
from jaxlm.data.pydocs import PyDocs
from jaxlm.data.tfds import Tfds
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Plain UTF-8 text."""

    glob: str
    """Which files, such as 'books/**/*.txt'; they are read in the order of their paths."""
    document: Literal["line", "paragraph", "file"] = "paragraph"
    """What one document is; paragraphs are separated by blank lines."""

    def documents(self, on_read: OnRead = ignore) -> Iterator[str]:
        """The texts, in order."""
        for path in files.find(self.glob):
            lines = files.lines(path, on_read)
            match self.document:
                case "line":
                    yield from lines
                case "file":
                    yield "\n".join(lines)
                case "paragraph":
                    yield from _paragraphs(lines)

    def size(self) -> int:
        """Bytes."""
        return files.size(files.find(self.glob))

    def fingerprint(self) -> str:
        """Of contents and settings; the files' names do not count."""
        return files.sha256(files.find(self.glob), "text", self.document)


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """One JSON object a line; one of its fields is the document."""

    glob: str
    """Which files."""
    field: str = "text"
    """The field that holds the text."""

    def documents(self, on_read: OnRead = ignore) -> Iterator[str]:
        """The texts, in order; blank lines are skipped."""
        for path in files.find(self.glob):
            for number, line in enumerate(files.lines(path, on_read), start=1):
                if line.strip():
                    yield self._text(line, f"{path}:{number}")

    def _text(self, line: str, place: str) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{place}: not JSON ({error.msg} at column {error.colno}); every line must be one "
                "JSON object"
            ) from error
        if not isinstance(record, dict):
            raise InputError(f"{place}: a JSON {type(record).__name__} where an object is expected")
        if self.field not in record:
            raise InputError(
                f"{place}: no field {self.field!r} among {', '.join(map(repr, record)) or 'none'}; "
                "name the one that holds the text"
            )
        text = record[self.field]
        if not isinstance(text, str):
            raise InputError(f"{place}: field {self.field!r} is {text!r:.40}, which is not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place}: field {self.field!r} holds half of a surrogate pair "
                f"(\\u{ord(text[error.start]):04x}), which is no character; remove it"
            ) from error
        return text

    def size(self) -> int:
        """Bytes."""
        return files.size(files.find(self.glob))

    def fingerprint(self) -> str:
        """Of contents and settings; the files' names do not count."""
        return files.sha256(files.find(self.glob), "jsonl", self.field)


@dataclass(frozen=True, kw_only=True)
class Csv:
    """A table with a header; one of its columns is the document."""

    glob: str
    """Which files."""
    column: str
    """The column that holds the text, as the header spells it."""
    delimiter: str | None = None
    """What separates columns; None means a tab for .tsv files and a comma for all others. Fields
    may be quoted with ", except between tabs, where a quotation mark is an ordinary character."""

    def documents(self, on_read: OnRead = ignore) -> Iterator[str]:
        """The texts, in order; blank lines are skipped."""
        for path in files.find(self.glob):
            yield from self._column(path, on_read)

    def _column(self, path: Path, on_read: OnRead) -> Iterator[str]:
        csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 kB
        lines = (line + "\n" for line in files.lines(path, on_read))
        delimiter = self._delimiter(path)
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            header = next(rows, [])
            if self.column not in header:
                raise InputError(
                    f"{path}:1: no column {self.column!r} among {', '.join(map(repr, header))}; "
                    "name the one that holds the text, or set the delimiter"
                )
            column = header.index(self.column)
            for row in rows:
                if row and len(row) != len(header):
                    raise InputError(
                        f"{path}:{rows.line_num}: {len(row)} fields where the header has "
                        f"{len(header)}; quote the fields that contain {delimiter!r}"
                    )
                if row:
                    yield row[column]
        except csv.Error as error:
            raise InputError(f"{path}:{rows.line_num}: malformed quoting ({error})") from error

    def _delimiter(self, path: Path) -> str:
        if self.delimiter is None:
            return "\t" if path.suffix == ".tsv" else ","
        if len(self.delimiter) != 1:
            raise InputError(f"delimiter {self.delimiter!r} is not one character")
        return self.delimiter

    def size(self) -> int:
        """Bytes."""
        return files.size(files.find(self.glob))

    def fingerprint(self) -> str:
        """Of contents and settings; the files' names do not count."""
        paths = files.find(self.glob)
        delimiters = [self._delimiter(path) for path in paths]
        return files.sha256(paths, "csv", self.column, *delimiters)


Source = PyDocs | TextFiles | Jsonl | Csv | Tfds
