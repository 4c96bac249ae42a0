"""What attention by a kernel has in common: XLA cannot split one, so each device runs its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlm import sharding
from jaxlm.errors import InputError
from jaxlm.nn.blockwise import blockwise_attention
from jaxlm.nn.masks import Visibility, Visible, visible
from jaxlm.typing import Bias, PRNGKey

SHORT = 256
"""Rows below this many positions are not worth a kernel."""
Kernel = Callable[..., Float[Array, "batch q_length heads head_dim"]]
"""``kernel(query, key, value, segment_ids, seen)``: ids ``[batch, length]`` or None, and a
:class:`Visible` that says the rest: ``before`` and ``after``."""


def refuse_dropout(name: str, rate: float, key: PRNGKey | None) -> None:
    """Raise where a kernel, which drops none, would have to drop attention weights."""
    if key is not None and rate > 0:
        raise InputError(
            f"{name} attention drops no weights here, and the rate is {rate}: set "
            "attention_dropout_rate=0, or attention=blockwise"
        )


def attend(
    name: str,
    kernel: Kernel,
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length kv_heads head_dim"],
    value: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    mask: Visibility | None,
    bias: Bias | None,
    scale: float | None,
) -> Float[Array, "batch q_length heads head_dim"]:
    """By the kernel, on each device of the mesh in use for its own rows and heads.

    A row over itself; what reads a cache or another row, or is hidden by an array, goes block by
    block, and short rows plainly.
    """
    if bias is not None:
        raise InputError(f"{name} attention takes no bias: use attention=plain")
    seen = mask if isinstance(mask, Visible) else visible(mask=mask)
    group = seen.group
    is_own = seen.same_ids or seen.q_segment_ids is None
    is_own = is_own and query.shape[1] == key.shape[1] * group and seen.more is None
    if not is_own or key.shape[1] < SHORT:
        return blockwise_attention(query, key, value, mask=mask, scale=scale)
    if sharding.is_split("length"):
        raise InputError(
            f"{name} attention needs whole rows, which mesh.sequence splits: use "
            "attention=blockwise, or mesh.sequence=1"
        )
    query = rearrange(query, "batch (q group) kv d -> batch q (kv group) d", group=group)
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    ids = seen.kv_segment_ids
    run = lambda query, key, value, ids: kernel(query, key, value, ids, seen)
    if (used := sharding.in_use()) is not None:
        mesh, rules = used
        axes = ("batch", "length", "heads", "head_dim")
        at = lambda x: sharding.spec(axes[: x.ndim], mesh, x.shape, rules)
        specs = at(query), at(key), at(value), PartitionSpec() if ids is None else at(ids)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    out = run(query, key, value, ids)
    return rearrange(out, "batch q (kv group) d -> batch (q group) kv d", group=group)


def ranges(
    segment_ids: Int[Array, "batch length"] | None, seen: Visible, length: int
) -> tuple[Int[Array, "#batch length"], Int[Array, "#batch length"]]:
    """The keys that each position sees: from the first number up to the second, exclusive.

    A segment is a run of equal ids; ids that return later in the row are another.
    """
    places = jnp.arange(length)[None, :]
    start, end = jnp.zeros_like(places), jnp.full_like(places, length)
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
        last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
        start = jax.lax.cummax(jnp.where(first, places, 0), axis=1)
        end = jax.lax.cummin(jnp.where(last, places + 1, length), axis=1, reverse=True)
    if seen.before is not None:
        start = jnp.maximum(start, places - seen.before)
    if seen.after is not None:
        end = jnp.minimum(end, places + seen.after + 1)
    return start.astype(jnp.int32), end.astype(jnp.int32)
