"""Framing, and the tasks whose examples are one row or a few: texts, pairs, choices."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors

from jaxlm.data import tokenizers
from jaxlm.data.labelled import classification, multiple_choice
from jaxlm.data.labelled.classification import TextExample, TextFields
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.multiple_choice import ChoiceFields
from jaxlm.data.labelled.records import Record
from jaxlm.errors import InputError


def example(text: str, pair: str | None = None, label=None) -> TextExample:
    return TextExample(text=text, pair=pair, label=label, origin="a.csv:1")


def records(*fields: dict) -> list[Record]:
    return [Record(fields=f, origin=f"a.csv:{i}") for i, f in enumerate(fields, start=2)]


def byte_level(**kind) -> Tokenizer:
    bpe = tokenizers.train("bpe", ["the world is the world"] * 9, 300)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(**kind)
    return bpe


def split_first() -> Tokenizer:
    """As Llama 3 and GPT-4 cut texts: by a pattern, and then into bytes."""
    bpe = byte_level()
    split = pre_tokenizers.Split(Regex(r" ?\w+|\s+"), "isolated")
    parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return bpe


def metaspace(**kind) -> Tokenizer:
    unigram = tokenizers.train("unigram", ["the world is the world"] * 9, 60)
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(**kind)
    return unigram


KINDS = {  # and what stands before a text for its first word to be like the others
    "bytes": (lambda: byte_level(add_prefix_space=True), ""),  # as RoBERTa's when it is told to
    "bytes without a first space": (lambda: byte_level(add_prefix_space=False), " "),  # ModernBERT
    "bytes behind a pattern": (split_first, " "),
    "wordpiece": (lambda: tokenizers.train("wordpiece", ["the world is"] * 9, 60), ""),
    "a space before a text": (lambda: metaspace(prepend_scheme="always"), ""),
    "a space before the first": (lambda: metaspace(prepend_scheme="first"), ""),
    "no space before a text": (lambda: metaspace(prepend_scheme="never"), " "),
    "characters": (lambda: tokenizers.train("characters", ["the world is"] * 9, 60), " "),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_words_are_those_of_the_joined_text(kind):
    make, first = KINDS[kind]
    tokenizer, words = make(), ["the", "world", "is", "unheard", "the"]
    (encoding,) = Framer(tokenizer, 12).encodings([words])
    numbers = np.array(encoding.word_ids)
    assert sorted(set(numbers.tolist())) == list(range(5))
    joined = tokenizer.encode(first + " ".join(words), add_special_tokens=False)
    assert encoding.ids == joined.ids
    same = [[i for i, n in zip(encoding.ids, numbers, strict=True) if n == w] for w in (0, 4)]
    assert same[0] == same[1]  # wherever it stands


def test_words_that_begin_with_a_space_get_no_other():
    framer = Framer(byte_level(add_prefix_space=False), 12)
    (one,), (other,) = (framer.encodings([[word]]) for word in ("the", " the"))
    assert one.ids == other.ids


@pytest.mark.parametrize("texts", [("a b",), ("a", "b c d")])
def test_frames_are_the_post_processors(tokenizer, framer, texts):
    roberta = Tokenizer.from_str(tokenizer.to_str())
    roberta.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    bpe = tokenizers.train("bpe", ["a b c d"], 300)
    for reference, own in (
        (tokenizer, framer),
        (roberta, Framer(roberta, 12)),
        (bpe, Framer(bpe, 12)),
    ):
        expected = reference.encode(*texts)
        framed = own.frame(*own.ids(texts))
        assert framed.tokens.tolist() == expected.ids
        assert framed.token_type_ids.tolist() == expected.type_ids
        starts = [expected.sequence_ids.index(i) for i in range(len(texts))]
        assert list(framed.starts) == starts


@pytest.mark.parametrize("sizes", [(20, 1), (1, 20), (20, 20), (4, 20), (20, 4), (4, 5), (3, 5)])
def test_the_longer_of_a_pair_is_cut(tokenizer, framer, words, sizes):
    texts = [" ".join([name] * size) for name, size in zip("ab", sizes, strict=True)]
    framed = framer.frame(*framer.ids(texts))
    kept = [words(framed.tokens).split().count(name) for name in "ab"]
    assert len(framed.tokens) == min(sum(sizes) + 3, 12)
    assert framer.size(*framer.ids(texts)) == sum(sizes) + 3
    if sum(sizes) > 9:
        assert sum(kept) == 9
        if min(sizes) <= 4:
            assert min(kept) == min(sizes)  # longest first: the shorter is whole
        else:
            assert sorted(kept) == [4, 5]


def test_names_of_special_tokens_are_text(framer):
    (ids,) = framer.ids(["a [SEP] [MASK]"])
    assert not set(ids.tolist()) & {2, 3, 4}


def test_a_max_length_without_room(tokenizer):
    with pytest.raises(InputError, match="max_length=4 leaves no room for two texts among 3"):
        Framer(tokenizer, 4)
    with pytest.raises(InputError, match="3 special tokens; take a model that reads more"):
        Framer(tokenizer, 4, most=4)


def test_texts_with_classes(framer, words):
    examples = [example("a b", label="yes"), example(" ".join("abcdefgh" * 2), label="no")]
    names = classification.label_names(examples)
    encoded = classification.encode(framer, examples, classification.label_array(examples, names))
    row = encoded.rows[0]
    assert words(row["tokens"]) == "[CLS] a b [SEP]"
    assert {name: array.dtype for name, array in row.items()} == {
        "tokens": np.int32,
        "token_type_ids": np.int32,
        "lengths": np.int32,
        "labels": np.int32,
        "weights": np.float32,
    }
    assert (row["labels"], row["lengths"], row["weights"]) == (1, 4, 1)
    assert encoded.lengths.tolist() == [4, 12]
    assert encoded.untruncated.tolist() == [4, 18]


def test_pairs_have_token_types(framer, words):
    encoded = classification.encode(framer, [example("a", "b c")])
    assert words(encoded.rows[0]["tokens"]) == "[CLS] a [SEP] b c [SEP]"
    assert encoded.rows[0]["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 1]
    assert "labels" not in encoded.rows[0]


def test_sets_of_labels_and_numbers():
    several = [example("a", label=("x", "y")), example("b", label=())]
    assert classification.label_names(several) == ("x", "y")
    array = classification.label_array(several, ("x", "y"))
    assert (array.tolist(), array.dtype) == ([[1, 1], [0, 0]], np.float32)
    numbers = [example("a", label=1.5), example("b", label=-2.0)]
    assert classification.label_names(numbers) == ()
    array = classification.label_array(numbers, ())
    assert (array.tolist(), array.dtype) == ([1.5, -2.0], np.float32)


def test_reading_texts():
    data = records({"s": "one", "t": "two", "l": "1|2"})
    fields = TextFields(text="s", pair="t", label="l")
    (read,) = classification.read(data, fields)
    assert (read.text, read.pair, read.label, read.origin) == ("one", "two", "1|2", "a.csv:2")
    (read,) = classification.read(data, TextFields(text="s", label="l", target="labels"))
    assert read.label == ("1", "2")
    (read,) = classification.read(data, TextFields(text="s", label=None))
    assert read.label is None
    with pytest.raises(
        InputError, match=r"a\.csv:2: l is '1\|2', which is not a finite float32 number"
    ):
        classification.read(data, TextFields(text="s", label="l", target="number"))
    with pytest.raises(InputError, match=r"a\.csv:3: field 's' is empty"):
        classification.read(records({"s": "x"}, {"s": " \n"}), TextFields(text="s", label=None))


def test_contrastive_pairs(framer, words):
    encoded = classification.encode_contrastive(framer, [example("a b c", "playing")])
    assert [words(row) for row in encoded.rows[0]["tokens"]] == [
        "[CLS] a b c [SEP]",
        "[CLS] play ##ing [SEP] [PAD]",
    ]
    assert encoded.rows[0]["lengths"].tolist() == [5, 4]
    with pytest.raises(InputError, match=r"a.csv:1: a pair of texts is needed"):
        classification.encode_contrastive(framer, [example("a")])


def test_choices(framer, words):
    data = records({"context": "a b", "q": "c", "x": "d", "y": "e f", "label": "B"})
    fields = ChoiceFields(question="q", choices=("x", "y"))
    encoded = multiple_choice.encode(framer, multiple_choice.read(data, fields))
    assert [words(row) for row in encoded.rows[0]["tokens"]] == [
        "[CLS] a b [SEP] c d [SEP] [PAD]",
        "[CLS] a b [SEP] c e f [SEP]",
    ]
    assert encoded.rows[0]["token_type_ids"].tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]
    assert (encoded.rows[0]["lengths"].tolist(), encoded.rows[0]["labels"]) == ([7, 8], 1)
    listed = multiple_choice.read(
        records({"context": "a", "choices": ["d", "e"], "label": 0}), ChoiceFields()
    )
    assert (listed[0].choices, listed[0].label) == (("d", "e"), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["d"]}, r"a\.csv:3: 1 choices where 2 are expected"),
        ({"choices": "d e"}, r"a\.csv:3: field 'choices' is text where a list"),
        ({"choices": ["d", " "]}, r"a\.csv:3: an empty choice"),
        ({"label": 2}, r"a\.csv:3: label is '2', which is none of the 2 choices"),
    ],
)
def test_bad_choices(change, message):
    good = {"context": "a", "choices": ["d", "e"], "label": 0}
    with pytest.raises(InputError, match=message):
        multiple_choice.read(records(good, good | change), ChoiceFields())
