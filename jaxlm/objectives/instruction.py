"""Instruction tuning: what is asked is read, and the responses alone are learned.

The batch holds ``tokens`` [batch, length], their ``lengths`` [batch], ``dialogues``
[batch, length], equal where tokens belong to one dialogue and 0 at padding, ``weights``
[batch, length], 1 at tokens of responses and of their ends, and ``index`` [batch].
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.objectives import causal_lm, packing
from jaxlm.objectives.packing import Packed
from jaxlm.objectives.supervised import Predict, weighted_sums
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss, PRNGKey, Scalar, Variables


def make_loss(apply: Apply) -> Loss:
    """The summed cross-entropy of the tokens of responses, each from those before it.

    ``apply(variables, tokens, *, positions, segment_ids, deterministic, rngs)`` gives logits
    ``[batch, length, vocab]``; dialogues that share a row do not see each other.
    """

    def loss(
        variables: Variables,
        batch: Batch,
        key: PRNGKey,
        *,
        progress: Scalar,
        deterministic: bool,
    ) -> tuple[Scalar, Sums]:
        # Devices under pmap and micro-batches hold different rows, and so drop differently.
        key = jax.random.fold_in(key, jnp.asarray(batch["index"])[0])
        scored = _scored(apply, variables, batch, None if deterministic else key)
        sums = weighted_sums(scored, scored["losses"], scored["correct"])
        tokens = jnp.asarray(batch["lengths"]).sum().astype(jnp.float32)
        return sums.totals["loss"], replace(sums, counts={"tokens": tokens})

    return loss


def make_predict(apply: Apply) -> Predict:
    """``losses``, ``correct`` and ``weights`` [batch, length] of the token behind each position."""

    def predict(variables: Variables, batch: Batch) -> Mapping[str, Array]:
        return _scored(apply, variables, batch, None)

    return predict


def _scored(
    apply: Apply, variables: Variables, batch: Batch, key: PRNGKey | None
) -> dict[str, Array]:
    tokens = jnp.asarray(batch["tokens"], jnp.int32)
    segments = jnp.asarray(batch["dialogues"], jnp.int32) - 1
    packed = Packed(segments, packing.positions_within(segments))
    losses, correct = causal_lm.predict_next(apply, variables, tokens, packed, key)
    weights = jnp.roll(jnp.asarray(batch["weights"], jnp.float32), -1, axis=1)
    return {"losses": losses, "correct": correct, "weights": weights.at[:, -1].set(0)}
