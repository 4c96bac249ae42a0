"""Scaled dot-product attention and its multi-head module (Vaswani et al. 2017, section 3.2)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.nn import custom_vjp, masks
from jaxlm.nn.dropout import dropout
from jaxlm.nn.linear import Linear
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


class MultiHeadAttention(nn.Module):
    """Attention of ``x`` over itself in ``num_heads`` subspaces (section 3.2.2).

    What may be attended to enters as data: ``mask`` (True = may), ``bias`` (added to the scores),
    ``segment_ids`` (equal ids see each other). Returns the projection of all heads, ``[batch,
    length, embed]``.

    Attributes:
        attend: how the heads attend: :func:`dot_product_attention`, or another equation with its
            arguments, whose gradient JAX finds.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    attend: Callable[..., Float[Array, "..."]] = dot_product_attention

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        *,
        mask: Mask | None = None,
        bias: Bias | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        def linear(features: int | tuple[int, int], name: str, num_inputs: int = 1) -> Linear:
            return Linear(
                features,
                num_inputs,
                use_bias=self.use_bias,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                name=name,
            )

        def heads(name: str) -> Float[Array, "batch length heads head_dim"]:
            y = linear((self.num_heads, self.head_dim), name)(x)
            return constrain(y, ("batch", "length", "heads", "head_dim"))

        query, key, value = heads("query"), heads("key"), heads("value")
        if segment_ids is not None:
            same = masks.segments(segment_ids, segment_ids)
            mask = same if mask is None else mask & same
        drops = not deterministic and self.dropout_rate > 0
        out = self.attend(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            dropout_rate=self.dropout_rate,
            dropout_key=self.make_rng("dropout") if drops else None,
        )
        return linear(x.shape[-1], "out", num_inputs=2)(out)
