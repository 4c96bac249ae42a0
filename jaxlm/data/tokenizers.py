"""Tokenizers: training that gives the same file twice, loading, and what models ask of one."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
from jaxtyping import Bool
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxlm.errors import InputError
from jaxlm.runtime.storage import StoragePath, locate, on_disk

Kind = Literal["wordpiece", "bpe", "unigram"]
PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MAX_ALPHABET = 1000  # rarer characters become [UNK] in WordPiece and Unigram


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens with a meaning of their own, found by name (BERT's or RoBERTa's)."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        """Those of a tokenizer; :class:`InputError` names the one it lacks."""
        return cls(
            pad=_find(tokenizer, PAD, "<pad>"),
            unk=_find(tokenizer, UNK, "<unk>"),
            cls=_find(tokenizer, CLS, "<s>"),
            sep=_find(tokenizer, SEP, "</s>"),
            mask=_find(tokenizer, MASK, "<mask>"),
        )


def _find(tokenizer: Tokenizer, *names: str) -> int:
    ids = [tokenizer.token_to_id(name) for name in names]
    found = [i for i in ids if i is not None]
    if not found:
        raise InputError(f"the tokenizer has no token {' or '.join(names)}; add it, or use another")
    return found[0]


def train(kind: Kind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer whose first five ids are [PAD] [UNK] [CLS] [SEP] [MASK].

    The same texts give the same file, byte for byte. They are read twice, so an iterator (which
    can be read only once) is first held in memory.
    """
    texts = list(texts) if isinstance(texts, Iterator) else texts
    match kind:
        case "wordpiece":
            tokenizer = _train_wordpiece(texts, vocab_size)
        case "bpe":
            tokenizer = _train_bpe(texts, vocab_size)
        case "unigram":
            tokenizer = _train_unigram(texts, vocab_size)
    return _with_specials(tokenizer)


def _with_specials(tokenizer: Tokenizer) -> Tokenizer:
    # lstrip: [MASK] replaces a word together with the space that subwords carry before it.
    tokenizer.add_special_tokens([AddedToken(name, lstrip=name == MASK) for name in SPECIALS])
    frame = [(name, tokenizer.token_to_id(name)) for name in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=frame
    )
    return tokenizer


def _train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BERT's (uncased).

    The trainer numbers characters inside words in the order of a hash map, and breaks ties between
    merges by these numbers. Naming all of them beforehand makes it deterministic.
    """
    tokenizer = _bert(models.WordPiece(unk_token=UNK))
    alphabet = _alphabet(texts, tokenizer)
    inside = [f"##{character}" for character in alphabet]
    _check_size(vocab_size, len(SPECIALS) + 2 * len(alphabet), "each character twice")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Rebuilt, because here '##a' is a special token, which would match in raw text.
    return _bert(models.WordPiece(_numbered(tokenizer.get_vocab()), unk_token=UNK))


def _bert(model: models.WordPiece, lowercase: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """GPT-2's byte-level BPE, with a space put before the text so that its first word is a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    _check_size(vocab_size, len(SPECIALS) + 256, "all bytes")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """SentencePiece's unigram model (Kudo 2018).

    The trainer finds the same pieces every time, but sums their probabilities in the order of a
    hash map. So the pieces are kept, and the probabilities estimated again by a few rounds of
    Viterbi EM from a uniform start; measured on 12 MB, the text is as short as before to 1e-5.
    """
    tokenizer = _sentencepiece(models.Unigram())
    alphabet = _alphabet(texts, tokenizer)
    _check_size(vocab_size, len(SPECIALS) + len(alphabet), "each character")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        unk_token=UNK,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = list(_numbered(tokenizer.get_vocab()))

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizers.NFKC().normalize_str(text).split(" "))
    words = sorted(counts)
    scores = np.full(len(pieces), -10.0)
    for _ in range(4):
        tokenizer = _sentencepiece(
            models.Unigram(list(zip(pieces, scores.tolist(), strict=True)), unk_id=1)
        )
        encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(words)]
        uses = np.repeat([counts[word] for word in words], [len(ids) for ids in encoded])
        used = np.bincount(list(chain.from_iterable(encoded)), uses, len(pieces)) + 0.1
        scores = np.round(np.log(used / used.sum()), 6)  # rounded: libm differs in the last bit
    return tokenizer


def _sentencepiece(model: models.Unigram) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _alphabet(texts: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """The most frequent characters, after normalisation, sorted."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for normal in tokenizer.normalizer.normalize_str(character):
            counts[normal] += count
    counts = Counter({c: n for c, n in counts.items() if not c.isspace()})
    if not counts:
        raise InputError("there is no text to train a tokenizer on")
    return sorted(sorted(counts, key=lambda c: (-counts[c], c))[:_MAX_ALPHABET])


def _numbered(vocab: Iterable[str]) -> dict[str, int]:
    tokens = [*SPECIALS, *sorted(set(vocab) - set(SPECIALS))]
    return {token: i for i, token in enumerate(tokens)}


def _check_size(vocab_size: int, needed: int, what: str) -> None:
    if vocab_size < needed:
        raise InputError(
            f"vocab_size={vocab_size} is too small: the special tokens and {what} need {needed}"
        )


def load(path: StoragePath | str) -> Tokenizer:
    """From a ``tokenizer.json``, a BERT ``vocab.txt``, or a folder that holds one of them.

    Truncation and padding that the file may prescribe are switched off.
    """
    path = locate(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "vocab.txt"]
        present = [candidate for candidate in candidates if candidate.is_file()]
        if not present:
            raise InputError(f"{path} holds neither tokenizer.json nor vocab.txt")
        path = present[0]
    if not path.is_file():
        raise InputError(f"there is no tokenizer file {path}")
    try:
        tokenizer = (
            _load_vocab(path)
            if path.suffix == ".txt"
            else Tokenizer.from_str(path.read_text("utf-8"))
        )
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path} is not a tokenizer file ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_vocab(path: StoragePath) -> Tokenizer:
    vocab = models.WordPiece.read_file(str(on_disk(path)))
    missing = [name for name in SPECIALS if name not in vocab]
    if missing:
        raise InputError(f"{path} lacks the special tokens {' '.join(missing)}")
    cased = any(token != token.lower() for token in vocab if token not in SPECIALS)
    return _with_specials(_bert(models.WordPiece(vocab, unk_token=UNK), lowercase=not cased))


def save(tokenizer: Tokenizer, path: StoragePath | str) -> None:
    """Write a ``tokenizer.json``."""
    locate(path).write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")


def fingerprint(tokenizer: Tokenizer) -> str:
    """The sha256 of its JSON in a canonical form."""
    canonical = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id; ids may have gaps, so it can exceed the number of tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def word_starts(tokenizer: Tokenizer) -> Bool[np.ndarray, " vocab"]:
    """True where a token begins a word; special tokens stand alone, so they do."""
    definition = json.loads(tokenizer.to_str())
    pre_tokenizer = json.dumps(definition["pre_tokenizer"])
    if definition["model"]["type"] == "WordPiece":
        inside = definition["model"]["continuing_subword_prefix"]
        begins = lambda token: not token.startswith(inside)
    elif "ByteLevel" in pre_tokenizer:
        begins = lambda token: token.startswith("Ġ")
    elif "Metaspace" in pre_tokenizer:
        begins = lambda token: token.startswith("▁")
    else:
        raise InputError(
            f"where words begin is unknown for a {definition['model']['type']} tokenizer that is "
            "neither byte-level nor uses '▁'; mask by token instead"
        )
    special = {token["content"] for token in definition["added_tokens"] if token["special"]}
    table = np.zeros(vocab_size(tokenizer), bool)
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        table[i] = token in special or begins(token)
    return table
