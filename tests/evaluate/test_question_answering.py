import itertools

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.evaluate.question_answering import Window, read_windows

CONTEXT = "the cat sat down"
OFFSETS = [(0, 0), (0, 3), (4, 7), (8, 11), (12, 16)]  # [CLS] and four words


def make_window(start, end, offsets=OFFSETS, allowed=None):
    return Window(
        start_logits=np.array(start, np.float32),
        end_logits=np.array(end, np.float32),
        offsets=np.array(offsets),
        allowed=np.ones(len(start), bool) if allowed is None else np.array(allowed),
    )


def test_best_span_and_null_score_by_hand():
    window = make_window([1, 0, 5, 0, 0], [2, 0, 0, 4, 0])
    reading = read_windows(CONTEXT, [window], num_best=2)
    best, second = reading.answers
    assert (best.text, best.start, best.end, best.score) == ("cat sat", 4, 11, 9.0)
    assert second.score == 5.0  # "cat"
    assert second.text == "cat"
    assert reading.null_score == 3.0 - 9.0
    total = np.exp(9) + np.exp(5) + np.exp(3)
    assert best.probability == pytest.approx(np.exp(9) / total)
    assert second.probability == pytest.approx(np.exp(5) / total)


def test_the_end_does_not_stand_before_the_start():
    window = make_window([0, 0, 0, 0, 9], [0, 9, 0, 0, 1])
    best = read_windows(CONTEXT, [window]).answers[0]
    assert (best.text, best.score) == ("down", 10.0)


def test_answers_are_no_longer_than_allowed():
    window = make_window([0, 9, 0, 0, 0], [0, 0, 1, 2, 9])
    for length, text in ((1, "the"), (2, "the cat"), (3, "the cat sat"), (9, CONTEXT)):
        best = read_windows(CONTEXT, [window], max_answer_length=length).answers[0]
        assert best.text == text


def test_the_question_and_the_first_token_are_no_answers():
    start, end = [9, 9, 1, 0, 0], [9, 9, 1, 0, 0]
    allowed = [True, False, True, True, True]
    reading = read_windows(CONTEXT, [make_window(start, end, allowed=allowed)])
    assert reading.answers[0].text == "cat"
    assert all(answer.start >= 4 for answer in reading.answers)
    assert len(reading.answers) == 6  # pairs of three words in order


def test_windows_share_their_answers():
    # Both see "sat"; the second scores it higher, and is surer that there is an answer.
    first = make_window([3, 0, 0, 1, 0], [3, 0, 0, 1, 0])
    offsets = [(0, 0), (8, 11), (12, 16)]
    second = make_window([-1, 4, 0], [-1, 4, 0], offsets)
    reading = read_windows(CONTEXT, [first, second])
    spans = [(answer.start, answer.end) for answer in reading.answers]
    assert len(spans) == len(set(spans))
    assert (reading.answers[0].text, reading.answers[0].score) == ("sat", 8.0)
    assert reading.null_score == -2.0 - 8.0
    assert reading.answer() == "sat"
    assert reading.answer(-11.0) == ""


def test_agrees_with_trying_every_pair():
    rng = np.random.default_rng(0)
    start, end = rng.normal(size=(2, 12))
    allowed = rng.random(12) < 0.7
    offsets = [(2 * i, 2 * i + 1) for i in range(12)]
    window = make_window(start, end, offsets, allowed)
    found = read_windows("x" * 24, [window], num_best=7, max_answer_length=4).answers
    pairs = [
        (float(window.start_logits[i]) + float(window.end_logits[j]), 2 * i, 2 * j + 1)
        for i, j in itertools.product(range(1, 12), repeat=2)
        if allowed[i] and allowed[j] and 0 <= j - i < 4
    ]
    expected = sorted(pairs, reverse=True)[:7]
    assert [(a.score, a.start, a.end) for a in found] == expected


def test_answers_begin_and_end_with_text():
    """Tokens of byte-level BPE begin with the space before their word, or are nothing but it."""
    offsets = [(0, 0), (0, 3), (3, 7), (7, 8), (7, 11)]
    window = make_window([0, 0, 5, 4, 0], [0, 0, 5, 4, 0], offsets)
    answers = read_windows(CONTEXT, [window], max_answer_length=2).answers
    assert [(a.text, a.start, a.end) for a in answers[:1]] == [("cat", 4, 7)]
    assert {CONTEXT[a.start : a.end] for a in answers} == {a.text for a in answers}
    assert all(a.text == a.text.strip() != "" for a in answers)
    spans = [(a.start, a.end) for a in answers]
    assert len(spans) == len(set(spans))  # " cat" and " cat " are one
    assert max(answers, key=lambda a: a.score) == answers[0]


def test_nothing_of_the_context_gives_no_answer():
    reading = read_windows("", [make_window([0, 1], [0, 1], [(0, 0), (0, 3)], [True, False])])
    assert reading.answers == ()
    assert reading.null_score == float("inf")
    assert reading.answer(1e9) == ""


def test_bad_settings_are_named():
    with pytest.raises(InputError, match="num_best=0"):
        read_windows(CONTEXT, [make_window([0, 1], [0, 1], OFFSETS[:2])], num_best=0)
    with pytest.raises(InputError, match="without windows"):
        read_windows(CONTEXT, [])
