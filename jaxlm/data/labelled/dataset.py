"""Labelled data as a configuration names it: read, split, without duplicates, a few of a class."""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxlm.data import files
from jaxlm.data.labelled import checks, formats, spelling, splits
from jaxlm.data.labelled.augment import AugmentConfig
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.parallel import ParallelText
from jaxlm.data.labelled.pydocs import PyDocsTopics
from jaxlm.data.labelled.records import (
    Conll,
    JsonLines,
    Record,
    Squad,
    Table,
    TfdsRecords,
    first_path,
)
from jaxlm.data.labelled.spelling import Labelled
from jaxlm.errors import InputError, note

_ENDINGS = (".jsonl", ".json", ".conll", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
Read = Callable[[Iterable[Record]], list[Any]]
T = TypeVar("T")
Source = Table | JsonLines | Conll | Squad | TfdsRecords | PyDocsTopics | ParallelText


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
    """Examples in a global batch, over all processes; with `batch_tokens`, batches of any length
    have a multiple of so many."""
    batch_tokens: int | None = None
    """Tokens in a global batch, padding included, so that short examples come in larger batches; of
    pairs of texts, those of the longer side. None: all batches have `batch_size` examples."""
    num_buckets: int = 4
    """Number of lengths, or of pairs of lengths, that batches are padded to; each is compiled
    once."""
    pack: bool = False
    """Examples share rows, in which they do not see each other, so that less is padding: batches
    have one shape, and about `batch_size` examples. Of classification, tagging and embeddings."""
    augment: AugmentConfig | None = None
    """Random changes to training texts."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """What to do about records that cannot be used, such as those with an empty text, or a label
    that training lacks: name the first of them and stop, or leave all out and say how many."""

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size", "batch_tokens", "num_buckets"):
            if vars(self)[name] is not None and vars(self)[name] < 1:
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
    task: Any = None  # a deciding one, with what all that was read for training shows


@runtime_checkable
class Deciding(Protocol):
    """A task that reads each record by what all of them show."""

    def read(self, records: Iterable[Record]) -> list[Any]:
        """The examples."""
        ...

    def decided(self, records: Sequence[Record]) -> "Deciding":
        """The task with what these records decide, to read them one by one as well."""
        ...

    def shown(self, examples: Sequence[Any]) -> "Deciding":
        """The task with what all training data decide of how other data are read."""
        ...


def reading(task: Any) -> Read | Deciding:
    """What :func:`read_splits` and :func:`read_records` take, of any task."""
    return task if isinstance(task, Deciding) else task.read


def read_splits(
    config: LabelledConfig,
    read: Read | Deciding,
    check: Callable[[list[Any]], list[str]] = lambda _: [],
) -> Splits:
    """The examples of a configuration; ``read`` makes them of records.

    ``check`` raises where all training examples together show a mistake, or gives lines to be said.
    """
    train = read_records(config.train.records(), read, config.on_bad_row)
    if not train:
        raise InputError(f"{config.train} holds no examples")
    odd = [*check(train), *checks.check_nuls(train)]
    notes = [*_passed_over(config.train), *odd, *spelling.notes(train)]
    task = read.shown(train) if isinstance(read, Deciding) else None
    if config.validation is None:
        train, validation = splits.stratified(train, config.validation_fraction, config.split_seed)
    else:
        validation = read_records(config.validation.records(), task or read, config.on_bad_row)
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
    return Splits(train, validation, len(duplicates), fingerprint(config), tuple(notes), task)


def _passed_over(source: Source) -> list[str]:
    return source.notes() if isinstance(source, Conll) else []


def read_records(
    records: Iterable[Record],
    read: Read | Deciding,
    on_bad_row: Literal["raise", "skip"],
    option: str = "--data.on-bad-row",
) -> list[Any]:
    """The examples of all records; of those that are bad, all are counted and a few are named.

    What no record is to blame for, or all of them are, is raised as it is: a wrong setting.
    """
    records = list(records)
    read = read.decided(records).read if isinstance(read, Deciding) else read
    return _of_usable(read, records, on_bad_row, option)


def encode_usable(
    encode: Callable[[Sequence[Any]], Examples],
    examples: Sequence[Any],
    on_bad_row: Literal["raise", "skip"],
    option: str = "--data.on-bad-row",
) -> tuple[list[Any], Examples]:
    """The same for rows: the examples of which they can be made, and these rows.

    A record can be read and have none: a question may leave its context no room. Messages that do
    not begin with a record's place, such as one on all that are too long, are raised as they are.
    """
    make = lambda some: (list(some), encode(some))
    return _of_usable(make, examples, on_bad_row, option, str.startswith)


def _of_usable(
    make: Callable[[list[Any]], T],
    found: Sequence[Any],
    on_bad_row: Literal["raise", "skip"],
    option: str,
    blames: Callable[[str, str], bool] = lambda message, origin: True,
) -> T:
    try:
        return make(list(found))
    except InputError as error:
        bad, reasons = set(), defaultdict(list)
        for i, one in enumerate(found):
            try:
                make([one])
            except InputError as reason:
                if blames(str(reason), one.origin):
                    bad.add(i)
                    reasons[str(reason).removeprefix(f"{one.origin}: ")].append(one.origin)
        if not bad or len(bad) == len(found):
            raise
        named = "; ".join(f"{_some(places)}: {why}" for why, places in list(reasons.items())[:3])
        what = f"{len(bad):,} of {len(found):,} records cannot be used"
        if on_bad_row == "raise":
            raise InputError(
                f"{named}: {what}, correct them, or leave them out with {option} skip"
            ) from error
    note(f"{what}, and are left out: {named}")
    return make([one for i, one in enumerate(found) if i not in bad])


def _some(places: list[str]) -> str:
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more


def fingerprint(config: LabelledConfig) -> str:
    """A sha256 of what the examples are read from, and how they are split."""
    sources = [source.fingerprint() for source in (config.train, config.validation) if source]
    split = (config.validation_fraction, config.split_seed, config.few_shot)
    split += ("skip",) if config.on_bad_row == "skip" else ()
    return hashlib.sha256(repr((sources, split)).encode()).hexdigest()


def holds_records(source: Source, path: Path, names: Collection[str] = ()) -> bool:
    """Whether a file is no plain text, by a known ending, that of ``source``, or what it holds.

    A .txt file is plain text where its header has none of ``names``, and where it holds objects a
    line, as texts may stand between them.
    """
    ending = files.ending(path)
    kind = formats.kind_of(path, None) if path.is_file() else None
    if kind == "json" and ending in ("", ".txt"):
        return formats.is_document(path)
    if ending in _ENDINGS or kind in ("arrow", "json"):
        return True
    if ending != _ending(source) or path.is_fifo():
        return False
    if isinstance(source, Table) and ending in ("", ".txt") and names and kind is None:
        return dataclasses.replace(source, path=str(path)).has_columns(names)
    return True


def in_encoding(source: Source, encoding: str | None) -> Source:
    """The source, of files that are in another encoding; None: as it says."""
    is_text = isinstance(source, Table | JsonLines | Conll | ParallelText)
    return dataclasses.replace(source, encoding=encoding) if encoding and is_text else source


def like(source: Source, path: Path) -> Source:
    """Another file with the same columns as ``source``, of the kind that its name says.

    Its first bytes, where they say what it is, decide when it is read.
    """
    ending = files.ending(path)
    match ending:
        case ".json" | ".jsonl" | ".parquet" | ".arrow" | ".feather":
            same = isinstance(source, JsonLines)
            return (
                dataclasses.replace(source, path=str(path)) if same else JsonLines(path=str(path))
            )
        case ".conll" if not isinstance(source, Conll):
            return Conll(path=str(path))
        case ".csv" | ".tsv" if isinstance(source, Table):
            delimiter = source.delimiter if ending == _ending(source) else None
            return dataclasses.replace(source, path=str(path), delimiter=delimiter)
        case ".csv" if _ending(source) != ".csv":
            return Table(path=str(path))
        case ".tsv" if not isinstance(source, Conll):
            return Table(path=str(path))
    if isinstance(source, Table | Conll):
        return dataclasses.replace(source, path=str(path))
    if path.is_file() and formats.kind_of(path, None) is not None:
        return JsonLines(path=str(path))
    if isinstance(source, ParallelText):
        raise InputError(f"{path} is one side alone: give the other with --target")
    raise InputError(
        f"{path}: the kind of its data is not known; name it .csv, .tsv, .conll or .jsonl"
    )


def _ending(source: Source) -> str | None:
    """The ending of files of tables and of words, which may have any."""
    if not isinstance(source, Table | Conll):
        return None
    return files.ending(Path(first_path(source.path)))
