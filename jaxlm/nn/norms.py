"""Normalisation; statistics in float32."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlm.typing import Dtype


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(variance + epsilon) * scale + bias`` over the last axis.

    Ba, Kiros and Hinton (2016), equation 4. The variance is of the centred values: E[x²] - E[x]²
    loses all digits in float32 when the mean is large.
    """

    epsilon: float = 1e-12  # as in BERT's code
    dtype: Dtype = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        along = tuple(range(x.ndim - 1))
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        x = x * jnp.expand_dims(scale, along)
        x = x if bias is None else x + jnp.expand_dims(bias, along)
        return x.astype(self.dtype)


class RmsNorm(nn.Module):
    """``x / sqrt(mean(x²) + epsilon) * scale`` over the last axis (Zhang and Sennrich 2019, eq. 4).

    Rounded to ``dtype`` before the scale is applied, as Llama's code does: in bfloat16 the other
    order differs.
    """

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(scale.astype(self.dtype), tuple(range(x.ndim - 1)))
        return x.astype(self.dtype) * scale
