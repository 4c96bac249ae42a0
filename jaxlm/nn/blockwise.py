"""Attention block by block: memory that grows with the length, and no more with its square.

The softmax runs over blocks of keys (Milakov and Gimelshein 2018, arXiv:1805.02867; Rabe and Staats
2021, arXiv:2112.05682), and the gradient computes each block of weights again (Dao et al. 2022,
arXiv:2205.14135, appendix B). Pure JAX: the same on CPUs, GPUs and TPUs, sharded over batch and
heads as XLA finds it, with the dropped weights of the plain definition.

Blocks that a causal mask or a window hides are left out of the program. On CPUs, those in which no
segment of the queries is one of the keys are passed over, too.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from jaxlm.errors import InputError
from jaxlm.nn import custom_vjp, masks
from jaxlm.nn.attention import dot_product_attention
from jaxlm.nn.dropout import block_dropout
from jaxlm.nn.masks import NEGATIVE, Visibility, Visible
from jaxlm.nn.products import batched_outer, product
from jaxlm.sharding import constrain, is_split
from jaxlm.typing import Bias, PRNGKey

SCORES, MIX = "bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"


class Sizes(NamedTuple):
    """How rows are cut; of rows that a size does not divide, blocks are nearly as long."""

    block: int = 512
    """Queries, and keys, of a block."""
    window_block: int = 128
    """Queries of a block that sees a window of keys."""
    plain: int = 256
    """Rows of so few positions are not cut: the plain definition is as fast and smaller."""


SIZES = Sizes()


class _Blocks(NamedTuple):
    """How the square is cut: blocks of ``q_size x kv_size`` that begin at ``starts``.

    Places are those of rows with ``left`` keys of padding in front, up to ``q_length`` and
    ``kv_length``; blocks of keys may overlap.
    """

    q_size: int
    kv_size: int
    left: int
    q_length: int
    kv_length: int
    starts: tuple[tuple[int, int], ...]


def cut(
    mask: Visible, q_length: int, kv_length: int, sizes: Sizes, *, whole_rows: bool = False
) -> _Blocks:
    """The blocks that have to be computed; ``whole_rows``: of all queries at once."""
    reach = None if mask.before is None or mask.after is None else mask.before + mask.after
    size = _even(q_length, sizes.window_block * mask.group, 8 * mask.group)
    span = size // mask.group + (reach or 0)
    if reach is not None and not whole_rows and 2 * span <= kv_length:
        # Each block of queries with the one span of keys that it may see.
        assert mask.before is not None
        q_starts = range(0, q_length, size)
        starts = tuple((start, start // mask.group) for start in q_starts)
        end = max(starts[-1][1] + span, mask.before + kv_length)
        return _Blocks(size, span, mask.before, len(q_starts) * size, end, starts)
    size = q_length if whole_rows else _even(q_length, sizes.block)
    span = _even(kv_length, sizes.block)
    starts: tuple[tuple[int, int], ...] = ()
    for q in range(0, q_length, size):
        reached = (kv for kv in range(0, kv_length, span) if mask.reaches(q, size, kv, span))
        starts += tuple((q, kv) for kv in reached) or ((q, 0),)  # one, even if it hides all
    up = lambda length, size: math.ceil(length / size) * size
    return _Blocks(size, span, 0, up(q_length, size), up(kv_length, span), starts)


def _even(length: int, size: int, multiple: int = 8) -> int:
    """The size of as few equal blocks as can be, each a multiple of that; short rows are one."""
    if length <= size:
        return length
    number = math.ceil(length / size)
    return math.ceil(length / number / multiple) * multiple


def _forward(
    query: Array,
    key: Array,
    value: Array,
    mask: Visible,
    rate: float,
    dropout_key: Array | None,
    scale: float | None,
    sizes: Sizes,
) -> tuple[Array, tuple[Any, ...]]:
    work = _Work(query, key, value, mask, rate, dropout_key, scale, sizes)
    q, _, v = work.operands
    batch, heads, length, _ = q.shape
    least = jnp.full((batch, heads, length), NEGATIVE, jnp.float32)
    start = work.vary((least, jnp.zeros_like(least), jnp.zeros((*q.shape[:3], v.shape[3]))))

    def block(state: tuple[Array, ...], q: Array, k: Array, v: Array, at: Any) -> Any:
        before, total, mixed = state
        scores = work.scores(q, k, at)
        most = jnp.maximum(before, scores.max(-1))
        weights = jnp.exp(scores - most[..., None])
        keep = jnp.exp(before - most)
        total = total * keep + weights.sum(-1)
        weights = work.dropped(weights.astype(v.dtype), at)
        return most, total, mixed * keep[..., None] + product(MIX, weights, v)

    def step(carry: Any, each: Any) -> Any:
        at, overlaps = each
        rows = work.take_q(carry, at)
        rows = work.skip(overlaps, block, rows, *work.take(at), at)
        return work.put_q(carry, rows, at)

    most, total, mixed = work.run(step, start)
    out = (mixed / total[..., None])[:, :, : query.shape[1]]
    out = rearrange(out, "batch heads q d -> batch q heads d").astype(query.dtype)
    return out, (query, key, value, mask, dropout_key, out, most, total)


def _backward(
    rate: float, scale: float | None, sizes: Sizes, residuals: tuple[Any, ...], g: Array
) -> tuple[Array | None, ...]:
    # The barrier keeps XLA from keeping the weights of a single block instead.
    residuals, g = lax.optimization_barrier((residuals, g))
    query, key, value, mask, dropout_key, out, most, total = residuals
    work = _Work(query, key, value, mask, rate, dropout_key, scale, sizes)
    q, k, v = work.operands
    by_heads = lambda x: rearrange(x.astype(jnp.float32), "batch q heads d -> batch heads q d")
    mean = work.pad_q((by_heads(g) * by_heads(out)).sum(-1)) / total
    # As in the plain gradient: divided before the product, which is in the precision of value.
    g = (work.pad_q(by_heads(g)) / total[..., None]).astype(v.dtype)
    # Gradients of keys and values lie as [batch, heads, d, kv_length]: see batched_outer.
    shapes = q.shape, *((*x.shape[:2], x.shape[3], x.shape[2]) for x in (k, v))
    start = work.vary(tuple(jnp.zeros(shape, jnp.float32) for shape in shapes))

    def block(state: tuple[Array, ...], rows: Any, q: Array, k: Array, v: Array, at: Any) -> Any:
        most, mean, g = rows
        dq, dk, dv = state
        scores = work.scores(q, k, at)
        weights = jnp.exp(scores - most[..., None])
        mixed = work.dropped(weights.astype(v.dtype), at)
        dweights = work.dropped(product(SCORES, g, v), at)
        dscores = weights * (dweights - mean[..., None])
        if (seen := work.seen(at)) is not None:
            dscores = jnp.where(seen, dscores, 0)
        dscores = (dscores * work.scale).astype(q.dtype)
        dq += product(MIX, dscores, k)
        return dq, dk + batched_outer(q, dscores), dv + batched_outer(g, mixed)

    def step(carry: Any, each: Any) -> Any:
        at, overlaps = each
        dq, *dkv = carry
        state = work.take_q(dq, at), *work.take_kv(tuple(dkv), at, axis=3)
        rows = work.take_q((most, mean, g), at)
        dq_rows, *dkv_rows = work.skip(overlaps, block, state, rows, *work.take(at), at)
        return (work.put_q(dq, dq_rows, at), *work.put_kv(tuple(dkv), tuple(dkv_rows), at))

    dq, dk, dv = work.run(step, start)
    left, kv_length = work.blocks.left, key.shape[1]
    dq = rearrange(dq[:, :, : query.shape[1]], "batch heads q d -> batch q heads d")
    dk, dv = (
        rearrange(x[..., left : left + kv_length], "batch heads d kv -> batch kv heads d")
        for x in (dk, dv)
    )
    return *(x.astype(query.dtype) for x in (dq, dk, dv)), None, None


class _Work:
    """What both passes do over the blocks; not a pytree: it lives while one is traced."""

    def __init__(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Visible,
        rate: float,
        dropout_key: Array | None,
        scale: float | None,
        sizes: Sizes,
    ) -> None:
        # With the queries, on which nothing hangs but them: a mask that the layers of a model share
        # would be computed for all blocks at once, outside the loop over layers.
        query, mask = lax.optimization_barrier((query, mask))
        self._shape = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
        self._like, self._mask, self._rate, self._key = query, mask, rate, dropout_key
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        q_length, kv_length = self._shape[2:]
        # Where rows are split over devices, all their queries are a block: slices would move them.
        self.blocks = cut(mask, q_length, kv_length, sizes, whole_rows=is_split("length"))
        by_heads = "batch length heads d -> batch heads length d"
        self.operands = (
            self.pad_q(rearrange(query, by_heads)),
            # All keys on every device: a block of them is taken in each step of the loop.
            *(
                constrain(self._pad_kv(rearrange(x, by_heads), 2), ("batch", "heads", None, None))
                for x in (key, value)
            ),
        )
        self._padded = self._pad_mask(mask)

    def pad_q(self, x: Array) -> Array:
        """Rows of queries ``[batch, heads, q_length, ...]``, filled up to whole blocks."""
        return _pad(x, 2, 0, self.blocks.q_length)

    def _pad_kv(self, x: Array, axis: int) -> Array:
        return _pad(x, axis, self.blocks.left, self.blocks.kv_length)

    def _pad_mask(self, mask: Visible) -> Visible:
        q_ids, kv_ids, more = mask.q_segment_ids, mask.kv_segment_ids, mask.more
        if q_ids is not None:
            q_ids = _pad(q_ids, 1, 0, self.blocks.q_length, mode="edge")
            kv_ids = _pad(kv_ids, 1, self.blocks.left, self.blocks.kv_length, mode="edge")
        if more is not None:
            more = more if more.shape[2] == 1 else _pad(more, 2, 0, self.blocks.q_length)
            more = more if more.shape[3] == 1 else self._pad_kv(more, 3)
        return replace(mask, q_segment_ids=q_ids, kv_segment_ids=kv_ids, more=more)

    def vary(self, zeros: tuple[Array, ...]) -> tuple[Array, ...]:
        """The same, varying over the axes of ``shard_map`` that the queries vary over."""
        return tuple(custom_vjp.vary_alike([*zeros, self._like])[:-1])

    def scores(self, q: Array, k: Array, at: Any) -> Array:
        """Those of a block, in float32."""
        scores = product(SCORES, q, k) * self.scale
        if (seen := self.seen(at)) is not None:
            scores = jnp.where(seen, scores, NEGATIVE)
        blocks, (_, kv_start) = self.blocks, at
        if blocks.left == 0 and blocks.kv_length == self._shape[3]:
            return scores
        places = kv_start - blocks.left + jnp.arange(blocks.kv_size)
        there = (places >= 0) & (places < self._shape[3])
        return jnp.where(there[None, None, None], scores, -jnp.inf)  # even if nothing is seen

    def seen(self, at: Any) -> Array | None:
        """The mask of a block."""
        (q_start, kv_start), blocks = at, self.blocks
        # Padding in front of the keys moves their places, not the queries'.
        moved = self._padded
        if moved.before is not None:
            moved = replace(moved, before=moved.before - blocks.left)
        if moved.after is not None:
            moved = replace(moved, after=moved.after + blocks.left)
        return moved.part(q_start, blocks.q_size, kv_start, blocks.kv_size)

    def dropped(self, weights: Array, at: Any) -> Array:
        """Without those that the plain definition drops as well.

        In the precision of values, which decides the rate: the same for weights and gradients.
        """
        if self._key is None or self._rate == 0:
            return weights
        weights = weights.astype(self.operands[2].dtype)
        begins = 0, 0, at[0], at[1] - self.blocks.left
        return block_dropout(weights, self._rate, self._key, within=self._shape, at=begins)

    def take_q(self, x: Any, at: Any) -> Any:
        """A block's rows of queries."""
        size = self.blocks.q_size
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at[0], size, 2), x)

    def put_q(self, x: Any, rows: Any, at: Any) -> Any:
        """With a block's rows of queries replaced."""
        return _put(x, rows, at[0], 2)

    def take_kv(self, x: Any, at: Any, axis: int = 2) -> Any:
        """A block's keys."""
        size = self.blocks.kv_size
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at[1], size, axis), x)

    def put_kv(self, x: Any, columns: Any, at: Any) -> Any:
        """With a block's keys, which are the last axis, replaced."""
        return _put(x, columns, at[1], 3)

    def take(self, at: Any) -> tuple[Array, Array, Array]:
        """The operands of a block."""
        q, *kv = self.operands
        return self.take_q(q, at), *self.take_kv(tuple(kv), at)

    def skip(self, overlaps: Array | None, block: Any, state: Any, *operands: Any) -> Any:
        """``block(state, *operands)``, which on CPUs is ``state`` where no segment is in both."""
        if overlaps is None:
            return block(state, *operands)
        pick = lambda overlaps, *args: lax.cond(overlaps, block, lambda state, *_: state, *args)
        always = lambda overlaps, *args: block(*args)
        return lax.platform_dependent(overlaps, state, *operands, cpu=pick, default=always)

    def run(self, step: Any, carry: Any) -> Any:
        """``step`` for every block in turn."""
        starts = np.asarray(self.blocks.starts, np.int32).reshape(-1, 2)
        if len(starts) == 1:
            at = tuple(int(start) for start in starts[0])
            return step(carry, (at, None))
        overlaps = self._overlaps(starts)
        places, _ = lax.optimization_barrier((tuple(map(jnp.asarray, starts.T)), self._like))
        body = lambda carry, each: (step(carry, each), None)
        return lax.scan(body, carry, (places, overlaps))[0]

    def _overlaps(self, starts: np.ndarray) -> Array | None:
        """For each block, whether the ids of its queries and keys, in any row, have a common one.

        By the least and the largest of each, so that a segment may be taken for another between.
        """
        q_ids, kv_ids = self._padded.q_segment_ids, self._padded.kv_segment_ids
        if not self._padded.same_ids or self._padded.more is not None:  # a query may see nothing
            return None

        def ends(ids: Array, starts: np.ndarray, size: int) -> tuple[Array, Array]:
            index = starts[:, None] + np.arange(size)
            parts = jnp.take(ids, jnp.asarray(index), axis=1)
            return parts.min(-1), parts.max(-1)

        q_least, q_most = ends(q_ids, starts[:, 0], self.blocks.q_size)
        kv_least, kv_most = ends(kv_ids, starts[:, 1], self.blocks.kv_size)
        return ((q_least <= kv_most) & (kv_least <= q_most)).any(0)


def _put(x: Any, part: Any, start: Any, axis: int) -> Any:
    return jax.tree.map(lambda x, p: lax.dynamic_update_slice_in_dim(x, p, start, axis), x, part)


def _pad(x: Array, axis: int, left: int, length: int, mode: str = "constant") -> Array:
    right = length - left - x.shape[axis]
    if left == right == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (left, right)
    return jnp.pad(x, widths, mode=mode)


def _plainly(
    query: Array,
    key: Array,
    value: Array,
    mask: Visible,
    rate: float,
    dropout_key: Array | None,
    scale: float | None,
    sizes: Sizes,
) -> Array:
    """The equation, for :func:`jaxlm.nn.custom_vjp.plain`."""
    options: Any = {"dropout_rate": rate, "dropout_key": dropout_key, "scale": scale}
    return dot_product_attention(query, key, value, mask=mask, **options)


_attention = custom_vjp.gradient(_forward, _backward, static=(4, 6, 7))(_plainly)


def blockwise_attention(
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length heads head_dim"],
    value: Float[Array, "batch kv_length heads head_dim"],
    *,
    mask: Visibility | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
    scale: float | None = None,
    sizes: Sizes = SIZES,
) -> Float[Array, "batch q_length heads head_dim"]:
    """As :func:`~jaxlm.nn.attention.dot_product_attention`, block by block; without a bias.

    A query that sees nothing, by a mask beside a window, gets the mean of the values nearby.
    """
    if bias is not None:
        raise InputError(
            "blockwise attention takes no bias, whose gradient is a square array: use "
            "attention=plain"
        )
    options: Any = {"dropout_rate": dropout_rate, "dropout_key": dropout_key, "scale": scale}
    q_length, kv_length = query.shape[1], key.shape[1]
    few = not isinstance(mask, Visible) and q_length <= 64  # as in decoding: no square
    if few or max(q_length, kv_length) <= sizes.plain:
        return dot_product_attention(query, key, value, mask=mask, **options)
    seen = mask if isinstance(mask, Visible) else masks.visible(mask=mask)
    return _attention(query, key, value, seen, dropout_rate, dropout_key, scale, sizes)
