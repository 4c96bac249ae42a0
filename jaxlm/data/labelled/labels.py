"""Labels: which there are, and their numbers."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from jaxlm.data import tabular
from jaxlm.data.labelled import lists, spelling
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError

# Numbers with a point, a comma or neither; or with separators of thousands.
_NUMERIC = r"[-+]?[0-9]*[.,]?[0-9]*|[-+]?[0-9]{1,3}([,_][0-9]{3})+(\.[0-9]+)?"
_SPACES = " \t\r\n"  # around a label, and not meant; what else there is, spelling.clean takes


def read_label(record: Record, name: str) -> str:
    """The label under a name, as text; numbers are written out, an empty one raises."""
    value = record.value(name)
    if isinstance(value, list | dict) or value is None or value != value:  # NaN: a missing number
        raise InputError(f"{record.origin}: {name} is {value!r:.40}, which is not a single label")
    label = tabular.check_text(str(value).strip(_SPACES), name, record.origin)
    if not spelling.clean(label):
        raise InputError(
            f"{record.origin}: {name} is {ascii(label) if label else 'empty'}"
            f"{', which nobody sees' if label else ''}; label the record, or remove it"
        )
    return label


def read_labels(record: Record, name: str, separator: str) -> tuple[str, ...]:
    """Labels of a record that may have any number: a list, or text with separators.

    Lists are those of JSON or of Python, which pandas writes. With a comma in ``name``, and no
    such field, it names columns of 0 and 1, which are the labels.
    """
    if name not in record.fields and "," in name:
        columns = [column.strip() for column in name.split(",")]
        return tuple(c for c in columns if read_indicator(record, c))
    items = read_list(record, name, separator)
    if any(item is None or isinstance(item, list | dict) for item in items):
        raise InputError(
            f"{record.origin}: {name} is {record.value(name)!r:.40}, which is not a list of "
            "labels; [] is none"
        )
    labels = [tabular.check_text(str(item).strip(_SPACES), name, record.origin) for item in items]
    return tuple(dict.fromkeys(label for label in labels if spelling.clean(label)))


def read_list(record: Record, name: str, separator: str) -> list[Any]:
    """The items of a list, or of text with separators, which may be such a list."""
    value = record.value(name)
    if isinstance(value, list):
        return value
    if value is None:
        return [None]
    text = str(value)
    if not (isinstance(value, str) and text.lstrip().startswith("[")):
        return text.split(separator)
    try:
        return lists.parse(text)
    except ValueError as error:
        raise InputError(
            f"{record.origin}: {name} is {value!r:.40}, which is not a JSON list ({error}); "
            """write it as ["a", "b"], or the labels with """
            f"{separator!r} between them"
        ) from error


def read_hot(record: Record, name: str | None) -> list[bool] | None:
    """A list of two or more zeros and ones; None: it is no such list."""
    value = None if name is None else record.fields.get(name)
    if not isinstance(value, list | str) or not str(value).lstrip().startswith("["):
        return None
    try:
        items = [spelling.key(str(item)) for item in read_list(record, str(name), ",")]
    except InputError:
        return None
    if len(items) < 2 or not set(items) <= {"0", "1", "true", "false"}:
        return None
    return [item in ("1", "true") for item in items]


def read_indicator(record: Record, name: str) -> bool:
    """Whether a record has the label that a column is for: 1 or 0, true or false."""
    value = record.value(name)
    text = spelling.key(str(value))
    if text not in ("0", "1", "true", "false"):
        raise InputError(
            f"{record.origin}: {name} is {value!r:.40}, which is neither 1 nor 0 (true or false), "
            "as in a column for one label"
        )
    return text in ("1", "true")


def has_decimal_commas(records: Iterable[Record], name: str) -> bool:
    """Whether numbers are written as 3,5; three digits behind the comma may be of thousands.

    What is no number either way has no say.
    """
    values = (str(record.fields.get(name, "")).strip(_SPACES) for record in records)
    numbers = [x for x in values if re.search("[0-9]", x) and re.fullmatch(_NUMERIC, x)]
    fractions = [number.partition(",")[2] for number in numbers if "," in number]
    return any(len(digits) != 3 for digits in fractions) and all(
        re.fullmatch(r"[-+]?[0-9]*(,[0-9]*)?", number) for number in numbers
    )


def read_target(record: Record, name: str, *, decimal_commas: bool = False) -> float:
    """The number under a name; what is none, or not finite in float32, raises."""
    value = record.value(name)
    text = str(value).strip(_SPACES)
    if decimal_commas:
        value = text.replace(",", ".")
    try:  # Python would read 1_000, as its own programs write a number
        target = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        target = math.nan
    if not abs(target) <= float(np.finfo(np.float32).max):
        hint = ""
        if re.fullmatch(r"[-+]?[0-9]{1,3}([,_][0-9]{3})+(\.[0-9]+)?", text):
            hint = f"; write {re.sub('[,_]', '', text)} for it, without separators"
            if text.count(",") == 1 and not {".", "_"} & set(text):
                hint += f", or {text.replace(',', '.')} if that is a decimal comma"
        elif re.fullmatch(r"[-+]?[0-9]+,[0-9]+", text):
            hint = f"; write {text.replace(',', '.')} for it, as others have a decimal point"
        raise InputError(
            f"{record.origin}: {name} is {value!r:.40}, which is not a finite float32 number{hint}"
        )
    return target


def discover(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels, sorted, as numbers if all are; fewer than two raise."""
    names = sorted(set(labels))
    if len(names) < 2:
        found = f"the only label is {names[0]!r}" if names else "there are no labels"
        raise InputError(f"{found}; a classifier needs two: check the column and the file")
    numbers = [_number(name) for name in names]
    if all(map(math.isfinite, numbers)):
        names = [name for _, name in sorted(zip(numbers, names, strict=True))]
    return tuple(names)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def named(label: str, names: Sequence[str] | None, name: str, origin: str) -> str:
    """The name of a label that is a number from 0, where there are ``names``; others stay."""
    number = spelling.key(label)
    if names is None or label in names or not re.fullmatch("[0-9]+", number):
        return label
    if int(number) >= len(names):
        raise InputError(
            f"{origin}: {name} has the number {number}, but there are {len(names)} names, whose "
            "numbers begin at 0: complete --task.fields.names"
        )
    return names[int(number)]


def discover_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """The distinct tags, sorted; those of entities with all tags of each type, such as B- and I-.

    A data set that is evaluated may have some that training happens to lack.
    """
    names = set(tags)
    marks, types = {name[:2] for name in names - {"O"}}, {name[2:] for name in names - {"O"}}
    for scheme in ("BI", "BIES", "BILU", "BMES"):
        if marks and marks <= {f"{mark}-" for mark in scheme}:
            return discover(names | {f"{mark}-{kind}" for mark in scheme for kind in types})
    return discover(names)


def number_of(label: str, names: Sequence[str], origin: str, exact: bool = False) -> int:
    """The number of a label, or of the only one alike; one that training did not have raises.

    ``exact``: what is alike is another label.
    """
    found = label if label in names else None if exact else spelling.find(label, names)
    if found is None:
        known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise InputError(
            f"{origin}: label {label!r} is not among those of the training data ({known}); "
            "correct it, or add examples of it"
        )
    return names.index(found)


def numbers_of(
    labels: Sequence[str], names: Sequence[str], origins: Sequence[str], exact: bool = False
) -> Int32[np.ndarray, " examples"]:
    """The number of each example's label."""
    pairs = zip(labels, origins, strict=True)
    return np.array([number_of(label, names, origin, exact) for label, origin in pairs], np.int32)


def indicators_of(
    labels: Sequence[tuple[str, ...]],
    names: Sequence[str],
    origins: Sequence[str],
    exact: bool = False,
) -> Float32[np.ndarray, "examples labels"]:
    """1 for each label that an example has, and 0 for the others."""
    table = np.zeros((len(labels), len(names)), np.float32)
    for row, (own, origin) in enumerate(zip(labels, origins, strict=True)):
        for label in own:
            table[row, number_of(label, names, origin, exact)] = 1
    return table
