"""Position-wise feed-forward blocks."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxlm.nn.linear import Linear
from jaxlm.sharding import constrain
from jaxlm.typing import Dtype, Hidden


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x Φ(x)`` with the exact normal distribution function (Hendrycks and Gimpel 2016, eq. 1).

    The gradient is written out so that only ``x`` is kept for it.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def _gelu_backward(x: Array, g: Array) -> tuple[Array]:
    x32 = x.astype(jnp.float32)
    cdf = 0.5 * (1 + lax.erf(x32 * np.float32(np.sqrt(0.5))))
    pdf = jnp.exp(-0.5 * x32 * x32) * np.float32(1 / np.sqrt(2 * np.pi))
    return ((g * (cdf + x32 * pdf)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


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
