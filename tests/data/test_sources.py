import gzip
import json
import re
from pathlib import Path

import pytest

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
    ("content", "message"),
    [
        (gzip.compress(b"fine\n", mtime=0), r"a\.txt is compressed; unpack it with gunzip"),
        ("fine\n".encode("utf-16"), r"a\.txt is UTF-16; convert it with iconv -f utf-16"),
        ("fine\n".encode("utf-16-le"), r"a\.txt is UTF-16; convert it with iconv -f utf-16"),
        ("one\rtwo\r", r"the lines of .*a\.txt end in CR; convert it with tr '\\r' '\\n'"),
    ],
)
def test_files_of_another_form_are_named_with_the_way_out(write, content, message):
    fails(TextFiles(glob=write("a.txt", content)), message)


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
        ('"id";"text"\n', r"a\.csv:1: malformed quoting .* set the delimiter if it is not ','"),
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
