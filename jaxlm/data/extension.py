"""Vocabulary extension: new tokens for words that a tokenizer breaks into many pieces.

To WordPiece whole words are added, which it finds before their pieces. To BPE merges are added
behind its own, as if its training went on, on the words of the text at hand. Either way the old
tokens keep their ids, and a text without new ones is cut as before.
"""

import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from jaxlm.data import tokenizers
from jaxlm.errors import InputError

_RARE = 5  # a token that is seen less often would learn little
_UNKNOWN = "words with parts that it does not know, which stay so"


@dataclass(frozen=True)
class Extension:
    """A tokenizer with new tokens, and what they change for the text that they are from."""

    tokenizer: Tokenizer
    wanted: int
    added: tuple[str, ...]
    """As the vocabulary writes them; the best first."""
    before: float
    """Mean number of pieces of a word."""
    after: float
    unknown: int
    """Words, frequent ones, with parts that the tokenizer does not know: no token has those."""

    def __str__(self) -> str:
        few = len(self.added) < self.wanted
        asked = f" of {self.wanted:,} (no more words are there {_RARE} times)" if few else ""
        known = [token for token in self.added if len(token) > 5] or self.added
        return (
            f"vocabulary: {len(self.added):,} new tokens{asked}, such as {', '.join(known[:5])}: "
            f"{self.before:.2f} pieces a word before, {self.after:.2f} with them"
            + (f"; {_UNKNOWN}: {self.unknown:,}" if self.unknown else "")
        )


def extend(tokenizer: Tokenizer, texts: Iterable[str], number: int) -> Extension:
    """Add up to ``number`` tokens for frequent words of some texts, those that save most first.

    Equal texts give equal tokenizers. Words without letters, such as numbers, stay as they are.
    """
    parts = json.loads(tokenizer.to_str())
    model, counts = parts["model"], _count_words(tokenizer, texts)
    if model["type"] not in ("WordPiece", "BPE") or tokenizer.pre_tokenizer is None:
        raise InputError(
            f"the tokenizer's {model['type']} cannot be extended: WordPiece and byte-level BPE can"
        )
    if model.get("end_of_word_suffix") or (
        model["type"] == "BPE" and model.get("continuing_subword_prefix")
    ):
        raise InputError(
            "the tokenizer's BPE marks where words begin or end by affixes, and cannot be extended:"
            " WordPiece and byte-level BPE can"
        )
    unknown = _unknown_pieces(model)
    unknown_words = sum(
        not unknown.isdisjoint(_cut(tokenizer, word))
        for word, count in counts.items()
        if count >= _RARE
    )
    vocab: dict[str, int] = model["vocab"]
    # Added tokens get the ids behind the model's when a file is read, unless the model has them.
    vocab.update({token["content"]: token["id"] for token in parts["added_tokens"]})
    if model["type"] == "WordPiece":
        added = _choose_words(model, counts, number)
    else:
        merges = _choose_merges(_known_runs(tokenizer, counts, unknown), vocab, number)
        model["merges"] += [list(pair) for pair in merges]
        added = ["".join(pair) for pair in merges]
    if not added:
        but = f" ({_UNKNOWN}: {unknown_words:,})" if unknown_words else ""
        raise InputError(
            f"no word is there {_RARE} times or more and in pieces that the tokenizer knows{but}: "
            "there are no new tokens for it in this text; leave extend_vocab out"
        )
    first = tokenizers.vocab_size(tokenizer)
    vocab.update({token: first + i for i, token in enumerate(added)})
    extended = Tokenizer.from_str(json.dumps(parts))
    before, after = (_pieces_a_word(one, counts) for one in (tokenizer, extended))
    return Extension(extended, number, tuple(added), before, after, unknown_words)


def pieces_of_new(old: Tokenizer, new: Tokenizer) -> dict[int, list[int]] | None:
    """Each token that ``new`` has beyond those of ``old``, and the tokens it was before, by id.

    None where it is no extension of it: where some token has another id, or texts are cut
    otherwise before they reach the vocabulary.
    """
    one, other = (json.loads(tokenizer.to_str()) for tokenizer in (old, new))
    same = ("normalizer", "pre_tokenizer")
    known, all_tokens = (x.get_vocab(with_added_tokens=True) for x in (old, new))
    first = tokenizers.vocab_size(old)
    ids = {i: token for token, i in all_tokens.items() if i >= first}
    if (
        any(one[part] != other[part] for part in same)
        or one["model"]["type"] != other["model"]["type"]
        or any(all_tokens.get(token) != i for token, i in known.items())
        or sorted(ids) != list(range(first, first + len(ids)))
    ):
        return None
    added = {token["content"] for token in other["added_tokens"]}
    result = {}
    for i, token in sorted(ids.items()):
        if token in added:  # by another library, as it stands in texts
            result[i] = old.encode(token, add_special_tokens=False).ids
        else:
            result[i] = [piece.id for piece in old.model.tokenize(token)]
        if not result[i]:
            raise InputError(f"the new token {token!r} has no pieces in the tokenizer of the base")
    return result


def _count_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each word with a letter is there, as the vocabulary would write it."""
    normalizer, pre_tokenizer = tokenizer.normalizer, _split_words(tokenizer)
    counts = Counter[str]()
    if pre_tokenizer is None:
        return counts
    for text in texts:
        text = text if normalizer is None else normalizer.normalize_str(text)
        counts.update(
            word
            for word, (start, end) in pre_tokenizer.pre_tokenize_str(text)
            if any(map(str.isalpha, text[start:end]))
        )
    return counts


def _split_words(tokenizer: Tokenizer) -> Any:
    """What splits texts into words: its pre-tokenizer, and more where that leaves texts whole.

    As Gemma's, which leaves it to the merges that no token goes beyond a word. New merges within
    words keep it so, as no inside of a word begins with the mark of a space.
    """
    normalizer, own = tokenizer.normalizer, tokenizer.pre_tokenizer
    if own is None:
        return None
    text = "a a" if normalizer is None else normalizer.normalize_str("a a")
    (first, _), *others = own.pre_tokenize_str(text)
    if others or len(first) < 3:
        return own
    mark = re.escape(first[-2])  # such as ▁
    # Where bytes are letters, white space is one, too, and some of a letter look like punctuation.
    bytes_ = "ByteLevel" in json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])
    space = r"\sĉĊč" if bytes_ else r"\s"
    words = Regex(rf"{mark}[^{mark}{space}]*|[^{mark}{space}]+|[{space}]+")
    more = [] if bytes_ else [pre_tokenizers.Punctuation()]
    return pre_tokenizers.Sequence([own, pre_tokenizers.Split(words, "isolated"), *more])


def _cut(tokenizer: Tokenizer, word: str) -> list[str]:
    return [piece.value for piece in tokenizer.model.tokenize(word)]


def _unknown_pieces(model: dict[str, Any]) -> set[str | None]:
    """What stands for characters that the vocabulary lacks: a token for all, or their bytes."""
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    return {model["unk_token"], *bytes_}


def _pieces_a_word(tokenizer: Tokenizer, counts: Counter[str]) -> float:
    pieces = sum(len(tokenizer.model.tokenize(word)) * count for word, count in counts.items())
    return pieces / max(counts.total(), 1)


def _choose_words(model: dict[str, Any], counts: Counter[str], number: int) -> list[str]:
    """Words by the pieces that they save, given those that were chosen before."""
    vocab, prefix = set(model["vocab"]), model["continuing_subword_prefix"]

    def saved(word: str) -> int:
        if len(word) > model["max_input_chars_per_word"]:
            return 0  # unknown however long the tokens are
        pieces, start = 0, 0
        while start < len(word):
            ends = range(len(word), start, -1)
            starts = prefix if start else ""
            end = next((end for end in ends if starts + word[start:end] in vocab), None)
            if end is None:
                return 0  # unknown as a whole: a mean of pieces would tell nothing of it
            pieces, start = pieces + 1, end
        return (pieces - 1) * counts[word]

    heap = [(-saved(word), word) for word, count in counts.items() if count >= _RARE]
    heapq.heapify(heap)
    chosen: list[str] = []
    while heap and len(chosen) < number:
        gain, word = heapq.heappop(heap)
        if gain == 0:
            break
        now = -saved(word)  # the words chosen since may be pieces of it
        if now != gain:
            heapq.heappush(heap, (now, word))
        else:
            chosen.append(word)
            vocab.add(word)
    return chosen


def _known_runs(
    tokenizer: Tokenizer, counts: Counter[str], unknown: set[str | None]
) -> list[tuple[list[str], int]]:
    """The pieces of all words, with their counts, broken where a word has unknown ones.

    Those are names, not letters: a token that was merged from them would be read as their names.
    """
    return [
        (list(run), count)
        for word, count in counts.items()
        for is_unknown, run in groupby(_cut(tokenizer, word), unknown.__contains__)
        if not is_unknown
    ]


def _choose_merges(
    words: list[tuple[list[str], int]], vocab: dict[str, int], number: int
) -> list[tuple[str, str]]:
    """The pairs of pieces that are next to each other most often, merged one after the other.

    ``words``: their pieces and counts; changed in place.
    """
    pairs, where = Counter[tuple[str, str]](), defaultdict[tuple[str, str], set[int]](set)
    for i, (pieces, count) in enumerate(words):
        for pair in pairwise(pieces):
            pairs[pair] += count
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges: list[tuple[str, str]] = []
    while heap and len(merges) < number:
        minus, pair = heapq.heappop(heap)
        if -minus < _RARE:
            break
        if pairs[pair] != -minus:
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if "".join(pair) in vocab:  # reached by other merges alone
            continue
        merges.append(pair)
        for i in where.pop(pair):
            pieces, count = words[i]
            merged = list(_merged(pieces, pair))
            for old in pairwise(pieces):
                pairs[old] -= count
            for new in pairwise(merged):
                pairs[new] += count
                where[new].add(i)
                heapq.heappush(heap, (-pairs[new], new))
            words[i] = merged, count
    return merges


def _merged(pieces: Sequence[str], pair: tuple[str, str]) -> Iterator[str]:
    i = 0
    while i < len(pieces):
        joined = tuple(pieces[i : i + 2]) == pair
        yield "".join(pair) if joined else pieces[i]
        i += 1 + joined
