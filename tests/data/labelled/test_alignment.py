"""Tags of words, at subwords."""

import tracemalloc

import numpy as np
import pytest

from jaxlm.data import tokenizers
from jaxlm.data.labelled import tagging, windows
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.data.labelled.tagging import Sentence, TagFields
from jaxlm.errors import InputError

NAMES = ("B-per", "I-per", "O")


def sentence(words: str, tags: str | None = None) -> Sentence:
    return Sentence(words=words.split(), tags=tags and tags.split(), origin="a.conll:5")


def test_tags_are_at_first_subwords(framer, words):
    encoded = tagging.encode(framer, [sentence("John playing unknown", "B-per O I-per")], NAMES)
    (row,) = encoded.rows
    assert words(row["tokens"]) == "[CLS] john play ##ing un ##known [SEP]"
    assert row["labels"].tolist() == [0, 0, 2, 0, 1, 0, 0]
    assert row["weights"].tolist() == [0, 1, 1, 0, 1, 0, 0]
    assert row["words"].tolist() == [0, 1, 2, 0, 3, 0, 0]


def test_dropped_words_have_no_position(framer):
    (row,) = tagging.encode(framer, [sentence("a \u200d b", "O B-per I-per")], NAMES).rows
    assert row["words"].tolist() == [0, 1, 3, 0]
    assert row["labels"].tolist() == [0, 2, 1, 0]
    assert row["weights"].tolist() == [0, 1, 1, 0]


def test_long_sentences_have_windows(framer, words):
    """Of 10 tokens, that share 2; a word counts where there is more around it."""
    long = sentence("a b c d e f g h john smith new york a", "O " * 8 + "B-per I-per O O O")
    first, second = tagging.encode(framer, [sentence("a", "O"), long], NAMES).rows[1:]
    assert words(first["tokens"]) == "[CLS] a b c d e f g h john smith [SEP]"
    assert words(second["tokens"]) == "[CLS] john smith new york a [SEP]"
    assert first["words"].tolist() == [0, *range(1, 10), 0, 0]
    assert second["words"].tolist() == [0, 0, 10, 11, 12, 13, 0]
    assert second["labels"].tolist() == [0, 0, 1, 2, 2, 2, 0]
    assert [int(row["sentence"]) for row in (first, second)] == [1, 1]


@pytest.mark.parametrize("length", [*range(1, 12), 19, 20, 27, 40])
@pytest.mark.parametrize("word", ["a", "playing", "unknown " + "a " * 3])
@pytest.mark.parametrize("doc_stride", [None, 0, 5, 9])
def test_each_word_counts_once(framer, word, length, doc_stride):
    own = ((word + " ") * length).split()[:length]
    one = Sentence(words=own, tags=["O"] * length, origin="x")
    encoded = tagging.encode(framer, [one], NAMES, doc_stride)
    counted = np.concatenate([row["words"] for row in encoded.rows])
    assert sorted(counted[counted > 0]) == list(range(1, length + 1))
    assert sum(row["weights"].sum() for row in encoded.rows) == length
    assert (encoded.lengths <= 12).all()
    for row in encoded.rows:
        assert ((row["words"] > 0) == (row["weights"] > 0)).all()


def test_each_word_is_read_where_it_sees_most(framer):
    """At least half of what windows share is on both of its sides, but where the text ends."""
    long = sentence("a b c d e f g h " * 9, None)
    found = {}
    for row in tagging.encode(framer, [long], (), doc_stride=6).rows:
        for place in np.flatnonzero(row["words"]):
            found[int(row["words"][place])] = place - 1, row["lengths"] - 2 - place
    assert len(found) == 72
    assert all(min(sides) >= 2 for word, sides in found.items() if 3 <= word <= 70)
    assert found[1][0] == found[72][1] == 0


def test_the_window_with_most_context_as_it_is_defined():
    """Of all windows the one with the most tokens on a token's poorer side."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        num_tokens, size = int(rng.integers(1, 80)), int(rng.integers(1, 30))
        begins = windows.begins(num_tokens, size, int(rng.integers(0, size)))
        places = np.sort(rng.integers(0, num_tokens, int(rng.integers(0, 40))))
        ends = np.minimum(begins + size, num_tokens)
        left = np.where(begins == 0, num_tokens, places[:, None] - begins)
        right = np.where(ends == num_tokens, num_tokens, ends - 1 - places[:, None])
        inside = (places[:, None] >= begins) & (places[:, None] < ends)
        expected = np.where(inside, np.minimum(left, right), -1).argmax(axis=1)
        found = windows.most_context(places, begins, size, num_tokens)
        np.testing.assert_array_equal(found, expected)


def test_the_windows_of_a_very_long_document_need_little_memory():
    begins = windows.begins(100_000, 126, 31)
    tracemalloc.start()
    windows.most_context(np.arange(100_000), begins, 126, 100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e7  # 200 bytes a token, where all windows for each were 8,400


def test_windows_that_share_all_they_hold(framer):
    raised = (
        r"doc_stride=10 is not below the 10 tokens .* rows of 12: lower it, or train with a larger"
    )
    with pytest.raises(InputError, match=raised):
        tagging.encode(framer, [sentence("a")], (), doc_stride=10)
    full = Framer(framer._tokenizer, 12, most=12)
    with pytest.raises(InputError, match=r"rows of 12: lower it \(the model reads 12 at most"):
        tagging.encode(full, [sentence("a")], (), doc_stride=10)
    assert len(tagging.encode(framer, [sentence("a " * 11)], (), doc_stride=9).rows) == 2
    assert len(tagging.encode(Framer(framer._tokenizer, 13), [sentence("a")], (), 10).rows) == 1


def test_byte_level_words_begin_with_a_space():
    tokenizer = tokenizers.train("bpe", ["who lives in new york"] * 5, 400)
    encoded = tagging.encode(Framer(tokenizer, 12), [sentence("new york who")], ())
    (row,) = encoded.rows
    firsts = [tokenizer.id_to_token(int(token)) for token in row["tokens"][row["words"] > 0]]
    assert len(firsts) == 3
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
