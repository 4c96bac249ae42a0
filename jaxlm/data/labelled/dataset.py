"""Labelled data as a configuration names it: read, split, without duplicates, a few of a class."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.labelled import spelling, splits
from jaxlm.data.labelled.augment import AugmentConfig
from jaxlm.data.labelled.pydocs import PyDocsTopics
from jaxlm.data.labelled.records import Conll, JsonLines, Record, Squad, Table, TfdsRecords
from jaxlm.data.labelled.spelling import Labelled
from jaxlm.errors import InputError

Source = Table | JsonLines | Conll | Squad | TfdsRecords | PyDocsTopics


@dataclass(frozen=True, kw_only=True)
class LabelledConfig:
    """What fine-tuning reads."""

    train: Source
    """The training data."""
    validation: Source | None = None
    """The data that decide which checkpoint is best; None: hold out a part of the training data.
    If examples share texts, as questions share contexts, give a file."""
    validation_fraction: float = 0.1
    """Share of each class to hold out from the training data if `validation` is None."""
    split_seed: int = 0
    """Seed of that split and of `few_shot`: it does not follow `train.seed`, so that runs with
    other seeds see the same examples."""
    few_shot: int | None = None
    """Number of training examples to keep of each class; None: all."""
    max_length: int = 128
    """Tokens in the longest row; longer texts are truncated."""
    batch_size: int = 32
    """Examples in a global batch, over all processes."""
    num_buckets: int = 4
    """Number of lengths that batches are padded to; each is compiled once."""
    augment: AugmentConfig | None = None
    """Random changes to training texts."""

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size", "num_buckets"):
            if vars(self)[name] < 1:
                raise InputError(f"data.{name}={vars(self)[name]} is not above 0")
        if not 0 <= self.split_seed < 2**32:
            raise InputError(f"data.split_seed={self.split_seed} is not from 0 to 4294967295")
        if self.few_shot is not None and self.few_shot < 1:
            raise InputError(f"data.few_shot={self.few_shot} is not above 0; None = all examples")


class Splits(NamedTuple):
    """Training and validation examples."""

    train: list[Any]
    validation: list[Any]
    duplicates: int  # training examples left out because validation has the same text
    fingerprint: str  # of what the examples were read from, and how they were split
    notes: tuple[str, ...] = ()  # what a user should know of them, a line each


def read_splits(
    config: LabelledConfig,
    read: Callable[[Iterable[Record]], list[Any]],
    check: Callable[[list[Any]], list[str]] = lambda _: [],
) -> Splits:
    """The examples of a configuration; ``read`` makes them of records.

    ``check`` raises where all training examples together show a mistake, or gives lines to be said.
    """
    train = read(config.train.records())
    if not train:
        raise InputError(f"{config.train} holds no examples")
    notes = [*_passed_over(config.train), *check(train), *spelling.notes(train)]
    if config.validation is None:
        train, validation = splits.stratified(train, config.validation_fraction, config.split_seed)
    else:
        validation = read(config.validation.records())
        if not validation:
            raise InputError(f"{config.validation} holds no examples")
        known = (label for e in train if isinstance(e, Labelled) for label in e.classes)
        validation = spelling.alike(validation, known)
        said = [*_passed_over(config.validation), *spelling.notes(validation)]
        notes += [f"validation: {note}" for note in said]
    size = len(validation)
    train, duplicates, validation = splits.without_duplicates(train, validation)
    if size > len(validation):
        notes.append(
            f"{size - len(validation)} of {size:,} validation examples are left out: training has "
            "the same texts, and no others with their labels"
        )
    notes += splits.copies(train)
    if config.few_shot is not None:
        train = splits.few_shot(train, config.few_shot, config.split_seed)
    return Splits(train, validation, len(duplicates), fingerprint(config), tuple(notes))


def _passed_over(source: Source) -> list[str]:
    return source.notes() if isinstance(source, Conll) else []


def fingerprint(config: LabelledConfig) -> str:
    """A sha256 of what the examples are read from, and how they are split."""
    sources = [source.fingerprint() for source in (config.train, config.validation) if source]
    split = (config.validation_fraction, config.split_seed, config.few_shot)
    return hashlib.sha256(repr((sources, split)).encode()).hexdigest()


def holds_records(source: Source, path: Path) -> bool:
    """Whether its name says that it is no plain text: by a known ending, or that of ``source``."""
    suffix = path.suffix.lower()
    known = (".jsonl", ".json", ".conll", ".csv", ".tsv")
    return suffix in known or (suffix == _suffix(source) and not path.is_fifo())


def like(source: Source, path: Path) -> Source:
    """Another file with the same columns as ``source``, of the kind that its name says."""
    suffix = path.suffix.lower()
    match suffix:
        case ".jsonl":
            return JsonLines(path=str(path))
        case ".json":
            return Squad(path=str(path))
        case ".conll" if not isinstance(source, Conll):
            return Conll(path=str(path))
        case ".csv" | ".tsv" if isinstance(source, Table):
            delimiter = source.delimiter if suffix == _suffix(source) else None
            return dataclasses.replace(source, path=str(path), delimiter=delimiter)
        case ".csv" if _suffix(source) != ".csv":
            return Table(path=str(path))
        case ".tsv" if not isinstance(source, Conll):
            return Table(path=str(path))
    if isinstance(source, Table | Conll):
        return dataclasses.replace(source, path=str(path))
    raise InputError(
        f"{path}: the kind of its data is not known; name it .csv, .tsv, .conll or .jsonl"
    )


def _suffix(source: Source) -> str | None:
    """The ending of files of tables and of words, which may have any."""
    return Path(source.path).suffix.lower() if isinstance(source, Table | Conll) else None
