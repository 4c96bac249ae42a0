"""Questions whose answer is a span of a context (Rajpurkar et al. 2016, 2018)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from jaxlm.data.labelled import offsets
from jaxlm.data.labelled.examples import Examples
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.data.labelled.windows import begins, count
from jaxlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SpanFields:
    """Which fields of a record are what; the defaults are SQuAD's."""

    question: str = "question"
    """The question."""
    context: str = "context"
    """The text that may hold the answer."""
    answers: str | None = "answers/text"
    """A list of answers, any of which is right, or one answer; None: answers are not known."""
    starts: str | None = "answers/answer_start"
    """Where each answer begins in the context, in characters; None: where it first stands."""
    id: str | None = "id"
    """What identifies the question; None: where it stands in the file."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question on a context. No answers: the context does not hold one, or none is known."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]
    origin: str
    unit: str = ""
    """What the file counts starts in, if it is not characters; here they are."""

    @property
    def content(self) -> str:
        """All text."""
        return f"{self.question}\n{self.context}"

    @property
    def stratum(self) -> str:
        """Whether there is an answer."""
        return "answer" if self.answers else "no answer"


def read(records: Iterable[Record], fields: SpanFields) -> list[Question]:
    """The questions of all records; an answer that is not where it should be raises.

    An empty answer at -1 says that there is none, as no answer does.
    """
    questions = []
    for record in records:
        name = record.origin if fields.id is None else str(record.value(fields.id))
        context = record.text(fields.context)
        answers = _answers(record, fields)
        if answers and fields.starts is not None:
            starts = _starts(record, fields.starts, len(answers))
        else:
            starts = [context.find(answer) for answer in answers]
        given = [pair for pair in zip(answers, starts, strict=True) if pair != ("", -1)]
        answers = [answer for answer, _ in given]
        starts, unit = _placed(context, given)
        for answer, start in zip(answers, starts, strict=True):
            if start < 0 or not answer.strip() or not context.startswith(answer, start):
                where = "in its context" if fields.starts is None else f"at character {start}"
                raise InputError(
                    f"{record.origin}: the answer {answer!r:.60} to question {name} is not {where}"
                    "; correct it, or leave the question out"
                )
        questions.append(
            Question(
                id=name,
                question=record.text(fields.question),
                context=context,
                answers=tuple(answers),
                starts=tuple(starts),
                origin=record.origin,
                unit=unit,
            )
        )
    return questions


def _placed(context: str, given: Sequence[tuple[str, int]]) -> tuple[list[int], str]:
    """Where each answer begins in characters, and what the file counts, if not characters."""
    for unit in offsets.UNITS:
        found = offsets.places(context, unit)
        starts = [offsets.at(found, start) for _, start in given]
        pairs = zip(given, starts, strict=True)
        if all(start >= 0 and context.startswith(answer, start) for (answer, _), start in pairs):
            return starts, unit
    return [start for _, start in given], ""


def _answers(record: Record, fields: SpanFields) -> list[str]:
    if fields.answers is None:
        return []
    whole = fields.answers.rpartition("/")[0]
    if fields.answers not in record.fields and record.fields.get(whole) == []:
        return []  # of a list of objects none is left to have fields
    value = record.value(fields.answers)
    if isinstance(value, str):
        return [value] if value.strip() else []
    return record.texts(fields.answers)


def _starts(record: Record, name: str, count: int) -> list[int]:
    value = record.value(name)
    try:
        starts = [int(start) for start in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{record.origin}: {name} is {value!r:.40}, not where answers are"
        ) from error
    if len(starts) != count:
        raise InputError(f"{record.origin}: {len(starts)} {name} for {count} answers")
    return starts


@dataclass(frozen=True, kw_only=True)
class Window:
    """The window of a context that one row holds."""

    example: int
    """The question's number; its windows follow each other."""
    offsets: Int32[np.ndarray, "length 2"]
    """Where each token begins and ends in the context, in characters; -1 outside of it."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Encoded windows, and what leads from positions back to characters."""

    examples: Examples
    windows: list[Window]
    """One for each of the rows."""


def encode(framer: Framer, questions: Sequence[Question], doc_stride: int) -> Windows:
    """Rows of the question and a window of its context, which slides if it does not fit.

    ``doc_stride`` is the number of tokens that neighbouring windows share. ``starts`` and ``ends``
    are those of the first answer, or 0 where the window does not hold all of it; ``allowed`` marks
    the context and the first token.
    """
    texts = list(dict.fromkeys(question.context for question in questions))
    contexts = {
        text: (
            np.array(encoding.ids, np.int32),
            np.array(encoding.offsets, np.int32).reshape(-1, 2),
        )
        for text, encoding in zip(texts, framer.encodings(texts), strict=True)
    }
    all_ids = framer.ids([question.question for question in questions])
    rows: list[dict[str, np.ndarray]] = []
    windows: list[Window] = []
    torn: list[int] = []  # tokens of each answer that no window holds
    for number, (question, asked) in enumerate(zip(questions, all_ids, strict=True)):
        ids, offsets = contexts[question.context]
        span = _span(question, offsets)
        size = framer.room(2) - len(asked)
        fits = len(ids) <= size
        first_row = len(rows)
        if not fits and size <= doc_stride:
            stride = f", train with task.doc_stride below {size}" if size > 0 else ""
            raise InputError(
                f"{question.origin}: question {question.id} of {len(asked)} tokens leaves {size} "
                f"of max_length={framer.max_length} to the {len(ids):,} of its context, and windows"
                f" share doc_stride={doc_stride}: shorten the question{stride}{framer.or_longer}"
            )
        for begin in [0] if fits else begins(len(ids), size, doc_stride).tolist():
            part = slice(begin, begin + size)
            row, start = _row(framer, asked, ids[part], span, begin)
            rows.append(row)
            spans = np.full((len(row["tokens"]), 2), -1, np.int32)
            spans[start : start + len(offsets[part])] = offsets[part]
            windows.append(Window(example=number, offsets=spans))
        if span is not None and not any(row["ends"] for row in rows[first_row:]):
            torn.append(span[1] - span[0] + 1)
    examples = Examples(
        rows=rows,
        along_length=frozenset({"tokens", "token_type_ids", "allowed"}),
        pad=framer.special.pad,
        untruncated=np.array([row["lengths"] for row in rows], np.int32),
        windowed=count(window.example for window in windows),
        notes=tuple(_torn(torn, doc_stride, framer)),
    )
    return Windows(examples=examples, windows=windows)


def _torn(sizes: Sequence[int], doc_stride: int, framer: Framer) -> Iterator[str]:
    if sizes:
        yield (
            f"no window holds the whole answer to {len(sizes):,} questions (of up to "
            f"{max(sizes):,} tokens), which count as without one in the loss: raise "
            f"task.doc_stride={doc_stride}, which windows share{framer.or_longer}"
        )


def _span(question: Question, offsets: np.ndarray) -> tuple[int, int] | None:
    """The first and the last token of the first answer."""
    if not question.answers:
        return None
    answer = question.answers[0]
    begin = question.starts[0] + len(answer) - len(answer.lstrip())
    end = question.starts[0] + len(answer.rstrip())
    first = int(np.searchsorted(offsets[:, 1], begin, side="right"))
    last = int(np.searchsorted(offsets[:, 0], end, side="left")) - 1
    if first > last:
        raise InputError(
            f"{question.origin}: the tokenizer drops all of the answer {answer!r:.60} to question "
            f"{question.id}; leave the question out"
        )
    return first, last


def _row(
    framer: Framer, asked: np.ndarray, ids: np.ndarray, span: tuple[int, int] | None, begin: int
) -> tuple[dict[str, np.ndarray], int]:
    framed = framer.frame(asked, ids)
    start = framed.starts[1]
    allowed = np.zeros(len(framed.tokens), bool)
    allowed[[0, *range(start, start + len(ids))]] = True
    first = last = 0
    if span is not None and begin <= span[0] and span[1] < begin + len(ids):
        first, last = (token - begin + start for token in span)
    row = {
        "tokens": framed.tokens,
        "token_type_ids": framed.token_type_ids,
        "lengths": np.array(len(framed.tokens), np.int32),
        "starts": np.array(first, np.int32),
        "ends": np.array(last, np.int32),
        "allowed": allowed,
        "weights": np.ones((), np.float32),
    }
    return row, start
