"""Labels that are written in several ways and mean one: cleaned, and spelled alike."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

# Zero-width space, word joiner, BOM, soft hyphen, marks of direction, choices of a glyph.
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufe0e\ufe0f\ufeff]"
)
_JOINERS = "\u200c\u200d"  # they shape letters and emoji inside of a word, and nothing at its ends
_QUOTES = ('""', "''", "“”", "‘’", "„“", "«»", "``")
_SHOWN = 5  # labels, in a line


@runtime_checkable
class Labelled(Protocol):
    """An example with labels: a class, several, or a tag for each word."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Its labels as they are used."""
        ...

    @property
    def written(self) -> tuple[str, ...]:
        """The same as they stand in the file."""
        ...

    @property
    def as_written(self) -> bool:
        """Whether they are taken as they stand."""
        ...

    @property
    def origin(self) -> str:
        """Where it is from."""
        ...

    def respelled(self, names: Mapping[str, str]) -> Any:
        """With other names for its labels; those that are not keys stay."""
        ...


T = TypeVar("T")


def clean(label: str) -> str:
    """NFC, with single spaces, and neither invisible characters nor quotation marks around it."""
    label = _INVISIBLE.sub("", unicodedata.normalize("NFC", label))
    label = " ".join(label.split()).strip(_JOINERS)
    if len(label) > 2 and label[0] + label[-1] in _QUOTES:
        return label[1:-1].strip()
    return label


def key(label: str) -> str:
    """The same for labels that differ in case alone, or by the .0 that a table of floats adds."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", clean(label)).casefold()


def find(label: str, names: Iterable[str]) -> str | None:
    """The name that is spelled so, or else the only one that is alike."""
    alike = [name for name in names if key(name) == key(label)]
    return label if label in alike else alike[0] if len(alike) == 1 else None


def alike(examples: Sequence[T], known: Iterable[str] = ()) -> list[T]:
    """The examples, with one name for labels that differ in case alone: the most frequent.

    Labels that are alike to one of ``known`` get its name, and others stay, as do those that are
    taken as they stand.
    """
    labelled = [e for e in examples if isinstance(e, Labelled) and not e.as_written]
    counts = Counter(label for e in labelled for label in e.classes)
    groups: dict[str, list[str]] = defaultdict(list)
    known = list(dict.fromkeys(known))
    for label in known or sorted(counts, key=lambda label: (-counts[label], label)):
        groups[key(label)].append(label)
    names = {
        label: group[0]
        for label in counts
        if (group := groups.get(key(label), [])) and (len(group) == 1 or not known)
    }
    names = {label: name for label, name in names.items() if label != name}
    if not names:
        return list(examples)
    return [
        cast(T, e.respelled(names)) if isinstance(e, Labelled) and not e.as_written else e
        for e in examples
    ]


def notes(examples: Iterable[object]) -> list[str]:
    """A line, if labels are used otherwise than the file has them."""
    changed: Counter[tuple[str, str]] = Counter()
    for example in examples:
        if isinstance(example, Labelled) and example.written != example.classes:
            pairs = zip(example.written, example.classes, strict=False)
            changed.update(pair for pair in pairs if pair[0] != pair[1])
    if not changed:
        return []
    shown = [f"{a!a} is {b!r} ({n:,})" for (a, b), n in changed.most_common(_SHOWN)]
    more = ", …" if len(changed) > _SHOWN else ""
    return [
        f"labels that look alike, or differ in case alone, are one: {', '.join(shown)}{more}; "
        "--task.fields.as-written takes each as it stands"
    ]
