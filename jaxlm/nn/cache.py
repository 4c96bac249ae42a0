"""Keys and values of earlier positions, as data: what decoding one token after the other needs.

A cache has a fixed number of slots, so that nothing is compiled anew as it fills. All rows write
at the same slot; rows of unequal length are padded on the left. A slot is a place in memory: the
position of a token, which its embedding or rotation depends on, is another number.
"""

from dataclasses import replace
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.nn import masks
from jaxlm.sharding import constrain
from jaxlm.typing import Dtype, Mask

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
        both = jnp.swapaxes(self.key, 1, 2), jnp.swapaxes(self.value, 1, 2)
        if num_queries == 1 or self.key.dtype == jnp.float32:
            return both
        # XLA:CPU of JAX 0.12 compiles a bfloat16 product of this view that it cannot run.
        return lax.platform_dependent(*both, cpu=_laid_out, default=lambda *both: both)


def _laid_out(key: Array, value: Array) -> tuple[Array, Array]:
    return lax.optimization_barrier((key, value))


@flax.struct.dataclass
class Cache:
    """The layers' keys and values, one array for each layer, so that none is copied to take it.

    Writing beyond the last slot overwrites the last ones: stop before. Rows are selected or
    reordered by indexing the first axis of all leaves but ``index``.

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


def make(
    num_layers: int, batch: int, kv_length: int, num_heads: int, head_dim: int, dtype: Dtype
) -> Cache:
    """An empty one of ``kv_length`` slots for ``num_heads`` heads of keys and values."""
    shape = batch, num_heads, kv_length, head_dim
    zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))
    ids = jnp.full((batch, kv_length), PADDING, jnp.int32)
    return Cache(zeros(), zeros(), ids, jnp.zeros((), jnp.int32))
