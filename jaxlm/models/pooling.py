"""One vector for each row of hidden states, or for each of the examples that share it.

A pooling is called as ``pool(hidden, segment_ids)``; positions whose segment id is below 0 are
padding, and without segment ids there is none. With a third argument, ``num_segments``, it gives
[batch, segments, embed]: a vector for each segment id from 0 up to that.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.nn.feedforward import gelu
from jaxlm.nn.linear import Linear
from jaxlm.typing import Hidden

Pool = Callable[..., Float[Array, "batch *segments embed"]]  # (hidden, segment_ids) -> vectors
Pooled = Float[Array, "batch *segments embed"]


def pooled(
    pool: Pool,
    hidden: Hidden,
    segment_ids: Int[Array, "batch length"] | None,
    num_segments: int | None,
) -> Pooled:
    """By a pooling that need not know of segments, where examples do not share rows."""
    return pool(hidden, segment_ids, *(() if num_segments is None else (num_segments,)))


def bert_pooler(
    hidden: Hidden,
    segment_ids: Int[Array, "batch length"] | None = None,
    num_segments: int | None = None,
    *,
    activation: Callable[[Array], Array] = jnp.tanh,
    pool: Pool | None = None,
) -> Pooled:
    """``activation(x W + b)`` of a vector ``x`` (BERT's published code): the first token's.

    Only inside a module's ``nn.compact``, which gets a layer called ``pooler``. ``pool`` gives
    another ``x``.
    """
    init = nn.initializers.truncated_normal(0.02)
    dense = Linear(hidden.shape[-1], dtype=hidden.dtype, kernel_init=init, name="pooler")
    x = (pool or _first)(hidden, segment_ids, num_segments)
    return activation(dense(x.astype(hidden.dtype)))


def mean_pool(
    hidden: Hidden,
    segment_ids: Int[Array, "batch length"] | None = None,
    num_segments: int | None = None,
) -> Pooled:
    """The float32 mean over the real positions of each row; 0 where there is none."""
    hidden = hidden.astype(jnp.float32)
    if segment_ids is None:
        return hidden.mean(1)
    real = segment_ids >= 0
    hidden = jnp.where(real[..., None], hidden, 0)
    if num_segments is None:
        return hidden.sum(1) / jnp.maximum(real.sum(1, keepdims=True), 1)
    own = _belongs(segment_ids, num_segments)
    total = jnp.einsum("bsl,ble->bse", own.astype(jnp.float32), hidden, precision="highest")
    return total / jnp.maximum(own.sum(-1, keepdims=True), 1)


def cls_pool(
    hidden: Hidden,
    segment_ids: Int[Array, "batch length"] | None = None,
    num_segments: int | None = None,
) -> Pooled:
    """The first token's hidden state, in float32."""
    return _first(hidden, segment_ids, num_segments).astype(jnp.float32)


def last_pool(
    hidden: Hidden,
    segment_ids: Int[Array, "batch length"] | None = None,
    num_segments: int | None = None,
) -> Pooled:
    """The last real token's hidden state, in float32: of a causal model the one that has seen all.

    0 where there is none.
    """
    if segment_ids is None:
        return hidden[:, -1].astype(jnp.float32)
    own = _belongs(segment_ids, num_segments)
    last = jnp.where(own, jnp.arange(own.shape[-1]), -1).max(-1)
    chosen = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[..., None], axis=1)
    return _or_row(jnp.where(last[..., None] >= 0, chosen.astype(jnp.float32), 0), num_segments)


def max_pool(
    hidden: Hidden,
    segment_ids: Int[Array, "batch length"] | None = None,
    num_segments: int | None = None,
) -> Pooled:
    """The float32 maximum over the real positions of each row; 0 where there is none."""
    hidden = hidden.astype(jnp.float32)
    if segment_ids is None:
        return hidden.max(1)
    own = _belongs(segment_ids, num_segments)
    largest = jnp.where(own[..., None], hidden[:, None], -jnp.inf).max(2)
    return _or_row(jnp.where(own.any(-1, keepdims=True), largest, 0), num_segments)


def _belongs(
    segment_ids: Int[Array, "batch length"], num_segments: int | None
) -> Bool[Array, "batch segments length"]:
    """Which positions are those of each segment, or of all that are real."""
    if num_segments is None:
        return (segment_ids >= 0)[:, None]
    return segment_ids[:, None] == jnp.arange(num_segments)[None, :, None]


def _or_row(
    vectors: Float[Array, "batch segments embed"], num_segments: int | None
) -> Float[Array, "batch *segments embed"]:
    return vectors[:, 0] if num_segments is None else vectors


def _first(
    hidden: Hidden, segment_ids: Int[Array, "batch length"] | None, num_segments: int | None
) -> Float[Array, "batch *segments embed"]:
    if num_segments is None or segment_ids is None:
        return hidden[:, 0]
    first = _belongs(segment_ids, num_segments).argmax(-1)
    return jnp.take_along_axis(hidden, first[..., None], axis=1)


Pooling = Literal["bert", "cls", "last", "mean", "max", "distilbert", "electra", "xlnet"]
DENSE: tuple[Pooling, ...] = ("bert", "distilbert", "electra", "xlnet")  # those with a layer
FIRST: tuple[Pooling, ...] = ("bert", "cls", "distilbert", "electra")  # those of the first token
POOLS: dict[Pooling, Pool] = {
    "bert": bert_pooler,
    "distilbert": partial(bert_pooler, activation=nn.relu),
    "electra": partial(bert_pooler, activation=gelu),
    "xlnet": partial(bert_pooler, pool=last_pool),
    "cls": cls_pool,
    "last": last_pool,
    "mean": mean_pool,
    "max": max_pool,
}
