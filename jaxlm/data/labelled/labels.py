"""Labels: which there are, and their numbers."""

import json
import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float32, Int32

from jaxlm.data import tabular
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError


def read_label(record: Record, name: str) -> str:
    """The label under a name, as text; numbers are written out, an empty one raises."""
    value = record.value(name)
    if isinstance(value, list | dict) or value is None or value != value:  # NaN: a missing number
        raise InputError(f"{record.origin}: {name} is {value!r:.40}, which is not a single label")
    label = tabular.check_text(str(value).strip(), name, record.origin)
    if not label:
        raise InputError(f"{record.origin}: {name} is empty; label the record, or remove it")
    return label


def read_labels(record: Record, name: str, separator: str) -> tuple[str, ...]:
    """Labels of a record that may have any number: a JSON list, or text with separators."""
    value = record.value(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = tabular.parse_json(value)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{record.origin}: {name} is {value!r:.40}, which is not a JSON list ({error.msg})"
            ) from error
    items = value if isinstance(value, list) else str(value).split(separator)
    if value is None or any(item is None or isinstance(item, list | dict) for item in items):
        raise InputError(
            f"{record.origin}: {name} is {value!r:.40}, which is not a list of labels; [] is none"
        )
    labels = [tabular.check_text(str(item).strip(), name, record.origin) for item in items]
    return tuple(dict.fromkeys(label for label in labels if label))


def read_target(record: Record, name: str) -> float:
    """The number under a name; what is none, or not finite in float32, raises."""
    value = record.value(name)
    try:
        target = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        target = math.nan
    if not abs(target) <= float(np.finfo(np.float32).max):
        raise InputError(
            f"{record.origin}: {name} is {value!r:.40}, which is not a finite float32 number"
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


def discover_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """The distinct tags, sorted; where they are BIO, each type has its B- and its I- tag."""
    names = set(tags)
    if names <= {"O"} | {name for name in names if name[:2] in ("B-", "I-")}:
        types = {name[2:] for name in names - {"O"}}
        names |= {prefix + kind for prefix in ("B-", "I-") for kind in types}
    return discover(names)


def number_of(label: str, names: Sequence[str], origin: str) -> int:
    """The number of a label; one that training did not have raises."""
    if label not in names:
        known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise InputError(
            f"{origin}: label {label!r} is not among those of the training data ({known}); "
            "correct it, or add examples of it"
        )
    return names.index(label)


def numbers_of(
    labels: Sequence[str], names: Sequence[str], origins: Sequence[str]
) -> Int32[np.ndarray, " examples"]:
    """The number of each example's label."""
    pairs = zip(labels, origins, strict=True)
    return np.array([number_of(label, names, origin) for label, origin in pairs], np.int32)


def indicators_of(
    labels: Sequence[tuple[str, ...]], names: Sequence[str], origins: Sequence[str]
) -> Float32[np.ndarray, "examples labels"]:
    """1 for each label that an example has, and 0 for the others."""
    table = np.zeros((len(labels), len(names)), np.float32)
    for row, (own, origin) in enumerate(zip(labels, origins, strict=True)):
        for label in own:
            table[row, number_of(label, names, origin)] = 1
    return table
