"""Position-wise feed-forward blocks."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.nn import custom_vjp
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.linear import Linear
from jaxlm.sharding import constrain
from jaxlm.typing import Dtype, Hidden


@custom_vjp.gelu
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x Φ(x)`` with the exact normal distribution function (Hendrycks and Gimpel 2016, eq. 1).

    Hand-written gradient: forward mode only inside :func:`custom_vjp.plain`.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


@custom_vjp.gelu_tanh
def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x (1 + tanh(sqrt(2/π) (x + 0.044715 x³))) / 2``, near :func:`gelu` (there, section 2).

    Hand-written gradient: forward mode only inside :func:`custom_vjp.plain`.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
ACTIVATIONS: dict[Activation, Callable[..., Float[Array, "..."]]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Mlp(nn.Module):
    """``activation(x W_up) W_down`` (Vaswani et al. 2017, section 3.3).

    Attributes:
        out_init: initializer of ``down``, if it is not ``kernel_init``.
        dropout_rate: of what ``down`` gets.
    """

    mlp_dim: int
    activation: Callable[[Array], Array] = gelu
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    out_init: Callable[..., Array] | None = None
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Hidden, *, deterministic: bool = True) -> Hidden:
        h = self.activation(self._linear(self.mlp_dim, "up", self.kernel_init)(x))
        return self._down(h, x.shape[-1], deterministic)

    def _down(self, h: Float[Array, "..."], features: int, deterministic: bool) -> Hidden:
        h = constrain(h, ("batch", "length", "mlp"))
        h = Dropout(self.dropout_rate, name="dropout")(h, deterministic=deterministic)
        return self._linear(features, "down", self.out_init or self.kernel_init)(h)

    def _linear(self, features: int, name: str, init: Callable[..., Array]) -> Linear:
        return Linear(
            features, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, name=name
        )


class GatedMlp(Mlp):
    """``(activation(x W_gate) * (x W_up)) W_down`` (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    activation: Callable[[Array], Array] = jax.nn.silu

    @nn.compact
    def __call__(self, x: Hidden, *, deterministic: bool = True) -> Hidden:
        gate = self.activation(self._linear(self.mlp_dim, "gate", self.kernel_init)(x))
        h = gate * self._linear(self.mlp_dim, "up", self.kernel_init)(x)
        return self._down(h, x.shape[-1], deterministic)
