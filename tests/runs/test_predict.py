"""What predict.py reads and writes, without a model."""

import gzip
import importlib
import io
import json
import math
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from jaxlm.config import read_file
from jaxlm.data.labelled.records import Conll, JsonLines, Record, Table
from jaxlm.errors import InputError
from jaxlm.runs.pretrained import Pretrained


@pytest.fixture
def predict(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("predict")


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


HALF = "\ud83d"
RECORDS = [
    Record(fields={"text": "ok Ada", "id": HALF, HALF: 1}, origin="x.jsonl:1"),
    Record(fields={"text": "ok Bo", "id": math.nan, HALF: 2}, origin="x.jsonl:2"),
    Record(fields={"text": "ok Cy", "id": "c", "é": 3}, origin="x.jsonl:3"),
]


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.tsv", None])
def test_what_is_kept_loses_no_answer(name, predict, tmp_path, capsys):
    records = RECORDS[:2] if name and name != "out.jsonl" else RECORDS
    out = None if name is None else tmp_path / name
    predict.write(((record, {"label": "é"}) for record in records), ("text",), out)
    printed = capsys.readouterr()
    text = printed.out if out is None else out.read_text("utf-8")
    assert f"2 of {len(records)} records have half of a surrogate pair" in printed.err
    assert r"such as \ud83d, or" in printed.err
    if name in (None, "out.jsonl"):
        assert [json.loads(line)["id"] for line in text.splitlines()] == [HALF, None, "c"]
        assert json.loads(text.splitlines()[0])[HALF] == 1
    else:
        assert r"\ud83d" in text.splitlines()[0]
        assert len(text.splitlines()) == 3


LATIN = "café\n".encode("windows-1252")
SOURCES = {
    "x.txt": Table(path="train.csv"),
    "x.conll": Conll(path="train.conll"),
    "x.csv": JsonLines(path="train.jsonl"),
    "x.jsonl": Table(path="train.csv"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_ways_out_of_another_encoding_work_where_they_are_said(name, predict, tmp_path):
    """Setting the encoding, which is an option, and the command, as it stands."""
    path = tmp_path / name
    head = {"x.csv": b"text\n", "x.jsonl": b'{"text": "'}.get(name, b"")
    path.write_bytes(head + LATIN[:-1] + (b'"}\n' if name == "x.jsonl" else b"\n"))
    column = "tokens" if name == "x.conll" else "text"
    read = lambda file, **given: [
        record.fields[column]
        for record in predict.read_records(SOURCES[name], (), (column,), file, **given)
    ]
    with pytest.raises(InputError, match=r"set encoding to .* windows-1252, or convert it") as said:
        read(path)
    found = read(path, encoding="windows-1252")
    assert found in (["café"], [["café"]])
    command = str(said.value).split("convert it: ")[1]
    subprocess.run(command, shell=True, check=True)
    assert read(path.with_stem("x_utf8")) == found


def test_packed_files_are_converted_by_a_command_that_unpacks(tmp_path, predict):
    path = tmp_path / "x y.txt.gz"
    path.write_bytes(gzip.compress(LATIN))
    with pytest.raises(InputError, match="convert it: gzip -dc <") as said:
        list(predict.read_lines(path, ("text",)))
    subprocess.run(str(said.value).split("convert it: ")[1], shell=True, check=True)
    (record,) = predict.read_lines(tmp_path / "x y_utf8.txt", ("text",))
    assert record.fields == {"text": "café"}


def test_of_a_pipe_no_file_is_named(monkeypatch, predict, tmp_path):
    def read(content, encoding=None):
        (tmp_path / "in").write_bytes(content)
        with (tmp_path / "in").open("rb") as buffer:
            monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=buffer))
            return [*predict.read_lines(Path("-"), ("text",), encoding=encoding)]

    with pytest.raises(InputError, match=r"its way, through iconv -f windows-1252 -t utf-8$"):
        read(LATIN)
    with pytest.raises(InputError, match="drop such bytes on its way, through iconv -c"):
        read(10 * "é".encode() + LATIN)
    with pytest.raises(InputError, match="is a zip archive, not text: write it into a file"):
        read(b"PK\x03\x04")
    (record,) = read(LATIN, encoding="windows-1252")
    assert record.fields == {"text": "café"}


def test_evaluation_reads_in_another_encoding(predict, tmp_path):
    (tmp_path / "x.csv").write_bytes(b"text\n" + LATIN)
    evaluate = importlib.import_module("evaluate")
    data = SimpleNamespace(train=JsonLines(path="train.jsonl"))
    run = SimpleNamespace(config=SimpleNamespace(data=data))
    (record,) = evaluate.records_of(run, tmp_path / "x.csv", None, "windows-1252")
    assert record.fields == {"text": "café"}


def parquet_of(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


ROWS = [{"id": "7", "text": "a, b"}, {"id": "8", "text": ""}, {"id": "9", "text": "c\nd"}]
TABLE = 'id,text\n7,"a, b"\n8,\n9,"c\nd"\n'
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FILES = {
    "x.csv": TABLE,
    "x.tsv": 'id\ttext\n7\t"a, b"\n8\t\n9\t"c\nd"\n',
    "x.csv.gz": gzip.compress(TABLE.encode()),
    "x.jsonl": LINES.replace('"id": "8", "text": ""', "text:"),
    "x.json": json.dumps(ROWS, indent=1),
    "x.parquet": parquet_of(ROWS),
    "x.txt": LINES,
}


@pytest.fixture(params=["quickstart", "gpt_quickstart", "sotu_t5", "sotu_electra"])
def pretrained_run(request, monkeypatch, predict):
    """The verb of a pretrained run that answers in capitals."""

    def answers(config, variables, tokenizer, texts, **options):
        return [{"text": one.text, "said": one.text.upper()} for one in texts]

    config = read_file(Path(__file__).parents[2] / "configs" / f"{request.param}.py")
    run: Any = SimpleNamespace(
        config=SimpleNamespace(model="m"),
        variables={},
        tokenizer=None,
        task=SimpleNamespace(answers=answers),
        attends="",
    )
    run.stream = partial(Pretrained.stream, run)
    monkeypatch.setattr(predict.published_task, "read_config_of", lambda *_, **__: config)
    monkeypatch.setattr(predict.pretrained, "open_pretrained", lambda *_, **__: run)
    return config.task.verb


@pytest.mark.parametrize("name", FILES)
def test_a_pretrained_run_reads_what_a_tuned_one_does(predict, pretrained_run, name, write, capsys):
    path, out = write(name, FILES[name]), write("out.jsonl", "")
    predict.main(Path("run"), pretrained_run, file=path, out=out)
    one, wrong, other = map(json.loads, out.read_text().split("\n")[:-1])
    assert (one["id"], one["text"], one["said"]) == ("7", "a, b", "A, B")
    assert (other["id"], other["text"], other["said"]) == ("9", "c\nd", "C\nD")
    assert ("not JSON" if name == "x.jsonl" else "field 'text' is empty") in wrong["error"]
    assert "1 of 3 have no answer" in capsys.readouterr().err


def test_a_pretrained_run_reads_a_text_a_line(predict, pretrained_run, write):
    path, out = write("x.txt", 'id,text\n\n"7\n{"text": "b"}\n{b\n'), write("y", "")
    predict.main(Path("run"), pretrained_run, file=path, out=out)
    answers = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert [one.get("said") for one in answers] == ["ID,TEXT", None, '"7', "B", None]
    assert [one["line"] for one in answers] == [1, 2, 3, 4, 5]
    assert "x.txt:5: not JSON" in answers[4]["error"]
    assert "a text that begins with { goes into an object" in answers[4]["error"]


@pytest.mark.parametrize("first", ['{"text": "[] b"}', "[] b"])
def test_a_text_a_line_may_begin_as_json_does(predict, pretrained_run, write, first):
    path, out = write("x.txt", f"{first}\n\nc\n"), write("y", "")
    predict.main(Path("run"), pretrained_run, file=path, out=out)
    answers = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert [one.get("said") for one in answers] == ["[] B", None, "C"]


def test_a_column_is_that_of_a_file(predict, pretrained_run):
    with pytest.raises(InputError, match=r"^--column body is that of a --file: leave it out$"):
        predict.main(Path("run"), pretrained_run, "a", column="body")


def test_a_record_without_the_text_is_one_error(predict, pretrained_run, write):
    path, out = write("x.jsonl", '{"id": 1}\n{"text": "a"}\n'), write("y", "")
    predict.main(Path("run"), pretrained_run, file=path, out=out)
    one, other = map(json.loads, out.read_text().split("\n")[:-1])
    assert (one["id"], other["said"]) == (1, "A")
    assert "error" in one


def test_a_pretrained_run_takes_one_text(predict, pretrained_run):
    with pytest.raises(InputError, match=f"^{pretrained_run} takes one text: leave out --pair$"):
        predict.main(Path("run"), pretrained_run, "a", pair="b")


def test_a_table_without_texts_says_what_it_has(predict, pretrained_run, write):
    path, out = write("x.csv", "id,body\n1,a\n"), write("y", "")
    with pytest.raises(InputError, match=r"x.csv:2: no field 'text' among 'id', 'body'.*--column"):
        predict.main(Path("run"), pretrained_run, file=path)
    predict.main(Path("run"), pretrained_run, file=path, column="body", out=out)
    (one,) = map(json.loads, out.read_text().split("\n")[:-1])
    assert (one["id"], one["said"]) == ("1", "A")
    assert "body" not in one
