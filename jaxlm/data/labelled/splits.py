"""Splits of a data set: for validation, without duplicates, a few of each class."""

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from jaxlm.data.labelled.spelling import Labelled
from jaxlm.errors import InputError


@runtime_checkable
class Example(Protocol):
    """What splitting needs to know of an example."""

    @property
    def stratum(self) -> str:
        """The class whose share is kept equal in all splits."""
        ...

    @property
    def content(self) -> str:
        """All text that the model reads."""
        ...

    @property
    def origin(self) -> str:
        """Where it is from."""
        ...


T = TypeVar("T", bound=Example)


def stratified(examples: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Split into training and validation examples, with the same shares of each class.

    Every class, and every label and tag, keeps an example for training. Both splits are in the
    order of ``examples``.
    """
    if not 0 < fraction < 1:
        raise InputError(f"a validation fraction of {fraction} is not between 0 and 1")
    groups = _shuffled(examples, seed)
    rest = np.array([i for group in groups.values() for i in group[1:]], int)
    wanted = round(fraction * len(examples))
    if not 0 < wanted <= len(rest):
        raise InputError(
            f"{len(examples)} examples of {len(groups)} classes are too few to take a fraction of "
            f"{fraction} for validation; give a validation file"
        )
    # Evenly spaced over the classes laid end to end, each class gives its share, to within one.
    places = (np.arange(wanted) + np.random.default_rng(seed).random()) * len(rest) / wanted
    chosen = set(rest[places.astype(int)].tolist())
    counts = _label_counts(example for i, example in enumerate(examples) if i not in chosen)
    lacking = [i for i in sorted(chosen) if _lacks(examples[i], counts)]
    spare = iter(rest[np.random.default_rng(seed).permutation(len(rest))].tolist())
    for i in lacking:
        if not _lacks(examples[i], counts):  # one before has brought the label
            continue
        chosen.remove(i)
        counts.update(set(_labels(examples[i])))
        for other in spare:  # goes in its stead, if all of its labels stay in training without it
            own = set(_labels(examples[other]))
            if other not in chosen and other != i and all(counts[label] > 1 for label in own):
                chosen.add(other)
                counts.subtract(own)
                break
    if not chosen:
        raise InputError(
            f"of {len(examples)} examples none can be held out for validation, because each has a "
            "label that no other has; give a validation file"
        )
    return _parts(examples, chosen)


def _parts(examples: Sequence[T], chosen: Collection[int]) -> tuple[list[T], list[T]]:
    """Those whose number is not among the chosen, and those whose is."""
    parts: tuple[list[T], list[T]] = ([], [])
    for i, example in enumerate(examples):
        parts[i in chosen].append(example)
    return parts


def _labels(example: Example) -> tuple[str, ...]:
    return example.classes if isinstance(example, Labelled) else ()


def _label_counts(examples: Iterable[Example]) -> Counter[str]:
    """How many examples have each label."""
    return Counter(label for example in examples for label in set(_labels(example)))


def _lacks(example: Example, counts: Mapping[str, int]) -> bool:
    return any(counts.get(label, 0) < 1 for label in _labels(example))


def few_shot(examples: Sequence[T], k: int, seed: int) -> list[T]:
    """``k`` examples of each class, in their order; fewer of them are among more of one seed.

    Of several labels, or tags, each has ``k`` examples, or all that there are.
    """
    chosen: set[int] = set()
    several = any(set(_labels(example)) - {example.stratum} for example in examples)
    groups = _shuffled(examples, seed)
    for stratum, group in groups.items():
        if len(group) < k and not several:
            raise InputError(
                f"class {stratum!r} has {len(group)} examples, fewer than the {k} asked for"
            )
        chosen.update(group[:k])
    if several:
        counts = _label_counts(examples[i] for i in chosen)
        for i in (i for group in groups.values() for i in group if i not in chosen):
            if any(counts[label] < k for label in _labels(examples[i])):
                chosen.add(i)
                counts.update(set(_labels(examples[i])))
    return [example for i, example in enumerate(examples) if i in chosen]


def _shuffled(examples: Sequence[Example], seed: int) -> dict[str, list[int]]:
    """The indices of each class in random order; classes in order of their names."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(examples)).tolist():
        groups[examples[i].stratum].append(i)
    return dict(sorted(groups.items()))


def without_duplicates(
    train: Sequence[T], validation: Sequence[T]
) -> tuple[list[T], list[T], list[T]]:
    """Training examples without texts of validation, those removed, and what validation keeps.

    Texts are the same that differ only in case, white space or the form of their characters. They
    leave training, but for the last one with a label, whose text leaves validation instead.
    """
    held_out = {_digest(example) for example in validation}
    digests = [_digest(example) for example in train]
    if held_out.issuperset(digests):
        raise InputError("every training example is also in the validation data; give other data")
    counts = _label_counts(train)
    removed, needed = set(), set()
    for i, (example, digest) in enumerate(zip(train, digests, strict=True)):
        own = set(_labels(example))
        if digest in needed or (digest in held_out and any(counts[label] < 2 for label in own)):
            needed.add(digest)
        elif digest in held_out:
            removed.add(i)
            counts.subtract(own)
    removed = {i for i in removed if digests[i] not in needed}
    both = {i for i, e in enumerate(validation) if needed and _digest(e) in needed}
    remaining, _ = _parts(validation, both)
    if not remaining:
        raise InputError(
            "each validation example has a text of training that alone has its label; give other "
            "data"
        )
    return *_parts(train, removed), remaining


def copies(examples: Sequence[Example]) -> list[str]:
    """A line on texts that are there several times, and one on those whose labels differ."""
    first: dict[bytes, Example] = {}
    several: dict[bytes, Example] = {}
    repeated = 0
    for example in examples:
        digest = _digest(example)
        before = first.setdefault(digest, example)
        repeated += before is not example
        if set(_labels(before)) != set(_labels(example)):
            several.setdefault(digest, example)
    lines = []
    if repeated:
        lines.append(
            f"{repeated:,} of {len(examples):,} training examples repeat the text of another; they "
            "stay"
        )
    if several:
        digest, example = next(iter(several.items()))
        lines.append(
            f"{len(several):,} texts have different labels, the first at "
            f"{first[digest].origin} and {example.origin}; correct them, or remove some"
        )
    return lines


def _digest(example: Example) -> bytes:
    text = unicodedata.normalize("NFKC", example.content).casefold()
    return hashlib.sha256(" ".join(text.split()).encode()).digest()
