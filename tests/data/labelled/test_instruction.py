"""Dialogues: how they are read, what of them is learned, and how they share rows."""

from typing import Any

import numpy as np
import pytest

from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.instruction import (
    Dialogue,
    DialogueFields,
    Template,
    Turn,
    encode,
    prompt_ids,
    read,
)
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PLAIN = Template()
MARKED = Template(
    system="{message} .",
    user="who {message} ?",
    input="in {message} ",
    assistant="where {message} .",
)


def records(*fields: dict[str, Any]) -> list[Record]:
    return [Record(fields=one, origin=f"x.jsonl:{i}") for i, one in enumerate(fields, start=1)]


def dialogue(text: str) -> Dialogue:
    """Of a, b, … in turns, the user's first."""
    roles = ("user", "assistant")
    turns = (Turn(roles[i % 2], part) for i, part in enumerate(text.split("/")))
    return Dialogue(turns=tuple(turns), origin="x:1")


def messages(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    ("fields", "message", "mended"),
    [
        ({"prompt": "a", "response": " "}, "'response' is empty; remove the record", None),
        ({"prompt": "a"}, "no field 'response'", {"prompt": "a", "response": "b"}),
        (messages({"content": "a"}, ASSISTANT), 'message 1 has no role: give it a "role"', 0),
        (messages("a", ASSISTANT), "message 1 has no role", 0),
        (messages(USER, ASSISTANT | {"role": "bot"}), "message 2 has the role 'bot'.*rename it", 1),
        (messages(USER, {"role": "assistant"}), r"message 2 \(assistant\) has no content", 1),
        (messages(USER, ASSISTANT | {"content": ""}), r"message 2 \(assistant\) is empty", 1),
        (
            messages(USER, ASSISTANT | {"content": 3}),
            r"2 \(assistant\): its content is 3, which",
            1,
        ),
        (messages(USER, USER), "there is no assistant's message.*: add a response", 1),
        (messages(), "'messages' is \\[\\], which is not a list of messages", None),
        ({"messages": "a: b"}, "'messages' is 'a: b', which is not a list of messages", None),
    ],
)
def test_what_cannot_be_learned_from_is_refused(fields, message, mended) -> None:
    """And what the sentence names can."""
    good = {"prompt": "a", "response": "b"}
    with pytest.raises(InputError, match=rf"^x\.jsonl:2: .*{message}"):
        read(records(good, fields), DialogueFields())
    if isinstance(mended, int):
        turns = fields["messages"]
        turns[mended] = (USER, ASSISTANT)[mended]
        mended = {"messages": turns}
    if mended is not None:
        (_, found) = read(records(good, mended), DialogueFields())
        assert found.turns == (Turn("user", "a"), Turn("assistant", "b"))


def test_turns_that_nobody_answers_are_counted() -> None:
    (found,) = read(records(messages(USER, ASSISTANT, USER)), DialogueFields())
    assert (len(found.turns), found.unanswered) == (2, 1)


def test_what_is_to_be_answered() -> None:
    unknown = DialogueFields(response=None, input="about")
    given = [
        {"prompt": "a", "about": " ", "response": "b"},
        {"prompt": "a", "about": "c"},
        messages(USER, ASSISTANT, USER, ASSISTANT),
        {"messages": '[{"role": "user", "content": "a"}]'},  # in a table
    ]
    found = read(records(*given), unknown)
    user, assistant = Turn("user", "a"), Turn("assistant", "b")
    wanted = [(user,), (user, Turn("input", "c")), (user, assistant, user), (user,)]
    assert [one.prompt for one in found] == wanted
    assert {one.asked for one in found} == {"a"}
    with pytest.raises(InputError, match="no message to be answered"):
        read(records(messages(ASSISTANT)), unknown)


@pytest.mark.parametrize("form", ["", "{}", "{prompt}", "{message} {message}"])
def test_a_format_without_the_message_is_refused(form: str) -> None:
    with pytest.raises(InputError, match=r"task\.template\.user=.*\{message\} once") as refused:
        Template(user=form)
    example = str(refused.value).partition("write such as ")[2].strip("'")
    assert Template(user=example).user == example


def test_responses_and_their_ends_are_learned(framer: Framer, words) -> None:
    turns = (
        Turn("system", "a"),
        Turn("user", "b"),
        Turn("input", "c"),
        Turn("assistant", "d e"),
        Turn("user", "f"),
        Turn("assistant", "g"),
    )
    wide = Framer(framer._tokenizer, max_length=64)
    examples = encode(wide, [Dialogue(turns=turns, origin="x:1")], MARKED, pack=True)
    (row,) = examples.rows
    written = words(row["tokens"])
    assert written == "[CLS] a . who b ? in c where d e [SEP] . who f ? where g [SEP]"
    assert words(row["tokens"][row["weights"] > 0]) == "d e [SEP] g [SEP]"
    for end in (3, 5):  # before a response stands the same where it is to be written
        before = prompt_ids(wide, turns[:end], MARKED)
        assert written.startswith(words(before))
    assert words(prompt_ids(wide, turns[:5], MARKED)).endswith("who f ? where")
    assert words(prompt_ids(wide, turns[:5], MARKED, room=4)) == "[CLS] f ? where"


@pytest.mark.parametrize(
    ("text", "kept", "learned"),
    [
        ("a b c d e f g h a b c d/e f", "[CLS] e f g h a b c d e f [SEP]", "e f [SEP]"),
        ("a/b c d e f g h a b c d e", "[CLS] a b c d e f g h a b c", "b c d e f g h a b c"),
        ("a b c d e f g h/" + "c " * 20, "[CLS] d e f g h c c c c c c", "c c c c c c"),
        ("a/b/c d e f g h/a b c d", "[CLS] c d e f g h a b c d [SEP]", "a b c d [SEP]"),
    ],
)
def test_what_is_longer_than_a_row_is_cut_and_said(
    framer: Framer, words, text: str, kept: str, learned: str
) -> None:
    examples = encode(framer, [dialogue(text), dialogue("a/b")], PLAIN, pack=True)
    row = examples.rows[0]
    assert words(row["tokens"]) == kept
    assert words(row["tokens"][row["weights"] > 0]) == learned
    (_, said) = examples.notes
    ended = kept.endswith("[SEP]")
    asked = 0 if text.startswith("a/b c") else 1
    assert f"{asked} lose the beginning of what is asked, and {int(not ended)} the end" in said
    assert (examples.untruncated > framer.max_length).sum() == 1
    assert len(encode(framer, [dialogue("a/b")], PLAIN, pack=True).notes) == 1


def test_dialogues_share_rows(framer: Framer) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join("a" * n) + "/b" for n in rng.integers(1, 9, 50)]
    dialogues = [dialogue(text) for text in texts]
    apart = encode(framer, dialogues, PLAIN, pack=False)
    shared = encode(framer, dialogues, PLAIN, pack=True)
    assert len(apart) == 50
    full = int(apart.lengths.sum()) / framer.max_length
    assert full <= len(shared) < 1.2 * full
    assert shared.lengths.max() <= framer.max_length
    numbers = np.concatenate([row["dialogues"] for row in shared.rows])
    for i, row in enumerate(apart.rows, start=1):
        (where,) = (one for one in shared.rows if i in one["dialogues"])
        for name in ("tokens", "weights"):
            np.testing.assert_array_equal(where[name][where["dialogues"] == i], row[name])
    assert len(numbers) == apart.lengths.sum()
