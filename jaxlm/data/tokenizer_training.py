"""Training tokenizers, so that the same texts give the same file."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxlm.data.special_tokens import CLS, MASK, SEP, SPECIALS, UNK, sentinel
from jaxlm.errors import InputError

Kind = Literal["wordpiece", "bpe", "unigram", "characters"]
# Characters that always have a token. Rarer ones have one where there is room, unless they are
# rarer than one in a million: such a token would learn nothing.
_MIN_ALPHABET, _RARE = 1000, 1e-6


def train(
    kind: Kind,
    texts: Iterable[str],
    vocab_size: int,
    *,
    cased: bool = False,
    marks: bool = False,
    alphabet: int | None = None,
    sentinels: int = 0,
) -> Tokenizer:
    """A tokenizer whose first five ids are [PAD] [UNK] [CLS] [SEP] [MASK].

    The same texts give the same file, byte for byte. They are read twice, so an iterator (which
    can be read only once) is first held in memory. ``cased`` and ``marks`` are for wordpiece alone,
    as the others keep all letters; ``alphabet`` is the most characters with a token of their own;
    so many ``sentinels`` have the last ids, the first of them the very last.
    """
    with_space = kind != "characters"
    if sentinels:
        options: Any = {"cased": cased, "marks": marks, "alphabet": alphabet}
        try:
            tokenizer = train(kind, texts, vocab_size - sentinels, **options)
        except InputError as error:
            raise InputError(f"{error} (sentinels={sentinels} are taken off it)") from error
        # lstrip: as of [MASK].
        names = [AddedToken(sentinel(i), lstrip=with_space) for i in reversed(range(sentinels))]
        tokenizer.add_special_tokens(names)
        return tokenizer
    texts = list(texts) if isinstance(texts, Iterator) else texts
    match kind:
        case "wordpiece":
            # Longer words become [UNK] whole; without spaces, as in Thai, a line is a word.
            longest = 1000 if cased or marks else 100  # BERT's
            model = models.WordPiece(unk_token=UNK, max_input_chars_per_word=longest)
            bare = bert(model, lowercase=not cased, marks=marks)
            tokenizer = _train_wordpiece(texts, vocab_size, bare, alphabet)
        case "bpe":
            tokenizer = _train_bpe(texts, vocab_size)
        case "unigram":
            tokenizer = _train_unigram(texts, vocab_size, alphabet)
        case "characters":
            tokenizer = _train_characters(texts, vocab_size, alphabet)
    return with_specials(tokenizer, with_space=with_space)


def with_specials(tokenizer: Tokenizer, *, with_space: bool = True) -> Tokenizer:
    """With the special tokens, and a text framed as [CLS] … [SEP].

    ``with_space``: [MASK] replaces the space before it as well.
    """
    # lstrip: [MASK] replaces a word together with the space that subwords carry before it.
    blank = AddedToken(MASK, lstrip=with_space)
    tokenizer.add_special_tokens([blank if name == MASK else name for name in SPECIALS])
    frame = [(name, tokenizer.token_to_id(name)) for name in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=frame
    )
    return tokenizer


def _train_wordpiece(
    texts: Iterable[str], vocab_size: int, tokenizer: Tokenizer, most: int | None
) -> Tokenizer:
    """BERT's (uncased, unless told otherwise).

    The trainer numbers characters inside words in the order of a hash map, and breaks ties between
    merges by these numbers. Naming all of them beforehand makes it deterministic.
    """
    counts = _characters(texts, tokenizer)
    rare = _RARE * counts.total()
    ranked = [c for i, c in enumerate(counts) if most or i < _MIN_ALPHABET or counts[c] >= rare]
    ranked = ranked[:most]
    least = min(len(ranked), _MIN_ALPHABET)
    needed = len(SPECIALS) + 2 * least
    _check_size(vocab_size, needed, "each character twice")
    # What BERT sets apart from its neighbours, such as a Chinese character, is never inside a word.
    twice = {c: not _is_apart(c, tokenizer) for c in ranked[least:]}
    places = np.cumsum([1 + inside for inside in twice.values()])
    alphabet = sorted(ranked[: least + int((places <= vocab_size - needed).sum())])
    inside = [f"##{character}" for character in alphabet if twice.get(character, True)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    rebuilt = Tokenizer.from_str(tokenizer.to_str())
    longest = tokenizer.model.max_input_chars_per_word
    tokenizer.train_from_iterator(texts, trainer)
    # Rebuilt, because here '##a' is a special token, which would match in raw text.
    rebuilt.model = models.WordPiece(
        _numbered(tokenizer.get_vocab()), unk_token=UNK, max_input_chars_per_word=longest
    )
    return rebuilt


def _is_apart(character: str, tokenizer: Tokenizer) -> bool:
    assert tokenizer.normalizer is not None
    assert tokenizer.pre_tokenizer is not None
    text = tokenizer.normalizer.normalize_str(f"a{character}a")
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) > 1


def bert_normalizer(*, lowercase: bool = True, marks: bool = False) -> normalizers.Normalizer:
    """BERT's; with ``marks`` a lower-cased text keeps its accents, vowel signs and syllables."""
    strip = False if marks else None  # None: if lower-cased
    return normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip)


def bert(model: models.WordPiece, *, lowercase: bool = True, marks: bool = False) -> Tokenizer:
    """BERT's, around a model."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = bert_normalizer(lowercase=lowercase, marks=marks)
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


def _train_unigram(texts: Iterable[str], vocab_size: int, most: int | None) -> Tokenizer:
    """SentencePiece's unigram model (Kudo 2018).

    The trainer finds the same pieces every time, but sums their probabilities in the order of a
    hash map. So the pieces are kept, and the probabilities estimated again by a few rounds of
    Viterbi EM from a uniform start; measured on 12 MB, the text is as short as before to 1e-5.
    """
    tokenizer = _sentencepiece(models.Unigram())
    ranked = list(_characters(texts, tokenizer))[:most]
    _check_size(vocab_size, len(SPECIALS) + min(len(ranked), _MIN_ALPHABET), "each character")
    room = vocab_size - len(SPECIALS) - 2  # for spaces; a trainer that is full goes beyond it
    alphabet = sorted(ranked[:room])
    texts = _Only(texts, frozenset(alphabet))
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
        counts.update(_nfkc().normalize_str(text).split(" "))
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


@dataclass(frozen=True)
class _Only:
    """Texts with a space for each character outside an alphabet; can be read more than once."""

    texts: Iterable[str]
    alphabet: frozenset[str]

    def __iter__(self) -> Iterator[str]:
        outside: dict[int, str | None] = {}
        for text in self.texts:
            for character in set(text) - self.alphabet:
                if ord(character) not in outside:
                    normal = normalizers.NFKC().normalize_str(character)
                    kept = all(c in self.alphabet or c.isspace() for c in normal)
                    outside[ord(character)] = character if kept else " "
            yield text.translate(outside)


def _train_characters(texts: Iterable[str], vocab_size: int, most: int | None) -> Tokenizer:
    """A token for each character, the most frequent first."""
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    if not counts:
        raise InputError("there is no text to train a tokenizer on")
    rare, ranked = _RARE * counts.total(), sorted(counts, key=lambda c: (-counts[c], c))
    kept = [c for c in ranked if most or counts[c] >= rare][:most]
    _check_size(vocab_size, len(SPECIALS) + min(len(kept), _MIN_ALPHABET), "each character")
    tokens = [*SPECIALS, *kept][:vocab_size]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _nfkc() -> normalizers.Normalizer:
    """NFKC, with a space for each line break and tab, which are unknown after lines alone."""
    spaces = normalizers.Replace(Regex(r"\s"), " ")
    return normalizers.Sequence([normalizers.NFKC(), spaces])


def _sentencepiece(model: models.Unigram) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _nfkc()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _characters(texts: Iterable[str], tokenizer: Tokenizer) -> Counter[str]:
    """How often each character is there after normalisation, the most frequent first."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    assert tokenizer.normalizer is not None
    for character, count in raw.items():
        for normal in tokenizer.normalizer.normalize_str(character):
            counts[normal] += count
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    counts = Counter({c: counts[c] for c in ranked if not c.isspace()})
    if not counts:
        raise InputError("there is no text to train a tokenizer on")
    return counts


def _numbered(vocab: Iterable[str]) -> dict[str, int]:
    tokens = [*SPECIALS, *sorted(set(vocab) - set(SPECIALS))]
    return {token: i for i, token in enumerate(tokens)}


def _check_size(vocab_size: int, needed: int, what: str) -> None:
    if vocab_size < needed:
        raise InputError(
            f"vocab_size={vocab_size} is too small: the special tokens and {what} need {needed}"
        )
