"""Llama (Touvron et al. 2023, arXiv:2302.13971, section 2.2; Llama 2, arXiv:2307.09288, app. A.2).

A Transformer in which no position sees a later one. It differs from GPT-2's (``gpt2.py``) in that:
norms have neither mean nor bias (RMSNorm); positions turn queries and keys (``nn/positions.py``)
instead of being added to the embeddings; feed-forward blocks are gated (SwiGLU); heads of queries
may share one of keys and values; and, unless asked for, there is no bias and no dropout.
"""

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.errors import InputError
from jaxlm.models.heads import TiedLmHead, UntiedLmHead
from jaxlm.models.model import check_numbers
from jaxlm.nn import cache, choose, masks, positions
from jaxlm.nn.attention import MultiHeadAttention
from jaxlm.nn.cache import Cache, LayerCache
from jaxlm.nn.choose import Attends, Attention
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.embed import Embed
from jaxlm.nn.feedforward import ACTIVATIONS, Activation, GatedMlp
from jaxlm.nn.masks import Visibility
from jaxlm.nn.norms import RmsNorm
from jaxlm.nn.positions import Rotary
from jaxlm.nn.stack import Remat, apply_stack, extend_stack
from jaxlm.sharding import constrain
from jaxlm.typing import Dtype, Hidden, Tokens


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes are those of a model of 160 million parameters."""

    vocab_size: int | None = None
    """Rows of the token table; None: the tokenizer's size, rounded up to a multiple of 64 and of
    the shards into which the mesh splits the table."""
    num_tokens: int | None = None
    """Tokens that there are, if the table has more rows, which then are never predicted; None: all
    rows are tokens."""
    num_layers: int = 12
    hidden_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int | None = None
    """Heads of keys and values, each for as many consecutive heads of queries; None: one each."""
    head_dim: int | None = None
    """Channels of one head; None: hidden_dim / num_heads."""
    mlp_dim: int = 2048
    max_length: int = 2048
    """The longest input, in tokens."""
    rope_base: float = 10_000.0
    """The largest wavelength of the rotations, in positions by 2π."""
    rope_scaling: positions.Scaling | None = None
    """How the rotations are slowed down for rows longer than those of pretraining; None: not."""
    activation: Activation = "silu"
    """The gates' in the feed-forward blocks."""
    tied: bool = False
    """Logits by the token table; otherwise by a kernel of their own."""
    attention_bias: bool = False
    """Biases in attention's four linear maps."""
    mlp_bias: bool = False
    """Biases in the feed-forward blocks' three linear maps."""
    dropout_rate: float = 0.0
    """Dropout rate of embeddings and of what each sub-layer adds."""
    attention_dropout_rate: float = 0.0
    epsilon: float = 1e-5
    """Added to the mean square by normalisation."""
    initializer_std: float = 0.02
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products and activations; None: float32, and in a training run bfloat16 on
    GPUs and TPUs."""
    attention: Attention | None = None
    """How attention is computed; None: plainly, and in a run as its --attention says."""
    unroll: int | None = None
    """Blocks compiled as one iteration of a loop over layers; None = no loop (see nn.stack)."""
    remat: Remat | None = None
    """What the backward pass recomputes: full, dots (all but matrix products), or None: nothing."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "hidden_dim", "mlp_dim", "max_length"):
            if vars(self)[name] < 1:
                raise InputError(f"{name}={vars(self)[name]} is not above 0")
        if self.head_dim is None and self.hidden_dim % self.num_heads:
            raise InputError(
                f"hidden_dim={self.hidden_dim} is not divisible by num_heads={self.num_heads}: "
                "change one of them, or give head_dim"
            )
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise InputError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.head_size < 1 or self.head_size % 2:
            raise InputError(
                f"head_dim={self.head_size} is not even: its channels are turned in pairs"
            )
        check_numbers(self)
        if self.rope_scaling is not None:
            check_numbers(self.rope_scaling)

    @property
    def head_size(self) -> int:
        """``head_dim``, resolved."""
        return self.hidden_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """``num_kv_heads``, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def forward_flops(self, length: int, num_predicted: int) -> float:
        """FLOPs of one row through the layers and the head, a multiply-add as two.

        The products alone: projections, attention over all ``length`` positions (half of them are
        masked, but computed), and the vocabulary at ``num_predicted`` of them.
        """
        h, heads, kv_heads = self.hidden_dim, self.num_heads, self.kv_heads
        layer = 2 * (2 * h * (heads + kv_heads) * self.head_size + 3 * h * self.mlp_dim)
        layer += 4 * length * heads * self.head_size
        head = 2 * h * (self.vocab_size or 0)
        return float(length * self.num_layers * layer + num_predicted * head)

    @property
    def unrolls_layers(self) -> bool:
        """Whether the blocks are computed without a loop."""
        return self.unroll is None

    @property
    def attends(self) -> Attends:
        """What its attention is like."""
        return Attends(self.head_size, self.attention_dropout_rate)

    @property
    def is_causal(self) -> bool:
        """No position sees a later one."""
        return True

    def with_dropout(self, rate: float) -> "LlamaConfig":
        """The same with that rate in all places."""
        return replace(self, dropout_rate=rate, attention_dropout_rate=rate)

    def with_vocab_size(self, rows: int) -> "LlamaConfig":
        """The same with a token table of so many rows; what is added is never predicted."""
        return replace(self, vocab_size=rows, num_tokens=self.num_tokens or self.vocab_size)

    def make_lm_head(self) -> TiedLmHead | UntiedLmHead:
        """Logits over the vocabulary."""
        if self.tied:
            return TiedLmHead(self.num_tokens)
        dtype = jnp.dtype(self.dtype or "float32")
        return UntiedLmHead(dtype, self.initializer_std, self.num_tokens)

    def make_cache(self, batch: int, kv_length: int, dtype: Dtype | None = None) -> Cache:
        """An empty cache of ``kv_length`` slots a row; of the model's dtype unless told."""
        dtype = dtype or jnp.dtype(self.dtype or "float32")
        return cache.make(self.num_layers, batch, kv_length, self.kv_heads, self.head_size, dtype)

    def make(self) -> "Llama":
        """The model without a head. ``vocab_size`` must be known by now."""
        if self.vocab_size is None:
            raise InputError("vocab_size=None: set it to the size of the tokenizer's vocabulary")
        return Llama(config=self)


# With a vocabulary of 32,000: 15, 162 and 1,100 million parameters. The first is as Karpathy's
# llama2.c, the last as TinyLlama (Zhang et al. 2024, arXiv:2401.02385).
TINY = LlamaConfig(num_layers=6, hidden_dim=288, num_heads=6, mlp_dim=768, tied=True)
SMALL = LlamaConfig(mlp_dim=3072)
BASE = LlamaConfig(num_layers=22, hidden_dim=2048, num_heads=32, num_kv_heads=4, mlp_dim=5632)


class LlamaBlock(nn.Module):
    """Pre-norm: ``x = x + attention(norm(x)); x = x + mlp(norm(x))``."""

    config: LlamaConfig

    def __call__(self, x: Hidden, mask: Visibility, rotary: Rotary, deterministic: bool) -> Hidden:
        return self.extend(x, None, mask, rotary, deterministic)[0]

    @nn.compact
    def extend(
        self,
        x: Hidden,
        cache: LayerCache | None,
        mask: Visibility,
        rotary: Rotary,
        deterministic: bool,
    ) -> tuple[Hidden, LayerCache | None]:
        """The same over what is in the cache, too."""
        c = self.config
        dtype = jnp.dtype(c.dtype or "float32")
        init = nn.initializers.normal(c.initializer_std)
        out_init = nn.initializers.normal(c.initializer_std / (2 * c.num_layers) ** 0.5)
        attention = MultiHeadAttention(
            c.num_heads,
            c.head_size,
            dropout_rate=c.attention_dropout_rate,
            use_bias=c.attention_bias,
            dtype=dtype,
            kernel_init=init,
            attend=choose.named(c.attention),
            num_kv_heads=c.kv_heads,
            out_init=out_init,
            name="attention",
        )
        mlp = GatedMlp(
            c.mlp_dim, ACTIVATIONS[c.activation], c.mlp_bias, dtype, init, out_init, name="mlp"
        )
        y = RmsNorm(c.epsilon, dtype, name="attention_norm")(x)
        y, cache = attention.extend(y, cache, mask=mask, rotary=rotary, deterministic=deterministic)
        x = x + Dropout(c.dropout_rate)(y, deterministic=deterministic)
        y = mlp(RmsNorm(c.epsilon, dtype, name="mlp_norm")(x))
        x = x + Dropout(c.dropout_rate)(y, deterministic=deterministic)
        return constrain(x, ("batch", "length", "embed")), cache


class Llama(nn.Module):
    """Tokens to hidden states ``[batch, length, embed]``, of which none depends on later tokens."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        assert c.vocab_size is not None  # make() has seen to it
        init = nn.initializers.normal(c.initializer_std)
        dtype = jnp.dtype(c.dtype or "float32")
        self.token_embed = Embed(c.vocab_size, c.hidden_dim, dtype, init, axis="vocab")
        self.embed_dropout = Dropout(c.dropout_rate)
        self.layers = LlamaBlock(c)
        self.final_norm = RmsNorm(c.epsilon, dtype)

    def __call__(
        self,
        tokens: Tokens,
        *,
        token_type_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        mask: Visibility | None = None,
        deterministic: bool = True,
    ) -> Hidden:
        """Hidden states of rows.

        Args:
            tokens: ids below ``vocab_size``.
            token_type_ids: not used: there are no token types.
            positions: by which queries and keys are turned; ``None``, counted from 0 in each row.
            segment_ids: positions of equal id attend to each other; ``None``, no restriction.
            mask: further restriction of attention, such as ``masks.padding``.
            deterministic: no dropout; otherwise pass ``rngs={"dropout": key}`` to ``apply``.
        """
        c = self.config
        length = tokens.shape[1]
        if length > c.max_length:
            raise InputError(f"rows of {length} tokens do not fit max_length={c.max_length}")
        if positions is None:
            positions = jnp.arange(length)[None, :]
        seen = masks.visible(segment_ids, mask, after=0)
        x = self.embed_dropout(self.token_embed(tokens), deterministic=deterministic)
        x = constrain(x, ("batch", "length", "embed"))
        x = apply_stack(
            self.layers,
            c.num_layers,
            x,
            seen,
            self._rotary(positions),
            deterministic,
            unroll=c.unroll,
            remat=c.remat,
        )
        return self.final_norm(x)

    def extend(
        self,
        tokens: Tokens,
        cache: Cache,
        *,
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> tuple[Hidden, Cache]:
        """Hidden states of further tokens, which see what is in the cache; and the longer cache.

        Args:
            tokens: the prompts, padded on the left, or each row's next token.
            positions: by which queries and keys are turned.
            segment_ids: of equal id with what a token may see; -1 where it is padding; ``None``,
                all 0.
        """
        if segment_ids is None:
            segment_ids = jnp.zeros_like(tokens)
        cache, mask = cache.open(segment_ids)
        x = constrain(self.token_embed(tokens), ("batch", "length", "embed"))
        rotary, num_layers = self._rotary(positions), self.config.num_layers
        x, cache = extend_stack(self.layers, num_layers, x, cache, mask, rotary, True)
        return self.final_norm(x), cache

    def _rotary(self, at: Int[Array, "#batch length"]) -> Rotary:
        c = self.config
        frequencies = positions.frequencies(c.head_size, c.rope_base)
        if c.rope_scaling is not None:
            frequencies = c.rope_scaling(frequencies)
        return positions.rotary(at, frequencies)
