"""From documents to one long line of token ids for each split, on disk."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, processors

from jaxlm.data import tokenizers
from jaxlm.data.fidelity import Tally
from jaxlm.data.files import OnRead, ignore
from jaxlm.data.sources import Source
from jaxlm.data.special_tokens import SpecialTokens, frame
from jaxlm.errors import InputError

SPLITS = ("train", "validation")
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1024, 1_000_000
_UINT64 = 2.0**64


class Shard(NamedTuple):
    """The shard of all documents that one of several machines prepares."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From 'i/N', i counted from 0."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise InputError(f"shard {text!r} is not i/N with i from 0 to N-1, such as 0/4")
        return cls(int(index), int(count))


WHOLE = Shard(0, 1)


class Document(NamedTuple):
    """A text, its split, and its number in the source."""

    number: int
    split: str
    text: str


@dataclass(kw_only=True)
class Corpus:
    """The distinct documents of a source, or of one shard of it.

    A hash of the text alone decides both split and shard. So copies meet in one shard, where all
    but the first are dropped (a document costs about 100 bytes of memory), and no text is in two
    splits, whatever the order, the number of shards, or the rest of the source.
    """

    source: Source
    validation_fraction: float
    shard: Shard = WHOLE
    duplicates: int = 0  # dropped by the latest pass
    blank: int = 0  # documents without text, which it dropped, too
    lowest: tuple[float, ...] = ()  # shares from which on a document is held out: its least two

    def documents(self, on_read: OnRead = ignore) -> Iterator[Document]:
        """In the order of the source."""
        seen: set[bytes] = set()
        self.duplicates, self.blank, self.lowest = 0, 0, ()
        for number, text in enumerate(self.source.documents(on_read)):
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if int.from_bytes(digest[8:]) % self.shard.count != self.shard.index:
                continue
            if digest in seen:
                self.duplicates += 1
            elif not text or text.isspace():
                self.blank += 1
            else:
                seen.add(digest)
                share = int.from_bytes(digest[:8]) / _UINT64
                if len(self.lowest) < 2 or share < self.lowest[1]:
                    self.lowest = tuple(sorted((*self.lowest, share))[:2])
                yield Document(number, SPLITS[share < self.validation_fraction], text)


class Spool:
    """Token ids of one split, document after document, with each one's length, number and size.

    Four flat files, named by the split; what is read is a memory map.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype):
        self._files = {
            f"{split}.tokens": dtype,
            f"{split}.lengths": np.dtype(np.int64),
            f"{split}.numbers": np.dtype(np.int64),
            f"{split}.sizes": np.dtype(np.int64),
        }
        self._directory = directory

    def append(self, *arrays: np.ndarray) -> None:
        """Add the tokens, lengths, numbers and bytes of text of some documents."""
        for (name, dtype), array in zip(self._files.items(), arrays, strict=True):
            with (self._directory / name).open("ab") as file:
                file.write(array.astype(dtype, copy=False).data)

    def read(self) -> tuple[np.ndarray, ...]:
        """The tokens, lengths, numbers and bytes of text of all documents."""
        return tuple(_map(self._directory / name, dtype) for name, dtype in self._files.items())

    def remove(self) -> None:
        """Delete the files."""
        for name in self._files:
            (self._directory / name).unlink(missing_ok=True)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.exists() or path.stat().st_size == 0:  # neither can be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def make_spools(directory: Path, vocab_size: int) -> dict[str, Spool]:
    """One for each split."""
    dtype = np.dtype(np.uint16 if vocab_size <= 65_536 else np.int32)
    return {split: Spool(directory, split, dtype) for split in SPLITS}


class Encoded(NamedTuple):
    """The tokens of a corpus by split, and what was counted on the way."""

    spools: dict[str, Spool]
    tally: Tally


def encode(
    corpus: Corpus, tokenizer: Tokenizer, directory: Path, on_read: OnRead = ignore
) -> Encoded:
    """Tokenise every document as [CLS] … [SEP], … <sep> <cls> or … </s>, into new spools."""
    result = make_spools(directory, tokenizers.vocab_size(tokenizer))
    framed, tally = _framing(tokenizer), Tally(SpecialTokens.of(tokenizer).unk)
    empty = len(framed.encode("").ids)
    for batch in _batches(corpus.documents(on_read)):
        texts = [document.text for document in batch]
        tally.add_texts(texts)
        encoded = [encoding.ids for encoding in framed.encode_batch_fast(texts)]
        corpus.blank += sum(len(ids) <= empty for ids in encoded)
        for split, spool in result.items():
            chosen = [
                (ids, document.number, len(document.text.encode()))
                for ids, document in zip(encoded, batch, strict=True)
                if document.split == split and len(ids) > empty
            ]
            lengths = np.array([len(ids) for ids, *_ in chosen], np.int64)
            tokens = np.fromiter(
                chain.from_iterable(ids for ids, *_ in chosen), np.int32, lengths.sum()
            )
            tally.add_tokens(tokens)
            numbers, sizes = ([one[i] for one in chosen] for i in (1, 2))
            spool.append(tokens, lengths, np.array(numbers), np.array(sizes))
    return Encoded(result, tally)


def _framing(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that frames each text, and takes a literal '[MASK]' in it for text like any other."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns when we fork later
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    around = frame(tokenizer)
    before, after = ([tokenizer.id_to_token(i) for i in side] for side in around)
    copy.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=list(zip([*before, *after], [*around.before, *around.after], strict=True)),
    )
    return copy


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def interleave(parts: list[Spool], into: Spool) -> None:
    """Join the spools of all shards in the order of the source, as if there were one shard."""
    tokens, lengths, numbers, sizes = zip(*(part.read() for part in parts), strict=True)
    ends = [np.cumsum(part) for part in lengths]
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in numbers])
    places = np.concatenate([np.arange(len(part)) for part in numbers])
    all_numbers, all_sizes = np.concatenate(numbers), np.concatenate(sizes)
    order = np.argsort(all_numbers)
    for start in range(0, len(order), _BATCH_DOCUMENTS):
        chunk = order[start : start + _BATCH_DOCUMENTS]
        pieces = [
            tokens[owner][ends[owner][i] - lengths[owner][i] : ends[owner][i]]
            for owner, i in zip(owners[chunk], places[chunk], strict=True)
        ]
        counts = np.array([len(piece) for piece in pieces])
        into.append(np.concatenate(pieces), counts, all_numbers[chunk], all_sizes[chunk])
