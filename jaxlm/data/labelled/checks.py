"""What the labels of training data show that nobody meant: refused, with a way out, or said."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxlm.data.labelled.spelling import Labelled
from jaxlm.errors import InputError

# What pandas, R, Excel and SQL write where there is no value.
MISSING = frozenset(
    (
        *("nan", "NaN", "NAN", "-nan", "-NaN", "None", "NULL", "null", "NA", "N/A", "n/a"),
        *("<NA>", "NaT", "#N/A", "#NA", "#N/A N/A", "#NULL!", "#REF!", "#VALUE!", "#DIV/0!"),
        *("#NAME?", "undefined"),
    )
)
_MANY = 20  # examples, from which on it is odd that each has a class of its own
_AS_WRITTEN = "--task.fields.as-written"


def check_missing(examples: Sequence[Labelled], name: str) -> None:
    """Raise where a label is a word for a missing value."""
    found = [(label, e.origin) for e in examples for label in e.written if label in MISSING]
    if found:
        counts = Counter(label for label, _ in found).most_common()
        words = ", ".join(f"{label!r} ({count:,})" for label, count in counts)
        raise InputError(
            f"{found[0][1]}: {name} is {found[0][0]!r}, a word for a missing value; there are "
            f"{words}: label these records, or remove them; if it is meant, {_AS_WRITTEN}"
        )


def check_names(examples: Sequence[Labelled], name: str, names: Sequence[str] | None) -> list[str]:
    """A line where names of numbers are given, and no label is such a number or has such a name."""
    classes = {label for example in examples for label in example.classes}
    if names is None or not classes or classes & set(names):
        return []
    return [
        f"task.fields.names has no effect: {name} holds no numbers from 0, but labels such as "
        f"{min(classes)!r:.40}"
    ]


def check_nuls(examples: Sequence[Any]) -> list[str]:
    """A line where texts hold the character NUL, which nobody writes."""
    found = [example.origin for example in examples if "\0" in example.content]
    if not found:
        return []
    return [f"{len(found):,} of {len(examples):,} texts hold NUL characters, first at {found[0]}"]


def check_single(examples: Sequence[Labelled], name: str) -> list[str]:
    """Raise where classes are lists, or each example has its own; lines on what is odd."""
    for example in examples:
        for label in example.written:
            if re.fullmatch(r"\[.*[,\s'\"].*\]", label):
                raise InputError(
                    f"{example.origin}: {name} is {label!r:.40}, a list, where a single class is "
                    f"expected: --task.fields.target labels reads lists; if it is meant, "
                    f"{_AS_WRITTEN}"
                )
    counts = Counter(label for e in examples for label in e.classes)
    if len(examples) > _MANY and len(counts) > 0.9 * len(examples):
        numbers = all(re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", label) for label in counts)
        way = "numbers are learned with --task.fields.target number; " if numbers else ""
        raise InputError(
            f"{examples[0].origin}: {len(examples):,} examples have {len(counts):,} classes, "
            f"nearly each its own: is {name!r} the column of the label (--task.fields.label)? "
            f"{way}if it is meant, {_AS_WRITTEN}"
        )
    if found := _separator(list(counts), "|,;/"):
        return [
            f"classes such as {found[1]!r} look like several labels: if they are, "
            f"--task.fields.target labels --task.fields.separator '{found[0]}'"
        ]
    return []


def check_several(
    examples: Sequence[Labelled], name: str, separator: str, names: Sequence[str] | None
) -> list[str]:
    """Raise where what stands between labels seems to be another character than the separator."""
    if any(example.classes and not example.written for example in examples):
        said = (
            f"{name} holds rows of 0 and 1, a place for each label; --task.fields.names A B ... "
            "names the labels in their order"
        )
        return [said] if names is None else []
    if any(len(example.classes) > 1 for example in examples):
        return []
    names = list(dict.fromkeys(label for e in examples for label in e.classes))
    if found := _separator(names, "|,;/"):
        origin = next(e.origin for e in examples if found[1] in e.classes)
        raise InputError(
            f"{origin}: {name} is {found[1]!r:.40}, but no record holds the separator "
            f"{separator!r}: did you mean --task.fields.separator '{found[0]}'? if it is meant, "
            f"{_AS_WRITTEN}"
        )
    return []


def _separator(names: Sequence[str], candidates: str) -> tuple[str, str] | None:
    """What stands between parts that other labels have, too, and the first label that holds it."""
    for candidate in candidates:
        parts = {name: [part.strip() for part in name.split(candidate)] for name in names}
        times = Counter(part for own in parts.values() for part in own)
        joined = [name for name, own in parts.items() if len(own) > 1]
        shared = [n for n in joined if all(part and times[part] > 1 for part in parts[n])]
        if len(shared) >= max(1, len(joined) / 2):
            return candidate, shared[0]
    return None
