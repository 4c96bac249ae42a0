"""Lists that stand as text in a cell of a table."""

import csv
import json
from typing import Any, get_args

import pytest

from jaxlm.data.labelled import lists, tagging
from jaxlm.data.labelled.records import Conll, JsonLines, Record, Table
from jaxlm.data.labelled.tagging import TagFields
from jaxlm.data.labelled.words import Split
from jaxlm.errors import InputError

WORDS, TAGS = ["The", "dog's", "“", '"', "U.S.", "]"], ["O", "B-x", "O", "O", "B-y", "O"]
PLAIN = ["[ applause ] thanks", "[ applause ]", "[1]", "[he said", '["] is a character']


@pytest.mark.parametrize("write_list", [str, json.dumps])
@pytest.mark.parametrize("names", [None, ("O", "B-x", "B-y")])
def test_a_list_in_a_cell_is_that_list(write_list, names, tmp_path):
    """pandas and datasets write lists into cells of a CSV; the same in other files is as it was."""
    tags: list[Any] = TAGS if names is None else [names.index(tag) for tag in TAGS]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        cells = [write_list(WORDS), write_list(tags)]
        csv.writer(file).writerows([["tokens", "tags"], cells])
    (tmp_path / "a.jsonl").write_text(json.dumps({"tokens": WORDS, "tags": tags}) + "\n")
    (tmp_path / "a.conll").write_text("\n".join(map("\t".join, zip(WORDS, TAGS, strict=True))))
    fields = TagFields(names=names)
    for source in (
        Table(path=str(tmp_path / "a.csv")),
        JsonLines(path=str(tmp_path / "a.jsonl")),
        Conll(path=str(tmp_path / "a.conll")),
    ):
        (sentence,) = tagging.read(source.records(), fields)
        assert (sentence.words, sentence.tags) == (WORDS, TAGS)
    records = list(Table(path=str(tmp_path / "a.csv")).records())
    for split in get_args(Split):  # of words that are given there is nothing to split
        (sentence,) = tagging.read(records, TagFields(tags=None), split)
        assert (sentence.words, sentence.given) == (WORDS, None)


def test_an_ordinary_text_may_begin_with_a_bracket():
    for text in PLAIN:
        record = Record(
            fields={"tokens": text, "tags": " ".join("O" for _ in text.split())}, origin="x"
        )
        for tags in ("tags", None):
            (sentence,) = tagging.read([record], TagFields(tags=tags))
            assert sentence.words == text.split()


def test_a_text_of_brackets_alone_can_be_tagged():
    for text in ("[]", "[ ]"):
        record = Record(fields={"tokens": text}, origin="x")
        (sentence,) = tagging.read([record], TagFields(tags=None))
        assert sentence.words == text.split()


@pytest.mark.parametrize("words", [["a", " ", "b"], ["'", " "], ['He said " ', "x"]])
def test_white_space_in_a_string_is_none_between_strings(words):
    assert lists.parse(str(words)) == words


@pytest.mark.parametrize(
    ("words", "tags", "name"),
    [
        ("['a' 'b']", "['O' 'O']", "tokens"),
        ("""["it's" 'b'\n 'c']""", "O O O", "tokens"),
        ("a b", "['O' 'O']", "tags"),
        ("a b", "[0 1]", "tags"),
    ],
)
def test_what_numpy_prints_is_no_list(words, tags, name):
    record = Record(fields={"tokens": words, "tags": tags}, origin="a.csv:2")
    message = rf'a\.csv:2: field {name!r} is .* numpy prints: write it as \["a", "b"\], or the data'
    for fields in (TagFields(names=("O", "B-x")), TagFields(tags=None)):
        if name == "tags" and fields.tags is None:
            continue
        with pytest.raises(InputError, match=message):
            tagging.read([record], fields)
