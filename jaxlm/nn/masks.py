"""Who may attend to whom: boolean masks, True = may attend."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxlm.typing import Mask

# The score of what is masked: finite, so that a row that may attend to nothing gives the mean of
# the values and no NaN.
NEGATIVE = -1e30


def segments(
    q_segment_ids: Int[Array, "batch q_length"], kv_segment_ids: Int[Array, "batch kv_length"]
) -> Bool[Array, "batch 1 q_length kv_length"]:
    """Positions of equal segment id see each other: documents that share a row stay apart."""
    return q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :]


def padding(lengths: Int[Array, "batch"], kv_length: int) -> Bool[Array, "batch 1 1 kv_length"]:
    """The first ``lengths`` positions of each row may be attended to."""
    return (jnp.arange(kv_length)[None, :] < lengths[:, None])[:, None, None, :]


def causal(
    length: int,
    segment_ids: Int[Array, "batch length"] | None = None,
    mask: Mask | None = None,
) -> Mask:
    """Each position sees itself and those before it: of its segment, and where ``mask`` is True."""
    places = jnp.arange(length)
    seen = (places[None, :] <= places[:, None])[None, None]
    if segment_ids is not None:
        seen = seen & segments(segment_ids, segment_ids)
    return seen if mask is None else seen & mask


def window(
    length: int,
    radius: int,
    segment_ids: Int[Array, "batch length"] | None = None,
    mask: Mask | None = None,
) -> Mask:
    """Each position sees those at most ``radius`` away: of its segment, where ``mask`` is True."""
    places = jnp.arange(length)
    seen = (jnp.abs(places[None, :] - places[:, None]) <= radius)[None, None]
    if segment_ids is not None:
        seen = seen & segments(segment_ids, segment_ids)
    return seen if mask is None else seen & mask


def cross(
    q_segment_ids: Int[Array, "batch q_length"] | None,
    kv_segment_ids: Int[Array, "batch kv_length"] | None,
) -> Mask | None:
    """:func:`segments`, where ids that are not given are all 0; None, if neither are."""
    if q_segment_ids is not None and kv_segment_ids is not None:
        return segments(q_segment_ids, kv_segment_ids)
    if kv_segment_ids is not None:
        return (kv_segment_ids == 0)[:, None, None, :]
    return None if q_segment_ids is None else (q_segment_ids == 0)[:, None, :, None]


def permutation(order: Int[Array, "batch length"]) -> Bool[Array, "batch 1 length length"]:
    """Positions of order 0 are seen by all; any other by those of a higher order than its own."""
    query, key = order[:, None, :, None], order[:, None, None, :]
    return (key == 0) | (key < query)
