"""Use a run: ``python scripts/predict.py runs/quickstart fill-mask "A [MASK] of strings."``.

Pretrained runs fill in masks; fine-tuned ones do what they were tuned for: classify, tag, answer,
choose or embed. A text is given as an argument, or many in a file, a JSON object (or a text) a
line; answers to files are JSON lines.
"""

from jaxlm.runtime.allocator import tune_process

tune_process()

# ruff: noqa: E402  (the allocator is settled before JAX starts)
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxlm.config import PretrainConfig
from jaxlm.data import files, tabular
from jaxlm.data.labelled.dataset import holds_records, like
from jaxlm.data.labelled.records import Conll, Record, json_record
from jaxlm.errors import InputError, report_input_errors
from jaxlm.runs import finetuned
from jaxlm.runs.finetuned import FinetunedRun
from jaxlm.runs.folder import read_any_config
from jaxlm.runs.pretrained import Pretrained, open_pretrained
from jaxlm.runtime.storage import locate, on_disk, whole

Answer = dict[str, Any]


def main(
    run: Annotated[Path, tyro.conf.Positional],
    task: Annotated[str, tyro.conf.Positional],
    text: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    pair: str | None = None,
    file: Path | None = None,
    out: Path | None = None,
    top_k: int = 5,
    step: int | None = None,
    base: str | None = None,
) -> None:
    """Answer one text, or all of a file.

    Args:
        run: The run folder.
        task: What the run has learned: fill-mask, classify, tag, answer, choose or embed.
        text: What to do it with; or give --file.
        pair: The second text of a pair, or the context of a question.
        file: A text or a JSON object a line (fill-mask: with "text"), - for standard input; or, as
            .csv, .tsv, .conll, .json or named as the training data are, what training reads.
            Answers are JSON lines.
        out: Where the JSON lines go; None = standard output.
        top_k: Candidates for each blank, or classes to show.
        step: Which checkpoint; None = the best.
        base: The encoder of an adapter, if it has moved: a run folder, a folder or a hub name.
    """
    if (text is None) == (file is None):
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
    config = read_any_config(locate(run))
    if config.task.verb != task:
        raise InputError(
            f"{run} was trained for {type(config.task).__name__}, whose head cannot {task}: use "
            f"{config.task.verb}"
        )
    if isinstance(config, PretrainConfig):
        answer_texts(open_pretrained(run, step), text, file, out, top_k)
        return
    loaded = finetuned.open_finetuned(run, step=step, base=base)
    if file is not None:
        write(loaded.answer(read_records(loaded, file)), out)
        return
    (answer,) = loaded.answer([record_of(loaded, text or "", pair)])
    probabilities = answer.get("probabilities")
    if isinstance(probabilities, dict):
        best = sorted(probabilities.items(), key=lambda item: -item[1])[:top_k]
        for name, probability in best:
            print(f"{probability:6.1%}  {name}")
    else:
        print_json(answer)


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


def read_records(loaded: FinetunedRun, file: Path) -> Iterator[Record]:
    """The file's records: JSON objects, or texts."""
    train = loaded.config.data.train
    is_table = str(file) != "-" and holds_records(train, file, loaded.task.text_fields)
    source = like(train, file) if is_table else None
    if isinstance(source, Conll):
        is_text = files.ending(file) in ("", ".txt") and not source.begins_with(loaded.labels)
        source = None if is_text else replace(source, tag_column=None)  # words may stand alone
    if source is not None:
        yield from source.records()
        return
    yield from read_lines(file, lambda line: record_of(loaded, line, None).fields)


def answer_texts(
    loaded: Pretrained, text: str | None, file: Path | None, out: Path | None, top_k: int
) -> None:
    """What a pretrained model does with texts, such as filling in their blanks."""
    if file is None:
        (answer,) = loaded.answer({"the text given": text or ""}, top_k=top_k)
        for line in loaded.task.lines(answer):
            print(line)
        return
    records = read_lines(file, lambda line: {"text": line})
    texts = {record.origin: record.text("text") for record in records}
    write(loaded.answer(texts, top_k=top_k), out)


def write(answers: Iterable[Answer], out: Path | None) -> None:
    """JSON lines; a file appears when it is complete."""
    if out is None:
        for answer in answers:
            print_json(answer)
        return
    lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    count = 0
    try:
        with whole(on_disk(out)) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(line)
                count += 1
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error}") from error
    print(f"{count} answers in {out}")


def print_json(answer: Answer) -> None:
    """A line, in escapes where the terminal's encoding has not all characters."""
    text = json.dumps(answer, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(answer)
    print(text)


def read_lines(file: Path, fields_of: Callable[[str], dict[str, Any]]) -> Iterator[Record]:
    """The file's lines that are not blank: JSON objects, or texts, which ``fields_of`` names."""
    every, name = files.lines(file), str(file)
    if name == "-":
        name = "standard input"
        if sys.stdin is None:
            raise InputError("the standard input is closed: give a text, or name a file")
        every = files.lines_of(sys.stdin.buffer, Path(name))
    lines = [(f"{name}:{n}", line) for n, line in enumerate(every, start=1) if line.strip()]
    if not lines:
        raise InputError(f"{name} holds no text")
    for origin, line in lines:
        if line.lstrip().startswith("{"):
            try:
                yield json_record(tabular.read_json_line(line, origin), origin)
            except InputError as error:
                hint = "a text that begins with { goes into an object"
                raise InputError(f"{error}; {hint}") from error
        else:
            yield Record(fields=fields_of(line), origin=origin)


if __name__ == "__main__":
    with report_input_errors():
        tyro.cli(main)
