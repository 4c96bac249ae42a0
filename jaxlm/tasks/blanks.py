"""What models that fill in blanks say of texts: for pretraining tasks."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from jaxlm.decode.fill_mask import MASK, FillMask
from jaxlm.models.model import ModelConfig
from jaxlm.objectives.masking import ChoiceConfig, Vocabulary
from jaxlm.tasks.task import Given
from jaxlm.typing import Apply, Variables

VERB, USAGE = "fill-mask", f'"A text with a {MASK}."'
_MAX_LENGTH = 512  # of models that have no limit
_LONG_WORD, _MOST_IN_LONG_WORDS = 16, 0.05  # tokens; share of all


def long_words(
    tokens: Integer[np.ndarray, "rows length"],
    vocabulary: Vocabulary,
    choice: ChoiceConfig,
    field: str,
) -> str:
    """A warning of words that are lines, of text without spaces, where whole words are chosen.

    ``field`` is that of the unit, for the way out.
    """
    if choice.unit != "word" or vocabulary.word_starts is None:
        return ""
    ordinary = np.asarray(vocabulary.is_ordinary)[tokens]
    begins = np.asarray(vocabulary.word_starts)[tokens] | ~ordinary
    begins[:, 0] = True
    words = np.cumsum(begins) - 1
    sizes = np.bincount(words, ordinary.ravel())
    share = sizes[sizes > _LONG_WORD].sum() / max(ordinary.sum(), 1)
    if share <= _MOST_IN_LONG_WORDS:
        return ""
    return (
        f"{share:.0%} of the tokens are in words of more than {_LONG_WORD} tokens, as in text "
        f"without spaces, and are hidden together: --{field} token or span hides parts"
    )


def answers(
    apply: Apply,
    config: ModelConfig,
    variables: Variables,
    tokenizer: Tokenizer,
    texts: Sequence[Given],
    top_k: int,
) -> Iterator[dict[str, Any]]:
    """For each text the likeliest fillings of each blank, best first, or what is wrong."""
    fill = FillMask(apply, variables, tokenizer, config.max_length or _MAX_LENGTH)
    blanks = fill((text for *_, text in texts if MASK in text), top_k=top_k)
    for _, origin, text in texts:
        if MASK in text:
            yield {
                "text": text,
                "blanks": [[vars(one) for one in each] for each in next(blanks)],
            }
        else:
            yield {"error": f"{origin} has no blank: write {MASK} where a word is missing"}


def lines(answer: dict[str, Any]) -> Iterator[str]:
    """An answer as a person reads it."""
    for blank in answer["blanks"]:
        for one in blank:
            yield f"{one['probability']:6.1%}  {one['token']:<15} {one['text']}"
