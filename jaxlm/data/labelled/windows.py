"""Windows over a text that is too long for a row: neighbours overlap, and each token is in one."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int


def begins(num_tokens: int, size: int, overlap: int) -> Int[np.ndarray, " windows"]:
    """Where windows of ``size`` tokens begin, each sharing ``overlap`` with the one before."""
    return np.arange(0, max(num_tokens - overlap, 1), size - overlap)


def most_context(
    places: Int[np.ndarray, " places"],
    begins: Int[np.ndarray, " windows"],
    size: int,
    num_tokens: int,
) -> Int[np.ndarray, " places"]:
    """For each token the window with the most tokens on its poorer side, the first of equals.

    Compared are the few windows that a token is in, not all: there are as many as tokens.
    """
    ends = np.minimum(begins + size, num_tokens)
    first = np.searchsorted(ends, places, side="right")
    behind = np.searchsorted(begins, places, side="right")
    best, most = np.zeros(len(places), int), np.full(len(places), -1)
    for ahead in range(int((behind - first).max(initial=0))):
        window = np.minimum(first + ahead, len(begins) - 1)
        # Where the text ends nothing is missing.
        left = np.where(begins[window] == 0, num_tokens, places - begins[window])
        right = np.where(ends[window] == num_tokens, num_tokens, ends[window] - 1 - places)
        context = np.where(first + ahead < behind, np.minimum(left, right), -1)
        best, most = np.where(context > most, window, best), np.maximum(context, most)
    return best


def count(owners: Iterable[int]) -> tuple[int, int]:
    """How many documents have several windows, and how many those are; whose each window is."""
    several = [number for number in Counter(owners).values() if number > 1]
    return len(several), sum(several)


def describe(documents: int, windows: int) -> Iterator[str]:
    """A line on documents that have several windows, if any."""
    if documents:
        many = f"{documents:,} documents are" if documents > 1 else "1 document is"
        yield f"{many} longer than a row, and read in {windows:,} overlapping windows"
