import pytest

from jaxlm.errors import InputError
from jaxlm.evaluate.tagging import Entity, Mention, find_mentions, read_entities


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-x I-x O B-y", [(0, 2, "x"), (3, 4, "y")]),
        ("B-x B-x I-x", [(0, 1, "x"), (1, 3, "x")]),
        ("O I-x I-x", [(1, 3, "x")]),  # begins without B
        ("B-x I-y I-y", [(0, 1, "x"), (1, 3, "y")]),  # changes type inside
        ("B-x O I-x", [(0, 1, "x"), (2, 3, "x")]),
        ("B-creative-work I-creative-work", [(0, 2, "creative-work")]),
        ("S-x B-x I-x E-x I-x", [(0, 1, "x"), (1, 4, "x"), (4, 5, "x")]),  # IOBES
        ("E-x E-x", [(0, 1, "x"), (1, 2, "x")]),
        ("B-x E-y", [(0, 1, "x"), (1, 2, "y")]),
    ],
)
def test_reads_entities(tags, expected):
    assert read_entities(tags.split()) == [Entity(*entity) for entity in expected]


def test_finds_mentions_in_the_text():
    text = "In New  York, Ann"
    words = [(0, 2), (3, 6), (8, 12), (12, 13), (14, 17)]
    tags = ["O", "B-place", "I-place", "O", "I-person"]
    place, person = find_mentions(tags, words, text, [1.0, 0.9, 0.7, 1.0, 0.4])
    assert place == Mention(type="place", text="New  York", start=3, end=12, probability=0.7)
    assert person == Mention(type="person", text="Ann", start=14, end=17, probability=0.4)
    assert [m.probability for m in find_mentions(tags, words, text)] == [None, None]


@pytest.mark.parametrize("tag", ["person", "X-person", "B-", "-person", "", "O-person", "b-x"])
def test_a_tag_of_no_scheme_is_named(tag):
    with pytest.raises(InputError, match=f"tag '{tag}' is neither O nor"):
        read_entities(["O", tag])


def test_words_without_tags_are_refused():
    with pytest.raises(InputError, match="1 tags, 2 words and 1 probabilities"):
        find_mentions(["O"], [(0, 1), (2, 3)], "a b")
    with pytest.raises(InputError, match="2 tags, 2 words and 1 probabilities"):
        find_mentions(["O", "O"], [(0, 1), (2, 3)], "a b", [0.5])


def test_other_letters_for_the_same_scheme():
    iobes = ["B-x", "I-x", "E-x", "O", "S-y"]
    for letters in ("BIESO", "BILUO", "BMESO", "BMEWO"):
        begin, inside, end, single, _ = letters
        names = dict(zip("BIES", (begin, inside, end, single), strict=True)) | {"O": "O"}
        other = [names[tag[0]] + tag[1:] for tag in iobes]
        assert read_entities(other) == read_entities(iobes)
