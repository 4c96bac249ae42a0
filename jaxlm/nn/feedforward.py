"""Position-wise feed-forward blocks."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.nn import custom_vjp
from jaxlm.nn.linear import Linear
from jaxlm.sharding import constrain
from jaxlm.typing import Dtype, Hidden


@custom_vjp.gelu
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x Φ(x)`` with the exact normal distribution function (Hendrycks and Gimpel 2016, eq. 1).

    Hand-written gradient: forward mode only inside :func:`custom_vjp.plain`.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


class Mlp(nn.Module):
    """``activation(x W_up) W_down`` (Vaswani et al. 2017, section 3.3)."""

    mlp_dim: int
    activation: Callable[[Array], Array] = gelu
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        def linear(features: int, name: str) -> Linear:
            return Linear(
                features,
                use_bias=self.use_bias,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                name=name,
            )

        h = self.activation(linear(self.mlp_dim, "up")(x))
        h = constrain(h, ("batch", "length", "mlp"))
        return linear(x.shape[-1], "down")(h)
