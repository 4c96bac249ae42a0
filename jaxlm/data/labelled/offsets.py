"""Places in a text that a file counts in another unit than characters."""

from collections.abc import Sequence

_UNITS = {"UTF-16 units, as JavaScript does": ("utf-16-le", 2), "bytes of UTF-8": ("utf-8", 1)}
UNITS = ("", *_UNITS)
"""What offsets may count, as it is called in a sentence; the first, without a name, is characters.
"""


def places(text: str, unit: str) -> Sequence[int]:
    """The character at each offset, up to the text's end; -1 where one goes on."""
    if unit == "" or text.isascii():
        return range(len(text) + 1)
    encoding, width = _UNITS[unit]
    found: list[int] = []
    for place, character in enumerate(text):
        size = len(character.encode(encoding, "surrogatepass")) // width
        found += [place, *[-1] * (size - 1)]
    return [*found, len(text)]


def at(found: Sequence[int], offset: int) -> int:
    """The character at an offset; -1 where there is none."""
    return found[offset] if 0 <= offset < len(found) else -1
