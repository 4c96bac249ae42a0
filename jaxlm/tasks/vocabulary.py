"""What pretraining has to know of a tokenizer."""

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxlm.data import tokenizers
from jaxlm.data.special_tokens import SpecialTokens, ends_with_cls
from jaxlm.data.word_starts import word_starts
from jaxlm.objectives.masking import Vocabulary


def make_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The ids of a tokenizer by their use: which may be hidden, which begin words."""
    special = SpecialTokens.of(tokenizer)
    is_ordinary = np.ones(tokenizers.vocab_size(tokenizer), bool)
    is_ordinary[list(special.ids)] = False
    starts, cls_last = word_starts(tokenizer), ends_with_cls(tokenizer)
    return Vocabulary(
        mask_id=special.mask,
        start_id=None if cls_last else special.cls,
        end_id=special.cls if cls_last else special.sep,
        ordinary=jnp.asarray(np.flatnonzero(is_ordinary)),
        is_ordinary=jnp.asarray(is_ordinary),
        word_starts=None if starts is None else jnp.asarray(starts),
    )
