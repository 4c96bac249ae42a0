"""Tables and JSON lines, with errors that name the file and the line."""

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.data import files
from jaxlm.data.files import OnRead, ignore
from jaxlm.errors import InputError


def delimiter_of(path: Path, delimiter: str | None) -> str:
    """What separates columns; None means a tab for .tsv files and a comma for all others."""
    if delimiter is None:
        return "\t" if path.suffix.lower() == ".tsv" else ","
    if len(delimiter) != 1:
        raise InputError(f"delimiter {delimiter!r} is not one character")
    return delimiter


def read_table(
    path: Path, delimiter: str, *, header: bool = True, on_read: OnRead = ignore
) -> Iterator[tuple[str, list[str]]]:
    """Origin (file:line) and the fields of every row, the header's too; blank lines are skipped.

    All rows have as many fields as the first. Fields may be quoted with ", except between tabs,
    where a quotation mark is an ordinary character.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 kB
    lines = (line + "\n" for line in files.lines(path, on_read))
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    count, number = None, 1
    try:
        for row in rows:
            origin = f"{path}:{number}"
            number = rows.line_num + 1  # a quoted field may span lines
            if not row:
                continue
            count = count or len(row)
            if len(row) != count:
                first = "the header" if header else "the first line"
                raise InputError(
                    f"{origin}: {len(row)} fields where {first} has {count}; "
                    f"quote the fields that contain {delimiter!r}, or set the delimiter"
                )
            yield origin, row
    except csv.Error as error:
        raise InputError(
            f"{path}:{number}: malformed quoting ({error}); double the quotation marks inside of "
            f"quoted fields, and set the delimiter if it is not {delimiter!r}"
        ) from error


def read_json_lines(path: Path, on_read: OnRead = ignore) -> Iterator[tuple[str, dict[str, Any]]]:
    """Origin (file:line) and the object of every line; blank lines are skipped."""
    for number, line in enumerate(files.lines(path, on_read), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        yield origin, read_json_line(line, origin)


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
