"""Extractive question answering: from scores of first and last tokens to answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the model says about one window of an example; its first token stands for no answer."""

    start_logits: Float[np.ndarray, "length"]
    end_logits: Float[np.ndarray, "length"]
    offsets: Int[np.ndarray, "length 2"]
    """Where each token stands in the context: its first character, and past its last."""
    allowed: Bool[np.ndarray, "length"]
    """Tokens of the context; the first token may be among them, padding may not."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """``context[start:end]``, in characters."""

    text: str
    start: int
    end: int
    score: float
    """The sum of its two logits."""
    probability: float
    """Among the answers beside it and no answer."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was found in all windows of one example."""

    answers: tuple[Answer, ...]
    """Best first; empty where no window holds any of the context."""
    null_score: float
    """By how much no answer is ahead of the best one (below 0: behind)."""

    def answer(self, threshold: float = 0.0) -> str:
        """The best answer, or '' where ``null_score`` is above the threshold."""
        return self.answers[0].text if self.answers and self.null_score <= threshold else ""


def read_windows(
    context: str, windows: Sequence[Window], *, num_best: int = 20, max_answer_length: int = 30
) -> Reading:
    """The best spans over all windows, as in Devlin et al. (2019, section 4.3).

    No answer scores what its most doubtful window gives it: the answer is in another window for
    all the windows that do not hold it, so a single one that sees it is enough.

    Args:
        max_answer_length: in tokens.
    """
    if num_best < 1 or max_answer_length < 1:
        raise InputError(f"{num_best=} and {max_answer_length=} must be above 0")
    if not windows:
        raise InputError("an example without windows has no answer: it needs at least one")
    scores: dict[tuple[int, int], float] = {}
    for window in windows:
        for span, score in _best_spans(window, num_best, max_answer_length):
            start, end = _trimmed(context, *span)
            if start < end:
                scores[start, end] = max(score, scores.get((start, end), -np.inf))
    best = sorted(scores, key=lambda span: (-scores[span], span))[:num_best]
    null = min(float(window.start_logits[0] + window.end_logits[0]) for window in windows)
    logits = np.array([null, *(scores[span] for span in best)], np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    answers = tuple(
        Answer(
            text=context[start:end],
            start=start,
            end=end,
            score=scores[start, end],
            probability=float(probability),
        )
        for (start, end), probability in zip(best, probabilities[1:], strict=True)
    )
    return Reading(answers=answers, null_score=null - answers[0].score if answers else float("inf"))


def _trimmed(context: str, start: int, end: int) -> tuple[int, int]:
    """Without white space at its ends: a byte-level token begins with the space before its word."""
    text = context[start:end]
    return end - len(text.lstrip()), start + len(text.rstrip())


def _best_spans(
    window: Window, num_best: int, max_answer_length: int
) -> list[tuple[tuple[int, int], float]]:
    """The best pairs of a first and a last token, exactly: [length, width] sums are few enough."""
    allowed = window.allowed.copy()
    allowed[0] = False
    start = np.where(allowed, window.start_logits.astype(np.float64), -np.inf)
    end = np.where(allowed, window.end_logits.astype(np.float64), -np.inf)
    width = min(max_answer_length, len(end))
    end = np.concatenate([end, np.full(width - 1, -np.inf)])
    # sums[i, j] is of the span from token i to token i + j.
    sums = start[:, None] + np.lib.stride_tricks.sliding_window_view(end, width)
    order = np.argsort(-sums, axis=None, kind="stable")[:num_best]
    firsts, lengths = np.unravel_index(order, sums.shape)
    return [
        ((int(window.offsets[i, 0]), int(window.offsets[i + j, 1])), float(sums[i, j]))
        for i, j in zip(firsts, lengths, strict=True)
        if np.isfinite(sums[i, j])
    ]
