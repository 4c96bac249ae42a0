import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from jaxlm.data import corpus, tokenizers
from jaxlm.data.labelled.framing import Framer
from jaxlm.data.special_tokens import SPECIALS, SpecialTokens, frame, sentinels
from jaxlm.data.word_starts import word_starts
from jaxlm.errors import InputError

SIZES = {"wordpiece": 200, "bpe": 400, "unigram": 100, "characters": 32}
KINDS = list(SIZES)
SUBWORDS = KINDS[:3]


@pytest.fixture(scope="module")
def trained(corpus_path: Path) -> dict[str, Tokenizer]:
    lines = corpus_path.read_text().splitlines()
    return {kind: tokenizers.train(kind, lines, size) for kind, size in SIZES.items()}


def test_training_again_gives_the_same_file(trained, corpus_path):
    """In another process, where hash maps have another order."""
    script = f"""
from jaxlm.data import tokenizers
lines = open({str(corpus_path)!r}).read().splitlines()
for kind, size in {SIZES!r}.items():
    print(tokenizers.fingerprint(tokenizers.train(kind, iter(lines), size)))
"""
    command = [sys.executable, "-c", script]
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert again == [tokenizers.fingerprint(trained[kind]) for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_size_specials_and_framing(trained, kind):
    tokenizer = trained[kind]
    assert tokenizers.vocab_size(tokenizer) == SIZES[kind]
    assert SpecialTokens.of(tokenizer) == SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4)
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIALS)
    ids = tokenizer.encode("12 abc").ids
    assert (ids[0], ids[-1]) == (2, 3)
    assert tokenizer.decode(ids).strip() == "12 abc"


@pytest.mark.parametrize("kind", SUBWORDS)
def test_mask_replaces_a_word_with_its_space(trained, kind):
    tokenizer = trained[kind]
    whole = tokenizer.encode("12 13 14").ids
    blank = tokenizer.encode("12 [MASK] 14").ids
    start, end = blank.index(4), len(blank) - blank.index(4) - 1
    assert whole[:start] == blank[:start]
    assert whole[-end:] == blank[-end:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_inside_a_word_is_not_special(trained, kind):
    special = {i for i, token in trained[kind].get_added_tokens_decoder().items()}
    assert special == set(range(5))


@pytest.mark.parametrize("kind", SUBWORDS)
def test_word_starts(trained, kind):
    tokenizer = trained[kind]
    starts = word_starts(tokenizer)
    assert starts.shape == (SIZES[kind],)
    assert starts[:5].all()
    ids = tokenizer.encode("abcdefgh ijklmnop abcd", add_special_tokens=False).ids
    assert len(ids) > 3
    assert starts[ids].sum() == 3
    assert starts[ids[0]]


@pytest.mark.parametrize("kind", SUBWORDS)
@pytest.mark.parametrize(
    "script", ["中文没有空格，一行很长。", "日本語のテキスト", "ภาษาไทยเป็นภาษา"]
)
def test_without_spaces_no_line_is_a_word(kind, script):
    tokenizer = tokenizers.train(kind, [script] * 3 + list(script), 420)
    starts = word_starts(tokenizer)
    ids = tokenizer.encode(script[::-1], add_special_tokens=False).ids  # into small pieces
    assert len(ids) > 4
    if kind == "wordpiece":  # bpe's pieces may be parts of characters; unigram makes ， a comma
        assert starts[ids].all()
    assert starts[ids].sum() > len(script) / 2
    latin = tokenizers.train(kind, ["unbelievable words", "é ü"], 300)
    ids = latin.encode("unwords éü", add_special_tokens=False).ids
    assert word_starts(latin)[ids].sum() == 2


@pytest.mark.parametrize("first", [[], [normalizers.Prepend("▁")]], ids=["Gemma", "Llama 2"])
def test_word_starts_where_the_normalizer_writes_spaces(first):
    vocab = {token: i for i, token in enumerate(["▁", "t", "h", "e", "th", "▁th", "中", "<0xE4>"])}
    merges = [("t", "h"), ("▁", "th")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([*first, replace]) if first else replace
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    starts = word_starts(tokenizer)
    encoding = tokenizer.encode("e the  the中", add_special_tokens=False)
    begins = {"▁", "▁th", "中"}
    assert begins <= set(encoding.tokens)
    assert [bool(starts[i]) for i in encoding.ids] == [one in begins for one in encoding.tokens]


def test_word_starts_that_tokens_do_not_tell(trained):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert word_starts(tokenizer) is None
    assert word_starts(trained["characters"]) is None


def test_every_character_is_a_token():
    text = "To be,\n\n or  not é😀\r\n"
    tokenizer = tokenizers.train("characters", [text], 100)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert encoding.tokens == list(text)
    assert tokenizer.decode(encoding.ids) == text
    assert [text[i:j] for i, j in encoding.offsets] == list(text)
    assert tokenizer.encode("to", add_special_tokens=False).tokens == ["t", "o"]
    assert tokenizers.train("characters", [text], 100, alphabet=3).get_vocab_size() == 8


@pytest.mark.parametrize(
    ("kind", "size"), [("wordpiece", 4), ("wordpiece", 40), ("bpe", 260), ("unigram", 5)]
)
def test_too_small_a_vocabulary(kind, size):
    with pytest.raises(InputError, match=f"vocab_size={size} is too small: .* need"):
        tokenizers.train(kind, ["abcdefghijklmnopqrstuvwxyz"], size)


@pytest.mark.parametrize("kind", KINDS)
def test_sentinels_are_the_last_tokens_and_count_down(kind):
    text = "abcdefgh ijklmnop " * 3
    made = tokenizers.train(kind, [text], 300, sentinels=3)
    size = tokenizers.vocab_size(made)
    assert size <= 300
    assert sentinels(made) == (size - 1, size - 2, size - 3)
    assert made.encode("ab <extra_id_1>").ids.count(size - 2) == 1
    less = tokenizers.train(kind, [text], 297)
    assert made.encode(text).ids == less.encode(text).ids
    # A space before one belongs to it, as before [MASK].
    spaced = made.encode("ab <extra_id_0>").ids
    assert (len(spaced) == len(made.encode("ab").ids) + 1) == (kind != "characters")
    assert sentinels(less) == ()


def test_sentinels_need_room():
    with pytest.raises(InputError, match=r"need 261 \(sentinels=50 are taken off it\)"):
        tokenizers.train("bpe", ["abc"], 300, sentinels=50)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_no_text(kind):
    with pytest.raises(InputError, match="no text to train"):
        tokenizers.train(kind, [" "], 100)


def test_save_and_load_file_or_folder(trained, tmp_path):
    for tokenizer in trained.values():
        tokenizers.save(tokenizer, tmp_path / "tokenizer.json")
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            loaded = tokenizers.load(path)
            assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(tokenizer)


def test_loading_switches_off_truncation_and_padding(trained, tmp_path):
    tokenizer = Tokenizer.from_str(trained["wordpiece"].to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizers.save(tokenizer, tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path)
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(trained["wordpiece"])


@pytest.mark.parametrize(("word", "cased"), [("word", False), ("Word", True)])
def test_vocab_txt(tmp_path, word, cased):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIALS, word, "##s", "a"]) + "\n")
    tokenizer = tokenizers.load(path)
    expected = [2, 5 if cased else 1, 3] if cased else [2, 5, 3]
    assert tokenizer.encode("Word").ids == expected
    assert tokenizer.encode(f"{word}s [MASK]").ids == [2, 5, 6, 4, 3]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, ["berlin", "e"]),
        ({"do_lower_case": False}, ["[UNK]", "é"]),
        ({"do_lower_case": True, "strip_accents": False}, ["berlin", "é"]),
    ],
    ids=str,
)
def test_a_vocabulary_without_capitals_may_be_cased(tmp_path, said, expected):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, "berlin", "é", "e"]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert tokenizers.load(tmp_path).encode("Berlin é").tokens[1:-1] == expected


@pytest.mark.parametrize("said", [None, True, False])
def test_chinese_characters_are_set_apart_unless_the_folder_says_not(tmp_path, said):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, "世", "世界", "界"]) + "\n")
    if said is not None:
        settings = json.dumps({"tokenize_chinese_chars": said})
        (tmp_path / "tokenizer_config.json").write_text(settings)
    expected = ["世界"] if said is False else ["世", "界"]
    assert tokenizers.load(tmp_path).encode("世界").tokens[1:-1] == expected


ADDED = [
    ("added_tokens.json", {"us er": 10, "Covid": 9, "[USR]": 8}),
    (
        "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                "10": {"content": "us er"},
                "4": {"content": "[MASK]", "special": True, "normalized": False},
                "9": {"content": "Covid", "normalized": True},
                "8": {"content": "[USR]", "special": True},
            }
        },
    ),
]


@pytest.mark.parametrize(("name", "said"), ADDED, ids=["file", "settings"])
def test_tokens_that_were_added_to_a_vocabulary(tmp_path, name, said):
    """What transformers 5.24 makes of both."""
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, "the", "cat", "##s"]) + "\n")
    (tmp_path / name).write_text(json.dumps(said))
    tokenizer = tokenizers.load(tmp_path)
    ids = tokenizer.encode("the cats [USR] Covid covids us er the[MASK]").ids
    assert ids == [2, 5, 6, 7, 8, 9, 9, 1, 10, 5, 4, 3]
    assert tokenizers.vocab_size(tokenizer) == 11


@pytest.mark.parametrize("number", [9, 7])
def test_an_added_token_without_its_number_is_refused(tmp_path, number):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, "the", "cat", "##s"]) + "\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"Covid": number}))
    message = rf"added_tokens\.json: the token 'Covid' has the number {number}, and would get 8"
    with pytest.raises(InputError, match=message):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer"}),
        ("config.json", {"tokenizer_class": "BertJapaneseTokenizer"}),
        ("tokenizer_config.json", {"word_tokenizer_type": "mecab"}),
        ("tokenizer_config.json", {"subword_tokenizer_type": "character"}),
    ],
)
def test_words_that_a_program_of_its_own_finds_are_refused(tmp_path, name, said):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, "a"]) + "\n")
    (tmp_path / name).write_text(json.dumps(said))
    (key, value), *_ = said.items()
    message = rf"{name}: {key}={value!r} .* not supported: take a model .* tokenizer\.json"
    with pytest.raises(InputError, match=message):
        tokenizers.load(tmp_path)
    plain = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}
    (tmp_path / name).write_text(json.dumps(plain))
    assert tokenizers.load(tmp_path).encode("a").ids == [2, 5, 3]


def test_roberta_names():
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    assert SpecialTokens.of(tokenizer) == SpecialTokens(cls=0, pad=1, sep=2, unk=3, mask=4)


def test_gpt2_names():
    vocab = {"a": 0, "<|endoftext|>": 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    assert SpecialTokens.of(tokenizer) == SpecialTokens(cls=1, pad=1, sep=1, unk=None, mask=None)
    assert SpecialTokens.of(tokenizer).ids == (1,)


FAMILIES = {  # the names, the frame of the post-processor, and that of a text
    "BERT": (SPECIALS, "[CLS] $A [SEP]", "[CLS] a [SEP]"),
    "BERT, bare": (SPECIALS, "", "[CLS] a [SEP]"),
    "RoBERTa": (("<s>", "<pad>", "</s>", "<unk>", "<mask>"), "<s> $A </s>", "<s> a </s>"),
    "XLNet": (("<s>", "</s>", "<cls>", "<sep>", "<pad>"), "$A <sep> <cls>", "a <sep> <cls>"),
    "T5": (("<pad>", "</s>", "<unk>"), "$A </s>", "a </s>"),
    "GPT-2": (("<|endoftext|>",), "", "<|endoftext|> a <|endoftext|>"),
    "Llama 2": (("<unk>", "<s>", "</s>"), "<s> $A", "<s> a </s>"),
    "Llama 3": (
        ("<|begin_of_text|>", "<|end_of_text|>"),
        "<|begin_of_text|> $A",
        "<|begin_of_text|> a <|end_of_text|>",
    ),
    "mmBERT": (("<bos>", "<eos>", "<s>", "</s>"), "<bos> $A <eos>", "<bos> a <eos>"),
    "no known names": (("<bos>", "<eos>"), "<bos> $A <eos>", "<bos> a <eos>"),
    "both": (("<cls>", "<sep>", "<s>", "</s>", "<pad>"), "<s> $A </s>", "<s> a </s>"),
    "a language": (("<s>", "</s>", "<de>"), "$A </s> <de>", "a </s> <de>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_post_processor_frames_texts_of_pretraining(family):
    names, template, expected = FAMILIES[family]
    vocab = {name: i for i, name in enumerate([*names, "a", "[?]"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[?]"))
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(name, vocab[name]) for name in names]
        )
    text = corpus._framing(tokenizer).encode("a").ids
    assert " ".join(map(tokenizer.id_to_token, text)) == expected
    before, after = frame(tokenizer)
    assert (*before, vocab["a"], *after) == tuple(text)
    assert {SpecialTokens.of(tokenizer).sep} <= set(after)
    labelled = Framer(tokenizer, 16).frame(next(Framer(tokenizer, 16).ids(["a"]))).tokens
    if template and "Llama" not in family:  # which ends no text that it reads
        assert labelled.tolist() == text


@pytest.mark.parametrize("lacking", ["[CLS]", "[SEP]"])
def test_a_missing_special_token_is_named(lacking):
    vocab = {name: i for i, name in enumerate(SPECIALS) if name != lacking}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    with pytest.raises(InputError, match=rf"no token \{lacking[:-1]}\] or <"):
        SpecialTokens.of(tokenizer)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="neither tokenizer"):
        tokenizers.load(tmp_path)
    with pytest.raises(InputError, match="there is no tokenizer file"):
        tokenizers.load(tmp_path / "no.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer file"):
        tokenizers.load(tmp_path)
    (tmp_path / tokenizers.MODULES).write_text("[]")
    (tmp_path / tokenizers.LENGTHS).write_text("{")
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"sentence_bert_config\.json is not JSON .*line 1"):
        tokenizers.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    with pytest.raises(InputError, match=r"lacks the special tokens \[PAD\] \[CLS\]"):
        tokenizers.load(tmp_path / "vocab.txt")


SCRIPTS = {
    "hindi": "यह हिन्दी में लिखा हुआ",
    "thai": "ภาษาไทยเป็นภาษาที่มีระดับเสียง " + "น้ำ" * 60,  # a word of 180 characters
    "vietnamese": "Tiếng Việt có dấu",
    "korean": "한국어 문장입니다",
    "french": "Élan naïf à Noël",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("option", "lowered"), [("marks", True), ("cased", False)])
def test_letters_are_kept_where_that_is_asked_for(script, option, lowered):
    text = SCRIPTS[script]
    tokenizer = tokenizers.train("wordpiece", [text] * 3, 600, **{option: True})
    ids = tokenizer.encode(text).ids
    assert tokenizer.token_to_id("[UNK]") not in ids
    assert tokenizer.decode(ids) == (text.lower() if lowered else text)
    plain = tokenizers.train("wordpiece", [text] * 3, 600)
    assert plain.decode(plain.encode(text).ids) != text.lower()  # the default is BERT's


@pytest.fixture(scope="module")
def chinese() -> list[str]:
    """3,000 characters, the rarest once, in lines of 60."""
    rng = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(3000)]
    text = characters + rng.choices(characters[:1200], k=9000)
    rng.shuffle(text)
    return ["".join(text[i : i + 60]) for i in range(0, len(text), 60)]


def unknown_share(tokenizer: Tokenizer, texts: list[str]) -> float:
    ids = [i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids]
    return ids.count(1) / len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_no_character_is_unknown_where_the_vocabulary_has_room(chinese, kind):
    tokenizer = tokenizers.train(kind, chinese, 8000)
    assert tokenizers.vocab_size(tokenizer) <= 8000
    assert unknown_share(tokenizer, chinese) == 0


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_full_vocabulary_and_a_given_alphabet_leave_out_the_rarest(chinese, kind):
    small = tokenizers.train(kind, chinese, 2600)
    assert tokenizers.vocab_size(small) == 2600
    limited = tokenizers.train(kind, chinese, 8000, alphabet=1200)
    assert 0 < unknown_share(small, chinese) < unknown_share(limited, chinese) < 0.25
    assert (
        unknown_share(limited, [line[:1] for line in chinese if line[0] < chr(0x4E00 + 900)]) == 0
    )


def test_characters_inside_words_have_room_twice():
    syllables = [chr(0xAC00 + 7 * i) for i in range(1500)]  # Korean: BERT does not set them apart
    texts = [" ".join(syllables[i : i + 30]) for i in range(0, 1500, 30)]
    tokenizer = tokenizers.train("wordpiece", texts, 3005, marks=True)
    assert unknown_share(tokenizer, ["".join(syllables[:90]), *texts]) == 0
    with_less = tokenizers.train("wordpiece", texts, 3003, marks=True)
    assert tokenizers.vocab_size(with_less) == 3003


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "bpe", "cased": True}, "cased is for wordpiece; bpe keeps"),
        ({"kind": "unigram", "marks": True}, "marks is for wordpiece; unigram keeps"),
        ({"kind": "bpe", "alphabet": 5}, "alphabet=5 has no meaning for bpe"),
        ({"alphabet": 0}, "alphabet=0 is not above 0"),
        ({"path": Path("there"), "cased": True}, "there is trained: leave out either"),
        ({"path": Path("there"), "sentinels": 9}, "sentinels is of one to train, and there is"),
        ({"sentinels": -1}, "sentinels=-1 is below 0; 0 is none"),
    ],
)
def test_settings_that_would_do_nothing(settings, message):
    with pytest.raises(InputError, match=message):
        tokenizers.TokenizerConfig(**settings)


def test_what_decides_the_content_is_named_and_the_default_as_ever():
    config = tokenizers.TokenizerConfig()
    assert config.describe() == "wordpiece 16384 on all"
    others: list[dict] = [{"cased": True}, {"marks": True}, {"alphabet": 9}, {"num_documents": 3}]
    others += [{"sentinels": 9}]
    descriptions = {tokenizers.TokenizerConfig(**other).describe() for other in others}
    assert len(descriptions - {config.describe()}) == len(others)
