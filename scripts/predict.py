"""Use a model: ``python scripts/predict.py runs/quickstart fill-mask "A [MASK] of strings."``.

Pretrained runs fill in masks or spans, or generate text; fine-tuned ones do what they were tuned
for: classify, tag, answer, choose, embed or translate. Any encoder, a published one too, embeds and
searches. A text is given as an argument, or many in a file, a JSON object (or a text) a line;
answers to files are JSON lines, or a table.
"""

from jaxlm.runtime.allocator import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
import itertools
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jaxlm.config import PretrainConfig
from jaxlm.data import files, tabular
from jaxlm.data.labelled.dataset import Source, holds_records, in_encoding, like
from jaxlm.data.labelled.parallel import ParallelText
from jaxlm.data.labelled.records import Conll, Record, Table, json_record
from jaxlm.decode.beam import BeamConfig, Hypothesis
from jaxlm.decode.generate import GenerateConfig, Generation
from jaxlm.errors import InputError, note, report_input_errors
from jaxlm.evaluate import retrieval
from jaxlm.nn.choose import Wanted
from jaxlm.runs import pretrained, published_task
from jaxlm.runs.answers import ERROR, Answer, Answered, joined, say_long, write_table
from jaxlm.runs.embedder import DOCUMENTS, QUERIES, Embedder, open_embedder
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.runs.writing import GREEDY_BEAM, Conversation, chosen_way
from jaxlm.runtime.storage import on_disk, whole
from jaxlm.tasks.instruction import Instruction
from jaxlm.tasks.seq2seq import Seq2Seq
from jaxlm.tasks.task import Responsive
from jaxlm.train.restore import warn

GREEDY = GenerateConfig()
TABLES, ARRAY = (".csv", ".tsv"), ".npy"


def main(
    run: Annotated[Path, tyro.conf.Positional],
    task: Annotated[str, tyro.conf.Positional],
    text: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    pair: str | None = None,
    file: Path | None = None,
    out: Path | None = None,
    encoding: str | None = None,
    column: str | None = None,
    prompt: str | None = None,
    file_prompt: str | None = None,
    top_k: int = 5,
    generate: GenerateConfig = GREEDY,
    beam: BeamConfig = GREEDY_BEAM,
    stream: bool = False,
    int8: bool = False,
    step: int | None = None,
    base: str | None = None,
    attention: Wanted = "auto",
) -> None:
    """Answer one text, or all of a file.

    Args:
        run: The run folder; or a folder in Hugging Face's layout or a hub name: of any encoder for
            embed and search, of a model with a task's head for what that does.
        task: What the run has learned: fill-mask, fill-spans, detect, generate, classify, tag,
            answer, choose, embed or translate (write a text for another); or search, which finds
            the texts of --file that are nearest to the text; or chat, in turns, with a run that
            has learned to respond.
        text: What to do it with; or give --file. Of chat: what the model is told beforehand.
        pair: The second text of a pair, or the context of a question.
        file: A text or a JSON object a line, - for standard input; or, as .csv, .tsv, .conll, .json
            or named as the training data are, what fine-tuning reads.
        out: Where answers go: JSON lines, a table if it ends in .csv or .tsv, or, of embed, an
            array of vectors if it ends in .npy; of translate the translations alone, a line each,
            unless it ends in .jsonl, .csv or .tsv; None = JSON lines to standard output. Answers
            have the number of the line and the other columns of the file.
        encoding: That of --file, such as windows-1252; None = UTF-8, or that of training.
        column: Of pretrained runs, embed and search: the column or field with the texts; None =
            that of the run's training, or text.
        prompt: Of embed and search: the name of the prompt to put before texts, or of search before
            the query alone, such as query; '' = none. None = the folder's default, or of search its
            query, if there is one. Which it is is said.
        file_prompt: Of search: that of the texts of --file; None = the folder's document, passage
            or corpus, else its default.
        top_k: Candidates for each blank, classes to show, or texts to find.
        generate: How a text is continued, or written for another.
        beam: Or search the likeliest texts, so many at a time; several are in JSON lines, with
            their scores, and the best alone in lines of texts.
        stream: Show the continuation of a text as it is written.
        int8: Of generate with a pretrained run: weights, and what they multiply, of 8 bits, in a
            quarter of the memory.
        step: Which checkpoint; None = the best.
        base: The encoder of an adapter, if it has moved: a run folder, a folder or a hub name.
        attention: How it is computed, whatever training used; auto = as suits devices and rows.
    """
    is_search, is_chat = task == "search", task == "chat"
    way = chosen_way(generate, beam)
    if way is beam and (stream or is_chat):
        raise InputError(
            f"--beam.size {beam.size} compares whole texts, of which none can be shown as it is "
            f"written: leave out --beam{' and --stream' if stream else ' to chat'}"
        )
    if is_search and (text is None or file is None):
        raise InputError("search finds the texts of --file that are nearest to a text: give both")
    if is_chat and (file is not None or pair is not None):
        raise InputError(
            "chat reads lines from the terminal or a pipe: leave out --file and --pair"
        )
    if (text is None) == (file is None) and not is_search and not is_chat:
        raise InputError('give either a text, such as "A [MASK] of strings.", or --file')
    if text is not None and not text.strip():
        raise InputError("the text is empty")
    for given in filter(None, (text, pair)):
        try:
            given.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text {given!r:.60} is not UTF-8; convert it, for example with iconv"
            ) from error
    if top_k < 1:
        raise InputError(f"--top-k {top_k} is not above 0")
    if pair is not None and file is not None:
        raise InputError("--pair goes with one text; a file's lines are JSON objects with both")
    if out is not None and (file is None or not out.parent.is_dir() or out.is_dir()):
        raise InputError(
            f"--out {out} must be a file in a folder that is there, and goes with --file"
        )
    if out is not None and file is not None and out.resolve() == file.resolve():
        raise InputError(f"--out {out} is the file that is read: name another")
    if encoding is not None and file is None:
        raise InputError(f"--encoding {encoding} is that of a --file: leave it out")
    if column is not None and file is None:
        raise InputError(f"--column {column} is that of a --file: leave it out")
    source, pairs = str(run), pair is not None
    if int8 and (task != "generate" or published_task.is_tuned(source)):
        raise InputError(f"--int8 is for generate with a pretrained run, not for {task} with {run}")
    if task in ("embed", "search"):
        if pair is not None:
            raise InputError(f"{task} takes one text: leave out --pair")
        opened = open_embedder(str(run), step=step, base=base, attention=attention)
        column = column or opened.column
        opened = replace(opened, column=column)
        if not is_search and file_prompt is not None:
            raise InputError("--file-prompt is for search; of embed, --prompt is that of all texts")
        query = embedder = opened.with_prompt(prompt)
        said = f"; prompt: {query.prompt!r}" if opened.prompts else ""
        if is_search:
            query = opened.with_prompt(prompt, *QUERIES)
            embedder = opened.with_prompt(file_prompt, *DOCUMENTS)
            said = said and f"; prompts: {query.prompt!r}, of the file's {embedder.prompt!r}"
        print(opened.about, said, sep="", file=sys.stderr)
        if file is None:
            print_json({"text": text, "embedding": embedder([text or ""])[0].tolist()})
            return
        given = read_records(embedder.source, (), (column,), file, encoding=encoding)
        records = with_column(given, column)
        if text is None:
            write_vectors(counted(embedder.stream(records)), column, out)
        else:
            search(query, text, counted(embedder.stream(records)), out, top_k)
        return
    config = published_task.read_config_of(source, pairs=pairs)
    if column is not None and not isinstance(config, PretrainConfig):
        raise InputError(
            f"--column {column} is for pretrained runs, embed and search: {run} reads the fields "
            "of its training data"
        )
    for name, value in (
        ("--prompt", prompt),
        ("--file-prompt", file_prompt),
        ("--out", out if out and out.suffix == ARRAY else None),
    ):
        if value is not None:
            raise InputError(f"{name} {value} is for embed and search, not for {task}")
    if is_chat and isinstance(config.task, Instruction):
        chat(
            published_task.open_tuned(source, step=step, base=base, attention=attention),
            generate,
            text,
        )
        return
    if config.task.verb != task:
        raise InputError(
            f"{run} was trained for {type(config.task).__name__}, whose head cannot {task}: use "
            f"{config.task.verb}"
        )
    if isinstance(config, PretrainConfig):
        if pair is not None:
            raise InputError(f"{task} takes one text: leave out --pair")
        loaded = pretrained.open_pretrained(run, step, attention=attention)
        loaded = loaded.quantized() if int8 else loaded
        say(loaded.attends)
        if file is None:
            if stream:
                show_pieces(text or "", loaded.generate().stream(text or "", generate))
                return
            record = Record(fields={pretrained.TEXT: text}, origin="the text given")
            (answer,) = loaded.answer([record], top_k=top_k, generate=way)
            for line in loaded.task.lines(answer):
                print(line)
            return
        column = column or pretrained.TEXT
        form = Table(path="texts.csv")  # prepared text has none that tells of a file's
        records = with_column(read_records(form, (), (column,), file, encoding=encoding), column)
        answers = loaded.stream(records, column=column, top_k=top_k, generate=way)
        write(counted(answers), (column,), out)
        return
    loaded = published_task.open_tuned(
        source, step=step, base=base, pairs=pairs, attention=attention
    )
    say(loaded.attends)
    if file is not None:
        names = loaded.task.text_fields
        is_lines = (
            isinstance(loaded.task, Seq2Seq) and out and out.suffix not in (".jsonl", *TABLES)
        )
        train = loaded.config.data.train
        options: dict[str, Any] = {"every": bool(is_lines), "encoding": encoding}
        records = read_records(train, loaded.labels, names, file, **options)
        answers = counted(loaded.stream(records, generate=way))
        if out and is_lines:
            write_lines((answer.get("translation", "") for _, answer in answers), out)
            return
        write(answers, names, out)
        return
    record = record_of(loaded, text or "", pair)
    if isinstance(loaded.task, Responsive):
        (example,) = loaded.task.read([record], labelled=False)
        say_long(*loaded.cut([example]))
        if isinstance(way, BeamConfig):
            (best,) = loaded.responder.respond([example], way)
            show_hypotheses(best)
            return
        pieces = loaded.responder.stream(example, generate)
        show_pieces("", pieces if stream else ["".join(pieces)])
        return
    (answer,) = loaded.answer([record])
    probabilities = answer.get("probabilities")
    if isinstance(probabilities, dict):
        print(*ranked(probabilities, answer.get("labels", ()), top_k), sep="\n")
    else:
        print_json(answer)


def say(line: str) -> None:
    """On standard error: standard output has the answers."""
    if line:
        print(line, file=sys.stderr)


def show_hypotheses(best: Generation) -> None:
    """The best text; or each of several, behind its score."""
    assert isinstance(best, Hypothesis)  # of a beam search
    for one in (best, *best.others):
        show_pieces(f"{one.score:8.4f}  " if best.others else "", [one.text])


def chat(loaded: FinetunedRun, generate: GenerateConfig, system: str | None) -> None:
    """Turns until the input ends, or an empty line comes."""
    talk = Conversation(loaded.responder, generate, system=system)
    is_asked = sys.stdin.isatty()
    while (text := read_turn("> " if is_asked else "")).strip():
        try:
            forgotten, pieces = talk.say(text)
            if forgotten:
                print(f"(forgotten: your first {forgotten} turns, for which there is no room)")
            show_pieces("", pieces)
        except InputError as error:  # such as a turn that is too long
            print(f"({error})")


def read_turn(prompt: str) -> str:
    """A line of the user's; empty where there are no more."""
    try:
        return input(prompt)
    except EOFError:
        return ""


def show_pieces(text: str, pieces: Iterable[str]) -> None:
    """The text, and what follows it, as it comes; in escapes where the terminal must have them."""
    for piece in itertools.chain([text], pieces):
        encoding = sys.stdout.encoding or "utf-8"
        print(piece.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    print()


def ranked(probabilities: dict[str, float], chosen: Collection[str], top_k: int) -> list[str]:
    """A line for each of the most probable; of several labels first those that are chosen."""
    best = sorted(probabilities.items(), key=lambda item: (item[0] not in chosen, -item[1]))
    return [
        f"{probability:6.1%}  {name}{'  (chosen)' if name in chosen else ''}"
        for name, probability in best[: max(top_k, len(chosen))]
    ]


def record_of(loaded: FinetunedRun, text: str, pair: str | None) -> Record:
    """A record as the task reads it, of one or two texts."""
    names = loaded.task.text_fields
    given = [text] if pair is None else [text, pair]
    if len(given) != len(names):
        wanted = "one text, no --pair" if len(names) == 1 else "a second text, which --pair gives"
        if loaded.task.usage.startswith("--file"):
            wanted = "JSON objects, which --file gives"
        elif len(names) > 1 and pair is None:
            wanted += ", or JSON objects in a file"
        raise InputError(f"the task of this run takes {wanted} ({', '.join(names)})")
    return Record(fields=dict(zip(names, given, strict=True)), origin="the text given")


def read_records(
    train: Source,
    labels: Collection[str],
    names: Sequence[str],
    file: Path,
    *,
    every: bool = False,
    encoding: str | None = None,
) -> Iterator[Record]:
    """The file's records, in the form of the training data, JSON objects, or texts.

    ``names`` are the fields of a text: there must be one. ``every``: of :func:`read_lines`.
    ``encoding``: the file's, if not as in training.
    """
    train = in_encoding(train, encoding)
    is_table = str(file) != "-" and holds_records(train, file, names)
    source = in_encoding(like(train, file), encoding) if is_table else None
    if isinstance(source, Conll):
        is_text = files.ending(file) in ("", ".txt") and not source.begins_with(labels)
        source = None if is_text else replace(source, tag_column=None)  # words may stand alone
    if source is not None:
        yield from source.records()
        return
    encoding = train.encoding if isinstance(train, ParallelText) else encoding
    yield from read_lines(file, names, every=every, encoding=encoding)


def with_column(records: Iterable[Record], column: str) -> Iterator[Record]:
    """The records, of which one of the first must have that field."""
    records = iter(records)
    first = list(itertools.islice(records, 100))
    whole = [record for record in first if record.fault is None]
    if whole and not any(column in record.fields for record in whole):
        raise InputError(
            f"{whole[0].origin}: no field {column!r} among "
            f"{', '.join(map(repr, whole[0].fields))}: name the one of the text with --column"
        )
    yield from itertools.chain(first, records)


def search(
    embedder: Embedder, query: str, pairs: Iterable[Answered], out: Path | None, top_k: int
) -> None:
    """The texts whose vectors have the largest cosines with the query's."""
    found = [(record, answer) for record, answer in pairs if ERROR not in answer]
    vectors = np.stack([answer["embedding"] for _, answer in found])
    print(f"searched {len(found):,} texts", file=sys.stderr)
    nearest = retrieval.nearest(embedder([query])[0], vectors, top_k)
    best = [(found[i][0], {"score": score, "text": found[i][1]["text"]}) for i, score in nearest]
    if out is not None:
        write(best, (embedder.column,), out)
        return
    for record, answer in best:
        print(f"{answer['score']:6.3f}  {record.origin}  {' '.join(answer['text'].split())}")


def write_vectors(pairs: Iterable[Answered], column: str, out: Path | None) -> None:
    """JSON lines, a table, or an array with a row for each record: NaN where it has no text."""
    if out is None or out.suffix != ARRAY:
        lists = (
            (record, answer | {"embedding": answer["embedding"].tolist()})
            if ERROR not in answer
            else (record, answer)
            for record, answer in pairs
        )
        write(lists, (column,), out)
        return
    vectors = [answer.get("embedding") for _, answer in pairs]
    width = max(len(vector) for vector in vectors if vector is not None)
    rows = [np.full(width, np.nan) if vector is None else vector for vector in vectors]
    with writing(out) as unfinished, unfinished.open("wb") as stream:
        np.save(stream, np.array(rows, np.float32))
    print(f"{len(rows)} vectors of {width} numbers in {out}")


def counted(pairs: Iterable[Answered]) -> Iterator[Answered]:
    """The same; in the end says how many have no answer, and why the first has none."""
    total, errors = 0, []
    for record, answer in pairs:
        total += 1
        errors += [answer[ERROR]] if ERROR in answer else []
        yield record, answer
    if errors:
        warn(f"{len(errors)} of {total} have no answer; the first: {errors[0]}")


def write(pairs: Iterable[Answered], used: Sequence[str], out: Path | None) -> None:
    """JSON lines or a table, with the records' other fields; a file appears when it is complete."""
    count, changed = 0, 0

    def counting() -> Iterator[Answered]:
        nonlocal count, changed
        for record, answer in pairs:
            count += 1
            changed += not tabular.is_plain(record.fields)
            yield record, answer

    if out is None:
        for answer in joined(counting(), used):
            print_json(answer)
    else:
        with (
            writing(out) as unfinished,
            unfinished.open("w", encoding="utf-8", newline="") as file,
        ):
            if out.suffix in TABLES:
                write_table(counting(), used, file, out.suffix == ".tsv")
            else:
                for answer in joined(counting(), used):
                    file.write(tabular.json_text(answer) + "\n")
        print(f"{count} answers in {out}")
    if changed:
        note(
            f"{changed} of {count} records have half of a surrogate pair, which is written as its "
            "escape, such as \\ud83d, or a number that is not finite, which JSON writes as null"
        )


def write_lines(texts: Iterable[str], out: Path) -> None:
    """A line for each text; empty where there is no answer."""
    with writing(out) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        count = sum(file.write(" ".join(text.split()) + "\n") > 0 for text in texts)
    print(f"{count} lines in {out}")


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    try:
        with whole(on_disk(out)) as unfinished:
            yield unfinished
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error}") from error


def print_json(answer: Answer) -> None:
    """A line, in escapes where the terminal's encoding has not all characters."""
    text = tabular.json_text(answer)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text))
    print(text)


def read_lines(
    file: Path, names: Sequence[str], *, every: bool = False, encoding: str | None = None
) -> Iterator[Record]:
    """The file's lines: JSON objects, or texts, of which ``names`` has one; blank ones are empty
    texts, at the end only if ``every`` one is wanted. One that is neither has a fault."""
    given, name = files.lines(file, encoding=encoding), str(file)
    if name == "-":
        name = "standard input"
        if sys.stdin is None:
            raise InputError("the standard input is closed: give a text, or name a file")
        given = files.lines_of(sys.stdin.buffer, Path(name), encoding=encoding)
    lines = [(f"{name}:{n}", line) for n, line in enumerate(given, start=1)]
    filled = [n for n, (_, line) in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise InputError(f"{name} holds no text")
    lines = lines if every else lines[: filled[-1]]
    for origin, line in lines:
        try:
            record = record_of_line(line, names, origin)
        except InputError as error:
            record = Record(fields={}, origin=origin, fault=error)
        yield record


def record_of_line(line: str, names: Sequence[str], origin: str) -> Record:
    if line.lstrip().startswith("{"):
        try:
            return json_record(tabular.read_json_line(line, origin), origin)
        except InputError as error:
            hint = "a text that begins with { goes into an object"
            raise InputError(f"{error}; {hint}") from error
    if len(names) > 1:
        raise InputError(
            f"{origin}: a text where there must be {len(names)} ({', '.join(names)}): give a JSON "
            "object with these fields a line, or a table"
        )
    return Record(fields={names[0]: line}, origin=origin)


if __name__ == "__main__":
    with report_input_errors():
        tyro.cli(main)
