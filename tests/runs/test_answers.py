"""What goes into a model and what comes out, whatever the model."""

import csv
import io
import json
import math
from datetime import date

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import tabular
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError
from jaxlm.runs.answers import answered, as_records, joined, write_table
from jaxlm.runs.finite import damaged, require_finite, require_finite_loss


def rows(*texts, **columns):
    """Records of a table at x.csv:2 and so on."""
    return [
        Record(
            fields={"id": f"T{i}", "text": text} | columns,
            origin=f"x.csv:{i}",
        )
        for i, text in enumerate(texts, start=2)
    ]


def shout(texts):
    """A model that cannot say anything of ``?``."""
    for text in texts:
        if text == "?":
            raise InputError("what is ?")
    return [
        {"text": text, "label": text.upper(), "probabilities": {"A": 0.5, "B": 0.5}}
        for text in texts
    ]


def answers(records, **options):
    return answered(records, lambda record: record.text("text"), shout, **options)


def test_what_has_no_answer_stops_nothing_else():
    records = rows("a", "", "b", "?", "c")
    found = list(joined(answers(records, chunk=2), ["text"]))
    assert [one.get("label") for one in found] == ["A", None, "B", None, "C"]
    assert [one["line"] for one in found] == [2, 3, 4, 5, 6]
    assert [one["id"] for one in found] == ["T2", "T3", "T4", "T5", "T6"]
    assert found[1] == {
        "line": 3,
        "id": "T3",
        "text": "",
        "error": "x.csv:3: field 'text' is empty; remove the record",
    }
    assert found[3]["error"] == "what is ?"
    assert found[0].keys() == {"line", "id", "text", "label", "probabilities"}


@pytest.mark.parametrize("texts", [("", ""), ("?", "?"), ("?",)])
def test_where_nothing_has_an_answer_the_file_is_another(texts):
    with pytest.raises(InputError, match=r"is empty|what is \?"):
        list(answers(rows(*texts)))
    assert list(answers([])) == []


def test_where_nothing_is_finite_it_is_asked_once():
    asked = []

    def answer(texts):
        asked.append(texts)
        require_finite({"x": np.array([len(text) / 1.0 for text in texts]) * np.nan}, {})
        return []

    with pytest.raises(InputError, match="not finite, although its weights are"):
        list(answered(rows("a", "b", "c"), lambda record: record.text("text"), answer))
    assert asked == [["a", "b", "c"]]


def test_a_loss_is_not_finite_for_its_weights_or_for_something_else():
    require_finite_loss({"loss": 1.0}, {"a": np.full(2, np.nan)})
    require_finite_loss({"loss": np.nan}, {"a": np.ones(2)})
    with pytest.raises(InputError, match="its weights a are not: copy or download"):
        require_finite_loss({"loss": np.nan}, {"a": np.full(2, np.nan)})


def test_weights_that_are_not_finite_are_named():
    half = jnp.array([1, jnp.inf], jnp.bfloat16)
    assert damaged({"a": np.ones(2, np.int8), "b": {"c": half, "d": np.ones(2)}}) == "b/c"
    assert damaged({"a": np.ones(2, np.int8)}) is None


def test_own_columns_are_not_overwritten():
    records = rows("", "a", label="neg", line="7", error="none")
    for found in joined(answers(records), ["text"]):
        assert found["given_label"] == "neg"
        assert found["given_line"] == "7"
        assert found["given_error"] == "none"
    assert (found["label"], found["line"], "error" in found) == ("A", 3, False)


def table_of(pairs, used) -> list[dict]:
    file = io.StringIO()
    write_table(pairs, used, file, False)
    return list(csv.DictReader(io.StringIO(file.getvalue())))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"label": "neg", "given_label": "x"}, {"given_given_label": "neg", "given_label": "x"}),
        ({"given_label": "x", "label": "neg"}, {"given_given_label": "neg", "given_label": "x"}),
        (
            {"error": "e", "given_error": "x", "given_given_error": "y"},
            {"given_given_given_error": "e", "given_error": "x", "given_given_error": "y"},
        ),
        (
            {"probabilities/A": "0.9", "given_probabilities/A": "x", "probabilities/C": "y"},
            {
                "given_given_probabilities/A": "0.9",
                "given_probabilities/A": "x",
                "probabilities/C": "y",
            },
        ),
        ({"probabilities": "p", "line": "7"}, {"given_probabilities": "p", "given_line": "7"}),
    ],
)
def test_own_columns_keep_their_values_under_free_names(columns, expected):
    records = rows("", "a", "b", **columns)
    news = {"line", "label", "probabilities", "probabilities/A", "probabilities/B"}
    lines = list(joined(answers(records), ["text"]))
    table = table_of(answers(records), ["text"])
    for record, line, row in zip(records, lines, table, strict=True):
        expected_here = expected | {"id": record.fields["id"]}
        assert expected_here.items() <= line.items()
        assert (expected_here | {"text": record.fields["text"]}).items() <= row.items()
        assert row.keys() == expected_here.keys() | news - {"probabilities"} | {"text", "error"}
    assert (lines[2]["label"], lines[2]["line"], lines[2]["probabilities"]["A"]) == ("B", 4, 0.5)
    assert (table[2]["label"], table[2]["line"], table[2]["probabilities/A"]) == ("B", "4", "0.5")


def test_a_name_is_free_in_all_records():
    """Or values of two columns would stand in one."""
    records = [*rows("a", label="neg", given_label="x"), *rows("b", label="pos")]
    assert [one["given_given_label"] for one in joined(answers(records), ["text"])] == [
        "neg",
        "pos",
    ]
    assert [one["given_label"] for one in table_of(answers(records), ["text"])] == ["x", ""]
    with pytest.raises(InputError, match="the field 'given_given_label'"):
        table_of(answers(records[::-1]), ["text"])
    records = [*rows("a", label="neg"), *rows("b", given_label="x")]
    first, second = joined(answers(records), ["text"])
    assert (first["given_label"], second["given_given_label"]) == ("neg", "x")


@pytest.mark.parametrize("name", ["line", "error"])
def test_a_text_in_a_column_of_that_name_is_kept(name):
    records = [Record(fields={name: text}, origin=f"x.csv:{i}") for i, text in enumerate("?a", 2)]
    pairs = list(answered(records, lambda record: record.text(name), shout))
    lines = list(joined(pairs, [name]))
    assert [one["line"] for one in lines] == [2, 3]
    assert (lines[0][f"given_{name}"], lines[0]["error"]) == ("?", "what is ?")
    table = table_of(pairs, [name])
    assert [(row["line"], row[f"given_{name}"], row["error"]) for row in table] == [
        ("2", "?", "what is ?"),
        ("3", "a", ""),
    ]


def test_what_only_some_answers_have_overwrites_nothing():
    pairs = [(record, {"tags": []}) for record in rows("a", "b", words="own")]
    pairs[1][1]["words"] = ["b"]
    assert [one.get("given_words") for one in joined(pairs, ["text"])] == [None, "own"]
    with pytest.raises(InputError, match="the field 'given_words'"):
        table_of(pairs, ["text"])


@pytest.mark.parametrize("tab", [False, True])
def test_a_table_comes_out_of_a_table(tab):
    file = io.StringIO()
    records = rows('"a", she\tsaid', "", "b\nc", lang="en", label="neg")
    write_table(answers(records), ["text"], file, tab)
    file.seek(0)
    found = list(csv.DictReader(file, delimiter="\t" if tab else ","))
    assert list(found[0]) == [
        *("line", "id", "text", "lang", "given_label", "label", "probabilities/A"),
        *("probabilities/B", "error"),
    ]
    assert [row["text"] for row in found] == ['"a", she\tsaid', "", "b\nc"]
    assert [row["label"] for row in found] == ['"A", SHE\tSAID', "", "B\nC"]
    assert [bool(row["error"]) for row in found] == [False, True, False]
    assert found[0]["probabilities/B"] == "0.5"


def test_a_label_that_is_the_text_is_kept_in_a_table():
    file = io.StringIO()
    write_table(answers(rows("A")), ["text"], file, False)
    assert "A,A,0.5" in file.getvalue()


def test_halves_of_characters_are_written_as_escapes():
    half = "\ud83d"
    records = rows("ok Ada", **{half: half, "many": [half], "emoji": "😀"})
    table = io.StringIO()
    write_table(answers(records), ["text"], table, tab=False)
    (row,) = csv.DictReader(io.StringIO(table.getvalue().encode().decode()))
    assert row[r"\ud83d"] == r"\ud83d"
    assert (row["many"], row["emoji"], row["label"]) == (r'["\ud83d"]', "😀", "OK ADA")
    (answer,) = joined(answers(records), ["text"])
    line = tabular.json_text(answer)
    assert json.loads(line.encode()) == answer
    assert "😀" in line


def test_what_is_written_is_json():
    value = {"x": math.nan, "y": [math.inf, 1.5], "when": date(2020, 1, 2), "label": "é"}
    text = tabular.json_text(value)
    assert text == '{"x": null, "y": [null, 1.5], "when": "2020-01-02", "label": "é"}'
    assert not tabular.is_plain(value)
    assert tabular.is_plain({"label": "é", "y": 1.5})


def test_a_table_has_one_set_of_columns():
    records = [*rows("a"), *rows("b", more=1)]
    with pytest.raises(InputError, match=r"the field 'more'.*let --out end in \.jsonl"):
        write_table(answers(records), ["text"], io.StringIO(), False)


class Pandas:
    """As a table of pandas: walking through it gives the names of its columns."""

    columns = ("text", "id")

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, orient):
        assert orient == "records"
        return [{"text": "a", "id": 1}, {"text": "b", "id": 2}]


@pytest.mark.parametrize(
    "given",
    [
        ["a", "b"],
        ("a", "b"),
        np.array(["a", "b"]),
        (text for text in "ab"),
        [{"text": "a"}, {"text": "b"}],
        Pandas(),
        [Record(fields={"text": "a"}, origin="x"), "b"],
    ],
    ids=lambda given: type(given).__name__,
)
def test_texts_in_any_form(given):
    assert [record.text("text") for record in as_records(given, ["text"])] == ["a", "b"]


def test_what_is_no_text_says_so_in_its_place():
    found = list(joined(answers(as_records(["a", None, float("nan"), 3, "b"], ["text"])), ["text"]))
    assert [one.get("label") for one in found] == ["A", None, None, None, "B"]
    assert found[2]["error"] == "number 3: field 'text' is nan, which is not text"


def test_pairs():
    for given in ([("a", "b")], np.array([["a", "b"]]), [{"x": "a", "y": "b"}]):
        (record,) = as_records(given, ["x", "y"])
        assert record.fields == {"x": "a", "y": "b"}
    with pytest.raises(InputError, match=r"number 1 is a text where there must be 2 \(x, y\)"):
        list(as_records(["a"], ["x", "y"]))


@pytest.mark.parametrize("alone", ["a text", {"text": "a"}, b"a"])
def test_one_alone_is_no_list(alone):
    with pytest.raises(InputError, match="a list is expected"):
        list(as_records(alone, ["text"]))
