"""New tokens in a tokenizer: which are chosen, and that all else stays as it was."""

import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxlm.data import tokenizers
from jaxlm.data.extension import extend, pieces_of_new
from jaxlm.data.special_tokens import SPECIALS, SpecialTokens
from jaxlm.data.tokenizers import TokenizerConfig
from jaxlm.errors import InputError

OLD = ["the cat sat on the mat and the dog ran to the red house with a blue door 12345"] * 3
NEW = [
    f"the eigenvalue of the Hamiltonian and the {word} on the mat 2718281 xx{i}"
    for i, word in enumerate(["eigenvalue", "eigenvalue", "eigenvalues"] * 10)
]


def trained(kind: str) -> Tokenizer:
    size = {"wordpiece": 90, "bpe": 300}[kind]
    letters = "abcdefghijklmnopqrstuvwxyz"
    return TokenizerConfig(kind=kind, vocab_size=size).train([*OLD, f"{letters} {letters[::-1]}"])  # pyright: ignore


def late_specials() -> Tokenizer:
    """A byte-level BPE whose special tokens have the ids behind its vocabulary, as ModernBERT's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "th", "the", "Ġthe"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


TOKENIZERS = {
    "wordpiece": lambda: trained("wordpiece"),
    "bpe": lambda: trained("bpe"),
    "late specials": late_specials,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_old_tokens_and_texts_stay_and_new_words_are_whole(name: str) -> None:
    old = TOKENIZERS[name]()
    extension = extend(old, NEW, 40)
    new = Tokenizer.from_str(extension.tokenizer.to_str())  # as any library reads it
    first, size = tokenizers.vocab_size(old), tokenizers.vocab_size(new)
    assert size == first + len(extension.added)
    assert 0 < len(extension.added) <= 40
    known = old.get_vocab(with_added_tokens=True)
    assert {
        token: i for token, i in new.get_vocab(with_added_tokens=True).items() if i < first
    } == known
    assert SpecialTokens.of(new) == SpecialTokens.of(old)
    text = "The cat sat, 12345 [MASK]"
    if name != "late specials":  # to which everything is new
        assert new.encode(text).ids == old.encode(text).ids
    for word in (
        "eigenvalue",
        "eigenvalues",
        "hamiltonian" if name == "wordpiece" else "Hamiltonian",
    ):
        before, after = (x.encode(f"the {word}", add_special_tokens=False).ids for x in (old, new))
        assert len(after) == 2 < len(before)
        assert new.decode(after).strip() == f"the {word}"
    number = [x.encode("2718281").tokens for x in (old, new)]
    assert number[0] == number[1]  # without letters, it is no word
    assert extend(old, NEW, 40).tokenizer.to_str() == extension.tokenizer.to_str()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_said_of_it(name: str) -> None:
    old = TOKENIZERS[name]()
    extension = extend(old, NEW, 10_000)
    assert extension.before > extension.after >= 1
    assert (
        f"{len(extension.added):,} new tokens of 10,000 (no more words are there 5 times)"
        in str(extension)
    )
    assert not any(
        token.strip("Ġ").startswith("xx") and token[-1].isdigit() for token in extension.added
    )
    two = extend(old, NEW, 2)
    assert two.added == extension.added[:2]
    assert "2 new tokens, such as" in str(two)
    assert extension.after < two.after < two.before


@pytest.mark.parametrize("name", TOKENIZERS)
def test_new_tokens_know_the_pieces_that_they_were(name: str) -> None:
    old = TOKENIZERS[name]()
    new = extend(old, NEW, 40).tokenizer
    pieces = pieces_of_new(old, new)
    assert pieces is not None
    first = tokenizers.vocab_size(old)
    assert list(pieces) == list(range(first, tokenizers.vocab_size(new)))
    for i, ids in pieces.items():
        joined = "".join(str(old.id_to_token(piece)).removeprefix("##") for piece in ids)
        assert joined == new.id_to_token(i)
        assert len(ids) > 1
    assert pieces_of_new(old, old) == {}
    assert pieces_of_new(new, old) is None
    # Another library's way, which puts tokens beside the vocabulary.
    beside = Tokenizer.from_str(old.to_str())
    beside.add_tokens(["eigenvalue"])
    assert pieces_of_new(old, beside) == {
        first: old.encode("eigenvalue", add_special_tokens=False).ids
    }
    # Texts that are cut otherwise.
    other = Tokenizer.from_str(new.to_str())
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    assert pieces_of_new(old, other) is None


def test_words_are_chosen_by_the_pieces_that_they_save() -> None:
    """Given those chosen before: with "eigenvalue" there, "eigenvalues" saves one piece alone."""
    old = trained("wordpiece")
    texts = ["eigenvalue " * 50 + "eigenvalues " * 20 + "zebra " * 20 + "quartz " * 4]
    cut = {w: len(old.model.tokenize(w)) for w in ("eigenvalue", "eigenvalues", "zebra", "quartz")}
    assert min(cut.values()) > 3
    assert extend(old, texts, 9).added == ("eigenvalue", "zebra", "eigenvalues")  # no rare "quartz"
    assert (cut["eigenvalues"] - 1) * 20 > (cut["zebra"] - 1) * 20  # the control


def whole_texts(kind: str) -> Tokenizer:
    """A BPE whose pre-tokenizer splits nothing, as Gemma's, or one of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "▁", "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


@pytest.mark.parametrize(("kind", "mark"), [("Gemma", "▁"), ("bytes", "Ġ")])
def test_new_tokens_stay_within_words(kind: str, mark: str) -> None:
    old = whole_texts(kind)
    texts = [f"see the eigenvalue  of thé {word}, eigenvalue.\nEnd" for word in OLD[0].split()]
    extension = extend(old, texts, 200)
    added = set(extension.added)
    assert {f"{mark}eigenvalue", f"{mark}the", "End"} <= added
    assert not any(mark in token[1:] or "\n" in token or "Ċ" in token for token in added)
    assert added & {"thé", f"{mark}thé", f"{mark}thÃ©"}  # bytes of a letter are no punctuation
    new = extension.tokenizer.encode(texts[0]).tokens
    assert new[1:3] == [f"{mark}the", f"{mark}eigenvalue"]
    assert extension.after < extension.before
    pieces = pieces_of_new(old, extension.tokenizer)
    assert pieces is not None
    assert len(pieces) == len(added)


def with_unknown(tokenizer: Tokenizer, *, byte_fallback: bool) -> Tokenizer:
    """The same with something to write for characters that its vocabulary lacks, as Gemma's has."""
    parts = json.loads(tokenizer.to_str())
    vocab = parts["model"]["vocab"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)]
    vocab.update({name: len(vocab) + i for i, name in enumerate(names)})
    parts["model"] |= {"unk_token": "<unk>", "byte_fallback": byte_fallback, "fuse_unk": True}
    new = Tokenizer.from_str(json.dumps(parts))
    spaces = decoders.Replace("▁", " ")
    new.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    return new


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_what_the_vocabulary_lacks_enters_no_token(byte_fallback: bool) -> None:
    old = with_unknown(whole_texts("Gemma"), byte_fallback=byte_fallback)
    text = "see theሰላምeigen ሰላም"
    extension = extend(old, [text] * 5, 200)
    new = extension.tokenizer
    assert set(extension.added) >= {"see", "▁the", "eigen"}
    assert not any("<" in token for token in extension.added)
    assert "words with parts that it does not know, which stay so: 2" in str(extension)
    if byte_fallback:
        assert new.decode(new.encode(text).ids) == text
    missing = [[x for x in one.encode(text).tokens if x[0] == "<"] for one in (old, new)]
    assert missing[0] == missing[1] != []
    pieces = pieces_of_new(old, new)
    assert pieces
    for i, ids in pieces.items():
        assert "".join(str(old.id_to_token(piece)) for piece in ids) == new.id_to_token(i)
    with pytest.raises(InputError, match=r"does not know.*: 2\).*leave extend_vocab out"):
        extend(old, ["ሰላም ሰላምሰላም"] * 5, 200)


def test_words_that_are_too_long_for_wordpiece_are_not_chosen() -> None:
    """It takes a word of 101 letters for unknown, also where it stands in its vocabulary."""
    old = trained("wordpiece")
    long, longest = "e" * 101, "i" * 100
    extension = extend(old, [f"{long} {longest} eigenvalue"] * 5, 3)
    assert set(extension.added) == {longest, "eigenvalue"}
    tokens = extension.tokenizer.encode(f"{long} {longest}", add_special_tokens=False).tokens
    assert tokens == ["[UNK]", longest]
    assert "words with parts that it does not know, which stay so: 1" in str(extension)


def test_merges_are_those_of_counting_anew_each_time() -> None:
    old, rng = trained("bpe"), random.Random(0)
    words = ["".join(rng.choices("aceinrst", k=rng.randint(3, 9))) for _ in range(40)]
    texts = [" ".join(rng.choices(words, k=200)) for _ in range(5)]
    found = extend(old, texts, 60)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in old.pre_tokenizer.pre_tokenize_str(text))  # pyright: ignore
    cut = {word: [piece.value for piece in old.model.tokenize(word)] for word in counts}
    expected = []
    for _ in range(60):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in cut.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        pairs = Counter(
            {
                pair: n
                for pair, n in pairs.items()
                if n >= 5 and "".join(pair) not in old.get_vocab()
            }
        )
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        expected.append("".join(best))
        for word, pieces in cut.items():
            merged, i = [], 0
            while i < len(pieces):
                step = 2 if tuple(pieces[i : i + 2]) == best else 1
                merged.append("".join(pieces[i : i + step]))
                i += step
            cut[word] = merged
    assert list(found.added) == expected
    for word, pieces in cut.items():
        assert [piece.value for piece in found.tokenizer.model.tokenize(word)] == pieces


def test_what_cannot_be_extended_is_refused() -> None:
    characters = TokenizerConfig(kind="characters", vocab_size=60).train(OLD)
    with pytest.raises(InputError, match="WordLevel cannot be extended: WordPiece and byte-level"):
        extend(characters, NEW, 5)
    suffixed = json.loads(late_specials().to_str())
    suffixed["model"]["end_of_word_suffix"] = "</w>"
    with pytest.raises(InputError, match="by affixes"):
        extend(Tokenizer.from_str(json.dumps(suffixed)), NEW, 5)
    with pytest.raises(InputError, match="no word is there 5 times or more and in pieces"):
        extend(trained("wordpiece"), ["eigenvalue", "the cat " * 9], 5)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_cuts_alike(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    new = extend(TOKENIZERS[name](), NEW, 40).tokenizer
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=new)
    for text in (*NEW[:3], OLD[0]):
        assert theirs(text)["input_ids"] == new.encode(text).ids
