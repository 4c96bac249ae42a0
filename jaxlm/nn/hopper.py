"""Attention by kernels for NVIDIA's GPUs, Hopper first: tokamax's, and cuDNN's.

Both in half precision and without dropout. tokamax drops none; cuDNN does, but JAX fixes its seed
when it compiles, so that every step and every layer would drop the same weights.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import InputError
from jaxlm.nn.kernels import attend, ranges, refuse_dropout
from jaxlm.nn.masks import Visibility, Visible
from jaxlm.typing import Bias, PRNGKey


def tokamax_attention(
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length kv_heads head_dim"],
    value: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    mask: Visibility | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
    scale: float | None = None,
    implementation: Callable[..., Array] | None = None,
) -> Float[Array, "batch q_length heads head_dim"]:
    """As :func:`~jaxlm.nn.attention.dot_product_attention`, without a bias and without dropout.

    Each position sees one range of keys: its segment, which must be a run of equal ids, and its
    window. ``implementation`` stands for tokamax's kernel, for tests.
    """
    refuse_dropout("tokamax", dropout_rate, dropout_key)
    try:
        # The public function takes no ranges.
        from tokamax._src.ops.attention import (  # pyright: ignore[reportMissingImports]
            base,
            pallas_mosaic_gpu,
        )
    except ImportError as error:
        raise InputError(
            f"attention=tokamax needs a package ({error}): pip install tokamax, from Python 3.12 "
            "on, or use attention=blockwise"
        ) from error
    run = implementation or pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()

    def kernel(
        query: Array, key: Array, value: Array, ids: Int[Array, "b l"] | None, seen: Visible
    ) -> Array:
        start, end = (x[:, None] for x in ranges(ids, seen, query.shape[1]))  # the same for heads
        return run(query, key, value, logits_scale=1.0, mask=base.Mask(k_start=start, k_end=end))

    return attend(
        "tokamax",
        kernel,
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=scale,
    )


def cudnn_attention(
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length kv_heads head_dim"],
    value: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    mask: Visibility | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
    scale: float | None = None,
    implementation: Any = "cudnn",
) -> Float[Array, "batch q_length heads head_dim"]:
    """As :func:`~jaxlm.nn.attention.dot_product_attention`, without bias, dropout and window.

    A row is one segment with padding (ids below 0) behind it, which sees what the others see, or
    padding alone. A row of several segments gives NaN, so that it is not taken for one.
    ``implementation`` is that of ``jax.nn.dot_product_attention``.
    """
    refuse_dropout("cuDNN", dropout_rate, dropout_key)
    if isinstance(mask, Visible) and (mask.before, mask.after) not in ((None, None), (None, 0)):
        raise InputError("cuDNN attention has no window: use attention=blockwise")

    def kernel(
        query: Array, key: Array, value: Array, ids: Int[Array, "b l"] | None, seen: Visible
    ) -> Array:
        options: Any = {"scale": 1.0, "is_causal": seen.after == 0}
        # One at least: a softmax over no keys is no number.
        lengths = None if ids is None else (ids >= 0).sum(1, dtype=jnp.int32).clip(1)
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            key_value_seq_lengths=lengths,
            implementation=implementation,
            **options,
        )
        if ids is None:
            return out
        is_one = ((ids == ids[:, :1]) | (ids < 0)).all(1) & ((ids[:, 0] >= 0) | (ids < 0).all(1))
        return jnp.where(is_one[:, None, None, None], out, jnp.nan)

    return attend(
        "cuDNN",
        kernel,
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=scale,
    )
