"""Tokenizers: which to train or to load, loading and saving, and what models ask of one."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from jaxlm.data.special_tokens import SPECIALS, UNK
from jaxlm.data.tokenizer_training import Kind, bert, train, with_specials
from jaxlm.errors import InputError
from jaxlm.runtime.storage import StoragePath, locate, on_disk

MODULES, LENGTHS = "modules.json", "sentence_bert_config.json"
"""Of a sentence encoder's folder: what follows the encoder, and how texts are cut for it."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer to train on the training documents, or one to load."""

    path: Path | None = None
    """A tokenizer.json, a vocab.txt, or a folder with one of them (such as other prepared data).
    None means to train one."""
    kind: Kind = "wordpiece"
    """Which algorithm to train; bpe works on bytes, so that it knows every character; of characters
    each is a token, spaces and line breaks as well."""
    vocab_size: int = 16_384
    """Number of tokens to train, the five special ones among them."""
    cased: bool = False
    """A wordpiece tokenizer keeps capital letters, and accents; bpe and unigram always do."""
    marks: bool = False
    """A wordpiece tokenizer makes letters small, but keeps their accents and vowel signs, without
    which words of Hindi, Thai, Vietnamese and others are no longer told apart."""
    alphabet: int | None = None
    """The most characters with a token of their own, for all but bpe; None means all that there is
    room for, but those that are rarer than one in a million."""
    sentinels: int = 0
    """Tokens among them that stand for hidden spans, from <extra_id_0> on, for task SpanCorruption;
    100 is usual."""
    num_documents: int | None = None
    """Train on no more than the first so many documents; None means on all."""

    def __post_init__(self) -> None:
        given = [name for name in ("cased", "marks", "alphabet", "sentinels") if vars(self)[name]]
        if given and self.path is not None:
            raise InputError(
                f"tokenizer.{given[0]} is of one to train, and {self.path} is trained: leave out "
                "either"
            )
        if (self.cased or self.marks) and self.kind != "wordpiece":
            raise InputError(
                f"tokenizer.{given[0]} is for wordpiece; {self.kind} keeps capitals and marks "
                "anyway: leave it out"
            )
        if self.alphabet is not None and (self.kind == "bpe" or self.alphabet < 1):
            why = "is not above 0" if self.kind != "bpe" else "has no meaning for bpe, of bytes"
            raise InputError(f"tokenizer.alphabet={self.alphabet} {why}; leave it out")
        if self.sentinels < 0:
            raise InputError(f"tokenizer.sentinels={self.sentinels} is below 0; 0 is none")

    def describe(self) -> str:
        """Which tokenizer it trains: equal texts are equal tokenizers on equal documents."""
        own = [name for name in ("cased", "marks") if vars(self)[name]]
        own += [f"alphabet {self.alphabet}"] if self.alphabet else []
        own += [f"sentinels {self.sentinels}"] if self.sentinels else []
        return " ".join(
            [self.kind, str(self.vocab_size), *own, f"on {self.num_documents or 'all'}"]
        )

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """A new one; ``num_documents`` is up to the caller."""
        own = {"cased": self.cased, "marks": self.marks, "alphabet": self.alphabet}
        return train(self.kind, texts, self.vocab_size, sentinels=self.sentinels, **own)


def load(path: StoragePath | str) -> Tokenizer:
    """From a ``tokenizer.json``, a BERT ``vocab.txt``, or a folder with one of them.

    Or with GPT-2's ``vocab.json`` and ``merges.txt``. What a ``tokenizer_config.json`` beside a
    ``vocab.txt`` says of lower case and accents holds, and that a sentence encoder's folder wants
    lower case, whatever else the tokenizer does. Truncation and padding that the file may prescribe
    are switched off.
    """
    path = locate(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "vocab.txt", path / "vocab.json"]
        present = [candidate for candidate in candidates if candidate.is_file()]
        if not present:
            raise InputError(f"{path} holds neither tokenizer.json nor vocab.txt nor vocab.json")
        path = present[0]
    if not path.is_file():
        raise InputError(f"there is no tokenizer file {path}")
    try:
        if path.suffix == ".txt":
            tokenizer = _load_vocab(path)
        elif path.name == "vocab.json":
            tokenizer = _load_merges(path)
        else:
            tokenizer = Tokenizer.from_str(path.read_text("utf-8-sig"))
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path} is not a tokenizer file ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Here, so that all who read the folder, and compare what they read, have the same tokenizer.
    lengths = _beside(path, LENGTHS) if path.with_name(MODULES).is_file() else {}
    if lengths.get("do_lower_case") is True:
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return tokenizer


def _beside(path: StoragePath, name: str) -> dict[str, Any]:
    """What the file of that name in its folder says, if there is one."""
    beside = path.with_name(name)
    try:
        said = json.loads(beside.read_text("utf-8-sig")) if beside.is_file() else {}
    except ValueError as error:
        raise InputError(f"{beside} is not JSON ({error}): correct it") from error
    if not isinstance(said, dict):
        raise InputError(f"{beside} holds no JSON object: correct it")
    return said


def _load_vocab(path: StoragePath) -> Tokenizer:
    vocab = models.WordPiece.read_file(str(on_disk(path)))
    missing = [name for name in SPECIALS if name not in vocab]
    if missing:
        raise InputError(f"{path} lacks the special tokens {' '.join(missing)}")
    cased = any(token != token.lower() for token in vocab if token not in SPECIALS)
    said = _beside(path, "tokenizer_config.json")
    model = models.WordPiece(vocab, unk_token=UNK)
    # A vocabulary without capitals may still be cased: Chinese or Hindi has none.
    lowercase = said.get("do_lower_case", not cased)
    return with_specials(bert(model, lowercase=lowercase, marks=said.get("strip_accents") is False))


def _load_merges(path: StoragePath) -> Tokenizer:
    """GPT-2's byte-level BPE, which unlike ours puts no space before the text."""
    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise InputError(f"{path} needs merges.txt beside it, which is not there")
    tokenizer = Tokenizer(models.BPE.from_file(str(on_disk(path)), str(on_disk(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"  # its only special token
    if tokenizer.token_to_id(end) is not None:
        tokenizer.add_special_tokens([end])
    return tokenizer


def save(tokenizer: Tokenizer, path: StoragePath | str) -> None:
    """Write a ``tokenizer.json``."""
    locate(path).write_text(text(tokenizer), encoding="utf-8")


def text(tokenizer: Tokenizer) -> str:
    """What is in a ``tokenizer.json``."""
    return tokenizer.to_str(pretty=True) + "\n"


def fingerprint(tokenizer: Tokenizer) -> str:
    """The sha256 of its JSON in a canonical form."""
    canonical = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; ids may have gaps, so it can exceed the number of tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
