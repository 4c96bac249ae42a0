"""Files by what they hold; what a hint says is tried on the file that it is about."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from jaxlm.data.labelled import classification, question_answering, tagging
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig, holds_records, like, read_splits
from jaxlm.data.labelled.question_answering import SpanFields
from jaxlm.data.labelled.records import Conll, JsonLines, Record, Squad, Table
from jaxlm.data.labelled.tagging import TagFields
from jaxlm.errors import InputError

ROWS = [{"text": "one", "label": "neg"}, {"text": "two", "label": "pos"}]
CSV = "text,label\none,neg\ntwo,pos\n"
LINES = "\n".join(map(json.dumps, ROWS))


def fields(source) -> list[dict]:
    records = list(source.records())
    for record in records:
        if record.fault is not None:
            raise record.fault
    return [record.fields for record in records]


def arrow(path: Path) -> bytes:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path.read_bytes()


@pytest.mark.parametrize("source", [Table, JsonLines, Conll, Squad], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        json.dumps({"version": "1", "data": ROWS}),
        "__label__neg one\n__label__pos two\n",
        gzip.compress(LINES.encode()),
        LINES.encode("utf-16"),
        arrow,
    ],
    ids=["lines", "array", "indented", "data", "fasttext", "gzip", "utf-16", "parquet"],
)
@pytest.mark.parametrize("name", ["a.json", "a.csv", "a"])
def test_the_first_bytes_say_what_a_file_is(tmp_path, write, source, content, name):
    content = content(tmp_path / "table") if callable(content) else content
    assert fields(source(path=write(name, content))) == ROWS
    other = like(Table(path="train.txt"), Path(source(path=write(name, content)).path))
    assert fields(other) == ROWS  # evaluated or predicted


@pytest.mark.parametrize("source", [Table, JsonLines, Squad], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("rows", "is_wrapper"),
    [
        ([{"text": "one", "data": "2020"}, {"text": "two", "data": None}], False),
        ([{"text": "one", "data": [1, 2]}, {"text": "two", "data": []}], False),
        ([{"data": ROWS, "text": "one"}, {"data": ROWS, "text": "two"}], False),
        ([{"text": "one", "data": "2020"}], False),
        ([{"text": "one", "data": 3}], False),
        ([{"version": "1", "data": ROWS}], True),
    ],
)
def test_a_field_called_data_makes_no_wrapper(write, source, rows, is_wrapper):
    for end in ("", "\n", "\n \n\n"):
        path = write("a.jsonl", "\n\n".join(map(json.dumps, rows)) + end)
        assert fields(source(path=path)) == (ROWS if is_wrapper else rows)


@pytest.mark.parametrize("content", ["[ O\n{ O\n", "{ O\n", "[\tB-X\n", '"\tO\n'])
def test_brackets_of_conll_are_words(write, content):
    (sentence,) = fields(Conll(path=write("a.conll", content)))
    assert sentence["tokens"] == [line.split()[0] for line in content.splitlines()]


def test_what_predictions_are_made_of(write):
    train = JsonLines(path="train.json")
    assert holds_records(train, Path(write("a.data", LINES)))
    assert not holds_records(train, Path(write("b.txt", "A text.\nAnother.\n")))
    assert holds_records(train, Path(write("c.parquet", "x")))


def test_several_files_folders_and_patterns(write, tmp_path):
    first = write("a.csv", "text,label\none,neg\n")
    second = write("b.csv", "label,text\npos,two\n")
    folder = str(tmp_path)
    for path in (folder, f"{folder}/*.csv", (first, second)):
        source = Table(path=path)
        assert fields(source) == ROWS
        assert len(source.fingerprint()) == 64
    assert fields(Table(path=(second, first))) == ROWS[::-1]
    assert Table(path=first).fingerprint() != Table(path=folder).fingerprint()


def test_fasttext_with_several_labels(write):
    path = write("a.txt", "__label__a __label__b one, two\n\n__label__a three\n")
    assert fields(Table(path=path)) == [
        {"text": "one, two", "label": ["a", "b"]},
        {"text": "three", "label": "a"},
    ]


def question(id: str, text: list[str], starts: list[int]) -> dict:
    answers = {"text": text, "answer_start": starts}
    return {"id": id, "question": "Where?", "context": "In Rome.", "answers": answers}


def test_flat_questions_and_empty_answers(write):
    flat = [question("1", ["Rome"], [3]), question("2", [], []), question("3", [""], [-1])]
    listed = question("4", [], []) | {"answers": [{"text": "Rome", "answer_start": 3}]}
    for content in (json.dumps({"data": [*flat, listed]}), json.dumps([*flat, listed])):
        records = Squad(path=write("a.json", content)).records()
        read = question_answering.read(records, SpanFields())
        assert [(one.id, one.answers, one.starts) for one in read] == [
            ("1", ("Rome",), (3,)),
            ("2", (), ()),
            ("3", (), ()),
            ("4", ("Rome",), (3,)),
        ]
    for text, start in (("", 0), ("Rome", -1), ("Rome", 4)):
        record = Record(fields={}, origin="here")
        (record,) = JsonLines(
            path=write("b.jsonl", json.dumps(question("1", [text], [start])))
        ).records()
        with pytest.raises(InputError, match=f"is not at character {start}"):
            question_answering.read([record], SpanFields())


@pytest.mark.parametrize("name", ["label", "labels", "entities"])
def test_spans_of_characters_make_words_and_tags(write, name):
    record = {"text": "Anna B. saw New York.", name: [[0, 7, "PER"], [12, 20, "LOC"]]}
    (record,) = JsonLines(path=write("a.jsonl", json.dumps(record))).records()
    (sentence,) = tagging.read([record], TagFields())
    assert sentence.words == ["Anna", "B", ".", "saw", "New", "York", "."]
    assert sentence.tags == ["B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC", "O"]
    (unknown,) = tagging.read([record], TagFields(tags=None), "punctuation")
    assert unknown.words == sentence.words


@pytest.mark.parametrize(
    ("spans", "words", "tags"),
    [
        ([[0, 4, "A"]], ["Mini", "bus"], ["B-A", "O"]),
        ([{"start": 4, "end": 7, "label": "A"}], ["Mini", "bus"], ["O", "B-A"]),
        ([[0, 4, "A"], [4, 7, "A"]], ["Mini", "bus"], ["B-A", "B-A"]),
        ([], ["Minibus"], ["O"]),
    ],
)
def test_spans_cut_words(spans, words, tags):
    record = Record(fields={"text": "Minibus", "spans": spans}, origin="here")
    (sentence,) = tagging.read([record], TagFields())
    assert (sentence.words, sentence.tags) == (words, tags)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 4, "A"], [3, 5, "B"]], r"overlap, \[0, 4, 'A'\] and \[3, 5, 'B'\]"),
        ([[0, 8, "A"]], "where there is no text: the text has 7 characters"),
        ([[3, 3, "A"]], "where there is no text"),
        (["A"], "holds 'A', which is neither"),
    ],
)
def test_bad_spans_are_named(spans, message):
    record = Record(fields={"text": "Minibus", "label": spans}, origin="here")
    with pytest.raises(InputError, match=message):
        tagging.read([record], TagFields())


def test_a_text_file_is_a_table_where_its_header_says_so(write):
    train = Table(path="train.txt")
    for content, expected in (
        (CSV, True),
        ("__label__neg one\n", True),
        ("One, two.\nThree.\n", False),
        ('"One", two.\n"Three\n', False),
    ):
        assert holds_records(train, Path(write("a.txt", content)), ("text",)) == expected
    assert holds_records(Table(path="t.txt", header=False), Path(write("b.txt", "x")), ("0",))


BAD = "text,label\none,neg\n ,neg\nthree,\nfour,pos\nfive,x,neg\nsix,pos\nseven,neg\n,pos\n"


def test_bad_rows_are_counted_or_left_out(write, capsys):
    train, validation = write("a.csv", BAD), write("b.csv", CSV)
    config = LabelledConfig(train=Table(path=train), validation=Table(path=validation))
    read = lambda records: classification.read(records, TextFields())
    with pytest.raises(InputError) as error:
        read_splits(config, read)
    assert re.search(
        r"a\.csv:3, .*a\.csv:9: field 'text' is empty; .*a\.csv:4: .*; .*a\.csv:6: 3 fields",
        str(error.value),
    )
    assert "4 of 8 records cannot be used" in str(error.value)
    assert "--data.on-bad-row skip" in str(error.value)
    skipping = LabelledConfig(train=config.train, validation=config.validation, on_bad_row="skip")
    splits = read_splits(skipping, read)
    assert [example.text for example in splits.train] == ["four", "six", "seven"]  # "one" is both
    assert capsys.readouterr().err.startswith("note: 4 of 8 records cannot be used, and are left")
    with pytest.raises(InputError, match="no field 'body'") as error:  # a setting, not the rows
        read_splits(skipping, lambda records: classification.read(records, TextFields(text="body")))
    assert "on-bad-row" not in str(error.value)


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inner.csv", CSV)
    return path.read_bytes()


def database(path: Path) -> bytes:
    run(f"sqlite3 {path} \"create table t (text, label); insert into t values('one','neg'), "
        "('two','pos')\"", path.parent)  # fmt: skip
    return path.read_bytes()


def run(command: str, folder: Path) -> None:
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 or "iconv -c" in command, done.stderr  # it says what it dropped


COMMANDS = {
    "windows-1252": CSV.replace("one", "“é”").encode("windows-1252"),
    "one bad byte": CSV.replace("one", "“é”").encode() + b"\xff,neg\n",
    "zip": zipped,
    "zstd": lambda path: subprocess.run(
        ["zstd", "-c"], input=CSV.encode(), capture_output=True
    ).stdout,
    "sqlite": database,
    "tar": lambda path: subprocess.run(
        "printf 'text,label\none,neg\ntwo,pos\n' > inner.csv && tar -cf - inner.csv; rm inner.csv",
        shell=True, cwd=path.parent, capture_output=True,
    ).stdout,
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_that_an_error_gives_makes_a_file_that_is_read(tmp_path, case):
    content = COMMANDS[case]
    path = tmp_path / "my data" / "a b.csv"
    path.parent.mkdir()
    path.write_bytes(content(tmp_path / "made") if callable(content) else content)
    with pytest.raises(InputError) as error:
        fields(Table(path=str(path)))
    program = "iconv|python -m zipfile|zstd|sqlite3|tar"
    command = re.search(rf"({program}) -.*", str(error.value))
    assert command, error.value
    if shutil.which(shlex.split(command[0])[0]) is None:
        pytest.skip(f"{command[1]} is not installed")
    before = set(tmp_path.rglob("*"))
    run(command[0].replace("FOLDER", ".").replace("TABLE", "t"), path.parent)
    (made,) = (new for new in set(tmp_path.rglob("*")) - before if new.is_file())
    assert [row["label"] for row in fields(Table(path=str(made)))][:2] == ["neg", "pos"]
    assert case != "windows-1252" or fields(Table(path=str(made)))[0]["text"] == "“é”"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text;label\none;neg\ntwo;pos\n"),
        ("a.csv", '"text";"label"\n"one, a";"neg"\n"two";"pos"\n'),
        ("a.csv", "text\tlabel\none, a\tneg\ntwo\tpos\n"),
        ("a.tsv", "text,label\none,neg\ntwo,pos\n"),
        ("a.tsv", "text,label\none\t,neg\ntwo,pos\n"),
        ("a.csv", 'text,label\n"one, \\"a\\"",neg\n"two",pos\n'),
        ("a.csv", 'text,label\n"one" a,neg\ntwo,pos\n'),
        ("a.csv", CSV.encode("utf-8") + b"caf\xe9,neg\n"),
        ("a.tsv", b"text\tlabel\none\tneg\ncaf\xe9\tpos\n"),
    ],
)
def test_the_setting_that_an_error_names_reads_the_file(write, name, content):
    path = write(name, content)
    with pytest.raises(InputError) as error:
        [record.value("label") for record in Table(path=path).records()]
    values = r"the one .* as often (windows-1252)|'(.+)'|(\w+)"
    setting = re.search(rf"set (?:the )?(\w+) to (?:{values})", str(error.value))
    assert setting, error.value
    value = next(filter(None, setting.groups()[1:]))
    again = fields(Table(path=path, **{setting[1]: value}))  # as the command line passes it
    assert [row["label"] for row in again][:2] == ["neg", "pos"]


def test_what_to_correct_where_no_setting_helps(write):
    table = "text,label\none, a,neg\ntwo,pos\n"
    with pytest.raises(InputError, match="quote the fields that contain ','"):
        fields(Table(path=write("a.csv", table)))
    assert fields(Table(path=write("a.csv", table.replace("one, a", '"one, a"'))))[0]["text"]
    table = "text,label\none,neg\ntwo,pos,\n"
    with pytest.raises(InputError, match="take ',' from the end of the line"):
        fields(Table(path=write("a.csv", table)))
    table = 'text\tlabel\n"one" b\na\tneg\ntwo\tpos\n'
    with pytest.raises(InputError, match=r"take '\\t' and line breaks out of the fields"):
        fields(Table(path=write("a.tsv", table)))
    assert fields(Table(path=write("a.tsv", table.replace("b\na", "b a"))))[0]["label"] == "neg"
