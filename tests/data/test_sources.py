import bz2
import gzip
import json
import lzma
import os
import re
from pathlib import Path

import pyarrow.ipc
import pytest
from pyarrow import parquet

from jaxlm.data.labelled.records import Table
from jaxlm.data.sources import Csv, Jsonl, PyDocs, TextFiles
from jaxlm.errors import InputError


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def read(source) -> list[str]:
    return list(source.documents())


def fails(source, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("line", ["one", "two", "", " ", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
        ("file", ["one\ntwo\n\n \nthree"]),
    ],
)
def test_text_documents(write, document, expected):
    path = write("a.txt", b"\xef\xbb\xbfone\r\ntwo\n\n \nthree")
    assert read(TextFiles(glob=path, document=document)) == expected


def test_files_are_read_in_order_of_path_and_progress_adds_up(write, tmp_path):
    write("b.txt", "second\n")
    write("a.txt", "first\n")
    source = TextFiles(glob=str(tmp_path / "*.txt"))
    amounts = []
    assert list(source.documents(amounts.append)) == ["first", "second"]
    assert sum(amounts) == source.size() == 13


def test_fingerprint_follows_content_and_settings_not_names(write):
    one = TextFiles(glob=write("a.txt", "text"))
    same = TextFiles(glob=write("b.txt", "text"))
    other = TextFiles(glob=write("c.txt", "texts"))
    assert one.fingerprint() == same.fingerprint()
    assert len({one.fingerprint(), other.fingerprint()}) == 2
    assert TextFiles(glob=one.glob, document="line").fingerprint() != one.fingerprint()
    assert Jsonl(glob=one.glob).fingerprint() != one.fingerprint()


def test_missing_file(tmp_path):
    fails(TextFiles(glob=str(tmp_path / "no*.txt")), r"no file matches '.*no\*\.txt'")


def test_empty_file(write):
    fails(TextFiles(glob=write("empty.txt", "")), r"empty\.txt is empty")


def test_undecodable_bytes_name_file_and_line(write):
    path = write("latin.txt", b"fine\ncaf\xe9 au lait\n")
    fails(TextFiles(glob=path), r"latin\.txt:2: byte 0xe9 at column 4 is not UTF-8")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.gz", gzip.compress(b"fine\ncaf\xc3\xa9\n", mtime=0)),
        ("a.txt", gzip.compress(b"fine\ncaf\xc3\xa9\n", mtime=0)),
        ("a.txt", bz2.compress(b"fine\ncaf\xc3\xa9\n")),
        ("a.txt", lzma.compress(b"fine\ncaf\xc3\xa9\n")),
        ("a.txt", "fine\ncafé\n".encode("utf-16")),
        ("a.txt", "fine\ncafé\n".encode("utf-16-le")),
        ("a.txt", "fine\ncafé\n".encode("utf-16-be")),
        ("a.txt", "fine\ncafé\n".encode("utf-32")),
        ("a.txt", "прекрасно и просто\n中文\n".encode("utf-16-le")),
        ("a.txt", b"fine\rcaf\xc3\xa9\r"),
        ("a.txt", b"fine\r\ncaf\xc3\xa9\r\n\x1a"),
        ("a.txt", b"fine\r\ncaf\xc3\xa9\x1a"),
    ],
)
def test_what_the_first_bytes_say_is_read(write, name, content):
    source = TextFiles(glob=write(name, content), document="line")
    amounts = []
    wanted = ["прекрасно и просто", "中文"] if "\u4e2d".encode("utf-16-le") in content else None
    assert list(source.documents(amounts.append)) == (wanted or ["fine", "café"])
    assert sum(amounts) == source.size()


def test_cut_archives_are_named(write):
    path = write("a.gz", gzip.compress(b"fine\n" * 1000, mtime=0)[:-9])
    fails(TextFiles(glob=path), r"a\.gz is compressed, and damaged .*; copy it again")


def test_an_encoding_and_its_errors(write):
    path = write("a.txt", b"caf\xe9 \x93fine\x94\n")
    fails(TextFiles(glob=path), "byte 0xe9 at column 4 is not UTF-8; set encoding .*windows-1252")
    source = TextFiles(glob=path, encoding="windows-1252")
    assert read(source) == ["café “fine”"]
    assert source.fingerprint() != TextFiles(glob=path).fingerprint()
    fails(TextFiles(glob=path, encoding="ascii"), "is not ascii")
    fails(TextFiles(glob=path, encoding="cp-fine"), "encoding 'cp-fine' is not known")


@pytest.mark.parametrize("name", ["t [1].txt", "t*.txt", "t[12].txt"])
def test_names_with_brackets_are_files_before_they_are_patterns(tmp_path, name):
    folder = tmp_path / "data [v1]"
    folder.mkdir()
    (folder / "t [1].txt").write_text("one")
    (folder / "t1.txt").write_text("two")
    expected = {"t [1].txt": ["one"], "t*.txt": ["one", "two"], "t[12].txt": ["two"]}
    assert read(TextFiles(glob=str(folder / name))) == expected[name]


def test_folders_and_pipes(write, tmp_path):
    write("b.txt", "two")
    write("a.txt", "one")
    write(".hidden", "three")
    assert read(TextFiles(glob=str(tmp_path))) == ["one", "two"]
    (tmp_path / "none").mkdir()
    fails(TextFiles(glob=str(tmp_path / "none")), "the folder .*none holds no files")
    os.mkfifo(tmp_path / "pipe")
    fails(TextFiles(glob=str(tmp_path / "pipe")), "pipe is a pipe or a device")


def test_parquet_and_arrow(tmp_path):
    table = pyarrow.table({"text": ["one", "two"], "n": [1, 2]})
    path = str(tmp_path / "a.dat")
    parquet.write_table(table, path)
    amounts = []
    source = Jsonl(glob=path)
    assert list(source.documents(amounts.append)) == ["one", "two"]
    assert sum(amounts) == source.size()
    fails(TextFiles(glob=path), "a.dat is a Parquet table, not text: .* source jsonl")
    for write in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
        with write(path, table.schema) as writer:
            writer.write_table(table)
        assert read(Jsonl(glob=path)) == ["one", "two"]
        fails(Csv(glob=path, column="text"), "a.dat is an Arrow table, not text")


def test_jsonl(write):
    path = write("a.jsonl", '{"text": "one", "n": 1}\n\n{"text": "zw\\u00f6lf"}\n')
    assert read(Jsonl(glob=path)) == ["one", "zwölf"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{text: 1}", r"a\.jsonl:2: not JSON \(.* at column 2\)"),
        ('{"body": "x"}', r"a\.jsonl:2: no field 'text' among 'body'"),
        ('{"text": 7}', r"a\.jsonl:2: field 'text' is 7"),
        ('["text"]', r"a\.jsonl:2: a JSON list"),
        ("[" * 100_000, r"a\.jsonl:2: not JSON \(too many brackets inside of each other"),
        ('{"text": ' + "9" * 5_000, r"a\.jsonl:2: not JSON \(a number of .* digits at column 10\)"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: .* half of a surrogate pair"),
    ],
    ids=lambda text: text[:20],
)
def test_bad_jsonl_names_file_and_line(write, line, message):
    fails(Jsonl(glob=write("a.jsonl", f'{{"text": "good"}}\n{line}\n')), message)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('text\tn\n"a ""b"" c"\t1\nplain\t2\n', ['a "b" c', "plain"]),  # pandas, Excel
        ('"text"\t"n"\n"a"\t"1"\n', ["a"]),  # R
        ('text\tn\n"a\nb"\t1\n', ["a\nb"]),
        ('text\tn\n"a" b\t1\n""c""\t2\n', ['"a" b', '""c""']),
        ('text\tn\n"a\t1\nb"\t2\n', ['"a', 'b"']),  # two rows, not one
        ('text\tn\na "b"\t1\n', ['a "b"']),
    ],
)
def test_tsv_is_unquoted_where_all_of_it_is_well_formed(write, table, expected):
    path = write("a.tsv", table)
    assert read(Csv(glob=path, column="text")) == expected
    if table.startswith("text"):
        raw = Csv(glob=path, column="text", quoting="none")
        assert "\nb" in table or read(raw)[0] == table.split("\n")[1].split("\t")[0]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('text,label\n"a, ""b""", "pos"\n', {"text": 'a, "b"', "label": "pos"}),
        ('"text", "label"\n"a", "p, q"\n', {"text": "a", "label": "p, q"}),
        ('text,label\n"he said, ""b""",pos\n', {"text": 'he said, "b"', "label": "pos"}),
        ("text,label\n a, pos\n", {"text": " a", "label": " pos"}),
        ("text,label\na\rb,pos\n", {"text": "a b", "label": "pos"}),
        ("text,label\r\na\0,pos\r\n\x1a", {"text": "a\0", "label": "pos"}),
        ("text,label\ngood\0x,pos\n", {"text": "good\0x", "label": "pos"}),
        ("text,label\ncafé\0,pos\n", {"text": "café\0", "label": "pos"}),
        ("text,label,,\na,pos,,\n", {"text": "a", "label": "pos"}),
        (",text,label\n0,a,pos\n", {"Unnamed: 0": "0", "text": "a", "label": "pos"}),
    ],
)
def test_csv_as_programs_write_it(write, table, expected):
    (record,) = Table(path=write("a.csv", table)).records()
    assert record.fields | expected == record.fields
    assert all(name in expected or not value for name, value in record.fields.items())


def test_csv_quotes_and_tsv_does_not(write):
    table = 'id,text\n1,"a, ""b""\nc"\n2,d\n'
    assert read(Csv(glob=write("a.csv", table), column="text")) == ['a, "b"\nc', "d"]
    assert read(Csv(glob=write("a.tsv", 'id\ttext\n1\t"a\n'), column="text")) == ['"a']
    semicolons = Csv(glob=write("b.csv", "id;text\n1;a,b\n"), column="text", delimiter=";")
    assert read(semicolons) == ["a,b"]


def test_csv_fields_may_be_long(write):
    assert read(Csv(glob=write("a.csv", "text\n" + "x" * 200_000), column="text")) == [
        "x" * 200_000
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("id,body\n1,x\n", r"a\.csv:1: no column 'text' among 'id', 'body'"),
        ("id,text\n1,x\n2,y,z\n", r"a\.csv:3: 3 fields where the header has 2"),
        ('id,text\n1,"x\n', r"a\.csv:2: malformed quoting"),
        ('"id";"text"\n', r"a\.csv:1: malformed quoting .* set the delimiter to ';'"),
    ],
)
def test_bad_csv_names_file_and_line(write, table, message):
    fails(Csv(glob=write("a.csv", table), column="text"), message)


def test_bad_delimiter(write):
    fails(Csv(glob=write("a.csv", "text\nx"), column="text", delimiter="||"), "not one character")


def test_pydocs_reads_as_prose():
    documents = read(PyDocs())
    text = "\n".join(documents)
    assert len(text) > 1_000_000
    assert documents == read(PyDocs())
    assert not re.search(r"^>>>|^[=*~-]{4,}$|`", text, re.MULTILINE)
    assert any("An identifier occurring as an atom is a name." in d for d in documents)
    assert "Serialize ``obj`` to a JSON formatted ``str``.".replace("`", "") in text
    assert json.dumps.__doc__.startswith("Serialize ``obj``")
