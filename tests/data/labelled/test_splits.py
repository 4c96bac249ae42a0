from collections import Counter

import pytest

from jaxlm.data.labelled.classification import TextExample
from jaxlm.data.labelled.splits import few_shot, stratified, without_duplicates
from jaxlm.errors import InputError


def examples(**counts: int) -> list[TextExample]:
    return [text(f"{label} {i}", label) for label, n in counts.items() for i in range(n)]


def text(content: str, label: str = "x") -> TextExample:
    return TextExample(text=content, pair=None, label=label, origin="a.csv:1")


def count(part: list[TextExample]) -> Counter[str]:
    return Counter(example.stratum for example in part)


def test_a_split_keeps_the_share_of_each_class():
    data = examples(a=100, b=30, c=11, d=1)
    train, validation = stratified(data, 0.2, seed=0)
    assert len(validation) == round(0.2 * len(data))
    assert sorted(train + validation, key=data.index) == data
    assert [data.index(example) for example in train] == sorted(map(data.index, train))
    for label, total in count(data).items():
        assert abs(count(validation)[label] - 0.2 * total) <= 1.5
    assert count(train)["d"] == 1  # a class that is met in validation alone could not be learned


def test_splits_depend_on_the_seed_alone():
    data = examples(a=50, b=50)
    assert stratified(data, 0.3, seed=1) == stratified(data, 0.3, seed=1)
    assert stratified(data, 0.3, seed=1) != stratified(data, 0.3, seed=2)


@pytest.mark.parametrize("seed", range(5))
def test_every_class_stays_in_training(seed):
    train, validation = stratified(examples(**dict.fromkeys("abcdefgh", 2)), 0.5, seed)
    assert set(count(train)) == set("abcdefgh") == set(count(validation))


@pytest.mark.parametrize(
    ("data", "fraction", "message"),
    [
        ({"a": 5, "b": 5}, 0.01, "10 examples of 2 classes are too few"),
        ({"a": 1, "b": 1}, 0.5, "2 examples of 2 classes are too few"),
        ({"a": 9}, 1.0, "fraction of 1.0 is not between 0 and 1"),
    ],
)
def test_bad_splits(data, fraction, message):
    with pytest.raises(InputError, match=message):
        stratified(examples(**data), fraction, seed=0)


def test_few_shot_takes_k_of_each_class_and_grows_with_k():
    data = examples(a=20, b=9)
    few, more = few_shot(data, 4, seed=0), few_shot(data, 8, seed=0)
    assert count(few) == {"a": 4, "b": 4}
    assert {example.text for example in few} < {example.text for example in more}
    assert few != few_shot(data, 4, seed=1)
    with pytest.raises(InputError, match="class 'b' has 9 examples, fewer than the 10"):
        few_shot(data, 10, seed=0)


def test_duplicates_leave_training():
    train = [text("One  TWO"), text("three"), text("ﬁne")]
    kept, removed = without_duplicates(train, [text("one two "), text("fine", "y")])
    assert (kept, removed) == ([train[1]], [train[0], train[2]])
    with pytest.raises(InputError, match="every training example is also in the validation data"):
        without_duplicates(train[:1], train)


def test_pairs_are_duplicates_as_a_whole():
    pair = TextExample(text="one", pair="two", label="x", origin="")
    assert without_duplicates([pair], [text("one")])[1] == []
