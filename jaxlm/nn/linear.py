"""The one linear map: low precision in, float32 accumulation, an explicit weight gradient.

Why not ``flax.linen.Dense``: its weight gradient goes through a transpose that XLA:CPU
materialises (a step 1.14 times as long for a BERT-mini), its N-d sibling creates the kernel flat,
and with ``dtype=bfloat16`` its products give bfloat16 and are upcast on CPUs (1.5 times as long).
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from jaxlm.typing import Dtype

WIDE = 8192  # columns; from here on XLA:CPU sums a tall matrix faster as a product with ones


def _dot(a: Array, b: Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...]) -> Array:
    return lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32)


def _row_major(x: Array) -> Array:
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1)))


def _outer(a: Array, b: Array) -> Array:
    """``aᵀ b`` over all leading axes: the weight gradient, [a's last axis, b's last axis]."""
    leading = tuple(range(a.ndim - 1))

    def plain(a: Array, b: Array) -> Array:
        return _dot(a, b, leading, leading)

    def narrow_first(a: Array, b: Array) -> Array:
        # XLA:CPU transposes one operand, and computes it anew while it does, in an order that
        # cannot be vectorised: let it be the narrower one. Its layout is pinned, because a
        # bfloat16 product over the rows of both is upcast.
        if a.shape[-1] > b.shape[-1]:
            return _row_major(narrow_first(b, a)).T
        a_t = _row_major(a.reshape(-1, a.shape[-1]).T)
        return _dot(a_t, b.reshape(-1, b.shape[-1]), (1,), (0,))

    return lax.platform_dependent(a, b, cpu=narrow_first, default=plain)


def _sum_rows(g: Array) -> Array:
    leading = tuple(range(g.ndim - 1))
    if g.shape[-1] < WIDE:
        return g.sum(leading, dtype=jnp.float32)
    return _dot(jnp.ones(g.shape[:-1], g.dtype), g, leading, leading)


@jax.custom_vjp
def linear(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """``x @ kernel``, accumulated and returned in float32."""
    return _dot(x, kernel, (x.ndim - 1,), (0,))


def _linear_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, kernel), (x, kernel)


def _linear_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    g = g.astype(x.dtype)
    dx = _dot(g, kernel, (g.ndim - 1,), (1,)).astype(x.dtype)
    return dx, _outer(x, g).astype(kernel.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def attend(
    x: Float[Array, "*batch embed"], table: Float[Array, "vocab embed"]
) -> Float[Array, "*batch vocab"]:
    """``x @ tableᵀ``, accumulated and returned in float32: logits from a tied embedding."""
    return _dot(x, table, (x.ndim - 1,), (1,))


def _attend_forward(x: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return attend(x, table), (x, table)


def _attend_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, table = residuals
    g = g.astype(x.dtype)
    dx = _dot(g, table, (g.ndim - 1,), (0,)).astype(x.dtype)
    return dx, _outer(g, x).astype(table.dtype)


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "*batch out"], bias: Float[Array, "out"]) -> Float[Array, "*batch out"]:
    """``x + bias`` along the last axis."""
    return x + bias.astype(x.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), lambda _, g: (g, _sum_rows(g)))


class Linear(nn.Module):
    """``y = x W + b`` over the last ``num_inputs`` axes of ``x``.

    The kernel is created in its final shape ``[*inputs, *features]``, so the sharding table, LoRA
    and initializers see the real axes. Operands are cast to ``dtype``, and so is the result.

    Attributes:
        features: the output axes, such as ``(num_heads, head_dim)``.
        num_inputs: how many trailing axes of ``x`` are contracted.
        dtype: of the operands and the result; parameters are float32.
    """

    features: int | tuple[int, ...]
    num_inputs: int = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        features = (self.features,) if isinstance(self.features, int) else self.features
        inputs = x.shape[x.ndim - self.num_inputs :]
        batch = x.shape[: x.ndim - self.num_inputs]
        kernel = self.param("kernel", self.kernel_init, (*inputs, *features), jnp.float32)
        flat = kernel.astype(self.dtype).reshape(math.prod(inputs), math.prod(features))
        y = linear(x.astype(self.dtype).reshape(*batch, -1), flat)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
            y = add_bias(y, bias.reshape(-1))
        return y.astype(self.dtype).reshape(*batch, *features)
