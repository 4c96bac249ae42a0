"""Pairs of texts as a model reads them."""

from functools import partial

import numpy as np
import pytest

from jaxlm.data import tokenizers
from jaxlm.data.labelled.dataset import encode_usable
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.labelled.records import Record
from jaxlm.data.labelled.seq2seq import Pair, PairFields, encode, num_cut, read, source_ids
from jaxlm.data.labelled.statistics import describe, tally
from jaxlm.errors import InputError


def pair(source, target, number=1):
    return Pair(source=source, target=target, origin=f"x:{number}")


PAIRS = [pair("a b", "d"), pair(" ".join("a" * 15), "e", 2), pair("c", " ".join("f" * 12), 3)]


def test_a_pair_in_tokens(framer, words):
    (row,) = encode(framer, PAIRS[:1], prefix="who ", long="raise").rows
    assert words(row["tokens"]) == "[CLS] who a b [SEP]"
    assert words(row["decoder_tokens"]) == "[CLS] d"
    assert words(row["targets"]) == "d [SEP]"
    assert (row["lengths"], row["target_lengths"], row["weights"]) == (5, 2, 1)
    (ids,) = source_ids(framer, ["a b"], "who ")
    np.testing.assert_array_equal(ids, row["tokens"])


def test_pairs_that_are_cut_are_counted_and_shown(framer, words):
    examples = encode(framer, PAIRS, long="cut")
    (note,) = examples.notes
    assert note == (
        "2 of 3 pairs have a side of more than 12 tokens, the longest 17 (x:2): they are cut at "
        "their ends (--data.max-length 17 takes them whole)"
    )
    assert examples.untruncated.tolist() == [4, 17, 3]
    assert examples.sizes.tolist() == [[4, 2], [12, 2], [3, 12]]
    assert words(examples.rows[1]["tokens"]).endswith("a [SEP]")
    target, before = (examples.rows[2][name] for name in ("targets", "decoder_tokens"))
    assert words(target) == " ".join("f" * 12)  # it does not end there
    assert words(before) == " ".join(["[CLS]", *"f" * 11])
    assert encode(framer, PAIRS[:1], long="cut").notes == ()


def test_no_length_is_proposed_that_the_model_does_not_read(framer):
    full = Framer(framer._tokenizer, 12, most=12)
    assert encode(full, PAIRS, long="cut").notes[0].endswith("ends (the model reads 12 at most)")


def test_pairs_that_are_left_out_are_counted_and_shown(framer):
    examples = encode(framer, PAIRS, long="skip")
    assert len(examples) == len(examples.untruncated) == 1
    (note,) = examples.notes
    assert "2 of 3 pairs" in note
    assert "they are left out (--data.max-length 17 takes them whole)" in note


@pytest.mark.parametrize(("long", "pairs"), [("raise", PAIRS), ("skip", PAIRS[1:])])
def test_pairs_that_are_too_long_are_refused(framer, long, pairs):
    with pytest.raises(InputError, match=r"the longest 17 \(x:2\): --data.max-length 17 takes"):
        encode(framer, pairs, long=long)
    with pytest.raises(
        InputError, match=r"^2 of .*the longest 17 \(x:2\): .*skip leaves them out$"
    ):
        encode_usable(partial(encode, framer, long=long), pairs, "skip")


def test_sources_with_a_tokenizer_of_their_own(tokenizer, words):
    own = tokenizers.train("characters", ["xyz"], 20)
    framer = Framer(tokenizer, 12, own)
    pairs = [pair("zx", "d zebra"), pair("x" * 15, "e", 2), pair("y", " ".join("f" * 12), 3)]
    examples = encode(framer, pairs, long="cut")
    row = examples.rows[0]
    assert [own.id_to_token(i) for i in row["tokens"]] == ["[CLS]", "z", "x", "[SEP]"]
    assert words(row["targets"]) == "d [UNK] [SEP]"
    assert words(row["decoder_tokens"]) == "[CLS] d [UNK]"
    assert examples.pad == own.token_to_id("[PAD]")
    np.testing.assert_array_equal(source_ids(framer, ["zx"])[0], row["tokens"])
    assert num_cut(framer, [one.source for one in pairs]) == 1


def test_what_is_lost_is_counted_of_each_side(framer):
    pairs = [*PAIRS, pair("a", "zebra b", 4)]
    examples = encode(framer, pairs, long="cut")
    sides = examples.sides
    counts = {name: tally(side, [], framer.special.unk) for name, side in sides.items()}
    assert {name: (one.unknown, one.cut) for name, one in counts.items()} == {
        "sources": (0, 5),
        "targets": (1, 1),
    }
    assert {name: describe(side, []).longest for name, side in sides.items()} == {
        "sources": 17,
        "targets": 13,
    }
    assert (examples.longer_than(12), examples.longer_than(13)) == (2, 1)
    assert num_cut(framer, [one.source for one in pairs]) == 1


def test_records():
    record = Record(fields={"en": "a", "de": "b"}, origin="x:1")
    fields = PairFields(source="en", target="de")
    (found,) = read([record], fields)
    assert (found.asked, found.response, found.content) == ("a", "b", "a\nb")
    (found,) = read([record], PairFields(source="en", target=None))
    assert (found.source, found.target, found.content) == ("a", None, "a")
    with pytest.raises(InputError, match="x:1: no field 'target' among 'en', 'de'"):
        read([record], PairFields(source="en"))
