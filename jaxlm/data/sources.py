"""Where text comes from: one dataclass for each kind of source.

Every source has the same three methods. ``documents(on_read)`` yields the texts, always in the
same order, and tells ``on_read`` how far it got; ``size()`` is the total that ``on_read`` will
have been told; ``fingerprint()`` is a sha256 of all that decides the documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxlm.data import files, tabular
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
    encoding: str | None = None
    """What the files are written in, such as windows-1252; None: UTF-8, or UTF-16 where they are
    that."""

    def documents(self, on_read: OnRead = ignore) -> Iterator[str]:
        """The texts, in order."""
        for path in files.find(self.glob):
            lines = files.lines(path, on_read, self.encoding)
            match self.document:
                case "line":
                    yield from lines
                case "file":
                    yield "\n".join(lines)
                case "paragraph":
                    yield from _paragraphs(lines)

    def size(self) -> int:
        """Total size of the files, in bytes."""
        return files.size(files.find(self.glob))

    def fingerprint(self) -> str:
        """A sha256 of contents and settings, but not of the files' names."""
        return files.sha256(
            files.find(self.glob), "text", self.document, *files.given(self.encoding)
        )


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
    """One JSON object a line, or the rows of a Parquet or Arrow file; one field is the document."""

    glob: str
    """Which files to read, such as 'dumps/*'."""
    field: str = "text"
    """The field that holds the text."""
    encoding: str | None = None
    """What the files are written in, such as windows-1252; None: UTF-8, or UTF-16 where they are
    that."""

    def documents(self, on_read: OnRead = ignore) -> Iterator[str]:
        """The texts, in order; blank lines are skipped."""
        for path in files.find(self.glob):
            for origin, record in self._records(path, on_read):
                if isinstance(record, InputError):
                    raise record
                yield tabular.text_field(record, self.field, origin)

    def size(self) -> int:
        """Total size of the files, in bytes."""
        return files.size(files.find(self.glob))

    def fingerprint(self) -> str:
        """A sha256 of contents and settings, but not of the files' names."""
        paths = files.find(self.glob)
        return files.sha256(paths, "jsonl", self.field, *files.given(self.encoding))

    def _records(
        self, path: Path, on_read: OnRead
    ) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
        if not files.head(path).startswith((files.PARQUET, files.ARROW, files.ARROW_STREAM)):
            yield from tabular.read_json_lines(path, on_read, self.encoding)
            return
        yield from tabular.read_arrow(path)
        on_read(files.size([path]))


@dataclass(frozen=True, kw_only=True)
class Csv:
    """A table with a header; one of its columns is the document."""

    glob: str
    """Which files to read, such as 'dumps/*'."""
    column: str
    """The column that holds the text, as the header spells it."""
    delimiter: str | None = None
    """What separates columns; None means what a first line such as sep=; says, else a tab for .tsv
    files and a comma for all others."""
    quoting: tabular.Quoting | None = None
    """How a quotation mark stands inside of quoted fields: doubled or after a backslash; 'none':
    nothing is quoted. None: double, but none between tabs if not all of such a file is well
    formed."""
    encoding: str | None = None
    """What the files are written in, such as windows-1252; None: UTF-8, or UTF-16 where they are
    that."""

    def documents(self, on_read: OnRead = ignore) -> Iterator[str]:
        """The texts, in order; blank lines are skipped."""
        for path in files.find(self.glob):
            yield from self._column(path, on_read)

    def _column(self, path: Path, on_read: OnRead) -> Iterator[str]:
        rows = tabular.read_table(
            path, self._dialect(path), encoding=self.encoding, on_read=on_read
        )
        origin, header = next(rows, (f"{path}:1", []))
        if isinstance(header, InputError):
            raise header
        if self.column not in header:
            raise InputError(
                f"{origin}: no column {self.column!r} among {', '.join(map(repr, header))}; "
                "name the one that holds the text, or set the delimiter"
            )
        column = header.index(self.column)
        for _, row in rows:
            if isinstance(row, InputError):
                raise row
            yield row[column]

    def _dialect(self, path: Path) -> tabular.Dialect:
        return tabular.dialect_of(path, self.delimiter, self.quoting, self.encoding)

    def size(self) -> int:
        """Total size of the files, in bytes."""
        return files.size(files.find(self.glob))

    def fingerprint(self) -> str:
        """A sha256 of contents and settings, but not of the files' names."""
        paths = files.find(self.glob)
        dialects = [name for path in paths for name in self._dialect(path).names()]
        return files.sha256(paths, "csv", self.column, *dialects, *files.given(self.encoding))


Source = PyDocs | TextFiles | Jsonl | Csv | Tfds
