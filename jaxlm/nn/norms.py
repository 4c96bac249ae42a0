"""Normalisation; statistics in float32."""

from collections.abc import Callable

import flax.linen as nn
import jax
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
        shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)

        def norm(x: Array, scale: Array, bias: Array | None) -> Array:
            x = x.astype(jnp.float32)
            x = x - x.mean(-1, keepdims=True)
            x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
            x = x * scale.reshape(shape)
            return (x if bias is None else x + bias.reshape(shape)).astype(self.dtype)

        return _kept_small(norm)(x, scale, bias)


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
        scale = jnp.expand_dims(scale.astype(self.dtype), tuple(range(x.ndim - 1)))

        def norm(x: Array, scale: Array) -> Array:
            x = x.astype(jnp.float32)
            x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
            return x.astype(self.dtype) * scale

        return _kept_small(norm)(x, scale)


def _kept_small(norm: Callable[..., Array]) -> Callable[..., Array]:
    """For its gradient a norm keeps what it is given alone, not three float32 arrays of that size.

    In bfloat16 they are a third of what a step of BERT-base keeps. On CPUs XLA undoes it.
    """
    return jax.checkpoint(norm)
