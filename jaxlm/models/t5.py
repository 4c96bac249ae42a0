"""T5 (Raffel et al. 2020, arXiv:1910.10683, section 2.1): an encoder and a decoder.

It differs from the Transformer (``transformer.py``) in that: blocks normalise what goes into them
(pre-norm) without mean and bias, and a last norm follows; there are no biases at all; positions
are a bias of the scores by distance, which all layers of a stack share, while the decoder's
attention to the encoder has none; scores are not scaled, but queries start smaller; and dropout is
also in the feed-forward blocks, on attention weights and behind the last norm. Version 1.1
(Shazeer 2020, arXiv:2002.05202) has gated blocks and a kernel of its own for the logits.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import InputError
from jaxlm.models.heads import TiedLmHead, UntiedLmHead
from jaxlm.models.model import check_numbers
from jaxlm.nn import cache, masks
from jaxlm.nn.attention import MultiHeadAttention, dot_product_attention
from jaxlm.nn.cache import DecoderCache, LayerCache
from jaxlm.nn.cache import DecoderLayerCache as Layer
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.embed import Embed
from jaxlm.nn.feedforward import ACTIVATIONS, Activation, GatedMlp, Mlp
from jaxlm.nn.norms import RmsNorm
from jaxlm.nn.relative_bias import RelativeBias
from jaxlm.nn.stack import Remat, apply_stack, extend_stack, project_stack
from jaxlm.sharding import constrain
from jaxlm.typing import Bias, Dtype, Encoded, Hidden, Mask, SourceMask, Tokens


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes are those of the base model (section 3.1.2), of 220 million parameters."""

    vocab_size: int | None = None
    """Rows of the token table; None: the tokenizer's size, rounded up to a multiple of 64 and of
    the shards into which the mesh splits the table."""
    num_tokens: int | None = None
    """Tokens that there are, if the table has more rows, which then are never predicted; None: all
    rows are tokens."""
    num_layers: int = 12
    """Blocks of the encoder."""
    num_decoder_layers: int | None = None
    """Blocks of the decoder; None: as many as the encoder's."""
    hidden_dim: int = 768
    num_heads: int = 12
    head_dim: int = 64
    """Channels of one head."""
    mlp_dim: int = 3072
    num_buckets: int = 32
    """Distances that are told apart: in the encoder, half of them are of what is behind."""
    max_distance: int = 128
    """From here on, distances are not told apart."""
    activation: Activation = "relu"
    """Inside the feed-forward blocks; gelu_tanh in version 1.1."""
    gated: bool = False
    """Feed-forward blocks multiply what is activated by a second linear map, as in version 1.1."""
    tied: bool = True
    """Logits by the token table; otherwise by a kernel of their own, as in version 1.1."""
    scale_outputs: bool = True
    """Divide by sqrt(hidden_dim) what the logits are of; not in version 1.1."""
    dropout_rate: float = 0.1
    epsilon: float = 1e-6
    """Added to the mean square by normalisation."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products and activations; None: float32, and in a training run bfloat16 on
    GPUs and TPUs."""
    unroll: int | None = None
    """Blocks compiled as one iteration of a loop over layers; None = no loop (see nn.stack)."""
    remat: Remat | None = None
    """What the backward pass recomputes: full, dots (all but matrix products), or None: nothing."""

    def __post_init__(self) -> None:
        sizes = "num_heads", "head_dim", "hidden_dim", "mlp_dim"
        for name in ("num_layers", "num_decoder_layers", *sizes):
            if (value := vars(self)[name]) is not None and value < 1:
                raise InputError(f"{name}={value} is not above 0")
        if self.num_buckets < 4 or self.num_buckets % 2:
            raise InputError(
                f"num_buckets={self.num_buckets} is not an even number from 4 up; 32 is usual"
            )
        if self.max_distance <= self.num_buckets // 2:
            raise InputError(
                f"max_distance={self.max_distance} is not above half of num_buckets="
                f"{self.num_buckets}: so many distances are told apart one by one"
            )
        check_numbers(self)

    @property
    def decoder_layers(self) -> int:
        """``num_decoder_layers``, resolved."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def max_length(self) -> None:
        """Any: large distances are not told apart."""
        return None

    def forward_flops(self, length: int, num_predicted: int) -> float:
        """FLOPs of a source of ``length`` tokens and a target of ``num_predicted``.

        The products alone, a multiply-add as two: projections, attention over all positions (half
        of the target's are masked, but computed), and the vocabulary at each of the target.
        """
        h, inner = self.hidden_dim, self.num_heads * self.head_dim
        mlp = (3 if self.gated else 2) * h * self.mlp_dim
        encoder = 2 * (4 * h * inner + mlp) + 4 * length * inner
        decoder = 2 * (6 * h * inner + mlp) + 4 * (num_predicted + length) * inner
        source = self.num_layers * encoder + self.decoder_layers * 2 * 2 * h * inner
        target = self.decoder_layers * decoder + 2 * h * (self.vocab_size or 0)
        return float(length * source + num_predicted * target)

    @property
    def unrolls_layers(self) -> bool:
        """Whether the blocks are computed without a loop."""
        return self.unroll is None

    @property
    def is_causal(self) -> bool:
        """The decoder is, but sees all of the source."""
        return False

    def with_dropout(self, rate: float) -> "T5Config":
        """The same with that rate."""
        return replace(self, dropout_rate=rate)

    def with_vocab_size(self, rows: int) -> "T5Config":
        """The same with a token table of so many rows; what is added is never predicted."""
        return replace(self, vocab_size=rows, num_tokens=self.num_tokens or self.vocab_size)

    def make_lm_head(self) -> TiedLmHead | UntiedLmHead:
        """Logits over the vocabulary."""
        scale = self.hidden_dim**-0.5 if self.scale_outputs else 1.0
        if self.tied:
            return TiedLmHead(self.num_tokens, scale)
        dtype = jnp.dtype(self.dtype or "float32")
        return UntiedLmHead(dtype, self.hidden_dim**-0.5, self.num_tokens, scale)

    def make_cache(
        self, batch: int, kv_length: int, source_length: int, dtype: Dtype | None = None
    ) -> DecoderCache:
        """An empty cache of ``kv_length`` slots a row; of the model's dtype unless told."""
        sizes = self.decoder_layers, batch, kv_length, source_length, self.num_heads, self.head_dim
        return cache.make_decoder(*sizes, dtype or jnp.dtype(self.dtype or "float32"))

    def make(self) -> "T5":
        """The model without a head. ``vocab_size`` must be known by now."""
        if self.vocab_size is None:
            raise InputError("vocab_size=None: set it to the size of the tokenizer's vocabulary")
        return T5(config=self)


# With a vocabulary of 32,128: 60, 223, 77 and 248 million parameters; TINY is for CPUs.
SMALL = T5Config(num_layers=6, hidden_dim=512, num_heads=8, mlp_dim=2048)
BASE = T5Config()
_V1_1: Any = dict(activation="gelu_tanh", gated=True, tied=False, scale_outputs=False)
SMALL_V1_1 = T5Config(num_layers=8, hidden_dim=512, num_heads=6, mlp_dim=1024, **_V1_1)
BASE_V1_1 = T5Config(mlp_dim=2048, **_V1_1)
TINY = T5Config(num_layers=4, hidden_dim=128, num_heads=4, head_dim=32, mlp_dim=256, **_V1_1)


def _attention(c: T5Config) -> MultiHeadAttention:
    return MultiHeadAttention(
        c.num_heads,
        c.head_dim,
        dropout_rate=c.dropout_rate,
        use_bias=False,
        dtype=jnp.dtype(c.dtype or "float32"),
        kernel_init=nn.initializers.normal(c.hidden_dim**-0.5),
        attend=_unscaled,
        out_init=nn.initializers.normal((c.num_heads * c.head_dim) ** -0.5),
        query_init=nn.initializers.normal((c.hidden_dim * c.head_dim) ** -0.5),
    )


_unscaled = partial(dot_product_attention, scale=1.0)


def _mlp(c: T5Config) -> Mlp:
    return (GatedMlp if c.gated else Mlp)(
        c.mlp_dim,
        ACTIVATIONS[c.activation],
        False,
        jnp.dtype(c.dtype or "float32"),
        nn.initializers.normal(c.hidden_dim**-0.5),
        nn.initializers.normal(c.mlp_dim**-0.5),
        c.dropout_rate,
    )


def _norm(c: T5Config) -> RmsNorm:
    return RmsNorm(c.epsilon, jnp.dtype(c.dtype or "float32"))


class EncoderBlock(nn.Module):
    """``x = x + attention(norm(x)); x = x + mlp(norm(x))``."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.attention, self.attention_norm = _attention(c), _norm(c)
        self.mlp, self.mlp_norm, self.dropout = _mlp(c), _norm(c), Dropout(c.dropout_rate)

    def __call__(self, x: Hidden, mask: Mask | None, bias: Bias, deterministic: bool) -> Hidden:
        options: dict[str, Any] = {"deterministic": deterministic}
        y = self.attention(self.attention_norm(x), mask=mask, bias=bias, **options)
        x = x + self.dropout(y, **options)
        x = x + self.dropout(self.mlp(self.mlp_norm(x), **options), **options)
        return constrain(x, ("batch", "length", "embed"))


class Seen(NamedTuple):
    """What decoders may attend to of their own and of the source; and the bias of the former."""

    mask: Mask
    source_mask: SourceMask | None
    bias: Bias


class DecoderBlock(nn.Module):
    """An :class:`EncoderBlock` with attention to the encoder's hidden states between the two."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.attention, self.attention_norm = _attention(c), _norm(c)
        self.cross_attention, self.cross_attention_norm = _attention(c), _norm(c)
        self.mlp, self.mlp_norm, self.dropout = _mlp(c), _norm(c), Dropout(c.dropout_rate)

    def __call__(self, x: Hidden, encoded: Encoded, seen: Seen, deterministic: bool) -> Hidden:
        return self._run(x, None, self.project(encoded), seen, deterministic)[0]

    def project(self, encoded: Encoded) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Keys and values of the encoder's hidden states."""
        return self.cross_attention.project(encoded)

    def extend(self, x: Hidden, cache: Layer, seen: Seen) -> tuple[Hidden, Layer]:
        """The same over what is in the cache."""
        x, own = self._run(x, cache.own, cache.source.read(x.shape[0] * x.shape[1]), seen, True)
        return x, replace(cache, own=own)

    def _run(
        self,
        x: Hidden,
        cache: LayerCache | None,
        source: tuple[Float[Array, "..."], Float[Array, "..."]],
        seen: Seen,
        deterministic: bool,
    ) -> tuple[Hidden, LayerCache | None]:
        options: dict[str, Any] = {"deterministic": deterministic}
        y = self.attention_norm(x)
        y, cache = self.attention.extend(y, cache, mask=seen.mask, bias=seen.bias, **options)
        x = x + self.dropout(y, **options)
        y = self.cross_attention_norm(x)
        y = self.cross_attention.over(y, *source, mask=seen.source_mask, **options)
        x = x + self.dropout(y, **options)
        x = x + self.dropout(self.mlp(self.mlp_norm(x), **options), **options)
        return constrain(x, ("batch", "length", "embed")), cache


class T5(nn.Module):
    """Tokens of a source and of a target to the target's hidden states."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        assert c.vocab_size is not None  # make() has seen to it
        dtype, init = jnp.dtype(c.dtype or "float32"), nn.initializers.normal
        self.token_embed = Embed(c.vocab_size, c.hidden_dim, dtype, init(1.0), axis="vocab")
        relative = c.num_heads, c.num_buckets, c.max_distance, c.hidden_dim**-0.5
        self.encoder_bias, self.decoder_bias = RelativeBias(*relative), RelativeBias(*relative)
        self.dropout = Dropout(c.dropout_rate)
        self.encoder_layers, self.encoder_norm = EncoderBlock(c), _norm(c)
        self.decoder_layers, self.decoder_norm = DecoderBlock(c), _norm(c)

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
            tokens: of the source, below ``vocab_size``.
            decoder_tokens: of the target, as the decoder reads it: moved by one, behind padding.
            positions: not used, nor are those of the target: distances within a row count.
            segment_ids: equal ids attend to each other, the target's to the source's, too; below 0
                is padding; ``None``, all 0.
            decoder_segment_ids: those of the target.
            deterministic: no dropout; otherwise pass ``rngs={"dropout": key}`` to ``apply``.
        """
        encoded = self.encode(tokens, segment_ids=segment_ids, deterministic=deterministic)
        return self.decode(
            decoder_tokens,
            encoded,
            encoded_segment_ids=segment_ids,
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
        c = self.config
        x = apply_stack(
            self.encoder_layers,
            c.num_layers,
            self._embed(tokens, deterministic),
            masks.cross(segment_ids, segment_ids),
            self.encoder_bias.around(jnp.arange(tokens.shape[1])),
            deterministic,
            unroll=c.unroll,
            remat=c.remat,
        )
        return self.dropout(self.encoder_norm(x), deterministic=deterministic)

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
        c, places = self.config, jnp.arange(decoder_tokens.shape[1])
        mask = masks.causal(len(places), segment_ids)
        source_mask = masks.cross(segment_ids, encoded_segment_ids)
        x = apply_stack(
            self.decoder_layers,
            c.decoder_layers,
            self._embed(decoder_tokens, deterministic),
            encoded,
            Seen(mask, source_mask, self.decoder_bias.before(places, places)),
            deterministic,
            unroll=c.unroll,
            remat=c.remat,
        )
        return self.dropout(self.decoder_norm(x), deterministic=deterministic)

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

        The tokens are how targets begin, padded on the left with segment ids of -1, or each row's
        next. Positions are not used: distances in the cache count.
        """
        if segment_ids is None:
            segment_ids = jnp.zeros_like(decoder_tokens)
        places = cache.index + jnp.arange(decoder_tokens.shape[1])
        bias = self.decoder_bias.before(places, jnp.arange(cache.kv_length))
        cache, mask, source_mask = cache.open(segment_ids)
        x, seen = self._embed(decoder_tokens, True), Seen(mask, source_mask, bias)
        x, cache = extend_stack(self.decoder_layers, self.config.decoder_layers, x, cache, seen)
        return self.decoder_norm(x), cache

    def _embed(self, tokens: Tokens, deterministic: bool) -> Hidden:
        x = self.dropout(self.token_embed(tokens), deterministic=deterministic)
        return constrain(x, ("batch", "length", "embed"))
