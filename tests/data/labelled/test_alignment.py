"""Tags of words, at subwords."""

import pytest

from jaxlm.data import tokenizers
from jaxlm.data.labelled import tagging
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.data.labelled.tagging import Sentence, TagFields
from jaxlm.errors import InputError

NAMES = ("B-per", "I-per", "O")


def sentence(words: str, tags: str | None = None) -> Sentence:
    return Sentence(words=words.split(), tags=tags and tags.split(), origin="a.conll:5")


def test_tags_are_at_first_subwords(framer, words):
    encoded = tagging.encode(framer, [sentence("John playing unknown", "B-per O I-per")], NAMES)
    (row,) = encoded.examples.rows
    assert words(row["tokens"]) == "[CLS] john play ##ing un ##known [SEP]"
    assert row["labels"].tolist() == [0, 0, 2, 0, 1, 0, 0]
    assert row["weights"].tolist() == [0, 1, 1, 0, 1, 0, 0]
    assert encoded.first_positions[0].tolist() == [1, 2, 4]


def test_words_cut_off_or_dropped_have_no_position(framer, words):
    cut = tagging.encode(framer, [sentence("a playing " * 5, "O " * 10)], NAMES)
    assert cut.examples.rows[0]["lengths"] == 12
    assert cut.first_positions[0].tolist() == [1, 2, 4, 5, 7, 8, 10, -1, -1, -1]
    assert cut.examples.untruncated.tolist() == [17]
    dropped = tagging.encode(framer, [sentence("a \u200d b", "O B-per I-per")], NAMES)
    assert dropped.first_positions[0].tolist() == [1, -1, 2]
    assert dropped.examples.rows[0]["labels"].tolist() == [0, 2, 1, 0]


def test_byte_level_words_begin_with_a_space():
    tokenizer = tokenizers.train("bpe", ["who lives in new york"] * 5, 400)
    encoded = tagging.encode(Framer(tokenizer, 12), [sentence("new york who")], ())
    (row,) = encoded.examples.rows
    firsts = [tokenizer.id_to_token(int(row["tokens"][p])) for p in encoded.first_positions[0]]
    assert all(token.startswith("Ġ") for token in firsts)
    assert "labels" not in row


def test_unknown_tags():
    record = Record(fields={"tokens": ["a"], "tags": ["B-loc"]}, origin="a.conll:5")
    (read,) = tagging.read([record], TagFields())
    assert tagging.label_names([read]) == ("B-loc", "I-loc")
    with pytest.raises(InputError, match=r"a.conll:5: label 'B-loc' is not among .*B-per"):
        tagging.encode(Framer(tokenizers.train("bpe", ["a"], 300), 9), [read], NAMES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "x:1: 1 tags for 2 words"),
        ({"tokens": [], "tags": []}, "x:1: no words"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "x:1: an empty word"),
        ({"tokens": ["a"], "tags": ["\u200b"]}, r"x:1: the tag '\\u200b' has no visible"),
        ({"tokens": ["a", "b"], "tags": [0, 1]}, "x:1: .* numbers of tags: give their names"),
    ],
)
def test_bad_sentences(fields, message):
    with pytest.raises(InputError, match=message):
        tagging.read([Record(fields=fields, origin="x:1")], TagFields())


def test_words_in_a_cell():
    record = Record(fields={"w": "a b", "t": "O  O"}, origin="x:1")
    (read,) = tagging.read([record], TagFields(words="w", tags="t"))
    assert (read.words, read.tags) == (["a", "b"], ["O", "O"])
