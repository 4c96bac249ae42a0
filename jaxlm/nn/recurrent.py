"""Long short-term memory, in one direction and in both."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.nn import custom_vjp
from jaxlm.nn.linear import Linear, linear
from jaxlm.typing import Dtype, Hidden


@custom_vjp.lstm
def lstm(
    gates: Float[Array, "length batch 4 state"],
    kernel: Float[Array, "state 4 state"],
    continues: Bool[Array, "length batch"],
) -> Float[Array, "length batch state"]:
    """Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000), in float32.

    ``i, f, g, o = gates + h K``; ``c = σ(f + 1) c + σ(i) tanh(g)``; ``h = σ(o) tanh(c)``. The 1
    lets an untrained cell remember. Hand-written gradient: forward mode only inside
    :func:`custom_vjp.plain`.

    Args:
        gates: what the inputs add to the gates, biases included.
        kernel: recurrent weights K.
        continues: False where the state starts from zero again.
    """
    keep = continues.astype(jnp.float32)[..., None]
    matrix = kernel.reshape(kernel.shape[0], -1)

    def body(carry: tuple[Array, Array], now: tuple[Array, Array]) -> tuple:
        h, c = carry
        gates, keep = now
        h, c = h * keep, c * keep
        gates = gates + linear(h.astype(kernel.dtype), matrix).reshape(gates.shape)
        i, f, g, o = (gates[:, gate] for gate in range(4))
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    # Like the gates, so that inside shard_map it varies as they do.
    zero = jnp.zeros_like(gates, jnp.float32, shape=(gates.shape[1], gates.shape[3]))
    return lax.scan(body, (zero, zero), (gates, keep))[1]


class Lstm(nn.Module):
    """:func:`lstm` over rows, from left to right; ``hidden_dim`` outputs.

    The state starts from zero at each change of segment: padding, with a segment id of its own,
    and the documents of a packed row do not reach each other.
    """

    hidden_dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Hidden, segment_ids: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length state"]:
        if segment_ids is None:
            segment_ids = jnp.zeros(x.shape[:2], jnp.int32)
        # Examples first, as adapters that differ by example need it.
        gates = Linear((4, self.hidden_dim), dtype=self.dtype, name="input")(x)
        gates = rearrange(gates, "batch length g state -> length batch g state")
        kernel = self.param(
            "recurrent_kernel",
            lambda key, n: nn.initializers.orthogonal()(key, (n, 4 * n)).reshape(n, 4, n),
            self.hidden_dim,
        )
        # The first step continues from a state of zero.
        continues = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) == 0
        continues = rearrange(continues, "batch length -> length batch")
        h = lstm(gates.astype(jnp.float32), kernel.astype(self.dtype), continues)
        return rearrange(h.astype(self.dtype), "length batch state -> batch length state")


class BiLstm(nn.Module):
    """Two :class:`Lstm`, the second from right to left, side by side (Graves and Schmidhuber 2005).

    ``hidden_dim`` outputs of each direction.
    """

    hidden_dim: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Hidden, segment_ids: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length states"]:
        forward = Lstm(self.hidden_dim, self.dtype, name="forward")(x, segment_ids)
        turned = None if segment_ids is None else jnp.flip(segment_ids, axis=1)
        backward = Lstm(self.hidden_dim, self.dtype, name="backward")(jnp.flip(x, axis=1), turned)
        return jnp.concatenate([forward, jnp.flip(backward, axis=1)], axis=-1)
