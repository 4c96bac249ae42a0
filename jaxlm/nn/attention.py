"""Scaled dot-product attention and its multi-head module (Vaswani et al. 2017, section 3.2)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.nn import masks
from jaxlm.nn.dropout import dropout
from jaxlm.nn.linear import Linear, product, product_gradients
from jaxlm.sharding import constrain
from jaxlm.typing import Bias, Dtype, Hidden, Mask, PRNGKey

# Finite, so that a row that may attend to nothing gives the mean of the values and no NaN.
NEGATIVE = -1e30

SCORES, MIX = "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"


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

    ``dropout_key`` draws which attention weights are dropped; without it none are. Of arrays of
    the scores' size the gradient keeps one, in the precision of ``value``.
    """
    return _attention(query, key, value, mask, bias, dropout_key, dropout_rate)


def _forward(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask | None,
    bias: Bias | None,
    dropout_key: PRNGKey | None,
    rate: float,
) -> tuple[Array, tuple[Any, ...]]:
    scores = product(SCORES, query, key) * query.shape[-1] ** -0.5
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, NEGATIVE)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1)  # divided by after the product, which is smaller
    weights = weights.astype(value.dtype)
    out = product(MIX, _drop(weights, rate, dropout_key), value) / _per_query(total)
    return out.astype(query.dtype), (query, key, value, mask, bias, dropout_key, weights, total)


def _backward(rate: float, residuals: tuple[Any, ...], g: Array) -> tuple[Array | None, ...]:
    # The barrier keeps XLA from keeping more instead: float32 scores, and what was dropped.
    residuals, g = lax.optimization_barrier((residuals, g))
    query, key, value, mask, bias, dropout_key, weights, total = residuals
    dropped = _drop(weights, rate, dropout_key)
    dweights, dvalue = product_gradients(MIX, dropped, value, g / _per_query(total))
    dweights = _drop(dweights, rate, dropout_key).astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    mean = (weights * dweights).sum(-1) / total
    dscores = weights * (dweights - mean[..., None])
    if mask is not None:
        dscores = jnp.where(mask, dscores, 0)
    dbias = None
    if bias is not None:
        widen = lambda b: jnp.broadcast_to(b.astype(jnp.float32), dscores.shape)
        (dbias,) = jax.vjp(widen, bias)[1](dscores)
    dquery, dkey = product_gradients(SCORES, query, key, dscores * query.shape[-1] ** -0.5)
    return dquery, dkey, dvalue, None, dbias, None


_attention = jax.custom_vjp(lambda *operands: _forward(*operands)[0], nondiff_argnums=(6,))
_attention.defvjp(_forward, _backward)


def _drop(weights: Array, rate: float, key: PRNGKey | None) -> Array:
    return dropout(weights, rate, key) if key is not None and rate > 0 else weights


def _per_query(total: Array) -> Array:
    return jnp.swapaxes(total, 1, 2)[..., None]


class MultiHeadAttention(nn.Module):
    """Attention of ``x`` over itself in ``num_heads`` subspaces (section 3.2.2).

    What may be attended to enters as data: ``mask`` (True = may), ``bias`` (added to the scores),
    ``segment_ids`` (equal ids see each other). Returns the projection of all heads, ``[batch,
    length, embed]``.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()

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
        out = dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            dropout_rate=self.dropout_rate,
            dropout_key=self.make_rng("dropout") if drops else None,
        )
        return linear(x.shape[-1], "out", num_inputs=2)(out)
