"""Answers in windows of a context."""

import pytest

from jaxlm.data import tokenizers
from jaxlm.data.labelled import question_answering
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.question_answering import Question, SpanFields
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError


def question(context: str, answer: str | None, asked: str = "who ?") -> Question:
    found = () if answer is None else (answer,)
    starts = tuple(context.index(text) for text in found)
    return Question(
        id="q1", question=asked, context=context, answers=found, starts=starts, origin="a.json"
    )


def test_windows_by_hand(framer, words):
    # 12 - [CLS] who ? [SEP] … [SEP] leaves 7 tokens to the context, of which 3 are shared.
    context = "a b c d e f g h john smith a b"
    encoded = question_answering.encode(
        framer, [question(context, "John Smith".lower())], doc_stride=3
    )
    rows = encoded.examples.rows
    assert [words(row["tokens"]) for row in rows] == [
        "[CLS] who ? [SEP] a b c d e f g [SEP]",
        "[CLS] who ? [SEP] e f g h john smith a [SEP]",
        "[CLS] who ? [SEP] john smith a b [SEP]",
    ]
    assert [(int(row["starts"]), int(row["ends"])) for row in rows] == [(0, 0), (8, 9), (4, 5)]
    assert rows[2]["allowed"].tolist() == [True, *[False] * 3, *[True] * 4, False]
    assert rows[2]["token_type_ids"].tolist() == [0] * 4 + [1] * 5
    for row, window in zip(rows, encoded.windows, strict=True):
        assert window.example == 0
        assert len(window.offsets) == row["lengths"] == len(row["tokens"])
        assert ((window.offsets[:, 0] >= 0)[1:] == row["allowed"][1:]).all()
        for token, (begin, end) in zip(row["tokens"], window.offsets, strict=True):
            assert begin < 0 or context[begin:end] == words([token])


def test_a_window_holds_the_answer_or_does_not(framer):
    context = "a b c d e f john smith g h"  # the first window ends after john
    rows = question_answering.encode(
        framer, [question(context, "john smith")], doc_stride=2
    ).examples.rows
    assert [(int(row["starts"]), int(row["ends"])) for row in rows] == [(0, 0), (5, 6)]


def test_each_context_token_is_in_a_window_and_none_is_superfluous(framer):
    for length in range(1, 30):
        context = " ".join("abcdefgh"[i % 8] for i in range(length))
        windows = question_answering.encode(framer, [question(context, None)], doc_stride=2).windows
        seen = {tuple(place) for window in windows for place in window.offsets.tolist()}
        assert len(seen - {(-1, -1)}) == length
        assert len(windows) == (1 if length <= 7 else 1 + -(-(length - 7) // 5))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
@pytest.mark.parametrize("answer", ["Rôme", "Rôme, 1", " saw (the ", "(the  café)", "x"])
def test_answers_map_back_to_their_characters(kind, answer):
    context = "In Rôme, 1 saw (the  café) twice; x — y."
    tokenizer = tokenizers.train(kind, [context, "who ?"] * 3, 600)
    encoded = question_answering.encode(
        Framer(tokenizer, 64), [question(context, answer)], doc_stride=4
    )
    (row,), (window,) = encoded.examples.rows, encoded.windows
    begin, end = window.offsets[row["starts"], 0], window.offsets[row["ends"], 1]
    assert row["starts"] > 0
    assert context[begin:end].strip() == answer.strip()


def test_questions_number_their_windows(framer):
    questions = [question("a " * 12, None), question("b c", "c")]
    encoded = question_answering.encode(framer, questions, doc_stride=2)
    assert [window.example for window in encoded.windows] == [0, 0, 1]
    assert int(encoded.examples.rows[-1]["starts"]) == 5


def test_a_question_that_leaves_no_room(framer):
    """Only where the context does not fit there: one window shares nothing with others."""
    long = "who " * 6
    with pytest.raises(InputError, match=r"question q1 of 6 tokens leaves 3 of max_length=12 .*=3"):
        question_answering.encode(framer, [question("a b c d", None, long)], doc_stride=3)
    with pytest.raises(InputError, match=r": shorten the question, train with .* below 3, or"):
        question_answering.encode(framer, [question("a b c d", None, long)], doc_stride=3)
    (row,) = question_answering.encode(
        framer, [question("a b c", "c", long)], doc_stride=3
    ).examples.rows
    assert row["starts"] == row["ends"] == 10
    with pytest.raises(InputError, match=r"leaves -1 .*: shorten the question, or train"):
        question_answering.encode(framer, [question("a", None, "who " * 10)], doc_stride=0)


def test_an_answer_that_no_window_holds_is_counted(framer):
    """Its windows share fewer tokens than it has, and not each such answer lies across an end."""
    words = [*"abcdefghijkl"]
    questions = [question(" ".join(words), " ".join(words[i : i + 4])) for i in range(8)]
    for stride in (1, 4):
        encoded = question_answering.encode(framer, questions, doc_stride=stride)
        rows, notes = encoded.examples.rows, encoded.examples.notes
        pairs = zip(encoded.windows, rows, strict=True)
        found = {window.example for window, row in pairs if row["ends"]}
        if stride == 4:
            assert len(found) == 8
            assert not notes
        else:
            assert 0 < len(found) < 8
            assert f" to {8 - len(found)} questions (of up to 4 tokens)" in notes[0]
            assert "raise task.doc_stride=1, which windows share, or train with" in notes[0]


def test_an_answer_without_tokens(framer):
    with pytest.raises(InputError, match=r"a.json: the tokenizer drops all of the answer"):
        question_answering.encode(framer, [question("a \u200d b", "\u200d")], doc_stride=3)


def record(**changes) -> Record:
    fields = {
        "id": 7,
        "question": "who ?",
        "context": "John lives in York.",
        "answers/text": ["York", "in York"],
        "answers/answer_start": [14, 11],
    }
    return Record(fields=fields | changes, origin="a.jsonl:3")


def test_reading_questions():
    (read,) = question_answering.read([record()], SpanFields())
    assert (read.id, read.answers, read.starts) == ("7", ("York", "in York"), (14, 11))
    fields = SpanFields(answers="answer", starts=None, id=None)
    (read,) = question_answering.read([record(answer="lives")], fields)
    assert (read.id, read.answers, read.starts) == ("a.jsonl:3", ("lives",), (5,))
    (read,) = question_answering.read([record(answer="")], fields)
    assert (read.answers, read.stratum) == ((), "no answer")
    (read,) = question_answering.read([record()], SpanFields(answers=None))
    assert read.answers == ()


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"answers/answer_start": [13, 11]}, {}, "'York' to question 7 is not at character 13"),
        ({"answers/answer_start": [14]}, {}, "1 answers/answer_start for 2 answers"),
        ({"answers/answer_start": ["x", 1]}, {}, "not where answers are"),
        ({"answers/answer_start": [float("inf"), 1]}, {}, "not where answers are"),
        (
            {"answers/text": ["Rome"]},
            {"starts": None},
            "'Rome' to question 7 is not in its context",
        ),
        ({"context": " "}, {}, "field 'context' is empty"),
    ],
)
def test_bad_questions(changes, fields, message):
    with pytest.raises(InputError, match=r"a\.jsonl:3: .*" + message):
        question_answering.read([record(**changes)], SpanFields(**fields))
