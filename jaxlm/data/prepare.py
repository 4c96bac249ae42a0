"""Preparing data once: text in, rows of token ids out."""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from jaxlm.data import rows, tokenizers
from jaxlm.data.corpus import Corpus, Spool, encode
from jaxlm.data.extension import extend
from jaxlm.data.fidelity import Letters, report
from jaxlm.data.prepared import INFO, TOKENIZER, PreparedInfo, read_info
from jaxlm.data.sources import PyDocs, Source
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.data.tokenizers import TokenizerConfig
from jaxlm.data.workspace import bar, building, say
from jaxlm.errors import InputError
from jaxlm.runtime.storage import StoragePath, absolute, locate

_FORMAT = 1  # of the files written; part of every recipe and fingerprint
_CHUNK = 1 << 24  # tokens counted at once
_WAY_OUT = "name a new folder, or replace what is there with --overwrite"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What decides the content of prepared data."""

    source: Source = field(default_factory=PyDocs)
    """Where the text comes from."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """What cuts it into tokens."""
    extend_vocab: int | None = None
    """New tokens to add to the tokenizer of `tokenizer.path`, or of a base: words of the text that
    it breaks into many pieces; None: none."""
    row_length: int = 128
    """Tokens per row. Documents share rows; one that does not fit continues in the next row."""
    validation_fraction: float = 0.05
    """Share of the documents to hold out, chosen by a hash of their text."""

    def __post_init__(self) -> None:
        if self.row_length < 3:
            raise InputError(f"row_length={self.row_length} has no room for text; use 3 or more")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(
                f"validation_fraction={self.validation_fraction} is not in [0, 1); try 0.05"
            )
        if self.extend_vocab is not None and self.extend_vocab < 1:
            raise InputError(f"extend_vocab={self.extend_vocab} is not above 0; leave it out")


def prepare(
    config: PrepareConfig,
    directory: StoragePath | str,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    way_out: str = _WAY_OUT,
    option: str | None = "--tokenizer",
) -> PreparedInfo:
    """Prepare all documents into ``directory``, or find that this has been done.

    The same configuration and text give the same files, byte for byte. The directory appears only
    when it is complete; in a bucket its ``info.json`` does. Progress goes to ``console``; None is
    silent. ``way_out``: what to do where it was prepared otherwise, in words. ``option`` is what
    chooses the tokenizer; None: a base does.
    """
    check_extension(config)
    directory = locate(directory)
    recipe = make_recipe(config)
    check_place(directory)
    if (directory / INFO).exists() and not overwrite:
        info = read_info(directory)
        check_same(directory, info.recipe, recipe, way_out)
        say(console, f"{directory} is already prepared")
        return info
    with building(directory, INFO) as scratch:
        corpus = Corpus(source=config.source, validation_fraction=config.validation_fraction)
        tokenizer = _make_tokenizer(config.tokenizer, config.extend_vocab, corpus, console)
        start = time.perf_counter()
        with bar(console, "tokenising", config.source.size()) as on_read:
            encoded = encode(corpus, tokenizer, scratch, on_read)
        name = dataset_name(directory)
        letters = Letters.of(tokenizer.normalizer, encoded.tally.characters)
        info = finish(
            scratch,
            name,
            encoded.spools,
            tokenizer,
            recipe,
            Counts.of(corpus),
            letters.share,
            console,
        )
    tokens, seconds = sum(info.tokens.values()), time.perf_counter() - start
    say(console, f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds / 1e6:.2f} M a second")
    chosen = config.tokenizer if option else None
    report(console, tokenizer, encoded.tally, chosen, option=option or "")
    if "validation" not in info.rows:
        say(console, "no validation split: training on it takes another folder, too, that has one")
    return info


def check_extension(config: PrepareConfig, prefix: str = "--", *others: str) -> None:
    """:class:`InputError` where no tokenizer is named that new tokens could be added to.

    Its options begin with ``prefix``; ``others`` name a tokenizer, too.
    """
    more, chosen = config.extend_vocab, config.tokenizer
    if more is not None and chosen.path is None:
        names = " or ".join([*others, f"{prefix}tokenizer.path"])
        raise InputError(
            f"{prefix.strip('-')}extend_vocab={more} adds to a tokenizer that is there: name it "
            f"with {names}, or train one with more tokens, with {prefix}extend-vocab None "
            f"{prefix}tokenizer.vocab-size {chosen.vocab_size + more}"
        )


def check_place(directory: StoragePath) -> None:
    """:class:`InputError` if there is anything that must not be overwritten."""
    foreign = directory.exists() and not (directory / INFO).exists()
    if foreign and (directory.is_file() or any(directory.iterdir())):
        raise InputError(
            f"{directory} is or holds something other than prepared data; name a new folder"
        )


def make_recipe(config: PrepareConfig) -> dict[str, Any]:
    """Everything that decides the content, in JSON: equal recipes give equal rows."""
    chosen = config.tokenizer
    if chosen.path is None:
        tokenizer = chosen.describe()
    else:
        tokenizer = tokenizers.fingerprint(tokenizers.load(chosen.path))
    return {
        "format": _FORMAT,
        "source": type(config.source).__name__,
        "source_sha256": config.source.fingerprint(),
        "tokenizer": tokenizer,
        "row_length": config.row_length,
        "validation_fraction": config.validation_fraction,
        **({} if config.extend_vocab is None else {"extend_vocab": config.extend_vocab}),
    }


def check_same(
    where: StoragePath,
    found: dict[str, Any],
    wanted: dict[str, Any],
    way_out: str = _WAY_OUT,
) -> None:
    """:class:`InputError`, with the differences, unless two recipes are equal."""
    differences = [
        f"{name} {found.get(name)} there and {wanted.get(name)} here"
        for name in found | wanted
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise InputError(f"{where} was prepared otherwise ({'; '.join(differences)}); {way_out}")


@dataclass(frozen=True)
class _TrainingTexts:
    """Can be iterated more than once, as training a tokenizer does."""

    corpus: Corpus
    limit: int | None

    def __iter__(self) -> Iterator[str]:
        documents = self.corpus.documents()
        return islice((d.text for d in documents if d.split == "train"), self.limit)


def _make_tokenizer(
    config: TokenizerConfig, more: int | None, corpus: Corpus, console: Console | None
) -> Tokenizer:
    if config.path is None:
        texts = _TrainingTexts(corpus, config.num_documents)
        with bar(console, f"training a {config.kind} tokenizer", None):
            return config.train(texts)
    if more is None:
        return tokenizers.load(config.path)
    with bar(console, "looking for new tokens", None):
        extended = extend(tokenizers.load(config.path), _TrainingTexts(corpus, None), more)
    say(console, str(extended))
    return extended.tokenizer


def dataset_name(directory: StoragePath) -> str:
    """The folder's name as TensorFlow Datasets can bear it: lower case, letters and digits."""
    name = re.sub(r"\W+", "_", absolute(directory).name.lower())
    return name if name[:1].isalpha() else f"data_{name}"


class Counts(NamedTuple):
    """What a pass over documents has counted, as :class:`Corpus` names it."""

    duplicates: int
    blank: int
    lowest: tuple[float, ...]

    @classmethod
    def of(cls, corpus: Corpus) -> "Counts":
        """Those of the latest pass."""
        return cls(corpus.duplicates, corpus.blank, corpus.lowest)


def finish(
    directory: Path,
    name: str,
    spools: dict[str, Spool],
    tokenizer: Tokenizer,
    recipe: dict[str, Any],
    counts: Counts,
    changed_share: float | None,
    console: Console | None,
) -> PreparedInfo:
    """Turn the spools in ``directory`` into rows, ``tokenizer.json`` and ``info.json``."""
    special = SpecialTokens.of(tokenizer)
    contents = {split: spool.read() for split, spool in spools.items()}
    documents = {split: len(each[1]) for split, each in contents.items() if len(each[1])}
    _check_splits(documents, recipe["validation_fraction"], counts.lowest)

    tokens = {split: contents[split][0] for split in documents}
    row_length = recipe["row_length"]
    num_rows = {split: -(-len(ids) // row_length) for split, ids in tokens.items()}
    with bar(console, "writing rows", sum(num_rows.values())) as on_write:
        rows.write(
            directory, name, tokens, row_length=row_length, pad=special.pad, on_write=on_write
        )
    tokenizers.save(tokenizer, directory / TOKENIZER)
    tokenizer_sha256 = tokenizers.fingerprint(tokenizer)
    content = {split: hashlib.sha256(ids.data).hexdigest() for split, ids in tokens.items()}
    decisive = json.dumps([_FORMAT, row_length, tokenizer_sha256, content])
    info = PreparedInfo(
        name=name,
        row_length=row_length,
        vocab_size=tokenizers.vocab_size(tokenizer),
        special=special,
        documents=documents,
        duplicates=counts.duplicates,
        blank=counts.blank,
        rows=num_rows,
        tokens={split: len(ids) for split, ids in tokens.items()},
        bytes={split: int(contents[split][3].sum()) for split in documents},
        fill={split: len(ids) / (num_rows[split] * row_length) for split, ids in tokens.items()},
        unigram_entropy=_entropy(tokens.get("validation", tokens["train"]), special),
        fingerprint=hashlib.sha256(decisive.encode()).hexdigest(),
        tokenizer_sha256=tokenizer_sha256,
        source_fingerprint=recipe["source_sha256"],
        recipe=recipe,
        unknown_share=sum(int((ids == special.unk).sum()) for ids in tokens.values())
        / sum(map(len, tokens.values())),
        changed_share=changed_share,
    )
    info.write(directory)
    for spool in spools.values():
        spool.remove()
    return info


def _check_splits(
    documents: dict[str, int], validation_fraction: float, lowest: Sequence[float]
) -> None:
    if not documents:
        raise InputError("the source holds no document to train on; it may be all blank")
    if documents.keys() == {"train", "validation"} or validation_fraction == 0:
        return
    (split, number), *_ = documents.items()
    if number == 1:
        raise InputError(
            "the source holds one document, of which nothing can be held out for validation: give "
            "more text, or make documents smaller (of text files, with --document line, or, of "
            "those of a config, --prepare.source.document line)"
        )
    none = split == "train"
    way_out = "raise it" if none else "lower it"
    if len(lowest) == 2:  # shards of before know of none
        least, second = lowest
        scales = (10**digits for digits in range(1, 18))
        scale = next(n for n in scales if math.floor(least * n) + 1 < second * n)
        way_out = f"set it to {(math.floor(least * scale) + 1) / scale}, which holds out one"
    raise InputError(
        f"{'none' if none else 'all'} of {number} documents fell to validation at "
        f"validation_fraction={validation_fraction}: {way_out}"
    )


def _entropy(tokens: np.ndarray, special: SpecialTokens) -> float:
    counts = np.zeros(int(tokens.max()) + 1, np.int64)
    for start in range(0, len(tokens), _CHUNK):
        counts += np.bincount(tokens[start : start + _CHUNK], minlength=len(counts))
    framing = np.array([i for i in special.ids if i != special.unk])
    counts[framing[framing < len(counts)]] = 0
    rates = counts[counts > 0] / counts.sum()
    return round(float(-(rates * np.log(rates)).sum()), 6)
