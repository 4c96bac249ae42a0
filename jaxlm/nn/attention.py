"""Scaled dot-product attention and its multi-head module (Vaswani et al. 2017, section 3.2)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlm.nn import custom_vjp, masks
from jaxlm.nn.cache import LayerCache
from jaxlm.nn.dropout import dropout
from jaxlm.nn.linear import Linear
from jaxlm.nn.positions import Rotary, rotate
from jaxlm.nn.products import product
from jaxlm.sharding import constrain
from jaxlm.typing import Bias, Dtype, Hidden, Mask, PRNGKey


@custom_vjp.attention(dropout)
def dot_product_attention(
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length heads head_dim"],
    value: Float[Array, "batch kv_length heads head_dim"],
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
) -> Float[Array, "batch q_length heads head_dim"]:
    """``softmax(q kᵀ / sqrt(head_dim) + bias) v`` (equation 1); softmax in float32.

    ``dropout_key`` draws which attention weights are dropped; without it none are. Hand-written
    gradient: forward mode only inside :func:`custom_vjp.plain`.
    """
    scores = product("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, masks.NEGATIVE)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    if dropout_key is not None and dropout_rate > 0:
        weights = dropout(weights, dropout_rate, dropout_key)
    return product("bhqk,bkhd->bqhd", weights, value).astype(query.dtype)


def grouped_attention(
    attend: Callable[..., Float[Array, "..."]],
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length kv_heads head_dim"],
    value: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
) -> Float[Array, "batch q_length heads head_dim"]:
    """``attend`` where consecutive heads of queries share one of keys and values.

    Ainslie et al. (2023, arXiv:2305.13245, section 2.2). Queries of a group are laid out as more
    positions of one head, so that no key is repeated.
    """
    options: dict[str, Any] = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
    group = query.shape[2] // key.shape[2]
    if group == 1:
        return attend(query, key, value, mask=mask, bias=bias, **options)

    def fold(x: Array | None) -> Array | None:
        if x is None or x.shape[1:3] == (1, 1):
            return x  # the same for all heads and queries
        heads = (query.shape[2], *x.shape[2:]) if x.shape[1] > 1 else (group, *x.shape[2:])
        x = jnp.broadcast_to(x, (x.shape[0], heads[0], query.shape[1], x.shape[3]))
        return rearrange(x, "batch (kv group) q k -> batch kv (q group) k", group=group)

    rows = rearrange(query, "batch q (kv group) d -> batch (q group) kv d", group=group)
    out = attend(rows, key, value, mask=fold(mask), bias=fold(bias), **options)
    return rearrange(out, "batch (q group) kv d -> batch q (kv group) d", group=group)


class MultiHeadAttention(nn.Module):
    """Attention of ``x`` over itself in ``num_heads`` subspaces (section 3.2.2).

    What may be attended to enters as data: ``mask`` (True = may), ``bias`` (added to the scores),
    ``segment_ids`` (equal ids see each other); so do the angles by which queries and keys are
    turned (``rotary``). Returns the projection of all heads, ``[batch, length, embed]``.

    Attributes:
        attend: how the heads attend: :func:`dot_product_attention`, or another equation with its
            arguments, whose gradient JAX finds.
        num_kv_heads: heads of keys and values, each for as many consecutive heads of queries;
            None: one for each (:func:`grouped_attention`).
        out_init: initializer of ``out``, if it is not ``kernel_init``.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    attend: Callable[..., Float[Array, "..."]] = dot_product_attention
    num_kv_heads: int | None = None
    out_init: Callable[..., Array] | None = None

    def __call__(
        self,
        x: Hidden,
        *,
        mask: Mask | None = None,
        bias: Bias | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        rotary: Rotary | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        if segment_ids is not None:
            same = masks.segments(segment_ids, segment_ids)
            mask = same if mask is None else mask & same
        return self.extend(
            x, None, mask=mask, bias=bias, rotary=rotary, deterministic=deterministic
        )[0]

    @nn.compact
    def extend(
        self,
        x: Hidden,
        cache: LayerCache | None,
        *,
        mask: Mask | None = None,
        bias: Bias | None = None,
        rotary: Rotary | None = None,
        deterministic: bool = True,
    ) -> tuple[Hidden, LayerCache | None]:
        """Attention of ``x`` over all slots of the cache, after its own keys are written there.

        Which slots is up to the ``mask`` (``Cache.open``). Without a cache, over ``x`` itself.
        """

        def heads(name: str, num_heads: int) -> Float[Array, "batch length heads head_dim"]:
            y = self._linear((num_heads, self.head_dim), name, self.kernel_init)(x)
            return constrain(y, ("batch", "length", "heads", "head_dim"))

        num_kv_heads = self.num_kv_heads or self.num_heads
        query, key = heads("query", self.num_heads), heads("key", num_kv_heads)
        value = heads("value", num_kv_heads)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            cache = cache.write(key, value)
            key, value = cache.read(x.shape[1] * self.num_heads // num_kv_heads)
        drops = not deterministic and self.dropout_rate > 0
        out = grouped_attention(
            self.attend,
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            dropout_rate=self.dropout_rate,
            dropout_key=self.make_rng("dropout") if drops else None,
        )
        project = self._linear(x.shape[-1], "out", self.out_init or self.kernel_init, num_inputs=2)
        return project(out), cache

    def _linear(
        self,
        features: int | tuple[int, int],
        name: str,
        init: Callable[..., Array],
        num_inputs: int = 1,
    ) -> Linear:
        return Linear(
            features,
            num_inputs,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=init,
            name=name,
        )
