"""Splits of a data set: for validation, without duplicates, a few of each class."""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

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


T = TypeVar("T", bound=Example)


def stratified(examples: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Split into training and validation examples, with the same shares of each class.

    Every class keeps an example for training. Both splits are in the order of ``examples``.
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
    parts: tuple[list[T], list[T]] = ([], [])
    for i, example in enumerate(examples):
        parts[i in chosen].append(example)
    return parts


def few_shot(examples: Sequence[T], k: int, seed: int) -> list[T]:
    """``k`` examples of each class, in their order; fewer of them are among more of one seed."""
    chosen: set[int] = set()
    for stratum, group in _shuffled(examples, seed).items():
        if len(group) < k:
            raise InputError(
                f"class {stratum!r} has {len(group)} examples, fewer than the {k} asked for"
            )
        chosen.update(group[:k])
    return [example for i, example in enumerate(examples) if i in chosen]


def _shuffled(examples: Sequence[Example], seed: int) -> dict[str, list[int]]:
    """The indices of each class in random order; classes in order of their names."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(examples)).tolist():
        groups[examples[i].stratum].append(i)
    return dict(sorted(groups.items()))


def without_duplicates(
    train: Sequence[T], validation: Sequence[Example]
) -> tuple[list[T], list[T]]:
    """The training examples whose text validation does not have, and those removed.

    Texts are the same that differ only in case, white space or the form of their characters.
    """
    held_out = {_digest(example) for example in validation}
    parts: tuple[list[T], list[T]] = ([], [])
    for example in train:
        parts[_digest(example) in held_out].append(example)
    if not parts[0]:
        raise InputError("every training example is also in the validation data; give other data")
    return parts


def _digest(example: Example) -> bytes:
    text = unicodedata.normalize("NFKC", example.content).casefold()
    return hashlib.sha256(" ".join(text.split()).encode()).digest()
