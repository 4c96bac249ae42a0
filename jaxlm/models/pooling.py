"""One vector for each row of hidden states.

A pooling is called as ``pool(hidden, segment_ids)``; positions whose segment id is below 0 are
padding, and without segment ids there is none.
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.nn.linear import Linear
from jaxlm.typing import Hidden

Pool = Callable[..., Float[Array, "batch embed"]]  # (hidden, segment_ids) -> one vector a row


def bert_pooler(
    hidden: Hidden, segment_ids: Int[Array, "batch length"] | None = None
) -> Float[Array, "batch embed"]:
    """``tanh(x W + b)`` of the first token's ``x`` (BERT's published code).

    Only inside a module's ``nn.compact``, which gets a layer called ``pooler``.
    """
    init = nn.initializers.truncated_normal(0.02)
    dense = Linear(hidden.shape[-1], dtype=hidden.dtype, kernel_init=init, name="pooler")
    return jnp.tanh(dense(hidden[:, 0]))


def mean_pool(
    hidden: Hidden, segment_ids: Int[Array, "batch length"] | None = None
) -> Float[Array, "batch embed"]:
    """The float32 mean over the real positions of each row; 0 where there is none."""
    hidden = hidden.astype(jnp.float32)
    if segment_ids is None:
        return hidden.mean(1)
    real = segment_ids >= 0
    total = jnp.where(real[..., None], hidden, 0).sum(1)
    return total / jnp.maximum(real.sum(1, keepdims=True), 1)


def cls_pool(
    hidden: Hidden, segment_ids: Int[Array, "batch length"] | None = None
) -> Float[Array, "batch embed"]:
    """The first token's hidden state, in float32."""
    return hidden[:, 0].astype(jnp.float32)


def last_pool(
    hidden: Hidden, segment_ids: Int[Array, "batch length"] | None = None
) -> Float[Array, "batch embed"]:
    """The last real token's hidden state, in float32: of a causal model the one that has seen all.

    0 where there is none.
    """
    if segment_ids is None:
        return hidden[:, -1].astype(jnp.float32)
    real = segment_ids >= 0
    last = jnp.where(real, jnp.arange(real.shape[1])[None, :], -1).max(1)
    chosen = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(last[:, None] >= 0, chosen.astype(jnp.float32), 0)


def max_pool(
    hidden: Hidden, segment_ids: Int[Array, "batch length"] | None = None
) -> Float[Array, "batch embed"]:
    """The float32 maximum over the real positions of each row; 0 where there is none."""
    hidden = hidden.astype(jnp.float32)
    if segment_ids is None:
        return hidden.max(1)
    real = segment_ids >= 0
    largest = jnp.where(real[..., None], hidden, -jnp.inf).max(1)
    return jnp.where(real.any(1, keepdims=True), largest, 0)


Pooling = Literal["bert", "cls", "last", "mean", "max"]
FIRST: tuple[Pooling, ...] = ("bert", "cls")  # those of the first token
POOLS: dict[Pooling, Pool] = {
    "bert": bert_pooler,
    "cls": cls_pool,
    "last": last_pool,
    "mean": mean_pool,
    "max": max_pool,
}
