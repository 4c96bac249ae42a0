"""What a tokenizer keeps of a text: which share of it is unknown, cut, or written otherwise."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer

from jaxlm.data import tokenizers
from jaxlm.data.special_tokens import SpecialTokens
from jaxlm.data.tokenizer_training import bert_normalizer
from jaxlm.data.tokenizers import TokenizerConfig

TOO_MUCH = 0.01
"""The share of tokens or letters from which there is a warning."""
_CODE_POINTS = 0x110000


class Tally:
    """Counts of the characters of texts, and of their tokens."""

    def __init__(self, unk: int | None) -> None:
        self._unk = unk
        self._characters = np.zeros(_CODE_POINTS, np.int64)
        self.tokens = self.unknown = self.cut = 0

    def add_texts(self, texts: Iterable[str]) -> None:
        """Count their characters."""
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        counts = np.bincount(codes)
        self._characters[: len(counts)] += counts

    def add_tokens(self, tokens: Integer[np.ndarray, " tokens"], cut: int = 0) -> None:
        """Count those that are kept, unknown ones among them, and those that are ``cut``."""
        self.tokens += len(tokens)
        self.unknown += 0 if self._unk is None else int((tokens == self._unk).sum())
        self.cut += cut

    @property
    def cut_share(self) -> float:
        """A share of all tokens that the texts have."""
        return self.cut / max(self.cut + self.tokens, 1)

    @property
    def characters(self) -> dict[str, int]:
        """How often each character is there, the most frequent first."""
        (codes,) = np.nonzero(self._characters)
        order = codes[np.argsort(-self._characters[codes], kind="stable")]
        return {chr(code): int(self._characters[code]) for code in order.tolist()}


@dataclass(frozen=True)
class Letters:
    """Letters and marks of texts, and what a tokenizer writes for those that it changes."""

    total: int
    changed: int
    examples: dict[str, str]
    """The most frequent of those that are changed."""

    @classmethod
    def of(cls, normalizer: Normalizer | None, characters: dict[str, int]) -> "Letters":
        """A small letter for a capital one is no change."""
        letters = {c: n for c, n in characters.items() if unicodedata.category(c)[0] in "LM"}
        changes = {}
        for letter in letters:
            written = letter if normalizer is None else normalizer.normalize_str(letter)
            if letter not in written and letter.lower() not in written:
                changes[letter] = written.strip()
        examples = dict(list(changes.items())[:3])
        return cls(sum(letters.values()), sum(letters[c] for c in changes), examples)

    @property
    def share(self) -> float:
        """A share of all letters."""
        return self.changed / max(self.total, 1)


def report(
    console: Console | None,
    tokenizer: Tokenizer,
    tally: Tally,
    config: TokenizerConfig | None,
    *,
    longer: str | None = None,
    texts: str = "",
    option: str = "--tokenizer",
) -> None:
    """Say what is lost of texts; a warning where it is much, with a way out.

    ``config`` is that of a tokenizer that one may choose; None: it comes with a trained model.
    ``longer`` is how to have fewer tokens cut; None: none can be. ``texts`` says which they are,
    where there are others, and ``option`` is what chooses the tokenizer.
    """
    if console is None:
        return
    letters = Letters.of(tokenizer.normalizer, tally.characters)
    shares = [f"{tally.unknown / max(tally.tokens, 1):.2%} of the tokens are unknown"]
    shares += [] if longer is None else [f"{tally.cut_share:.2%} are cut"]
    shares += [f"{letters.share:.2%} of the letters are changed"]
    of = f"{texts}: " if texts else ""
    console.print(of + ", ".join(shares), highlight=False, soft_wrap=True)
    lines = list(warnings(tokenizer, tally, letters, config, option))
    if longer is not None and tally.cut_share > TOO_MUCH:
        lines.append(f"{tally.cut_share:.1%} of the tokens are cut: {longer}")
    for line in lines:
        console.print(f"warning: {of}{line}", style="yellow", markup=False, soft_wrap=True)


def warnings(
    tokenizer: Tokenizer,
    tally: Tally,
    letters: Letters,
    config: TokenizerConfig | None,
    option: str,
) -> Iterator[str]:
    """What too much of the texts loses, and what one can do about it."""
    if tally.unknown > TOO_MUCH * tally.tokens:
        unknown = unknown_characters(tokenizer, tally.characters)
        which = f"{len(unknown):,} characters have no token{_such_as(unknown)}"
        if not unknown:
            which = "there are words of more than 100 characters, such as lines without spaces"
        yield (
            f"{tally.unknown / tally.tokens:.1%} of the tokens are {tokenizers.UNK}, in which a "
            f"model sees nothing: {which}; {_know_more(config, unknown, option)}"
        )
    if letters.share > TOO_MUCH:
        examples = ", ".join(f"{old} → {new or 'nothing'}" for old, new in letters.examples.items())
        yield (
            f"{letters.share:.1%} of the letters are changed ({examples}); "
            f"{_change_less(config, tally.characters, option)}"
        )


def unknown_characters(
    tokenizer: Tokenizer, characters: Sequence[str] | dict[str, int]
) -> list[str]:
    """Those that become an unknown token where they stand alone."""
    unk = SpecialTokens.of(tokenizer).unk
    encoded = tokenizer.encode_batch(list(characters), add_special_tokens=False)
    pairs = zip(characters, encoded, strict=True)
    return [character for character, encoding in pairs if unk in encoding.ids]


def _such_as(characters: list[str]) -> str:
    return f", such as {' '.join(characters[:5])}" if characters else ""


def _know_more(config: TokenizerConfig | None, unknown: list[str], option: str) -> str:
    if config is None:
        return "choose a base whose tokenizer knows them, such as a multilingual one"
    ways = [f"{option}.kind bpe knows all"]
    if config.path is not None:
        return f"without {option}.path, {ways[0]}"
    if config.alphabet is not None:
        ways.append(f"a larger {option}.alphabet, or none, knows more")
    elif unknown and config.kind != "bpe":
        ways.append(f"{option}.vocab-size {config.vocab_size + 2 * len(unknown)} has room")
    return ", and ".join(ways)


def _change_less(config: TokenizerConfig | None, characters: dict[str, int], option: str) -> str:
    if config is None:
        return "choose a base whose tokenizer keeps them, such as a cased or multilingual one"
    without = f"without {option}.path, " if config.path is not None else ""
    kept = Letters.of(bert_normalizer(marks=True), characters)
    if config.kind == "wordpiece" and kept.share <= TOO_MUCH:
        return (
            f"{without}{option}.marks keeps them (then {kept.share:.2%} are), and "
            f"{option}.cased capital letters as well"
        )
    return f"{without}{option}.kind bpe keeps all"
