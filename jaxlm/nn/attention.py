"""Scaled dot-product attention and its multi-head module (Vaswani et al. 2017, section 3.2)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlm.nn import custom_vjp, masks
from jaxlm.nn.cache import LayerCache
from jaxlm.nn.dropout import dropout
from jaxlm.nn.linear import Linear
from jaxlm.nn.masks import Visibility, Visible
from jaxlm.nn.positions import Rotary, rotate
from jaxlm.nn.products import product
from jaxlm.sharding import constrain
from jaxlm.typing import Bias, Dtype, Hidden, PRNGKey


@custom_vjp.attention(dropout)
def dot_product_attention(
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length heads head_dim"],
    value: Float[Array, "batch kv_length heads head_dim"],
    *,
    mask: Visibility | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
    scale: float | None = None,
) -> Float[Array, "batch q_length heads head_dim"]:
    """``softmax(q kᵀ scale + bias) v`` (equation 1); softmax in float32.

    The scale is ``1 / sqrt(head_dim)`` unless told. ``dropout_key`` draws which attention
    weights are dropped; without it none are. Hand-written gradient: forward mode only inside
    :func:`custom_vjp.plain`.
    """
    scores = product("bqhd,bkhd->bhqk", query, key)
    scores *= query.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        scores += bias
    if mask is not None:
        seen = masks.dense(mask, *scores.shape[2:])
        scores = scores if seen is None else jnp.where(seen, scores, masks.NEGATIVE)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    if dropout_key is not None and dropout_rate > 0:
        weights = dropout(weights, dropout_rate, dropout_key)
    return product("bhqk,bkhd->bqhd", weights, value).astype(query.dtype)


def grouped_attention(
    attend: Callable[..., Float[Array, "..."]],
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "batch kv_length kv_heads head_dim"],
    value: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    mask: Visibility | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
) -> Float[Array, "batch q_length heads head_dim"]:
    """``attend`` where consecutive heads of queries share one of keys and values.

    Ainslie et al. (2023, arXiv:2305.13245, section 2.2). Queries of a group are laid out as more
    positions of one head, so that no key is repeated.
    """
    options: dict[str, Any] = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
    group = query.shape[2] // key.shape[2]
    if group == 1:
        return attend(query, key, value, mask=mask, bias=bias, **options)

    def fold(x: Array | None) -> Array | None:
        if x is None or x.shape[1:3] == (1, 1):
            return x  # the same for all heads and queries
        heads = (query.shape[2], *x.shape[2:]) if x.shape[1] > 1 else (group, *x.shape[2:])
        x = jnp.broadcast_to(x, (x.shape[0], heads[0], query.shape[1], x.shape[3]))
        return rearrange(x, "batch (kv group) q k -> batch kv (q group) k", group=group)

    if isinstance(mask, Visible):
        ids = mask.q_segment_ids
        mask = replace(
            mask,
            q_segment_ids=None if ids is None else jnp.repeat(ids, group, axis=1),
            more=fold(mask.more),
            group=group * mask.group,
        )
    else:
        mask = fold(mask)
    rows = rearrange(query, "batch q (kv group) d -> batch (q group) kv d", group=group)
    out = attend(rows, key, value, mask=mask, bias=fold(bias), **options)
    return rearrange(out, "batch (q group) kv d -> batch q (kv group) d", group=group)


def shared_attention(
    attend: Callable[..., Float[Array, "..."]],
    query: Float[Array, "batch q_length heads head_dim"],
    key: Float[Array, "sources kv_length kv_heads head_dim"],
    value: Float[Array, "sources kv_length kv_heads head_dim"],
    *,
    mask: Visibility | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKey | None = None,
) -> Float[Array, "batch q_length heads head_dim"]:
    """:func:`grouped_attention` where consecutive rows of queries share one of keys and values.

    Such as the beams of a search, which continue one source: they are laid out as more positions
    of one row, so that no key is repeated.
    """
    options: dict[str, Any] = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
    sharing = query.shape[0] // key.shape[0]
    if sharing == 1:
        return grouped_attention(attend, query, key, value, mask=mask, bias=bias, **options)

    def fold(x: Array | None) -> Array | None:
        if x is None or (x.shape[0], x.shape[2]) == (1, 1):
            return x  # the same for all rows and queries
        x = jnp.broadcast_to(x, (query.shape[0], x.shape[1], query.shape[1], x.shape[3]))
        return rearrange(x, "(batch n) heads q k -> batch heads (n q) k", n=sharing)

    seen = fold(masks.dense(mask, query.shape[1], key.shape[1]))
    rows = rearrange(query, "(batch n) q heads d -> batch (n q) heads d", n=sharing)
    out = grouped_attention(attend, rows, key, value, mask=seen, bias=fold(bias), **options)
    return rearrange(out, "batch (n q) heads d -> (batch n) q heads d", n=sharing)


class MultiHeadAttention(nn.Module):
    """Attention of ``x`` over itself in ``num_heads`` subspaces (section 3.2.2).

    What may be attended to enters as data: ``mask`` (True = may; an array, or
    :class:`~jaxlm.nn.masks.Visible`), ``bias`` (added to the scores), ``segment_ids`` (equal ids
    see each other); so do the angles by which queries and keys are
    turned (``rotary``). Returns the projection of all heads, ``[batch, length, embed]``.

    Attention over something else, such as what an encoder has read, is
    ``attention.over(x, *attention.project(source))``.

    Attributes:
        attend: how the heads attend: :func:`dot_product_attention`, or another equation with its
            arguments, whose gradient JAX finds.
        num_kv_heads: heads of keys and values, each for as many consecutive heads of queries;
            None: one for each (:func:`grouped_attention`).
        out_init: initializer of ``out``, if it is not ``kernel_init``.
        query_init: that of ``query``.
    """

    num_heads: int
    head_dim: int
    dropout_rate: float = 0.0
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    attend: Callable[..., Float[Array, "..."]] = dot_product_attention
    num_kv_heads: int | None = None
    out_init: Callable[..., Array] | None = None
    query_init: Callable[..., Array] | None = None

    def setup(self) -> None:
        kv_shape = self.num_kv_heads or self.num_heads, self.head_dim
        query_init = self.query_init or self.kernel_init
        self.query = self._linear((self.num_heads, self.head_dim), query_init)
        self.key = self._linear(kv_shape, self.kernel_init)
        self.value = self._linear(kv_shape, self.kernel_init)

    def __call__(
        self,
        x: Hidden,
        *,
        mask: Visibility | None = None,
        bias: Bias | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        rotary: Rotary | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        if segment_ids is not None:
            mask = masks.visible(segment_ids, mask)
        return self.extend(
            x, None, mask=mask, bias=bias, rotary=rotary, deterministic=deterministic
        )[0]

    def extend(
        self,
        x: Hidden,
        cache: LayerCache | None,
        *,
        mask: Visibility | None = None,
        bias: Bias | None = None,
        rotary: Rotary | None = None,
        deterministic: bool = True,
    ) -> tuple[Hidden, LayerCache | None]:
        """Attention of ``x`` over all slots of the cache, after its own keys are written there.

        Which slots is up to the ``mask`` (``Cache.open``). Without a cache, over ``x`` itself.
        """
        key, value = self.project(x, rotary=rotary)
        if cache is not None:
            cache = cache.write(key, value)
            key, value = cache.read(x.shape[1] * self.num_heads // key.shape[2])
        options: dict[str, Any] = {"mask": mask, "bias": bias, "rotary": rotary}
        return self.over(x, key, value, **options, deterministic=deterministic), cache

    def project(
        self, source: Float[Array, "batch kv_length embed"], *, rotary: Rotary | None = None
    ) -> tuple[
        Float[Array, "batch kv_length kv_heads head_dim"],
        Float[Array, "batch kv_length kv_heads head_dim"],
    ]:
        """The keys and values of what is attended to, for any number of calls of :meth:`over`."""
        key, value = _pinned(self.key(source)), _pinned(self.value(source))
        return key if rotary is None else rotate(key, rotary), value

    @nn.compact
    def over(
        self,
        x: Float[Array, "batch q_length embed"],
        key: Float[Array, "sources kv_length kv_heads head_dim"],
        value: Float[Array, "sources kv_length kv_heads head_dim"],
        *,
        mask: Visibility | None = None,
        bias: Bias | None = None,
        rotary: Rotary | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch q_length embed"]:
        """Attention of ``x`` over these keys and values.

        Where they have fewer rows, as many consecutive rows of ``x`` share each of them.
        """
        query = _pinned(self.query(x))
        if rotary is not None:
            query = rotate(query, rotary)
        drops = not deterministic and self.dropout_rate > 0
        out = shared_attention(
            self.attend,
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            dropout_rate=self.dropout_rate,
            dropout_key=self.make_rng("dropout") if drops else None,
        )
        init = self.out_init or self.kernel_init
        return self._linear(x.shape[-1], init, num_inputs=2, name="out")(out)

    def _linear(
        self,
        features: int | tuple[int, int],
        init: Callable[..., Array],
        num_inputs: int = 1,
        name: str | None = None,
    ) -> Linear:
        return Linear(
            features,
            num_inputs,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=init,
            name=name,
        )


def _pinned(x: Float[Array, "batch length heads head_dim"]) -> Array:
    return constrain(x, ("batch", "length", "heads", "head_dim"))
