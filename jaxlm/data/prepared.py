"""Prepared data: its metadata, and opening it."""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_info import DatasetInfoFileError

from jaxlm.data import rows, tokenizers
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.data.tabular import parse_json
from jaxlm.errors import InputError
from jaxlm.runtime.storage import StoragePath, locate, size_of

INFO, TOKENIZER = "info.json", "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class PreparedInfo:
    """What ``info.json`` says."""

    name: str
    """The data set's name in TensorFlow Datasets."""
    row_length: int
    """Tokens in a row."""
    vocab_size: int
    """One more than the largest token id."""
    special: SpecialTokens
    """Ids of the special tokens."""
    documents: dict[str, int]
    """Number of documents in each split."""
    duplicates: int
    """Number of documents dropped as copies."""
    blank: int = 0
    """Number of documents dropped as without text; 0 for data of before they were counted."""
    rows: dict[str, int]
    """Number of rows in each split."""
    tokens: dict[str, int]
    """Number of tokens in each split, padding not counted."""
    fill: dict[str, float]
    """Share of each split's positions that are not padding."""
    unigram_entropy: float
    """Nats per token of the validation split (of train, where there is none), special tokens left
    out: the loss of a model that knows each token's frequency, and nothing else."""
    fingerprint: str
    """sha256 of all that decides the rows: row length, tokenizer, and the tokens of each split."""
    tokenizer_sha256: str
    """Hash of the tokenizer, as :func:`jaxlm.data.tokenizers.fingerprint` gives it."""
    source_fingerprint: str
    """Hash of what the documents were read from."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of each split's text; empty for data of before they were counted."""
    recipe: dict[str, Any]
    """All settings that decide the content, in a form that can be compared."""
    unknown_share: float | None = None
    """Share of the tokens that are unknown; None: older versions did not keep it."""
    changed_share: float | None = None
    """Share of the letters that the tokenizer changes; None: older versions did not keep it."""

    def write(self, directory: StoragePath) -> None:
        """Into ``directory/info.json``."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (directory / INFO).write_text(text, encoding="utf-8")


def read_info(directory: StoragePath) -> PreparedInfo:
    """From ``directory/info.json``, or :class:`InputError`."""
    path = directory / INFO
    if not directory.exists():
        raise InputError(
            f"there is no prepared data in {directory}; make it with scripts/prepare.py"
        )
    if not path.is_file():
        raise InputError(
            f"{directory} holds no {INFO}, so it is not (completely) prepared data; make it with "
            "scripts/prepare.py"
        )
    try:
        fields = parse_json(path.read_text(encoding="utf-8-sig"))
        return PreparedInfo(**{**fields, "special": SpecialTokens(**fields["special"])})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is damaged, or of another version ({error}); prepare the data again"
        ) from error


@dataclass(frozen=True)
class Prepared:
    """Prepared data that was found complete."""

    directory: StoragePath
    info: PreparedInfo

    @property
    def tokenizer_path(self) -> StoragePath:
        """Its ``tokenizer.json``."""
        return self.directory / TOKENIZER

    def source(self, split: str) -> rows.Rows:
        """Random access to the rows of a split."""
        if split not in self.info.rows:
            raise InputError(
                f"{self.directory} has no split {split!r}, only {' and '.join(self.info.rows)}"
            )
        return rows.Rows(self.directory, split)


def open_prepared(directory: StoragePath | str) -> Prepared:
    """Check that tokenizer and files are those that ``info.json`` speaks of."""
    directory = locate(directory)
    info = read_info(directory)
    found = tokenizers.fingerprint(tokenizers.load(directory / TOKENIZER))
    if found != info.tokenizer_sha256:
        raise InputError(
            f"{directory / TOKENIZER} (sha256 {found:.12}) is not the tokenizer of this data "
            f"({info.tokenizer_sha256:.12}); restore it, or prepare the data again"
        )
    if damage := _damage(directory, info):
        raise InputError(f"{directory} is incomplete or damaged ({damage}); prepare the data again")
    return Prepared(directory, info)


def _damage(directory: StoragePath, info: PreparedInfo) -> str | None:
    """What is missing, as far as counts and sizes tell; contents are checked as they are read."""
    try:
        splits = tfds.builder_from_directory(os.fspath(directory / rows.VERSION)).info.splits
    except (FileNotFoundError, ValueError, DatasetInfoFileError):
        return f"no readable data set in its folder {rows.VERSION}"
    for split, num_rows in info.rows.items():
        if split not in splits or splits[split].num_examples != num_rows:
            return f"not the {num_rows} rows of {split}"
        files = [locate(path) for path in splits[split].filepaths]
        if missing := [file.name for file in files if not file.is_file()]:
            return f"without {', '.join(missing)}"
        size = sum(size_of(file) for file in files)
        if size != splits[split].num_bytes:
            return f"{size} bytes of {split} instead of {splits[split].num_bytes}"
    return None
