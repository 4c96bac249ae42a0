"""What goes into a model, and what comes out: texts or records in, an answer for each of them."""

import csv
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from io import TextIOBase
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np

from jaxlm.data.labelled import windows
from jaxlm.data.labelled.records import Record, json_record
from jaxlm.data.tabular import escaped, json_text
from jaxlm.errors import InputError, note
from jaxlm.runs.finite import NotFinite

Answer = dict[str, Any]
Answered = tuple[Record, Answer]
T = TypeVar("T")
LINE, ERROR = "line", "error"  # the fields of where it stands, and of what has no answer


def as_records(given: Iterable[Any], names: Sequence[str]) -> Iterator[Record]:
    """Records of texts, of dicts, of a table of pandas, or of records.

    ``names`` are the fields that a task reads: where there is one, a text is it; where there are
    more, a row with as many texts has them all.
    """
    if isinstance(given, str | bytes | Mapping):
        raise InputError(f"a list is expected, not {given!r:.40} alone: write [{given!r:.40}]")
    table: Any = given  # one of pandas gives the names of its columns if it is walked through
    rows = table.to_dict("records") if hasattr(table, "columns") else given
    for number, item in enumerate(rows, start=1):
        origin = f"number {number}"
        if isinstance(item, Record):
            yield item
        elif isinstance(item, Mapping):
            yield json_record(item, origin)
        elif isinstance(item, str) and len(names) > 1:
            raise InputError(
                f"{origin} is a text where there must be {len(names)} ({', '.join(names)}): give "
                "dicts with these fields"
            )
        elif isinstance(item, list | tuple | np.ndarray) and len(item) == len(names) > 1:
            yield Record(fields=dict(zip(names, item, strict=True)), origin=origin)
        else:
            yield Record(fields={names[0]: item}, origin=origin)


def answered(
    records: Iterable[Record],
    read: Callable[[Record], T],
    answer: Callable[[list[T]], Sequence[Answer]],
    *,
    chunk: int = 4096,
) -> Iterator[Answered]:
    """Each record with its answer; one that cannot be read or answered has an ``error`` instead.

    Raises :class:`InputError` where that is so for all of the first chunk: then the file is another
    than it is taken for.
    """
    records, is_first = iter(records), True
    while part := list(islice(records, chunk)):
        answers: list[Answer] = [{} for _ in part]
        readable: list[tuple[int, T]] = []
        for i, record in enumerate(part):
            try:
                readable.append((i, read(record)))
            except InputError as error:
                answers[i] = {ERROR: str(error)}
        numbers = [i for i, _ in readable]
        for i, one in zip(numbers, _each([x for _, x in readable], answer), strict=True):
            answers[i] = one
        if is_first and all(ERROR in one for one in answers):
            raise InputError(answers[0][ERROR])
        is_first = False
        yield from zip(part, answers, strict=True)


def _each(examples: list[T], answer: Callable[[list[T]], Sequence[Answer]]) -> list[Answer]:
    """The answers, where any example may be one that raises: it is looked for by halves."""
    if not examples:
        return []
    try:
        return list(answer(examples))
    except InputError as error:
        if len(examples) == 1 or (isinstance(error, NotFinite) and error.everywhere):
            return [{ERROR: str(error)} for _ in examples]
    half = len(examples) // 2
    return [*_each(examples[:half], answer), *_each(examples[half:], answer)]


def by_kind(
    kind: Callable[[T], Hashable], answer: Callable[[list[T]], Sequence[Answer]]
) -> Callable[[list[T]], list[Answer]]:
    """What answers examples of one kind at a time, and returns their answers in the old order."""

    def of_all(examples: list[T]) -> list[Answer]:
        groups: dict[Hashable, list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(kind(example), []).append(i)
        found = {
            i: one
            for own in groups.values()
            for i, one in zip(own, answer([examples[i] for i in own]), strict=True)
        }
        return [found[i] for i in range(len(examples))]

    return of_all


def say_long(cut: int, total: int, longest: int, windowed: tuple[int, int]) -> None:
    """A line, if texts were cut, and one, if they were read in windows."""
    if cut:
        note(f"{cut:,} of {total:,} texts are cut at {longest} tokens, as in training")
    for line in windows.describe(*windowed):
        note(line)


def joined(pairs: Iterable[Answered], used: Collection[str]) -> Iterator[Answer]:
    """Each answer behind the line of its record and those fields that were not ``used`` for it.

    A field of the same name as one of the answer's is called ``given_…``, or ``given_given_…``
    where another is called that. Without an answer all fields are there.
    """
    head, pairs = [], iter(pairs)
    for pair in pairs:  # up to the first answer, which has the fields that all others have
        head.append(pair)
        if ERROR not in pair[1]:
            break
    names = _Names(used)
    names.meet(*head)
    for record, answer in chain(head, pairs):
        names.meet((record, answer))
        line = re.search(r":(\d+)$", record.origin)
        others = {
            names[name]: value
            for name, value in record.fields.items()
            if ERROR in answer or name not in used
        }
        yield ({LINE: int(line[1])} if line else {}) | others | answer


class _Names:
    """What fields of records are called beside those of answers: the same in all records."""

    def __init__(self, used: Collection[str]):
        # A field that is used for the answer may be repeated by it.
        self._repeated = {name: name for name in used if name not in (LINE, ERROR)}
        self._names, self._answers = dict(self._repeated), {LINE, ERROR}
        self._taken = {*used, *self._answers}

    def __getitem__(self, name: str) -> str:
        return self._names[name]

    def meet(self, *pairs: Answered) -> None:
        """Give free names to fields that are new, and to those whose name an answer has."""
        if more := {name for _, answer in pairs for name in _columns(answer)} - self._answers:
            self._answers |= more
            self._taken |= more
            kept = {name: own for name, own in self._names.items() if own not in more}
            self._names = kept | self._repeated
        news = {name for record, _ in pairs for name in record.fields} - self._names.keys()
        for name in sorted(news, key=lambda name: (name in self._taken, name)):
            own = name
            while own in self._taken:
                own = f"given_{own}"
            self._names[name] = own
            self._taken.add(own)


def _columns(answer: Answer) -> Iterator[str]:
    """The names in it, and those that they are in a table."""
    for name, value in answer.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}/{key}" for key in value)


def write_table(
    pairs: Iterable[Answered], used: Collection[str], file: TextIOBase, tab: bool
) -> None:
    """The records' own columns, as they were, and those of the answers behind them.

    What an answer has by label, such as probabilities, gets a column each.
    """
    news = ((record, _without_texts(record, answer, used)) for record, answer in pairs)
    rows, head = map(_cells, joined(news, ())), []
    for row in rows:
        head.append(row)
        if ERROR not in row:
            break
    columns = [name for name in dict.fromkeys(chain(*head)) if name != ERROR] + [ERROR]
    writer = csv.DictWriter(file, columns, delimiter="\t" if tab else ",", lineterminator="\n")
    writer.writeheader()
    for row in chain(head, rows):
        if more := row.keys() - set(columns):
            raise InputError(
                f"the record of line {row.get('line')} has the field {min(more)!r}, which the "
                "first has not: a table needs the same columns in all rows; let --out end in .jsonl"
            )
        writer.writerow(row)


def _without_texts(record: Record, answer: Answer, used: Collection[str]) -> Answer:
    """What an answer does not just repeat of its record."""
    texts = [record.fields[name] for name in used if name in record.fields]
    return {
        name: value
        for name, value in answer.items()
        if name not in ("text", "pair", "question", "context") or value not in texts
    }


def _cells(answer: Answer) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, value in answer.items():
        if isinstance(value, dict):
            cells |= {f"{name}/{key}": one for key, one in value.items()}
        else:
            cells[name] = json_text(value) if isinstance(value, list) else value
    plain = lambda cell: escaped(cell) if isinstance(cell, str) else cell
    return {escaped(name): plain(cell) for name, cell in cells.items()}
