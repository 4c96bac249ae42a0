"""Attention by distances and not positions (Dai et al. 2019, arXiv:1901.02860, section 3.3).

With XLNet's equality of token types, and for its two streams (Yang et al. 2019, arXiv:1906.08237,
appendix A.2). Another equation than :class:`jaxlm.nn.attention.MultiHeadAttention`'s, but its
second and third term are a bias to that one's scores.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.nn.attention import dot_product_attention
from jaxlm.nn.linear import Linear
from jaxlm.nn.products import product
from jaxlm.sharding import constrain
from jaxlm.typing import Dtype, Hidden, Mask


def distance_table(
    before: int, after: int, features: int, clamp_length: int | None = None
) -> Float[Array, "distances features"]:
    """Sines, and behind them cosines, of distances from ``before`` down to ``1 - after``.

    Dai et al. (2019, arXiv:1901.02860, section 3.3); float32. With ``clamp_length`` distances
    beyond it, either way, count as it.
    """
    distances = (before - jnp.arange(before + after)).astype(jnp.float32)
    if clamp_length is not None:
        distances = jnp.clip(distances, -clamp_length, clamp_length)
    frequencies = 10_000 ** -(np.arange(0, features, 2) / features)
    # Rounding a frequency would turn an angle of 512 by 3e-5: what is left of it after 12 bits, of
    # which products with distances are exact, is added.
    first = np.round(frequencies * 4096) / 4096
    first, rest = (jnp.asarray(part, jnp.float32) for part in (first, frequencies - first))
    angles = jnp.outer(distances, first) + jnp.outer(distances, rest)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class View(NamedTuple):
    """What the positions of a stream see of memory and row."""

    mask: Mask | None
    other_type: Bool[Array, "batch q_length kv_length"] | None
    """Whether token types differ; None: nowhere."""
    places: Int[Array, "batch q_length"] | None
    """Where in the row they are; None: everywhere, in order."""


class Opened(NamedTuple):
    """What both streams attend to, in heads."""

    key: Float[Array, "batch kv_length heads head_dim"]
    value: Float[Array, "batch kv_length heads head_dim"]
    distances: Float[Array, "1 distances heads head_dim"]


def shift(
    scores: Float[Array, "batch heads q_length distances"],
    kv_length: int,
    places: Int[Array, "batch q_length"] | None,
    length: int,
) -> Float[Array, "batch heads q_length kv_length"]:
    """From scores of distances, the largest first, to those of keys.

    Position i of a row of ``length`` has in front of it what is ``length - i`` further than the
    first distance.
    """
    batch, heads, queries, distances = scores.shape
    if places is None:  # the rows of a matrix, each moved by one more: a matrix one narrower
        flat = scores.reshape(batch, heads, distances, queries)[:, :, 1:]
        return flat.reshape(batch, heads, queries, distances - 1)[..., :kv_length]

    def one(scores: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(scores, start, kv_length, axis=1)

    by_query = rearrange(scores, "batch heads q r -> batch q heads r")
    moved = jax.vmap(jax.vmap(one))(by_query, length - places)
    return rearrange(moved, "batch q heads kv -> batch heads q kv")


class RelativeAttention(nn.Module):
    """Attention by content, distance and equality of token types, for either stream (A.2).

    ``softmax(((q + u) kᵀ + (q + v) pᵀ + (q + s) eᵀ) / sqrt(head_dim)) v`` with p the projected
    distance of query and key, and e one of two vectors: of equal types, and of different ones.

    Attributes:
        attend: as that of :class:`jaxlm.nn.attention.MultiHeadAttention`.
    """

    features: int
    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    attend: Callable[..., Float[Array, "..."]] = dot_product_attention

    def setup(self) -> None:
        heads = self.num_heads, self.head_dim
        options = {"use_bias": False, "dtype": self.dtype, "kernel_init": self.kernel_init}
        self.query, self.key = Linear(heads, **options), Linear(heads, **options)
        self.value, self.position = Linear(heads, **options), Linear(heads, **options)
        self.out = Linear(self.features, num_inputs=2, **options)
        names = ("content_bias", "position_bias", "segment_bias")
        shapes = dict.fromkeys(names, heads) | {"segment_embed": (2, *heads)}
        self.terms = {
            name: self.param(name, self.kernel_init, shape, jnp.float32).astype(self.dtype)
            for name, shape in shapes.items()
        }

    def open(self, x: Hidden, table: Float[Array, "1 distances embed"]) -> Opened:
        """What is attended to: the hidden states ``x``, at the distances of the table."""
        names = ("batch", "length", "heads", "head_dim")
        return Opened(
            constrain(self.key(x), names), constrain(self.value(x), names), self.position(table)
        )

    def __call__(
        self,
        x: Hidden,
        opened: Opened,
        view: View,
        length: int,
        deterministic: bool,
    ) -> Hidden:
        query = constrain(self.query(x), ("batch", "length", "heads", "head_dim"))
        content_bias, position_bias, segment_bias, types = self.terms.values()
        bias = product("bqhd,rhd->bhqr", query + position_bias[None, None], opened.distances[0])
        bias = shift(bias, opened.key.shape[1], view.places, length)
        if view.other_type is not None:  # what is added to all keys of a query has no effect
            score = product("bqhd,hd->bhq", query + segment_bias[None, None], types[1] - types[0])
            bias += jnp.where(view.other_type[:, None], score[..., None], 0)
        drops = not deterministic and self.dropout_rate > 0
        out = self.attend(
            query + content_bias[None, None],
            opened.key,
            opened.value,
            mask=view.mask,
            bias=bias * self.head_dim**-0.5,
            dropout_rate=self.dropout_rate,
            dropout_key=self.make_rng("dropout") if drops else None,
        )
        if view.places is not None and view.mask is not None:
            sees = jnp.swapaxes(view.mask.any(-1, keepdims=True), 1, 2)
            out = jnp.where(sees, out, 0)
        return self.out(out)
