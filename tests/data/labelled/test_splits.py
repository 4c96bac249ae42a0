import random
from collections import Counter

import pytest

from jaxlm.data.labelled.classification import TextExample
from jaxlm.data.labelled.splits import copies, few_shot, stratified, without_duplicates
from jaxlm.data.labelled.tagging import Sentence
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
    validation = [text("one two "), text("fine", "y")]
    kept, removed, rest = without_duplicates(train, validation)
    assert (kept, removed, rest) == ([train[1]], [train[0], train[2]], validation)
    with pytest.raises(InputError, match="every training example is also in the validation data"):
        without_duplicates(train[:1], train)


def test_pairs_are_duplicates_as_a_whole():
    pair = TextExample(text="one", pair="two", label="x", origin="")
    assert without_duplicates([pair], [text("one")])[1] == []


def labelled(kind: str, labels: list[str], content: str) -> TextExample | Sentence:
    """An example of one class, of several labels, or of a tag for each word."""
    match kind:
        case "class":
            return text(content, labels[0])
        case "labels":
            return TextExample(text=content, pair=None, label=tuple(labels), origin=content)
        case _:
            words = [content, *labels[1:]]
            return Sentence(words=words, tags=labels, origin=content)


def all_labels(part) -> set[str]:
    return {label for example in part for label in example.classes}


@pytest.mark.parametrize("kind", ["class", "labels", "tags"])
@pytest.mark.parametrize("seed", range(20))
def test_each_label_keeps_something_to_learn_from(kind, seed):
    chosen = random.Random(seed)
    rare = [f"rare {i}" for i in range(6)]
    data = []
    for i in range(60):
        own = chosen.sample("abc", 2) + ([rare[i // 8]] if i % 8 == 0 and i < 48 else [])
        chosen.shuffle(own)
        data.append(labelled(kind, own, f"text {chosen.randrange(40)}"))  # some are copies
    train, validation = stratified(data, 0.3, seed)
    assert all_labels(train) == all_labels(data)
    assert len(train) + len(validation) == len(data)
    assert validation
    assert len(validation) >= 0.3 * len(data) - len(rare)
    train, _, validation = without_duplicates(train, validation)
    assert all_labels(train) == all_labels(data)
    assert validation
    assert not {e.content for e in train} & {e.content for e in validation}
    if kind != "class":  # of which k are asked for, not given where there are fewer
        few = few_shot(train, 2, seed)
        assert all_labels(few) == all_labels(data)
        total, kept = (Counter(x for e in part for x in set(e.classes)) for part in (train, few))
        assert all(kept[label] >= min(2, total[label]) for label in total)
        assert set(map(id, few)) <= set(map(id, few_shot(train, 3, seed)))


def test_where_labels_are_frequent_the_split_is_as_it_was():
    data = [labelled("tags", ["a", "b"], str(i)) for i in range(20)]
    _, validation = stratified(data, 0.25, seed=0)
    plain = [text(str(i)) for i in range(20)]
    assert [e.words[0] for e in validation] == [e.text for e in stratified(plain, 0.25, 0)[1]]


def test_labels_of_which_each_is_in_one_example_cannot_be_held_out():
    data = [labelled("labels", ["a", f"only {i}"], str(i)) for i in range(8)]
    with pytest.raises(InputError, match="of 8 examples none can be held out"):
        stratified(data, 0.5, seed=0)


def test_copies_and_contradictions_are_counted():
    data = [text("one", "x"), text("One", "x"), text("two", "x"), text("two ", "y"), text("three")]
    repeated, several = copies(data)
    assert repeated.startswith("2 of 5 training examples repeat the text of another")
    assert several.startswith("1 texts have different labels, the first at a.csv:1 and a.csv:1")
    assert copies(data[2:3]) == []
