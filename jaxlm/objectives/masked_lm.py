"""Masked language modelling (Devlin et al. 2018, section 3.1): predict what is hidden from view."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.masking import MaskingConfig, Vocabulary, corrupt
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss, PRNGKey, Scalar, Tokens, Variables


def segment_ids(
    tokens: Tokens, lengths: Int[Array, "batch"], start_id: int
) -> Int[Array, "batch length"]:
    """Number the documents of each row from 0 (which may be the rest of one); -1 on padding."""
    ids = jnp.cumsum(tokens == start_id, axis=1)
    ids = jnp.where(jnp.arange(tokens.shape[1])[None, :] < lengths[:, None], ids, -1)
    # Computed once: XLA:CPU would fuse the running sum into every layer's attention.
    return jax.lax.optimization_barrier(ids)


def positions_within(segment_ids: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Positions that start from 0 in every segment."""
    position = jnp.arange(segment_ids.shape[1])[None, :]
    starts = jnp.diff(segment_ids, axis=1, prepend=-2) != 0
    return position - jax.lax.cummax(jnp.where(starts, position, 0), axis=1)


def make_loss(
    apply: Apply, vocabulary: Vocabulary, masking: MaskingConfig, *, isolate_documents: bool = False
) -> Loss:
    """The summed cross-entropy of the predicted tokens.

    ``apply(variables, tokens, predicted, *, positions, segment_ids, deterministic, rngs)`` gives
    the logits at the positions ``predicted``. The batch holds ``tokens`` [batch, length], their
    ``lengths`` [batch], and ``index`` [batch], which picks each row's random numbers.
    """

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
        if isolate_documents:
            segments = segment_ids(tokens, lengths, vocabulary.start_id)
            positions = positions_within(segments)
        else:
            segments = jnp.where(jnp.arange(tokens.shape[1])[None, :] < lengths[:, None], 0, -1)
            positions = None
        logits = apply(
            variables,
            corrupted.tokens,
            corrupted.predicted,
            positions=positions,
            segment_ids=segments,
            deterministic=deterministic,
            rngs=None if deterministic else {"dropout": dropout_key},
        )
        losses, correct = cross_entropy(logits, corrupted.labels)
        total = (losses * corrupted.weights).sum()
        sums = Sums(
            totals={"loss": total, "accuracy": (correct * corrupted.weights).sum()},
            weight=corrupted.weights.sum(),
            counts={
                "tokens": lengths.sum().astype(jnp.float32),
                "overflow": corrupted.overflow,
            },
        )
        return total, sums

    return loss
