"""Where labelled data comes from: one dataclass for each kind of file.

Every source has ``records()``, always in the same order, and ``fingerprint()``, a sha256 of all
that decides them.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.data import files, tabular
from jaxlm.data.tfds import Tfds
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Record:
    """The fields of one record, and where it comes from, for errors."""

    fields: dict[str, Any]
    origin: str

    def value(self, name: str) -> Any:
        """A field; one that is missing raises."""
        if name in self.fields:
            return self.fields[name]
        hint = "check the column's name, the header and the delimiter"
        if len(self.fields) == 1:
            (only,) = self.fields
            raise InputError(
                f"{self.origin}: no field {name!r}, but a single one, {only!r:.60}; {hint}"
            )
        names = ", ".join(f"{field!r:.40}" for field in self.fields)
        raise InputError(f"{self.origin}: no field {name!r} among {names or 'none'}; {hint}")

    def text(self, name: str) -> str:
        """A field that holds text; one without a visible character raises."""
        text = tabular.check_text(self.value(name), f"field {name!r}", self.origin)
        if not text.strip():
            raise InputError(f"{self.origin}: field {name!r} is empty; remove the record")
        return text

    def texts(self, name: str) -> list[str]:
        """A field that holds a list of texts, or text that is split at white space."""
        value = self.value(name)
        if isinstance(value, str):
            value = value.split()
        if not isinstance(value, list):
            raise InputError(f"{self.origin}: field {name!r} is {value!r:.40}, which is not a list")
        what = f"an entry of field {name!r}"
        return [tabular.check_text(item, what, self.origin) for item in value]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A CSV or TSV file."""

    path: str
    """Path of the file."""
    delimiter: str | None = None
    """What separates columns; None means a tab for .tsv files and a comma for all others."""
    header: bool = True
    """The first line names the columns."""
    columns: tuple[str, ...] | None = None
    """Names for the columns of a table without header; None means '0', '1' and so on."""

    def __post_init__(self) -> None:
        if self.header and self.columns is not None:
            raise InputError(
                f"columns={self.columns} are given for {self.path}, whose header names them; "
                "leave them out, or set header to False"
            )

    def records(self) -> Iterator[Record]:
        """One for each row; blank lines are skipped."""
        path = _file(self.path)
        delimiter = tabular.delimiter_of(path, self.delimiter)
        rows = tabular.read_table(path, delimiter, header=self.header)
        names = self.columns
        count = 0
        for origin, row in rows:
            if names is None and self.header:
                names = tuple(row)
                _check_names(names, origin)
                continue
            names = names or tuple(map(str, range(len(row))))
            if len(names) != len(row):
                raise InputError(f"{origin}: {len(row)} fields for {len(names)} columns={names}")
            yield Record(fields=dict(zip(names, row, strict=True)), origin=origin)
            count += 1
        _check_count(count, self.path)

    def fingerprint(self) -> str:
        """A sha256 of contents and settings, but not of the file's name."""
        path = _file(self.path)
        settings = (tabular.delimiter_of(path, self.delimiter), str(self.header))
        return files.sha256([path], "table", *settings, *(self.columns or ()))


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """One JSON object a line; the field 'b' of an object under 'a' is named 'a/b'."""

    path: str
    """Path of the file."""

    def records(self) -> Iterator[Record]:
        """One for each line; blank lines are skipped."""
        count = 0
        for origin, fields in tabular.read_json_lines(_file(self.path)):
            yield json_record(fields, origin)
            count += 1
        _check_count(count, self.path)

    def fingerprint(self) -> str:
        """A sha256 of the contents, but not of the file's name."""
        return files.sha256([_file(self.path)], "jsonl")


@dataclass(frozen=True, kw_only=True)
class Conll:
    """One word and its tag a line, in columns, with a blank line between sentences.

    Columns are separated by tabs, or else by spaces. The fields of a sentence are ``tokens`` and
    ``tags``; lines that begin with -DOCSTART- are skipped.
    """

    path: str
    """Path of the file."""
    token_column: int = 0
    """Which column holds the word, from 0."""
    tag_column: int | None = -1
    """Which holds the tag, where -1 is the last; None: there are no tags."""

    def records(self) -> Iterator[Record]:
        """One for each sentence."""
        path = _file(self.path)
        sentence: list[list[str]] = []
        start, width, count = 1, None, 0
        lines = [*files.lines(path), ""]  # the last sentence need not end in a blank line
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.startswith("-DOCSTART-"):
                cells = _cells(line)
                width = width or len(cells)
                if len(cells) != width:
                    raise InputError(
                        f"{path}:{number}: {len(cells)} columns where there were {width} before"
                    )
                start = start if sentence else number
                sentence.append(self._chosen(cells, f"{path}:{number}"))
            elif sentence:
                yield self._record(sentence, f"{path}:{start}")
                sentence = []
                count += 1
        _check_count(count, self.path)

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

    def _record(self, sentence: list[list[str]], origin: str) -> Record:
        names = ("tokens",) if self.tag_column is None else ("tokens", "tags")
        columns = zip(*sentence, strict=True)
        fields = {name: list(column) for name, column in zip(names, columns, strict=True)}
        return Record(fields=fields, origin=origin)

    def begins_with(self, tags: Collection[str]) -> bool:
        """Whether the first line is a word alone, or has one of ``tags``; ordinary text has not."""
        lines = (line for line in files.lines(_file(self.path)) if line.strip())
        cells = next((_cells(line) for line in lines if not line.startswith("-DOCSTART-")), [])
        tag = [] if self.tag_column is None else cells[self.tag_column :][:1]
        return len(cells) == 1 or any(cell in tags for cell in tag)

    def fingerprint(self) -> str:
        """A sha256 of contents and settings, but not of the file's name."""
        columns = (str(self.token_column), str(self.tag_column))
        return files.sha256([_file(self.path)], "conll", *columns)


@dataclass(frozen=True, kw_only=True)
class Squad:
    """Questions on paragraphs, in the JSON form of SQuAD 1.1 and 2.0.

    The fields are ``id``, ``question``, ``context``, ``answers/text``, ``answers/answer_start``
    (lists of the same length, empty where there is no answer; neither where answers are not given)
    and ``is_impossible``.
    """

    path: str
    """Path of the file."""

    def records(self) -> Iterator[Record]:
        """One for each question."""
        path = _file(self.path)
        try:
            articles = tabular.parse_json("\n".join(files.lines(path)))["data"]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
        except (KeyError, TypeError):
            articles = None
        if not isinstance(articles, list):
            raise InputError(f"{path}: no list 'data' at its top; is it SQuAD's form?")
        count = 0
        for article in articles:
            try:
                for record in _questions(article, path):
                    yield record
                    count += 1
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path}: {error} is missing or wrong after {count} questions; in SQuAD's form "
                    "paragraphs have a context and qas, and these an id, a question and answers"
                ) from error
        _check_count(count, self.path)

    def fingerprint(self) -> str:
        """A sha256 of the contents, but not of the file's name."""
        return files.sha256([_file(self.path)], "squad")


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


def _file(name: str) -> Path:
    path = Path(name)
    try:
        found = path.is_file()
    except OSError as error:  # too long a name, or a folder that is closed
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not found:
        raise InputError(f"there is no file {name!r} (in {Path.cwd()}); check the path")
    return path


def _check_count(count: int, path: str) -> None:
    if count == 0:
        raise InputError(f"{path} holds no records; is it the right file?")


def _check_names(names: tuple[str, ...], origin: str) -> None:
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"{origin}: the header names {name!r} {times} times; rename one, or set header to "
            "False if there is none"
        )


def _cells(line: str) -> list[str]:
    if "\t" in line:
        return [cell.strip(" ") for cell in line.split("\t")]
    return re.split(" +", line.strip(" "))  # not at every white space: a word may be one


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": item for inner, item in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _questions(article: Mapping[str, Any], path: Path) -> Iterator[Record]:
    for paragraph in article["paragraphs"]:
        for question in paragraph["qas"]:
            impossible = question.get("is_impossible", False)
            if not isinstance(impossible, bool):
                raise InputError(
                    f"{path}: question {question['id']!r}: is_impossible is {impossible!r:.40}, "
                    "which is neither true nor false"
                )
            fields = {
                "id": question["id"],
                "question": question["question"],
                "context": paragraph["context"],
                "is_impossible": impossible,
            }
            if impossible or "answers" in question:
                answers = [] if impossible else question["answers"]
                for name in ("text", "answer_start"):
                    fields[f"answers/{name}"] = [answer[name] for answer in answers]
            yield Record(fields=fields, origin=f"{path}: question {question['id']!r}")
