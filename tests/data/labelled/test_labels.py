from typing import Any

import numpy as np
import pytest

from jaxlm.config import FinetuneConfig
from jaxlm.data.labelled import labels
from jaxlm.data.labelled.classification import TextFields
from jaxlm.data.labelled.dataset import LabelledConfig, read_records, read_splits, reading
from jaxlm.data.labelled.records import Record, Table
from jaxlm.errors import InputError
from jaxlm.runs import finetuned
from jaxlm.tasks.classification import Classification
from jaxlm.tasks.embedding import Embedding
from jaxlm.train.loop import TrainConfig


def record(value) -> Record:
    return Record(fields={"label": value}, origin="a.csv:7")


@pytest.mark.parametrize(
    ("found", "names"),
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["0.5", "-1", "1e1"], ("-1", "0.5", "1e1")),
    ],
)
def test_labels_are_sorted(found, names):
    assert labels.discover(found) == names


@pytest.mark.parametrize(
    ("found", "what"), [(["x", "x"], "the only label is 'x'"), ([], "no labels")]
)
def test_a_classifier_needs_two_labels(found, what):
    with pytest.raises(InputError, match=what):
        labels.discover(found)


def test_bio_tags_come_in_pairs():
    assert labels.discover_tags(["O", "B-x", "I-y"]) == ("B-x", "B-y", "I-x", "I-y", "O")
    assert labels.discover_tags(["NN", "B-x"]) == ("B-x", "NN")


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [("B-x E-x S-y O", "BIES"), ("S-x S-y", "BIES"), ("U-x L-y", "BILU"), ("B-x M-y", "BMES")],
)
def test_each_type_has_all_tags_of_its_scheme(tags, scheme):
    """Of which those that training lacks may be in what is evaluated."""
    own = set(tags.split())
    expected = {f"{mark}-{kind}" for mark in scheme for kind in "xy"} | (own & {"O"})
    assert set(labels.discover_tags(own)) == expected


def test_an_unknown_label_names_its_place_and_those_known():
    numbers = labels.numbers_of(["b", "a"], ("a", "b"), ["x:1", "x:2"])
    assert (numbers.tolist(), numbers.dtype) == ([1, 0], np.int32)
    with pytest.raises(InputError, match=r"x:2: label 'c' is not among .* \(a, b\)"):
        labels.numbers_of(["b", "c"], ("a", "b"), ["x:1", "x:2"])


@pytest.mark.parametrize(("value", "label"), [(" pos ", "pos"), (3, "3"), (True, "True")])
def test_single_labels(value, label):
    assert labels.read_label(record(value), "label") == label


@pytest.mark.parametrize("value", ["", " ", None, ["x"], "x\ud800"])
def test_bad_single_labels(value):
    with pytest.raises(InputError, match=r"a.csv:7: label (is|holds half)"):
        labels.read_label(record(value), "label")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x| y |x", ("x", "y")),
        ("", ()),
        ('["x|z", "y"]', ("x|z", "y")),
        (["y", 1], ("y", "1")),
        ([], ()),
    ],
)
def test_several_labels(value, expected):
    assert labels.read_labels(record(value), "label", "|") == expected


@pytest.mark.parametrize("value", ['["x"', "[" * 100_000], ids=["open", "deep"])
def test_bad_label_list(value):
    with pytest.raises(InputError, match=r"a.csv:7: label is .* not a JSON list"):
        labels.read_labels(record(value), "label", "|")
    with pytest.raises(InputError, match=r"a.csv:7: label holds half of a surrogate pair"):
        labels.read_labels(record(["x\udfff"]), "label", "|")


@pytest.mark.parametrize("value", [None, [None], ["a", {"b": 1}], [["a"]]])
def test_what_is_no_list_of_labels(value):
    with pytest.raises(InputError, match=r"which is not a list of labels; \[\] is none"):
        labels.read_labels(record(value), "label", "|")


def test_a_missing_number_is_no_class():
    with pytest.raises(InputError, match=r"a.csv:7: label is nan, which is not a single label"):
        labels.read_label(record(float("nan")), "label")


def test_indicators():
    table = labels.indicators_of([("b",), (), ("a", "b")], ("a", "b"), ["p"] * 3)
    assert (table.tolist(), table.dtype) == ([[0, 1], [0, 0], [1, 1]], np.float32)


def test_targets():
    assert labels.read_target(record("-2.5e0"), "label") == -2.5
    for value in ("nan", "inf", "x", None, True, "", "1e39", "-1e400", 10**400):
        with pytest.raises(InputError, match=r"a.csv:7: label is .* not a finite float32 number"):
            labels.read_target(record(value), "label")


NUMBERS = TextFields(target="number")
SIMILARITIES = TextFields(pair="text", target="number")
with_numbers = pytest.mark.parametrize(
    "task", [Classification(fields=NUMBERS), Embedding(fields=SIMILARITIES, min_similarity=0.0)]
)


def numbered(*values: str) -> list[Record]:
    return [Record(fields={"text": "a", "label": x}, origin=f"{i}") for i, x in enumerate(values)]


@with_numbers
@pytest.mark.parametrize("bad", ["", "n/a", "1.250,5", "12.03.2021"])
def test_good_numbers_do_not_depend_on_bad_ones(task, bad):
    records = numbered("1,250", "3,5", bad, "-2,125", "4")
    with pytest.raises(InputError, match=r"^2: .* 1 of 5 records cannot be used"):
        read_records(records, reading(task), "raise")
    found = read_records(records, reading(task), "skip")
    assert [example.label for example in found] == [1.25, 3.5, -2.125, 4]


@pytest.mark.parametrize("odd", ["3,", ",5"])
def test_decimal_commas_beside_which_digits_are_left_out(odd):
    assert labels.has_decimal_commas(numbered("3,5", "1,250", odd), "label")


@with_numbers
def test_one_number_alone_is_read_as_all_are(task):
    records = numbered("4.5", "3,5", "1,250", "2")
    with pytest.raises(InputError, match=r"^1: .* write 3\.5 for it.*; 2: .* 2 of 4 records"):
        read_records(records, reading(task), "raise")
    found = read_records(records, reading(task), "skip")
    assert [example.label for example in found] == [4.5, 2]


@with_numbers
def test_how_numbers_are_written_in_training_holds_for_other_data(task, tmp_path):
    for name, rows in (("train", ["3,5", "4"]), ("dev", ["1,250", "2,500"]), ("thousands", ["7"])):
        lines = ["text;label", *(f"{name} {i};{x}" for i, x in enumerate(rows))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    train, dev, other = (
        Table(path=str(tmp_path / f"{name}.csv"), delimiter=";")
        for name in ("train", "dev", "thousands")
    )
    splits = read_splits(LabelledConfig(train=train, validation=dev), reading(task))
    assert [example.label for example in splits.validation] == [1.25, 2.5]
    kept = task.settled(splits.train)
    assert kept.fields.decimal_commas is True
    assert [example.label for example in kept.read(dev.records())] == [1.25, 2.5]
    assert kept.settled([], task).fields.decimal_commas is True  # a run of before keeps its own
    assert task.settled(splits.train, task).fields.decimal_commas is None
    assert task.settled(splits.train, kept).fields.decimal_commas is True
    # What training data leave open stays so.
    with pytest.raises(InputError, match=r"write 1250 for it, .* or 1\.250 if that is a decimal"):
        read_splits(LabelledConfig(train=other, validation=dev), reading(task))


@with_numbers
def test_it_holds_too_where_what_shows_it_is_not_trained_on(task, tmp_path):
    path = tmp_path / "train.csv"
    rows = [f"text {i};{x}" for i, x in enumerate(["3,5", *range(4, 24)])]
    path.write_text("\n".join(["text;label", *rows]))
    data = LabelledConfig(train=Table(path=str(path), delimiter=";"), few_shot=2)
    splits = read_splits(data, reading(task))
    assert "3,5" not in [text for example in splits.train for text in example.written]
    config = FinetuneConfig(
        name="x", runs=tmp_path, base="b", data=data, task=task, train=TrainConfig(steps=1)
    )
    found: Any = finetuned.settled(config, splits).task
    assert found.fields.decimal_commas is True
    if isinstance(found, Classification):
        numbers = [example.label for example in splits.train]
        assert found.scale == (np.mean(numbers), np.std(numbers))  # of what is trained on
