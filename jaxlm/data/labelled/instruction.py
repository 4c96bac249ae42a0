"""Dialogues to learn responses from: prompts with a response each, or messages of several turns."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data import tabular
from jaxlm.data.labelled.examples import Examples, Row
from jaxlm.data.labelled.framing import Framer, Ids
from jaxlm.data.labelled.packing import share_rows
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError

ROLES = ("system", "user", "assistant")
_MESSAGE = "{message}"


@dataclass(frozen=True, kw_only=True)
class Template:
    """What a dialogue looks like as one text: a format for each turn, one behind the other.

    Behind each response the token of the end of a text follows, and then the rest of its format.
    """

    system: str = "{message}\n\n"
    """What is said before a dialogue."""
    user: str = "{message}\n\n"
    """What is asked: a prompt."""
    input: str = "{message}\n\n"
    """What a prompt is about, where that is a field of its own."""
    assistant: str = "{message}"
    """A response. What stands before it is not learned: it is written for the model."""

    def __post_init__(self) -> None:
        for name, form in vars(self).items():
            if form.count(_MESSAGE) != 1:
                once = form.replace(_MESSAGE, "") + _MESSAGE
                raise InputError(
                    f"task.template.{name}={form!r} does not hold {_MESSAGE} once, where the text "
                    f"of the turn is to stand: write such as {once!r}"
                )

    def around(self, role: str) -> tuple[str, str]:
        """What stands before and behind the text of a turn."""
        forms = {
            "system": self.system,
            "user": self.user,
            "input": self.input,
            "assistant": self.assistant,
        }
        before, _, behind = forms[role].partition(_MESSAGE)
        return before, behind


@dataclass(frozen=True, kw_only=True)
class DialogueFields:
    """Which fields of a record are what."""

    prompt: str = "prompt"
    """What is asked."""
    input: str | None = None
    """What the prompt is about, such as a text to be summed up; may be empty. None: there is no
    such field."""
    response: str | None = "response"
    """What is to be answered; None: it is not known."""
    messages: str = "messages"
    """A whole dialogue, in place of the other fields: a list of objects with a role (system, user
    or assistant) and their content."""


class Turn(NamedTuple):
    """What one side says."""

    role: str
    """One of :data:`ROLES`, or ``input``."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Turns, the last of which is a response, if that is known."""

    turns: tuple[Turn, ...]
    origin: str
    unanswered: int = 0
    """Turns behind the last response, which are not among these."""

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the last response."""
        return self.turns[:-1] if self.response is not None else self.turns

    @property
    def response(self) -> str | None:
        """The last one."""
        role, text = self.turns[-1]
        return text if role == "assistant" else None

    @property
    def asked(self) -> str:
        """What was said last before the response."""
        return next(turn.text for turn in reversed(self.prompt) if turn.role != "input")

    @property
    def content(self) -> str:
        """All text."""
        return "\n".join(turn.text for turn in self.turns)

    @property
    def stratum(self) -> str:
        """Dialogues are all of one class."""
        return ""


def read(records: Iterable[Record], fields: DialogueFields) -> list[Dialogue]:
    """The dialogue of each record; without ``fields.response`` up to what is to be answered."""
    return [_read(record, fields) for record in records]


def _read(record: Record, fields: DialogueFields) -> Dialogue:
    if fields.messages in record.fields:
        turns = _messages(record, fields.messages)
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if fields.response is None:
            end = len(turns) - (turns[-1].role == "assistant")
            if not end:
                raise InputError(f"{record.origin}: there is no message to be answered; add one")
            return Dialogue(turns=tuple(turns[:end]), origin=record.origin)
        if not answers:
            raise InputError(
                f"{record.origin}: there is no assistant's message to learn from: add a response, "
                "or remove the record"
            )
        end = answers[-1] + 1
        return Dialogue(turns=tuple(turns[:end]), origin=record.origin, unanswered=len(turns) - end)
    turns = [Turn("user", record.text(fields.prompt))]
    if fields.input is not None:
        what = f"field {fields.input!r}"
        text = tabular.check_text(record.value(fields.input), what, record.origin)
        turns += [Turn("input", text)] if text.strip() else []
    if fields.response is not None:
        turns.append(Turn("assistant", record.text(fields.response)))
    return Dialogue(turns=tuple(turns), origin=record.origin)


def _messages(record: Record, name: str) -> list[Turn]:
    messages, origin = record.value(name), record.origin
    if isinstance(messages, str):  # of a table
        try:
            messages = json.loads(messages)
        except ValueError:
            messages = None
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f"{origin}: field {name!r} is {record.value(name)!r:.40}, which is not a list of "
            'messages: write such as [{"role": "user", "content": "…"}, …]'
        )
    return [_turn(message, f"{origin}: message {i}") for i, message in enumerate(messages, start=1)]


def _turn(message: Any, origin: str) -> Turn:
    roles = f"{', '.join(ROLES[:-1])} and {ROLES[-1]}"
    if not isinstance(message, dict) or "role" not in message:
        raise InputError(f'{origin} has no role: give it a "role", which is one of {roles}')
    if (role := message["role"]) not in ROLES:
        raise InputError(
            f"{origin} has the role {role!r:.40}, which is none of {roles}: rename it, or remove "
            "the message"
        )
    if "content" not in message:
        raise InputError(f'{origin} ({role}) has no content: give it a "content", which is a text')
    text = tabular.check_text(message["content"], "its content", f"{origin} ({role})")
    if not text.strip():
        raise InputError(f"{origin} ({role}) is empty: write a text, or remove the record")
    return Turn(role, text)


def prompt_ids(
    framer: Framer, turns: Sequence[Turn], template: Template, room: int | None = None
) -> list[int]:
    """The tokens of turns, and of what stands before a response to them.

    Where they are more than ``room``, what is left of them at their right, behind the first.
    """
    *pieces, rest = _pieces(turns, template)
    texts = [*pieces, rest + template.around("assistant")[0]]
    tokens, _ = _joined(framer, list(framer.ids(texts)))
    ids = tokens.tolist()
    return ids if room is None or len(ids) <= room else [ids[0], *ids[len(ids) - room + 1 :]]


def _pieces(turns: Sequence[Turn], template: Template) -> list[str]:
    """What is given, a response, what is given, and so on; the last is given."""
    pieces = [""]
    for role, text in turns:
        before, behind = template.around(role)
        if role == "assistant":
            pieces[-1] += before
            pieces += [text, behind]
        else:
            pieces[-1] += f"{before}{text}{behind}"
    return pieces


def _joined(framer: Framer, pieces: Sequence[Ids]) -> tuple[Ids, Ids]:
    """The tokens of pieces, and which of them are learned: responses and their ends."""
    start, end = (np.array([i], np.int32) for i in (framer.special.cls, framer.special.sep))
    parts, learned = [start], [0]
    for number, ids in enumerate(pieces):
        parts += [ids, end] if number % 2 else [ids]
        learned += [number % 2] * (len(ids) + number % 2)
    return np.concatenate(parts), np.array(learned, np.int32)


def encode(
    framer: Framer, dialogues: Sequence[Dialogue], template: Template, *, pack: bool
) -> Examples:
    """Rows of one dialogue each, or of as many as have room in one.

    ``tokens``, ``dialogues``, ``weights`` [length] and ``lengths`` [], as
    :mod:`jaxlm.objectives.instruction` reads them; ``dialogues`` are their numbers, from 1. Each
    must end in a response. Where one is longer than a row, what is before that is cut at its left,
    down to half of a row, and then the response at its right, which so has no end to be learned.
    """
    all_pieces = [_pieces(dialogue.turns, template)[:-1] for dialogue in dialogues]
    all_ids = framer.ids([text for pieces in all_pieces for text in pieces])
    rows: list[Row] = []
    sizes, cut_prompts, cut_responses = [], 0, 0
    for number, pieces in enumerate(all_pieces, start=1):
        ids = list(islice(all_ids, len(pieces)))
        tokens, learned = _joined(framer, ids)
        last = len(ids[-1]) + 1
        before = len(tokens) - last
        last_kept = min(last, max(framer.max_length // 2, framer.max_length - before))
        before_kept = min(before, framer.max_length - last_kept)
        kept = np.r_[0, before - before_kept + 1 : before + last_kept]
        rows.append(
            {
                "tokens": tokens[kept],
                "dialogues": np.full(len(kept), number, np.int32),
                "weights": learned[kept].astype(np.float32),
            }
        )
        sizes.append(len(tokens))
        cut_prompts += before_kept < before
        cut_responses += last_kept < last
    lengths = [len(row["tokens"]) for row in rows]
    shared = share_rows(lengths, framer.max_length) if pack else [[i] for i in range(len(rows))]
    counted = int(sum(row["weights"].sum() for row in rows))
    notes = [
        f"{len(rows):,} dialogues in {len(shared):,} rows; {counted:,} of {sum(lengths):,} tokens "
        "are learned"
    ]
    if cut_prompts or cut_responses:
        notes.append(
            f"of dialogues of more than {framer.max_length} tokens, {cut_prompts:,} lose the "
            f"beginning of what is asked, and {cut_responses:,} the end of the response"
        )
    return Examples(
        rows=[_one_row([rows[i] for i in numbers]) for numbers in shared],
        along_length=frozenset({"tokens", "dialogues", "weights"}),
        pad=framer.special.pad,
        untruncated=np.array([sum(sizes[i] for i in numbers) for numbers in shared], np.int32),
        notes=tuple(notes),
    )


def _one_row(parts: Sequence[Row]) -> Row:
    row = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return row | {"lengths": np.array(len(row["tokens"]), np.int32)}
