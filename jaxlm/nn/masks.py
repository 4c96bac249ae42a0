"""Who may attend to whom: boolean masks, True = may attend.

:class:`Visible` says the same as a function of places and segments, which needs no square array:
attention over long rows computes it block by block.
"""

from dataclasses import replace
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import lax
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


@flax.struct.dataclass
class Visible:
    """Who may attend to whom, as a function of places and segments.

    A query sees a key where all that is given here holds. A place is a position's number in its
    row, whatever number its embedding is told. :func:`dense` gives the square array.

    Attributes:
        q_segment_ids: ``[batch, q_length]``: queries see keys of an equal id; None: of any.
        kv_segment_ids: ``[batch, kv_length]``; given if the former is.
        more: a :data:`~jaxlm.typing.Mask` that holds as well, or None.
        before: how many places back a query sees, beside its own; None: all.
        after: how many places ahead; 0 is causal.
        group: consecutive queries that stand at one place, such as those of heads that share keys.
        same_ids: the ids of queries are those of keys, so that each query sees its own place.
    """

    q_segment_ids: Any = None
    kv_segment_ids: Any = None
    more: Any = None
    before: int | None = flax.struct.field(pytree_node=False, default=None)
    after: int | None = flax.struct.field(pytree_node=False, default=None)
    group: int = flax.struct.field(pytree_node=False, default=1)
    same_ids: bool = flax.struct.field(pytree_node=False, default=False)

    def part(
        self, q_start: Any, q_length: int, kv_start: Any, kv_length: int
    ) -> Bool[Array, "#batch #heads #q_length #kv_length"] | None:
        """The mask of so many queries and keys from these on; None where nothing is hidden.

        The starts may be traced: nothing larger than the part is made.
        """
        seen = None
        if self.before is not None or self.after is not None:
            places = (q_start + jnp.arange(q_length)) // self.group
            ahead = (kv_start + jnp.arange(kv_length))[None, :] - places[:, None]
            if self.after is not None:
                seen = ahead <= self.after
            if self.before is not None:
                near = ahead >= -self.before
                seen = near if seen is None else seen & near
            assert seen is not None
            seen = seen[None, None]
        if self.q_segment_ids is not None:
            q_ids = lax.dynamic_slice_in_dim(self.q_segment_ids, q_start, q_length, 1)
            kv_ids = lax.dynamic_slice_in_dim(self.kv_segment_ids, kv_start, kv_length, 1)
            same = segments(q_ids, kv_ids)
            seen = same if seen is None else seen & same
        if self.more is not None:
            more = self.more
            for axis, start, length in ((2, q_start, q_length), (3, kv_start, kv_length)):
                if more.shape[axis] > 1:
                    more = lax.dynamic_slice_in_dim(more, start, length, axis)
            seen = more if seen is None else seen & more
        return seen

    def reaches(self, q_start: int, q_length: int, kv_start: int, kv_length: int) -> bool:
        """Whether any of these queries may be near enough to one of these keys."""
        first, last = q_start // self.group, (q_start + q_length - 1) // self.group
        near = self.before is None or kv_start + kv_length - 1 >= first - self.before
        return near and (self.after is None or kv_start <= last + self.after)


Visibility = Mask | Visible


def visible(
    segment_ids: Int[Array, "batch length"] | None = None,
    mask: Visibility | None = None,
    *,
    before: int | None = None,
    after: int | None = None,
) -> Visible:
    """Positions of a row see each other: of equal id, and as near as is said.

    ``mask`` holds as well. A window of radius 64 is ``before=64, after=64``.
    """
    own = Visible(segment_ids, segment_ids, None, before, after, same_ids=segment_ids is not None)
    if mask is None:
        return own
    if not isinstance(mask, Visible):
        return replace(own, more=mask)
    if segment_ids is not None and mask.q_segment_ids is not None:
        same = segments(segment_ids, segment_ids)
        own = replace(own, q_segment_ids=None, kv_segment_ids=None, same_ids=False)
        mask = replace(mask, more=same if mask.more is None else mask.more & same)
    nearer = lambda a, b: b if a is None else a if b is None else min(a, b)
    ids = own if mask.q_segment_ids is None else mask
    return Visible(
        ids.q_segment_ids,
        ids.kv_segment_ids,
        mask.more,
        nearer(before, mask.before),
        nearer(after, mask.after),
        mask.group,
        ids.same_ids,
    )


def dense(mask: Visibility | None, q_length: int, kv_length: int) -> Mask | None:
    """The mask as an array for so many queries and keys; None where nothing is hidden."""
    return mask.part(0, q_length, 0, kv_length) if isinstance(mask, Visible) else mask
