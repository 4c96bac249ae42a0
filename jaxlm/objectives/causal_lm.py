"""Causal language modelling: predict each token from those before it (Radford et al. 2018)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.objectives import packing
from jaxlm.objectives.cross_entropy import cross_entropy
from jaxlm.objectives.masking import Vocabulary
from jaxlm.objectives.packing import Packed
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss, PRNGKey, Scalar, Tokens, Variables


def make_loss(apply: Apply, vocabulary: Vocabulary, *, isolate_documents: bool = True) -> Loss:
    """The summed cross-entropy of all tokens that have one of the same document before them.

    ``apply(variables, tokens, *, positions, segment_ids, deterministic, rngs)`` gives logits
    ``[batch, length, vocab]``, of which those at a position have seen no later one. The batch
    holds ``tokens`` [batch, length], their ``lengths`` [batch], and ``index`` [batch]; and, where
    not all of a row counts, ``first`` [batch]: the first position whose token is predicted.
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
        pack = packing.documents if isolate_documents else packing.whole_rows
        packed = pack(tokens, lengths, vocabulary)
        segments = packed.segment_ids
        # Devices under pmap and micro-batches hold different rows, and so drop differently.
        key = jax.random.fold_in(key, index[0])
        losses, correct = predict_next(
            apply, variables, tokens, packed, None if deterministic else key
        )
        weights = (jnp.roll(segments, -1, axis=1) == segments) & (segments >= 0)
        weights = weights.at[:, -1].set(False)
        if "first" in batch:
            first = jnp.asarray(batch["first"])[:, None]
            weights &= jnp.arange(1, tokens.shape[1] + 1)[None, :] >= first
        total = (losses * weights).sum()
        sums = Sums(
            totals={"loss": total, "accuracy": (correct * weights).sum()},
            weight=weights.sum().astype(jnp.float32),
            counts={"tokens": lengths.sum().astype(jnp.float32)},
        )
        return total, sums

    return loss


def predict_next(
    apply: Apply, variables: Variables, tokens: Tokens, packed: Packed, key: PRNGKey | None
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """The cross-entropy of the token behind each position, and whether it is the likeliest.

    With dropout where there is a key. The last position predicts nothing: it is computed for the
    sake of even shapes.
    """
    logits = apply(
        variables,
        tokens,
        positions=packed.positions,
        segment_ids=packed.segment_ids,
        deterministic=key is None,
        rngs=None if key is None else {"dropout": key},
    )
    return cross_entropy(logits, jnp.roll(tokens, -1, axis=1))
