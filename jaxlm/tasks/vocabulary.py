"""What pretraining has to know of a tokenizer."""

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxlm.data import tokenizers
from jaxlm.data.special_tokens import SpecialTokens, ends_with_cls, sentinels
from jaxlm.data.word_starts import word_starts
from jaxlm.objectives.masking import SpanTokens, Vocabulary


def make_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The ids of a tokenizer by their use: which may be hidden, which begin words."""
    special = SpecialTokens.of(tokenizer)
    is_ordinary = np.ones(tokenizers.vocab_size(tokenizer), bool)
    spans = SpanTokens(special.cls, special.sep, sentinels(tokenizer))
    is_ordinary[[*special.ids, *spans.sentinels]] = False
    starts, cls_last = word_starts(tokenizer), ends_with_cls(tokenizer)
    return Vocabulary(
        mask_id=special.mask,
        start_id=special.cls if special.begins_texts and not cls_last else None,
        end_id=special.cls if cls_last else special.sep,
        ordinary=jnp.asarray(np.flatnonzero(is_ordinary)),
        is_ordinary=jnp.asarray(is_ordinary),
        word_starts=None if starts is None else jnp.asarray(starts),
        spans=spans if spans.sentinels else None,
    )
