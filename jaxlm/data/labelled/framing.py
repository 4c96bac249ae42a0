"""From texts to rows of token ids, framed as the tokenizer's post-processor frames them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32
from tokenizers import Encoding, Tokenizer

from jaxlm.data.special_tokens import SpecialTokens, post_processed
from jaxlm.errors import InputError

_CHUNK = 1024  # texts tokenised at once, so that few of the library's bulky encodings are alive

Ids = Int32[np.ndarray, " _"]  # of one text; two may differ in length


@dataclass(frozen=True, kw_only=True)
class Framed:
    """One row: special tokens around, and between, one or two texts."""

    tokens: Ids
    token_type_ids: Ids
    starts: tuple[int, ...]
    """Where each text begins."""


class Framer:
    """Tokenises texts, and frames one or two of them, such as [CLS] first [SEP] second [SEP].

    The frame is read off the tokenizer's post-processor once, so that texts can be cut to fit
    before they are framed. Names of special tokens in a text are text like any other. ``source`` is
    the tokenizer of sources, where these have another than their targets. ``most`` is what the
    model reads, beyond which no ``max_length`` helps; None: any length.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        source: Tokenizer | None = None,
        most: int | None = None,
    ):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns at forks
        copy = Tokenizer.from_str(tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        self._frames: dict[int, _Frame] = {count: _Frame.of(copy, count) for count in (1, 2)}
        copy.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.source: Framer = self if source is None else Framer(source, max_length, most=most)
        self.special = SpecialTokens.of(tokenizer)
        self.max_length, self.most = max_length, most
        self._tokenizer = copy
        self._space = space_before(copy)
        if self.room(2) < 2:
            is_all = most is not None and max_length >= most
            way = "take a model that reads more" if is_all else "raise it"
            raise InputError(
                f"max_length={max_length} leaves no room for two texts among "
                f"{max_length - self.room(2)} special tokens; {way}"
            )

    @property
    def or_longer(self) -> str:
        """The end of a message on rows that are too short: what of their length can be changed."""
        if self.most is None or self.max_length < self.most:
            return ", or train with a larger data.max_length"
        return f" (the model reads {self.most} at most, whatever data.max_length says)"

    def room(self, num_texts: int) -> int:
        """Tokens that one text, or two together, may have."""
        return self.max_length - self._frames[num_texts].size

    def ids(self, texts: Sequence[str]) -> Iterator[Ids]:
        """The tokens of each text, without special tokens."""
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            for encoding in self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)

    def encodings(
        self,
        texts: Sequence[str] | Sequence[list[str]],
        spaced: Sequence[Sequence[bool] | None] | None = None,
    ) -> Iterator[Encoding]:
        """The same with the offsets of tokens in texts, or in lists of words.

        ``spaced`` says of the words of each list before which there is a space; None: before all.
        """
        for start in range(0, len(texts), _CHUNK):
            chunk: list[Any] = list(texts[start : start + _CHUNK])
            words = not isinstance(chunk[0], str)
            if words and self._space:
                gaps = (spaced or [None] * len(texts))[start : start + _CHUNK]
                chunk = [list(self._spelled(*pair)) for pair in zip(chunk, gaps, strict=True)]
            yield from self._tokenizer.encode_batch(
                chunk, is_pretokenized=words, add_special_tokens=False
            )

    def _spelled(self, words: list[str], spaced: Sequence[bool] | None) -> Iterator[str]:
        for word, gap in zip(words, spaced or [True] * len(words), strict=True):
            yield (self._space if gap else "") + word.lstrip(" ")

    def frame(self, *texts: Ids) -> Framed:
        """Frame one or two texts; the longer is cut at its end until they fit."""
        return self._frames[len(texts)].put(_cut(texts, self.room(len(texts))))

    def size(self, *texts: Ids) -> int:
        """Tokens of the frame of texts that are not truncated."""
        return self._frames[len(texts)].size + sum(map(len, texts))


def space_before(tokenizer: Tokenizer) -> str:
    """What must stand before each of a list of words for its tokens to be those of joined text.

    To a byte-level tokenizer without ``add_prefix_space`` (RoBERTa's, ModernBERT's), and to one
    that writes a space as '▁' and puts none before a text, a word alone is the rest of a longer
    one. One that does so itself, or splits at spaces, needs nothing.
    """
    alone = lambda words, **kind: tokenizer.encode(words, add_special_tokens=False, **kind).ids
    second = alone("a a")[len(alone("a")) :]
    for space in ("", " "):
        if alone([f"{space}a"], is_pretokenized=True) == second:
            return space
    return ""


def _cut(texts: tuple[np.ndarray, ...], room: int) -> list[np.ndarray]:
    if len(texts) == 1:
        return [texts[0][:room]]
    first, second = texts
    # The shorter has at least half of the room, and the longer what the shorter leaves.
    second = second[: max(room // 2, room - len(first))]
    return [first[: room - len(second)], second]


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Special tokens before, between and after texts; and all their type ids."""

    specials: list[np.ndarray]
    special_types: list[np.ndarray]
    text_types: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, num_texts: int) -> "_Frame":
        encoding = post_processed(tokenizer, num_texts)
        owners = np.array([-1 if owner is None else owner for owner in encoding.sequence_ids])
        spans = [np.flatnonzero(owners == text)[[0, -1]] + [0, 1] for text in range(num_texts)]
        bounds = [0, *np.concatenate(spans).tolist(), len(owners)]
        gaps = [slice(*bounds[i : i + 2]) for i in range(0, len(bounds), 2)]
        ids = np.array(encoding.ids, np.int32)
        types = np.array(encoding.type_ids, np.int32)
        return cls(
            specials=[ids[gap] for gap in gaps],
            special_types=[types[gap] for gap in gaps],
            text_types=[int(types[start]) for start, _ in spans],
        )

    @property
    def size(self) -> int:
        return sum(map(len, self.specials))

    def put(self, texts: list[np.ndarray]) -> Framed:
        tokens, types = [self.specials[0]], [self.special_types[0]]
        starts = []
        for i, text in enumerate(texts):
            starts.append(sum(map(len, tokens)))
            tokens += [text, self.specials[i + 1]]
            types += [np.full(len(text), self.text_types[i], np.int32), self.special_types[i + 1]]
        return Framed(
            tokens=np.concatenate(tokens),
            token_type_ids=np.concatenate(types),
            starts=tuple(starts),
        )
