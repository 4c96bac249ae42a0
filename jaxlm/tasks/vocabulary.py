"""What pretraining has to know of a tokenizer."""

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxlm.data import tokenizers
from jaxlm.data.special_tokens import SpecialTokens, frame, sentinels
from jaxlm.data.word_starts import word_starts
from jaxlm.objectives.masking import SpanTokens, Vocabulary


def make_vocabulary(tokenizer: Tokenizer, special: SpecialTokens | None = None) -> Vocabulary:
    """The ids of a tokenizer by their use: which may be hidden, which begin words.

    ``special``: those of prepared data, which may be older than what is found now.
    """
    before, after = frame(tokenizer, special)
    special = special or SpecialTokens.of(tokenizer)
    is_ordinary = np.ones(tokenizers.vocab_size(tokenizer), bool)
    spans = SpanTokens(special.cls, special.sep, sentinels(tokenizer))
    is_ordinary[[*special.ids, *before, *after, *spans.sentinels]] = False
    starts = word_starts(tokenizer)
    return Vocabulary(
        mask_id=special.mask,
        start_id=before[0] if before else None,
        end_id=after[-1],
        ordinary=jnp.asarray(np.flatnonzero(is_ordinary)),
        is_ordinary=jnp.asarray(is_ordinary),
        word_starts=None if starts is None else jnp.asarray(starts),
        spans=spans if spans.sentinels else None,
    )
