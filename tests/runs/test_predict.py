"""What predict.py reads and writes, without a model."""

import gzip
import importlib
import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxlm.data.labelled.records import Conll, JsonLines, Record, Table
from jaxlm.errors import InputError


@pytest.fixture
def predict(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or the process would start anew
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("predict")


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
