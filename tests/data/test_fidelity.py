import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from jaxlm.data import fidelity
from jaxlm.data.fidelity import Letters, Tally
from jaxlm.data.prepare import PrepareConfig, prepare
from jaxlm.data.shards import prepare_shard
from jaxlm.data.sources import TextFiles
from jaxlm.data.tokenizer_training import bert_normalizer
from jaxlm.data.tokenizers import TokenizerConfig

HINDI = ["यह हिन्दी में लिखा हुआ एक वाक्य है", "न्यू यॉर्क के लोग"] * 3


def said(texts: list[str], config: TokenizerConfig | None, tokenizer: Tokenizer | None = None):
    tokenizer = tokenizer or (config or TokenizerConfig()).train(texts)
    tally = Tally(tokenizer.token_to_id("[UNK]"))
    tally.add_texts(texts)
    for text in texts:
        tally.add_tokens(np.array(tokenizer.encode(text, add_special_tokens=False).ids))
    console = Console(width=400)
    with console.capture() as captured:
        fidelity.report(console, tokenizer, tally, config)
    first, *warnings = captured.get().splitlines()
    return first, warnings


def test_plain_english_is_counted_without_a_warning():
    first, warnings = said(["The quick Brown fox"] * 5, TokenizerConfig(vocab_size=300))
    assert first == "0.00% of the tokens are unknown, 0.00% of the letters are changed"
    assert not warnings


def test_changed_letters_and_the_way_out_which_works():
    config = TokenizerConfig(vocab_size=300)
    first, (warning,) = said(HINDI, config)
    assert "24.39% of the letters are changed" in first
    assert "warning: 24.4% of the letters are changed (्" in warning
    assert "--tokenizer.marks keeps them (then 0.00% are)" in warning
    for kept in ({"marks": True}, {"cased": True}, {"kind": "bpe"}):
        assert not said(HINDI, TokenizerConfig(vocab_size=400, **kept))[1]
    (warning,) = said(HINDI, None, config.train(HINDI))[1]
    assert "choose a base whose tokenizer keeps them" in warning


def test_unknown_characters_and_the_way_out_which_works():
    texts = [chr(0x4E00 + i) * 3 + "abc" for i in range(1500)]
    config = TokenizerConfig(vocab_size=2100)
    _, (warning,) = said(texts, config)
    assert "of the tokens are [UNK]" in warning
    assert "--tokenizer.kind bpe knows all" in warning
    size = int(warning.split("--tokenizer.vocab-size ")[1].split()[0])
    for better in ({"vocab_size": size}, {"vocab_size": 2100, "kind": "bpe"}):
        assert not said(texts, TokenizerConfig(**better))[1]
    limited = TokenizerConfig(alphabet=700)
    (warning,) = said(texts, limited)[1]
    assert "803 characters have no token" in warning
    assert "a larger --tokenizer.alphabet, or none, knows more" in warning
    assert not said(texts, TokenizerConfig())[1]


def test_long_words_are_unknown_as_a_whole():
    texts = ["y" * 120, "a b"] * 3
    (warning,) = said(texts, TokenizerConfig(vocab_size=100))[1]
    assert "there are words of more than 100 characters" in warning


def test_a_capital_letter_is_no_changed_one():
    characters = {"A": 5, "b": 3, "É": 1, "é": 2, "한": 1, ".": 9, "中": 1}
    letters = Letters.of(bert_normalizer(), characters)
    assert (letters.total, letters.changed) == (13, 4)
    assert letters.examples["é"] == "e"
    assert Letters.of(bert_normalizer(marks=True), characters).changed == 0
    assert Letters.of(None, characters).changed == 0


def test_prepare_says_it_at_once_or_in_shards(tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(f"{n} {line}" for n, line in enumerate(HINDI)))
    config = PrepareConfig(
        source=TextFiles(glob=str(tmp_path / "in.txt"), document="line"),
        tokenizer=TokenizerConfig(vocab_size=300),
        validation_fraction=0.0,
    )
    console = Console(width=400)
    with console.capture() as captured:
        prepare(config, tmp_path / "out", console=console)
    assert "warning: 24.4% of the letters are changed" in captured.get()
    loaded = PrepareConfig(
        source=config.source,
        tokenizer=TokenizerConfig(path=tmp_path / "out"),
        validation_fraction=0.0,
    )
    with console.capture() as captured:
        prepare_shard(loaded, tmp_path / "two", "0/1", console=console)
    assert "without --tokenizer.path, --tokenizer.marks keeps them" in captured.get()


@pytest.mark.parametrize("text", ["", "a\ud800"])
def test_any_text_is_counted(text):
    tally = Tally(1)
    tally.add_texts([text, "aa"])
    assert tally.characters["a"] == 2 + text.count("a")
