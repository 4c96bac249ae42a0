"""Masked language modelling (Devlin et al. 2018, section 3.1): predict what is hidden from view."""

import jax
import jax.numpy as jnp

from jaxlm.objectives import packing
from jaxlm.objectives.masking import MaskingConfig, Vocabulary, corrupt, score
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss, PRNGKey, Scalar, Variables


def make_loss(
    apply: Apply, vocabulary: Vocabulary, masking: MaskingConfig, *, isolate_documents: bool = False
) -> Loss:
    """The summed cross-entropy of the predicted tokens.

    ``apply(variables, tokens, predicted, *, positions, segment_ids, deterministic, rngs)`` gives
    the logits at the positions ``predicted``. The batch holds ``tokens`` [batch, length], their
    ``lengths`` [batch], and ``index`` [batch], which picks each row's random numbers.
    """
    masking.check(vocabulary)

    def loss(
        variables: Variables,
        batch: Batch,
        key: PRNGKey,
        *,
        progress: Scalar,
        deterministic: bool,
    ) -> tuple[Scalar, Sums]:
        tokens = jnp.asarray(batch["tokens"], jnp.int32)
        lengths, index = jnp.asarray(batch["lengths"]), jnp.asarray(batch["index"])
        masking_key, dropout_key = jax.random.split(key)
        # Devices under pmap and micro-batches hold different rows, and so drop differently.
        dropout_key = jax.random.fold_in(dropout_key, index[0])
        corrupted = corrupt(
            masking_key, tokens, lengths, index, vocabulary, masking, progress=progress
        )
        packed = packing.documents if isolate_documents else packing.whole_rows
        segments, positions = packed(tokens, lengths, vocabulary)
        logits = apply(
            variables,
            corrupted.tokens,
            corrupted.predicted,
            positions=positions,
            segment_ids=segments,
            deterministic=deterministic,
            rngs=None if deterministic else {"dropout": dropout_key},
        )
        return score(logits, corrupted, lengths)

    return loss
