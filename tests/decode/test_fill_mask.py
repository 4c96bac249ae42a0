"""Filling in masks with a model that is a function."""

import jax.numpy as jnp
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxlm.decode.fill_mask import FillMask

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_ids_above_a_gap_in_the_vocabulary_are_filled_in() -> None:
    """As in published vocabularies with tokens taken out: 7 entries, and the last id is 9."""
    vocab = {name: i for i, name in enumerate(SPECIAL)} | {"red": 5, "cat": 9}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def apply(variables, tokens, predicted, *, segment_ids):
        return jnp.zeros((*predicted.shape, 64)).at[..., 9].set(5.0).at[..., 63].set(9.0)

    (blanks,) = FillMask(apply, {}, tokenizer, 32)(["red [MASK]"], top_k=1)
    assert [one.token for one in blanks[0]] == ["cat"]  # and not row 63, which is no token
