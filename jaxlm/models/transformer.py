"""The Transformer (Vaswani et al. 2017, arXiv:1706.03762, section 3): an encoder and a decoder.

It is as published, and nothing else: post-norm blocks, sinusoids for positions, ReLU, one table
for the tokens of both sides and for the logits (section 3.4), dropout behind embeddings and
sub-layers (section 5.4), and attention without biases. Its decoder differs from GPT-2
(``gpt2.py``) in that each block also attends to what the encoder has read. Kernels are drawn as
Glorot and Bengio (2010) do, of which the paper does not speak, but its code does. Beyond the paper,
sources may have a vocabulary, and so a table, of their own.
"""

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import InputError
from jaxlm.models.heads import TiedLmHead
from jaxlm.models.model import check_numbers
from jaxlm.nn import cache, masks
from jaxlm.nn.attention import MultiHeadAttention
from jaxlm.nn.cache import DecoderCache, DecoderLayerCache
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.embed import Embed
from jaxlm.nn.feedforward import ACTIVATIONS, Mlp
from jaxlm.nn.norms import LayerNorm
from jaxlm.nn.positions import sinusoids
from jaxlm.nn.stack import Remat, apply_stack, extend_stack, project_stack
from jaxlm.sharding import constrain
from jaxlm.typing import Dtype, Encoded, Hidden, Mask, SourceMask, Tokens


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes are those of the base model (table 3)."""

    vocab_size: int | None = None
    """Rows of the token table; None: the tokenizer's size, rounded up to a multiple of 64 and of
    the shards into which the mesh splits the table."""
    source_vocab_size: int | None = None
    """Rows of a token table of the encoder's own, for sources with a tokenizer of their own, whose
    size decides where there is one; None: the encoder reads with the decoder's table."""
    num_tokens: int | None = None
    """Tokens that there are, if the table has more rows, which then are never predicted; None: all
    rows are tokens."""
    num_layers: int = 6
    """Blocks of the encoder."""
    num_decoder_layers: int | None = None
    """Blocks of the decoder; None: as many as the encoder's."""
    hidden_dim: int = 512
    num_heads: int = 8
    mlp_dim: int = 2048
    dropout_rate: float = 0.1
    """Dropout rate of embeddings and of what each sub-layer adds."""
    epsilon: float = 1e-6
    """Added to the variance by layer normalisation."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products and activations; None: float32, and in a training run bfloat16 on
    GPUs and TPUs."""
    unroll: int | None = None
    """Blocks compiled as one iteration of a loop over layers; None = no loop (see nn.stack)."""
    remat: Remat | None = None
    """What the backward pass recomputes: full, dots (all but matrix products), or None: nothing."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_decoder_layers", "num_heads", "hidden_dim", "mlp_dim"):
            if (value := vars(self)[name]) is not None and value < 1:
                raise InputError(f"{name}={value} is not above 0")
        if self.hidden_dim % self.num_heads:
            raise InputError(
                f"hidden_dim={self.hidden_dim} is not divisible by num_heads={self.num_heads}"
            )
        if self.hidden_dim % 2:
            raise InputError(
                f"hidden_dim={self.hidden_dim} is not even: positions have a sine and a cosine"
            )
        check_numbers(self)

    @property
    def decoder_layers(self) -> int:
        """``num_decoder_layers``, resolved."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def max_length(self) -> None:
        """Any: sinusoids have no end."""
        return None

    def forward_flops(self, length: int, num_predicted: int) -> float:
        """FLOPs of a source of ``length`` tokens and a target of ``num_predicted``.

        The products alone, a multiply-add as two: projections, attention over all positions (of
        the target's, half are masked, but computed), and the vocabulary at each of the target.
        """
        h, m = self.hidden_dim, self.mlp_dim
        encoder = 2 * (4 * h * h + 2 * h * m) + 4 * length * h
        decoder = 2 * (6 * h * h + 2 * h * m) + 4 * (num_predicted + length) * h
        source = self.num_layers * encoder + self.decoder_layers * 2 * 2 * h * h
        target = self.decoder_layers * decoder + 2 * h * (self.vocab_size or 0)
        return float(length * source + num_predicted * target)

    @property
    def unrolls_layers(self) -> bool:
        """Whether the blocks are computed without a loop."""
        return self.unroll is None

    @property
    def is_causal(self) -> bool:
        """The decoder is, but all of it sees all of the source."""
        return False

    def with_dropout(self, rate: float) -> "TransformerConfig":
        """The same with that rate."""
        return replace(self, dropout_rate=rate)

    def with_vocab_size(self, rows: int) -> "TransformerConfig":
        """The same with a token table of so many rows; what is added is never predicted."""
        return replace(self, vocab_size=rows, num_tokens=self.num_tokens or self.vocab_size)

    def make_lm_head(self) -> TiedLmHead:
        """Logits over the vocabulary, by the token table."""
        return TiedLmHead(self.num_tokens)

    def make_cache(
        self, batch: int, kv_length: int, source_length: int, dtype: Dtype | None = None
    ) -> DecoderCache:
        """An empty cache of ``kv_length`` slots a row; of the model's dtype unless told."""
        return cache.make_decoder(
            self.decoder_layers,
            batch,
            kv_length,
            source_length,
            self.num_heads,
            self.hidden_dim // self.num_heads,
            dtype or jnp.dtype(self.dtype or "float32"),
        )

    def make(self) -> "Transformer":
        """The model without a head. ``vocab_size`` must be known by now."""
        if self.vocab_size is None:
            raise InputError("vocab_size=None: set it to the size of the tokenizer's vocabulary")
        return Transformer(config=self)


# TINY is the one of Wu et al. (2021, arXiv:2105.14462, section 3) for the 29,000 pairs of Multi30k.
TINY = TransformerConfig(num_layers=4, hidden_dim=128, num_heads=4, mlp_dim=256, dropout_rate=0.3)
BASE = TransformerConfig()
BIG = TransformerConfig(hidden_dim=1024, num_heads=16, mlp_dim=4096, dropout_rate=0.3)


def _attention(c: TransformerConfig) -> MultiHeadAttention:
    return MultiHeadAttention(
        c.num_heads,
        c.hidden_dim // c.num_heads,
        use_bias=False,
        dtype=jnp.dtype(c.dtype or "float32"),
        kernel_init=nn.initializers.xavier_uniform(),
    )


def _mlp(c: TransformerConfig) -> Mlp:
    dtype, init = jnp.dtype(c.dtype or "float32"), nn.initializers.xavier_uniform()
    return Mlp(c.mlp_dim, ACTIVATIONS["relu"], True, dtype, init)


def _norm(c: TransformerConfig) -> LayerNorm:
    return LayerNorm(c.epsilon, jnp.dtype(c.dtype or "float32"))


class EncoderBlock(nn.Module):
    """``x = norm(x + attention(x)); x = norm(x + mlp(x))``."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.attention, self.attention_norm = _attention(c), _norm(c)
        self.mlp, self.mlp_norm = _mlp(c), _norm(c)
        self.dropout = Dropout(c.dropout_rate)

    def __call__(self, x: Hidden, mask: Mask | None, deterministic: bool) -> Hidden:
        y = self.attention(x, mask=mask, deterministic=deterministic)
        x = self.attention_norm(x + self.dropout(y, deterministic=deterministic))
        x = self.mlp_norm(x + self.dropout(self.mlp(x), deterministic=deterministic))
        return constrain(x, ("batch", "length", "embed"))


class DecoderBlock(nn.Module):
    """An :class:`EncoderBlock` with attention to the encoder's hidden states between the two."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.attention, self.attention_norm = _attention(c), _norm(c)
        self.cross_attention, self.cross_attention_norm = _attention(c), _norm(c)
        self.mlp, self.mlp_norm = _mlp(c), _norm(c)
        self.dropout = Dropout(c.dropout_rate)

    def __call__(
        self,
        x: Hidden,
        encoded: Encoded,
        mask: Mask,
        source_mask: SourceMask | None,
        deterministic: bool,
    ) -> Hidden:
        y = self.attention(x, mask=mask, deterministic=deterministic)
        return self._rest(x, y, *self.project(encoded), source_mask, deterministic)

    def project(self, encoded: Encoded) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Keys and values of the encoder's hidden states."""
        return self.cross_attention.project(encoded)

    def extend(
        self, x: Hidden, cache: DecoderLayerCache, mask: Mask, source_mask: SourceMask
    ) -> tuple[Hidden, DecoderLayerCache]:
        """The same over what is in the cache."""
        y, own = self.attention.extend(x, cache.own, mask=mask)
        source = cache.source.read(x.shape[0] * x.shape[1])
        return self._rest(x, y, *source, source_mask, True), replace(cache, own=own)

    def _rest(
        self,
        x: Hidden,
        y: Hidden,
        key: Array,
        value: Array,
        source_mask: SourceMask | None,
        deterministic: bool,
    ) -> Hidden:
        x = self.attention_norm(x + self.dropout(y, deterministic=deterministic))
        y = self.cross_attention.over(x, key, value, mask=source_mask, deterministic=deterministic)
        x = self.cross_attention_norm(x + self.dropout(y, deterministic=deterministic))
        x = self.mlp_norm(x + self.dropout(self.mlp(x), deterministic=deterministic))
        return constrain(x, ("batch", "length", "embed"))


class Transformer(nn.Module):
    """Tokens of a source and of a target to the target's hidden states."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        assert c.vocab_size is not None  # make() has seen to it
        dtype = jnp.dtype(c.dtype or "float32")
        init = nn.initializers.normal(c.hidden_dim**-0.5)
        self.token_embed = Embed(c.vocab_size, c.hidden_dim, dtype, init, axis="vocab")
        if c.source_vocab_size is not None:
            self.source_embed = Embed(c.source_vocab_size, c.hidden_dim, dtype, init, axis="vocab")
        self.embed_dropout = Dropout(c.dropout_rate)
        self.encoder_layers = EncoderBlock(c)
        self.decoder_layers = DecoderBlock(c)

    def __call__(
        self,
        tokens: Int[Array, "batch source_length"],
        decoder_tokens: Tokens,
        *,
        positions: Int[Array, "#batch source_length"] | None = None,
        segment_ids: Int[Array, "batch source_length"] | None = None,
        decoder_positions: Int[Array, "#batch length"] | None = None,
        decoder_segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        """Hidden states of the target, of which none depends on later tokens of it.

        Args:
            tokens: of the source, below ``source_vocab_size``, or ``vocab_size`` without that.
            decoder_tokens: of the target, as the decoder reads it: moved by one, behind a start.
            positions: ``None``, counted from 0 in each row; so with ``decoder_positions``.
            segment_ids: positions of equal id attend to each other, those of the target's to the
                source's, too; below 0 is padding; ``None``, all 0.
            decoder_segment_ids: those of the target.
            deterministic: no dropout; otherwise pass ``rngs={"dropout": key}`` to ``apply``.
        """
        encoded = self.encode(
            tokens, positions=positions, segment_ids=segment_ids, deterministic=deterministic
        )
        return self.decode(
            decoder_tokens,
            encoded,
            encoded_segment_ids=segment_ids,
            positions=decoder_positions,
            segment_ids=decoder_segment_ids,
            deterministic=deterministic,
        )

    def encode(
        self,
        tokens: Tokens,
        *,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        """Hidden states of the source."""
        c, mask = self.config, masks.cross(segment_ids, segment_ids)
        table = self.token_embed if c.source_vocab_size is None else self.source_embed
        x = self._embed(table, tokens, positions, deterministic)
        options = {"unroll": c.unroll, "remat": c.remat}
        return apply_stack(self.encoder_layers, c.num_layers, x, mask, deterministic, **options)

    def decode(
        self,
        decoder_tokens: Tokens,
        encoded: Encoded,
        *,
        encoded_segment_ids: Int[Array, "batch source_length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        """Hidden states of the target, from those of the source."""
        c = self.config
        return apply_stack(
            self.decoder_layers,
            c.decoder_layers,
            self._embed(self.token_embed, decoder_tokens, positions, deterministic),
            encoded,
            masks.causal(decoder_tokens.shape[1], segment_ids),
            masks.cross(segment_ids, encoded_segment_ids),
            deterministic,
            unroll=c.unroll,
            remat=c.remat,
        )

    def start(
        self,
        encoded: Encoded,
        segment_ids: Int[Array, "sources source_length"] | None,
        cache: DecoderCache,
    ) -> DecoderCache:
        """An empty cache with what the decoder reads of the source, computed once."""
        layers = project_stack(self.decoder_layers, self.config.decoder_layers, encoded)
        return cache.with_source(layers, segment_ids)

    def extend(
        self,
        decoder_tokens: Tokens,
        cache: DecoderCache,
        *,
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> tuple[Hidden, DecoderCache]:
        """Hidden states of further tokens, which see what is in the cache; and the longer cache.

        Args:
            decoder_tokens: how targets begin, padded on the left, or each row's next token.
            positions: from 0 in each row.
            segment_ids: of equal id with what a token may see; -1 where it is padding; ``None``,
                all 0.
        """
        if segment_ids is None:
            segment_ids = jnp.zeros_like(decoder_tokens)
        cache, *seen = cache.open(segment_ids)
        x = self._embed(self.token_embed, decoder_tokens, positions, True)
        return extend_stack(self.decoder_layers, self.config.decoder_layers, x, cache, *seen)

    def _embed(
        self,
        table: Embed,
        tokens: Tokens,
        positions: Int[Array, "#batch length"] | None,
        deterministic: bool,
    ) -> Hidden:
        c = self.config
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None, :]
        x = table(tokens).astype(jnp.float32) * c.hidden_dim**0.5
        x = (x + sinusoids(positions, c.hidden_dim)).astype(jnp.dtype(c.dtype or "float32"))
        x = self.embed_dropout(x, deterministic=deterministic)
        return constrain(x, ("batch", "length", "embed"))
