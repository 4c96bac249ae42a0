"""From sequence to sequence: each token of a target from its source and the tokens before it.

The batch holds ``tokens`` [batch, length] of sources and their ``lengths`` [batch]; ``targets``
[batch, target_length], ``decoder_tokens`` of that shape, which are these moved one place to the
right behind the token that a target starts from (teacher forcing), and ``target_lengths`` [batch];
``weights`` [batch], 1 where a row counts; and ``index`` [batch].
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.errors import InputError
from jaxlm.objectives.cross_entropy import smoothed_cross_entropy
from jaxlm.objectives.supervised import Predict, weighted_sums
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss, PRNGKey, Scalar, Variables


def make_loss(apply: Apply, *, label_smoothing: float = 0.0) -> Loss:
    """The summed cross-entropy of the tokens of targets, their ends among them.

    ``apply(variables, tokens, decoder_tokens, *, segment_ids, decoder_segment_ids, deterministic,
    rngs)`` gives logits ``[batch, target_length, vocab]``. What is minimised is with
    ``label_smoothing``, and there as ``smoothed_loss``; ``loss`` is without, so that it compares.
    """
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing={label_smoothing} is not inside [0, 1); 0.1 is usual")

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
        scored = _scored(apply, variables, batch, None if deterministic else key, label_smoothing)
        sums = weighted_sums(scored, scored["losses"], scored["correct"])
        minimised = (scored["smoothed"] * scored["weights"]).sum()
        totals = sums.totals | ({"smoothed_loss": minimised} if label_smoothing else {})
        tokens = jnp.asarray(batch["lengths"]).sum() + jnp.asarray(batch["target_lengths"]).sum()
        counts = {"tokens": tokens.astype(jnp.float32)}
        return minimised, replace(sums, totals=totals, counts=counts)

    return loss


def make_predict(apply: Apply) -> Predict:
    """``losses``, ``correct`` and ``weights`` [batch, target_length] of the tokens of targets."""

    def predict(variables: Variables, batch: Batch) -> Mapping[str, Array]:
        scored = _scored(apply, variables, batch, None, 0.0)
        return {name: scored[name] for name in ("losses", "correct", "weights")}

    return predict


def _scored(
    apply: Apply,
    variables: Variables,
    batch: Batch,
    key: PRNGKey | None,
    label_smoothing: float,
) -> dict[str, Float[Array, "batch target_length"]]:
    tokens = jnp.asarray(batch["tokens"], jnp.int32)
    targets = jnp.asarray(batch["targets"], jnp.int32)
    decoder_segment_ids = _segment_ids(targets, jnp.asarray(batch["target_lengths"]))
    logits = apply(
        variables,
        tokens,
        jnp.asarray(batch["decoder_tokens"], jnp.int32),
        segment_ids=_segment_ids(tokens, jnp.asarray(batch["lengths"])),
        decoder_segment_ids=decoder_segment_ids,
        deterministic=key is None,
        rngs=None if key is None else {"dropout": key},
    )
    smoothed, losses, correct = smoothed_cross_entropy(logits, targets, label_smoothing)
    weights = (decoder_segment_ids == 0) * jnp.asarray(batch["weights"], jnp.float32)[:, None]
    return {"smoothed": smoothed, "losses": losses, "correct": correct, "weights": weights}


def _segment_ids(tokens: Array, lengths: Array) -> Int[Array, "batch length"]:
    """0 at tokens and -1 at padding."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, tokens.shape, 1) < lengths[:, None], 0, -1)
