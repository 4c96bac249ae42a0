"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3).

A Transformer in which no position sees a later one. It differs from BERT's (``bert.py``) in that:
layers normalise what goes into them (pre-norm), and a last norm follows; there is neither a norm
behind the embeddings nor a token type; kernels whose output is added to the residual stream start
smaller, by ``1 / sqrt(2 num_layers)``; GELU is approximated by a tanh; and the head is the token
table alone. As in the published code, weights are drawn from a normal distribution.
"""

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.errors import InputError
from jaxlm.models.heads import TiedLmHead, UntiedLmHead
from jaxlm.models.model import check_numbers
from jaxlm.nn import cache, choose, masks
from jaxlm.nn.attention import MultiHeadAttention
from jaxlm.nn.cache import Cache, LayerCache
from jaxlm.nn.choose import Attends, Attention
from jaxlm.nn.dropout import Dropout
from jaxlm.nn.embed import Embed
from jaxlm.nn.feedforward import ACTIVATIONS, Activation, Mlp
from jaxlm.nn.masks import Visibility
from jaxlm.nn.norms import LayerNorm
from jaxlm.nn.stack import Remat, apply_stack, extend_stack
from jaxlm.sharding import constrain
from jaxlm.typing import Dtype, Hidden, Tokens


@dataclass(frozen=True, kw_only=True)
class Gpt2Config:
    """Sizes are those of the smallest published model, of 124 million parameters."""

    vocab_size: int | None = None
    """Rows of the token table; None: the tokenizer's size, rounded up to a multiple of 64 and of
    the shards into which the mesh splits the table."""
    num_tokens: int | None = None
    """Tokens that there are, if the table has more rows, which then are never predicted; None: all
    rows are tokens."""
    num_layers: int = 12
    hidden_dim: int = 768
    num_heads: int = 12
    mlp_dim: int = 3072
    max_length: int = 1024
    """Rows of the position table, and so the longest input, in tokens."""
    activation: Activation = "gelu_tanh"
    """Inside the feed-forward blocks; gelu_tanh is called gelu_new elsewhere."""
    tied: bool = True
    """Logits by the token table; otherwise by a kernel of their own."""
    dropout_rate: float = 0.1
    """Dropout rate of what each sub-layer adds."""
    embed_dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    epsilon: float = 1e-5
    """Added to the variance by layer normalisation."""
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
        if self.hidden_dim % self.num_heads:
            raise InputError(
                f"hidden_dim={self.hidden_dim} is not divisible by num_heads={self.num_heads}"
            )
        check_numbers(self)

    def forward_flops(self, length: int, num_predicted: int) -> float:
        """FLOPs of one row through the layers and the head, a multiply-add as two.

        The products alone: projections, attention over all ``length`` positions (half of them are
        masked, but computed), and the vocabulary at ``num_predicted`` of them.
        """
        h, m = self.hidden_dim, self.mlp_dim
        layer = 2 * (4 * h * h + 2 * h * m) + 4 * length * h
        head = 2 * h * (self.vocab_size or 0)
        return float(length * self.num_layers * layer + num_predicted * head)

    @property
    def unrolls_layers(self) -> bool:
        """Whether the blocks are computed without a loop."""
        return self.unroll is None

    @property
    def attends(self) -> Attends:
        """What its attention is like."""
        return Attends(self.hidden_dim // self.num_heads, self.attention_dropout_rate)

    @property
    def is_causal(self) -> bool:
        """No position sees a later one."""
        return True

    def with_dropout(self, rate: float) -> "Gpt2Config":
        """The same with that rate in all places."""
        return replace(
            self, dropout_rate=rate, embed_dropout_rate=rate, attention_dropout_rate=rate
        )

    def with_vocab_size(self, rows: int) -> "Gpt2Config":
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
        return cache.make(
            self.num_layers,
            batch,
            kv_length,
            self.num_heads,
            self.hidden_dim // self.num_heads,
            dtype or jnp.dtype(self.dtype or "float32"),
        )

    def make(self) -> "Gpt2":
        """The model without a head. ``vocab_size`` must be known by now."""
        if self.vocab_size is None:
            raise InputError("vocab_size=None: set it to the size of the tokenizer's vocabulary")
        return Gpt2(config=self)


SMALL = Gpt2Config()
MEDIUM = Gpt2Config(num_layers=24, hidden_dim=1024, num_heads=16, mlp_dim=4096)
LARGE = Gpt2Config(num_layers=36, hidden_dim=1280, num_heads=20, mlp_dim=5120)
XL = Gpt2Config(num_layers=48, hidden_dim=1600, num_heads=25, mlp_dim=6400)


class Gpt2Block(nn.Module):
    """Pre-norm: ``x = x + attention(norm(x)); x = x + mlp(norm(x))``."""

    config: Gpt2Config

    def __call__(self, x: Hidden, mask: Visibility, deterministic: bool) -> Hidden:
        return self.extend(x, None, mask, deterministic)[0]

    @nn.compact
    def extend(
        self, x: Hidden, cache: LayerCache | None, mask: Visibility, deterministic: bool
    ) -> tuple[Hidden, LayerCache | None]:
        """The same over what is in the cache, too."""
        c = self.config
        dtype = jnp.dtype(c.dtype or "float32")
        init = nn.initializers.normal(c.initializer_std)
        out_init = nn.initializers.normal(c.initializer_std / (2 * c.num_layers) ** 0.5)
        attention = MultiHeadAttention(
            c.num_heads,
            c.hidden_dim // c.num_heads,
            dropout_rate=c.attention_dropout_rate,
            dtype=dtype,
            kernel_init=init,
            attend=choose.named(c.attention),
            out_init=out_init,
            name="attention",
        )
        mlp = Mlp(c.mlp_dim, ACTIVATIONS[c.activation], True, dtype, init, out_init, name="mlp")
        y = LayerNorm(c.epsilon, dtype, name="attention_norm")(x)
        y, cache = attention.extend(y, cache, mask=mask, deterministic=deterministic)
        x = x + Dropout(c.dropout_rate)(y, deterministic=deterministic)
        y = mlp(LayerNorm(c.epsilon, dtype, name="mlp_norm")(x))
        x = x + Dropout(c.dropout_rate)(y, deterministic=deterministic)
        return constrain(x, ("batch", "length", "embed")), cache


class Gpt2(nn.Module):
    """Tokens to hidden states ``[batch, length, embed]``, of which none depends on later tokens."""

    config: Gpt2Config

    def setup(self) -> None:
        c = self.config
        assert c.vocab_size is not None  # make() has seen to it
        init = nn.initializers.normal(c.initializer_std)
        dtype = jnp.dtype(c.dtype or "float32")
        self.token_embed = Embed(c.vocab_size, c.hidden_dim, dtype, init, axis="vocab")
        self.position_embed = Embed(c.max_length, c.hidden_dim, dtype, init)
        self.embed_dropout = Dropout(c.embed_dropout_rate)
        self.layers = Gpt2Block(c)
        self.final_norm = LayerNorm(c.epsilon, dtype)

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
            positions: below ``max_length``; ``None``, counted from 0 in each row.
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
        x = self.token_embed(tokens) + self.position_embed(positions)
        x = self.embed_dropout(x, deterministic=deterministic)
        x = constrain(x, ("batch", "length", "embed"))
        x = apply_stack(
            self.layers, c.num_layers, x, seen, deterministic, unroll=c.unroll, remat=c.remat
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
            positions: below ``max_length``.
            segment_ids: of equal id with what a token may see; -1 where it is padding; ``None``,
                all 0.
        """
        if segment_ids is None:
            segment_ids = jnp.zeros_like(tokens)
        cache, mask = cache.open(segment_ids)
        x = self.token_embed(tokens) + self.position_embed(positions)
        x = constrain(x, ("batch", "length", "embed"))
        x, cache = extend_stack(self.layers, self.config.num_layers, x, cache, mask, True)
        return self.final_norm(x), cache
