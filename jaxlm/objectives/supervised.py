"""What the objectives of fine-tuning share: call the model on a batch, score what it gives.

A score is ``score(outputs, batch) -> Sums`` whose ``totals["loss"]`` is what is minimised. The
batch holds ``tokens`` [batch, length], their ``lengths`` [batch], ``token_type_ids``
[batch, length] if the model is to see any, ``index`` [batch], and what the score reads: labels,
and ``weights``, 1 where a label counts and 0 where it does not.

Where examples share rows, ``lengths`` are [batch, segments]: one behind the other, 0 where there
is none. What is [batch, ...] of an example is [batch, segments, ...] then, outputs as well.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxlm.objectives import packing
from jaxlm.sums import Sums
from jaxlm.typing import Apply, Batch, Loss, PRNGKey, Scalar, Variables

Score = Callable[..., Sums]  # (outputs, batch) -> sums
Predict = Callable[..., Mapping[str, Array]]  # (variables, batch) -> arrays, one row an example


def make_loss(apply: Apply, score: Score) -> Loss:
    """The score of the model's outputs.

    ``apply(variables, tokens, *, token_type_ids, segment_ids, deterministic, rngs)`` gives what
    ``score`` reads; segment ids are 0 at real tokens and -1 at padding. Where examples share rows,
    they number these, and ``positions`` and ``num_segments`` are given, too.
    """

    def loss(
        variables: Variables,
        batch: Batch,
        key: PRNGKey,
        *,
        progress: Scalar,
        deterministic: bool,
    ) -> tuple[Scalar, Sums]:
        sums = score(call(apply, variables, batch, None if deterministic else key), batch)
        tokens = jnp.asarray(batch["lengths"]).sum().astype(jnp.float32)
        return sums.totals["loss"], replace(sums, counts=sums.counts | {"tokens": tokens})

    return loss


def make_predict(apply: Apply, outputs: Callable[..., Mapping[str, Array]]) -> Predict:
    """``predict(variables, batch)``: ``outputs(model's outputs, batch)``, without dropout."""

    def predict(variables: Variables, batch: Batch) -> Mapping[str, Array]:
        return outputs(call(apply, variables, batch, None), batch)

    return predict


def call(
    apply: Apply, variables: Variables, batch: Batch, key: PRNGKey | None
) -> Float[Array, "..."]:
    """The model's outputs for a batch; with dropout where there is a key."""
    tokens = jnp.asarray(batch["tokens"], jnp.int32)
    lengths = jnp.asarray(batch["lengths"])
    types = batch.get("token_type_ids")
    if key is not None:
        # Devices under pmap and micro-batches hold different rows, and so drop differently.
        key = jax.random.fold_in(key, jnp.asarray(batch["index"])[0])
    sharing: dict[str, Any] = {}
    if are_shared(batch):
        segment_ids, positions = packing.of_lengths(lengths, tokens.shape[-1])
        sharing = {"positions": positions, "num_segments": lengths.shape[-1]}
    else:
        position = lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
        segment_ids = jnp.where(position < lengths[..., None], 0, -1)
    return apply(
        variables,
        tokens,
        token_type_ids=None if types is None else jnp.asarray(types, jnp.int32),
        segment_ids=segment_ids,
        deterministic=key is None,
        rngs=None if key is None else {"dropout": key},
        **sharing,
    )


def are_shared(batch: Batch) -> bool:
    """Whether several examples share a row."""
    return batch["lengths"].ndim == batch["tokens"].ndim


def over_members(apply: Apply) -> Apply:
    """A model of rows as one of rows of several members: arrays get a second axis, ``members``."""

    def join(x: Array | None) -> Array | None:
        return None if x is None else rearrange(x, "batch members ... -> (batch members) ...")

    def applied(
        variables: Variables,
        tokens: Array,
        *,
        token_type_ids: Array | None,
        segment_ids: Array,
        deterministic: bool,
        rngs: Mapping[str, PRNGKey] | None,
        positions: Array | None = None,
        **sharing: Any,
    ) -> Array:
        if positions is not None:
            sharing["positions"] = join(positions)
        outputs = apply(
            variables,
            join(tokens),
            token_type_ids=join(token_type_ids),
            segment_ids=join(segment_ids),
            deterministic=deterministic,
            rngs=rngs,
            **sharing,
        )
        return rearrange(
            outputs, "(batch members) ... -> batch members ...", members=tokens.shape[1]
        )

    return applied


def weighted_sums(
    batch: Batch,
    losses: Float[Array, "*batch"],
    hits: Bool[Array, "*batch"] | Float[Array, "*batch"],
) -> Sums:
    """The sums over what counts of losses, and of hits as ``accuracy``."""
    weights = jnp.asarray(batch["weights"], jnp.float32)
    totals = {"loss": (losses * weights).sum(), "accuracy": (hits * weights).sum()}
    return Sums(totals=totals, weight=weights.sum())
