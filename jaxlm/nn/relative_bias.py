"""A bias of attention's scores by distance (Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Int

from jaxlm.nn.embed import Embed
from jaxlm.typing import Bias


def buckets_before(
    distances: Int[Array, "..."], num_buckets: int, max_distance: int
) -> Int[Array, "..."]:
    """Numbers below ``num_buckets`` for what is so many places before; what is behind counts as 0.

    Half of them stand for one distance each, the others for distances that grow geometrically up
    to ``max_distance``, and the last for all beyond (T5's published code).
    """
    exact = num_buckets // 2
    far = np.arange(max_distance + 1, dtype=np.float32)
    # In float32, as published: at its edges other roundings give another bucket.
    grown = np.log(np.maximum(far, 1) / np.float32(exact))
    grown = grown / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
    large = np.minimum(exact + grown.astype(np.int32), num_buckets - 1)
    table = jnp.asarray(np.where(far < exact, far, large).astype(np.int32))
    return table[jnp.clip(distances, 0, max_distance)]


def buckets_around(
    distances: Int[Array, "..."], num_buckets: int, max_distance: int
) -> Int[Array, "..."]:
    """The same, with half of the numbers for what is before, and the others for what is behind."""
    half = num_buckets // 2
    before = buckets_before(jnp.abs(distances), half, max_distance)
    return before + jnp.where(distances < 0, half, 0)


class RelativeBias(nn.Module):
    """A learned number for each bucket of distances and each head, in float32.

    Attributes:
        std: of the normal distribution that they are drawn from.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    std: float = 0.02

    def setup(self) -> None:
        init = nn.initializers.normal(self.std)
        self.relative_embed = Embed(self.num_buckets, self.num_heads, embedding_init=init)

    def around(self, places: Int[Array, "length"]) -> Bias:
        """Between all of these places."""
        distances = places[:, None] - places[None, :]
        return self._of(buckets_around(distances, self.num_buckets, self.max_distance))

    def before(self, q_places: Int[Array, "q_length"], kv_places: Int[Array, "kv_length"]) -> Bias:
        """From these places to others that are not behind them."""
        distances = q_places[:, None] - kv_places[None, :]
        return self._of(buckets_before(distances, self.num_buckets, self.max_distance))

    def _of(self, buckets: Int[Array, "q_length kv_length"]) -> Bias:
        return rearrange(self.relative_embed(buckets), "q k heads -> 1 heads q k")
