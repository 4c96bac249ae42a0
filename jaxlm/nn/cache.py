"""Keys and values of earlier positions, as data: what decoding one token after the other needs.

A cache has a fixed number of slots, so that nothing is compiled anew as it fills. All rows write
at the same slot; rows of unequal length are padded on the left. A slot is a place in memory: the
position of a token, which its embedding or rotation depends on, is another number.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.errors import InputError
from jaxlm.nn import masks
from jaxlm.sharding import constrain
from jaxlm.typing import Dtype, Mask, SourceMask

PADDING = -1  # the segment id of slots that nothing attends to


@flax.struct.dataclass
class LayerCache:
    """What one layer's attention reads and writes.

    Heads come before slots, because XLA:CPU would copy all of it for each product otherwise. The
    leaves may also be shapes or shardings, hence no array types here.

    Attributes:
        key: ``[batch, heads, kv_length, head_dim]``.
        value: of the same shape.
        index: the slot to be written next.
    """

    key: Any
    value: Any
    index: Any

    def write(
        self,
        key: Float[Array, "batch length heads head_dim"],
        value: Float[Array, "batch length heads head_dim"],
    ) -> "LayerCache":
        """With these in the next ``length`` slots."""

        def put(cached: Array, new: Array) -> Array:
            new = jnp.swapaxes(new, 1, 2).astype(cached.dtype)
            cached = lax.dynamic_update_slice(cached, new, (0, 0, self.index, 0))
            return constrain(cached, ("batch", "heads", None, "head_dim"))

        return replace(self, key=put(self.key, key), value=put(self.value, value))

    def read(
        self, num_queries: int
    ) -> tuple[
        Float[Array, "batch kv_length heads head_dim"],
        Float[Array, "batch kv_length heads head_dim"],
    ]:
        """The keys and values of all slots, for so many queries of each of their heads."""
        return _view(self.key, self.value, num_queries)


def _view(key: Array, value: Array, num_queries: int) -> tuple[Array, Array]:
    both = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    if num_queries == 1 or key.dtype == jnp.float32:
        return both
    # XLA:CPU of JAX 0.12 compiles a bfloat16 product of this view that it cannot run.
    return lax.platform_dependent(*both, cpu=_laid_out, default=lambda *both: both)


def _laid_out(key: Array, value: Array) -> tuple[Array, Array]:
    return lax.optimization_barrier((key, value))


@flax.struct.dataclass
class Cache:
    """The layers' keys and values, one array for each layer, so that none is copied to take it.

    Writing beyond the last slot overwrites the last ones: stop before.

    Attributes:
        keys: for each layer ``[batch, heads, kv_length, head_dim]``.
        values: of the same shapes.
        segment_ids: ``[batch, kv_length]``: positions of equal id attend to each other;
            :data:`PADDING` where nothing is.
        index: the number of slots that are written.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    segment_ids: Any
    index: Any

    @property
    def kv_length(self) -> int:
        """The number of slots."""
        return self.segment_ids.shape[1]

    def layer(self, number: int) -> LayerCache:
        """That of one layer."""
        return LayerCache(self.keys[number], self.values[number], self.index)

    def open(self, segment_ids: Int[Array, "batch length"]) -> tuple["Cache", Mask]:
        """With these ids in the next slots; and which slots their positions may attend to.

        Those are their own and earlier ones, of equal id. Layers still write at ``index``.
        """
        ids = lax.dynamic_update_slice(self.segment_ids, segment_ids, (0, self.index))
        slots, length = jnp.arange(self.kv_length), segment_ids.shape[1]
        reached = slots[None, :] <= self.index + slots[:length, None]
        mask = reached[None, None] & masks.segments(segment_ids, ids)
        return replace(self, segment_ids=ids), mask

    def advance(self, layers: Sequence[LayerCache], length: int) -> "Cache":
        """With what the layers have written, each in the next ``length`` slots."""
        keys, values = tuple(one.key for one in layers), tuple(one.value for one in layers)
        return replace(self, keys=keys, values=values, index=self.index + length)

    def take(self, rows: Int[Array, "rows"]) -> "Cache":
        """That of these rows, in this order."""
        keys, values = (tuple(x[rows] for x in part) for part in (self.keys, self.values))
        return replace(self, keys=keys, values=values, segment_ids=self.segment_ids[rows])


@flax.struct.dataclass
class LayerSource:
    """Keys and values of an encoder's hidden states, as one layer's cross-attention reads them.

    Attributes:
        key: ``[sources, heads, source_length, head_dim]``.
        value: of the same shape.
    """

    key: Any
    value: Any

    def read(
        self, num_queries: int
    ) -> tuple[
        Float[Array, "sources source_length heads head_dim"],
        Float[Array, "sources source_length heads head_dim"],
    ]:
        """Both, for so many queries of each of their heads by all rows together."""
        return _view(self.key, self.value, num_queries // len(self.key))


@flax.struct.dataclass
class Source:
    """What cross-attention reads in each layer: computed once, and never written again.

    Where there are n times as many rows of queries, each n consecutive ones, such as the beams of
    a search, share a row of it.

    Attributes:
        keys: for each layer ``[sources, heads, source_length, head_dim]``.
        values: of the same shapes.
        segment_ids: ``[sources, source_length]``: positions of equal id are attended to.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    segment_ids: Any

    def layer(self, number: int) -> LayerSource:
        """That of one layer."""
        return LayerSource(self.keys[number], self.values[number])

    def mask(self, segment_ids: Int[Array, "batch length"]) -> SourceMask:
        """Which of its positions those of these ids may attend to."""
        ids = jnp.repeat(self.segment_ids, len(segment_ids) // len(self.segment_ids), axis=0)
        return masks.segments(segment_ids, ids)


@flax.struct.dataclass
class DecoderLayerCache:
    """What one layer of a decoder reads; ``own`` is written as well."""

    own: LayerCache
    source: LayerSource


@flax.struct.dataclass
class DecoderCache:
    """What a decoder that attends to an encoder's hidden states goes on from.

    Attributes:
        own: keys and values of what the decoder itself has read.
        source: those of the encoder's hidden states.
    """

    own: Cache
    source: Source

    @property
    def index(self) -> Any:
        """The number of slots of ``own`` that are written."""
        return self.own.index

    @property
    def kv_length(self) -> int:
        """The number of slots of ``own``."""
        return self.own.kv_length

    def layer(self, number: int) -> DecoderLayerCache:
        """That of one layer."""
        return DecoderLayerCache(self.own.layer(number), self.source.layer(number))

    def open(
        self, segment_ids: Int[Array, "batch length"]
    ) -> tuple["DecoderCache", Mask, SourceMask]:
        """As :meth:`Cache.open`; the second mask is of the source's positions."""
        own, mask = self.own.open(segment_ids)
        return replace(self, own=own), mask, self.source.mask(segment_ids)

    def advance(self, layers: Sequence[DecoderLayerCache], length: int) -> "DecoderCache":
        """As :meth:`Cache.advance`."""
        return replace(self, own=self.own.advance([layer.own for layer in layers], length))

    def take(self, rows: Int[Array, "rows"]) -> "DecoderCache":
        """With ``own`` of these rows, in this order; the source stays as it is.

        So a row may only take the place of one with which it shares the source.
        """
        return replace(self, own=self.own.take(rows))

    def with_source(
        self,
        layers: Sequence[
            tuple[
                Float[Array, "sources source_length heads head_dim"],
                Float[Array, "sources source_length heads head_dim"],
            ]
        ],
        segment_ids: Int[Array, "sources source_length"] | None,
    ) -> "DecoderCache":
        """With each layer's keys and values of a source, in the dtype of the cache.

        It has as many rows as the cache, or a divisor of them. Without segment ids, all are 0.
        """
        sources, length = layers[0][0].shape[:2]
        if segment_ids is None:
            segment_ids = jnp.zeros((sources, length), jnp.int32)
        batch, expected = len(self.own.segment_ids), self.source.segment_ids.shape[1]
        if length != expected or batch % sources:
            raise InputError(
                f"{sources} sources of {length} tokens do not fit a cache of {batch} rows with "
                f"source_length={expected}: make one for that length and a multiple of the rows"
            )

        def put(new: Array) -> Array:
            new = jnp.swapaxes(new, 1, 2).astype(self.own.keys[0].dtype)
            return constrain(new, ("batch", "heads", None, "head_dim"))

        keys, values = (tuple(put(pair[i]) for pair in layers) for i in (0, 1))
        return replace(self, source=Source(keys, values, segment_ids))


AnyCache = TypeVar("AnyCache", Cache, DecoderCache)


def make(
    num_layers: int, batch: int, kv_length: int, num_heads: int, head_dim: int, dtype: Dtype
) -> Cache:
    """An empty one of ``kv_length`` slots for ``num_heads`` heads of keys and values."""
    shape = batch, num_heads, kv_length, head_dim
    zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))
    ids = jnp.full((batch, kv_length), PADDING, jnp.int32)
    return Cache(zeros(), zeros(), ids, jnp.zeros((), jnp.int32))


def make_decoder(
    num_layers: int,
    batch: int,
    kv_length: int,
    source_length: int,
    num_heads: int,
    head_dim: int,
    dtype: Dtype,
) -> DecoderCache:
    """An empty one of ``kv_length`` slots a row; its source is all padding until there is one."""
    own = make(num_layers, batch, kv_length, num_heads, head_dim, dtype)
    source = make(num_layers, batch, source_length, num_heads, head_dim, dtype)
    return DecoderCache(own, Source(source.keys, source.values, source.segment_ids))
