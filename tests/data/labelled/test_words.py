"""Texts split into words, and where the words stand."""

import pytest
from tokenizers import pre_tokenizers

from jaxlm.data import tokenizers
from jaxlm.data.labelled import spans, tagging
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Conll, Record
from jaxlm.data.labelled.tagging import TagFields
from jaxlm.data.labelled.words import find_split, split_words
from jaxlm.errors import InputError
from jaxlm.tasks.tagging import Tagging


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("He lives in New York.", "He|lives|in|New|York|."),
        ("(Oslo), wow!", "(|Oslo|)|,|wow|!"),
        ("U.S. and O'Neill: 3.5% of $7", "U.S.|and|O'Neill|:|3.5|%|of|$|7"),
        ("a@b.com, @joe #tag don't e-mail", "a@b.com|,|@joe|#tag|don't|e-mail"),
        ("He lives in the U.S.A , Mr. Smith", "He|lives|in|the|U.S.A|,|Mr.|Smith"),  # split already
        ("हिन्दी में।", "हिन्दी|में|।"),
        ("他说北京，好。", "他说北京|，|好|。"),
        ("...", ".|.|."),
    ],
)
def test_punctuation_stands_apart(text, words):
    assert split_words(text, "punctuation") == words.split("|")
    assert split_words(text, "space") == text.split()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("हिन्दी में लिखो।", 4),
        ("Zoe\u0308 Mu\u0308ller, Ha Nô\u0323i", 5),
        ("می\u200cخواهم (آن)", 4),
        ("தமிழ் ශ්\u200dරී", 2),
    ],
)
def test_words_of_texts_with_spans_keep_their_marks(text, count):
    record = Record(fields={"text": text, "label": []}, origin="x")
    record = spans.as_words(record, "tokens", "tags")
    assert record.fields["tokens"] == split_words(text, "punctuation")
    assert len(record.fields["tokens"]) == count


@pytest.mark.parametrize(
    ("text", "span", "words"),
    [
        ("他住在ABC市。", [3, 7, "LOC"], "他|住|在|ABC|市|。"),
        ("東京大学の山田さん", [5, 7, "PER"], "東|京|大|学|の|山|田|さ|ん"),
        ("佐々木とｶﾅ", [0, 3, "PER"], "佐|々|木|と|ｶ|ﾅ"),
        ("คนที่เมือง", [2, 5, "LOC"], "ค|น|ที่|เ|มื|อ|ง"),
        ("រស់នៅ U.S.-based", [6, 10, "LOC"], "រ|ស់|នៅ|U|.|S|.|-|based"),
        ("Anna's pro-Trump O'Neill", [0, 4, "PER"], "Anna|'|s|pro|-|Trump|O|'|Neill"),
        ("Zoe\u0308's", [0, 4, "PER"], "Zoe\u0308|'|s"),
    ],
)
def test_words_do_not_depend_on_spans(text, span, words):
    """Nor on whether there are any: what is trained on is what texts to be tagged are cut into."""
    given = [{"text": text, "label": label} for label in ([span], [])]
    task = Tagging().settled(Tagging().read([Record(fields=given[0], origin="x")]))
    assert task.split == "fine"
    for fields in given:
        record = Record(fields=fields, origin="x")
        for labelled in (True, False):
            (one,) = task.read([record], labelled=labelled)
            assert one.words == words.split("|")
            assert not one.is_cut


@pytest.mark.parametrize("labelled", [True, False])
def test_words_of_a_text_with_spans_have_the_spaces_of_the_text(labelled):
    """To a byte-level tokenizer " s" is another token than the s of "Anna's"."""
    bpe = tokenizers.train("bpe", ["Anna's (big) dog's bone"] * 9, 300)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fields = {"text": "Anna's (big) dog", "label": [[0, 4, "PER"]]}
    task = Tagging(split="fine")
    (one,) = task.read([Record(fields=fields, origin="x")], labelled=labelled)
    assert one.words == ["Anna", "'", "s", "(", "big", ")", "dog"]
    (encoding,) = Framer(bpe, 32).encodings([one.words], [one.spaced])
    assert bpe.decode(encoding.ids) == " Anna's (big) dog"
    (given,) = Framer(bpe, 32).encodings([one.words])
    assert bpe.decode(given.ids) == " Anna ' s ( big ) dog"


@pytest.mark.parametrize("text", ["Anna met Bob", "Анна у Боба", "هو والقاهرة", "foo_bar baz"])
def test_a_span_inside_of_a_word_is_noticed_in_any_script(text):
    (one,) = Tagging().read([Record(fields={"text": text, "label": [[1, 2, "X"]]}, origin="x")])
    assert one.is_cut


@pytest.mark.parametrize("empty", [None, []])
def test_spans_are_in_the_field_that_has_them(empty):
    for others in ({"label": empty}, {"label": "sports"}, {"labels": ["a", "b"]}):
        spans_of = {"entities": [{"start_offset": 0, "end_offset": 4, "label": "PER"}]}
        fields = {"text": "Anna went", **others, **spans_of}
        (one,) = Tagging().read([Record(fields=fields, origin="x")])
        assert one.tags == ["B-PER", "O"]
        (none,) = Tagging().read([Record(fields=fields | {"entities": []}, origin="x")])
        assert none.tags == ["O", "O"]


def test_the_same_spans_in_two_fields_are_the_same():
    spans_of = {"entities": [[5, 9, "X"], {"start": 0, "end": 4, "label": "PER"}]}
    fields = {"text": "Anna went", "spans": [[0, 4, "PER"], [5, 9, "X"]], **spans_of}
    (one,) = Tagging().read([Record(fields=fields, origin="x")])
    assert one.tags == ["B-PER", "B-X"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": "sports"}, "x: label is 'sports', which is no list of spans"),
        ({"label": [["0", 4, "PER"]], "entities": []}, "x: label holds .* neither"),
        ({"label": [[0, 4, "A"]], "spans": [[0, 4, "B"]]}, "x: label and spans hold other spans"),
    ],
)
def test_what_is_no_list_of_spans(fields, message):
    with pytest.raises(InputError, match=message):
        Tagging().read([Record(fields={"text": "Anna went", **fields}, origin="x")])


def test_marks_belong_to_the_character_before_them():
    record = Record(fields={"text": "I ❤\ufe0fNY", "label": [[4, 6, "LOC"]]}, origin="x")
    record = spans.as_words(record, "tokens", "tags")
    assert record.fields["tokens"] == ["I", "❤\ufe0f", "NY"]
    assert record.fields["tags"] == ["O", "O", "B-LOC"]


def test_chinese_characters_stand_apart():
    assert split_words("他说ABC，Tokyo。", "characters") == [*"他说", "ABC", "，", "Tokyo", "。"]


def test_the_split_of_training_data():
    apart = [["John", "lives", "in", "York", "."], ["Mr.", "Smith", ",", "too", "!"]]
    assert find_split(apart) == "punctuation"
    assert find_split([["John", "lives", "in", "York."], ["well,", "Smith", "too!"]]) == "space"
    assert find_split([["john"]]) == "punctuation"
    assert find_split([["हिन्दी,", "Zoe\u0308."], ["."]]) == "space"
    assert find_split([[*"他说北京。"]]) == "characters"
    assert find_split([["他", "北京", "中国人", "。"]]) == "punctuation"


def test_places_are_in_the_text_as_given():
    text = "Yesterday  Anna   Smith went\tto Oslo, for 3 days. "
    record = Record(fields={"tokens": text}, origin="x")
    (sentence,) = tagging.read([record], TagFields(tags=None), "punctuation")
    assert sentence.text == text
    assert [text[a:b] for a, b in sentence.places] == sentence.words
    assert sentence.words[5:7] == ["Oslo", ","]
    (listed,) = tagging.read(
        [Record(fields={"tokens": ["a", "b,"]}, origin="x")], TagFields(tags=None)
    )
    assert (listed.words, listed.text, listed.places) == (["a", "b,"], "a b,", [(0, 1), (2, 4)])


def test_invisible_words_keep_their_lines(write):
    conll = Conll(path=write("a.conll", "a\tO\n\u00a0\tO\nb\tB-x\n"))
    (sentence,) = tagging.read(conll.records(), TagFields())
    assert (sentence.words, sentence.tags) == (["a", "\u00a0", "b"], ["O", "O", "B-x"])
    words = ["a", "\u00a0", " ", "\u200b", "b"]
    record = Record(fields={"tokens": words, "tags": ["O"] * 5}, origin="x")
    (sentence,) = tagging.read([record], TagFields())
    assert sentence.words == words
