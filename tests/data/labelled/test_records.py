import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxlm.data.labelled.dataset import holds_records, like
from jaxlm.data.labelled.records import Conll, JsonLines, Record, Squad, Table, TfdsRecords
from jaxlm.errors import InputError
from jaxlm.tasks.question_answering import QuestionAnswering


def read(source) -> list[Record]:
    """All records, none of which has a fault."""
    records = list(source.records())
    for record in records:
        if record.fault is not None:
            raise record.fault
    return records


def fields(source) -> list[dict]:
    return [record.fields for record in read(source)]


def fails(action, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        action()
    assert "\n" not in str(error.value)


def test_a_table_with_a_header(write):
    records = read(Table(path=write("a.csv", 'text,label\n"one,\ntwo",1\n\nthree,0\n')))
    assert [record.fields for record in records] == [
        {"text": "one,\ntwo", "label": "1"},
        {"text": "three", "label": "0"},
    ]
    assert [record.origin.rsplit("/")[-1] for record in records] == ["a.csv:2", "a.csv:5"]


def test_a_table_without_header(write):
    path = write("a.tsv", 'the "best\t1\nworst\t0\n')
    assert fields(Table(path=path, header=False)) == [
        {"0": 'the "best', "1": "1"},
        {"0": "worst", "1": "0"},
    ]
    named = Table(path=path, header=False, columns=("text", "label"))
    assert fields(named)[1] == {"text": "worst", "label": "0"}
    assert Table(path=path).fingerprint() != named.fingerprint()


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("text,label\nx\n", {}, r"a\.csv:2: 1 fields where the header has 2"),
        ("x,1\ny,0,\n", {"header": False}, r"a\.csv:2: 3 fields where the first line has 2"),
        ("x,1\n", {"header": False, "columns": ("t",)}, r"a\.csv:1: 2 fields for 1 columns"),
        ("text,text\nx,y\n", {}, r"a\.csv:1: the header names 'text' 2 times"),
        ("text,label\n", {}, r"a\.csv holds no records"),
        ("", {}, r"a\.csv is empty"),
        (b"text\ncaf\xe9\n", {}, r"a\.csv:2: byte 0xe9 at column 4 is not UTF-8"),
        ('text\n"x\n', {}, r"a\.csv:2: malformed quoting"),
        ("text\nx\n", {"delimiter": "tab"}, "delimiter 'tab' is not one character"),
    ],
)
def test_bad_tables(write, content, settings, message):
    source = Table(path=write("a.csv", content), **settings)
    fails(lambda: read(source), message)


def test_bad_table_settings(tmp_path):
    fails(lambda: Table(path="a.csv", columns=("text",)), "columns=.* a.csv, whose header")
    fails(lambda: read(Table(path=str(tmp_path / "no.csv"))), r"there is no file '.*no\.csv'")
    fails(lambda: read(Table(path=())), "path names no file")
    fails(lambda: read(Table(path="n" * 300)), "n{300} cannot be read: File name too long")


def test_fields_that_are_missing_or_wrong(write):
    (record,) = read(Table(path=write("a.csv", "text;label\nx;1\n")))
    fails(
        lambda: record.value("label"),
        r"a\.csv:2: no field 'label', but a single one, 'text;la.*delimiter",
    )
    (record,) = read(Table(path=write("b.csv", "text,label\n ,1\n")))
    fails(lambda: record.value("body"), r"b\.csv:2: no field 'body' among 'text', 'label'.*header")
    (nested,) = read(JsonLines(path=write("n.jsonl", '{"id": 1, "translation": {"en": "a"}}')))
    for name in ("en", "EN", "translation.en"):
        fails(lambda name=name: nested.value(name), r"; did you mean 'translation/en'\?$")
    fails(lambda: nested.value("n"), "; check the column's name")
    fails(lambda: record.text("text"), r"b\.csv:2: field 'text' is empty")
    (record,) = read(JsonLines(path=write("a.jsonl", '{"text": 7, "words": ["x", 1]}')))
    fails(lambda: record.text("text"), r"a\.jsonl:1: field 'text' is 7, which is not text")
    fails(lambda: record.texts("text"), r"a\.jsonl:1: field 'text' is 7, which is not a list")
    fails(lambda: record.texts("words"), r"a\.jsonl:1: an entry of field 'words' is 1")


def test_json_lines_flatten_objects(write):
    path = write("a.jsonl", '{"id": 1, "answers": {"text": ["x"]}}\n\n{"id": 2}\n')
    records = read(JsonLines(path=path))
    assert [record.fields for record in records] == [{"id": 1, "answers/text": ["x"]}, {"id": 2}]
    assert records[1].origin == f"{path}:3"
    fails(lambda: read(JsonLines(path=write("b.jsonl", "{}\n[]"))), r"b\.jsonl:2: a JSON list")
    nested = '{"a": ' * 2_000 + "1" + "}" * 2_000
    fails(lambda: read(JsonLines(path=write("c.jsonl", nested))), r"c\.jsonl:1: .*too many")


@pytest.mark.parametrize("separator", ["\t", "  "])
def test_conll(write, separator):
    lines = ["-DOCSTART- -X- O", "", "EU NNP B-ORG", "rejects VB O", " ", "Peter NNP B-PER"]
    content = "\n".join(lines).replace(" ", separator)
    path = write("a.conll", content)
    assert fields(Conll(path=path)) == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter"], "tags": ["B-PER"]},
    ]
    assert [record.origin for record in read(Conll(path=path))] == [f"{path}:3", f"{path}:6"]
    assert fields(Conll(path=path, tag_column=1))[1]["tags"] == ["NNP"]
    assert fields(Conll(path=path, tag_column=None))[1] == {"tokens": ["Peter"]}


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("EU NNP O\nrejects O\n", {}, r"a\.conll:2: 2 columns where there were 3"),
        ("EU O\n", {"tag_column": 3}, r"a\.conll:1: no column 3 among 2"),
        ("EU,O\n", {}, r"a\.conll:1: the word and its tag are both column 0"),
        ("EU\tO\n\tO\n", {}, r"a\.conll:2: an empty word or tag"),
        ("\n\n", {}, r"a\.conll holds no records"),
    ],
)
def test_bad_conll(write, content, settings, message):
    source = Conll(path=write("a.conll", content), **settings)
    fails(lambda: read(source), message)


WORDS = Conll(path="train.annotated", token_column=1)
TEXTS = Table(path="train.txt", delimiter=";")


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        (WORDS, "a.annotated", Conll(path="a.annotated", token_column=1)),
        (WORDS, "a.conll", Conll(path="a.conll", token_column=1)),
        (WORDS, "a.csv", Table(path="a.csv")),
        (Conll(path="train.csv"), "a.csv", Conll(path="a.csv")),
        (TEXTS, "a.txt", Table(path="a.txt", delimiter=";")),
        (TEXTS, "a.tsv", Table(path="a.tsv")),
        (TEXTS, "a.jsonl", JsonLines(path="a.jsonl")),
        (TEXTS, "a.tsv.gz", Table(path="a.tsv.gz")),
        (TEXTS, "a.parquet", JsonLines(path="a.parquet")),
        (WORDS, "a.txt", None),
        (JsonLines(path="train.txt"), "a.txt", None),
    ],
)
def test_the_kind_of_another_file_follows_from_its_name(source, name, expected):
    assert holds_records(source, Path(name)) == (expected is not None)
    if expected is not None:
        assert like(source, Path(name)) == expected


def squad(*questions: dict) -> str:
    return json.dumps({"data": [{"paragraphs": [{"context": "In Rome.", "qas": questions}]}]})


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_squad_in_a_flat_list_or_a_line_each(write, ending):
    answers = [{"text": "Anna", "answer_start": 0}], []
    lines = [
        json.dumps({"id": f"{i}", "question": "Who?", "context": "Anna went", "answers": one})
        for i, one in enumerate(answers)
    ]
    text = f"[{', '.join(lines)}]" if ending == "json" else "\n".join(lines)
    path = write(f"a.{ending}", text)
    for source in (Squad(path=path), JsonLines(path=path)):
        asked, none = QuestionAnswering().read(list(source.records()))
        assert (asked.answers, asked.starts, none.answers) == (("Anna",), (0,), ())


@pytest.mark.parametrize("answers", [[{"text": "q", "answer_start": 0}, {"text": "r"}], [None], {}])
def test_answers_of_another_form_stay_as_they_are(write, answers):
    line = {"text": "a", "label": "x", "answers": answers}
    assert len(list(JsonLines(path=write("a.jsonl", json.dumps(line))).records())) == 1


def test_squad(write):
    answered = {"id": "1", "question": "Where?", "answers": [{"text": "Rome", "answer_start": 3}]}
    impossible = {"id": "2", "question": "Who?", "answers": [], "is_impossible": True}
    records = read(Squad(path=write("a.json", squad(answered, impossible))))
    assert records[0].fields == {
        "id": "1",
        "question": "Where?",
        "context": "In Rome.",
        "answers/text": ["Rome"],
        "answers/answer_start": [3],
        "is_impossible": False,
    }
    assert (records[1].fields["answers/text"], records[1].fields["is_impossible"]) == ([], True)
    assert records[1].origin.endswith("a.json: question '2'")
    (asked,) = fields(Squad(path=write("b.json", squad({"id": "1", "question": "Where?"}))))
    assert asked.keys() == {"id", "question", "context", "is_impossible"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data":\n[}', r"a\.json:2: not JSON"),
        ('{"data":\n' + "9" * 5_000, r"a\.json:2: not JSON \(a number of too many digits\)"),
        ("[1]", r"a\.json: record 1: a JSON int where an object is expected"),
        ('{"data":\nnull}', r"a\.json: no list 'data'"),
        ('{"data": [{"paragraphs": [{"qas": ["x"]}]}]}', r"a\.json: .* wrong after 0 questions"),
        (squad({"id": "1", "answers": []}), r"a\.json: 'question' is missing .* after 0 questions"),
        (
            squad({"id": "1", "question": "Who?", "answers": [], "is_impossible": "false"}),
            r"a\.json: question '1': is_impossible is 'false', which is neither",
        ),
        ('{"data": []}', "holds no records"),
    ],
)
def test_bad_squad(write, content, message):
    source = Squad(path=write("a.json", content))
    fails(lambda: read(source), message)


class _Builder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
    def _split_generators(self, _):
        return {name: iter(records) for name, records in self._split_datasets.items()}


def test_tfds_records_are_plain(tmp_path):
    features = tfds.features
    record = {
        "context": "In Rome é",
        "label": 1,
        "score": 0.5,
        "answers": [{"text": "Rome", "answer_start": 3}],
        "tags": ["pos", "neg"],
        "tokens": ["In", "Rome"],
    }
    classes = features.ClassLabel(names=["neg", "pos"])
    _Builder(
        name="my_own",
        version="1.0.0",
        features=features.FeaturesDict(
            {
                "context": features.Text(),
                "label": classes,
                "score": features.Scalar(np.float32),
                "answers": features.Sequence(
                    {"text": features.Text(), "answer_start": features.Scalar(np.int32)}
                ),
                "tags": features.Sequence(classes),
                "tokens": features.Sequence(features.Text()),
            }
        ),
        description="",
        split_datasets={"train": enumerate([record, record | {"label": -1}])},
        data_dir=tmp_path,
        file_format="array_record",
    ).download_and_prepare()
    source = TfdsRecords(name="my_own", data_dir=str(tmp_path))
    records = sorted(read(source), key=lambda record: str(record.fields["label"]))
    expected = {name: value for name, value in record.items() if name != "answers"}
    expected |= {"label": "pos", "answers/text": ["Rome"], "answers/answer_start": [3]}
    assert [record.fields for record in records] == [expected | {"label": None}, expected]
    assert {record.origin for record in records} == {"my_own train:0", "my_own train:1"}
    assert len(read(TfdsRecords(name="my_own", split="train[:1]", data_dir=str(tmp_path)))) == 1
    assert len(source.fingerprint()) == 64


CONLLU = "# text = a b\n1-2\tab\t_\t_\n1\ta\ta\tX\n2\tb\tb\tY\n2.1\tc\tc\tZ\n\n#\n1\t#\t#\tX\n\n"


@pytest.mark.parametrize(
    ("text", "settings", "sentences", "skipped"),
    [
        # comments by their columns, by their spaces between tabs, and by a tag that no word has
        ("# id 7 x=en\na _ O\n# b\nb _ O\n", {}, [("a", "O"), ("b", "O")], "2 comments"),
        ("# newdoc\na\tO\n", {}, [("a", "O")], "1 comments"),
        ("# doc7\na O\n# O\n", {}, [("a", "O"), ("#", "O")], "1 comments"),
        ("#tag B-x\n# B-x\nb B-x\n", {}, [("#tag", "B-x"), ("#", "B-x"), ("b", "B-x")], ""),
        ("# a text\na\n#\n", {"tag_column": None}, [("a",), ("#",)], "1 comments"),
        (CONLLU, {"token_column": 1}, [("a", "X"), ("b", "Y"), ("#", "X")], "2 comments"),
        (CONLLU, {"token_column": 1}, [("a", "X"), ("b", "Y"), ("#", "X")], "2 ranges and empty"),
        ("1-2 x O\na y O\n", {"token_column": 1}, [("x", "O"), ("y", "O")], ""),
        # a word that nobody sees keeps its line
        ("a\tO\n\u00a0\tO\n", {}, [("a", "O"), ("\u00a0", "O")], ""),
        ("a O\n\u200b O\n", {}, [("a", "O"), ("\u200b", "O")], ""),
        ("a\n\u00a0\n", {"tag_column": None}, [("a",), ("\u00a0",)], ""),
    ],
)
def test_what_is_a_word_in_conll(tmp_path, text, settings, sentences, skipped):
    (tmp_path / "a.conll").write_text(text, encoding="utf-8")
    source = Conll(path=str(tmp_path / "a.conll"), **settings)
    records = list(source.records())
    assert [row for r in records for row in zip(*r.fields.values(), strict=True)] == sentences
    notes = source.notes()
    assert (skipped in notes[0]) if skipped else (notes == [])


def test_a_column_that_is_not_there_is_named_also_where_a_comment_may_be(tmp_path):
    (tmp_path / "a.conll").write_text("#\na\n")
    with pytest.raises(InputError, match=r"a\.conll:1: no column 3 among 1"):
        list(Conll(path=str(tmp_path / "a.conll"), tag_column=3).records())
