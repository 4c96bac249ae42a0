"""XLNet (Yang, Dai, Yang, Carbonell, Salakhutdinov and Le 2019, arXiv:1906.08237, section 2).

A post-norm Transformer whose attention knows distances and not positions (Transformer-XL, Dai et
al. 2019, arXiv:1901.02860, section 3.3), and in which tokens are predicted in any order: beside the
content stream, which fine-tuning has alone, runs a query stream, of the predicted positions, which
see what a mask shows them and never their own token. It differs from BERT's (``bert.py``) in that:
there are no position and no token-type embeddings, and no norm behind them; linear maps of
attention have no bias; token types are compared, not looked up (equal or not, so any numbers will
do); hidden states of earlier segments may be attended to, as a memory that goes in and comes out;
and the head is the token table and a bias.

As in the published code, scores are scaled after their three terms are added, sine and cosine stand
one behind the other, and the last hidden states drop out. Deliberate deviations: dropout falls on
one table of distances for all rows; a predicted position that may see nothing gets zeros, where the
code gives it the mean of all, its own token among them; and GELU is exact.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.errors import InputError
from jaxlm.models.heads import TiedLmHead
from jaxlm.models.model import check_numbers
from jaxlm.nn import masks
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.embed import Embed
from jaxlm.nn.feedforward import ACTIVATIONS, Activation, Mlp
from jaxlm.nn.norms import LayerNorm
from jaxlm.nn.relative import RelativeAttention, View, distance_table
from jaxlm.nn.stack import Remat, scan_stack
from jaxlm.sharding import constrain
from jaxlm.typing import Before, Hidden, Mask, Tokens

Memory = Float[Array, "layers batch memory embed"]  # what earlier segments gave to each layer


@dataclass(frozen=True, kw_only=True)
class XlnetConfig:
    """Sizes are those of the published base model."""

    vocab_size: int | None = None
    """Rows of the token table; None: the tokenizer's size, rounded up to a multiple of 64 and of
    the shards into which the mesh splits the table."""
    num_layers: int = 12
    hidden_dim: int = 768
    num_heads: int = 12
    mlp_dim: int = 3072
    max_length: int | None = None
    """The longest input; None = no limit."""
    attention: Literal["bi", "uni"] = "bi"
    """Whether a position sees all others, or none that is later."""
    clamp_length: int | None = None
    """Distances beyond it, forwards and backwards, count as it; None = none does."""
    activation: Activation = "gelu"
    """Inside the feed-forward blocks."""
    dropout_rate: float = 0.1
    """Dropout rate of embeddings, of distances, and of what each sub-layer adds and activates."""
    attention_dropout_rate: float = 0.1
    epsilon: float = 1e-12
    """Added to the variance by layer normalisation."""
    initializer_std: float = 0.02
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products and activations; None: float32, and in a training run bfloat16 on
    GPUs and TPUs."""
    unroll: int | None = None
    """Blocks compiled as one iteration of a loop over layers; None = no loop (see nn.stack)."""
    remat: Remat | None = None
    """What the backward pass recomputes: full, dots (all but matrix products), or None: nothing."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "hidden_dim", "mlp_dim"):
            if vars(self)[name] < 1:
                raise InputError(f"{name}={vars(self)[name]} is not above 0")
        for name in ("max_length", "clamp_length"):
            if (value := vars(self)[name]) is not None and value < 1:
                raise InputError(f"{name}={value} is not above 0; None = no limit")
        if self.hidden_dim % self.num_heads:
            raise InputError(
                f"hidden_dim={self.hidden_dim} is not divisible by num_heads={self.num_heads}"
            )
        if self.hidden_dim % 2:
            raise InputError(
                f"hidden_dim={self.hidden_dim} is odd: distances have as many sines as cosines"
            )
        check_numbers(self)

    def forward_flops(self, length: int, num_predicted: int) -> float:
        """FLOPs of one row through the content stream and the head, a multiply-add as two.

        The products alone: projections, attention over all ``length`` positions and twice as many
        distances (whose own projection serves the whole batch), and the vocabulary at
        ``num_predicted`` of them.
        """
        layer = self._query_flops(length) + 4 * self.hidden_dim**2
        head = 2 * self.hidden_dim * (self.vocab_size or 0)
        return float(length * self.num_layers * layer + num_predicted * head)

    def query_flops(self, length: int, num_predicted: int) -> float:
        """Those of the query stream, beside :meth:`forward_flops`, less those that it spares: of
        the last block's content stream it reads the keys and values alone."""
        return float((num_predicted * self.num_layers - length) * self._query_flops(length))

    def memory_flops(self, memory: int, length: int) -> float:
        """Those of reading a memory, what enters each block, and of attending to it.

        The former, of which there is no backward pass, count a third.
        """
        h = self.hidden_dim
        attended = self.num_layers * memory * (6 * length * h + 4 * h * h)
        entered = (self.num_layers - 1) / self.num_layers
        return self.forward_flops(memory, 0) * entered / 3 + float(attended)

    def _query_flops(self, length: int) -> int:
        """Those of a position in a block, but for its key and value."""
        h, m = self.hidden_dim, self.mlp_dim
        return 2 * (2 * h * h + 2 * h * m) + 8 * length * h

    @property
    def unrolls_layers(self) -> bool:
        """Whether the blocks are computed without a loop."""
        return self.unroll is None

    @property
    def is_causal(self) -> bool:
        """Whether no position sees a later one."""
        return self.attention == "uni"

    def with_dropout(self, rate: float) -> "XlnetConfig":
        """The same with that rate in all places."""
        return replace(self, dropout_rate=rate, attention_dropout_rate=rate)

    def with_vocab_size(self, rows: int) -> "XlnetConfig":
        """The same with a token table of so many rows; the head's bias makes those added rare."""
        return replace(self, vocab_size=rows)

    def make_lm_head(self) -> TiedLmHead:
        """Logits over the vocabulary, by the token table and a bias."""
        return TiedLmHead(use_bias=True)

    def make(self) -> "Xlnet":
        """The model without a head. ``vocab_size`` must be known by now."""
        if self.vocab_size is None:
            raise InputError("vocab_size=None: set it to the size of the tokenizer's vocabulary")
        return Xlnet(config=self)


MINI = XlnetConfig(num_layers=4, hidden_dim=256, num_heads=4, mlp_dim=1024)
BASE = XlnetConfig()
LARGE = XlnetConfig(num_layers=24, hidden_dim=1024, num_heads=16, mlp_dim=4096)


class Streams(NamedTuple):
    """Hidden states of a row, of its predicted positions, and what went into each layer."""

    content: Hidden
    query: Float[Array, "batch masked embed"] | None
    inputs: Float[Array, "layers batch length embed"] | None = None


def remember(
    memory: Memory | None,
    inputs: Float[Array, "layers batch length embed"],
    length: int,
    reuse: int | None = None,
) -> Float[Array, "layers batch remembered embed"]:
    """The memory for the next segment: the last ``length`` of what was seen; no gradient passes.

    Args:
        inputs: ``Streams.inputs`` of this segment, of which the first ``reuse`` are kept (None:
            all): the rest is read again, at the front of the next one.
    """
    seen = inputs[:, :, :reuse]
    seen = seen if memory is None else jnp.concatenate([memory.astype(seen.dtype), seen], axis=2)
    return lax.stop_gradient(seen[:, :, max(seen.shape[2] - length, 0) :])


class XlnetBlock(nn.Module):
    """Post-norm, on each stream: ``x = norm(x + attention(x, content)); x = norm(x + mlp(x))``."""

    config: XlnetConfig

    def setup(self) -> None:
        c = self.config
        dtype, init = jnp.dtype(c.dtype or "float32"), nn.initializers.normal(c.initializer_std)
        self.attention = RelativeAttention(
            c.hidden_dim,
            c.num_heads,
            c.hidden_dim // c.num_heads,
            dropout_rate=c.attention_dropout_rate,
            dtype=dtype,
            kernel_init=init,
        )
        self.attention_norm = LayerNorm(c.epsilon, dtype)
        activation = ACTIVATIONS[c.activation]
        self.mlp = Mlp(
            c.mlp_dim, activation, dtype=dtype, kernel_init=init, dropout_rate=c.dropout_rate
        )
        self.mlp_norm = LayerNorm(c.epsilon, dtype)
        self.dropout = Dropout(c.dropout_rate)

    def __call__(
        self,
        streams: Streams,
        memory: Float[Array, "batch memory embed"] | None,
        table: Float[Array, "1 distances embed"],
        views: tuple[View, View | None],
        deterministic: bool,
    ) -> Streams:
        seen = streams.content
        length = seen.shape[1]
        if memory is not None:
            seen = jnp.concatenate([memory.astype(seen.dtype), seen], axis=1)
        opened = self.attention.open(seen, table)

        def advance(x: Hidden, view: View) -> Hidden:
            y = self.attention(x, opened, view, length, deterministic)
            x = self.attention_norm(x + self.dropout(y, deterministic=deterministic))
            y = self.mlp(x, deterministic=deterministic)
            x = self.mlp_norm(x + self.dropout(y, deterministic=deterministic))
            return constrain(x, ("batch", "length", "embed"))

        content = advance(streams.content, views[0])
        if streams.query is None or views[1] is None:
            return Streams(content, None)
        return Streams(content, advance(streams.query, views[1]))


class Xlnet(nn.Module):
    """Tokens to hidden states ``[batch, length, embed]``, and to those of predicted positions."""

    config: XlnetConfig

    def setup(self) -> None:
        c = self.config
        assert c.vocab_size is not None  # make() has seen to it
        init = nn.initializers.normal(c.initializer_std)
        dtype = jnp.dtype(c.dtype or "float32")
        self.token_embed = Embed(c.vocab_size, c.hidden_dim, dtype, init, axis="vocab")
        self.query_embed = self.param("query_embed", init, (c.hidden_dim,), jnp.float32)
        self.dropout = Dropout(c.dropout_rate)
        self.layers = XlnetBlock(c)

    def __call__(
        self,
        tokens: Tokens,
        *,
        token_type_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        mask: Mask | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        """The content stream.

        Args:
            tokens: ids below ``vocab_size``.
            token_type_ids: any numbers, of which equal ones are one text; ``None``, all equal.
            positions: not used: distances are those along the row, and so is what a document or
                padding moves all of.
            segment_ids: positions of equal id attend to each other; ``None``, no restriction.
            mask: further restriction of attention; each position sees itself in any case.
            deterministic: no dropout; otherwise pass ``rngs={"dropout": key}`` to ``apply``.
        """
        return self.streams(
            tokens,
            token_type_ids=token_type_ids,
            segment_ids=segment_ids,
            mask=mask,
            deterministic=deterministic,
        ).content

    def predict(
        self,
        tokens: Tokens,
        predicted: Int[Array, "batch masked"],
        *,
        mask: Mask,
        token_type_ids: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        before: Before | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch masked embed"]:
        """The query stream of the positions ``predicted``, which see what ``mask`` shows.

        That is of the row's own positions; those of the content stream see themselves as well.
        ``before`` are tokens in front of each row, of which the first so many are read first, and
        are a memory that all positions see.
        """
        memory = remembered = None
        if before is not None:
            earlier, lengths = before
            remembered = jnp.arange(earlier.shape[1])[None, :] < lengths[:, None]
            ids = jnp.where(remembered, 0, -1)
            read = self.streams(earlier, segment_ids=ids, deterministic=deterministic)
            assert read.inputs is not None
            memory = remember(None, read.inputs, earlier.shape[1])
        query = self.streams(
            tokens,
            predicted,
            token_type_ids=token_type_ids,
            segment_ids=segment_ids,
            mask=mask,
            memory=memory,
            remembered=remembered,
            deterministic=deterministic,
        ).query
        assert query is not None
        return query

    def streams(
        self,
        tokens: Tokens,
        predicted: Int[Array, "batch masked"] | None = None,
        *,
        token_type_ids: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        mask: Mask | None = None,
        memory: Memory | None = None,
        remembered: Bool[Array, "batch memory"] | None = None,
        deterministic: bool = True,
    ) -> Streams:
        """Both streams, and what went into each layer, for :func:`remember`.

        ``memory`` is in front of all rows, is of the first text, and is seen from everywhere, or
        what is ``remembered`` of it.
        """
        c = self.config
        length = tokens.shape[1]
        if c.max_length is not None and length > c.max_length:
            raise InputError(f"rows of {length} tokens do not fit max_length={c.max_length}")
        size = 0 if memory is None else memory.shape[2]
        if remembered is None:
            remembered = jnp.ones((1, size), bool)
        dtype = jnp.dtype(c.dtype or "float32")
        drop = lambda x: self.dropout(x, deterministic=deterministic)
        distances = distance_table(size + length, length, c.hidden_dim, c.clamp_length)
        table = drop(distances[None].astype(dtype))
        query = None
        if predicted is not None:
            shape = (*predicted.shape, c.hidden_dim)
            query = drop(jnp.broadcast_to(self.query_embed.astype(dtype), shape))
        content = constrain(drop(self.token_embed(tokens)), ("batch", "length", "embed"))
        views = self._views(predicted, token_type_ids, segment_ids, mask, length, remembered)

        def body(block: nn.Module, x: Streams, memory: Array | None) -> tuple[Streams, Array]:
            return block(x, memory, table, views, deterministic), x.content

        x = Streams(content, query)
        x, inputs = scan_stack(
            body, self.layers, c.num_layers, x, memory, unroll=c.unroll, remat=c.remat
        )
        return Streams(drop(x.content), None if x.query is None else drop(x.query), inputs)

    def _views(
        self,
        predicted: Int[Array, "batch masked"] | None,
        token_type_ids: Int[Array, "batch length"] | None,
        segment_ids: Int[Array, "batch length"] | None,
        mask: Mask | None,
        length: int,
        remembered: Bool[Array, "#batch memory"],
    ) -> tuple[View, View | None]:
        """What each stream sees."""
        if segment_ids is not None:
            same = masks.segments(segment_ids, segment_ids)
            mask = same if mask is None else mask & same
        if self.config.is_causal:
            mask = masks.causal(length, mask=mask)
        other = None
        if token_type_ids is not None:
            of_keys = jnp.pad(token_type_ids, ((0, 0), (remembered.shape[1], 0)))
            other = token_type_ids[:, :, None] != of_keys[:, None, :]

        def with_memory(seen: Array) -> Array:  # [batch, 1, q_length, memory + length]
            rows = jnp.broadcast_shapes(remembered.shape[:1], seen.shape[:1])
            shape = (*rows, *seen.shape[1:3], remembered.shape[1])
            front = jnp.broadcast_to(remembered[:, None, None, :], shape)
            return jnp.concatenate([front, jnp.broadcast_to(seen, (*rows, *seen.shape[1:]))], -1)

        content = None
        if mask is not None:
            content = with_memory(mask | jnp.eye(length, dtype=bool)[None, None])
        if predicted is None:
            return View(content, other, None), None
        pick = lambda rows: jnp.take_along_axis(rows, predicted[:, :, None], axis=1)
        seen = None
        if mask is not None:
            rows = jnp.broadcast_to(mask[:, 0], (len(predicted), *mask.shape[2:]))
            seen = with_memory((pick(rows) if rows.shape[1] > 1 else rows)[:, None])
        of_queries = None if other is None else pick(other)
        return View(content, other, None), View(seen, of_queries, predicted)
