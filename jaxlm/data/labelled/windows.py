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
    """For each token the window with the most tokens on its poorer side."""
    ends = np.minimum(begins + size, num_tokens)
    # Where the text ends nothing is missing.
    left = np.where(begins == 0, num_tokens, places[:, None] - begins)
    right = np.where(ends == num_tokens, num_tokens, ends - 1 - places[:, None])
    inside = (places[:, None] >= begins) & (places[:, None] < ends)
    return np.where(inside, np.minimum(left, right), -1).argmax(axis=1)


def count(owners: Iterable[int]) -> tuple[int, int]:
    """How many documents have several windows, and how many those are; whose each window is."""
    several = [number for number in Counter(owners).values() if number > 1]
    return len(several), sum(several)


def describe(documents: int, windows: int) -> Iterator[str]:
    """A line on documents that have several windows, if any."""
    if documents:
        many = f"{documents:,} documents are" if documents > 1 else "1 document is"
        yield f"{many} longer than a row, and read in {windows:,} overlapping windows"
