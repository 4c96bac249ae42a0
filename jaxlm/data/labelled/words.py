"""From a text to words, split as those of training data are."""

import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Literal

Split = Literal["space", "punctuation", "characters", "fine"]

_CHINESE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Thai and Lao, Burmese, Khmer, which have no spaces between words either.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\uff66-\uff9f" + _CHINESE
_ALONE = "。，、；：！？「」『』（）《》…"  # which no space need follow
_ABBREVIATION = re.compile(r"(\w\.){2,}")  # such as U.S., which keeps its last point
_JOINERS = "\u200c\u200d"
_MARKS = frozenset(".,;:!?。，、；：！？")


def split_words(text: str, split: Split) -> list[str]:
    """The words of a text, which follow each other in it with nothing but white space between.

    ``space``: at white space; ``punctuation``: marks at the ends of words are words as well;
    ``characters``: so is each Chinese character and kana. A text in which points or commas stand
    alone is split already. ``fine``: as :func:`split_finely` does.
    """
    if split == "fine":
        return [word.group() for word in split_finely(text)]
    parts = text.split()
    if split == "space" or not {".", ","}.isdisjoint(parts):
        return parts
    words = []
    for part in parts:
        alone = _ALONE + (_CHINESE if split == "characters" else "")
        for piece in re.findall(f"[{alone}]|[^{alone}]+", part):
            words += _apart(piece)
    return words


def _apart(part: str) -> list[str]:
    """A word, and the marks around it; those inside, as in O'Neill or 3.5, are part of it."""
    start, end = 0, len(part)
    while start < end and _is_mark(part[start]) and not part[start:].startswith(("@", "#")):
        start += 1
    while end > start and _is_mark(part[end - 1]) and not _ABBREVIATION.fullmatch(part[start:end]):
        end -= 1
    return [*part[:start], *([part[start:end]] if start < end else []), *part[end:]]


@cache
def _combining() -> str:
    """What belongs to the character before it: vowel signs, accents that stand apart, joiners."""
    characters = map(chr, range(sys.maxunicode + 1))
    return _JOINERS + "".join(c for c in characters if unicodedata.category(c)[0] == "M")


@cache
def _pattern(pattern: str) -> re.Pattern[str]:
    """With ``MARKS`` for what belongs to the character before it, which is not in Python's \\w."""
    return re.compile(pattern.replace("MARKS", _combining()).replace("UNSPACED", _UNSPACED))


def split_finely(text: str) -> Iterator[re.Match[str]]:
    """Where in a text each run of letters and digits stands, and each other visible character.

    So does each letter of scripts that have no spaces between words.
    """
    letter = r"(?![UNSPACED])"
    pattern = rf"{letter}\w(?:{letter}[\wMARKS])*|\S[MARKS]*"
    return _pattern(pattern).finditer(text)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character) in ("Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sc")


def find_split(sentences: Iterable[list[str]]) -> Split:
    """How the words of training data were split."""
    alone = attached = single = longer = 0
    for words in sentences:
        for word in words:
            alone += word in _MARKS
            attached += bool(_pattern(r"\w[MARKS]*[.,;:!?]$").search(word))
            if re.match(f"[{_CHINESE}]", word):
                single += len(word) == 1
                longer += len(word) > 1
    if single > longer:
        return "characters"
    return "space" if attached > alone else "punctuation"
