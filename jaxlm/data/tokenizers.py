"""Tokenizers: which to train or to load, loading and saving, and what models ask of one."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jaxlm.data.special_tokens import SPECIALS, UNK
from jaxlm.data.tokenizer_training import Kind, bert, train, with_specials
from jaxlm.errors import InputError
from jaxlm.runtime.storage import StoragePath, locate, on_disk

MODULES, LENGTHS = "modules.json", "sentence_bert_config.json"
"""Of a sentence encoder's folder: what follows the encoder, and how texts are cut for it."""
SETTINGS = "tokenizer_config.json"
"""Of any folder of transformers: what its tokenizer's other files do not say."""
_MODEL, _ADDED = "config.json", "added_tokens.json"
_FLAGS = ("lstrip", "rstrip", "single_word")
_END = "<|endoftext|>"  # GPT-2's only special token
_ROBERTA = {
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
_ROLES = (*_ROBERTA, "bos_token", "eos_token")
_OTHER_PROGRAMS = {  # words are found by a dictionary, or are not cut into pieces of words
    "tokenizer_class": ("BertJapaneseTokenizer", "RoFormerTokenizer"),
    "word_tokenizer_type": ("mecab", "sudachi", "jumanpp"),
    "subword_tokenizer_type": ("character", "sentencepiece"),
}


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

    Or with GPT-2's or RoBERTa's ``vocab.json`` and ``merges.txt``. What a ``tokenizer_config.json``
    beside these says of the names of special tokens and a space before the text holds, beside a
    ``vocab.txt`` of lower case, accents and Chinese characters, that tokens were added to a
    vocabulary (as does ``added_tokens.json``), and that a sentence encoder's folder wants lower
    case, whatever else the tokenizer does. Truncation and padding that the file may prescribe are
    switched off.
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
            tokenizer = _with_added(_load_vocab(path), path)
        elif path.name == "vocab.json":
            tokenizer = _with_added(_load_merges(path), path)
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
    _refuse_other_programs(path)
    vocab = models.WordPiece.read_file(str(on_disk(path)))
    missing = [name for name in SPECIALS if name not in vocab]
    if missing:
        raise InputError(f"{path} lacks the special tokens {' '.join(missing)}")
    cased = any(token != token.lower() for token in vocab if token not in SPECIALS)
    said = _beside(path, SETTINGS)
    model = models.WordPiece(vocab, unk_token=UNK)
    # A vocabulary without capitals may still be cased: Chinese or Hindi has none.
    tokenizer = bert(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=said.get("do_lower_case", not cased),
        strip_accents=said.get("strip_accents"),
        handle_chinese_chars=said.get("tokenize_chinese_chars") is not False,
    )
    return with_specials(tokenizer)


def _with_added(tokenizer: Tokenizer, path: StoragePath) -> Tokenizer:
    """With the tokens that were added to a vocabulary, which stand beside it."""
    said = _beside(path, SETTINGS).get("added_tokens_decoder") or {}
    added = {int(i): token for i, token in said.items()}
    where = path.with_name(SETTINGS if added else _ADDED)
    added = added or {i: {"content": token} for token, i in _beside(path, _ADDED).items()}
    for i, token in sorted(added.items()):
        if tokenizer.token_to_id(token["content"]) is None:
            is_special = token.get("special", False)
            flags = {name: token[name] for name in (*_FLAGS, "normalized") if name in token}
            flags = {"normalized": not is_special, **flags}
            tokenizer.add_tokens([AddedToken(token["content"], special=is_special, **flags)])
        if tokenizer.token_to_id(token["content"]) != i:
            raise InputError(
                f"{where}: the token {token['content']!r} has the number {i}, and would get "
                f"{tokenizer.token_to_id(token['content'])} after those of {path.name}, which needs"
                " a tokenizer.json: transformers' AutoTokenizer.from_pretrained(FOLDER)"
                ".save_pretrained writes it"
            )
    return tokenizer


def _refuse_other_programs(path: StoragePath) -> None:
    for name in (SETTINGS, _MODEL):
        said = _beside(path, name)
        for key, others in _OTHER_PROGRAMS.items():
            if said.get(key) in others:
                raise InputError(
                    f"{path.with_name(name)}: {key}={said[key]!r} splits words by a program of its "
                    "own, which is not supported: take a model with a tokenizer.json, such as "
                    "FacebookAI/xlm-roberta-base"
                )


def _load_merges(path: StoragePath) -> Tokenizer:
    """Byte-level BPE: GPT-2's, or RoBERTa's, which has a frame.

    Unlike ours it puts no space before the text, unless that is asked for.
    """
    merges = path.with_name("merges.txt")
    if not merges.is_file():
        raise InputError(f"{path} needs merges.txt beside it, which is not there")
    _refuse_ends_of_words(merges)
    said, model = _beside(path, SETTINGS), _beside(path, _MODEL)
    space = said.get("add_prefix_space") is True
    tokenizer = Tokenizer(models.BPE.from_file(str(on_disk(path)), str(on_disk(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    named = {role: _named(role, said[role]) for role in _ROLES if said.get(role)}
    roberta = {role: _named(role, name) for role, name in _ROBERTA.items()} | named
    cls, sep = roberta["cls_token"].content, roberta["sep_token"].content
    kinds = (said.get("tokenizer_class"), model.get("tokenizer_class"), model.get("model_type"))
    kind = next((str(one).lower() for one in kinds if one), "")
    vocab = tokenizer.get_vocab()
    # Many a GPT-2 has a vocabulary with RoBERTa's names, of which it frames no text.
    is_framed = not kind.startswith("gpt2") and {cls, sep} <= vocab.keys()
    special = roberta.values() if is_framed else (AddedToken(_END), *named.values())
    present = {one.content: one for one in special if one.content in vocab}
    tokenizer.add_special_tokens(list(present.values()))
    if is_framed:
        tokenizer.post_processor = processors.RobertaProcessing(
            (sep, vocab[sep]), (cls, vocab[cls]), add_prefix_space=space
        )
    return tokenizer


def _refuse_ends_of_words(merges: StoragePath) -> None:
    """XLM's and HerBERT's are such: their vocabularies are not of bytes."""
    for number, line in enumerate(merges.read_text("utf-8").split("\n"), 1):
        if line.rstrip().endswith("</w>"):
            raise InputError(
                f"{merges}:{number}: {line.strip()} marks the end of a word, as no vocabulary of "
                "bytes does, which needs a tokenizer.json: transformers' "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained writes it"
            )


def _named(role: str, said: str | dict[str, Any]) -> AddedToken:
    """The token of that role; where only its name is said, a mask replaces the space before it."""
    own = {"content": said} if isinstance(said, str) else said
    flags = {name: own[name] for name in _FLAGS if name in own}
    return AddedToken(own["content"], **({"lstrip": role == "mask_token"} | flags))


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
