"""The one linear map: low precision in, float32 accumulation, an explicit weight gradient.

Why not ``flax.linen.Dense``: its weight gradient goes through a transpose that XLA:CPU
materialises (a step 1.14 times as long for a BERT-mini), its N-d sibling creates the kernel flat,
and with ``dtype=bfloat16`` its products give bfloat16 and are upcast on CPUs (1.5 times as long).
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.nn import custom_vjp
from jaxlm.nn.products import add_bias, product
from jaxlm.typing import Dtype, PRNGKey


@custom_vjp.linear
def linear(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, "outputs"] | None = None,
) -> Float[Array, "*batch outputs"]:
    """``x @ kernel + bias``, accumulated and returned in float32.

    Hand-written gradient: forward mode only inside :func:`custom_vjp.plain`.
    """
    y = product("...i,io->...o", x, kernel)
    return y if bias is None else add_bias(y, bias)


class Linear(nn.Module):
    """``y = x W + b`` over the last ``num_inputs`` axes of ``x``.

    The kernel has its final shape ``[*inputs, *features]``, so the sharding table and LoRA see the
    real axes; the initializer sees a matrix, from which alone it can tell inputs from outputs.
    Operands are cast to ``dtype``, and so is the result, unless it has a type of its own.

    Attributes:
        features: the output axes, such as ``(num_heads, head_dim)``.
        num_inputs: how many trailing axes of ``x`` are contracted.
        dtype: of the operands and the result; parameters are float32.
        result_dtype: of the result, such as float32 for logits; None: ``dtype``.
    """

    features: int | tuple[int, ...]
    num_inputs: int = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    result_dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        features = (self.features,) if isinstance(self.features, int) else self.features
        inputs = x.shape[x.ndim - self.num_inputs :]
        batch = x.shape[: x.ndim - self.num_inputs]
        matrix = math.prod(inputs), math.prod(features)

        def init(key: PRNGKey) -> Array:
            return self.kernel_init(key, matrix, jnp.float32).reshape(*inputs, *features)

        kernel = self.param("kernel", init)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, features, jnp.float32).reshape(-1)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = linear(x.reshape(*batch, matrix[0]), kernel.reshape(matrix), bias)
        return y.astype(self.result_dtype or self.dtype).reshape(*batch, *features)
