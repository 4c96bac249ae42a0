"""Filling in what is hidden: what of a text goes together."""

import numpy as np

from jaxlm.data import tokenizers
from jaxlm.objectives.masking import MaskingConfig
from jaxlm.tasks.masked_lm import MaskedLm
from jaxlm.tasks.vocabulary import make_vocabulary


def test_words_that_are_lines_are_warned_of():
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("abcdefgh"), 60)) for _ in range(40)]  # no spaces
    chinese = ["".join(chr(0x4E00 + i) for i in rng.integers(0, 60, 60)) for _ in range(40)]
    words = [" ".join(line[i : i + 6] for i in range(0, 60, 6)) for line in lines]
    task = MaskedLm(masking=MaskingConfig(unit="word"))
    tokenizer = tokenizers.train("bpe", lines + chinese + words, 300)

    def warning(task: MaskedLm, texts: list[str]) -> str:
        rows = [tokenizer.encode(text, add_special_tokens=False).ids[:32] for text in texts]
        return task.warning(np.array(rows), make_vocabulary(tokenizer))

    assert "100% of the tokens are in words of more than 16 tokens" in warning(task, lines)
    assert not warning(task, words)
    assert not warning(task, chinese)
    for unit in ("token", "span"):  # the way out
        assert not warning(MaskedLm(masking=MaskingConfig(unit=unit)), lines)
