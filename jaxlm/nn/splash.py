"""Attention by JAX's Pallas kernel for TPUs ("splash": sparse flash attention)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as kernel_masks,
)
from jaxtyping import Array, Float, Int

from jaxlm.nn.kernels import attend, refuse_dropout
from jaxlm.nn.masks import Visibility, Visible
from jaxlm.typing import Bias, PRNGKey

LANES = 128
"""Rows are filled up to a multiple of this, with positions that only see each other."""
BLOCK = 512
"""Queries, and keys, of a block, at most."""
PADDING = -(2**30)  # no segment's id


def splash_attention(
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length kv_heads head_dim"],
    value: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    mask: Visibility | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> Float[Array, "batch q_length heads head_dim"]:
    """As :func:`~jaxlm.nn.attention.dot_product_attention`, without a bias and without dropout.

    ``interpret`` computes the kernel's blocks one after the other, on any platform, for tests.
    """
    refuse_dropout("splash", dropout_rate, dropout_key)
    return attend(
        "splash",
        partial(_kernel, interpret=interpret),
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=scale,
    )


def _kernel(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"] | None,
    seen: Visible,
    interpret: bool,
) -> Float[Array, "batch length heads head_dim"]:
    batch, length, num_heads, _ = query.shape
    size = next(size for size in (BLOCK, 256, LANES) if length % size == 0 or size == LANES)
    more = -length % size
    if more and segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    if more:
        assert segment_ids is not None
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, more)), constant_values=PADDING)
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (query, key, value)
        )
    shape = length + more, length + more
    if seen.before is None and seen.after is None:
        mask: kernel_masks.Mask = kernel_masks.FullMask(shape)
    else:
        mask = kernel_masks.LocalMask(shape, (seen.before, seen.after), offset=0)
    sizes = kernels.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    run = kernels.make_splash_mha(
        kernel_masks.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (rearrange(x, "batch l heads d -> batch heads l d") for x in (query, key, value))
    ids = None if segment_ids is None else kernels.SegmentIds(segment_ids, segment_ids)
    one_row: Any = run  # typed as if it gave what its gradient needs, too
    out = jax.vmap(one_row)(q, k, v, ids)[:, :, :length]
    return rearrange(out, "batch heads l d -> batch l heads d")
