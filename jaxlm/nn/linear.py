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

from jaxlm.typing import Dtype, PRNGKey


def _dot(a: Array, b: Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...]) -> Array:
    return lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32)


def _row_major(x: Array) -> Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


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
    return g.sum(tuple(range(g.ndim - 1)), dtype=jnp.float32)


def _add_bias(y: Array, bias: Array) -> Array:
    return y + jnp.expand_dims(bias.astype(y.dtype), tuple(range(y.ndim - 1)))


@jax.custom_vjp
def linear(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, "outputs"] | None = None,
) -> Float[Array, "*batch outputs"]:
    """``x @ kernel + bias``, accumulated and returned in float32.

    In bfloat16 the product is rounded before the bias is added, but for CPUs.
    """
    return _linear_forward(x, kernel, bias)[0]


def _linear_forward(
    x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    # The bare product, because the remat policies of stack.py do not look into a custom_vjp.
    y = _dot(x, kernel, (x.ndim - 1,), (0,))
    if bias is None:
        return y, (x, kernel, bias)
    if x.dtype != y.dtype:
        # To what the result will be in any case: a GPU's product then writes half the bytes.
        rounded = lambda y: y.astype(x.dtype).astype(y.dtype)
        y = lax.platform_dependent(y, cpu=lambda y: y, default=rounded)
    return _add_bias(y, bias), (x, kernel, bias)


def _linear_backward(
    residuals: tuple[Array, Array, Array | None], g: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = residuals
    g = g.astype(x.dtype)
    dx = _dot(g, kernel, (g.ndim - 1,), (1,)).astype(x.dtype)
    dbias = None if bias is None else _sum_rows(g).astype(bias.dtype)
    return dx, _outer(x, g).astype(kernel.dtype), dbias


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def attend(
    x: Float[Array, "*batch embed"],
    table: Float[Array, "vocab embed"],
    bias: Float[Array, "vocab"],
) -> Float[Array, "*batch vocab"]:
    """``x @ tableᵀ + bias``, in float32: logits from a tied embedding."""
    return _attend_forward(x, table, bias)[0]


def _attend_forward(x: Array, table: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    def plain(x: Array, table: Array, bias: Array) -> Array:
        return _add_bias(_dot(x, table, (x.ndim - 1,), (1,)), bias)

    def widened(x: Array, table: Array, bias: Array) -> Array:
        # Adding to the wide logits is a pass over memory as long as the product itself.
        return _dot(_append(x, 1), _append(table, bias), (x.ndim - 1,), (1,))

    logits = lax.platform_dependent(x, table, bias, cpu=widened, default=plain)
    return logits, (x, table, bias)


def _attend_backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, table, bias = residuals
    g = g.astype(x.dtype)

    def plain(x: Array, table: Array, bias: Array, g: Array) -> tuple[Array, Array, Array]:
        return _dot(g, table, (g.ndim - 1,), (0,)), _outer(g, x), _sum_rows(g)

    def widened(x: Array, table: Array, bias: Array, g: Array) -> tuple[Array, Array, Array]:
        dx = _dot(g, _append(table, bias), (g.ndim - 1,), (0,))
        both = _outer(g, _append(x, 1))
        return dx[..., :-1], both[:, :-1], both[:, -1]

    gradients = lax.platform_dependent(x, table, bias, g, cpu=widened, default=plain)
    dx, dtable, dbias = (d.astype(v.dtype) for d, v in zip(gradients, residuals, strict=True))
    return dx, dtable, dbias


def _append(x: Array, column: Array | int) -> Array:
    """``x`` with one more last column."""
    column = jnp.broadcast_to(jnp.asarray(column, x.dtype), x.shape[:-1])
    return jnp.concatenate([x, column[..., None]], axis=-1)


attend.defvjp(_attend_forward, _attend_backward)


def product(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """``einsum(spec, a, b)``, accumulated and returned in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def product_gradients(
    spec: str, a: Float[Array, "..."], b: Float[Array, "..."], g: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Gradients of :func:`product` for that of its result, by operands that keep their precision.

    Those of plain ``einsum`` would be upcast to the float32 of ``g``. Every letter of ``spec``
    stands in two of its three terms.
    """
    left, out = spec.split("->")
    a_axes, b_axes = left.split(",")

    def plain(g: Array, a: Array) -> Array:
        return product(f"{out},{a_axes}->{b_axes}", g.astype(a.dtype), a)

    def rows_last(g: Array, a: Array) -> Array:
        # XLA:CPU upcasts a bfloat16 product over the rows of both, as in _outer: the smaller one
        # is transposed, and the result stays in the order of its operands until it is one.
        (x, x_axes), (y, y_axes) = sorted(
            [(a, a_axes), (g.astype(a.dtype), out)], key=lambda operand: operand[0].size
        )
        both = [c for c in x_axes if c in y_axes]
        batch = "".join(c for c in both if c in b_axes)
        rows = "".join(c for c in both if c not in b_axes)
        x_only, y_only = ("".join(c for c in axes if c not in both) for axes in (x_axes, y_axes))
        x = _row_major(jnp.einsum(f"{x_axes}->{batch}{x_only}{rows}", x))
        db = product(f"{batch}{x_only}{rows},{y_axes}->{batch}{x_only}{y_only}", x, y)
        return jnp.einsum(f"{batch}{x_only}{y_only}->{b_axes}", db)

    da = product(f"{out},{b_axes}->{a_axes}", g.astype(b.dtype), b)
    db = lax.platform_dependent(g, a, cpu=rows_last, default=plain)
    return da.astype(a.dtype), db.astype(b.dtype)


class Linear(nn.Module):
    """``y = x W + b`` over the last ``num_inputs`` axes of ``x``.

    The kernel has its final shape ``[*inputs, *features]``, so the sharding table and LoRA see the
    real axes; the initializer sees a matrix, from which alone it can tell inputs from outputs.
    Operands are cast to ``dtype``, and so is the result.

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
        return y.astype(self.dtype).reshape(*batch, *features)
