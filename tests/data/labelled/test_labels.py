import numpy as np
import pytest

from jaxlm.data.labelled import labels
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError


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
