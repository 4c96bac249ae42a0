"""Files whose first bytes say how they are written: JSON, fastText's lines, Parquet and Arrow."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxlm.data import files, tabular
from jaxlm.errors import InputError

Row = tuple[str, dict[str, Any] | InputError]  # where it stands, and its fields or its error
# A word of CoNLL may be a bracket, too.
_JSON = re.compile(r'\s*(\{\s*["}]|\[\s*(\{\s*["}]|\]\s*$))')
_FASTTEXT = re.compile(r"__label__\S+\s")


def kind_of(path: Path, encoding: str | None) -> Literal["arrow", "json", "fasttext"] | None:
    """What a file is, whatever its name; None where it may be anything."""
    first = files.head(path, encoding)
    if first.startswith((files.PARQUET, files.ARROW, files.ARROW_STREAM)):
        return "arrow"
    text = first.decode(errors="ignore").removeprefix("\ufeff")
    if _JSON.match(text):
        return "json"
    return "fasttext" if _FASTTEXT.match(text) else None


def read(path: Path, encoding: str | None) -> Iterator[Row] | None:
    """The rows of such a file."""
    match kind_of(path, encoding):
        case "arrow":
            return tabular.read_arrow(path)
        case "json":
            return read_json(path, encoding)
        case "fasttext":
            return _read_fasttext(path, encoding)


def _read_fasttext(path: Path, encoding: str | None) -> Iterator[Row]:
    """``text``, and ``label``, a list where there are several: __label__a __label__b A text."""
    for number, line in enumerate(files.lines(path, encoding=encoding), start=1):
        labels = []
        while found := re.match(r"__label__(\S+)\s*", line):
            labels.append(found[1])
            line = line[found.end() :]
        if labels or line.strip():
            label = labels[0] if len(labels) == 1 else labels
            yield f"{path}:{number}", {"text": line, "label": label}


def read_json(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """Objects a line, those of one array, or the questions of SQuAD's form."""
    if is_document(path, encoding):
        yield from _read_document(path, encoding)
    else:
        for origin, entry in tabular.read_json_lines(path, encoding=encoding):
            yield origin, entry if isinstance(entry, InputError) else _with_columns(entry)


def is_document(path: Path, encoding: str | None = None) -> bool:
    """Whether it is one value, and no object a line, which may have a field 'data' as well."""
    lines = (text for line in files.lines(path, encoding=encoding) if (text := line.strip()))
    first = next(lines, "[")
    if first.startswith("["):
        return True
    try:
        value = tabular.parse_json(first)
    except json.JSONDecodeError:
        return not first.endswith("}")  # it goes on in the next line
    if isinstance(value, dict) and not isinstance(value.get("data"), list):
        return False
    return next(lines, None) is None


def _read_document(path: Path, encoding: str | None) -> Iterator[Row]:
    try:
        value = tabular.parse_json("\n".join(files.lines(path, encoding=encoding)))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    entries = value.get("data") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise InputError(
            f"{path}: no list 'data' at its top, as in SQuAD's form, no list of objects, and no "
            "object a line; pandas writes that by to_json(orient='records', lines=True)"
        )
    count = 0
    for number, entry in enumerate(entries, start=1):
        try:
            nested = isinstance(entry, dict) and "paragraphs" in entry
            rows = _questions(entry, path) if nested else [_flat(entry, path, number)]
            for row in rows:
                yield row
                count += 1
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: {error} is missing or wrong after {count} questions; in SQuAD's form "
                "paragraphs have a context and qas, and these an id, a question and answers"
            ) from error


def _flat(entry: Any, path: Path, number: int) -> Row:
    origin = f"{path}: record {number}"
    if not isinstance(entry, dict):
        raise InputError(f"{origin}: a JSON {type(entry).__name__} where an object is expected")
    return origin, _with_columns(entry)


def _with_columns(entry: dict[str, Any]) -> dict[str, Any]:
    """A record as it is, but answers in a list as lists of their texts and starts."""
    answers = entry.get("answers")
    if not isinstance(answers, list) or not answers:
        return entry
    if not all(isinstance(x, dict) and {"text", "answer_start"} <= x.keys() for x in answers):
        return entry
    return entry | {"answers": _columns(answers)}


def _columns(answers: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}


def _questions(article: Mapping[str, Any], path: Path) -> Iterator[Row]:
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
                fields["answers"] = _columns([] if impossible else question["answers"])
            yield f"{path}: question {question['id']!r}", fields
