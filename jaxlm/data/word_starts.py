"""Where words begin, for masking whole ones."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool
from tokenizers import Tokenizer, pre_tokenizers

from jaxlm.data.tokenizers import vocab_size

# Scripts that put no spaces between words: a token of theirs counts as a word, as each Chinese
# character does for BERT (Devlin et al. 2018; multilingual.md of the code that they released).
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # Chinese characters, kana, bopomofo, their punctuation, Yi
    (0xF900, 0xFAFF),
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFFEF),  # full-width forms
    (0x20000, 0x3FFFF),
)


def word_starts(tokenizer: Tokenizer) -> Bool[np.ndarray, " vocab"] | None:
    """True where a token begins a word; special tokens stand alone, so they do.

    So does each token that begins with a character of a script without spaces. None where tokens do
    not tell: neither WordPiece's, nor of bytes, nor with '▁' for a space.
    """
    definition = json.loads(tokenizer.to_str())
    pre_tokenizer = json.dumps(definition["pre_tokenizer"])
    spaces_are_written = "Metaspace" in pre_tokenizer or _writes_spaces(definition["normalizer"])
    if definition["model"]["type"] == "WordPiece":
        inside = definition["model"]["continuing_subword_prefix"]
        begins = lambda token: not token.startswith(inside)
        first = lambda token: token.removeprefix(inside)[:1]
    elif "ByteLevel" in pre_tokenizer:
        begins = lambda token: token.startswith("Ġ")
        first = _first_of_bytes()
    elif spaces_are_written:
        begins = lambda token: token.startswith("▁")
        first = lambda token: token[:1]
    else:
        return None
    special = {token["content"] for token in definition["added_tokens"] if token["special"]}
    table = np.zeros(vocab_size(tokenizer), bool)
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        table[i] = token in special or begins(token) or _without_spaces(first(token))
    return table


def _writes_spaces(normalizer: dict[str, Any] | None) -> bool:
    """Whether it replaces spaces by '▁', as Gemma's and Llama 2's."""
    steps = (normalizer or {}).get("normalizers", [normalizer])
    replacements = (step for step in steps if step and step["type"] == "Replace")
    return any(
        step["pattern"] == {"String": " "} and step["content"] == "▁" for step in replacements
    )


def _without_spaces(character: str) -> bool:
    return bool(character) and any(a <= ord(character) <= b for a, b in _WITHOUT_SPACES)


def _first_of_bytes() -> Callable[[str], str]:
    """The first character of a byte-level token; of a cut one, the first with the same bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # GPT-2 writes printable bytes as themselves, and the others, in their order, from 256 on.
    plain = [ord(character) for character in alphabet if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in plain]
    bytes_of = {chr(byte): byte for byte in plain}
    bytes_of |= {chr(256 + i): byte for i, byte in enumerate(others)}

    def first(token: str) -> str:
        raw = bytes(bytes_of[character] for character in token[:4] if character in bytes_of)
        size = next(
            (n for n, low in ((4, 0xF0), (3, 0xE0), (2, 0xC0)) if raw[:1] >= bytes([low])), 1
        )
        if size == 1:
            return raw[:1].decode(errors="ignore")
        return raw[:size].ljust(size, b"\x80").decode(errors="ignore")[:1]

    return first
