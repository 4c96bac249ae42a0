"""Where labelled data comes from: one dataclass for each kind of file.

Every source has ``records()``, always in the same order, and ``fingerprint()``, a sha256 of all
that decides them.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.data import files, tabular
from jaxlm.data.labelled import formats, lists
from jaxlm.data.labelled.formats import Row
from jaxlm.data.tfds import Tfds
from jaxlm.errors import InputError, note

_ID = r"\d+([-.]\d+)?"  # of a word of CoNLL-U, a range of them, or an empty one


@dataclass(frozen=True, kw_only=True)
class Record:
    """The fields of one record, and where it comes from, for errors."""

    fields: dict[str, Any]
    origin: str
    fault: InputError | None = None
    """Why it has no fields, where it cannot be read; raised by who asks for one."""

    def value(self, name: str) -> Any:
        """A field; one that is missing raises."""
        if self.fault is not None:
            raise InputError(str(self.fault))
        if name in self.fields:
            return self.fields[name]
        hint = "check the column's name, the header and the delimiter"
        if len(self.fields) == 1:
            (only,) = self.fields
            if found := [mark for mark in ";\t|," if mark in only]:
                hint = f"set the delimiter to {found[0]!r}"
            raise InputError(
                f"{self.origin}: no field {name!r}, but a single one, {only!r:.60}; {hint}"
            )
        alike = name.replace(".", "/").casefold()  # of objects inside of others, json_record
        if near := [x for x in self.fields if f"/{x.casefold()}".endswith(f"/{alike}")]:
            hint = f"did you mean {near[0]!r}?"
        names = ", ".join(f"{field!r:.40}" for field in self.fields)
        raise InputError(f"{self.origin}: no field {name!r} among {names or 'none'}; {hint}")

    def text(self, name: str) -> str:
        """A field that holds text; one without a visible character raises."""
        text = tabular.check_text(self.value(name), f"field {name!r}", self.origin)
        if not text.strip():
            raise InputError(f"{self.origin}: field {name!r} is empty; remove the record")
        if text == name and len(self.fields) > 1 and all(k == v for k, v in self.fields.items()):
            raise InputError(
                f"{self.origin}: the columns' names stand here again, as where files with headers "
                "are joined; remove the line"
            )
        return text

    def texts(self, name: str) -> list[str]:
        """A field that holds a list of texts, also as text, or text to be split at white space."""
        value = self.value(name)
        if isinstance(value, str):
            value = lists.split(value, f"{self.origin}: field {name!r}")
        if not isinstance(value, list):
            raise InputError(f"{self.origin}: field {name!r} is {value!r:.40}, which is not a list")
        what = f"an entry of field {name!r}"
        return [tabular.check_text(item, what, self.origin) for item in value]


Paths = str | tuple[str, ...]


def first_path(paths: Paths) -> str:
    """The only one, or the first of several."""
    return paths if isinstance(paths, str) else paths[0]


@dataclass(frozen=True, kw_only=True)
class Table:
    """CSV or TSV; files that hold JSON, fastText's lines or a Parquet table are read as these."""

    path: Paths
    """A file, several, a folder of them, or a pattern such as 'shards/*.csv'."""
    delimiter: str | None = None
    """What separates columns; None means what a first line such as sep=; says, else a tab for .tsv
    files and a comma for all others."""
    header: bool = True
    """The first line names the columns."""
    columns: tuple[str, ...] | None = None
    """Names for the columns of a table without header; None means '0', '1' and so on."""
    quoting: tabular.Quoting | None = None
    """How a quotation mark stands inside of quoted fields: doubled or after a backslash; 'none':
    nothing is quoted. None: double, but none between tabs if not all of such a file is well
    formed."""
    encoding: str | None = None
    """What the file is written in, such as windows-1252; None: UTF-8, or UTF-16 where it is."""

    def __post_init__(self) -> None:
        if self.header and self.columns is not None:
            raise InputError(
                f"columns={self.columns} are given for {self.path}, whose header names them; "
                "leave them out, or set header to False"
            )

    def records(self) -> Iterator[Record]:
        """One for each row; blank lines are skipped."""
        return _records(self.path, self.encoding, self._rows)

    def _rows(self, path: Path) -> Iterator[Row]:
        dialect = self._dialect(path)
        if dialect.delimiter == "\t" and dialect.quoting != "none" and self.quoting is None:
            note(f"{path}: fields are quoted, and are read without the quotation marks around them")
        rows = tabular.read_table(path, dialect, header=self.header, encoding=self.encoding)
        names = self.columns
        for origin, row in rows:
            if isinstance(row, InputError):
                yield origin, row
                continue
            if names is None and self.header:
                names = _names(row, origin)
                continue
            names = names or tuple(map(str, range(len(row))))
            if len(names) != len(row):
                raise InputError(f"{origin}: {len(row)} fields for {len(names)} columns={names}")
            yield origin, dict(zip(names, row, strict=True))

    def has_columns(self, names: Collection[str]) -> bool:
        """Whether the header has one of these; a table without header has any."""
        path = find_all(self.path)[0]
        try:
            rows = tabular.read_table(path, self._dialect(path), encoding=self.encoding)
            _, first = next(rows, ("", []))
        except InputError:
            return False
        return not self.header or (isinstance(first, list) and any(x in names for x in first))

    def _dialect(self, path: Path) -> tabular.Dialect:
        return tabular.dialect_of(path, self.delimiter, self.quoting, self.encoding)

    def fingerprint(self) -> str:
        """A sha256 of contents and settings, but not of the file's name."""
        paths = find_all(self.path)
        if formats.kind_of(paths[0], self.encoding) is None:
            first, *rest = self._dialect(paths[0]).names()
        else:
            first, rest = tabular.delimiter_of(paths[0], self.delimiter), []
        settings = (first, str(self.header), *(self.columns or ()), *rest)
        return files.sha256(paths, "table", *settings, *files.given(self.encoding))


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """One JSON object a line, or one array of them, or the rows of a Parquet or Arrow file.

    The field 'b' of an object under 'a' is named 'a/b'.
    """

    path: Paths
    """A file, several, a folder of them, or a pattern such as 'shards/*.jsonl'."""
    encoding: str | None = None
    """What the file is written in, such as windows-1252; None: UTF-8, or UTF-16 where it is."""

    def records(self) -> Iterator[Record]:
        """One for each line or object; blank lines are skipped."""
        return _records(self.path, self.encoding, self._rows)

    def _rows(self, path: Path) -> Iterator[Row]:
        if files.ending(path) in (".csv", ".tsv"):
            return Table(path=str(path), encoding=self.encoding)._rows(path)
        return tabular.read_json_lines(path, encoding=self.encoding)

    def fingerprint(self) -> str:
        """A sha256 of the contents, but not of the file's name."""
        return files.sha256(find_all(self.path), "jsonl", *files.given(self.encoding))


@dataclass(frozen=True, kw_only=True)
class Conll:
    """One word and its tag a line, in columns, with a blank line between sentences.

    Columns are separated by tabs, or else by spaces. The fields of a sentence are ``tokens`` and
    ``tags``. Lines that begin with -DOCSTART-, comments (a # and no tag), and the ranges (1-2) and
    empty words (8.1) of CoNLL-U are skipped.
    """

    path: Paths
    """A file, several, a folder of them, or a pattern such as 'shards/*.conll'."""
    token_column: int = 0
    """Which column holds the word, from 0."""
    tag_column: int | None = -1
    """Which holds the tag, where -1 is the last; None: there are no tags."""
    encoding: str | None = None
    """What the file is written in, such as windows-1252; None: UTF-8, or UTF-16 where it is."""

    def records(self) -> Iterator[Record]:
        """One for each sentence."""
        return _records(self.path, self.encoding, self._rows)

    def _rows(self, path: Path) -> Iterator[Row]:
        sentence: list[list[str]] = []
        start, width = 1, None
        for number, cells, kind in self._lines(path):
            if kind == "word":
                width = width or len(cells)
                if len(cells) != width:
                    raise InputError(
                        f"{path}:{number}: {len(cells)} columns where there were {width} before"
                    )
                start = start if sentence else number
                sentence.append(self._chosen(cells, f"{path}:{number}"))
            elif kind == "end" and sentence:
                yield f"{path}:{start}", self._fields(sentence)
                sentence = []

    def notes(self) -> list[str]:
        """A line on what was skipped, if anything."""
        words = [path for path in find_all(self.path) if not formats.kind_of(path, self.encoding)]
        kinds = Counter(kind for path in words for _, _, kind in self._lines(path))
        skipped = {
            "comment": "comments (a # and no tag)",
            "range": "ranges and empty words of CoNLL-U (1-2, 8.1)",
        }
        found = [f"{kinds[kind]:,} {name}" for kind, name in skipped.items() if kinds[kind]]
        return [f"{self.path}: skipped {' and '.join(found)}"] if found else []

    def _lines(self, path: Path) -> Iterator[tuple[int, list[str], str]]:
        """Number, cells and kind of each line: word, end (of a sentence), comment or range."""
        # The last sentence need not end in a blank line.
        lines = [*files.lines(path, encoding=self.encoding), ""]
        words = [li for li in lines if li.strip() and not li.startswith(("#", "-DOCSTART-"))]
        cells = [_cells(line) for line in words]
        width = Counter(map(len, cells)).most_common(1)[0][0] if cells else None
        tabs = any("\t" in line for line in words)
        tag = self.tag_column
        tags = {x for own in cells for x in ([] if tag is None else own[tag:][:1])}
        numbered = self.token_column > 0 and all(re.fullmatch(_ID, own[0]) for own in cells)
        inside = False
        for number, line in enumerate(lines, start=1):
            own = _cells(line)
            if not line.strip(None if width != 1 else " \t\r") or line.startswith("-DOCSTART-"):
                kind = "end"
            elif line[0] == "#" and (
                (tabs and "\t" not in line)
                or len(own) != (width or len(own))
                or (
                    own[0] == "#"
                    and not inside
                    and tag is not None
                    and not tags.issuperset(own[tag:][:1])
                )
            ):
                kind = "comment"
            elif numbered and not own[0].isdecimal():
                kind = "range"
            else:
                kind = "word"
            inside = kind == "word" or (inside and kind != "end")
            yield number, own, kind

    def _chosen(self, cells: list[str], origin: str) -> list[str]:
        columns = [self.token_column, *([] if self.tag_column is None else [self.tag_column])]
        if any(not -len(cells) <= column < len(cells) for column in columns):
            raise InputError(f"{origin}: no column {max(columns)} among {len(cells)} (from 0)")
        if len({column % len(cells) for column in columns}) < len(columns):
            raise InputError(
                f"{origin}: the word and its tag are both column {self.token_column}, because "
                f"there are {len(cells)} columns; separate them by tabs or spaces"
            )
        chosen = [cells[column] for column in columns]
        if not all(chosen):
            raise InputError(f"{origin}: an empty word or tag in {cells!r:.60}")
        return chosen

    def _fields(self, sentence: list[list[str]]) -> dict[str, Any]:
        names = ("tokens",) if self.tag_column is None else ("tokens", "tags")
        columns = zip(*sentence, strict=True)
        return {name: list(column) for name, column in zip(names, columns, strict=True)}

    def begins_with(self, tags: Collection[str]) -> bool:
        """Whether the first line is a word alone, or has one of ``tags``; ordinary text has not."""
        first = find_all(self.path)[0]
        lines = (line for line in files.lines(first, encoding=self.encoding) if line.strip())
        cells = next((_cells(line) for line in lines if not line.startswith("-DOCSTART-")), [])
        tag = [] if self.tag_column is None else cells[self.tag_column :][:1]
        return len(cells) == 1 or any(cell in tags for cell in tag)

    def fingerprint(self) -> str:
        """A sha256 of contents and settings, but not of the file's name."""
        columns = (str(self.token_column), str(self.tag_column))
        return files.sha256(find_all(self.path), "conll", *columns, *files.given(self.encoding))


@dataclass(frozen=True, kw_only=True)
class Squad:
    """Questions on paragraphs, in the JSON form of SQuAD 1.1 and 2.0, or a flat list of them.

    The fields are ``id``, ``question``, ``context``, ``answers/text``, ``answers/answer_start``
    (lists of the same length, empty where there is no answer; neither where answers are not given)
    and ``is_impossible``.
    """

    path: Paths
    """A file, several, a folder of them, or a pattern."""

    def records(self) -> Iterator[Record]:
        """One for each question."""
        return _records(self.path, None, formats.read_json)

    def fingerprint(self) -> str:
        """A sha256 of the contents, but not of the file's name."""
        return files.sha256(find_all(self.path), "squad")


@dataclass(frozen=True, kw_only=True)
class TfdsRecords:
    """A data set of TensorFlow Datasets, by name; classes are given by their names."""

    name: str
    """Name of the data set, such as 'glue/sst2' or 'squad'."""
    split: str = "train"
    """A split, or a slice of one: 'train[:10%]', 'train+test'."""
    data_dir: str | None = None
    """Folder of data sets; None: the default, ~/tensorflow_datasets."""

    def records(self) -> Iterator[Record]:
        """One for each example; the field 'b' of a group under 'a' is named 'a/b'."""
        for number, fields in enumerate(self._source().records()):
            yield json_record(fields, f"{self.name} {self.split}:{number}")

    def fingerprint(self) -> str:
        """A sha256 of the data set's description and the settings."""
        return self._source().fingerprint()

    def _source(self) -> Tfds:
        return Tfds(name=self.name, split=self.split, data_dir=self.data_dir)


def json_record(fields: Mapping[str, Any], origin: str) -> Record:
    """The record of a JSON object; the field 'b' of an object under 'a' is named 'a/b'."""
    try:
        return Record(fields=_flat(fields), origin=origin)
    except RecursionError as error:
        raise InputError(f"{origin}: too many objects inside of each other") from error


def _records(
    paths: Paths, encoding: str | None, rows: Callable[[Path], Iterable[Row]]
) -> Iterator[Record]:
    """The records of all files; ``rows`` are those of a file whose bytes do not say what it is."""
    for path in find_all(paths):
        count = 0
        for origin, fields in formats.read(path, encoding) or rows(path):
            if isinstance(fields, InputError):
                yield Record(fields={}, origin=origin, fault=fields)
            else:
                yield json_record(fields, origin)
            count += 1
        if count == 0:
            raise InputError(f"{path} holds no records; is it the right file?")


def find_all(paths: Paths) -> list[Path]:
    """The files of all names."""
    names = (paths,) if isinstance(paths, str) else paths
    if not names:
        raise InputError("path names no file; give at least one")
    return [path for name in names for path in files.find(name)]


def _names(row: list[str], origin: str) -> tuple[str, ...]:
    """The names of columns; those without are numbered, from 0, as pandas does."""
    names = [name if name.strip() else f"Unnamed: {i}" for i, name in enumerate(row)]
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"{origin}: the header names {name!r} {times} times; rename one, or set header to "
            "False if there is none"
        )
    return tuple(names)


def _cells(line: str) -> list[str]:
    if "\t" in line:
        return [cell.strip(" \r") for cell in line.split("\t")]  # an odd space may be a word
    return re.split(" +", line.strip(" "))  # not at every white space: a word may be one


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        nested = isinstance(value, Mapping)
        flat |= {f"{name}/{k}": x for k, x in _flat(value).items()} if nested else {name: value}
    return flat
