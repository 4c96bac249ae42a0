"""The text that new tokens add to a prompt: where it ends, and what may be shown as it grows."""

from collections.abc import Callable, Collection, Sequence
from typing import Literal

Stopped = Literal["stop_token", "stop_string", "max_new_tokens", "max_length"]
UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character


class Continuation:
    """New tokens of one row, and their text.

    A row ends with the first token by which one of ``stop_strings`` stands in its text, over
    however many tokens it is spread; the text is cut where that string begins. A string that is
    complete before the ``min_tokens``-th token does not count. Of a stop token the text holds
    nothing.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt: Sequence[int],
        *,
        stop_tokens: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        min_tokens: int = 0,
        max_tokens: int,
    ):
        self._decode, self._prompt = decode, list(prompt)
        # Decoded with the prompt: a word alone may lose the space before it.
        self._skipped = len(decode(self._prompt))
        self._stop_tokens, self._stop_strings = stop_tokens, stop_strings
        self._min_tokens, self._max_tokens = min_tokens, max_tokens
        self._shown = 0
        self.tokens: list[int] = []
        self.text = ""
        self.stopped: Stopped | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens; those behind a stop string are dropped."""
        old, new = len(self.tokens), [*self.tokens, *tokens]
        self.tokens, self.text = new, self._text(new)
        if new and new[-1] in self._stop_tokens:
            self.stopped = "stop_token"
        elif len(new) >= self._max_tokens:
            self.stopped = "max_new_tokens"
        if self._begins(new, self.text) is None:
            return
        for count in range(old + 1, len(new) + 1):
            text = self._text(new[:count])
            if (begins := self._begins(new[:count], text)) is not None:
                self.tokens, self.text, self.stopped = new[:count], text[:begins], "stop_string"
                return

    def show(self) -> str:
        """What is new and certain: no half character, and nothing that may be of a stop string."""
        text = self.text
        if self.stopped is None:
            text = text.rstrip(UNFINISHED)
            held = (
                size
                for stop in self._stop_strings
                for size in range(len(stop) - 1, 0, -1)
                if text.endswith(stop[:size])
            )
            text = text[: len(text) - max(held, default=0)]
        shown, self._shown = self._shown, max(self._shown, len(text))
        return text[shown:]

    def _text(self, tokens: Sequence[int]) -> str:
        if tokens and tokens[-1] in self._stop_tokens:
            tokens = tokens[:-1]
        return self._decode([*self._prompt, *tokens])[self._skipped :]

    def _begins(self, tokens: Sequence[int], text: str) -> int | None:
        """Where the first stop string begins, if there is one."""
        if not self._stop_strings or len(tokens) < self._min_tokens:
            return None
        early = len(self._text(tokens[: self._min_tokens - 1])) if self._min_tokens > 1 else 0
        found = (text.find(stop, max(0, early - len(stop) + 1)) for stop in self._stop_strings)
        return min((begins for begins in found if begins >= 0), default=None)
