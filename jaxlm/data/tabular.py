"""Tables and JSON lines, with errors that name the file and the line."""

import csv
import json
import math
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxlm.data import files
from jaxlm.data.files import OnRead, ignore
from jaxlm.errors import InputError

Quoting = Literal["double", "backslash", "none"]


_SEPARATOR = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)  # a first line that Excel obeys


def delimiter_of(path: Path, delimiter: str | None) -> str:
    """What separates columns; None means what a first line such as sep=; says, else a tab for .tsv
    files and a comma for all others."""
    if delimiter is None:
        first = files.head(path).split(b"\n")[0].decode(errors="ignore").removeprefix("\ufeff")
        if said := _SEPARATOR.fullmatch(first):
            return said[1]
        return "\t" if files.ending(path) == ".tsv" else ","
    delimiter = "\t" if delimiter == r"\t" else delimiter  # as a command line has it
    if len(delimiter) != 1:
        raise InputError(f"delimiter {delimiter!r} is not one character")
    return delimiter


class Dialect(NamedTuple):
    """How a table is written."""

    delimiter: str
    quoting: Quoting = "double"
    spaced: bool = False  # spaces before a field are none of it, as in: "a", "b"

    def names(self) -> list[str]:
        """What a fingerprint is made of: the delimiter, and what is unlike what it implies."""
        usual = Dialect(self.delimiter, "none" if self.delimiter == "\t" else "double")
        return [self.delimiter, *map(str, () if self == usual else self[1:])]

    def rows(self, lines: Iterable[str]) -> Any:
        """A reader of rows."""
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            quoting=csv.QUOTE_NONE if self.quoting == "none" else csv.QUOTE_MINIMAL,
            doublequote=self.quoting == "double",
            escapechar="\\" if self.quoting == "backslash" else None,
            skipinitialspace=self.spaced,
            strict=True,
        )


def dialect_of(
    path: Path, delimiter: str | None, quoting: Quoting | None, encoding: str | None = None
) -> Dialect:
    """That of a file.

    Between tabs a quotation mark is an ordinary character, unless every field that begins with one
    is well formed, as pandas, Excel and R write them.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 kB
    plain = Dialect(delimiter_of(path, delimiter), quoting or "double")
    if quoting is None and plain.delimiter == "\t":
        return plain if _is_quoted(path, plain, encoding) else plain._replace(quoting="none")
    first = files.head(path, encoding).decode(errors="ignore")
    if quoting != "none" and re.search(re.escape(plain.delimiter) + ' +"', first):
        spaced = plain._replace(spaced=True)
        fields, widths = _survey(path, plain, encoding)
        if (fields or len(widths) != 1) and len(_survey(path, spaced, encoding)[1]) == 1:
            return spaced
    return plain


def _lines(path: Path, encoding: str | None, on_read: OnRead = ignore) -> Iterator[str]:
    """As csv reads them; a carriage return inside of a line is white space, and Excel's sep= in the
    first is nothing."""
    for number, line in enumerate(files.lines(path, on_read, encoding)):
        is_mark = number == 0 and _SEPARATOR.fullmatch(line)
        yield "\n" if is_mark else line.replace("\r", " ") + "\n"


def _survey(path: Path, dialect: Dialect, encoding: str | None) -> tuple[int, set[int]]:
    """How many fields begin with a space and a quotation mark, and how many fields rows have."""
    fields, widths = 0, set()
    try:
        for row in dialect.rows(_lines(path, encoding)):
            fields += sum(field.lstrip(" ").startswith('"') and field[0] == " " for field in row)
            widths |= {len(row)} if row else set()
    except csv.Error:
        return 0, set()
    return fields, widths


def _widths(path: Path, dialect: Dialect, encoding: str | None) -> list[int]:
    """How many fields each row has; none where one cannot be read."""
    try:
        return [len(row) for row in dialect.rows(_lines(path, encoding)) if row]
    except csv.Error:
        return []


def _is_quoted(path: Path, dialect: Dialect, encoding: str | None) -> bool:
    """Whether fields are quoted, and all rows have equally many of them if they are unquoted.

    Where that would join lines that are rows by themselves, it is none.
    """
    plain: set[int] = set()
    marks = False

    def watched() -> Iterator[str]:
        nonlocal marks
        for line in _lines(path, encoding):
            plain.update([line.count(dialect.delimiter)] if line.strip("\n") else [])
            marks = marks or '"' in line
            yield line

    reader, widths, count = dialect.rows(watched()), set(), 0
    try:
        for row in reader:
            widths |= {len(row)} if row else set()
            count += 1
    except csv.Error:
        return False
    return marks and len(widths) == 1 and (len(plain) > 1 or reader.line_num == count)


def read_table(
    path: Path,
    dialect: Dialect,
    *,
    header: bool = True,
    encoding: str | None = None,
    on_read: OnRead = ignore,
) -> Iterator[tuple[str, list[str] | InputError]]:
    """Origin (file:line) and the fields of every row, the header's too; blank lines are skipped.

    Spaces around names in a header are none of them. A row that has not as many fields as the
    first, or whose quoting is malformed, gives the error instead; the next is looked for in the
    line behind its first.
    """
    lines = _Record(_lines(path, encoding, on_read))
    reader, count, way_out = dialect.rows(lines), None, None
    while True:
        origin = f"{path}:{lines.begin()}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            way_out = way_out or _way_out(path, dialect, encoding)
            fault = InputError(f"{origin}: malformed quoting ({error}); {way_out}")
            if count is None:
                raise fault from error
            lines.give_back()
            reader = dialect.rows(lines)
            yield origin, fault
            continue
        if row is None:
            return
        if not row:
            continue
        if count is None:
            count = len(row)
            row = [name.strip() for name in row] if header else row
        if len(row) == count:
            yield origin, row
            continue
        first = "the header" if header else "the first line"
        if len(row) > count and not any(row[count:]):
            hint = f"take {dialect.delimiter!r} from the end of the line"
        else:
            hint = way_out = way_out or _way_out(path, dialect, encoding)
        yield (
            origin,
            InputError(f"{origin}: {len(row)} fields where {first} has {count}; {hint}"),
        )


class _Record:
    """Lines for a reader of rows, which may take back all but the first of a row's."""

    def __init__(self, lines: Iterator[str]):
        self._lines = lines
        self._next: deque[str] = deque()
        self._taken: list[str] = []
        self._number = 1

    def __iter__(self) -> "_Record":
        return self

    def __next__(self) -> str:
        line = self._next.popleft() if self._next else next(self._lines)
        self._taken.append(line)
        return line

    def begin(self) -> int:
        """The number of the next row's first line; a quoted field may span lines."""
        self._number += len(self._taken)
        self._taken.clear()
        return self._number

    def give_back(self) -> None:
        """A quotation mark too many has joined them to a row that is none: read them anew."""
        self._next.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]


def _way_out(path: Path, dialect: Dialect, encoding: str | None) -> str:
    """The settings by which all rows have equally many fields, or else what to correct."""
    ways = {
        f"set the delimiter to {other!r}": Dialect(other, "none" if other == "\t" else "double")
        for other in ";\t|,"
        if other != dialect.delimiter
    }
    escaped = any('\\"' in line for line in _lines(path, encoding))
    for quoting in ("double", *(["backslash"] if escaped else []), "none"):
        ways[f"set quoting to {quoting}"] = dialect._replace(quoting=quoting)
    for way, other in ways.items():
        widths = _survey(path, other, encoding)[1]
        if other != dialect and len(widths) == 1 and min(widths) > 1:
            return way
    first, *others = _widths(path, dialect, encoding) or (0,)
    if len(set(others)) == 1 < len(others) and first == others[0] - 1:
        return (
            "all other lines have one field more than the first: name the first column as well "
            "there (R leaves out that of row names), or remove the line, if it is a title"
        )
    if len(set(others)) == 1 < len(others) and first != others[0]:
        return f"all other lines have {others[0]}: remove the first, if it is a title or a comment"
    if dialect.quoting == "none":
        return f"take {dialect.delimiter!r} and line breaks out of the fields, or quote these"
    return (
        f"quote the fields that contain {dialect.delimiter!r} or a line break, and double the "
        "quotation marks inside of them"
    )


def read_json_lines(
    path: Path, on_read: OnRead = ignore, encoding: str | None = None
) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    """Origin (file:line) and the object of every line, or its error; blank lines are skipped."""
    for number, line in enumerate(files.lines(path, on_read, encoding), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            yield origin, read_json_line(line, origin)
        except InputError as error:
            yield origin, error


def read_arrow(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Origin (file: row) and the fields of every row of a Parquet or Arrow file.

    Numbers of classes are given by their names, where the file has these as `datasets` writes them.
    """
    import pyarrow  # comes with tensorflow-datasets, and is slow to import
    from pyarrow import ipc, parquet

    first, number = files.head(path), 0
    try:
        with path.open("rb") as file:
            if first.startswith(files.PARQUET):
                batches = parquet.ParquetFile(file).iter_batches()
            elif first.startswith(files.ARROW):
                reader = ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = ipc.open_stream(file)
            for batch in batches:
                names = _class_names(batch.schema.metadata or {})
                for row in batch.to_pylist():
                    number += 1
                    named = {name: _named(row.get(name), own) for name, own in names.items()}
                    yield f"{path}: row {number}", row | named
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} cannot be read ({error!s:.80}); copy it again") from error


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names of classes, for each column that holds their numbers, or lists of these."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {}
        for column, feature in features.items():
            feature = feature[0] if isinstance(feature, list) else feature
            feature = feature.get("feature") or feature  # of a list's items
            if feature.get("_type") == "ClassLabel" and feature.get("names"):
                found[column] = list(map(str, feature["names"]))
        return found
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return {}


def _named(value: Any, names: Sequence[str]) -> Any:
    """Numbers as names; -1, which stands for no label, as None."""
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if type(value) is not int or value >= len(names):
        return value
    return names[value] if value >= 0 else None


def read_json_line(line: str, origin: str) -> dict[str, Any]:
    """The object of a line."""
    try:
        record = parse_json(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{origin}: not JSON ({error.msg} at column {error.colno}); every line must be one "
            "JSON object"
        ) from error
    if not isinstance(record, dict):
        raise InputError(f"{origin}: a JSON {type(record).__name__} where an object is expected")
    return record


def parse_json(text: str) -> Any:
    """The value; also what Python cannot read, though it is JSON, raises a JSONDecodeError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise json.JSONDecodeError("too many brackets inside of each other", text, 0) from error
    except ValueError as error:  # of so many digits Python makes no integer
        number = re.search(r"\d{4301}", text)
        start = number.start() if number else 0
        raise json.JSONDecodeError("a number of too many digits", text, start) from error


def json_text(value: Any) -> str:
    """JSON in a line, as UTF-8 holds it: halves of surrogate pairs are escapes, and numbers that
    are not finite null. What JSON has no word for, such as a date, is its text."""
    options: dict[str, Any] = {"ensure_ascii": False, "default": str}
    try:
        text = json.dumps(value, allow_nan=False, **options)
    except ValueError:
        text = json.dumps(_finite(value), **options)
    return escaped(text)


def escaped(text: str) -> str:
    """With halves of surrogate pairs, which are no characters, as escapes."""
    return text.encode(errors="backslashreplace").decode()


def is_plain(value: Any) -> bool:
    """Whether :func:`json_text` writes it as it is."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False, default=str).encode()
    except ValueError:  # one that cannot be encoded is a ValueError, too
        return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_field(fields: Mapping[str, Any], name: str, origin: str) -> str:
    """The text under a name; what is missing or is no text raises."""
    if name not in fields:
        raise InputError(
            f"{origin}: no field {name!r} among {', '.join(map(repr, fields)) or 'none'}; "
            "name the one that holds the text"
        )
    return check_text(fields[name], f"field {name!r}", origin)


def check_text(value: Any, what: str, origin: str) -> str:
    """The value, if it is text that UTF-8 can write."""
    if not isinstance(value, str):
        raise InputError(f"{origin}: {what} is {value!r:.40}, which is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{origin}: {what} holds half of a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}), which is not a character; remove it"
        ) from error
    return value
